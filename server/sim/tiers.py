"""Simulated media: moves oracle blocks between arenas on virtual time, with seeded faults, torn until the last byte.

Like the real tiers it keeps with each lower frame the hash that was written there and a checksum, and reports `corrupt`
instead of handing out what does not agree with both. The faults are those of real disks: slow, stalled, failed, full, a
raised OSError, a bit flipped on the way or at rest, a write that lands in another frame and says it went well.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from random import Random

from server.sim.oracle import Arena, Report
from server.types import DEVICE, BlockHash, FrameId, TierFault, TierName, Transfer

KINDS = ("slow", "stalled", "io", "raised", "no_space", "flipped", "misdirected")
Place = tuple[TierName, FrameId]


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """`every`: one transfer in so many goes wrong (0: none). `block_s`: what a healthy transfer of one block takes."""

    every: int
    block_s: float
    kinds: tuple[str, ...] = KINDS


class SimTiers:
    """The arenas of all tiers, and the copy function that `Mover` calls."""

    def __init__(self, arenas: dict[TierName, Arena], faults: FaultPlan, rng: Random, report: Report) -> None:
        self.arenas = arenas
        self.damaged: set[Place] = set()
        self.injected: Counter[str] = Counter()
        self.moved: Counter[TierName] = Counter()
        self._labels: dict[Place, tuple[BlockHash, int]] = {}
        self._busy: Counter[Place] = Counter()
        self._faults = faults
        self._rng = rng
        self._report = report

    async def copy(self, transfer: Transfer) -> TierFault | None:
        """Move one block. Its source must not change meanwhile, and nobody else may touch its target."""
        source, target = transfer.source, transfer.target
        if self._busy[target]:
            self._report(f"transfer {transfer.id}: its target is in another transfer")
        self._busy.update((source, target))
        before = list(self.read(source))
        self.arenas[target[0]].tear(target[1])
        torn = list(self.read(target))
        self._labels.pop(target, None)
        kind = self._draw()
        try:
            await asyncio.sleep(self._seconds(kind))
        finally:
            self._busy.subtract((source, target))
        if self.read(source) != before and source not in self.damaged:
            self._report(f"transfer {transfer.id}: its source changed while it was read")
        if self.read(target) != torn:
            self._report(f"transfer {transfer.id}: somebody else wrote its target")
        if kind == "raised":
            raise OSError(5, "injected")
        if kind == "io" or (kind == "no_space" and target[0] == DEVICE):
            return TierFault("io", "injected")
        if kind == "no_space":
            return TierFault("no_space", "injected")
        self.moved[target[0]] += 1
        return self._read_up(transfer, kind) if target[0] == DEVICE else self._write_down(transfer, kind)

    def read(self, place: Place) -> list[int]:
        return self.arenas[place[0]].frames[place[1]]

    def rot(self) -> None:
        """Damage at rest: one number in one written lower frame changes."""
        places = sorted(self._labels)
        if places:
            self._damage(self._rng.choice(places))
            self.injected["rotten"] += 1

    def _damage(self, place: Place) -> None:
        content = self.read(place)
        content[self._rng.randrange(len(content))] ^= 1 << self._rng.randrange(60)
        self.damaged.add(place)

    def _read_up(self, transfer: Transfer, kind: str | None) -> TierFault | None:
        content = self.read(transfer.source)
        label = (transfer.hash, hash(tuple(content)))
        if self._labels.get(transfer.source) != label or kind in ("flipped", "misdirected"):
            return TierFault("corrupt", "what was read is not what was written under this hash")
        self._store(transfer.target, content)
        return None

    def _write_down(self, transfer: Transfer, kind: str | None) -> TierFault | None:
        content, place = self.read(transfer.source), transfer.target
        if kind == "misdirected":
            self.damaged.add(place)
            others = [other for other in sorted(self._labels) if not self._busy[other]]
            place = self._rng.choice(others) if others else place
        self._store(place, content)
        self._labels[place] = (transfer.hash, hash(tuple(content)))
        if kind == "flipped":
            self._damage(place)
        if place != transfer.target:
            self.damaged.add(place)
        return None

    def _store(self, place: Place, content: list[int]) -> None:
        self.arenas[place[0]].frames[place[1]] = list(content)
        self.damaged.discard(place)

    def _draw(self) -> str | None:
        if not self._faults.every or self._rng.randrange(self._faults.every):
            return None
        kind = self._rng.choice(self._faults.kinds)
        self.injected[kind] += 1
        return kind

    def _seconds(self, kind: str | None) -> float:
        factor = {"slow": 30.0, "stalled": 3000.0}.get(kind or "", 1.0)
        return self._faults.block_s * factor * self._rng.uniform(0.2, 2)
