"""The eviction seam: in which order do the evictable copies of one tier go?

A policy ranks; it moves no bytes and frees no frames. The manager guarantees: `on_insert` when a copy becomes evictable
(sealed, ready, not leased, not being read), `on_remove` when it stops being so or is gone, and along a chain the
child's `on_insert` comes before its parent's. The policy guarantees suffix first: `victims` yields no block before a
resident block that follows it. The caller stops iterating before it changes anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from server.registry import resolve
from server.types import BlockHash

POLICIES = {
    "lru": "server.kvcache.policies.lru:LRU",
    "slru": "server.kvcache.policies.slru:SegmentedLRU",
}


class EvictionPolicy(Protocol):
    def on_insert(self, key: BlockHash, now: float, hits: int, depth: int) -> None: ...
    def on_remove(self, key: BlockHash) -> None: ...
    def victims(self) -> Iterator[BlockHash]: ...
    def __len__(self) -> int: ...


def make_policy(name: str, capacity: int) -> EvictionPolicy:
    """A fresh policy by its name in `POLICIES`; ConfigError names the ones there are."""
    policy: EvictionPolicy = resolve("eviction", POLICIES, name)()
    return policy
