"""A server whose latencies are known: it answers when its script says, not when a model is done.

A request says in `script` when each chunk of its answer is due, seconds after its arrival. Once in its life the server
may stall: what is due then comes at its end. `python -m loadgen.scripted` runs it in a process of its own, so that it
shares no interpreter with what it judges; it prints its port first, and at its end how late it was itself.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import heapq
import json
import sys
import time
from array import array
from collections.abc import Callable, Mapping
from random import Random
from types import MappingProxyType
from typing import Any

import httptools

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
NAP_S = 0.001
"""How long the server sleeps when nothing is due soon. Timers of event loops are coarse: it never sleeps into what is
due, but watches the clock."""


AT_ONCE = {"ttft": 0.001, "itl": 0.0}
"""Requests that bring no script are answered at once."""


def framed(event: bytes) -> bytes:
    """One event as a chunk of HTTP/1.1."""
    data = b"data: " + event + b"\n\n"
    return b"%x\r\n%s\r\n" % (len(data), data)


CHUNK = framed(b'{"id":"x","object":"text_completion","choices":[{"index":0,"text":" word","finish_reason":null}]}')


def last(prompt_tokens: int, output_tokens: int) -> bytes:
    """The end of an answer: usage, [DONE], the end of the stream."""
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": output_tokens}
    return framed(json.dumps({"choices": [], "usage": usage}).encode()) + framed(b"[DONE]") + b"0\r\n\r\n"


def due_times(script: dict[str, Any]) -> list[float]:
    """When each chunk is due, seconds after arrival. `ttft`, `itl`: means in seconds of log-normal draws of spread
    `sigma`; `tokens`, `seed`."""
    rng = Random(f"script {script['seed']}")
    sigma = float(script.get("sigma", 0.0))

    def draw(mean: float) -> float:
        return mean * rng.lognormvariate(-sigma * sigma / 2, sigma) if sigma else mean

    at_s = draw(float(script["ttft"]))
    times = [at_s]
    for _ in range(int(script["tokens"]) - 1):
        at_s += draw(float(script["itl"]))
        times.append(at_s)
    return times


def stalled(at_s: float, stall: tuple[float, float] | None) -> float:
    """When what is due at `at_s` comes."""
    return stall[1] if stall is not None and stall[0] <= at_s < stall[1] else at_s


class Scripted:
    """The server: one queue of what is due, one timer. Loop thread."""

    def __init__(
        self, stall: tuple[float, float] | None = None, default: Mapping[str, float] = MappingProxyType(AT_ONCE)
    ) -> None:
        """`stall`: from and until when, seconds after the first scripted request. `default`: `ttft`, `itl` and `sigma`
        of requests without a script; the n-th of them always gets the same latencies."""
        self._default = default
        self._unscripted = 0
        self._stall = stall
        self._stall_at: tuple[float, float] | None = None
        self._due: list[tuple[float, int, asyncio.WriteTransport, bytes]] = []
        self._count = 0
        self.late_s = array("d")
        """Of every chunk: when it was sent - when it was due."""

    def answer(self, transport: asyncio.WriteTransport, body: dict[str, Any]) -> None:
        """Plan the whole answer."""
        now = time.perf_counter()
        script = body.get("script")
        if script is None:
            self._unscripted += 1
            script = {**self._default, "tokens": body.get("max_tokens", 1), "seed": self._unscripted}
        elif self._stall_at is None and self._stall is not None:
            self._stall_at = now + self._stall[0], now + self._stall[1]
        transport.write(HEAD)
        times = due_times(script)
        end = last(len(str(body.get("prompt", "")).split()), len(times))
        for position, at_s in enumerate(times):
            self._count += 1
            data = CHUNK + end if position == len(times) - 1 else CHUNK
            heapq.heappush(self._due, (stalled(now + at_s, self._stall_at), self._count, transport, data))

    async def run(self) -> None:
        """Send what is due, for ever."""
        while True:
            now = time.perf_counter()
            while self._due and self._due[0][0] <= now:
                due_s, _, transport, data = heapq.heappop(self._due)
                self.late_s.append(time.perf_counter() - due_s)
                if not transport.is_closing():
                    transport.write(data)
            soon = self._due and self._due[0][0] < now + 2 * NAP_S
            await asyncio.sleep(0 if soon else NAP_S)


class _Connection(asyncio.Protocol):
    def __init__(self, server: Scripted) -> None:
        self._server = server

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.WriteTransport = transport  # type: ignore[assignment]
        self._parser = httptools.HttpRequestParser(self)
        self._url, self._body = b"", b""

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self._url = url

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        url, body = self._url, self._body
        self._url = self._body = b""
        if url.endswith(b"/completions"):
            return self._server.answer(self._transport, json.loads(body))
        found = url.endswith((b"/models", b"/health"))
        text = b'{"data":[{"id":"scripted"}]}' if found else b"{}"
        status = b"200 OK" if found else b"404 Not Found"
        head = b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (status, len(text))
        return self._transport.write(head + text)


async def serve(server: Scripted, ready: Callable[[int], None]) -> None:
    """Serve on a free port of this machine; `ready` is told which."""
    listener = await asyncio.get_running_loop().create_server(lambda: _Connection(server), "127.0.0.1", 0, backlog=4096)
    ready(listener.sockets[0].getsockname()[1])
    await server.run()


def main() -> None:
    """Print the port and serve until the end of standard input: the process ends with the one that started it. Then
    print the p99 of its own lateness, in seconds."""
    from loadgen.bench import main_loop
    from loadgen.cli import allow_open_files

    parser = argparse.ArgumentParser(prog="python -m loadgen.scripted")
    parser.add_argument("--stall", type=float, nargs=2, metavar=("FROM", "UNTIL"))
    parser.add_argument("--default", type=json.loads, default=AT_ONCE, metavar="JSON")
    args = parser.parse_args()
    allow_open_files()
    gc.disable()  # its pauses would be the server's
    server = Scripted(tuple(args.stall) if args.stall else None, args.default)

    async def until_closed() -> None:
        serving = asyncio.create_task(serve(server, lambda port: print(port, flush=True)))
        await asyncio.to_thread(sys.stdin.read)
        serving.cancel()

    with asyncio.Runner(loop_factory=main_loop()) as runner:
        runner.run(until_closed())
    late = sorted(server.late_s)
    print(late[int(0.99 * len(late))] if late else 0.0)


if __name__ == "__main__":
    main()
