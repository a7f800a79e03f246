"""SIEVE (Zhang et al., NSDI 2024): blocks in order of arrival, a mark on those that were found, and a hand.

The hand goes from the oldest block to the newest, then begins anew. It takes the mark off those that have one and
evicts those that have none. What it has passed waits in `_passed` for its next round.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING

from server.kvcache.eviction import EvictionPolicy, suffix_first
from server.kvcache.shares import RANKED
from server.types import BlockHash, FrameId

if TYPE_CHECKING:
    from server.kvcache.books import TierBooks

Line = OrderedDict[FrameId, BlockHash | None]


class SIEVE(EvictionPolicy):
    def __init__(self, books: TierBooks) -> None:
        self._books = books
        self._ahead: Line = OrderedDict()
        """From the hand to the newest, also those that may not go at present."""
        self._passed: Line = OrderedDict()
        """From the oldest to the hand."""
        self._marked: set[FrameId] = set()
        self._hits = array("i", bytes(4 * books.pool.capacity))
        """As often had each block been found when it was ranked last."""
        self._count = 0

    def on_insert(self, frame: FrameId) -> int:
        key, hits = self._books.hashes[frame], self._books.hits[frame]
        self._count += 1
        before, self._hits[frame] = self._hits[frame], hits
        if key in (self._ahead.get(frame), self._passed.get(frame)):
            if hits > before:  # else somebody else held it for a while, such as a transfer
                self._marked.add(frame)
            return hits
        self._passed.pop(frame, None)
        self._ahead[frame] = key
        self._ahead.move_to_end(frame)
        self._marked.discard(frame)
        return hits

    def on_remove(self, frame: FrameId) -> None:
        self._count -= 1

    def on_evict(self, frame: FrameId) -> None:
        """The hand moves to `frame`, if it stood before it, and that goes."""
        self._count -= 1
        if frame not in self._ahead and frame in self._marked:
            self._ahead, self._passed = self._passed, self._ahead
            self._marked.difference_update(self._passed)
        while frame in self._ahead:
            first, key = self._ahead.popitem(last=False)
            self._passed[first] = key
            self._marked.discard(first)
        del self._passed[frame]

    def victims(self) -> Iterator[FrameId]:
        ranked, marked = self._books.ranked, self._marked
        everyone = [frame for frame in chain(self._ahead, self._passed) if ranked[frame] == RANKED]
        unmarked = (frame for frame in everyone if frame not in marked)
        return suffix_first(chain(unmarked, (frame for frame in everyone if frame in marked)), self._books)

    def __len__(self) -> int:
        return self._count
