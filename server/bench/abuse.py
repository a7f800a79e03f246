"""What hostile clients do to the others: times to the first token of one polite client, with an attack and without.

A daemon on the demo model in a process of its own. The polite client asks for a few tokens again and again, on a fixed
schedule, over connections that it keeps, as SDKs do; an attacker, a process of its own too, does one of `ATTACKS` all
the while, from `ATTACKERS` threads, each as fast as it is answered but for a pause. Every answer must be a 4xx.

An attack from the same machine also takes processor time from the daemon, which one from the network does not. So
there are three times that take turns: quiet; with the attack on a server beside the daemon, which reads and drops what
it gets; and with the attack on the daemon. What the daemon can do something about is the third against the second.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from statistics import median
from typing import ClassVar, NamedTuple, cast

import uvloop

from server.api.connections import may_connect
from server.bench.clients import free_port, get, ready
from server.bench.report import Report, quantile
from server.config import ServerConfig

ROUNDS = 7
PHASE_S = 5.0
EVERY_S = 0.02
"""Between two requests of the polite client."""
GOAL = 1.2
ATTACKERS = 2
PAUSE_S = 0.02
IDLE = 10_000
SINK_CONNECTIONS = 4096
DRIP_S = 2.0
"""In which every connection of a slowloris gets a line."""
SETTLE_S = 0.5
EXPLODES = "((a{1,999}){1,999}){1,999}(a|b|ab)*c"
POLITE = json.dumps(
    {"prompt": "Tom plays chess. What does Tom play?", "max_tokens": 4, "ignore_eos": True, "stream": True}
).encode()


class Attack(NamedTuple):
    """`body`: what is posted again and again; or `hold`, what is done with so many `connections`, which are made before
    the time is taken."""

    name: str
    body: Callable[[], bytes] | None = None
    hold: Callable[[int, list[socket.socket], threading.Event], None] | None = None
    connections: int = 0


def _completion(**fields: object) -> bytes:
    return json.dumps({"prompt": "x", "max_tokens": 1, **fields}).encode()


def _schema(schema: object) -> bytes:
    return _completion(response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": schema}})


def _deep_schema() -> bytes:
    schema: dict[str, object] = {"type": "string"}
    for _ in range(400):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return _schema(schema)


def _wide_schema() -> bytes:
    return _schema({"enum": [f"{number:040d}" for number in range(100_000)]})


def _drip(port: int, held: list[socket.socket], over: threading.Event) -> None:
    """Slowloris: a header line on one connection after the other; those that the daemon closes are opened again."""
    while not over.is_set():
        for place, connection in enumerate(held):
            try:
                connection.sendall(b"X: y\r\n")
            except OSError:
                connection.close()
                held[place] = _begin(port)
            if over.wait(DRIP_S / len(held)):
                return


def _begin(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\n")
    return connection


def _wait(port: int, held: list[socket.socket], over: threading.Event) -> None:
    """Connections that say nothing."""
    over.wait()


ATTACKS = (
    Attack("slowloris", hold=_drip, connections=1_000),
    Attack(f"{IDLE:,} idle connections", hold=_wait, connections=IDLE),
    Attack("64 MiB bodies", lambda: b" " * 2**26),
    Attack("nested JSON", lambda: b'{"prompt":' + b"[" * 2**20),
    Attack("invalid UTF-8", lambda: b'{"prompt":"' + b"\xff\xfe" * 2**19 + b'"}'),
    Attack("100,000 stops", lambda: _completion(stop=[f"stop {number}" for number in range(100_000)])),
    Attack("100,000 messages", lambda: json.dumps({"messages": [{"role": "user", "content": "x"}] * 100_000}).encode()),
    Attack("regex that explodes", lambda: _completion(structured_outputs={"regex": EXPLODES})),
    Attack("schema 400 deep", _deep_schema),
    Attack("enum of 4 MB", _wide_schema),
)


def run(*, quick: bool) -> Report:
    """Attack a daemon in every way; see the module's docstring."""
    report = Report("abuse", quick=quick)
    port = free_port()
    command = [sys.executable, "-m", "server", "serve", "demo", "--port", str(port), "--log-level", "error"]
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    attacker = context.Process(target=_attacker, args=(theirs,), daemon=True)
    beside = free_port()
    sink = context.Process(target=_sink, args=(beside,), daemon=True)
    with tempfile.TemporaryFile("w+") as log:
        daemon = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            attacker.start()
            sink.start()
            asyncio.run(_measure(report, daemon, (port, beside), ours, log, quick=quick))
            daemon.send_signal(signal.SIGTERM)
            code = daemon.wait(60)
            report.goal(f"the daemon stops on SIGTERM with exit code 0 (got {code})", met=code == 0)
        finally:
            attacker.kill()
            sink.kill()
            daemon.kill()
            daemon.wait()
    return report


