"""What a connection may cost before it has sent a whole request, on real sockets over a scripted engine."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx
import uvicorn

from server.api.connections import ENDS_A_TURN, SPARE_FILES, TURN_S, Deadlines, may_connect
from server.config import Config, ModelConfig, ServerConfig
from server.process import http_config
from tests.unit.api_fake import FakeEngine, make_app

GET = b"GET /v1/models HTTP/1.1\r\nHost: here\r\n"


@asynccontextmanager
async def listening(**limits: Any) -> AsyncIterator[int]:
    """The port of a server with these limits."""
    config = Config(model=ModelConfig(model="demo"), server=ServerConfig(**limits))
    server = uvicorn.Server(http_config(make_app(FakeEngine(), **limits), config))
    listener = socket.create_server(("127.0.0.1", 0))
    serving = asyncio.create_task(server._serve([listener]))
    while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
        await asyncio.sleep(0.01)
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        await serving


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of what comes until the other side closes."""
    head, _, body = (await asyncio.wait_for(reader.read(), 20)).partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    return int(first.split()[1]), dict(line.lower().split(": ", 1) for line in lines), body


async def test_a_head_that_never_ends_is_refused_at_its_limit() -> None:
    """A head is read up to its limit and no further, wherever the bytes are: 431."""
    async with listening(max_header_bytes=1024) as port:
        for endless in (b"GET /" + b"a" * 5000, GET + b"X-Long: " + b"b" * 5000, GET + b"X: y\r\n" * 1000):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(endless)
            status, headers, body = await answer(reader)
            assert (status, headers["connection"]) == (431, "close")
            assert json.loads(body)["error"]["code"] == "headers_too_large"
            assert "1024" in json.loads(body)["error"]["message"]
            writer.close()


async def test_a_strangers_bad_body_is_refused_later() -> None:
    """The first request of a connection waits if its body is bad, the next ones do not; good ones never wait."""
    bad = b"POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\nContent-Length: 1\r\n\r\n{"
    good = GET + b"\r\n"
    waited = []
    async with listening(refusal_delay_s=0.5) as port:
        for first in (bad, good):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for request in (first, bad):
                started_s = asyncio.get_running_loop().time()
                writer.write(request)
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
                assert int(head.split()[1]) == (400 if request is bad else 200)
                length = next(
                    int(line.split(b":")[1]) for line in head.split(b"\r\n") if b"content-length" in line.lower()
                )
                await reader.readexactly(length)
                waited.append(asyncio.get_running_loop().time() - started_s >= 0.4)
            writer.close()
    assert waited == [True, False, False, False]


async def test_what_is_no_http_is_answered_once() -> None:
    """Bytes beyond the limit that are no request either get the one answer that says so."""
    async with listening(max_header_bytes=1024) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"\x00" * 5000)
        status, _, body = await answer(reader)
        assert status == 400
        assert b"HTTP/1.1" not in body
        writer.close()


async def test_a_head_in_drops_is_refused_when_its_time_is_over() -> None:
    """Slowloris: a client that sends a header now and then gets 408 when its time is over."""
    async with listening(header_timeout_s=0.3) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        dripping = asyncio.create_task(drip(writer))
        status, _, body = await answer(reader)
        dripping.cancel()
        assert status == 408
        assert json.loads(body)["error"]["code"] == "headers_timeout"
        writer.close()


async def drip(writer: asyncio.StreamWriter) -> None:
    writer.write(GET)
    while True:
        writer.write(b"X: y\r\n")
        await asyncio.sleep(0.01)


async def test_who_says_nothing_is_closed_without_a_word() -> None:
    """A connection without a byte ends with its deadline; there is no request to answer."""
    async with listening(header_timeout_s=0.2) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert await asyncio.wait_for(reader.read(), 20) == b""
        writer.close()


