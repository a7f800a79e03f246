"""The exposition: names, types, closed label sets, and numbers that add up; ours, and under vLLM's names."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from server.histogram import Histogram
from server.metrics import Ending, Facts, Metrics
from server.metrics.__main__ import row
from server.metrics.families import BOUNDS, FAMILIES, MODEL, PREFIX, SLOS, Family
from server.metrics.page import Page, at_most, merged
from server.metrics.recording import MAX_HTTP_CHILDREN, edges_of, lengths_up_to
from server.metrics.vllm import BOUNDS as VLLM_BOUNDS
from server.metrics.vllm import VIEWS
from server.types import KvReport, Targets
from tests.unit.api_fake import a_report

README = Path(__file__).parents[2] / "server" / "metrics" / "README.md"
FACTS = Facts("1.0", "3.11", "2.11", "float32", "float32", 1000, 100, 4000, Targets(0.3, 0.03), 5e9)
TIERS = ("device", 10, 1, 5, 4), ("dram", 20, 20, 0, 0), ("ssd", 40, 40, 0, 0)


@dataclass
class Gauges:
    state: str = "ready"
    running: int = 3
    loading: int = 1
    waiting_by_reason: Mapping[str, int] = field(
        default_factory=lambda: {"capacity": 2, "shared_prefix": 1, "background": 4}
    )
    preemptions: Mapping[str, int] = field(default_factory=lambda: {"spill": 2, "recompute": 1})
    kv: KvReport = field(default_factory=lambda: replace(a_report(*TIERS), owned={"id": {"device": 1}}))


@dataclass
class Disk:
    """What the memory of the DRAM tier and the SSD tier count."""

    bytes_read: int = 1
    bytes_written: int = 2
    io_s: dict[str, Histogram] = field(
        default_factory=lambda: {op: Histogram(BOUNDS["move"]) for op in ("read", "write")}
    )
    io_errors: dict[str, int] = field(default_factory=dict)
    corrupt: dict[str, int] = field(default_factory=lambda: {"label": 1, "payload": 2})
    recovery_s: float = 0.5


@dataclass
class Tenant:
    name: str = "alice"
    open: int = 1
    outcomes: Mapping[str, int] = field(default_factory=lambda: {"served": 2})
    charged: Mapping[str, int] = field(default_factory=lambda: {"prompt": 3})


@dataclass
class Batches:
    statuses: Mapping[str, int] = field(default_factory=lambda: {"completed": 1})
    lines: Mapping[str, int] = field(default_factory=lambda: {"failed": 0})


def fresh() -> Metrics:
    """A daemon that has everything and did nothing."""
    metrics, disk = Metrics("m", FACTS), Disk()
    metrics.bind(Gauges)
    metrics.bind_host(disk)
    metrics.bind_ssd(disk, lambda: 7, lambda: 8)
    metrics.bind_recorder({"written": 0, "dropped": 0})
    metrics.bind_batches(Batches())
    metrics.bind_tenants(lambda: {"id": Tenant()})
    metrics.declare_http([("/v1/completions", "POST")])
    return metrics


def ending(reason: str, generated: int, **met: bool) -> Ending:
    phases_s = {"queue": 0.5, "kv_restore": 0.1, "prefill": 0.1, "decode": 0.8}
    return Ending(reason, 1.5, phases_s, 0.2 if generated > 1 else None, 50, generated, met)


def busy() -> Metrics:
    metrics = fresh()
    for seconds, kind in ((0.0001, "decode"), (0.004, "mixed"), (99.0, "prefill")):
        metrics.step(kind, seconds, 17, 0.001)
    metrics.stalled("kv_restore", 0.25)
    metrics.first_token(0.03)
    metrics.first_token(0.02, "ssd")
    metrics.inter_token(0.02, 8)
    metrics.generated(6)
    for looked_up, served, missed in (
        (50, {"device": 16, "ssd": 8}, {"split": 8}),
        (50, {"device": 32}, {}),
        (0, {}, {}),
    ):
        metrics.prompt_done(50, looked_up, served, missed)
    metrics.finished(ending("stop", 5, ttft=True, tpot=True))
    metrics.finished(ending("length", 1, ttft=True, tpot=False))
    metrics.finished(ending("abort", 0))
    metrics.rejected("queue_full")
    metrics.rejected("made up by a bug")
    metrics.http("/v1/completions", "POST", 200)
    metrics.loop_lag(0.002)
    return metrics


Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def parse(text: bytes, prefix: str = PREFIX) -> Samples:
    """{(sample name, sorted labels without the model): value} of everything whose name begins so."""
    return {
        (
            sample.name,
            tuple(sorted((k, v) for k, v in sample.labels.items() if k not in (MODEL, "engine"))),
        ): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
        if sample.name.startswith(prefix)
    }


def scrape(metrics: Metrics) -> Samples:
    return parse(metrics.render())


def shown(metrics: Metrics) -> dict[str, Metric]:
    """Families by name without prefix, counters with `_total`."""
    return {
        family.name.removeprefix(PREFIX) + "_total" * (family.type == "counter"): family
        for family in text_string_to_metric_families(metrics.render().decode())
        if family.name.startswith(PREFIX)
    }


# --- what is declared ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_families_are_well_declared(family: Family) -> None:
    """Lower case, a base unit in the name where there is one, `_total` for counters only, a sentence of help."""
    assert re.fullmatch(r"[a-z][a-z0-9_]*", family.name)
    assert family.help.endswith(".")
    assert (family.kind == "counter") == family.name.endswith("_total")
    assert not family.name.endswith(("_ms", "_milliseconds", "_mib", "_percent", "_count", "_sum", "_bucket"))
    assert (family.kind == "histogram") == bool(family.buckets)
    if family.unit in ("seconds", "bytes", "tokens", "ratio", "info"):
        assert re.search(rf"_{family.unit}(_|$)", family.name), f"{family.unit} is not in the name"
    assert not {"le", "quantile", MODEL} & family.labels.keys()


def test_all_that_is_declared_is_shown_and_nothing_else() -> None:
    """Every family is fed by somebody, with the declared type, help and labels; values of labels are in their set."""
    families = shown(busy())
    assert families.keys() == FAMILIES.keys()
    for name, family in families.items():
        declared = FAMILIES[name]
        assert (family.type, family.documentation) == (declared.kind, declared.help)
        for sample in family.samples:
            labels = {label: value for label, value in sample.labels.items() if label != "le"}
            assert labels.keys() == {*declared.label_names}, sample
            for label, value in labels.items():
                assert label == MODEL or not declared.labels[label] or value in declared.labels[label], sample


def test_every_child_exists_before_anything_happens() -> None:
    """A fresh daemon shows the same series as a busy one: no board says "no data"."""
    assert set(scrape(fresh())) == set(scrape(busy()))
    assert scrape(fresh())["terrace_slo_requests_total", (("result", "bad"), ("slo", "all"))] == 0


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if len(family.labels) == 1])
def test_single_labels_show_their_whole_set(name: str) -> None:
    """Where a family has one closed label, a daemon with all parts shows all its values from the start."""
    [(label, values)] = FAMILIES[name].labels.items()
    found = {sample.labels[label] for sample in shown(fresh())[name].samples}
    assert not values or found == set(values)


def test_parts_that_are_not_there_are_not_shown() -> None:
    """A daemon of one tier, without batches and tenants, shows none of their families; and no drive that is unknown."""
    metrics = Metrics("m", FACTS)
    metrics.bind(lambda: Gauges(kv=a_report(("device", 10, 1, 5, 4))))
    names = shown(metrics).keys()
    assert not [name for name in names if name.startswith(("ssd_", "kv_transfer", "batch", "tenant", "recorded"))]
    metrics.bind_ssd(Disk(), lambda: 7, lambda: None)
    assert "ssd_disk_bytes" in shown(metrics)
    assert "ssd_device_written_bytes_total" not in shown(metrics)


def test_the_table_in_the_readme_is_that_of_the_registry() -> None:
    """README.md names every family with its type, labels and meaning, in order, and no other."""
    rows = [line for line in README.read_text(encoding="utf-8").splitlines() if line.startswith("| `terrace_")]
    assert rows == [row(family) for family in FAMILIES.values()]


def test_promtool_finds_no_fault() -> None:
    """Prometheus's own linter accepts names, units and help."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    ours = b"".join(line for line in busy().render().splitlines(keepends=True) if b"terrace_" in line)
    done = subprocess.run([promtool, "check", "metrics"], input=ours, capture_output=True, check=False)
    assert (done.returncode, done.stderr, done.stdout) == (0, b"", b"")


