"""Least recently used. Suffix first holds because a chain is released child before parent, so a parent is always the
more recently inserted of the two."""

from __future__ import annotations

from collections.abc import Iterator

from server.types import BlockHash


class LRU:
    def __init__(self, capacity: int) -> None:
        self._order: dict[BlockHash, None] = {}

    def on_insert(self, key: BlockHash, now: float, hits: int, depth: int) -> None:
        self._order[key] = None

    def on_remove(self, key: BlockHash) -> None:
        del self._order[key]

    def victims(self) -> Iterator[BlockHash]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)
