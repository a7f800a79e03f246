"""The cache as an operator sees it: plain numbers, read off the books in O(tiers). Loop thread; changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby

from server.kvcache.books import TierBooks
from server.kvcache.manager import KVManager
from server.kvcache.planner import Hop
from server.types import BlockHash, HopReport, KvReport, SpanReport, TierName, TierReport


def kv_report(kv: KVManager) -> KvReport:
    """Every tier and every hop, as of now."""
    hops = []
    for k, queue in enumerate(kv.traffic.hops):
        above, below = kv.levels[k].name, kv.levels[k + 1].name
        hops.append(_hop(below, above, kv.planner.up[k], len(queue.urgent) + len(queue.early)))
        hops.append(_hop(above, below, kv.planner.down[k], len(queue.spills)))
    return KvReport(
        block_bytes=kv.layout.block_bytes,
        block_tokens=kv.layout.block_tokens,
        tiers=[_tier(kv, level, books) for level, books in enumerate(kv.levels)],
        hops=hops,
        admissions={books.name: hop.outcomes for books, hop in zip(kv.levels[1:], kv.traffic.hops, strict=True)},
        recovered_blocks=kv.recovered_blocks,
        pinned_blocks=kv.pinned_blocks,
        owned=_owned(kv),
        prefetched=_prefetched(kv),
    )


def _prefetched(kv: KVManager) -> dict[str, int]:
    found: Counter[str] = Counter()
    for counts in (kv.traffic.prefetched, *(books.lives.prefetched for books in kv.levels)):
        found.update(counts)
    return found


def _owned(kv: KVManager) -> dict[str, dict[TierName, int]]:
    counts = {books.name: books.shares.owned for books in kv.levels if books.shares is not None}
    return {
        tenant: {tier: owned[number] for tier, owned in counts.items()}
        for number, tenant in enumerate(kv.owners.tenants)
        if number and counts
    }


def explain(kv: KVManager, hashes: Sequence[BlockHash], now: float) -> list[SpanReport]:
    """What a request for this chain would do now, span by span, and why. Changes nothing, sends for nothing."""
    levels: list[int | None] = [kv.traffic.level_of(value) for value in hashes]
    spans: list[SpanReport] = []
    lost = ""
    for level, group in groupby(levels):
        blocks = len(list(group))
        spans.append(_span(kv, level, sum(span.blocks for span in spans), blocks, lost, now))
        if spans[-1].decision == "compute":
            lost = lost or "the blocks before it are computed"
    return spans


def _span(kv: KVManager, level: int | None, start: int, blocks: int, lost: str, now: float) -> SpanReport:
    compute_s = kv.planner.compute_s(start, blocks)
    if level is None:
        return SpanReport(None, blocks, "compute", "not cached", 0.0, compute_s)
    name, queued = kv.levels[level].name, kv.traffic.queued()
    if lost or level == 0:
        return SpanReport(name, blocks, "compute" if lost else "use", lost or "on the device", 0.0, compute_s)
    load_s = kv.planner.load_s(level, blocks, queued)
    breaker = kv.planner.breakers[name]
    if not breaker.closed and now < breaker.until_s:
        return SpanReport(name, blocks, "compute", "the tier is switched off", load_s, compute_s)
    if not kv.planner.worth(level, start, blocks, queued, 0.0):
        return SpanReport(name, blocks, "compute", "loading would be slower", load_s, compute_s)
    front = kv.planner.front(level, start, blocks, queued, 0.0)
    if 0 < front < blocks:
        reason = f"{front} blocks are computed while the others are loaded"
        return SpanReport(name, blocks, "split", reason, load_s, compute_s)
    return SpanReport(name, blocks, "load", "loading is faster", load_s, compute_s)


def _tier(kv: KVManager, level: int, books: TierBooks) -> TierReport:
    breaker = kv.planner.breakers.get(books.name)
    arriving = kv.planner.up[level].in_flight if level < len(kv.planner.up) else 0
    arriving += kv.planner.down[level - 1].in_flight if level else 0
    cached, free = len(books.policy), books.pool.free + books.pool.unusable()
    capacity = books.pool.capacity
    return TierReport(
        name=books.name,
        up=breaker is None or breaker.closed,
        capacity_blocks=capacity,
        free_blocks=free,
        cached_blocks=cached,
        referenced_blocks=max(0, capacity - free - cached - arriving),
        in_flight_blocks=arriving,
        evicted=dict(books.evicted),
        declined={reason: count for (name, reason), count in kv.declined.items() if name == books.name},
        breaker_opened=breaker.opened if breaker else 0,
        life=books.lives.life,
    )


def _hop(source: str, target: str, hop: Hop, waiting: int) -> HopReport:
    return HopReport(
        source, target, hop.moved_blocks, hop.in_flight, waiting, hop.busy_s, hop.block_s, dict(hop.failed),
        hop.duration_s,
    )  # fmt: skip
