"""A day in virtual time: one daemon, clients that never stop, faults that never stop, and nothing that may grow.

Once per virtual minute everything that holds something is counted: in the second half none of it may typically be
larger than in the first. Typically is the median: one moment tells how busy it was, a leak shows at every one.
"""

from __future__ import annotations

import asyncio
import logging
import statistics
from dataclasses import dataclass
from random import Random

from server.kvcache.manager import TierSpec
from server.scheduler.limits import Limits
from server.sim.clock import SimFailure, VirtualLoop, run_virtual
from server.sim.oracle import StepCost
from server.sim.scenario import END_S, Scenario, Setup
from server.sim.tiers import FaultPlan
from server.types import DEVICE, DRAM, SSD, BlockLayout

HOUR_S = 3600.0
CLIENTS = 4
PAUSE_S = 60.0
"""A client rests up to this long between conversations."""
SETUP = Setup(
    BlockLayout(1, 1, 1, 8, 2),
    (TierSpec(DEVICE, 24, "lru", 4), TierSpec(DRAM, 24, "s3fifo", 4), TierSpec(SSD, 80, "cost", 4)),
    limits=Limits(6, 16, 16, 100, 10_000, 46),
    policy="fcfs",
    vocab=40,
    arrivals_s=PAUSE_S,
    cost=StepCost(0.01, 0.001, failure_every=500),
    faults=FaultPlan(30, 0.002),
    rot_every_s=60.0,
    drain_at_s=None,
    drain_timeout_s=1.0,
    flush_s=10.0,
    crashes_s=(),
    write_bytes_per_day=0.0,
)


SAMPLE_S = 60.0
SLACK = 150
"""So much more may wait in one half than in the other by chance: a bad hour of the disk holds up spills."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much one thing held in the first and in the second half of a soak."""

    name: str
    medians: tuple[float, float]
    largest: tuple[int, int]

    @property
    def grew(self) -> bool:
        first, second = self.medians
        return second > 1.5 * first + SLACK


class Soak(Scenario):
    def __init__(self, seed: int, loop: VirtualLoop, hours: float) -> None:
        super().__init__(seed, loop, SETUP)
        self.samples: list[dict[str, int]] = []
        self._until_s = hours * HOUR_S

    async def run(self) -> None:
        """Clients and faults until the time is over, then a drain and the checks of every scenario."""
        decay = asyncio.create_task(self._decay(), name="decay")
        engine = asyncio.create_task(self.engine.run(), name="engine")
        await asyncio.sleep(0)
        clients = [asyncio.create_task(self._client(number), name=f"client {number}") for number in range(CLIENTS)]
        while self._loop.time() < self._until_s:
            await asyncio.sleep(SAMPLE_S)
            self.samples.append(self._sizes())
        await asyncio.gather(*clients)
        await self.engine.drain(END_S)
        await engine
        await self.mover.settled()
        decay.cancel()
        self._check_quiet()

    def sizes(self) -> list[Size]:
        """What was counted, by half."""
        half = len(self.samples) // 2
        parts = self.samples[:half], self.samples[half:]
        sizes = []
        for name in self.samples[0]:
            first, second = ([sample[name] for sample in part] for part in parts)
            medians = statistics.median(first), statistics.median(second)
            sizes.append(Size(name, medians, (max(first), max(second))))
        return sizes

    async def _client(self, number: int) -> None:
        turn = 0
        while self._loop.time() < self._until_s:
            turn += 1
            await self._conversation(Random(f"{number} {turn % 500}"))  # old conversations come again

    def _sizes(self) -> dict[str, int]:
        """How much everything holds that could hold more and more."""
        traffic = self.kv.traffic
        return {
            "leases": len(self.kv.leases),
            "loads": len(traffic.loads),
            "in flight": len(traffic.in_flight),
            "spills queued": sum(len(hop.spills) for hop in traffic.hops),
            "loads queued": sum(len(hop.urgent) + len(hop.early) for hop in traffic.hops),
            "notes": len(traffic.notes),
            "pins": len(traffic.kept),
            "requests": len(self.scheduler.requests),
            "waiting tokens": self.scheduler.queued_tokens,
            "tasks": len(asyncio.all_tasks()),
            **{f"blocks in {books.name}": len(books.find) for books in self.kv.levels},
        }


def run_soak(hours: float, seed: int = 0) -> Soak:
    """One soak. Raises SimFailure when anything was wrong, wrongly answered, or grew."""
    loop = VirtualLoop(max_iterations=200_000_000)
    soak = Soak(seed, loop, hours)
    logging.disable(logging.CRITICAL)
    try:
        run_virtual(soak.run(), loop, cpu_limit_s=3600.0)
    finally:
        logging.disable(logging.NOTSET)
    if soak.findings:
        raise SimFailure(soak.findings[0])
    for size in soak.sizes():
        if size.grew:
            raise SimFailure(f"{size.name} grew from {size.medians[0]:g} to {size.medians[1]:g}")
    return soak
