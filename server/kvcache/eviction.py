"""The eviction seam: in which order do the evictable blocks of one tier go?

A policy ranks block hashes; it moves no bytes, frees no frames and does not know who follows whom. What it may rely on:

- `on_insert` when a block becomes evictable, `on_remove` when somebody holds it again (that is how a use shows: it comes
  back with more hits) or when it is gone (then it comes back, if ever, as a new block with no hits);
- of a block and the one it follows, both evictable, the follower was inserted first, is deeper and has no more hits.
  Whenever a block is used, what it follows is too, and is inserted after it.

What it promises is suffix first: `victims` yields no block before an evictable block that follows it. So a rank may
only rise with the time of insertion, rise with hits and fall with depth: each policy says why its own does.
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
    """Made as `Policy(capacity)`, in frames of the tier. Loop thread only; O(1) or O(log n) per call, memory O(capacity)."""

    def on_insert(self, key: BlockHash, now: float, hits: int, depth: int) -> None:
        """`key`, not ranked until now, may go. `hits`: matches so far; `depth`: blocks before it in its chain."""
        ...

    def on_remove(self, key: BlockHash) -> None:
        """`key`, ranked until now, is held again or gone."""
        ...

    def victims(self) -> Iterator[BlockHash]:
        """All ranked keys, the first to go first. The caller stops iterating before it changes anything."""
        ...

    def __len__(self) -> int: ...


def make_policy(name: str, capacity: int) -> EvictionPolicy:
    """A fresh policy for a tier of `capacity` frames by its name in `POLICIES`; ConfigError names the ones there are."""
    policy: EvictionPolicy = resolve("eviction", POLICIES, name)(capacity)
    return policy
