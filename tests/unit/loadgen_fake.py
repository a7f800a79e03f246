"""A server in memory for the load generator: no socket, no thread, and time that jumps."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

from loadgen.client import Client, Stream, Target
from loadgen.records import Prompt, Session, Turn
from loadgen.scripted import CHUNK, HEAD, last
from server.sim import clock

T = TypeVar("T")
TARGET = Target("http://127.0.0.1:1", "any", timeout_s=100.0)
Answer = list[tuple[float, bytes]]
"""What the server sends: seconds after the request came, bytes; no bytes: it closes the connection."""


def run_virtual(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` where waiting takes no time."""
    return clock.run_virtual(main, clock.VirtualLoop(), cpu_limit_s=60)


def spoken(*at_s: float) -> Answer:
    """An answer of one chunk at each of these times, and its proper end with the last."""
    pieces = [(at, CHUNK) for at in at_s]
    return [(0.0, HEAD), *pieces[:-1], (at_s[-1], CHUNK + last(7, len(at_s)))]


class _Transport(asyncio.Transport):
    def __init__(self, stream: Stream, answers: Callable[[dict[str, Any], float], Answer]) -> None:
        super().__init__()
        self._stream, self._answers = stream, answers

    def write(self, data: bytes) -> None:  # type: ignore[override]
        loop = asyncio.get_running_loop()
        body = json.loads(data.partition(b"\r\n\r\n")[2])
        for at_s, piece in self._answers(body, loop.time()):
            loop.call_later(at_s, self._deliver, piece)

    def _deliver(self, piece: bytes) -> None:
        if self._stream.closed:
            return
        if piece:
            self._stream.data_received(piece)
        else:
            self._stream.connection_lost(None)

    def close(self) -> None:
        pass


def client_of(answers: Callable[[dict[str, Any], float], Answer], target: Target = TARGET) -> tuple[Client, list[int]]:
    """A client whose server answers as `answers(body, now)` says, and a list with one entry per connection opened."""
    opened: list[int] = []

    async def connect(protocol: Callable[[], Stream]) -> Stream:
        stream = protocol()
        stream.connection_made(_Transport(stream, answers))
        opened.append(1)
        return stream

    return Client(target, asyncio.get_running_loop().time, connect), opened


def prompts(count: int, tokens: int = 3) -> Iterator[Session]:
    """`count` sessions of one request each; the prompt says which."""
    for number in range(count):
        prompt: Prompt = f"prompt {number}"
        yield Session((Turn(prompt, tokens),))
