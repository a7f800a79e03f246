"""The order in which blocks are moved; what becomes of faults is shown by the tests of the tiers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from server.kvcache.mover import Mover
from server.kvcache.tiers.base import Move, Recovered
from server.types import DRAM, SSD, Note, TierFault, Transfer


class Listed:
    """A tier that notes what it is asked for, call by call."""

    name = SSD
    capacity_blocks = 100

    def __init__(self) -> None:
        self.calls: list[list[int]] = []

    async def open(self) -> Recovered:
        return Recovered()

    async def read(self, moves: Sequence[Move]) -> Sequence[TierFault | None]:
        self.calls.append([move.frame for move in moves])
        return [None] * len(moves)

    async def write(self, moves: Sequence[Move]) -> Sequence[TierFault | None]:
        return await self.read(moves)

    def note(self, notes: Sequence[Note]) -> None:
        pass

    async def aclose(self) -> None:
        pass


def test_what_is_wanted_first_goes_first():
    """Neighbours go together, at most so many; the runs go in the order of the transfers, which is not that of the
    frames: a prefix is loaded from its end while its beginning is computed."""

    async def moved() -> list[list[int]]:
        tier, landed = Listed(), []
        mover = Mover({SSD: tier}, run_blocks=3)
        frames = (17, 16, 15, 14, 13, 30, 9)
        transfers = [
            Transfer(number, bytes([number]), (SSD, frame), (DRAM, number), 0.0) for number, frame in enumerate(frames)
        ]
        mover.start(transfers, lambda number, fault: landed.append(number), lambda error: None)
        await mover.settled()
        assert sorted(landed) == list(range(len(frames)))
        return tier.calls

    assert asyncio.run(moved()) == [[16, 17], [13, 14, 15], [30], [9]]
