"""What only grows, copied from the metrics at one moment, and what happened between two such moments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

from server.histogram import Histogram
from server.metrics.page import Page, merged

K = TypeVar("K")
Hop = tuple[str, str]
"""Source and target tier."""


@dataclass(frozen=True, slots=True)
class Counters:
    """Since the start of the process; `at_s` on the monotonic clock. Also the difference of two, over `at_s` seconds.

    `sources`: prompt tokens by what provided them. `saved_s`, `cost_s` by tier: computing that its hits made
    unnecessary, and waiting for its loads. `unwritten`: blocks that the write budget kept from the SSD. `faults`: moves
    that failed and blocks that did not verify.
    """

    at_s: float
    sources: Mapping[str, float]
    generated: float
    finished: Mapping[str, float]
    rejected: Mapping[str, float]
    saved_s: Mapping[str, float]
    cost_s: Mapping[str, float]
    moved_bytes: Mapping[Hop, float]
    stalled_s: Mapping[str, float]
    written_bytes: float
    unwritten: float
    faults: Mapping[str, float]
    ttft_s: Histogram
    tpot_s: Histogram

    def since(self, before: Counters) -> Counters:
        """What happened after `before`."""
        return Counters(
            at_s=self.at_s - before.at_s,
            sources=_minus(self.sources, before.sources),
            generated=self.generated - before.generated,
            finished=_minus(self.finished, before.finished),
            rejected=_minus(self.rejected, before.rejected),
            saved_s=_minus(self.saved_s, before.saved_s),
            cost_s=_minus(self.cost_s, before.cost_s),
            moved_bytes=_minus(self.moved_bytes, before.moved_bytes),
            stalled_s=_minus(self.stalled_s, before.stalled_s),
            written_bytes=self.written_bytes - before.written_bytes,
            unwritten=self.unwritten - before.unwritten,
            faults=_minus(self.faults, before.faults),
            ttft_s=_without(self.ttft_s, before.ttft_s),
            tpot_s=_without(self.tpot_s, before.tpot_s),
        )

    def per_s(self, amount: float) -> float:
        """An amount of this difference as a rate."""
        return amount / self.at_s if self.at_s > 0 else 0.0

    def net_s(self, tier: str) -> float:
        """Seconds that a tier saved, less those that it cost."""
        return self.saved_s.get(tier, 0.0) - self.cost_s.get(tier, 0.0)


def counters_of(page: Page, now_s: float) -> Counters:
    """Everything that the live page shows of what only grows."""
    return Counters(
        at_s=now_s,
        sources=_by_last(page, "prompt_tokens_by_source_total"),
        generated=page.value("generation_tokens_total"),
        finished=_by_last(page, "requests_finished_total"),
        rejected=_by_last(page, "admission_rejections_total"),
        saved_s=_by_last(page, "kv_recompute_avoided_seconds_total"),
        cost_s=_by_last(page, "kv_restore_cost_seconds_total"),
        moved_bytes={(hop[0], hop[1]): count for hop, count in page.rows("kv_transfer_bytes_total")},
        stalled_s=_by_last(page, "engine_stall_seconds_total"),
        written_bytes=page.value("ssd_written_bytes_total"),
        unwritten=page.value("kv_admission_total", "ssd", "reject_wear"),
        faults={
            "moves": page.sum("kv_transfer_failures_total"),
            "blocks": page.sum("kv_integrity_failures_total"),
        },
        ttft_s=merged(value for _, value in page.rows("time_to_first_token_seconds")),
        tpot_s=page.rows("request_time_per_output_token_seconds")[0][1],
    )


def quantile(histogram: Histogram, share: float) -> float | None:
    """The value that `share` of all are at most, straight lines inside buckets as Prometheus has them; None of none.

    What is above all edges counts as the highest edge.
    """
    counts = list(accumulate(histogram.counts))
    if counts[-1] <= 0:
        return None
    wanted = share * counts[-1]
    place = next(i for i, count in enumerate(counts) if count >= wanted and count > 0)
    edges: Sequence[float] = histogram.bounds
    if place == len(edges):
        return edges[-1]
    below, start = (counts[place - 1], edges[place - 1]) if place else (0, 0.0)
    return start + (edges[place] - start) * (wanted - below) / max(1, counts[place] - below)


def _by_last(page: Page, name: str) -> dict[str, float]:
    return {labels[-1]: value for labels, value in page.rows(name)}


def _minus(now: Mapping[K, float], before: Mapping[K, float]) -> dict[K, float]:
    return {key: value - before.get(key, 0) for key, value in now.items()}


def _without(now: Histogram, before: Histogram) -> Histogram:
    rest = now.copy()
    rest.counts = [a - b for a, b in zip(now.counts, before.counts, strict=True)]
    rest.total = now.total - before.total
    return rest
