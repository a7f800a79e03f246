"""S3-FIFO (Yang et al., SOSP 2023), for chains: a small queue for newcomers, a main one for those used again, a ghost.

Most blocks of real traffic are never asked for again: they pass through the small queue, a tenth of the tier, and leave
without having displaced anything. A block that was matched goes to the main queue; so does one that comes back while
its hash is still in the ghost list of what lately left the small queue. Unlike the original, a block that is used again
goes to the end of its queue at once, as what follows it may be new there.

Suffix first: the main queue gives a block away only if it was inserted before all that is in the small queue, so no
child of it can be there, as children are inserted before their parents. A block in the main queue has hits, its own or
one for coming back, so its parent has too and is there as well. Inside one queue the argument of LRU applies.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING

from server.kvcache.eviction import EvictionPolicy
from server.types import BlockHash, FrameId

if TYPE_CHECKING:
    from server.kvcache.books import TierBooks

SMALL_SHARE = 0.1
"""Of the tier's frames, the share that newcomers keep while there is anything else to evict."""


class S3FIFO(EvictionPolicy):
    def __init__(self, books: TierBooks) -> None:
        self._books = books
        self._small_max = max(1, int(SMALL_SHARE * books.pool.capacity))
        self._ghosts_max = books.pool.capacity
        self._small: OrderedDict[FrameId, int] = OrderedDict()
        self._main: OrderedDict[FrameId, int] = OrderedDict()
        self._ghosts: OrderedDict[BlockHash, None] = OrderedDict()
        self._sequence = 0

    def on_insert(self, frame: FrameId) -> int:
        self._sequence += 1
        key, hits = self._books.hashes[frame], self._books.hits[frame]
        assert key is not None, "only a filed block is ranked"
        if key in self._ghosts:
            del self._ghosts[key]
            hits = max(hits, 1)
        (self._main if hits else self._small)[frame] = self._sequence
        return hits

    def on_remove(self, frame: FrameId) -> None:
        (self._main if frame in self._main else self._small).pop(frame)

    def on_evict(self, frame: FrameId) -> None:
        if self._main.pop(frame, None) is not None:
            return
        del self._small[frame]
        key = self._books.hashes[frame]
        assert key is not None, "only a filed block is evicted"
        self._ghosts[key] = None
        if len(self._ghosts) > self._ghosts_max:
            self._ghosts.popitem(last=False)

    def victims(self) -> Iterator[FrameId]:
        small, main = iter(self._small.items()), iter(self._main.items())
        left = len(self._small)
        newcomer, old = next(small, None), next(main, None)
        while newcomer or old:
            if newcomer and (old is None or left > self._small_max or old[1] > newcomer[1]):
                yield newcomer[0]
                left -= 1
                newcomer = next(small, None)
            elif old:
                yield old[0]
                old = next(main, None)

    def __len__(self) -> int:
        return len(self._small) + len(self._main)
