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
from collections.abc import Iterator
from typing import TYPE_CHECKING

from server.registry import resolve
from server.types import FrameId

if TYPE_CHECKING:
    from server.kvcache.books import TierBooks

POLICIES = {
    "cost": "server.kvcache.policies.cost:CostAware",
    "learned": "server.kvcache.policies.learned:Learned",
    "lru": "server.kvcache.policies.lru:LRU",
    "s3fifo": "server.kvcache.policies.s3fifo:S3FIFO",
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
