"""What one client connection may cost before it has sent a whole request: so many bytes, so long, and only while nobody
else needs the place.

uvicorn bounds none of these: a client that opens thousands of connections and sends one byte a minute on each
(slowloris) would hold them all, and everybody else would find the door shut. Here a head has a deadline and a size, and
where all places are taken the connection that has been idle longest gives its own to the newcomer; of those that have
had no answer yet, if there are any: who comes back for more need not queue behind a flood of newcomers. Loop thread.
"""

from __future__ import annotations

import asyncio
import logging
import resource
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.api.errors import STRANGER, error_response
from server.errors import InvalidRequest, Overloaded, TerraceError

log = logging.getLogger("terrace.api")

SPARE_FILES = 256
"""Open files that are kept for everything but connections: the SSD tier, the log, the model."""
LINGER_S = 1.0
"""How long a refused client has to read why; until then what it sends is dropped."""
ENDS_A_TURN, TURN_S = 32, 0.002
"""Thousands of connections that were opened together are ended so many at a time, so long apart: everybody else waits
for one turn of the loop only."""


class HeadTooLarge(InvalidRequest):
    status = 431
    code = "headers_too_large"


class HeadTimeout(InvalidRequest):
    status = 408
    code = "headers_timeout"


class Deadlines:
    """Connections that have so many seconds for something, and what happens to those that are late. One timer for
    all of them."""

    def __init__(self, seconds: float, late: Callable[[Connection], None]) -> None:
        self.seconds = seconds
        self._late = late
        self._due_s: OrderedDict[Connection, float] = OrderedDict()  # the soonest first
        self._timer: asyncio.TimerHandle | None = None

    def __contains__(self, connection: Connection) -> bool:
        return connection in self._due_s

    def start(self, connection: Connection) -> None:
        self._due_s[connection] = connection.loop.time() + self.seconds
        self._due_s.move_to_end(connection)
        if self._timer is None:
            self._timer = connection.loop.call_later(self.seconds, self._end, connection.loop)

    def stop(self, connection: Connection) -> None:
        self._due_s.pop(connection, None)

    def _end(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer, now_s = None, loop.time()
        for _ in range(ENDS_A_TURN):
            connection, due_s = next(iter(self._due_s.items()), (None, 0.0))
            if connection is None or due_s > now_s:
                break
            del self._due_s[connection]
            self._late(connection)
        if self._due_s:
            self._timer = loop.call_later(max(TURN_S, next(iter(self._due_s.values())) - now_s), self._end, loop)


@dataclass
class Doors:
    """The connections of one server. `strangers`: those that have had no answer yet and are in no request, longest
    first; `idle`: the others in no request, likewise. `heads`: those whose head is awaited; `lingering`: those that
    were refused."""

    max_connections: int
    head_bytes: int
    head_timeout_s: float
    strangers: OrderedDict[Connection, None] = field(default_factory=OrderedDict)
    idle: OrderedDict[Connection, None] = field(default_factory=OrderedDict)

    def __post_init__(self) -> None:
        self.heads = Deadlines(self.head_timeout_s, Connection.too_slow)
        self.lingering = Deadlines(LINGER_S, Connection.end)

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
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        doors = self.doors
        if len(self.connections) > doors.max_connections:
            waiting = doors.strangers or doors.idle
            if not waiting:
                self._refuse(Overloaded("too many open connections", retry_after_s=1, code="too_many_connections"))
                return
            longest, _ = waiting.popitem(last=False)
            longest.end()
        doors.strangers[self] = None
        doors.heads.start(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._busy()
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        heads = self.doors.heads
        if self in heads:
            self._head_bytes += len(data)
        elif self.cycle is None or self.cycle.response_complete:  # the next request of a kept connection begins
            heads.start(self)
            self._head_bytes = len(data)
        super().data_received(data)
        if self.transport.is_closing():  # it was no HTTP, and uvicorn has said so
            return
        if self in heads and self._head_bytes > self.doors.head_bytes:
            limit = self.doors.head_bytes
            self._refuse(HeadTooLarge(f"the request's head is larger than the limit of {limit} bytes"))

    def on_headers_complete(self) -> None:
        stranger = self in self.doors.strangers
        self.doors.heads.stop(self)
        self._busy()
        super().on_headers_complete()
        self.scope.setdefault("state", {})[STRANGER] = stranger

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing() and self.cycle.response_complete:
            self.doors.idle[self] = None

    def too_slow(self) -> None:
        """The head is not there in time."""
        if self._head_bytes:
            self._refuse(HeadTimeout(f"the request's head did not arrive within {self.doors.heads.seconds:g} s"))
        else:
            self.end()

    def end(self) -> None:
        """Close, without a word."""
        self._stop_waiting()
        self._busy()
        self.transport.close()

    def _busy(self) -> None:
        """It has no place to give."""
        self.doors.strangers.pop(self, None)
        self.doors.idle.pop(self, None)

    def _stop_waiting(self) -> None:
        self.doors.heads.stop(self)
        self.doors.lingering.stop(self)

    def _refuse(self, error: TerraceError) -> None:
        response = error_response(error, {"Connection": "close"})
        lines = [f"HTTP/1.1 {response.status_code} {HTTPStatus(response.status_code).phrase}".encode()]
        lines += [name + b": " + value for name, value in response.raw_headers]
        self.transport.write(b"\r\n".join([*lines, b"", bytes(response.body)]))
        self.transport.write_eof()
        self._refused = True
        self._stop_waiting()
        # Closing at once would reset the connection of a client that still sends, which then never sees the answer.
        self.doors.lingering.start(self)
