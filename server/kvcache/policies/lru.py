"""Least recently used. Suffix first holds because a chain is released child before parent, so a parent is always the
more recently inserted of the two."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING

from server.kvcache.eviction import EvictionPolicy
from server.types import FrameId

if TYPE_CHECKING:
    from server.kvcache.books import TierBooks


class LRU(EvictionPolicy):
    def __init__(self, books: TierBooks) -> None:
        self._hits = books.hits
        self._order: OrderedDict[FrameId, None] = OrderedDict()  # a dict finds its first key in O(deleted)

    def on_insert(self, frame: FrameId) -> int:
        self._order[frame] = None
        return self._hits[frame]

    def on_remove(self, frame: FrameId) -> None:
        del self._order[frame]

    on_evict = on_remove

    def victims(self) -> Iterator[FrameId]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)