# --- numbers that add up ---------------------------------------------------------------------------------------------


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


def test_a_histogram_shows_any_of_its_edges() -> None:
    """Counts at a choice of edges are those of the whole; histograms of the same bounds add up."""
    histogram = Histogram((1, 2, 4, 8))
    for value in (0.5, 1, 3, 5, 100):
        histogram.observe(value)
    assert at_most(histogram, (1, 2, 4, 8)) == [2, 2, 3, 4, 5]
    assert at_most(histogram, (2, 8)) == [2, 4, 5]
    twice = merged([histogram, histogram])
    assert (twice.counts, twice.total) == ([4, 0, 2, 2, 2], 219)
    assert histogram.counts == [2, 0, 1, 1, 1]


def test_targets_are_edges_of_buckets() -> None:
    """Who met the configured target is counted exactly; without one the edges are the usual ones."""
    edges = edges_of(FACTS)
    assert 0.3 in edges["ttft"]
    assert 0.03 in edges["token"]
    assert list(edges["ttft"]) == sorted(edges["ttft"])
    assert edges_of(Facts())["ttft"] == BOUNDS["ttft"]


def test_tokens_by_source_add_up_to_all_prompt_tokens() -> None:
    """Every prompt token is counted once, at what provided its KV; hits and misses are what was looked up."""
    samples = scrape(busy())

    def total(wanted: str) -> float:
        return sum(value for (name, _), value in samples.items() if name == wanted)

    assert samples["terrace_prompt_tokens_total", ()] == 150 == total("terrace_prompt_tokens_by_source_total")
    assert samples["terrace_kv_lookup_tokens_total", ()] == 100
    assert total("terrace_kv_hit_tokens_total") + total("terrace_kv_miss_tokens_total") == 100
    assert samples["terrace_kv_hit_tokens_total", (("tier", "device"),)] == 48
    assert samples["terrace_kv_miss_tokens_total", (("reason", "split"),)] == 8
    assert samples["terrace_generation_tokens_total", ()] == 6


