"""Never slower: time to first token with tiers on against tiers off, wherever the prefix is, whatever the disk does.

Two daemons in this process, a small random model, the same requests in turns: one has only the device tier, the other
DRAM and SSD below it. Before each request its prefix is put where the cell wants it: nowhere, on the device, in DRAM
only, on SSD only. The disk is as fast as it is, slowed to 200 or 20 MB/s, or does not answer at all. Short and long
prefixes, with the daemon idle and with other requests decoding. What counts is the median of the ratios of neighbours.

Whenever the disk changes, SETTLE requests that do not count let the daemon find out; what they cost is shown, as the
worst of them, on a line of its own.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from server.bench.model import Workload, make_model
from server.bench.placing import first_token_s, place, serving
from server.bench.report import Report
from server.bench.throttled import SlowIo
from server.build import Daemon, build
from server.config import Config, KvConfig, ModelConfig
from server.engine import GenerateSpec
from server.types import DEVICE, DRAM, SSD, SamplingParams

MODEL = Workload(layers=6, hidden=384, vocab=8_000, prompt=0, output=0, concurrency=(1,), repeats=0)
"""25M parameters, 6 KiB of KV per token: computing on two cores and loading at 20 MB/s take about as long."""
GOAL_RATIO = 1.05
DOUBT = 4
"""A cell above the goal is measured this many times as long before it counts: medians of few pairs scatter by 5 %, and
there are 64 of them."""
SUFFIX_TOKENS = 16
SETTLE = 6
BACKGROUND = 4
"""Requests that decode all the while in a loaded cell."""


@dataclass(frozen=True)
class Shape:
    lengths: tuple[int, ...]
    repeats: int


FULL = Shape((128, 1024), 15)
QUICK = Shape((64,), 3)


RATES = {"full": float("inf"), "200MB/s": 200e6, "20MB/s": 20e6, "stalled": 0.0}
HITS = ("none", DEVICE, DRAM, SSD)


def run(*, quick: bool) -> Report:
    """All cells; see the module's docstring."""
    report = Report("grid", quick=quick)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as disk:
        make_model(MODEL, Path(folder))
        asyncio.run(_run(report, QUICK if quick else FULL, folder, Path(disk)))
    return report


async def _run(report: Report, shape: Shape, folder: str, disk: Path) -> None:
    io = SlowIo()
    model = ModelConfig(model=folder, dtype="float32")
    off = build(Config(model=model, kv=KvConfig(device_gib=0.25)))
    tiers = KvConfig(device_gib=0.25, dram_gib=0.25, ssd_gib=1.0, ssd_path=disk, ssd_min_free_gib=0.0)
    on = build(Config(model=model, kv=tiers), disk=io)
    async with serving((on, off)):
        await _Grid(report, on, off, io, shape).all_cells()
        io.set_rate(float("inf"))


class _Grid:
    def __init__(self, report: Report, on: Daemon, off: Daemon, io: SlowIo, shape: Shape) -> None:
        self._report = report
        self._on, self._off, self._io, self._shape = on, off, io, shape
        self._random = torch.Generator().manual_seed(0)
        self._worst = 0.0

    async def all_cells(self) -> None:
        self._report.header("prefix in", "disk", "tokens", "load", "off ms", "on ms", "on/off", "worst", "loaded tok")
        for loaded in (False, True):
            for length in self._shape.lengths:
                for rate in RATES:
                    await self._settle(rate, length)
                    for hit in HITS:
                        await self._cell(hit, rate, length, loaded)
        statement = f"TTFT with tiers <= {GOAL_RATIO} x without in every cell (worst {self._worst:.3f})"
        self._report.goal(statement, met=self._worst <= GOAL_RATIO)

    async def _settle(self, rate: str, length: int) -> None:
        """The disk is another one now; some requests find out."""
        kv, spent = self._on.engine.kv, []
        for _ in range(SETTLE):
            prefix = self._tokens(length)
            self._io.set_rate(float("inf"))
            await place(self._on, prefix, SSD)
            self._io.set_rate(RATES[rate])
            kv.planner.up[1].probe_s = 0.0
            spent.append((await first_token_s(self._on, prefix + self._tokens(SUFFIX_TOKENS)))[0])
        self._io.set_rate(float("inf"))
        self._report.row("(settle)", rate, length, "idle", "", f"{max(spent) * 1e3:.1f}", "", "", "")
        self._report.keep(settling=rate, tokens=length, on_s=spent)

    async def _cell(self, hit: str, rate: str, length: int, loaded: bool) -> None:
        ons: list[float] = []
        offs: list[float] = []
        served = 0
        ratio = 0.0
        for most in (self._shape.repeats, self._shape.repeats * DOUBT):
            while len(ons) < most:
                on_s, off_s, count = await self._pair(hit, rate, length, loaded, on_first=len(ons) % 2 == 1)
                ons.append(on_s)
                offs.append(off_s)
                served += count
            ratio = median(on_s / off_s for on_s, off_s in zip(ons, offs, strict=True))
            if ratio <= GOAL_RATIO:
                break
        self._worst = max(self._worst, ratio)
        self._report.keep(hit=hit, disk=rate, tokens=length, loaded=loaded, on_s=ons, off_s=offs, served=served)
        worst = max(on_s / off_s for on_s, off_s in zip(ons, offs, strict=True))
        self._report.row(
            hit, rate, length, "loaded" if loaded else "idle", f"{median(offs) * 1e3:.1f}",
            f"{median(ons) * 1e3:.1f}", f"{ratio:.3f}", f"{worst:.2f}", served // len(ons),
        )  # fmt: skip

    async def _pair(
        self, hit: str, rate: str, length: int, loaded: bool, *, on_first: bool
    ) -> tuple[float, float, int]:
        """The same request to both: seconds with tiers, without, and the tokens that tiers served."""
        prefix = self._tokens(length)
        self._io.set_rate(float("inf"))
        for daemon in (self._on, self._off):
            if hit == DEVICE or (daemon is self._on and hit != "none"):
                await place(daemon, prefix, hit)
        self._io.set_rate(RATES[rate])
        prompt = prefix + self._tokens(SUFFIX_TOKENS)
        order = (self._on, self._off) if on_first else (self._off, self._on)
        took = {id(daemon): await self._measure(daemon, prompt, loaded) for daemon in order}
        self._io.set_rate(float("inf"))
        (on_s, count), (off_s, _) = took[id(self._on)], took[id(self._off)]
        return on_s, off_s, count

    async def _measure(self, daemon: Daemon, prompt: Sequence[int], loaded: bool) -> tuple[float, int]:
        """The same while, where wanted, other requests decode in this daemon (and nothing runs in the other one)."""
        others = []
        for _ in range(BACKGROUND if loaded else 0):
            others.append(daemon.engine.submit(GenerateSpec(self._tokens(32), SamplingParams(512, temperature=0.0))))
        for stream in others:
            await anext(aiter(stream))
        try:
            return await first_token_s(daemon, prompt)
        finally:
            for stream in others:
                stream.close()

    def _tokens(self, count: int) -> list[int]:
        return torch.randint(1, MODEL.vocab, (count,), generator=self._random).tolist()
