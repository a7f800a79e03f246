"""Errors that a person at the command line can mend: one line, exit code 2."""


class UsageError(Exception):
    """What was asked for cannot be done; the text names the flag or field and the fix."""