async def _measure(
    report: Report,
    daemon: subprocess.Popen[bytes],
    ports: tuple[int, int],
    attacker: Connection,
    log: object,
    *,
    quick: bool,
) -> None:
    port, beside = ports
    await ready(daemon, port, log)  # type: ignore[arg-type]
    report.header("attack", "TTFT p50 ms", "p99 ms", "beside p50", "beside p99", "quiet p50", "quiet p99",
                  "to quiet", "to beside", "answers")  # fmt: skip
    rounds, seconds = (1, 1.0) if quick else (ROUNDS, PHASE_S)
    polite = _Polite(port)
    await polite.ask(seconds)

    async def under(number: int, target: int) -> tuple[list[float], set[int]]:
        loop = asyncio.get_running_loop()
        attacker.send((number, target))
        await loop.run_in_executor(None, attacker.recv)
        times = await polite.ask(seconds)
        attacker.send(None)
        answers = await loop.run_in_executor(None, attacker.recv)
        await asyncio.sleep(SETTLE_S)
        return times, answers

    for number, attack in enumerate(ATTACKS):
        times: dict[str, list[list[float]]] = {"loud": [], "beside": [], "quiet": []}
        answers = set[int]()
        for _ in range(rounds):
            times["quiet"].append(await polite.ask(seconds))
            times["beside"].append((await under(number, beside))[0])
            found = await under(number, port)
            times["loud"].append(found[0])
            answers |= found[1]
        at = {way: [median(quantile(one, q) for one in runs) for q in (0.5, 0.99)] for way, runs in times.items()}
        to_quiet, to_beside = (_ratio(times["loud"], times[way]) for way in ("quiet", "beside"))
        report.row(attack.name, *(f"{value * 1e3:.1f}" for way in times for value in at[way]), f"{to_quiet:.2f}",
                   f"{to_beside:.2f}", " ".join(map(str, sorted(answers))) or "-")  # fmt: skip
        report.keep(attack=attack.name, **{f"{way}_s": runs for way, runs in times.items()}, answers=sorted(answers))
        refused = all(400 <= status < 500 for status in answers)
        report.goal(f"{attack.name}: refused with a 4xx ({sorted(answers)})", met=refused)
        words = f"{attack.name}: p99 TTFT of others {to_beside:.2f} x that with the attack beside it"
        report.goal(f"{words}, goal {GOAL} ({to_quiet:.2f} x that when quiet)", met=to_beside <= GOAL)
    report.goal("the daemon still answers", met='"data"' in await get(port, "/v1/models"))


