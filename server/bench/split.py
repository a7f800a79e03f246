"""Load, compute, or both at once: what the planner chooses for a prefix on SSD, against either alone.

Three daemons in this process on the same random model and disk, the same requests in turns. One waits for all that is
cached; one has nothing to load from; one does as its planner says. The disk is slowed to multiples of the bandwidth at
which loading and computing take equally long, which is measured before each cell.

Where both take T, doing them at once takes T / 2 if nothing is lost: the step more, the suffix, loads that come in runs
of a megabyte, an estimate that is off. One core computes, the other one moves blocks.
"""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from server.bench.model import Workload, make_model
from server.bench.placing import drop, first_token_s, place, prefer_loading, quiet, serving
from server.bench.report import Report
from server.bench.throttled import SlowIo
from server.build import Daemon, build
from server.config import Config, KvConfig, ModelConfig
from server.kvcache.tiers.slots import HEADER_BYTES
from server.types import SSD

MODEL = Workload(layers=12, hidden=192, vocab=4_000, prompt=0, output=0, concurrency=(1,), repeats=0,
                 kv_heads=12, positions=4096)  # fmt: skip
"""6M parameters and 18 KiB of KV per token: as much KV for its computing as models have that are a thousand times as
large, so that break-even is at megabytes per prefix and a second of computing."""
GOAL_RATIO = 1.05
GOAL_EQUAL = 0.65
EQUAL_WITHIN = 0.35
EQUAL_TOKENS = 512
"""A shorter prefix is computed in a few times the base of a step: a step more costs what doing both at once saves."""
DOUBT = 3
"""A cell that misses its goal is measured this many times as long before it counts."""
SUFFIX_TOKENS = 8
"""Less than a block, so that nothing hangs on the prefix."""
SETTLE = 4


@dataclass(frozen=True)
class Shape:
    lengths: tuple[int, ...]
    shares: tuple[float, ...]
    """Of the bandwidth at which loading takes as long as computing."""
    rounds: int
    prefixes: int = 3


FULL = Shape((256, 1024, 2048), (0.25, 0.5, 1.0, 2.0, 4.0), 7)
QUICK = Shape((64,), (1.0,), 2, 1)


@dataclass(frozen=True)
class Cell:
    """What was measured of one cell, seconds by round; `loaded`: tokens that the planner's own choice loaded, mean."""

    tokens: int
    load_s: list[float]
    compute_s: list[float]
    own_s: list[float]
    loaded: int

    @property
    def better_s(self) -> list[float]:
        """Of the better of the two that do not choose."""
        return min(self.load_s, self.compute_s, key=median)

    @property
    def equal(self) -> bool:
        """The two are about as fast, and it takes long enough to do both."""
        apart = abs(median(self.load_s) / median(self.compute_s) - 1)
        return self.tokens >= EQUAL_TOKENS and apart <= EQUAL_WITHIN

    @property
    def ratio(self) -> float:
        """Of the planner's choice to the better of the two, neighbours in time."""
        return median(own_s / better_s for own_s, better_s in zip(self.own_s, self.better_s, strict=True))

    @property
    def met(self) -> bool:
        return self.ratio <= (GOAL_EQUAL if self.equal else GOAL_RATIO)

    @property
    def at_once_s(self) -> float:
        """If both could be done at once and nothing were lost."""
        return 1 / (1 / median(self.load_s) + 1 / median(self.compute_s))


def judge(report: Report, cells: list[Cell]) -> None:
    """State the goals; one that no cell speaks for is missed."""
    worst = max(cell.ratio for cell in cells)
    statement = f"TTFT <= {GOAL_RATIO} x the better of loading and computing in every cell (worst {worst:.3f})"
    report.goal(statement, met=worst <= GOAL_RATIO)
    equal = [cell.ratio for cell in cells if cell.equal]
    found = f"{len(equal)} cells, worst {max(equal):.3f}" if equal else "no cell"
    where = f"from {EQUAL_TOKENS} tokens on, where the two are within {EQUAL_WITHIN:.0%} of each other"
    statement = f"TTFT <= {GOAL_EQUAL} x {where} ({found})"
    report.goal(statement, met=bool(equal) and max(equal) <= GOAL_EQUAL)


def run(*, quick: bool) -> Report:
    """All cells; see the module's docstring."""
    report = Report("split", quick=quick)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as disk:
        make_model(MODEL, Path(folder))
        asyncio.run(_run(report, QUICK if quick else FULL, folder, Path(disk)))
    return report


