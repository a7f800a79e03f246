"""Cost-aware: keep what would be dearest to compute again (GreedyDual-Size-Frequency, Cherkasova 1998, for chains).

A block's worth is (1 + hits) times what is lost with it. All blocks have the same size, but losing one makes everything
behind it useless, and the attention of a block costs more the deeper it lies; so the loss grows with `reach`, the depth
of the deepest block that rests on it. Priority is worth plus a clock, which is the priority of the last block evicted:
what was worth much and is never used again is overtaken. A parent has at least its child's hits and reach and is
inserted at the same or a later clock, hence suffix first.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from server.types import BlockHash

DEPTH_DOUBLES = 256
"""Blocks of depth at which the loss has doubled: about where attention costs as much as the rest of a small model."""


class CostAware:
    def __init__(self, capacity: int) -> None:
        """`capacity` decides nothing here."""
        self._entries: dict[BlockHash, tuple[float, int]] = {}
        self._heap: list[tuple[float, int, BlockHash]] = []
        self._clock = 0.0
        self._sequence = 0

    def on_insert(self, key: BlockHash, hits: int, reach: int) -> int:
        self._sequence += 1
        priority = self._clock + (1 + hits) * (1 + reach / DEPTH_DOUBLES)
        self._entries[key] = (priority, self._sequence)
        heapq.heappush(self._heap, (priority, self._sequence, key))
        return hits

    def on_evict(self, key: BlockHash) -> None:
        self._clock = self._entries[key][0]
        self.on_remove(key)

    def on_remove(self, key: BlockHash) -> None:
        del self._entries[key]
        if len(self._heap) > 2 * len(self._entries) + 64:
            self._heap = [(priority, number, key) for key, (priority, number) in self._entries.items()]
            heapq.heapify(self._heap)

    def victims(self) -> Iterator[BlockHash]:
        taken = []
        try:
            while self._heap:
                priority, sequence, key = heapq.heappop(self._heap)
                if self._entries.get(key) == (priority, sequence):
                    taken.append((priority, sequence, key))
                    yield key
        finally:
            for entry in taken:
                heapq.heappush(self._heap, entry)

    def __len__(self) -> int:
        return len(self._entries)
