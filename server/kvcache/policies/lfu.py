"""Least frequently used: what was found the fewest times since it came goes first, of equals the least recently used.

Suffix first: whoever finds a block finds its parent, so a parent has at least its child's hits, and it is inserted
later.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING

from server.kvcache.eviction import EvictionPolicy
from server.types import FrameId

if TYPE_CHECKING:
    from server.kvcache.books import TierBooks


class LFU(EvictionPolicy):
    def __init__(self, books: TierBooks) -> None:
        self._hits = books.hits
        self._of: dict[FrameId, int] = {}
        """Under how many hits each evictable frame is listed."""
        self._by_hits: dict[int, OrderedDict[FrameId, None]] = {}

    def on_insert(self, frame: FrameId) -> int:
        hits = self._of[frame] = self._hits[frame]
        self._by_hits.setdefault(hits, OrderedDict())[frame] = None
        return hits

    def on_remove(self, frame: FrameId) -> None:
        hits = self._of.pop(frame)
        del self._by_hits[hits][frame]
        if not self._by_hits[hits]:
            del self._by_hits[hits]

    on_evict = on_remove

    def victims(self) -> Iterator[FrameId]:
        for hits in sorted(self._by_hits):
            yield from self._by_hits[hits]

    def __len__(self) -> int:
        return len(self._of)
