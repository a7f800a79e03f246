"""Least recently used. Suffix first holds because a chain is released child before parent, so a parent is always the
more recently inserted of the two."""

from __future__ import annotations

from collections.abc import Iterator

from server.kvcache.block import Block


class LRU:
    def __init__(self) -> None:
        self._order: dict[Block, None] = {}

    def on_insert(self, block: Block, now: float) -> None:
        self._order[block] = None

    def on_remove(self, block: Block) -> None:
        del self._order[block]

    def victims(self) -> Iterator[Block]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)