async def _run(report: Report, shape: Shape, folder: str, disk: Path) -> None:
    io = SlowIo()
    model = ModelConfig(model=folder, dtype="float32", threads=1)

    def tiered(name: str) -> Daemon:
        kv = KvConfig(device_gib=0.25, dram_gib=0.25, ssd_gib=1.0, ssd_path=disk / name, ssd_min_free_gib=0.0)
        return build(Config(model=model, kv=kv), disk=io)

    load, own = tiered("load"), tiered("own")
    compute = build(Config(model=model, kv=KvConfig(device_gib=0.25)))
    async with serving((load, compute, own)):
        await _Split(report, shape, io, load, compute, own).all_cells()
        io.set_rate(float("inf"))


class _Split:
    def __init__(self, report: Report, shape: Shape, io: SlowIo, load: Daemon, compute: Daemon, own: Daemon) -> None:
        self._report, self._shape, self._io = report, shape, io
        self._load, self._compute, self._own = load, compute, own
        self._random = torch.Generator().manual_seed(0)
        self._prefixes = {n: [self._tokens(n) for _ in range(shape.prefixes)] for n in shape.lengths}

    async def all_cells(self) -> None:
        for daemon in (self._load, self._own):
            for prefix in (prefix for prefixes in self._prefixes.values() for prefix in prefixes):
                await place(daemon, prefix, SSD)
        self._report.header("tokens", "x equal", "MB/s", "load ms", "compute ms", "own ms", "loaded tok", "at once ms",
                            "own/better", "worst", "")  # fmt: skip
        cells = []
        for share in self._shape.shares:
            for length in sorted(self._shape.lengths, reverse=True):
                cells.append(await self._cell(length, share, share * await self._break_even(length)))
        judge(self._report, cells)

    async def _break_even(self, length: int) -> float:
        """Bytes on disk per second at which the prefix is loaded as fast as computed."""
        suffix = [(await first_token_s(self._compute, self._tokens(SUFFIX_TOKENS)))[0] for _ in range(5)]
        whole = [await self._measure(self._compute, length, number) for number in range(5)]
        computing_s = median(seconds for seconds, _ in whole) - median(suffix)
        layout = self._own.engine.kv.layout
        size = layout.blocks_for(length) * (layout.block_bytes + HEADER_BYTES)
        self._report.keep(tokens=length, computing_s=computing_s, bytes=size)
        return size / computing_s

    async def _cell(self, length: int, share: float, rate: float) -> Cell:
        settling = [await self._measure(self._own, length, number, rate, settling=True) for number in range(SETTLE)]
        load: list[float] = []
        compute: list[float] = []
        own: list[float] = []
        loaded: list[int] = []
        for rounds in (self._shape.rounds, DOUBT * self._shape.rounds):
            while len(own) < rounds:
                number = len(own)
                turns = [(self._load, load), (self._compute, compute), (self._own, own)]
                for daemon, found in turns[number % 3 :] + turns[: number % 3]:
                    seconds, cached = await self._measure(daemon, length, number, rate)
                    found.append(seconds)
                    if daemon is self._own:
                        loaded.append(cached)
                    assert daemon is not self._load or cached >= length, "what is to be loaded was computed"
            cell = Cell(length, load, compute, own, sum(loaded) // len(loaded))
            if cell.met:
                break
        worst = max(o / b for o, b in zip(own, cell.better_s, strict=True))
        shown = [f"{median(found) * 1e3:.1f}" for found in (load, compute, own)]
        self._report.row(length, share, f"{rate / 1e6:.1f}", *shown, cell.loaded, f"{cell.at_once_s * 1e3:.1f}",
                         f"{cell.ratio:.3f}", f"{worst:.2f}", "equal" if cell.equal else "")  # fmt: skip
        self._report.keep(
            tokens=length, share=share, bytes_per_s=rate, load_s=load, compute_s=compute, own_s=own, loaded=loaded,
            settling_s=[seconds for seconds, _ in settling],
        )  # fmt: skip
        return cell

    async def _measure(
        self, daemon: Daemon, length: int, number: int, rate: float = float("inf"), *, settling: bool = False
    ) -> tuple[float, int]:
        """One request to a daemon that has its prefix on SSD, or nowhere if it has no SSD tier: seconds to the first
        token, and tokens that were loaded. `settling`: a planner that thinks little of the disk tries it again."""
        prefix = self._prefixes[length][number % self._shape.prefixes]
        self._io.set_rate(float("inf"))
        if SSD in daemon.tiers:
            await place(daemon, prefix, SSD)
        else:
            drop(daemon.engine.kv.device, daemon.engine.chain(prefix, ""))
        if daemon is self._load:
            prefer_loading(daemon)
        if settling:
            daemon.engine.kv.planner.up[1].probe_s = 0.0
        self._io.set_rate(rate)
        found = await first_token_s(daemon, prefix + self._tokens(SUFFIX_TOKENS))
        self._io.set_rate(float("inf"))
        await quiet(daemon)
        return found

    def _tokens(self, count: int) -> list[int]:
        return torch.randint(1, MODEL.vocab, (count,), generator=self._random).tolist()
