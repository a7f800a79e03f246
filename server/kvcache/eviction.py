"""The eviction seam: in which order do the evictable blocks of one tier go?

A policy ranks frames; it moves no bytes and frees nothing. It reads the columns of its tier's books and changes none.
The books guarantee: `on_insert` when the block in a frame may go from now on (ready, held by nobody), `on_remove` when
it may not any more, `on_evict` when it goes for want of room; along a chain the child's `on_insert` comes before its
parent's; a parent has at least its child's `hits` and `reach`; a parent is inserted anew whenever a child of it was;
and `kids` is right when any of these is called. The policy guarantees suffix first: `victims` yields no block before an
evictable block that hangs on it. The caller stops iterating before it changes anything.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from server.registry import resolve
from server.types import FrameId

if TYPE_CHECKING:
    from server.kvcache.books import TierBooks

POLICIES = {
    "arc": "server.kvcache.policies.arc:ARC",
    "cost": "server.kvcache.policies.cost:CostAware",
    "fifo": "server.kvcache.policies.fifo:FIFO",
    "learned": "server.kvcache.policies.learned:Learned",
    "lfu": "server.kvcache.policies.lfu:LFU",
    "lru": "server.kvcache.policies.lru:LRU",
    "s3fifo": "server.kvcache.policies.s3fifo:S3FIFO",
    "sieve": "server.kvcache.policies.sieve:SIEVE",
    "slru": "server.kvcache.policies.slru:SegmentedLRU",
}


class EvictionPolicy(ABC):
    @abstractmethod
    def on_insert(self, frame: FrameId) -> int:
        """Returns the hits that the block counts as having, at least those in the books: a policy may remember it from
        before it was evicted."""

    @abstractmethod
    def on_remove(self, frame: FrameId) -> None: ...
    @abstractmethod
    def on_evict(self, frame: FrameId) -> None: ...
    @abstractmethod
    def victims(self) -> Iterator[FrameId]: ...
    @abstractmethod
    def __len__(self) -> int: ...

    def on_changed(self, frame: FrameId) -> None:  # noqa: B027 - most policies look back only
        """A waiting request will ask for the chain that ends, in this tier, with this ranked block; or it is, or is not
        any more, about to be copied to the tier below."""


def make_policy(name: str, books: TierBooks) -> EvictionPolicy:
    """A fresh policy for the tier of these books, by its name in `POLICIES`; ConfigError names those there are."""
    policy: EvictionPolicy = resolve("eviction", POLICIES, name)(books)
    return policy


def suffix_first(frames: Iterable[FrameId], books: TierBooks) -> Iterator[FrameId]:
    """The evictable `frames` in their order, but each only after all that hangs on it: right behind the last of that,
    if its own turn has passed by then."""
    left: dict[FrameId, int] = {}
    passed: set[FrameId] = set()
    for frame in frames:
        if left.get(frame, books.kids[frame]):
            passed.add(frame)
            continue
        while True:
            yield frame
            above = books.above[frame]
            if above < 0:
                break
            left[above] = left.get(above, books.kids[above]) - 1
            if left[above] or above not in passed:
                break
            frame = above