async def test_a_kept_connection_has_the_same_limits_for_its_next_request() -> None:
    """Waiting between requests is fine; a second request's head has the same deadline as the first."""
    async with listening(header_timeout_s=0.3, max_header_bytes=1024) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GET + b"\r\n")
        first = await reader.readuntil(b"\r\n\r\n")
        assert b" 200 " in first
        length = int(first.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        await reader.readexactly(length)
        await asyncio.sleep(0.5)  # idle for longer than a head may take: that is no offence
        writer.write(GET)
        status, _, _ = await answer(reader)
        assert status == 408
        writer.close()


async def test_the_connection_idle_longest_makes_room_for_a_new_one() -> None:
    """At the cap a new client is served and the oldest silent one is closed."""
    async with listening(max_connections=8) as port:
        idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(8)]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            assert (await client.get("/v1/models")).status_code == 200
        assert await asyncio.wait_for(idle[0][0].read(), 20) == b""
        for _, writer in idle:
            writer.close()


async def test_who_has_had_an_answer_keeps_its_place_before_a_stranger() -> None:
    """A flood of connections that ask nothing pushes out its own, not one that is kept between two requests."""
    async with listening(max_connections=8) as port:
        kept_reader, kept = await asyncio.open_connection("127.0.0.1", port)
        kept.write(GET + b"\r\n")
        assert b"200 OK" in await asyncio.wait_for(kept_reader.readuntil(b"\r\n\r\n"), 20)
        flood = [await asyncio.open_connection("127.0.0.1", port) for _ in range(20)]
        assert await asyncio.wait_for(flood[0][0].read(), 20) == b"", "the oldest stranger went"
        kept.write(GET + b"Connection: close\r\n\r\n")
        assert b"200 OK" in await asyncio.wait_for(kept_reader.read(), 20)
        for _, writer in (*flood, (None, kept)):
            writer.close()


async def test_with_none_idle_the_new_one_is_told_to_come_again() -> None:
    """While every connection is in a request, the next one gets 429 and a time to come back."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n"
    async with listening(max_connections=2) as port:
        busy = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        for _, writer in busy:
            writer.write(head)  # the body is still to come
        await asyncio.sleep(0.1)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        status, headers, body = await answer(reader)
        assert (status, headers["retry-after"]) == (429, "1")
        assert json.loads(body)["error"]["code"] == "too_many_connections"
        writer.close()
        for _, other in busy:
            other.close()


@dataclass(eq=False)
class Opened:
    """Of a connection, what `Deadlines` uses."""

    loop: ScriptedLoop


class ScriptedLoop:
    """Time that stands still until the next timer: of a loop, what `Deadlines` uses."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[tuple[float, Callable[[], None]]] = []

    def time(self) -> float:
        return self.now

    def call_later(self, seconds: float, call: Callable[..., None], *arguments: object) -> object:
        self.timers.append((self.now + seconds, partial(call, *arguments)))
        return object()

    def turn(self) -> None:
        """Up to the one timer that is set, and what it does."""
        [(self.now, call)] = self.timers
        self.timers.clear()
        call()


def test_connections_that_are_late_together_end_over_several_turns() -> None:
    """A thousand that were opened at once: no turn of the loop ends more than a few, all of them are ended, the oldest
    first, and those that got on are not."""
    loop = ScriptedLoop()
    connections: list[Any] = [Opened(loop) for _ in range(1000)]
    ended: list[int] = []
    deadlines = Deadlines(10.0, lambda connection: ended.append(connections.index(connection)))
    for connection in connections:
        deadlines.start(connection)
    for connection in connections[::2]:
        deadlines.stop(connection)
    loop.now = 3.0
    deadlines.start(connections[1])  # its next request: the time begins anew
    turns = []
    while loop.timers and loop.timers[0][0] < 13.0:
        before = len(ended)
        loop.turn()
        turns.append(len(ended) - before)
    assert ended == list(range(3, 1000, 2))
    assert max(turns) <= ENDS_A_TURN
    assert loop.now < 10.0 + 2 * TURN_S * len(turns)
    loop.turn()
    assert (ended[-1], loop.timers, loop.now) == (1, [], 13.0)


def test_as_many_as_files_may_be_open() -> None:
    """The limit of open files is raised as far as the system lets it, and bounds the connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
        assert may_connect(700) == 700
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 700 + SPARE_FILES
        assert may_connect(hard * 2) == hard - SPARE_FILES
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
