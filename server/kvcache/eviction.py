"""The eviction seam: in which order do the evictable blocks of one tier go?

A policy ranks; it moves no bytes and frees no frames. The books guarantee: `on_insert` when a block may go from now on
(ready, held by nobody), `on_remove` when it may not any more, `on_evict` when it goes for want of room; along a chain
the child's `on_insert` comes before its parent's; a parent has at least its child's `hits` and `reach`; and a parent is
inserted anew whenever a child of it was. The policy guarantees suffix first: `victims` yields no block before an
evictable block that hangs on it. The caller stops iterating before it changes anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from server.registry import resolve
from server.types import BlockHash

POLICIES = {
    "cost": "server.kvcache.policies.cost:CostAware",
    "lru": "server.kvcache.policies.lru:LRU",
    "s3fifo": "server.kvcache.policies.s3fifo:S3FIFO",
    "slru": "server.kvcache.policies.slru:SegmentedLRU",
}


class EvictionPolicy(Protocol):
    def on_insert(self, key: BlockHash, hits: int, reach: int) -> int:
        """`hits`: how often it was matched. `reach`: depth of the deepest block that ever rested on it. Returns the
        hits it counts as having, at least `hits`: a policy may remember it from before it was evicted."""
        ...

    def on_remove(self, key: BlockHash) -> None: ...
    def on_evict(self, key: BlockHash) -> None: ...
    def victims(self) -> Iterator[BlockHash]: ...
    def __len__(self) -> int: ...


def make_policy(name: str, capacity: int) -> EvictionPolicy:
    """A fresh policy for a tier of `capacity` frames, by its name in `POLICIES`; ConfigError names those there are."""
    policy: EvictionPolicy = resolve("eviction", POLICIES, name)(capacity)
    return policy