def _ratio(loud: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> float:
    """Of the 99th percentiles of runs that took turns: the median."""
    return median(quantile(a, 0.99) / quantile(b, 0.99) for a, b in zip(loud, other, strict=True))


class _Polite:
    """A client that keeps its connections."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(self, seconds: float) -> list[float]:
        """Seconds to the first token of requests made on a fixed schedule."""
        loop = asyncio.get_running_loop()
        start_s = loop.time()
        asked: list[asyncio.Task[float]] = []
        while (at_s := start_s + len(asked) * EVERY_S) < start_s + seconds:
            await asyncio.sleep(at_s - loop.time())
            asked.append(asyncio.create_task(self._first_token(at_s)))
        return list(await asyncio.gather(*asked))

    async def _first_token(self, since_s: float) -> float:
        while True:
            reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection("127.0.0.1", self._port)
            if not reader.at_eof():
                break
        writer.write(_post("/v1/completions", len(POLITE)) + POLITE)
        await reader.readuntil(b'data: {"id"')
        first_s = asyncio.get_running_loop().time() - since_s
        await reader.readuntil(b"\r\n0\r\n\r\n")
        self._idle.append((reader, writer))
        return first_s


def _post(path: str, length: int, *more: str) -> bytes:
    head = (f"POST {path} HTTP/1.1", "Host: here", f"Content-Length: {length}", "Content-Type: application/json", *more)
    return "\r\n".join((*head, "", "")).encode()


# --- a server that drops what it gets --------------------------------------------------------------------------------


class _Sink(asyncio.Protocol):
    """Reads requests to their end, and refuses them, as much later as the daemon does; of too many connections it
    closes the oldest."""

    open: ClassVar[OrderedDict[_Sink, None]] = OrderedDict()
    delay_s: ClassVar[float] = ServerConfig().refusal_delay_s

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._head, self._left = b"", -1
        self.open[self] = None
        if len(self.open) > SINK_CONNECTIONS:
            next(iter(self.open))._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.open.pop(self, None)

    def data_received(self, data: bytes) -> None:
        if self._left < 0:
            self._head += data
            head, found, data = self._head.partition(b"\r\n\r\n")
            if not found:
                return
            self._left = int(head.lower().partition(b"content-length: ")[2].split()[0])
        before, self._left = self._left, self._left - len(data)
        if self._left <= 0 < before:
            asyncio.get_running_loop().call_later(self.delay_s, self._refuse)

    def _refuse(self) -> None:
        self._transport.write(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        self._transport.close()


def _sink(port: int) -> None:
    may_connect(SINK_CONNECTIONS)

    async def serve() -> None:
        server = await asyncio.get_running_loop().create_server(_Sink, "127.0.0.1", port, backlog=2048)
        await server.serve_forever()

    uvloop.run(serve())


# --- the attacker's process ------------------------------------------------------------------------------------------


def _attacker(pipe: Connection) -> None:
    """Runs the attack of the number, on the port, that it is sent until it is sent None. Says when it has begun, and
    which statuses it got."""
    may_connect(IDLE)
    os.nice(5)  # what is measured is the daemon, not who gets the processor
    while True:
        number, port = pipe.recv()
        attack, over, statuses = ATTACKS[number], threading.Event(), set[int]()
        body = attack.body() if attack.body is not None else b""
        held = [_begin(port) if attack.hold is _drip else socket.create_connection(("127.0.0.1", port))
                for _ in range(attack.connections)]  # fmt: skip
        threads: Sequence[threading.Thread] = [
            threading.Thread(target=attack.hold, args=(port, held, over))
            if attack.hold is not None
            else threading.Thread(target=_post_on, args=(port, body, over, statuses))
            for _ in range(1 if attack.hold is not None else ATTACKERS)
        ]
        for thread in threads:
            thread.start()
        pipe.send(None)
        pipe.recv()
        over.set()
        for thread in threads:
            thread.join()
        for connection in held:
            connection.close()
        pipe.send(statuses)


def _post_on(port: int, body: bytes, over: threading.Event, statuses: set[int]) -> None:
    path = "/v1/chat/completions" if body.startswith(b'{"messages"') else "/v1/completions"
    while not over.wait(PAUSE_S):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            with contextlib.suppress(OSError):  # refused before all of it was sent
                connection.sendall(_post(path, len(body), "Connection: close") + body)
            answer = connection.recv(1 << 12)
            if answer.startswith(b"HTTP/1.1 "):
                statuses.add(int(answer.split()[1]))
