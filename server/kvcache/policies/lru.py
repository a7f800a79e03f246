"""Least recently used. Suffix first holds because a chain is released child before parent, so a parent is always the
more recently inserted of the two."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from server.types import BlockHash


class LRU:
    def __init__(self, capacity: int) -> None:
        """`capacity` decides nothing here."""
        self._order: OrderedDict[BlockHash, None] = OrderedDict()  # a dict finds its first key in O(deleted)

    def on_insert(self, key: BlockHash, hits: int, reach: int) -> int:
        self._order[key] = None
        return hits

    def on_remove(self, key: BlockHash) -> None:
        del self._order[key]

    on_evict = on_remove

    def victims(self) -> Iterator[BlockHash]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)