def test_requests_with_targets_are_good_or_bad() -> None:
    """One missed target makes a request bad as a whole; requests without targets are neither."""
    samples = scrape(busy())
    found = {
        slo: [samples["terrace_slo_requests_total", (("result", result), ("slo", slo))] for result in ("good", "bad")]
        for slo in SLOS
    }
    assert found == {"ttft": [2, 0], "tpot": [1, 1], "all": [1, 1]}
    assert samples["terrace_slo_threshold_seconds", (("slo", "ttft"),)] == 0.3
    plain = parse(Metrics("m").render())
    assert plain["terrace_slo_threshold_seconds", (("slo", "ttft"),)] == 0


def test_time_per_output_token_needs_two_tokens() -> None:
    """A request of one token or none has no gap to speak of."""
    samples = scrape(busy())
    assert samples["terrace_request_time_per_output_token_seconds_count", ()] == 1
    assert samples["terrace_request_time_per_output_token_seconds_sum", ()] == pytest.approx(0.2)


def test_gauges_are_pulled_at_the_scrape() -> None:
    """Blocks are free, cached, referenced or arriving and sum to the tier; one state is 1; nobody waits and runs."""
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
    assert samples["terrace_requests_running", ()] == 2
    assert samples["terrace_kv_cache_usage_ratio", ()] == pytest.approx(0.4)
    states = {labels: value for (name, labels), value in samples.items() if name == "terrace_state"}
    assert sum(states.values()) == 1
    assert states[(("state", "ready"),)] == 1


def test_failures_are_counted_where_the_bytes_lay() -> None:
    """What the SSD tier refused to write is DRAM's failure."""
    samples = scrape(fresh())
    found = {
        (dict(labels)["tier"], dict(labels)["kind"]): value
        for (name, labels), value in samples.items()
        if name == "terrace_kv_integrity_failures_total"
    }
    assert found == {
        ("dram", "label"): 2, ("dram", "payload"): 2, ("ssd", "header"): 0, ("ssd", "foreign"): 0, ("ssd", "stale"): 0,
        ("ssd", "payload"): 2,
    }  # fmt: skip


def test_a_page_is_of_one_moment() -> None:
    """What is counted after a page was taken is not on it."""
    metrics = busy()
    page = metrics.page()
    metrics.step("decode", 0.1, 1, 0.0)
    metrics.generated(5)
    samples = parse(metrics.text(page))
    assert samples["terrace_engine_step_seconds_count", (("kind", "decode"),)] == 1
    assert samples["terrace_generation_tokens_total", ()] == 6
    assert scrape(metrics)["terrace_engine_step_seconds_count", (("kind", "decode"),)] == 2


