"""What one streamed token costs the event loop, and how many tokens one process can stream.

The daemon as it is, on the demo model's tokenizer, but with a runner that costs nothing: scheduling, delivery,
detokenizing, JSON, SSE, HTTP and sockets are all that is left. It has one core to itself, where there are two; a client
in another process opens the streams and counts events without parsing them. Every token is an event of its own, unless
the loop falls behind: then deliveries are merged, as for any slow reader.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import selectors
import socket
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from statistics import median

import uvicorn

from server.api.app import create_app
from server.bench.report import Report
from server.build import Daemon, build, service_of
from server.cli import loop_factory
from server.config import Config, KvConfig, ModelConfig, SchedulerConfig
from server.engine import Engine
from server.kvcache.mover import Mover
from server.process import http_config
from server.types import StepPlan, StepResult

STREAMS = (1, 16, 64, 256)
GOAL_STREAMS = 256
GOAL_TOKENS_PER_S = 20_000
OUTPUT_TOKENS = 400
ROUNDS = 5
PROMPT = "Tom plays chess. What does Tom play?"


class FreeRunner:
    """A StepRunner whose steps take no time: row by row the next of `tokens`."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = tokens

    async def run(self, plan: StepPlan) -> StepResult:
        now, nothing = time.monotonic(), [None] * len(plan.rows)
        tokens = [None if row.sample is None else self._tokens[row.start % len(self._tokens)] for row in plan.rows]
        await asyncio.sleep(0)  # as with a device, others get their turn while the step runs
        return StepResult(plan.id, tokens, nothing, nothing, now, now)

    async def aclose(self) -> None:
        """There is nothing to close."""


def run(*, quick: bool) -> Report:
    """Stream to growing numbers of clients; see the module's docstring."""
    report = Report("streaming", quick=quick)
    report.header("streams", "tokens/s", "events/token", "loop us/token", "tokens/s/core")
    cores = sorted(os.sched_getaffinity(0))
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    client = context.Process(target=read_streams, args=(theirs, cores[-1]), daemon=True)
    client.start()
    os.sched_setaffinity(0, {cores[0]})
    try:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            runner.run(_measure(report, ours, STREAMS[1:2] if quick else STREAMS, 1 if quick else ROUNDS))
    finally:
        os.sched_setaffinity(0, set(cores))
        ours.send(None)
        client.join(10)
    return report


async def _measure(report: Report, client: Connection, sizes: Sequence[int], rounds: int) -> None:
    config = Config(
        model=ModelConfig(model="demo"),
        kv=KvConfig(device_gib=0.125),
        scheduler=SchedulerConfig(max_num_seqs=max(sizes), max_num_batched_tokens=8192),
    )
    async with free_daemon(config) as (_, port):
        for streams in sizes:
            samples = [await stream(client, port, streams, OUTPUT_TOKENS) for _ in range(rounds)]
            rate, merged, cost_us = (median(column) for column in zip(*samples, strict=True))
            report.row(streams, f"{rate:,.0f}", f"{merged:.2f}", f"{cost_us:.1f}", f"{1e6 / cost_us:,.0f}")
            report.keep(
                streams=streams, tokens_per_s=[s[0] for s in samples], loop_us_per_token=[s[2] for s in samples]
            )
            if streams == GOAL_STREAMS:
                statement = f"{rate:,.0f} tokens/s over {streams} streams, goal {GOAL_TOKENS_PER_S:,}"
                report.goal(statement, met=rate >= GOAL_TOKENS_PER_S)


@asynccontextmanager
async def free_daemon(config: Config) -> AsyncIterator[tuple[Daemon, int]]:
    """A daemon of one tier whose steps cost nothing, and the port that it serves on."""
    built = build(config)
    words = [token for token in built.tokenizer.encode(PROMPT) if not built.tokenizer.is_special(token)]
    engine = Engine(built.engine.scheduler, FreeRunner(words), Mover({}), built.metrics, time.monotonic)
    daemon = replace(built, engine=engine)
    server = uvicorn.Server(http_config(create_app(service_of(daemon)), config))
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    running = asyncio.create_task(engine.run())
    serving = asyncio.create_task(server._serve([listener]))
    try:
        yield daemon, listener.getsockname()[1]
    finally:
        await engine.drain(10)
        server.should_exit = True
        await serving
        await running
        await daemon.runner.aclose()


async def stream(client: Connection, port: int, streams: int, tokens: int) -> tuple[float, float, float]:
    """Let `read_streams` read so many streams of so many tokens: tokens/s, events per token, us of this thread's time
    per token."""
    started_s, cpu_s = time.perf_counter(), time.thread_time()
    client.send((port, streams, tokens))
    events = await asyncio.get_running_loop().run_in_executor(None, client.recv)
    total = streams * tokens
    seconds, cost_s = time.perf_counter() - started_s, time.thread_time() - cpu_s
    return total / seconds, events / total, cost_s / total * 1e6


def read_streams(pipe: Connection, core: int) -> None:
    """Reads as many streams as it is told until all have ended; sends back how many events there were."""
    os.sched_setaffinity(0, {core})
    while (job := pipe.recv()) is not None:
        port, streams, tokens = job
        body = json.dumps({"prompt": PROMPT, "max_tokens": tokens, "ignore_eos": True, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: here\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
        request = head.encode() + b"Content-Type: application/json\r\n\r\n" + body
        pipe.send(_read_all(port, streams, request))


def _read_all(port: int, streams: int, request: bytes) -> int:
    events = 0
    with selectors.DefaultSelector() as selector:
        for _ in range(streams):
            connection = socket.create_connection(("127.0.0.1", port))
            connection.sendall(request)
            selector.register(connection, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select():
                data = key.fileobj.recv(1 << 16)  # type: ignore[union-attr]
                events += data.count(b"data: {")
                if not data:
                    selector.unregister(key.fileobj)
                    key.fileobj.close()  # type: ignore[union-attr]
    return events
