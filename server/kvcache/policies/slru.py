"""Segmented LRU: blocks that were found again outlive blocks that were only ever written.

A one-off long prompt then cannot flush the system prompts that everybody shares. Suffix first holds: whoever finds a
block finds its parent too, so a parent has at least its child's hits and is never in a lower segment, and inside one
segment the argument of plain LRU applies. The protected segment is bounded, else yesterday's favourites never leave;
its oldest blocks fall back to the young end of probation, child before parent.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING

from server.kvcache.eviction import EvictionPolicy
from server.types import FrameId

if TYPE_CHECKING:
    from server.kvcache.books import TierBooks

PROTECTED_SHARE = 0.8
"""Of the tier's frames at most this share may be protected."""


class SegmentedLRU(EvictionPolicy):
    def __init__(self, books: TierBooks) -> None:
        self._hits = books.hits
        self._protected_max = max(1, int(PROTECTED_SHARE * books.pool.capacity))
        self._probation: OrderedDict[FrameId, None] = OrderedDict()
        self._protected: OrderedDict[FrameId, None] = OrderedDict()

    def on_insert(self, frame: FrameId) -> int:
        if self._hits[frame]:
            self._protected[frame] = None
            if len(self._protected) > self._protected_max:
                self._probation[self._protected.popitem(last=False)[0]] = None
        else:
            self._probation[frame] = None
        return self._hits[frame]

    def on_remove(self, frame: FrameId) -> None:
        if frame in self._protected:
            del self._protected[frame]
        else:
            del self._probation[frame]

    on_evict = on_remove

    def victims(self) -> Iterator[FrameId]:
        return chain(self._probation, self._protected)

    def __len__(self) -> int:
        return len(self._probation) + len(self._protected)