def test_a_step_that_began_early_takes_nothing_back() -> None:
    """Host time is what lies between steps, all in all; as a counter it never goes down."""
    metrics, seen = fresh(), [0.0]
    for between_s in (0.5, -0.3, 0.2, 0.4):
        metrics.step("decode", 0.1, 1, between_s)
        seen.append(scrape(metrics)["terrace_engine_host_seconds_total", ()])
    assert seen == pytest.approx([0.0, 0.5, 0.5, 0.5, 0.8])


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
    named = {
        sample.labels["model_name"] for family in families for sample in family.samples if "model_name" in sample.labels
    }
    assert named == {name}


# --- vLLM's names ----------------------------------------------------------------------------------------------------

VLLM = {
    "num_requests_running", "num_requests_waiting", "num_requests_waiting_by_reason", "kv_cache_usage_perc",
    "cache_config_info", "prefix_cache_queries", "prefix_cache_hits", "external_prefix_cache_queries",
    "external_prefix_cache_hits", "prompt_tokens", "prompt_tokens_by_source", "prompt_tokens_cached",
    "prompt_tokens_cached_by_source", "generation_tokens", "request_success", "admission_rejections",
    "num_preemptions", "time_to_first_token_seconds", "inter_token_latency_seconds",
    "request_time_per_output_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds",
    "request_prefill_time_seconds", "request_decode_time_seconds", "request_prompt_tokens",
    "request_generation_tokens", "iteration_tokens_total",
}  # fmt: skip
"""As the parser names them: counters without `_total`."""


def test_vllm_names_are_those_that_others_read() -> None:
    """The families are exactly the list, each with model and engine."""
    metrics = busy()
    families = list(text_string_to_metric_families(metrics.vllm_text(metrics.page()).decode()))
    assert {family.name.removeprefix("vllm:") for family in families} == VLLM
    assert len(VIEWS) == len(VLLM)
    for family in families:
        assert all({"model_name", "engine"} <= sample.labels.keys() for sample in family.samples)


def test_vllm_numbers_are_ours() -> None:
    """Tiers are device, host and disk; cached tokens by source sum to those of both prefix caches."""
    metrics = busy()
    samples = parse(metrics.vllm_text(metrics.page()), "vllm:")
    cached = {
        dict(labels)["source"]: value
        for (name, labels), value in samples.items()
        if name == "vllm:prompt_tokens_cached_by_source_total"
    }
    assert cached == {"device": 48, "host": 0, "disk": 8}
    hits = samples["vllm:prefix_cache_hits_total", ()], samples["vllm:external_prefix_cache_hits_total", ()]
    assert hits == (48, 8)
    assert samples["vllm:prefix_cache_queries_total", ()] == 100
    assert samples["vllm:external_prefix_cache_queries_total", ()] == 52
    assert samples["vllm:prompt_tokens_by_source_total", (("source", "local_compute"),)] == 94
    assert samples["vllm:num_requests_running", ()] == 2
    assert samples["vllm:num_requests_waiting", ()] == 8
    assert samples["vllm:num_requests_waiting_by_reason", (("reason", "capacity"),)] == 2
    assert samples["vllm:num_preemptions_total", ()] == 3
    assert samples["vllm:time_to_first_token_seconds_count", ()] == 2
    assert samples["vllm:request_queue_time_seconds_sum", ()] == pytest.approx(1.5)
    [config] = [dict(labels) for name, labels in samples if name == "vllm:cache_config_info"]
    assert config == {"block_size": "16", "num_gpu_blocks": "10", "num_cpu_blocks": "20", "cache_dtype": "float32"}


def test_vllm_buckets_are_vllms() -> None:
    """Boards that ask for one bucket find it; and our own page shows only ours."""
    metrics = busy()
    samples = parse(metrics.vllm_text(metrics.page()), "vllm:")

    def edges(wanted: str, found: Samples) -> list[float]:
        return [float(dict(labels)["le"]) for name, labels in found if name == f"{wanted}_bucket"][:-1]

    assert edges("vllm:e2e_request_latency_seconds", samples) == list(VLLM_BOUNDS["request"])
    assert edges("vllm:inter_token_latency_seconds", samples) == list(VLLM_BOUNDS["token"])
    assert edges("terrace_e2e_request_latency_seconds", scrape(metrics)) == list(BOUNDS["request"])


def test_a_page_without_an_engine_is_shown_all_the_same() -> None:
    """Before the engine is there, the view has its families, at zero."""
    metrics = Metrics("m")
    samples = parse(metrics.vllm_text(metrics.page()), "vllm:")
    assert samples["vllm:num_requests_running", ()] == 0
    assert Page().rows("kv_blocks") == ()
