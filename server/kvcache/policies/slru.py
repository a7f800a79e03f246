"""Segmented LRU: blocks that were found again outlive blocks that were only ever written.

A one-off long prompt then cannot flush the system prompts that everybody shares. Suffix first holds: whoever finds a
block finds its parent too, so a parent has at least its child's hits and is never in a lower segment, and inside one
segment the argument of plain LRU applies. The protected segment is bounded, else yesterday's favourites never leave;
its oldest blocks fall back to the young end of probation, child before parent.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from server.types import BlockHash

PROTECTED_SHARE = 0.8
"""Of the evictable blocks at most this share may be protected."""


class SegmentedLRU:
    def __init__(self, capacity: int) -> None:
        self._probation: dict[BlockHash, None] = {}
        self._protected: dict[BlockHash, None] = {}

    def on_insert(self, key: BlockHash, now: float, hits: int, depth: int) -> None:
        if hits:
            self._protected[key] = None
            self._shrink()
        else:
            self._probation[key] = None

    def on_remove(self, key: BlockHash) -> None:
        if key in self._protected:
            del self._protected[key]
        else:
            del self._probation[key]

    def victims(self) -> Iterator[BlockHash]:
        return chain(self._probation, self._protected)

    def __len__(self) -> int:
        return len(self._probation) + len(self._protected)

    def _shrink(self) -> None:
        while len(self._protected) > max(1, PROTECTED_SHARE * len(self)):
            oldest = next(iter(self._protected))
            del self._protected[oldest]
            self._probation[oldest] = None
