"""A day in virtual time: one daemon, clients that never stop, faults that never stop, and nothing that may grow.

Once per virtual hour everything that holds something is counted: after the first hours none of it may be larger than
its named limit, nor than it was before.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from random import Random

from server.kvcache.manager import TierSpec
from server.scheduler.scheduler import Limits
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


@dataclass(frozen=True, slots=True)
class Hour:
    """Sizes at one moment."""

    at_s: float
    sizes: dict[str, int]


class Soak(Scenario):
    def __init__(self, seed: int, loop: VirtualLoop, hours: float) -> None:
        super().__init__(seed, loop, SETUP)
        self.hours: list[Hour] = []
        self._until_s = hours * HOUR_S

    async def run(self) -> None:
        """Clients and faults until the time is over, then a drain and the checks of every scenario."""
        decay = asyncio.create_task(self._decay(), name="decay")
        engine = asyncio.create_task(self.engine.run(), name="engine")
        await asyncio.sleep(0)
        clients = [asyncio.create_task(self._client(number), name=f"client {number}") for number in range(CLIENTS)]
        while self._loop.time() < self._until_s:
            await asyncio.sleep(HOUR_S)
            self.hours.append(Hour(self._loop.time(), self._sizes()))
        await asyncio.gather(*clients)
        await self.engine.drain(END_S)
        await engine
        await self.mover.settled()
        decay.cancel()
        self._check_quiet()

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
    half = len(soak.hours) // 2
    for name in soak.hours[0].sizes:
        before = max(hour.sizes[name] for hour in soak.hours[:half] or soak.hours)
        after = max(hour.sizes[name] for hour in soak.hours[half:])
        if after > 1.5 * before + 8:
            raise SimFailure(f"{name} grew from {before} to {after}")
    return soak
