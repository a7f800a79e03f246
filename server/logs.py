"""Events to stderr: readable lines on a terminal, one JSON object per line elsewhere. Any thread.

Whatever is said while a request is served carries that request's id. Fields given as `extra=` are shown beside the
message, by their names; prompts and keys never are among them.
"""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar
from typing import Any

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
"""Of the request that this task serves; empty elsewhere."""
TRACE_PARENT: ContextVar[str] = ContextVar("trace_parent", default="")
"""The header `traceparent` that came with it."""
NOISY = ("httpx", "uvicorn.error", "asyncio")
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_COLOURS = {logging.WARNING: "\x1b[33m", logging.ERROR: "\x1b[31m", logging.CRITICAL: "\x1b[31m"}


def configure_logging(level: str, style: str) -> None:
    """`style`: `json`, `console`, or `auto`, by whether stderr is a terminal."""
    terminal = sys.stderr.isatty()
    json_lines = style == "json" or (style == "auto" and not terminal)
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if json_lines else ConsoleLines(coloured=terminal))
    handler.addFilter(_name_request)
    logging.basicConfig(handlers=[handler], force=True)
    set_level(level)
    for noisy in NOISY:
        logging.getLogger(noisy).setLevel(logging.WARNING)


def set_level(level: str) -> None:
    """Less severe events are not logged from now on."""
    logging.getLogger().setLevel(level.upper())


def _name_request(record: logging.LogRecord) -> bool:
    if "request_id" not in vars(record) and (request_id := REQUEST_ID.get()):
        record.request_id = request_id
    return True


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if name not in _OWN}


class JsonLines(logging.Formatter):
    """Time, level, logger, message, the event's own fields, and the traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": self.formatTime(record), "level": record.levelname.lower(), "logger": record.name,
            "message": record.getMessage(), **_fields(record),
        }  # fmt: skip
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


class ConsoleLines(logging.Formatter):
    """The same for a person to read; `coloured`: warnings and errors stand out."""

    def __init__(self, *, coloured: bool) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")
        self._coloured = coloured

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = super().formatMessage(record)
        line += "".join(f" {name}={value}" for name, value in _fields(record).items())
        colour = _COLOURS.get(record.levelno, "") if self._coloured else ""
        return f"{colour}{line}\x1b[0m" if colour else line
