"""What hostile clients do to the others: times to the first token of one polite client, with an attack and without.

A daemon on the demo model in a process of its own. The polite client asks for a few tokens again and again, on a fixed
schedule; an attacker, a process of its own too, does one of `ATTACKS` all the while, from `ATTACKERS` threads, each as
fast as it is answered but for a pause. Quiet times and attacks take turns. Every answer to an attack must be a 4xx.
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
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from statistics import median
from typing import NamedTuple

from server.bench.clients import free_port, get, ready
from server.bench.report import Report, quantile

ROUNDS = 3
PHASE_S = 6.0
EVERY_S = 0.04
"""Between two requests of the polite client."""
GOAL = 1.2
ATTACKERS = 2
PAUSE_S = 0.02
IDLE = 10_000
EXPLODES = "((a{1,999}){1,999}){1,999}(a|b|ab)*c"
POLITE = json.dumps(
    {"prompt": "Tom plays chess. What does Tom play?", "max_tokens": 4, "ignore_eos": True, "stream": True}
).encode()


class Attack(NamedTuple):
    """`body`: what is posted again and again; or `hold`, what is done with a connection that nothing is asked on."""

    name: str
    body: Callable[[], bytes] | None = None
    hold: Callable[[int, threading.Event], None] | None = None


def _completion(**fields: object) -> bytes:
    return json.dumps({"prompt": "x", "max_tokens": 1, **fields}).encode()


def _chat(**fields: object) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, **fields}).encode()


def _schema(schema: object) -> bytes:
    return _completion(response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": schema}})


def _deep_schema() -> bytes:
    schema: dict[str, object] = {"type": "string"}
    for _ in range(400):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return _schema(schema)


def _wide_schema() -> bytes:
    return _schema({"enum": [f"{number:040d}" for number in range(100_000)]})


def _drip(port: int, over: threading.Event) -> None:
    """Slowloris: 500 connections, a header line on each now and then, opened again when they are closed."""
    held: list[socket.socket] = []
    while not over.wait(0.1):
        while len(held) < 500:
            connection = socket.create_connection(("127.0.0.1", port))
            connection.setblocking(False)
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\n")
            held.append(connection)
        held = [connection for connection in held if _alive(connection)]
    for connection in held:
        connection.close()


def _alive(connection: socket.socket) -> bool:
    try:
        connection.sendall(b"X: y\r\n")
    except OSError:
        connection.close()
        return False
    return True


def _idle(port: int, over: threading.Event) -> None:
    """Ten thousand connections in all that say nothing."""
    held = []
    for _ in range(IDLE // ATTACKERS):
        with contextlib.suppress(OSError):
            held.append(socket.create_connection(("127.0.0.1", port)))
        if over.is_set():
            break
    over.wait()
    for connection in held:
        connection.close()


ATTACKS = (
    Attack("slowloris", hold=_drip),
    Attack(f"{IDLE:,} idle connections", hold=_idle),
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
    attacker = context.Process(target=_attacker, args=(theirs, port), daemon=True)
    with tempfile.TemporaryFile("w+") as log:
        daemon = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            attacker.start()
            asyncio.run(_measure(report, daemon, port, ours, log, quick=quick))
            daemon.send_signal(signal.SIGTERM)
            code = daemon.wait(60)
            report.goal(f"the daemon stops on SIGTERM with exit code 0 (got {code})", met=code == 0)
        finally:
            attacker.kill()
            daemon.kill()
            daemon.wait()
    return report


async def _measure(
    report: Report, daemon: subprocess.Popen[bytes], port: int, attacker: Connection, log: object, *, quick: bool
) -> None:
    await ready(daemon, port, log)  # type: ignore[arg-type]
    report.header("attack", "TTFT p50 ms", "p99 ms", "quiet p50", "quiet p99", "p99 ratio", "answers")
    rounds, seconds = (1, 1.0) if quick else (ROUNDS, PHASE_S)
    await _polite(port, seconds)
    for number, attack in enumerate(ATTACKS):
        quiet, loud, answers = [], [], set[int]()
        for _ in range(rounds):
            quiet.append(await _polite(port, seconds))
            attacker.send(number)
            loud.append(await _polite(port, seconds))
            attacker.send(None)
            answers |= await asyncio.get_running_loop().run_in_executor(None, attacker.recv)
        p50, p99 = ([median(quantile(one, q) for one in half) * 1e3 for half in (loud, quiet)] for q in (0.5, 0.99))
        ratio = median(quantile(a, 0.99) / quantile(b, 0.99) for a, b in zip(loud, quiet, strict=True))
        report.row(attack.name, f"{p50[0]:.1f}", f"{p99[0]:.1f}", f"{p50[1]:.1f}", f"{p99[1]:.1f}", f"{ratio:.2f}",
                   " ".join(map(str, sorted(answers))) or "-")  # fmt: skip
        report.keep(attack=attack.name, quiet_s=quiet, loud_s=loud, answers=sorted(answers))
        refused = all(400 <= status < 500 for status in answers)
        report.goal(f"{attack.name}: refused with a 4xx ({sorted(answers)})", met=refused)
        report.goal(f"{attack.name}: p99 TTFT of others {ratio:.2f} x, goal {GOAL}", met=ratio <= GOAL)
    report.goal("the daemon still answers", met='"data"' in await get(port, "/v1/models"))


async def _polite(port: int, seconds: float) -> list[float]:
    """Seconds to the first token of requests made on a fixed schedule."""
    loop = asyncio.get_running_loop()
    start_s = loop.time()
    asked: list[asyncio.Task[float]] = []
    while (at_s := start_s + len(asked) * EVERY_S) < start_s + seconds:
        await asyncio.sleep(at_s - loop.time())
        asked.append(asyncio.create_task(_first_token(port, at_s)))
    return list(await asyncio.gather(*asked))


async def _first_token(port: int, since_s: float) -> float:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(_post("/v1/completions", len(POLITE)) + POLITE)
    await reader.readuntil(b'data: {"id"')
    first_s = asyncio.get_running_loop().time() - since_s
    await reader.read()
    writer.close()
    return first_s


def _post(path: str, length: int) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: here\r\nConnection: close\r\nContent-Length: {length}\r\n"
    return head.encode() + b"Content-Type: application/json\r\n\r\n"


# --- the attacker's process ------------------------------------------------------------------------------------------


def _attacker(pipe: Connection, port: int) -> None:
    """Runs the attack of the number it is sent until it is sent None; sends back which statuses it got."""
    os.nice(5)  # what is measured is the daemon, not who gets the processor
    while True:
        attack, over, statuses = ATTACKS[pipe.recv()], threading.Event(), set[int]()
        hold = attack.hold
        body = attack.body() if attack.body is not None else b""
        threads: Sequence[threading.Thread] = [
            threading.Thread(target=hold, args=(port, over))
            if hold is not None
            else threading.Thread(target=_post_on, args=(port, body, over, statuses))
            for _ in range(ATTACKERS)
        ]
        for thread in threads:
            thread.start()
        pipe.recv()
        over.set()
        for thread in threads:
            thread.join()
        pipe.send(statuses)


def _post_on(port: int, body: bytes, over: threading.Event, statuses: set[int]) -> None:
    path = "/v1/chat/completions" if body.startswith(b'{"messages"') else "/v1/completions"
    while not over.wait(PAUSE_S):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            with contextlib.suppress(OSError):  # refused before all of it was sent
                connection.sendall(_post(path, len(body)) + body)
            answer = connection.recv(1 << 12)
            if answer.startswith(b"HTTP/1.1 "):
                statuses.add(int(answer.split()[1]))
