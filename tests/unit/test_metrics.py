"""The exposition: names, types, closed label sets, and numbers that add up."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.metrics import MAX_HTTP_CHILDREN, Metrics, lengths_up_to
from server.types import KvReport
from tests.unit.api_fake import a_report


@dataclass
class Gauges:
    state: str = "ready"
    running: int = 3
    waiting: int = 2
    loading: int = 1
    kv: KvReport = field(default_factory=lambda: a_report(("device", 10, 1, 5, 4), ("dram", 20, 20, 0, 0)))


def scrape(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """{(sample name, sorted labels): value} of everything of ours."""
    families = text_string_to_metric_families(metrics.render().decode())
    return {
        (sample.name, tuple(sorted((k, v) for k, v in sample.labels.items() if k != "model_name"))): sample.value
        for family in families
        for sample in family.samples
        if sample.name.startswith("terrace_")
    }


def busy() -> Metrics:
    metrics = Metrics("m", "1.0", max_model_len=100)
    metrics.bind(Gauges)
    for seconds, kind in ((0.0001, "decode"), (0.004, "mixed"), (99.0, "prefill")):
        metrics.step(kind, seconds, 17, 0.001)
    metrics.first_token(0.03)
    metrics.first_token(0.02, "ssd")
    metrics.inter_token(0.02, 8)
    for reason, generated in (("stop", 5), ("length", 1), ("abort", 0)):
        metrics.finished(
            reason,
            e2e_s=1.5,
            queue_s=0.5,
            prefill_s=0.2,
            decode_s=0.8,
            prompt_tokens=50,
            generated_tokens=generated,
            served_tokens={"device": 16, "ssd": 8},
        )
    metrics.rejected("queue_full")
    metrics.rejected("made up by a bug")
    metrics.preempted()
    metrics.http("/v1/completions", "POST", 200)
    metrics.loop_lag(0.002)
    return metrics


def test_every_family_is_documented_and_well_named() -> None:
    """Own prefix, help text, counters end in _total, units are base units, ratios are ratios."""
    for family in text_string_to_metric_families(busy().render().decode()):
        assert family.documentation, family.name
        for sample in family.samples:
            assert (family.type == "counter") == sample.name.endswith("_total"), sample.name
        if family.name.startswith("terrace_"):
            assert ":" not in family.name
            assert not family.name.endswith(("_ms", "_milliseconds", "_mib", "_percent"))


def test_every_child_exists_before_anything_happens() -> None:
    """A fresh daemon shows the same series as a busy one, at zero: no board says "no data"."""
    fresh = Metrics("m", "1.0", max_model_len=100)
    fresh.bind(Gauges)
    fresh.declare_http([("/v1/completions", "POST")])
    assert set(scrape(fresh)) == set(scrape(busy()))


def test_histograms_are_cumulative_and_agree_with_their_counts() -> None:
    """Buckets never decrease, +Inf equals the count, an edge belongs to its own bucket, and sums add up."""
    samples = scrape(busy())
    name = "terrace_engine_step_seconds"
    assert samples[f"{name}_bucket", (("kind", "decode"), ("le", "0.0001"))] == 1
    assert samples[f"{name}_bucket", (("kind", "prefill"), ("le", "5.0"))] == 0
    assert samples[f"{name}_bucket", (("kind", "prefill"), ("le", "+Inf"))] == 1
    assert samples["terrace_inter_token_latency_seconds_count", ()] == 8
    assert samples["terrace_inter_token_latency_seconds_sum", ()] == pytest.approx(0.16)
    for family in text_string_to_metric_families(busy().render().decode()):
        if family.type != "histogram":
            continue
        last: dict[tuple[str, ...], float] = {}
        for sample in family.samples:
            key = tuple(v for k, v in sorted(sample.labels.items()) if k != "le")
            if sample.name.endswith("_bucket"):
                assert sample.value >= last.get(key, 0), sample
                last[key] = sample.value
            elif sample.name.endswith("_count"):
                assert sample.value == last[key]


def test_tokens_by_source_add_up_to_all_prompt_tokens() -> None:
    """Every prompt token is counted once, at what provided its KV."""
    samples = scrape(busy())
    total = samples["terrace_prompt_tokens_total", ()]
    sources = [value for (name, _), value in samples.items() if name == "terrace_prompt_tokens_by_source_total"]
    assert total == 150 == sum(sources)
    assert samples["terrace_kv_hit_tokens_total", (("tier", "device"),)] == 48
    assert samples["terrace_kv_hit_tokens_total", (("tier", "ssd"),)] == 24
    assert samples["terrace_generation_tokens_total", ()] == 6


def test_time_per_output_token_needs_two_tokens() -> None:
    """A request of one token or none has no gap to speak of."""
    samples = scrape(busy())
    assert samples["terrace_request_time_per_output_token_seconds_count", ()] == 1
    assert samples["terrace_request_time_per_output_token_seconds_sum", ()] == pytest.approx(0.2)


def test_gauges_are_pulled_at_the_scrape() -> None:
    """Blocks are free, cached, referenced or arriving and sum to the tier; one state is 1."""
    samples = scrape(busy())
    blocks = {
        dict(labels)["state"]: value
        for (name, labels), value in samples.items()
        if name == "terrace_kv_blocks" and dict(labels)["tier"] == "device"
    }
    assert blocks == {"free": 1, "cached": 5, "referenced": 4, "in_flight": 0}
    assert samples["terrace_kv_used_bytes", (("tier", "device"),)] == 9 * 1024
    assert samples["terrace_kv_transfer_bytes_total", (("dst", "dram"), ("src", "device"))] == 3 * 1024
    assert samples["terrace_requests_waiting", (("reason", "kv_restore"),)] == 1
    assert samples["terrace_kv_cache_usage_ratio", ()] == pytest.approx(0.4)
    assert samples["terrace_requests_running", ()] == 3
    states = {labels: value for (name, labels), value in samples.items() if name == "terrace_state"}
    assert sum(states.values()) == 1
    assert states[(("state", "ready"),)] == 1


def test_series_are_bounded_whatever_is_counted() -> None:
    """Unknown reasons and a flood of label values fold into `other`."""
    metrics = busy()
    samples = scrape(metrics)
    assert samples["terrace_admission_rejections_total", (("reason", "other"),)] == 1
    for number in range(2 * MAX_HTTP_CHILDREN):
        metrics.http(f"/{number}", "GET", 200)
    http = [value for (name, _), value in scrape(metrics).items() if name == "terrace_http_requests_total"]
    assert len(http) <= MAX_HTTP_CHILDREN + 1
    assert sum(http) == 2 * MAX_HTTP_CHILDREN + 1


def test_length_buckets_cover_the_model() -> None:
    """1, 2, 5, 10, ... up to the first edge that is at least the longest request."""
    assert lengths_up_to(1) == (1,)
    assert lengths_up_to(100) == (1, 2, 5, 10, 20, 50, 100)
    assert lengths_up_to(2048)[-1] == 5000


def test_label_values_are_escaped() -> None:
    """A model name with quotes, backslashes and newlines cannot break the exposition."""
    name = 'a"b\\c\nd'
    families = text_string_to_metric_families(Metrics(name).render().decode())
    shown = {
        sample.labels["model_name"] for family in families for sample in family.samples if "model_name" in sample.labels
    }
    assert shown == {name}
