"""ARC (Megiddo and Modha, FAST 2003): what was used once and what was used again, in shares that adapt.

Two lists by recency, of blocks never found and of blocks found, and for each the ghosts of what it gave away. A block
that comes back and is a ghost says that its list was too short, and the target for the first one moves accordingly.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

from server.kvcache.eviction import EvictionPolicy, suffix_first
from server.types import BlockHash, FrameId

if TYPE_CHECKING:
    from server.kvcache.books import TierBooks


class ARC(EvictionPolicy):
    def __init__(self, books: TierBooks) -> None:
        self._books = books
        self._capacity = books.pool.capacity
        self._once: OrderedDict[FrameId, None] = OrderedDict()
        self._again: OrderedDict[FrameId, None] = OrderedDict()
        self._ghosts_once: OrderedDict[BlockHash, None] = OrderedDict()
        self._ghosts_again: OrderedDict[BlockHash, None] = OrderedDict()
        self._target = 0.0
        """How long `_once` should be."""

    def on_insert(self, frame: FrameId) -> int:
        key, hits = self._books.hashes[frame], self._books.hits[frame]
        assert key is not None, "only a filed block is ranked"
        once, again = self._ghosts_once, self._ghosts_again
        if key in once:
            self._target = min(self._capacity, self._target + max(1.0, len(again) / len(once)))
            del once[key]
            hits = max(hits, 1)
        elif key in again:
            self._target = max(0.0, self._target - max(1.0, len(once) / len(again)))
            del again[key]
            hits = max(hits, 1)
        (self._again if hits else self._once)[frame] = None
        return hits

    def on_remove(self, frame: FrameId) -> None:
        (self._once if frame in self._once else self._again).pop(frame)

    def on_evict(self, frame: FrameId) -> None:
        key = self._books.hashes[frame]
        assert key is not None, "only a filed block is evicted"
        (self._ghosts_once if frame in self._once else self._ghosts_again)[key] = None
        self.on_remove(frame)
        while self._ghosts_once and len(self._once) + len(self._ghosts_once) > self._capacity:
            self._ghosts_once.popitem(last=False)
        while len(self) + len(self._ghosts_once) + len(self._ghosts_again) > 2 * self._capacity:
            self._ghosts_again.popitem(last=False)

    def victims(self) -> Iterator[FrameId]:
        return suffix_first(self._in_turn(), self._books)

    def _in_turn(self) -> Iterator[FrameId]:
        """What the first list has too much, the other, and the rest."""
        once = iter(self._once)
        yield from islice(once, max(0, len(self._once) - int(self._target)))
        yield from self._again
        yield from once

    def __len__(self) -> int:
        return len(self._once) + len(self._again)
