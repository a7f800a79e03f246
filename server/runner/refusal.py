"""The error of a constraint that cannot be held, before it is known which field of which request it came from."""


class Refused(Exception):
    """The constraint cannot be enforced as it stands; the message says why and what would do, in a clause."""
