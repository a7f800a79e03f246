"""What one client connection may cost before it has sent a whole request: so many bytes, so long, and only while nobody
else needs the place.

uvicorn bounds none of these: a client that opens thousands of connections and sends one byte a minute on each
(slowloris) would hold them all, and everybody else would find the door shut. Here a head has a deadline and a size, and
where all places are taken the connection that has been idle longest gives its own to the newcomer. Loop thread.
"""

from __future__ import annotations

import asyncio
import logging
import resource
from collections import OrderedDict
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.api.errors import error_response
from server.errors import InvalidRequest, Overloaded, TerraceError

log = logging.getLogger("terrace.api")

SPARE_FILES = 256
"""Open files that are kept for everything but connections: the SSD tier, the log, the model."""
LINGER_S = 1.0
"""How long a refused client has to read why; until then what it sends is dropped."""


class HeadTooLarge(InvalidRequest):
    status = 431
    code = "headers_too_large"


class HeadTimeout(InvalidRequest):
    status = 408
    code = "headers_timeout"


@dataclass
class Doors:
    """The connections of one server. `idle`: those in no request, longest first."""

    max_connections: int
    head_bytes: int
    head_timeout_s: float
    idle: OrderedDict[Connection, None] = field(default_factory=OrderedDict)

    def protocol(self) -> type[Connection]:
        """What uvicorn's setting `http` takes."""
        return type("Connection", (Connection,), {"doors": self})


def may_connect(wanted: int) -> int:
    """How many of `wanted` connections the process may have open, after asking the system for as many files as that
    takes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted + SPARE_FILES if hard == resource.RLIM_INFINITY else min(wanted + SPARE_FILES, hard)
    if soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    allowed = max(1, min(wanted, max(soft, most) - SPARE_FILES))
    if allowed < wanted:
        log.warning("at most %d connections, not %d: the limit of open files is %d", allowed, wanted, max(soft, most))
    return allowed


class Connection(HttpToolsProtocol):
    """One connection. A request's head must be complete `head_timeout_s` after its first byte, or after the connection
    was made."""

    doors: ClassVar[Doors]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_bytes = 0
        self._deadline: asyncio.TimerHandle | None = None
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        doors = self.doors
        if len(self.connections) > doors.max_connections:
            if not doors.idle:
                self._refuse(Overloaded("too many open connections", retry_after_s=1, code="too_many_connections"))
                return
            longest, _ = doors.idle.popitem(last=False)
            longest._end()
        doors.idle[self] = None
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self.doors.idle.pop(self, None)
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        waiting = self._deadline is not None
        if waiting:
            self._head_bytes += len(data)
        elif self.cycle is None or self.cycle.response_complete:  # the next request of a kept connection begins
            self._await_head()
            self._head_bytes = len(data)
        super().data_received(data)
        if self.transport.is_closing():  # it was no HTTP, and uvicorn has said so
            return
        if self._deadline is not None and self._head_bytes > self.doors.head_bytes:
            limit = self.doors.head_bytes
            self._refuse(HeadTooLarge(f"the request's head is larger than the limit of {limit} bytes"))

    def on_headers_complete(self) -> None:
        self._stop_waiting()
        self.doors.idle.pop(self, None)
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing() and self.cycle.response_complete:
            self.doors.idle[self] = None

    def _await_head(self) -> None:
        self._deadline = self.loop.call_later(self.doors.head_timeout_s, self._too_slow)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        if self._head_bytes:
            seconds = self.doors.head_timeout_s
            self._refuse(HeadTimeout(f"the request's head did not arrive within {seconds:g} s"))
        else:
            self._end()

    def _end(self) -> None:
        self._stop_waiting()
        self.doors.idle.pop(self, None)
        self.transport.close()

    def _refuse(self, error: TerraceError) -> None:
        response = error_response(error, {"Connection": "close"})
        lines = [f"HTTP/1.1 {response.status_code} {HTTPStatus(response.status_code).phrase}".encode()]
        lines += [name + b": " + value for name, value in response.raw_headers]
        self.transport.write(b"\r\n".join([*lines, b"", bytes(response.body)]))
        self.transport.write_eof()
        self._refused = True
        self._stop_waiting()
        # Closing at once would reset the connection of a client that still sends, which then never sees the answer.
        self._deadline = self.loop.call_later(LINGER_S, self._end)
