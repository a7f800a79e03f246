"""Server-sent events over ASGI, and the race of any work against the client going away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
CLIENT_GONE = 499
"""Status for the metrics when the client left before there was an answer; nobody ever receives it."""

T = TypeVar("T")


def event(payload: Any) -> bytes:
    """One SSE event that carries `payload` as JSON; JSON has no raw newline, so one data line is enough."""
    return b"data: " + json.dumps(payload, separators=(",", ":")).encode() + b"\n\n"


async def gone(receive: Receive) -> None:
    """Returns when the client has disconnected. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, or None, with `work` cancelled and ended, as soon as the client goes away."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(gone(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        await _end(working, watching)


async def _end(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """Sends what `events` yields as it comes, one ASGI message each; `close` is called exactly once, however it ends.

    A slow client holds up only its own task: `send` waits for its socket. A client that goes away cancels the producer
    at once. After `keepalive_s` of silence a comment line keeps proxies from giving up (0: never). One that takes
    nothing for `stalled_s` is left (0: never), and its connection closed.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        close: Callable[[], None],
        keepalive_s: float,
        stalled_s: float = 0.0,
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers(HEADERS)
        self._events = events
        self._close = close
        self._keepalive_s = keepalive_s or None
        self._stalled_s = stalled_s or None
        self._stalled = False
        self._sent_s = 0.0
        self._sending = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        producing = asyncio.ensure_future(self._produce(send))
        watching = asyncio.ensure_future(self._watch(receive, send))
        try:
            await asyncio.wait((producing, watching), return_when=asyncio.FIRST_COMPLETED)
        finally:
            try:
                await _end(producing, watching)
            finally:
                self._close()
                await self._events.aclose()
        if producing.done() and not producing.cancelled() and not self._stalled:
            # No more_body=False before this point: the comment line of the watcher must not follow the end.
            producing.result()
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _produce(self, send: Send) -> None:
        start: Message = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        await send(start)
        loop = asyncio.get_running_loop()
        async for chunk in self._events:
            self._sending = True
            try:
                async with asyncio.timeout(self._stalled_s):
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            except TimeoutError:
                self._stalled = True
                return
            self._sending = False
            self._sent_s = loop.time()

    async def _watch(self, receive: Receive, send: Send) -> None:
        loop = asyncio.get_running_loop()
        leaving = asyncio.ensure_future(gone(receive))
        self._sent_s = loop.time()
        try:
            while not leaving.done():
                left_s = None
                if self._keepalive_s is not None:
                    left_s = max(self._sent_s + self._keepalive_s - loop.time(), 0.01)
                await asyncio.wait((leaving,), timeout=left_s)
                silent = self._keepalive_s is not None and loop.time() >= self._sent_s + self._keepalive_s
                if silent and not self._sending and not leaving.done():
                    await send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
                    self._sent_s = loop.time()
        finally:
            leaving.cancel()
            with suppress(asyncio.CancelledError):
                await leaving
