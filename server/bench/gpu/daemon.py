"""The daemon as it is, with two tiers and with three: hits against computing, when loading begins to pay, serving.

In this process but for the client of the streams; the model is Llama-3-8B's shape with random weights. What the planner
chooses is measured as it chooses; for the break-even it is forced.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
import uvicorn

from server.api.app import create_app
from server.bench.gpu.chip import Chip
from server.bench.gpu.lines import Line, failed
from server.bench.gpu.sizes import Sizes
from server.bench.placing import drop, first_token_s, place, prefer_loading, quiet, serving
from server.bench.streaming import PROMPT, read_streams, stream
from server.bench.throttled import SlowIo
from server.build import Daemon, build, service_of
from server.config import Config, KvConfig, ModelConfig, SchedulerConfig
from server.engine import GenerateSpec
from server.process import http_config
from server.runner.cuda import CudaRunner
from server.types import DRAM, SSD, SamplingParams, TierName

SUFFIX_TOKENS = 8
"""Behind a prefix, less than a block."""
ROUNDS = 3
SETTLE = 2
"""Requests from which the planner learns what the disk is like now."""
SHORT_TOKENS = 64
UNLIMITED = float("inf")

Measured = Callable[[Daemon, "_Hits", Sizes], AsyncIterator[Line]]


def run(chip: Chip, sizes: Sizes, known: Mapping[str, float]) -> Iterator[Line]:
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryDirectory(dir=Path.cwd()) as disk,  # not /tmp, which may be memory
        asyncio.Runner() as loop,
    ):
        sizes.shape.write(Path(folder), str(chip.dtype).removeprefix("torch."))
        for ssd, measured in ((None, _in_memory), (Path(disk), _on_ssd)):
            yield from _of_one(chip, sizes, _config(chip, sizes, folder, ssd), measured, loop)
            chip.release()


def _of_one(chip: Chip, sizes: Sizes, config: Config, measured: Measured, loop: asyncio.Runner) -> Iterator[Line]:
    """All lines of one daemon."""
    io = SlowIo()
    lines = _served(build(config, disk=io, place=chip.place(config)), io, sizes, measured)
    while (line := loop.run(_next(lines))) is not None:
        yield line


async def _next(lines: AsyncIterator[Line]) -> Line | None:
    return await anext(lines, None)


def _config(chip: Chip, sizes: Sizes, folder: str, disk: Path | None) -> Config:
    name = cast(Any, str(chip.dtype).removeprefix("torch."))
    ssd_gib = 0.0 if disk is None else sizes.ssd_gib
    return Config(
        model=ModelConfig(model=folder, load_format="dummy", device=cast(Any, chip.device), dtype=name,
                          kernels="torch"),
        kv=KvConfig(device_gib=sizes.device_gib, dram_gib=sizes.dram_gib, ssd_gib=ssd_gib, ssd_path=disk,
                    ssd_min_free_gib=0.0, drain_flush_s=0.0),
        scheduler=SchedulerConfig(max_num_seqs=sizes.streams, max_num_batched_tokens=sizes.chunks[0]),
    )  # fmt: skip


async def _served(daemon: Daemon, io: SlowIo, sizes: Sizes, measured: Measured) -> AsyncIterator[Line]:
    async with serving((daemon,)):
        async for line in measured(daemon, _Hits(daemon, io, sizes), sizes):
            yield line


async def _in_memory(daemon: Daemon, hits: _Hits, sizes: Sizes) -> AsyncIterator[Line]:
    """With device and DRAM: a disk takes minutes for what these hold, and would be measured with them."""
    seconds = daemon.startup.seconds
    yield Line("start.weights", "random weights made and loaded", seconds["weights"], "s")
    yield Line("start.warmup", "warm-up: kernels, decode graphs, first steps", seconds["warmup"], "s")
    wanted = (
        ("ttft.dram", "TTFT from DRAM", hits.from_dram()),
        ("engine.host", "threads of a step", _host(daemon, sizes)),
        ("load.terrace", load_says(sizes), _compared(daemon, sizes)),
        ("http", "streams over HTTP", _streams(daemon, sizes)),
        ("break-even.dram", "shortest prefix that DRAM loads as fast as it is computed", hits.break_even(DRAM)),
    )
    for key, what, work in wanted:
        for line in await _tried(key, what, work):
            yield line


async def _on_ssd(daemon: Daemon, hits: _Hits, sizes: Sizes) -> AsyncIterator[Line]:
    """With all three tiers."""
    wanted = (
        ("ttft.ssd", "TTFT from SSD", hits.from_ssd("ttft.ssd", UNLIMITED)),
        ("ttft.ssd.slow", "TTFT from a slow SSD", hits.from_ssd("ttft.ssd.slow", sizes.slow_bytes_per_s)),
        ("break-even.ssd", "shortest prefix that SSD loads as fast as it is computed", hits.break_even(SSD)),
    )
    for key, what, work in wanted:
        for line in await _tried(key, what, work):
            yield line


async def _tried(key: str, what: str, work: Awaitable[list[Line]]) -> list[Line]:
    """Its lines, or one that says why there are none."""
    try:
        return await work
    except Exception as error:  # noqa: BLE001 - whatever one measurement meets, the others go on
        return [failed(key, what, "", error)]


# --- hits ------------------------------------------------------------------------------------------------------------


class _Hits:
    def __init__(self, daemon: Daemon, io: SlowIo, sizes: Sizes) -> None:
        self._daemon, self._io, self._sizes = daemon, io, sizes
        self._random = torch.Generator().manual_seed(0)

    async def from_dram(self) -> list[Line]:
        cold, hit, served = await self._pairs(self._sizes.prefix, DRAM, UNLIMITED)
        return [_ttft("ttft.dram", f"{self._sizes.prefix:,} tokens from DRAM", cold, hit, served)]

    async def from_ssd(self, key: str, rate: float) -> list[Line]:
        length = self._sizes.ssd_prefix
        for _ in range(SETTLE):
            await self._hit(self._tokens(length), SSD, rate, probe=True)
        cold, hit, served = await self._pairs(length, SSD, rate)
        disk = "" if rate == UNLIMITED else f" at {rate / 1e9:g} GB/s"
        return [_ttft(key, f"{length:,} tokens from SSD{disk}", cold, hit, served)]

    async def _pairs(self, length: int, tier: TierName, rate: float) -> tuple[list[float], list[float], int]:
        """Seconds to the first token computed and found, in turns, and tokens that were served, in the mean."""
        cold, hit, served = [], [], 0
        for _ in range(ROUNDS):
            cold.append((await first_token_s(self._daemon, self._tokens(length + SUFFIX_TOKENS)))[0])
            seconds, count = await self._hit(self._tokens(length), tier, rate)
            hit.append(seconds)
            served += count
        return cold, hit, served // ROUNDS

    async def _hit(self, prefix: list[int], tier: TierName, rate: float, *, probe: bool = False) -> tuple[float, int]:
        """`probe`: a planner that thinks little of the disk tries it again."""
        self._io.set_rate(UNLIMITED)
        await place(self._daemon, prefix, tier)
        if probe:
            self._daemon.engine.kv.planner.up[1].probe_s = 0.0
        self._io.set_rate(rate)
        found = await first_token_s(self._daemon, prefix + self._tokens(SUFFIX_TOKENS))
        self._io.set_rate(UNLIMITED)
        await quiet(self._daemon)
        return found

    async def break_even(self, tier: TierName) -> list[Line]:
        """The shortest prefix that is loaded as fast as computed, measured beside what the planner reckons."""
        planner, found = self._daemon.engine.kv.planner, {}
        for length in self._sizes.lengths:
            prefix = self._tokens(length)
            await place(self._daemon, prefix, tier)
            step, latencies = planner.step, [hop.latency_s for hop in planner.up]
            load, compute = [], []
            for _ in range(ROUNDS):
                await place(self._daemon, prefix, tier)
                prefer_loading(self._daemon)
                load.append((await first_token_s(self._daemon, prefix + self._tokens(SUFFIX_TOKENS)))[0])
                planner.step = step
                for hop, latency_s in zip(planner.up, latencies, strict=True):
                    hop.latency_s = latency_s
                drop(self._daemon.engine.kv.device, self._daemon.engine.chain(prefix, ""))
                compute.append((await first_token_s(self._daemon, self._tokens(length + SUFFIX_TOKENS)))[0])
            found[length] = (median(load), median(compute))
        pays = next((length for length, (load_s, compute_s) in found.items() if load_s <= compute_s), None)
        reckoned = self._reckoned(1 if tier == DRAM else 2)
        note = f"the planner reckons {reckoned:,}" if reckoned else "the planner reckons none of these"
        what = f"shortest prefix that {tier} loads as fast as it is computed"
        raw = {"load_and_compute_s": found, "reckoned": reckoned}
        return [Line(f"break-even.{tier}", what, pays, "tokens", note=note, raw=raw)]

    def _reckoned(self, level: int) -> int | None:
        planner, size = self._daemon.engine.kv.planner, self._daemon.engine.kv.layout.block_tokens
        for blocks in range(1, max(self._sizes.lengths) // size + 1):
            if planner.load_s(level, blocks, [0] * level) < planner.compute_s(0, blocks):
                return blocks * size
        return None

    def _tokens(self, count: int) -> list[int]:
        return torch.randint(3, self._sizes.shape.vocab, (count,), generator=self._random).tolist()


def _ttft(key: str, what: str, cold: Sequence[float], hit: Sequence[float], served: int) -> Line:
    note = f"computed in {median(cold) * 1e3:.1f} ms; {served:,} tokens were served"
    return Line(key, f"TTFT of {what}", median(hit) * 1e3, "ms", median(hit) / median(cold), note,
                raw={"cold_s": cold, "hit_s": hit})  # fmt: skip


# --- serving ---------------------------------------------------------------------------------------------------------


async def _host(daemon: Daemon, sizes: Sizes) -> list[Line]:
    """What a decode step of many rows costs the loop's thread, and the device's."""
    rows, runner = sizes.rows[-1], daemon.runner
    assert isinstance(runner, CudaRunner), "the runner of a GPU counts its own time"
    params = SamplingParams(sizes.output, temperature=0.0)
    streams = [daemon.engine.submit(GenerateSpec([7 + row] * SHORT_TOKENS, params)) for row in range(rows)]
    for one in streams:
        await anext(aiter(one))
    before = _counted(daemon, runner)
    await asyncio.gather(*(_read(one) for one in streams))
    steps, host_s, launch_s = (b - a for a, b in zip(before, _counted(daemon, runner), strict=True))
    return [
        Line("engine.host", f"loop thread per step of {rows} rows", host_s / steps * 1e3, "ms"),
        Line("engine.launch", "device thread per such step", launch_s / steps * 1e3, "ms"),
    ]


def _counted(daemon: Daemon, runner: CudaRunner) -> tuple[float, float, float]:
    """Steps, seconds of the loop's thread, seconds of the device's, since the start."""
    work = runner.host_work
    steps = work.graph_steps + work.eager_steps
    return steps, daemon.metrics.page().value("engine_host_seconds_total"), work.launch_s


async def _read(one: Any) -> int:
    """Its tokens, to the end."""
    count = sum([sum(event.token is not None for event in events) async for events in one])
    one.close()
    return count


async def _rate(daemon: Daemon, prompts: Sequence[Sequence[int]], output: int) -> float:
    """Generated tokens per second of all these at once."""
    params = SamplingParams(output, temperature=0.0)
    started_s = time.perf_counter()
    streams = [daemon.engine.submit(GenerateSpec(prompt, params)) for prompt in prompts]
    tokens = sum(await asyncio.gather(*(_read(one) for one in streams)))
    return tokens / (time.perf_counter() - started_s)


async def _compared(daemon: Daemon, sizes: Sizes) -> list[Line]:
    """The load that transformers get, too."""
    prompts = [[3 + row] * sizes.peer_prompt for row in range(sizes.peer_requests)]
    await _rate(daemon, [[2 + row, *prompt[1:]] for row, prompt in enumerate(prompts)], 2)
    rate = await _rate(daemon, prompts, sizes.peer_output)
    return [Line("load.terrace", load_says(sizes), rate, "tok/s")]


def load_says(sizes: Sizes) -> str:
    return f"{sizes.peer_requests} requests of {sizes.peer_prompt} + {sizes.peer_output} tokens"


async def _streams(daemon: Daemon, sizes: Sizes) -> list[Line]:
    """Streams of the engine alone, and the same from another process over loopback, in turns."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    client = context.Process(target=read_streams, args=(theirs, max(os.sched_getaffinity(0))), daemon=True)
    client.start()
    prompts = [daemon.tokenizer.encode(PROMPT)] * sizes.streams
    own, http = [], []
    try:
        async with _listening(daemon) as port:
            await stream(ours, port, 1, 2)  # the client has started when it answers
            await _rate(daemon, prompts, 2)
            for _ in range(ROUNDS):
                own.append(await _rate(daemon, prompts, sizes.output))
                http.append((await stream(ours, port, sizes.streams, sizes.output))[0])
    finally:
        ours.send(None)
        client.join(10)
    what = f"{sizes.streams} streams of {sizes.output} tokens, the engine alone"
    return [
        Line("engine", what, median(own), "tok/s", raw={"tokens_per_s": own}),
        Line("http", "the same over HTTP", median(http), "tok/s", median(http) / median(own),
             raw={"tokens_per_s": http}),
    ]  # fmt: skip


@asynccontextmanager
async def _listening(daemon: Daemon) -> AsyncIterator[int]:
    server = uvicorn.Server(http_config(create_app(service_of(daemon)), daemon.config))
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    task = asyncio.create_task(server._serve([listener]))
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        await task
