"""Simulated media: moves oracle blocks between arenas on virtual time, with seeded faults, torn until the last byte.

Two tiers around one host arena, as in production: the device, whose blocks die with the process, and an SSD whose
blocks and journal outlive it. Like the real ones they keep with each frame the hash that was written there and a
checksum, and report `corrupt` instead of handing out what does not agree with both. The faults are those of real disks:
slow, stalled, failed, full, a raised OSError, a bit flipped on the way or at rest, a write that lands in another frame
and says it went well, a crash that tears what was in flight and loses the journal's last records.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from server.kvcache.tiers.base import Move, Recovered
from server.sim.oracle import Arena, Report
from server.types import DEVICE, DRAM, SSD, BlockHash, FrameId, Note, TierFault, TierName

KINDS = ("slow", "stalled", "io", "raised", "no_space", "flipped", "misdirected")
Place = tuple[TierName, FrameId]


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """`every`: one move in so many goes wrong (0: none); one `io` in four is the first of `bout` in a row, as of a disk
    that hangs up. `block_s`: what a healthy move of one block takes."""

    every: int
    block_s: float
    kinds: tuple[str, ...] = KINDS
    bout: int = 12


@dataclass(slots=True)
class Record:
    """One line of the simulated journal: what was written where, or that it is gone."""

    frame: FrameId
    hash: BlockHash | None
    parent: BlockHash | None = None
    depth: int = 0


@dataclass
class Media:
    """The memory of all tiers, with what is known about each frame, and what has gone wrong so far."""

    arenas: dict[TierName, Arena]
    report: Report
    labels: dict[Place, tuple[BlockHash, int]] = field(default_factory=dict)
    damaged: set[Place] = field(default_factory=set)
    busy: Counter[Place] = field(default_factory=Counter)
    injected: Counter[str] = field(default_factory=Counter)
    reported: Counter[str] = field(default_factory=Counter)
    moved: Counter[tuple[TierName, TierName]] = field(default_factory=Counter)

    def read(self, place: Place) -> list[int]:
        return self.arenas[place[0]].frames[place[1]]

    def store(self, place: Place, value: BlockHash, content: list[int]) -> None:
        self.arenas[place[0]].frames[place[1]] = list(content)
        self.labels[place] = (value, hash(tuple(content)))
        self.damaged.discard(place)

    def tear(self, place: Place) -> None:
        self.arenas[place[0]].tear(place[1])
        self.labels.pop(place, None)

    def good(self, place: Place, value: BlockHash) -> bool:
        return self.labels.get(place) == (value, hash(tuple(self.read(place))))

    def damage(self, place: Place, rng: Random) -> None:
        content = self.read(place)
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(60)
        self.damaged.add(place)

    def rot(self, rng: Random) -> None:
        """Damage at rest: one number in one written frame below the device changes."""
        places = sorted(place for place in self.labels if place[0] != DEVICE)
        if places:
            self.damage(rng.choice(places), rng)
            self.injected["rotten"] += 1

    def lose_memory(self) -> None:
        """The process died: nothing of the device and of DRAM is left, and what was being written is torn."""
        for place in list(self.labels):
            if place[0] != SSD:
                self.tear(place)
        self.damaged = {place for place in self.damaged if place[0] == SSD}
        self.busy.clear()


class SimTier:
    """A `Tier` on virtual time. `capacity_blocks` frames of `media`'s arena of that name."""

    def __init__(self, name: TierName, media: Media, faults: FaultPlan, rng: Random) -> None:
        self.name = name
        self.capacity_blocks = len(media.arenas[name].frames)
        self.journal: list[Record] = []
        self._media = media
        self._faults = faults
        self._rng = rng
        self._sick_moves = 0

    async def write(self, moves: Sequence[Move]) -> Sequence[TierFault | None]:
        """Host to tier."""
        return await self._carry(moves, DRAM, self.name)

    async def read(self, moves: Sequence[Move]) -> Sequence[TierFault | None]:
        """Tier to host."""
        return await self._carry(moves, self.name, DRAM)

    def note(self, notes: Sequence[Note]) -> None:
        for note in notes:
            if self.name == SSD and note.kind == "drop":
                self.journal.append(Record(note.frame, None))

    async def aclose(self) -> None:
        """There is nothing to close."""

    async def open(self) -> Recovered:
        """What the journal says is there: parents before children, so oldest last child first in the other order."""
        rows: dict[FrameId, Record] = {}
        for record in self.journal:
            rows.pop(record.frame, None)
            if record.hash is not None:
                for frame in [frame for frame, other in rows.items() if other.hash == record.hash]:
                    del rows[frame]
                rows[record.frame] = record
        found: dict[BlockHash, Record] = {}
        for record in sorted(rows.values(), key=lambda record: record.depth):
            if record.hash is not None and (record.parent is None or record.parent in found):
                found[record.hash] = record
        kept = sorted(found.values(), key=lambda record: -record.depth)
        for record in kept:  # torn in the crash, or rewritten since this record: a read will tell
            if record.hash is not None and not self._media.good((SSD, record.frame), record.hash):
                self._media.damaged.add((SSD, record.frame))
        return Recovered(
            frames=[record.frame for record in kept],
            hashes=[record.hash for record in kept if record.hash is not None],
            above=[-1 if record.parent is None else found[record.parent].frame for record in kept],
            depths=[record.depth for record in kept],
        )

    def crash(self) -> None:
        """Some of the journal's last records never reached the disk."""
        lost = self._rng.choice((0, 0, 1, 5))
        del self.journal[max(0, len(self.journal) - lost) :]

    # --- one call ----------------------------------------------------------------------------------------------------

    async def _carry(self, moves: Sequence[Move], source: TierName, target: TierName) -> list[TierFault | None]:
        """Move blocks. Their sources must not change meanwhile, and nobody else may touch their targets."""
        media = self._media
        ends = [(self._place(move, source), self._place(move, target)) for move in moves]
        kinds = [self._draw(target) for _ in moves]
        before = [list(media.read(start)) for start, _ in ends]
        for start, end in ends:
            if media.busy[end]:
                media.report(f"frame {end} is the target of two moves")
            media.busy.update((start, end))
            media.tear(end)
        torn = [list(media.read(end)) for _, end in ends]
        try:
            await asyncio.sleep(sum(self._seconds(kind) for kind in kinds))
        finally:
            for start, end in ends:
                media.busy.subtract((start, end))
        for (start, end), was, noise in zip(ends, before, torn, strict=True):
            if media.read(start) != was and start not in media.damaged:
                media.report(f"frame {start} changed while it was read")
            if media.read(end) != noise:
                media.report(f"frame {end} was written by somebody else")
        if "raised" in kinds:
            media.reported["io"] += 1
            raise OSError(5, "injected")
        outcomes = [self._finish(move, *end, kind) for move, end, kind in zip(moves, ends, kinds, strict=True)]
        media.reported.update(fault.reason for fault in outcomes if fault is not None)
        return outcomes

    def _place(self, move: Move, name: TierName) -> Place:
        return (name, move.host if name == DRAM else move.frame)

    def _finish(self, move: Move, source: Place, target: Place, kind: str | None) -> TierFault | None:
        media = self._media
        if kind in ("io", "no_space"):
            return TierFault(kind, "injected")
        content = list(media.read(source))
        if source[0] != DEVICE and (not media.good(source, move.hash) or kind in ("flipped", "misdirected")):
            return TierFault("corrupt", "what was read is not what was written under this hash")
        media.moved[(source[0], target[0])] += 1
        if target[0] != SSD:
            media.store(target, move.hash, content)
            return None
        self._write_down(move, target, content, kind)
        self.journal.append(Record(target[1], move.hash, move.parent, move.depth))
        return None

    def _write_down(self, move: Move, target: Place, content: list[int], kind: str | None) -> None:
        media, place = self._media, target
        if kind == "misdirected":
            media.damaged.add(target)
            others = [other for other in sorted(media.labels) if other[0] == SSD and not media.busy[other]]
            place = self._rng.choice(others) if others else target
        media.store(place, move.hash, content)
        if kind == "flipped":
            media.damage(place, self._rng)
        if place != target:
            media.damaged.add(place)

    def _draw(self, target: TierName) -> str | None:
        if self._sick_moves:
            self._sick_moves -= 1
            kind = "io"
        elif not self._faults.every or self._rng.randrange(self._faults.every):
            return None
        else:
            kind = self._rng.choice(self._faults.kinds)
            if kind == "no_space" and target != SSD:
                kind = "io"
            if kind == "io" and not self._rng.randrange(4):
                self._sick_moves = self._faults.bout
        self._media.injected[kind] += 1
        return kind

    def _seconds(self, kind: str | None) -> float:
        factor = {"slow": 30.0, "stalled": 3000.0}.get(kind or "", 1.0)
        return self._faults.block_s * factor * self._rng.uniform(0.2, 2)
