"""The same numbers under vLLM's names, for boards, routers and load generators that know only those.

Tiers are called device, host and disk there. Whoever waits for blocks is waiting, as with vLLM. Buckets are vLLM's; the
histograms have both its edges and ours. What has no counterpart here is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from server.metrics.families import FINISH_REASONS, OPEN, REJECTIONS, Family
from server.metrics.page import Page, Rows, Series, merged

PREFIX = "vllm:"
NAMES = {"device": "device", "dram": "host", "ssd": "disk"}
"""What vLLM calls a tier that KV came from."""
SOURCES = ("local_compute", "local_cache_hit", "external_kv_transfer")
_LONG_S = (5, 7.5, 10, 20, 40, 80)
BOUNDS: Mapping[str, tuple[float, ...]] = {
    "ttft": (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, *_LONG_S, 160, 640, 2560),
    "token": (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, *_LONG_S),
    "request": (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680),
}
"""Upper edges of vLLM's buckets; of all other histograms they are ours."""

View = tuple[Family, Callable[[Page], Rows]]


def text(page: Page, series: Series, edges: Mapping[str, Sequence[float]]) -> str:
    """All of it. `edges` of those histograms that have ours."""
    return "".join(
        series.write(
            PREFIX + family.name, family, rows(page), BOUNDS.get(family.buckets) or edges.get(family.buckets, ())
        )
        for family, rows in VIEWS
    )


def _number(kind: str, name: str, text: str, value: Callable[[Page], float]) -> View:
    return _family(kind, name, text), lambda page: [((), value(page))]


def _family(kind: str, name: str, text: str, buckets: str = "", **labels: tuple[str, ...]) -> Family:
    assert kind in ("counter", "gauge", "histogram"), f"there is no {kind}"
    return Family(name, kind, "", text, labels, buckets)  # type: ignore[arg-type]


def _histogram(name: str, buckets: str, text: str, ours: str, *labels: str) -> View:
    """All children of our family `ours`, or the one with these labels."""

    def rows(page: Page) -> Rows:
        return [((), merged(value for found, value in page.rows(ours) if found == labels or not labels))]

    return _family("histogram", name, text, buckets), rows


def _hits(page: Page, *tiers: str) -> float:
    return sum(page.value("kv_hit_tokens_total", tier) for tier in tiers)


def _waiting(page: Page) -> Rows:
    capacity = page.value("requests_waiting", "capacity")
    return [(("capacity",), capacity), (("deferred",), page.sum("requests_waiting") - capacity)]


def _sources(page: Page) -> Rows:
    computed = page.value("prompt_tokens_by_source_total", "computed")
    counts = computed, _hits(page, "device"), _hits(page, "dram", "ssd")
    return [((source,), count) for source, count in zip(SOURCES, counts, strict=True)]


def _cached(page: Page) -> Rows:
    return [((NAMES[tier],), value) for (tier,), value in page.rows("kv_hit_tokens_total")]


def _config(page: Page) -> Rows:
    blocks = {tier: str(int(sum(n for (name, _), n in page.rows("kv_blocks") if name == tier))) for tier in NAMES}
    return [
        ((size, count, blocks["dram"], dtype), value)
        for (size, count, dtype, _), value in page.rows("cache_config_info")
    ]


def _requests() -> Iterator[View]:
    yield _number("gauge", "num_requests_running", "Requests in steps.", lambda page: page.value("requests_running"))
    yield _number("gauge", "num_requests_waiting", "Requests that wait.", lambda page: page.sum("requests_waiting"))
    reasons = _family("gauge", "num_requests_waiting_by_reason", "The same by reason.", reason=("capacity", "deferred"))
    yield reasons, _waiting
    success = _family("counter", "request_success_total", "Requests that ended.", finished_reason=FINISH_REASONS)
    yield success, lambda page: page.rows("requests_finished_total")
    refused = _family("counter", "admission_rejections_total", "Requests refused.", reason=REJECTIONS)
    yield refused, lambda page: page.rows("admission_rejections_total")
    yield _number("counter", "num_preemptions_total", "Preemptions.", lambda page: page.sum("preemptions_total"))


def _cache() -> Iterator[View]:
    yield _number("gauge", "kv_cache_usage_perc", "Share of device blocks in use, 0 to 1.",
                  lambda page: page.value("kv_cache_usage_ratio"))  # fmt: skip
    info = _family("gauge", "cache_config_info", "Shape of the cache.",
                   block_size=OPEN, num_gpu_blocks=OPEN, num_cpu_blocks=OPEN, cache_dtype=OPEN)  # fmt: skip
    yield info, _config
    lookups = "kv_lookup_tokens_total"
    yield _number("counter", "prefix_cache_queries_total", "Prompt tokens looked up.", lambda page: page.value(lookups))
    yield _number("counter", "prefix_cache_hits_total", "Of them on the device.", lambda page: _hits(page, "device"))
    yield _number("counter", "external_prefix_cache_queries_total", "Prompt tokens looked up below the device.",
                  lambda page: page.value(lookups) - _hits(page, "device"))  # fmt: skip
    yield _number("counter", "external_prefix_cache_hits_total", "Of them in DRAM or on SSD.",
                  lambda page: _hits(page, "dram", "ssd"))  # fmt: skip


def _tokens() -> Iterator[View]:
    for name in ("prompt_tokens_total", "generation_tokens_total"):
        yield _number("counter", name, "Tokens.", lambda page, name=name: page.value(name))  # type: ignore[misc]
    yield _family("counter", "prompt_tokens_by_source_total", "Prompt tokens by source.", source=SOURCES), _sources
    yield _number("counter", "prompt_tokens_cached_total", "Prompt tokens that were cached.",
                  lambda page: _hits(page, *NAMES))  # fmt: skip
    cached = "Prompt tokens that were cached, by where."
    names = tuple(NAMES.values())
    yield _family("counter", "prompt_tokens_cached_by_source_total", cached, source=names), _cached


def _latencies() -> Iterator[View]:
    yield _histogram("time_to_first_token_seconds", "ttft", "Time to the first token.", "time_to_first_token_seconds")
    for name in ("inter_token_latency_seconds", "request_time_per_output_token_seconds"):
        yield _histogram(name, "token", "Time per token.", name)
    yield _histogram("e2e_request_latency_seconds", "request", "Time per request.", "e2e_request_latency_seconds")
    for phase in ("queue", "prefill", "decode"):
        name = f"request_{phase}_time_seconds"
        yield _histogram(name, "request", f"Time of a request in {phase}.", "request_phase_seconds", phase)
    for name in ("request_prompt_tokens", "request_generation_tokens"):
        yield _histogram(name, "length", "Tokens per request.", name)
    yield _histogram("iteration_tokens_total", "batch", "Tokens per step.", "engine_batch_tokens")


VIEWS: Sequence[View] = [*_requests(), *_cache(), *_tokens(), *_latencies()]
