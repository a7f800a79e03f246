"""The last warnings and errors of the log, as far as people should see them on a page. Any thread."""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass

LOGGER = "terrace"
KEPT = 50
MESSAGE_CHARS = 300


@dataclass(slots=True)
class Warned:
    """`count` times in a row, last at `time_s` (Unix)."""

    time_s: float
    level: str
    message: str
    count: int = 1


class WarningLog(logging.Handler):
    """Keeps the newest KEPT events, their first line only: no traceback, and, as in all of the log, no prompt and no
    key."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._kept: deque[Warned] = deque(maxlen=KEPT)

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage().partition("\n")[0][:MESSAGE_CHARS]
        last = self._kept[-1] if self._kept else None
        if last is not None and last.message == message:
            last.time_s, last.count = record.created, last.count + 1
            return
        self._kept.append(Warned(record.created, record.levelname.lower(), message))

    def newest(self) -> list[Warned]:
        """Newest first."""
        return list(reversed(self._kept))
