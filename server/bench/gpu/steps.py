"""Steps of the whole model through the CUDA runner: decode against the roofline, prefill against the matrix product.

The runner gets plans as the scheduler makes them, two under way, from the event loop's thread; there is no scheduler
and no HTTP. Weights and cache are random, made on the device.
"""

from __future__ import annotations

import asyncio
import math
import tempfile
import time
from array import array
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np
import torch

from server.bench.gpu.chip import Chip
from server.bench.gpu.lines import Line, failed
from server.bench.gpu.sizes import GIB, Sizes
from server.bench.report import quantile
from server.kvcache.arena import allocate_arena
from server.kvcache.host import HostArena
from server.kvcache.tiers.base import Move
from server.kvcache.tiers.cuda import CudaTier
from server.models.base import Model
from server.models.weights import load_config, model_class
from server.place import GPU_RUN_BYTES
from server.runner.cuda import CudaRunner
from server.types import SampleSpec, SamplingParams, StepPlan, StepResult, StepRow

GREEDY = SamplingParams(max_tokens=2**20, temperature=0.0)
WARM_STEPS = 4
"""At the start of a measurement, which do not count."""
ROUNDS = 3
MOVING_CALLS = 2
"""In each direction, while others decode."""


def run(chip: Chip, sizes: Sizes, known: Mapping[str, float]) -> Iterator[Line]:
    with asyncio.Runner() as loop:
        plain = {}
        for line in _bf16(chip, sizes, known, loop):
            plain[line.key] = line.value
            yield line
        chip.release()
        yield from _fp8(chip, sizes, known, loop, plain)


