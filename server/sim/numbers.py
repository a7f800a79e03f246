"""What must hold between the numbers of a daemon that did its work and is quiet: a scrape that contradicts itself is
worse than none."""

from __future__ import annotations

from math import isclose

from server.histogram import Histogram
from server.metrics.families import FAMILIES
from server.metrics.page import Page

SLACK_S = 1e-6
"""What rounding may add up to."""


def contradictions(page: Page, targeted: int) -> list[str]:
    """Everything on `page` that cannot be. `targeted`: online requests with a target that were taken, all ended."""
    slo = page.value("slo_requests_total", "all", "good") + page.value("slo_requests_total", "all", "bad")
    looked_up, ended = page.value("kv_lookup_tokens_total"), page.sum("requests_finished_total")
    phases_s = sum(histogram.total for _, histogram in page.rows("request_phase_seconds"))
    e2e = page.value("e2e_request_latency_seconds")
    facts = {
        "prompt tokens by source are all": page.sum("prompt_tokens_by_source_total")
        == page.value("prompt_tokens_total"),
        "hits and misses are what was looked up": page.sum("kv_hit_tokens_total") + page.sum("kv_miss_tokens_total")
        == looked_up,
        "no more is looked up than asked": looked_up <= page.value("prompt_tokens_total"),
        "good and bad are those with a target": slo == targeted,
        "every request that ended has its length": sum(e2e.counts) == ended,
        "phases sum to the whole": isclose(phases_s, e2e.total, rel_tol=1e-9, abs_tol=SLACK_S),
        "nobody is held up for longer than requests were": page.sum("kv_restore_cost_seconds_total")
        <= e2e.total + SLACK_S,
    }
    found = [fact for fact, holds in facts.items() if not holds]
    return found + _below_zero(page) + _apart(page)


def _below_zero(page: Page) -> list[str]:
    """Numbers that went the wrong way; nothing that we count is ever negative."""
    values = (
        (name, labels, value.total if isinstance(value, Histogram) else value)
        for name in FAMILIES
        for labels, value in page.rows(name)
    )
    return [f"{name}{labels} is {value}" for name, labels, value in values if value < -SLACK_S]


def _apart(page: Page) -> list[str]:
    """Counts of the same things that differ."""
    found = []
    size = page.sum("kv_capacity_bytes") / page.sum("kv_blocks") if page.sum("kv_blocks") else 0
    for labels, durations in page.rows("kv_transfer_duration_seconds"):
        if sum(durations.counts) * size != page.value("kv_transfer_bytes_total", *labels):
            found.append(f"not every transfer from {' to '.join(labels)} has its duration")
    for (tier,), ages in page.rows("kv_eviction_age_seconds"):
        if sum(ages.counts) > page.value("kv_evicted_blocks_total", tier, "capacity"):
            found.append(f"more ages than evictions in {tier}")
    return found
