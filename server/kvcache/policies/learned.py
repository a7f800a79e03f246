"""Hit density, learned: what brings the fewest hits for the room and the time it takes goes first.

`ReuseModel` knows the density of every class of blocks at every age. Blocks of one class and one bin of age are equal
and share a cell, oldest first; the cells are ordered by their densities, and as blocks age they move from cell to cell.
Only blocks on which nothing hangs are in cells, which is what makes it suffix first; the others wait for their turn. So
everything costs O(1) a block, but for sorting some hundred cells whenever the model has learned something.
"""

from __future__ import annotations

import heapq
from array import array
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING

from server.kvcache.eviction import EvictionPolicy
from server.kvcache.reuse import BINS, PENDING, class_of
from server.types import BlockHash, FrameId

if TYPE_CHECKING:
    from server.kvcache.books import TierBooks

UNRANKED, INNER = -1, -2
AGE_EVERY_S = 0.5
"""How often blocks move on to the cells of their age."""
MOVES_MAX = 2048
"""And how many at most each time: about a millisecond."""


class Learned(EvictionPolicy):
    def __init__(self, books: TierBooks) -> None:
        self._books = books
        self._reuse = books.reuse
        self._cells: dict[int, OrderedDict[FrameId, None]] = {}
        """By class * BINS + bin; frames on which nothing hangs."""
        self._cell_of = array("i", [UNRANKED]) * books.pool.capacity
        self._class = array("h", bytes(2 * books.pool.capacity))
        self._count = 0
        self._aged_s = 0.0
        self._order: list[int] = []
        self._ordered_for = -1
        self._ghosts: OrderedDict[BlockHash, int] = OrderedDict()
        """Hits of what was evicted, for about one turn of the tier."""

    def on_insert(self, frame: FrameId) -> int:
        books = self._books
        hits = books.hits[frame]
        if self._ghosts:
            key = books.hashes[frame]
            assert key is not None, "only a filed block is ranked"
            hits = max(hits, self._ghosts.pop(key, 0))
        self._class[frame] = class_of(hits, books.kind[frame])
        self._count += 1
        if books.kids[frame]:
            self._cell_of[frame] = INNER
        else:
            self._put(frame)
        return hits

    def _put(self, frame: FrameId) -> None:
        number = self._number(frame)
        cell = self._cells.get(number)
        if cell is None:
            cell = self._cells[number] = OrderedDict()
            self._ordered_for = -1
        cell[frame] = None
        self._cell_of[frame] = number

    def _number(self, frame: FrameId) -> int:
        books = self._books
        key = books.hashes[frame]
        assert key is not None, "only a filed block is ranked"
        cell = self._reuse.cell(key, self._class[frame], books.used_s[frame])
        return cell + PENDING if books.pending[frame] else cell

    def on_changed(self, frame: FrameId) -> None:
        number = self._cell_of[frame]
        if number != INNER:
            del self._cells[number][frame]
            self._put(frame)

    def on_remove(self, frame: FrameId) -> None:
        number, self._cell_of[frame] = self._cell_of[frame], UNRANKED
        self._count -= 1
        if number != INNER:
            del self._cells[number][frame]
        above = self._books.above[frame]
        if above >= 0 and self._cell_of[above] == INNER and not self._books.kids[above]:
            self._put(above)
            self._cells[self._cell_of[above]].move_to_end(above, last=False)

    def on_evict(self, frame: FrameId) -> None:
        key, hits = self._books.hashes[frame], self._books.hits[frame]
        assert key is not None, "only a filed block is evicted"
        self._ghosts[key] = hits + 1  # should it come back, that is one more use
        if len(self._ghosts) > self._books.pool.capacity:
            self._ghosts.popitem(last=False)
        self.on_remove(frame)

    def victims(self) -> Iterator[FrameId]:
        self._age()
        density = self._reuse.density
        left: dict[FrameId, int] = {}
        freed: list[tuple[float, FrameId]] = []
        for number in self._in_order():
            while freed and freed[0][0] <= density[number]:
                yield from self._chain(heapq.heappop(freed)[1], left, freed)
            for frame in self._cells[number]:
                yield from self._chain(frame, left, freed)
        while freed:
            yield from self._chain(heapq.heappop(freed)[1], left, freed)

    def _chain(self, frame: FrameId, left: dict[FrameId, int], freed: list[tuple[float, FrameId]]) -> Iterator[FrameId]:
        """This block, and those it hangs on that nothing else hangs on, as far as they are worth no more."""
        books, density = self._books, self._reuse.density
        worth = density[self._number(frame)]
        while True:
            yield frame
            above = books.above[frame]
            if above < 0 or self._cell_of[above] != INNER:
                return
            left[above] = left.get(above, books.kids[above]) - 1
            if left[above]:
                return
            above_worth = density[self._number(above)]
            if above_worth > worth:
                heapq.heappush(freed, (above_worth, above))
                return
            frame = above

    def _in_order(self) -> list[int]:
        if self._ordered_for != self._reuse.version:
            density = self._reuse.density
            for number in [number for number, cell in self._cells.items() if not cell]:
                del self._cells[number]
            # Of equals the older, and then the higher class, goes first: any fixed rule will do.
            self._order = sorted(self._cells, key=lambda number: (density[number], -(number % BINS), number))
            self._ordered_for = self._reuse.version
        return self._order

    def _age(self) -> None:
        now = self._reuse.now_s
        if now < self._aged_s + AGE_EVERY_S:
            return
        self._aged_s = now
        moves = 0
        for number in list(self._cells):
            cell = self._cells[number]
            while cell and moves < MOVES_MAX:
                frame = next(iter(cell))
                if self._number(frame) == number:
                    break
                del cell[frame]
                self._put(frame)
                moves += 1

    def __len__(self) -> int:
        return self._count
