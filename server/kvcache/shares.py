"""Quotas and floors: how many blocks of a tier each tenant may hold, and how many it may keep. Loop thread only.

`Shares` stands between the books of a tier and their eviction policy, and is there only where tenants are known. Every
block belongs to the tenant in whose chain it is, so nothing that hangs together ever has two owners.

Of a tenant with a limit in this tier it keeps what may go in one line, the least recently used first. The newest part
of that line is reserved: the policy does not know of it, so it goes for nobody. Held blocks count towards the floor
first, and with them just as many are reserved as make the floor up. What is left of the line is the policy's, which
orders it among everybody's; but as long as a tenant is over its quota, the old end of its line goes before all else.

A line is sorted by when its blocks were ranked, hence suffix first for the same reason as LRU; and a block leaves the
reserved part before its parent does. Everything is O(1) a block: the border between both parts moves by one at a time.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from server.kvcache.eviction import EvictionPolicy
from server.types import CacheLimit, FrameId

if TYPE_CHECKING:
    from server.kvcache.books import TierBooks

NOBODY = 0
NONE = -1
RANKED, RESERVED = 1, 2
"""Values of `TierBooks.ranked`: known to the policy, or kept from it for the sake of a floor."""


class Owners:
    """Tenants as small numbers, the same in every tier and for as long as the process lives; 0 is nobody."""

    def __init__(self) -> None:
        self.tenants = [""]
        """By number."""
        self._numbers = {"": NOBODY}

    def number(self, tenant: str) -> int:
        """Of a tenant that was registered, else 0."""
        return self._numbers.get(tenant, NOBODY)

    def register(self, tenant: str) -> int:
        """Its number from now on."""
        number = self._numbers.setdefault(tenant, len(self.tenants))
        if number == len(self.tenants):
            self.tenants.append(tenant)
        return number


@dataclass(slots=True)
class _Line:
    """What may go of one tenant with a limit, from `oldest` to `newest`; from `border` on it is reserved."""

    limit: CacheLimit
    oldest: FrameId = NONE
    newest: FrameId = NONE
    border: FrameId = NONE
    open: int = 0
    reserved: int = 0


class Shares(EvictionPolicy):
    """A policy around the policy of one tier, `inner`."""

    def __init__(self, books: TierBooks, inner: EvictionPolicy) -> None:
        frames = books.pool.capacity
        self.owner = array("i", bytes(4 * frames))
        """Whose block each frame holds; 0: nobody's, or none."""
        self.owned: Counter[int] = Counter()
        """Filed blocks by owner: those that are held or on their way here count, too."""
        self._books = books
        self._inner = inner
        self._older = array("i", [NONE]) * frames
        self._newer = array("i", [NONE]) * frames
        self._reserved = bytearray(frames)
        self.reserved_blocks = 0
        self._lines: dict[int, _Line] = {}
        self._over: dict[int, None] = {}
        """Owners beyond their quota, by since when."""

    # --- what the books tell -----------------------------------------------------------------------------------------

    def filed(self, frame: FrameId, owner: int) -> None:
        """A block of `owner` has a place now; it is held."""
        self.owner[frame] = owner
        self._count(owner, 1)

    def dropped(self, frame: FrameId) -> None:
        """The block in `frame`, which is not ranked any more, is gone."""
        owner, self.owner[frame] = self.owner[frame], NOBODY
        self._count(owner, -1)

    def recovered(self, owners: Mapping[int, Sequence[FrameId]]) -> None:
        """Whose blocks outlived the last process; they are ranked next."""
        for owner, frames in owners.items():
            for frame in frames:
                self.owner[frame] = owner
            self._count(owner, len(frames))

    def set_limits(self, limits: Mapping[int, CacheLimit]) -> None:
        """Replace all limits. O(1) for owners that had one before, else O(blocks that may go in this tier)."""
        for owner in self._lines.keys() - limits.keys():
            self._over.pop(owner, None)
            former = self._lines.pop(owner)
            while former.reserved:  # all is the policy's now
                self._let_out(former)
        fresh = {owner: _Line(limit) for owner, limit in limits.items() if owner not in self._lines}
        if any(self.owned[owner] for owner in fresh):
            for frame in list(self._inner.victims()):
                line = fresh.get(self.owner[frame])
                if line is not None:
                    self._append(line, frame)
                    line.open += 1
        self._lines |= fresh
        for owner, limit in limits.items():
            self._lines[owner].limit = limit
            self._count(owner, 0)

    def _count(self, owner: int, change: int) -> None:
        self.owned[owner] += change
        line = self._lines.get(owner)
        if line is not None:
            quota = line.limit.quota
            if quota is not None and self.owned[owner] > quota:
                self._over[owner] = None
            else:
                self._over.pop(owner, None)
            self._settle(owner, line)

    # --- what the books ask a policy ---------------------------------------------------------------------------------

    def on_insert(self, frame: FrameId) -> int:
        owner = self.owner[frame]
        line = self._lines.get(owner)
        if line is None:
            return self._inner.on_insert(frame)
        self._append(line, frame)
        if line.border == NONE:
            line.border = frame
        self._reserve(line, frame)
        self._settle(owner, line)
        return self._books.hits[frame]

    def on_remove(self, frame: FrameId) -> None:
        owner = self.owner[frame]
        line = self._lines.get(owner)
        if not self._reserved[frame]:
            self._inner.on_remove(frame)
        if line is not None:
            self._unlink(line, frame)
            self._settle(owner, line)

    def on_evict(self, frame: FrameId) -> None:
        owner = self.owner[frame]
        if owner in self._over:  # not the policy's choice: nothing to learn from
            self._inner.on_remove(frame)
        else:
            self._inner.on_evict(frame)
        line = self._lines.get(owner)
        if line is not None:
            self._unlink(line, frame)  # `dropped` comes next, and settles

    def on_changed(self, frame: FrameId) -> None:
        if not self._reserved[frame]:
            self._inner.on_changed(frame)

    def victims(self) -> Iterator[FrameId]:
        """First what is over some quota, then as the policy says; nothing that is reserved."""
        chosen: set[FrameId] = set()
        for owner in self._over:
            line, frame = self._lines[owner], self._lines[owner].oldest
            for _ in range(min(line.open, self.owned[owner] - (line.limit.quota or 0))):
                chosen.add(frame)
                yield frame
                frame = self._newer[frame]
        for frame in self._inner.victims():
            if frame not in chosen:
                yield frame

    def __len__(self) -> int:
        return len(self._inner)

    def reserved(self) -> Iterator[FrameId]:
        """All that may go but goes for nobody, children before their parents."""
        for line in self._lines.values():
            frame = line.border
            while frame != NONE:
                yield frame
                frame = self._newer[frame]

    # --- lines -------------------------------------------------------------------------------------------------------

    def due(self, owner: int) -> int:
        """How many blocks of this owner are to be reserved."""
        line = self._lines.get(owner)
        if line is None:
            return 0
        loose = line.open + line.reserved
        return min(loose, max(0, line.limit.floor - (self.owned[owner] - loose)))

    def _settle(self, owner: int, line: _Line) -> None:
        due = self.due(owner)
        while line.reserved > due:
            self._let_out(line)
        while line.reserved < due:
            self._take_back(line)

    def _let_out(self, line: _Line) -> None:
        """The oldest of the reserved ones is the policy's from now on."""
        books, frame = self._books, line.border
        line.border = self._newer[frame]
        line.open += 1
        self._release(line, frame)
        books.ranked[frame] = RANKED
        books.hits[frame] = self._inner.on_insert(frame)
        above = books.above[frame]
        if above != NONE:
            books.hits[above] = max(books.hits[above], books.hits[frame])

    def _take_back(self, line: _Line) -> None:
        """The newest of the policy's is reserved from now on."""
        frame = line.newest if line.border == NONE else self._older[line.border]
        self._inner.on_remove(frame)
        line.border = frame
        line.open -= 1
        self._reserve(line, frame)

    def _reserve(self, line: _Line, frame: FrameId) -> None:
        self._reserved[frame], self._books.ranked[frame] = 1, RESERVED
        line.reserved += 1
        self.reserved_blocks += 1

    def _release(self, line: _Line, frame: FrameId) -> None:
        self._reserved[frame] = 0
        line.reserved -= 1
        self.reserved_blocks -= 1

    def _append(self, line: _Line, frame: FrameId) -> None:
        self._older[frame], self._newer[frame] = line.newest, NONE
        if line.newest == NONE:
            line.oldest = frame
        else:
            self._newer[line.newest] = frame
        line.newest = frame

    def _unlink(self, line: _Line, frame: FrameId) -> None:
        older, newer = self._older[frame], self._newer[frame]
        if older == NONE:
            line.oldest = newer
        else:
            self._newer[older] = newer
        if newer == NONE:
            line.newest = older
        else:
            self._older[newer] = older
        if self._reserved[frame]:
            self._release(line, frame)
            if line.border == frame:
                line.border = newer
        else:
            line.open -= 1
