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

from server.types import BlockHash

PROTECTED_SHARE = 0.8
"""Of the tier's frames at most this share may be protected."""


class SegmentedLRU:
    def __init__(self, capacity: int) -> None:
        self._protected_max = max(1, int(PROTECTED_SHARE * capacity))
        self._probation: OrderedDict[BlockHash, None] = OrderedDict()
        self._protected: OrderedDict[BlockHash, None] = OrderedDict()

    def on_insert(self, key: BlockHash, hits: int, reach: int) -> int:
        if hits:
            self._protected[key] = None
            if len(self._protected) > self._protected_max:
                self._probation[self._protected.popitem(last=False)[0]] = None
        else:
            self._probation[key] = None
        return hits

    def on_remove(self, key: BlockHash) -> None:
        if key in self._protected:
            del self._protected[key]
        else:
            del self._probation[key]

    on_evict = on_remove

    def victims(self) -> Iterator[BlockHash]:
        return chain(self._probation, self._protected)

    def __len__(self) -> int:
        return len(self._probation) + len(self._protected)