def _bf16(chip: Chip, sizes: Sizes, known: Mapping[str, float], loop: asyncio.Runner) -> Iterator[Line]:
    started_s = time.perf_counter()
    model = make_model(chip, sizes)
    yield Line("model.made", "weights made on the device", time.perf_counter() - started_s, "s")
    steps = Steps(chip, sizes, model)
    yield loop.run(steps.captured())
    for rows in sizes.rows:
        yield from loop.run(steps.decode(rows, known))
    for chunk in sizes.chunks:
        for prompt in sizes.prompts:
            yield loop.run(steps.prefill(prompt, chunk, known))
    try:
        yield loop.run(steps.moving(sizes.rows[len(sizes.rows) // 2]))
    except Exception as error:  # noqa: BLE001 - drivers raise what they like
        yield failed("decode.moving", "p99 between tokens while blocks move", "ms", error)
    loop.run(steps.runner.aclose())


def _fp8(
    chip: Chip, sizes: Sizes, known: Mapping[str, float], loop: asyncio.Runner, plain: Mapping[str, float | None]
) -> Iterator[Line]:
    """With weights in fp8, each beside what it took in bf16: `plain`, by key."""
    steps = Steps(chip, sizes, make_model(chip, sizes, "fp8"), code_bytes=1)
    loop.run(steps.captured())
    for rows in sizes.rows:
        yield from (_beside(line, plain) for line in loop.run(steps.decode(rows, known)))
    for prompt in sizes.prompts:
        yield _beside(loop.run(steps.prefill(prompt, sizes.chunks[0], {})), plain)
    loop.run(steps.runner.aclose())


def _beside(line: Line, plain: Mapping[str, float | None]) -> Line:
    before = plain.get(line.key)
    beside = f"; {before / line.value:.2f} x as fast as bf16" if before and line.value else ""
    return replace(line, key=f"fp8.{line.key}", what=f"fp8: {line.what}", note=line.note + beside)


def make_model(chip: Chip, sizes: Sizes, quantization: str = "none") -> Model:
    """As `load_format=dummy` has it, but for the values, which are drawn on the device: 8 billion of them take a CPU a
    minute."""
    with tempfile.TemporaryDirectory() as folder:
        sizes.shape.write(Path(folder), str(chip.dtype).removeprefix("torch."))
        config = load_config(Path(folder))
    model = model_class(config.to_dict()).build(config, chip.parts(quantization))
    torch.manual_seed(0)
    with torch.inference_mode():
        for parameter in model.parameters().values():
            values = torch.ones(parameter.shape, dtype=chip.dtype, device=chip.device)
            if values.ndim > 1:
                bound = math.sqrt(3.0 / values.shape[-1])
                values.uniform_(-bound, bound)
            parameter.copy_(values)
    return model


class Steps:
    """The model over an arena that holds the largest decode batch, and the longest prompt in its place. `code_bytes`:
    see `Shape.decode_bytes`."""

    def __init__(self, chip: Chip, sizes: Sizes, model: Model, code_bytes: int | None = None) -> None:
        self._chip, self._sizes, self._code_bytes = chip, sizes, code_bytes
        shape, most = sizes.shape, sizes.rows[-1]
        self._layout = layout = shape.layout(shape.layers, sizes.block_tokens[0], chip.dtype.itemsize)
        self._per_row = layout.blocks_for(sizes.contexts[0] + WARM_STEPS + sizes.steps)
        frames = max(most * self._per_row, layout.blocks_for(max(sizes.prompts)))
        arena = allocate_arena(frames + 1, layout, chip.dtype, chip.device).normal_()
        self._frames = np.random.default_rng(0).permutation(frames).astype(np.int32)
        self.runner: CudaRunner = chip.runner(model, chip.attention(arena, model.geometry, most), most)
        self._plans = self._requests = 0

    async def captured(self) -> Line:
        started_s = time.perf_counter()
        taken = await self.runner.warm_up(lambda done, of: None, min(self._sizes.prompts))
        seconds = time.perf_counter() - started_s
        return Line("graphs", "decode graphs captured", seconds, "s", note=f"they take {taken.graphs / GIB:.2f} GiB")

    async def decode(self, rows: int, known: Mapping[str, float]) -> list[Line]:
        """Seconds per token of a batch, and what the device thread does for each step."""
        sizes, context, work = self._sizes, self._sizes.contexts[0], self.runner.host_work
        graphs, launch_s = work.graph_steps, work.launch_s
        gaps = await self._gaps(rows)
        tpot_s, steps = median(gaps), WARM_STEPS + sizes.steps
        middle = context + WARM_STEPS + sizes.steps // 2  # what the median step has behind it
        size = sizes.shape.decode_bytes(rows, middle, self._chip.dtype.itemsize, self._code_bytes)
        share, least = None, ""
        if "memory" in known:
            least_s = size / (known["memory"] * 1e9)
            share, least = least_s / tpot_s, f"roofline {least_s * 1e3:.2f} ms, "
        note = f"{least}{rows / tpot_s:,.0f} tok/s, {work.graph_steps - graphs} of {steps} steps were replays"
        what = f"decode of {rows} rows from {context:,} tokens on"
        lines = [
            Line(f"decode.{rows}", what, tpot_s * 1e3, "ms", share, note, raw={"gaps_s": gaps, "bytes": size}),
        ]
        if rows == sizes.rows[-1]:
            host_ms = (work.launch_s - launch_s) / steps * 1e3
            lines.append(Line("decode.launch", "device thread per such step", host_ms, "ms"))
        return lines

    async def _gaps(self, rows: int) -> list[float]:
        """Seconds from step to step of `rows` fresh requests, each behind a context that is there already."""
        start, first = self._sizes.contexts[0], self._requests
        self._requests += rows
        tables = self._frames[: rows * self._per_row].reshape(rows, self._per_row)

        def plan(step: int) -> StepPlan:
            at = start + step
            return self._plan(
                StepRow(first + row, array("i", [1]), at, tables[row], _sample(at + 1, start), follows=step > 0)
                for row in range(rows)
            )

        ends, before = [], asyncio.ensure_future(self.runner.run(plan(0)))
        for step in range(1, WARM_STEPS + self._sizes.steps):
            following = asyncio.ensure_future(self.runner.run(plan(step)))
            ends.append((await before).finished_s)
            before = following
        ends.append((await before).finished_s)
        ends = ends[WARM_STEPS - 1 :]
        return [b - a for a, b in pairwise(ends)]

    async def moving(self, rows: int) -> Line:
        """p99 of the time between tokens while blocks go both ways, to that in quiet, in turns."""
        quiet: list[float] = []
        busy: list[float] = []
        async with self._traffic() as moved:
            for _ in range(ROUNDS):
                moved.pause()
                quiet += await self._gaps(rows)
                moved.resume()
                busy += await self._gaps(rows)
        ratio = quantile(busy, 0.99) / quantile(quiet, 0.99)
        rate = moved.bytes / sum(busy) / 1e9
        return Line("decode.moving", f"p99 between tokens of {rows} rows while blocks move", quantile(busy, 0.99) * 1e3,
                    "ms", ratio, f"quiet {quantile(quiet, 0.99) * 1e3:.2f} ms; {rate:.1f} GB/s moved",
                    raw={"quiet_s": quiet, "busy_s": busy, "bytes": moved.bytes})  # fmt: skip

    @asynccontextmanager
    async def _traffic(self) -> AsyncIterator[Traffic]:
        block_bytes = self._layout.block_bytes
        half = max(2 * MOVING_CALLS, int(self._sizes.moving_gib * GIB) // 2 // block_bytes)
        host = HostArena(2 * half, block_bytes)
        host.prefault()
        arena = torch.zeros(2 * half, block_bytes, dtype=torch.uint8, device=self._chip.device)
        self._chip.synchronise()
        tier = CudaTier(arena, host, *self._chip.copies(host), time.monotonic)
        traffic = Traffic(tier, host, half, block_bytes)
        try:
            yield traffic
        finally:
            await traffic.stop()
            await tier.aclose()

    async def prefill(self, prompt: int, chunk: int, known: Mapping[str, float]) -> Line:
        """A prompt in chunks, from the first launch to its token on the host."""
        seconds = [await self._prompt_s(prompt, chunk) for _ in range(1 + ROUNDS)][1:]
        rate = self._sizes.shape.prefill_flops(prompt) / median(seconds) / 1e12
        share = rate / known["matmul"] if "matmul" in known else None
        usual = chunk == self._sizes.chunks[0]
        key = f"prefill.{prompt}" if usual else f"prefill.{prompt}.by{chunk}"
        note = f"{rate:.0f} TFLOP/s, {prompt / median(seconds):,.0f} tok/s"
        return Line(key, f"prefill of {prompt:,} tokens in chunks of {chunk:,}", median(seconds) * 1e3, "ms", share,
                    note, raw={"seconds": seconds})  # fmt: skip

    async def _prompt_s(self, prompt: int, chunk: int) -> float:
        self._requests += 1
        started_s = time.monotonic()
        result: StepResult | None = None
        for start in range(0, prompt, chunk):
            end = min(prompt, start + chunk)
            tokens = array("i", (1 + position % 2000 for position in range(start, end)))
            sample = _sample(prompt, prompt) if end == prompt else None
            result = await self.runner.run(self._plan([StepRow(self._requests, tokens, start, self._frames, sample)]))
        assert result is not None, "a prompt has tokens"
        return result.finished_s - started_s

    def _plan(self, rows: Iterator[StepRow] | Sequence[StepRow]) -> StepPlan:
        self._plans += 1
        return StepPlan(self._plans, list(rows))


def _sample(position: int, prompt_tokens: int) -> SampleSpec:
    return SampleSpec(GREEDY, position, prompt_tokens, array("i"))


class Traffic:
    """Blocks that go up and down through a tier without end, each way over one half of its frames; loop thread."""

    def __init__(self, tier: CudaTier, host: HostArena, half: int, block_bytes: int) -> None:
        self.bytes = 0
        self._block_bytes = block_bytes
        self._going = asyncio.Event()
        self._over = False
        moves = [Move(frame.to_bytes(32, "big"), None, 0, frame, frame) for frame in range(2 * half)]
        for move in moves[:half]:
            host.label(move.host, move.hash)
        self._tasks = [
            asyncio.create_task(self._lane(call, part[lane::MOVING_CALLS]))
            for call, part in ((tier.write, moves[:half]), (tier.read, moves[half:]))
            for lane in range(MOVING_CALLS)
        ]

    def pause(self) -> None:
        self._going.clear()

    def resume(self) -> None:
        self._going.set()

    async def stop(self) -> None:
        self._over = True
        self._going.set()
        await asyncio.gather(*self._tasks)

    async def _lane(self, call: Callable, moves: Sequence[Move]) -> None:
        run = max(1, GPU_RUN_BYTES // self._block_bytes)
        while True:
            for at in range(0, len(moves), run):
                await self._going.wait()
                if self._over:
                    return
                faults = [fault for fault in await call(moves[at : at + run]) if fault is not None]
                if faults:
                    raise RuntimeError(f"{len(faults)} blocks failed, the first: {faults[0].detail}")
                self.bytes += len(moves[at : at + run]) * self._block_bytes
