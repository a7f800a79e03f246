"""First in, first out: a block goes when it came before all others, however often it was used since."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING

from server.kvcache.eviction import EvictionPolicy, suffix_first
from server.kvcache.shares import RANKED
from server.types import BlockHash, FrameId

if TYPE_CHECKING:
    from server.kvcache.books import TierBooks


class FIFO(EvictionPolicy):
    def __init__(self, books: TierBooks) -> None:
        self._books = books
        self._came: OrderedDict[FrameId, BlockHash | None] = OrderedDict()
        """In order of arrival, also those that may not go at present."""
        self._count = 0

    def on_insert(self, frame: FrameId) -> int:
        key = self._books.hashes[frame]
        if self._came.get(frame) != key:
            self._came[frame] = key
            self._came.move_to_end(frame)
        self._count += 1
        return self._books.hits[frame]

    def on_remove(self, frame: FrameId) -> None:
        self._count -= 1

    def on_evict(self, frame: FrameId) -> None:
        del self._came[frame]
        self._count -= 1

    def victims(self) -> Iterator[FrameId]:
        ranked = self._books.ranked
        return suffix_first((frame for frame in self._came if ranked[frame] == RANKED), self._books)

    def __len__(self) -> int:
        return self._count
