"""What a cache could reach on a trace at all: with room for everything, and with knowledge of the future.

And what an eviction policy does reach, in the production books of one tier, with nothing else in the way: no clock, no
queue, no second tier. Only whole blocks count, of the beginning of a prompt, as in the daemon.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from math import inf

from server.kvcache.manager import KVManager, Over, TierSpec
from server.kvcache.reuse import ReuseModel
from server.sim.foresight import Hindsight
from server.sim.replay import Asked
from server.types import DEVICE, BlockHash, BlockLayout


def chains(asked: Sequence[Asked], block_tokens: int) -> list[Sequence[int]]:
    """The whole blocks of every request."""
    return [one.blocks[: one.prompt_tokens // block_tokens] for one in asked]


def hashed(asked: Sequence[Asked], block_tokens: int) -> list[list[BlockHash]]:
    """The same as `by_policy` calls them."""
    return [[block.to_bytes(8, "little") for block in chain] for chain in chains(asked, block_tokens)]


def knowable(asked: Sequence[Asked], block_tokens: int, capacity: int) -> int:
    """Blocks found by the policy `learned` if it knew from the beginning how each class of blocks behaves on this
    trace, but of no block what becomes of it."""
    seen = ReuseModel()
    by_policy(asked, block_tokens, capacity, "learned", seen)
    return by_policy(asked, block_tokens, capacity, "learned", Hindsight(seen))


def infinite(asked: Sequence[Asked], block_tokens: int) -> int:
    """Blocks found when nothing is ever evicted."""
    seen: set[int] = set()
    hits = 0
    for chain in chains(asked, block_tokens):
        hits += next((n for n, block in enumerate(chain) if block not in seen), len(chain))
        seen.update(chain)
    return hits


def optimal(asked: Sequence[Asked], block_tokens: int, capacity: int) -> int:
    """Blocks found by Belady's rule: what is used furthest from now goes first, a newcomer too (Belady 1966).

    With prefixes the rule is suffix first by itself: whoever asks for a block asks for all before it, so a parent is
    never used later than its child; of two used at the same time the deeper goes.
    """
    uses: defaultdict[int, list[int]] = defaultdict(list)
    requests = chains(asked, block_tokens)
    for number, chain in enumerate(requests):
        for block in chain:
            uses[block].append(number)
    for times in uses.values():
        times.reverse()
    cached: dict[int, float] = {}
    heap: list[tuple[float, int, int]] = []
    hits = 0
    for chain in requests:
        hits += next((n for n, block in enumerate(chain) if block not in cached), len(chain))
        for depth, block in enumerate(chain):
            times = uses[block]
            times.pop()
            again = times[-1] if times else inf
            if again == inf:
                cached.pop(block, None)
                continue
            cached[block] = again
            heapq.heappush(heap, (-again, -depth, block))
            while len(cached) > capacity:
                worst, _, other = heapq.heappop(heap)
                if cached.get(other) == -worst:
                    del cached[other]
    return hits


def by_policy(
    asked: Sequence[Asked], block_tokens: int, capacity: int, eviction: str, reuse: ReuseModel | None = None
) -> int:
    """Blocks found by one tier of the KV manager with this eviction policy, if every request were over at once.
    `reuse`: what is known beforehand."""
    tiers = [TierSpec(DEVICE, capacity, eviction)]
    kv = KVManager(BlockLayout(1, 1, 1, 1, block_tokens), tiers, b"bounds", reuse=reuse)
    hits = 0
    for one, whole in zip(asked, hashed(asked, block_tokens), strict=True):
        hashes = whole[:capacity]
        kv.asked(hashes, one.at_s)
        lease = kv.admit(hashes, one.at_s)
        hits += len(lease.table)
        kv.grow(lease, len(hashes) * block_tokens)
        kv.seal(lease, hashes, len(hashes))
        kv.release(lease, over=Over(one.prompt_tokens, one.output_tokens))
    return hits
