"""What the daemon counts, and how it is shown to Prometheus.

The loop thread calls `step`, `finished` and their like; they touch plain numbers and lists, no lock and no label
lookup: about 1 us a call, where a prometheus-client child costs 3 to 10. One collector shows them at a scrape.
Knows names, labels and buckets; refuses to know where a number comes from. Every child exists from the start, so that a
board shows 0 and not "no data". The tiers that exist are known from the first snapshot on; `none` of a label means that
no tier was involved.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from server.types import KvReport

TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
TOKEN_S = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
REQUEST_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
STEP_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
BATCH_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)

STEP_KINDS = ("prefill", "decode", "mixed")
FINISH_REASONS = ("stop", "length", "abort", "error")
REJECTIONS = ("queue_full", "too_late", "too_long", "draining", "rate_limit", "no_memory")
TIERS = ("device", "dram", "ssd")
INTEGRITY = ("label", "header", "foreign", "stale", "payload")
STATES = ("starting", "ready", "draining", "stopped", "failed")
OTHER = "other"
"""Label value for anything outside a closed set: a scrape must not grow with what clients send."""
MAX_HTTP_CHILDREN = 512


class Snapshot(Protocol):
    """The gauges that a scrape pulls; the engine's own snapshot has them."""

    @property
    def state(self) -> str: ...
    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def loading(self) -> int: ...
    @property
    def kv(self) -> KvReport: ...


class SsdNumbers(Protocol):
    """What only the SSD tier itself can count."""

    @property
    def bytes_read(self) -> int: ...
    @property
    def bytes_written(self) -> int: ...
    @property
    def read_s(self) -> float: ...
    @property
    def write_s(self) -> float: ...
    @property
    def io_errors(self) -> Mapping[str, int]: ...
    @property
    def corrupt(self) -> Mapping[str, int]: ...
    @property
    def recovery_s(self) -> float: ...


class BatchNumbers(Protocol):
    """What whoever keeps batches counts."""

    @property
    def statuses(self) -> Mapping[str, int]: ...
    @property
    def lines(self) -> Mapping[str, int]: ...


class TenantNumbers(Protocol):
    """What is counted of one tenant; `name` is one that the operator gave."""

    @property
    def name(self) -> str: ...
    @property
    def open(self) -> int: ...
    @property
    def outcomes(self) -> Mapping[str, int]: ...
    @property
    def charged(self) -> Mapping[str, int]: ...


def lengths_up_to(limit: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50, ... until `limit` is covered."""
    series: list[int] = []
    for power in range(10):
        for digit in (1, 2, 5):
            series.append(digit * 10**power)
            if series[-1] >= limit:
                return tuple(series)
    return tuple(series)


class _Histogram:
    """Counts per bucket (not cumulative) and a sum. `bounds` are inclusive upper edges, ascending."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += count
        self.total += value * count

    def buckets(self) -> list[tuple[str, float]]:
        """(upper edge, cumulative count) as the exposition format wants them, `+Inf` last."""
        shown: list[tuple[str, float]] = []
        running = 0
        for bound, count in zip((*map(float, self.bounds), float("inf")), self.counts, strict=True):
            running += count
            shown.append(("+Inf" if bound == float("inf") else repr(bound), running))
        return shown


class Metrics(Collector):
    """All numbers of one daemon. Loop thread, but `expose`, which any thread may call on what `families` returned."""

    def __init__(self, model_name: str, version: str = "unknown", *, max_model_len: int = 32768) -> None:
        self._model_name = model_name
        self._version = version
        self._snapshot: Callable[[], Snapshot] | None = None
        self._process = CollectorRegistry(auto_describe=False)
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self._process)
        self._http: dict[tuple[str, str, str], int] = {}
        self._finished = dict.fromkeys(FINISH_REASONS, 0)
        self._rejected = dict.fromkeys((*REJECTIONS, OTHER), 0)
        self._preemptions = 0
        self._prompt_tokens = self._generated_tokens = 0
        self._served_tokens = dict.fromkeys(TIERS, 0)
        self._ssd: tuple[SsdNumbers, Callable[[], int]] | None = None
        self._recorded: Mapping[str, int] | None = None
        self._batches: BatchNumbers | None = None
        self._tenants: Callable[[], Mapping[str, TenantNumbers]] | None = None
        self._busy_s = self._host_s = 0.0
        self._step_s = {kind: _Histogram(STEP_S) for kind in STEP_KINDS}
        self._batch_tokens = _Histogram(BATCH_TOKENS)
        self._first_token_s = {source: _Histogram(TTFT_S) for source in ("none", *TIERS)}
        self._inter_token_s = _Histogram(TOKEN_S)
        self._output_token_s = _Histogram(TOKEN_S)
        self._e2e_s = _Histogram(REQUEST_S)
        self._phase_s = {phase: _Histogram(REQUEST_S) for phase in ("queue", "prefill", "decode")}
        self._prompt_len = _Histogram(lengths_up_to(max_model_len))
        self._generation_len = _Histogram(lengths_up_to(max_model_len))
        self._lag_s = _Histogram(STEP_S)

    def bind(self, snapshot: Callable[[], Snapshot]) -> None:
        """From now on every scrape pulls the gauges through `snapshot`, on the thread that calls `families`."""
        self._snapshot = snapshot

    def step(self, kind: str, seconds: float, tokens: int, host_seconds: float) -> None:
        """One forward pass of `tokens` tokens took `seconds` on the device thread and `host_seconds` on the loop."""
        self._step_s[kind].observe(seconds)
        self._batch_tokens.observe(tokens)
        self._busy_s += seconds
        self._host_s += host_seconds

    def bind_ssd(self, numbers: SsdNumbers, disk_bytes: Callable[[], int]) -> None:
        """There is an SSD tier: show what it counts, and what it takes on disk."""
        self._ssd = (numbers, disk_bytes)

    def bind_recorder(self, outcomes: Mapping[str, int]) -> None:
        """Requests are recorded: show how many were, and how many were left out."""
        self._recorded = outcomes

    def bind_batches(self, numbers: BatchNumbers) -> None:
        """Batches are kept: show how many there are, and what became of their lines."""
        self._batches = numbers

    def bind_tenants(self, numbers: Callable[[], Mapping[str, TenantNumbers]]) -> None:
        """There are tenants with names: show what each did and holds. `numbers` are by the id that the cache knows."""
        self._tenants = numbers

    def first_token(self, seconds: float, source: str = "none") -> None:
        """A request's first token came `seconds` after it was received; `source` is the slowest tier it drew on."""
        self._first_token_s[source].observe(seconds)

    def inter_token(self, gap_s: float, count: int) -> None:
        """`count` tokens of different requests each came `gap_s` after the one before."""
        self._inter_token_s.observe(gap_s, count)

    def finished(
        self,
        reason: str,
        *,
        e2e_s: float,
        queue_s: float,
        prefill_s: float,
        decode_s: float,
        prompt_tokens: int,
        generated_tokens: int,
        served_tokens: Mapping[str, int],
    ) -> None:
        """One request ended. Of its `prompt_tokens`, `served_tokens` came from each tier."""
        self._finished[reason] += 1
        self._e2e_s.observe(e2e_s)
        self._phase_s["queue"].observe(queue_s)
        self._phase_s["prefill"].observe(prefill_s)
        self._phase_s["decode"].observe(decode_s)
        self._prompt_tokens += prompt_tokens
        for tier, tokens in served_tokens.items():
            self._served_tokens[tier] += tokens
        self._generated_tokens += generated_tokens
        self._prompt_len.observe(prompt_tokens)
        self._generation_len.observe(generated_tokens)
        if generated_tokens > 1:
            self._output_token_s.observe(decode_s / (generated_tokens - 1))

    def rejected(self, reason: str) -> None:
        """A request was turned away before it was queued."""
        self._rejected[reason if reason in self._rejected else OTHER] += 1

    def preempted(self) -> None:
        """A running request lost its frames and will be computed again."""
        self._preemptions += 1

    def http(self, route: str, method: str, code: int) -> None:
        """One HTTP answer. `route` is a template of the router, never a path that a client made up."""
        key = (route, method, str(code))
        if key not in self._http and len(self._http) >= MAX_HTTP_CHILDREN:
            key = (OTHER, OTHER, str(code))
        self._http[key] = self._http.get(key, 0) + 1

    def declare_http(self, routes: Iterable[tuple[str, str]]) -> None:
        """Creates the success child of every (route, method), so that rates start at zero."""
        for route, method in routes:
            self._http.setdefault((route, method, "200"), 0)

    def loop_lag(self, seconds: float) -> None:
        """A timer of the event loop fired `seconds` late."""
        self._lag_s.observe(seconds)

    def render(self) -> bytes:
        """The whole exposition text. Loop thread."""
        return self.expose(self.families())

    def families(self) -> list[Metric]:
        """Every family as of now. Loop thread: it reads what the loop writes."""
        return list(self.collect())

    def expose(self, families: Sequence[Metric]) -> bytes:
        """`families` and the process's own as text (version 0.0.4). Any thread."""
        return generate_latest(_Frozen(families)) + generate_latest(self._process)

    def collect(self) -> Iterator[Metric]:
        yield from self._requests()
        yield from self._latencies()
        yield from self._tokens()
        yield from self._engine()
        now = self._snapshot() if self._snapshot is not None else None
        if self._tenants is not None:
            yield from self._of_tenants(self._tenants(), now.kv.owned if now is not None else {})
        if now is not None:
            yield from self._gauges(now)

    def _requests(self) -> Iterator[Metric]:
        http = CounterMetricFamily(
            "terrace_http_requests", "HTTP answers by route, method and status.", labels=("route", "method", "code")
        )
        for key, count in self._http.items():
            http.add_metric(key, count)
        yield http
        yield self._counters("requests_finished", "Requests that ended.", "finish_reason", self._finished)
        yield self._counters("admission_rejections", "Requests refused before queueing.", "reason", self._rejected)
        if self._recorded is not None:
            yield self._counters("recorded_requests", "Requests for the recording.", "outcome", self._recorded)
        if self._batches is not None:
            yield self._gauge("batches", "Batches remembered.", "status", self._batches.statuses)
            yield self._counters("batch_lines", "Lines of batches that are over.", "outcome", self._batches.lines)
        yield self._counters(
            "preemptions", "Requests that lost their frames.", "action", {"recompute": self._preemptions}
        )

    def _latencies(self) -> Iterator[Metric]:
        yield self._histograms(
            "time_to_first_token_seconds",
            "Received to first token, by the slowest tier that KV came from.",
            "kv_source",
            self._first_token_s,
        )
        yield self._histogram("inter_token_latency_seconds", "Gap between tokens of a request.", self._inter_token_s)
        yield self._histogram(
            "request_time_per_output_token_seconds", "Mean gap between tokens, per request.", self._output_token_s
        )
        yield self._histogram("e2e_request_latency_seconds", "Received to finished.", self._e2e_s)
        yield self._histograms("request_phase_seconds", "Time per phase of a request.", "phase", self._phase_s)
        yield self._histogram("event_loop_lag_seconds", "How late the event loop's timers fire.", self._lag_s)

    def _tokens(self) -> Iterator[Metric]:
        computed = self._prompt_tokens - sum(self._served_tokens.values())
        yield self._counter("prompt_tokens", "Prompt tokens of finished requests.", self._prompt_tokens)
        yield self._counter("generation_tokens", "Tokens generated by finished requests.", self._generated_tokens)
        yield self._counters(
            "prompt_tokens_by_source",
            "Prompt tokens by what provided their KV; sums to terrace_prompt_tokens_total.",
            "source",
            {"computed": computed} | self._served_tokens,
        )
        yield self._counter("kv_lookup_tokens", "Prompt tokens looked up in the prefix cache.", self._prompt_tokens)
        yield self._counters(
            "kv_hit_tokens", "Prompt tokens served, by the tier found in.", "tier", self._served_tokens
        )
        yield self._histogram("request_prompt_tokens", "Prompt length.", self._prompt_len)
        yield self._histogram("request_generation_tokens", "Generated length.", self._generation_len)

    def _engine(self) -> Iterator[Metric]:
        yield self._histograms("engine_step_seconds", "Duration of a forward pass.", "kind", self._step_s)
        yield self._histogram("engine_batch_tokens", "Tokens per forward pass.", self._batch_tokens)
        yield self._counter("engine_busy_seconds", "Time spent in forward passes.", self._busy_s)
        yield self._counter("engine_host_seconds", "Loop time spent to plan and commit steps.", self._host_s)
        build = GaugeMetricFamily("terrace_build_info", "What is running; always 1.", labels=("version",))
        build.add_metric((self._version,), 1)
        yield build

    def _of_tenants(
        self, numbers: Mapping[str, TenantNumbers], owned: Mapping[str, Mapping[str, int]]
    ) -> Iterator[Metric]:
        counter, gauge = CounterMetricFamily, GaugeMetricFamily
        requests = self._family(counter, "tenant_requests", "Requests by what became of them.", "tenant", "outcome")
        said = "Tokens of requests that are over; `cached` ones of prompts are not charged."
        tokens = self._family(counter, "tenant_tokens", said, "tenant", "kind")
        running = self._family(gauge, "tenant_requests_open", "Requests that are not over.", "tenant")
        blocks = self._family(gauge, "tenant_kv_blocks", "Blocks of a tenant in a tier.", "tenant", "tier")
        for id, tenant in numbers.items():
            running.add_metric((self._model_name, tenant.name), tenant.open)
            counted = (requests, tenant.outcomes), (tokens, tenant.charged), (blocks, owned.get(id, {}))
            for family, values in counted:
                for label, count in values.items():
                    family.add_metric((self._model_name, tenant.name, label), count)
        yield from (requests, tokens, running, blocks)

    def _gauges(self, now: Snapshot) -> Iterator[Metric]:
        yield self._gauge("requests_running", "Requests that hold frames.", None, {"": now.running})
        yield self._gauge(
            "requests_waiting",
            "Requests in the queue, and running ones whose blocks are being loaded.",
            "reason",
            {"capacity": now.waiting, "kv_restore": now.loading},
        )
        device = now.kv.tiers[0]
        usage = (device.referenced_blocks + device.in_flight_blocks) / device.capacity_blocks
        yield self._gauge("kv_cache_usage_ratio", "Share of device frames in use.", None, {"": usage})
        yield from self._tiers(now.kv)
        yield from self._hops(now.kv)
        if self._ssd is not None:
            yield from self._disk(*self._ssd)
        states = {state: int(state == now.state) for state in STATES}
        yield self._gauge("state", "1 for the daemon's state, 0 for the others.", "state", states)

    def _tiers(self, kv: KvReport) -> Iterator[Metric]:
        blocks = self._family(GaugeMetricFamily, "kv_blocks", "Frames by what they hold: nothing, a cached block that "
                              "nobody uses, one in use, or one that is arriving.", "tier", "state")  # fmt: skip
        evicted = self._family(CounterMetricFamily, "kv_evicted_blocks", "Blocks dropped.", "tier", "reason")
        declined = self._family(CounterMetricFamily, "kv_restore_declined_blocks", "Blocks that a tier had and that "
                                "were computed all the same.", "tier", "reason")  # fmt: skip
        for tier in kv.tiers:
            states = {"free": tier.free_blocks, "cached": tier.cached_blocks, "referenced": tier.referenced_blocks,
                      "in_flight": tier.in_flight_blocks}  # fmt: skip
            for family, values in ((blocks, states), (evicted, tier.evicted), (declined, tier.declined)):
                for label, count in values.items():
                    family.add_metric((self._model_name, tier.name, label), count)
        yield from (blocks, evicted, declined)
        size = kv.block_bytes
        used = {tier.name: (tier.capacity_blocks - tier.free_blocks) * size for tier in kv.tiers}
        yield self._gauge("kv_capacity_bytes", "Size of a tier.", "tier",
                          {tier.name: tier.capacity_blocks * size for tier in kv.tiers})  # fmt: skip
        yield self._gauge("kv_used_bytes", "Bytes of a tier that hold blocks.", "tier", used)
        yield self._gauge("kv_tier_up", "0 while a tier is switched off because it fails or stalls.", "tier",
                          {tier.name: int(tier.up) for tier in kv.tiers})  # fmt: skip
        yield self._counters("kv_tier_trips", "How often a tier was switched off.", "tier",
                             {tier.name: tier.breaker_opened for tier in kv.tiers})  # fmt: skip
        yield self._counters("kv_admission", "Blocks on their way to the lowest tier.", "decision", kv.admissions)
        yield self._counter("kv_recovered_blocks", "Blocks that the last start found on SSD.", kv.recovered_blocks)
        yield self._gauge("kv_pinned_blocks", "Blocks that pins and retention hold.", None, {"": kv.pinned_blocks})

    def _hops(self, kv: KvReport) -> Iterator[Metric]:
        moved = self._family(CounterMetricFamily, "kv_transfer_bytes", "Bytes moved.", "src", "dst")
        busy = self._family(
            CounterMetricFamily, "kv_transfer_busy_seconds", "Time with a move in flight.", "src", "dst"
        )
        flying = self._family(GaugeMetricFamily, "kv_transfers_in_flight", "Blocks in flight.", "src", "dst")
        waiting = self._family(GaugeMetricFamily, "kv_transfer_queue_bytes", "Bytes waiting to move.", "src", "dst")
        failed = self._family(CounterMetricFamily, "kv_transfer_failures", "Moves that failed.", "src", "dst", "reason")
        for hop in kv.hops:
            labels = (self._model_name, hop.source, hop.target)
            moved.add_metric(labels, hop.moved_blocks * kv.block_bytes)
            busy.add_metric(labels, hop.busy_s)
            flying.add_metric(labels, hop.in_flight_blocks)
            waiting.add_metric(labels, hop.waiting_blocks * kv.block_bytes)
            for reason, count in hop.failed.items():
                failed.add_metric((*labels, reason), count)
        yield from (moved, busy, flying, waiting, failed)

    def _disk(self, ssd: SsdNumbers, disk_bytes: Callable[[], int]) -> Iterator[Metric]:
        yield self._counter("ssd_read_bytes", "Bytes read from SSD.", ssd.bytes_read)
        yield self._counter("ssd_written_bytes", "Bytes written to SSD.", ssd.bytes_written)
        yield self._counters("ssd_io_seconds", "Time in reads and writes, summed over threads.", "op",
                             {"read": ssd.read_s, "write": ssd.write_s})  # fmt: skip
        yield self._gauge("ssd_disk_bytes", "What the cache takes on disk, index included.", None, {"": disk_bytes()})
        yield self._gauge("kv_recovery_seconds", "How long the last start took to take over the cache on SSD.", None,
                          {"": ssd.recovery_s})  # fmt: skip
        yield self._counters("kv_integrity_failures", "Blocks refused because they did not verify.", "kind",
                             dict.fromkeys(INTEGRITY, 0) | dict(ssd.corrupt))  # fmt: skip
        yield self._counters("ssd_io_errors", "Reads and writes that failed, by errno.", "errno",
                             {"EIO": 0, "ENOSPC": 0} | dict(ssd.io_errors))  # fmt: skip

    def _family(self, kind: type[Any], name: str, text: str, *labels: str) -> Any:
        return kind(f"terrace_{name}", text, labels=("model_name", *labels))

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"terrace_{name}", text, labels=("model_name",))
        family.add_metric((self._model_name,), value)
        return family

    def _counters(self, name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
        family = CounterMetricFamily(f"terrace_{name}", text, labels=("model_name", label))
        for value, count in values.items():
            family.add_metric((self._model_name, value), count)
        return family

    def _gauge(self, name: str, text: str, label: str | None, values: Mapping[str, float]) -> Metric:
        family = GaugeMetricFamily(f"terrace_{name}", text, labels=("model_name", *([label] if label else ())))
        for value, number in values.items():
            family.add_metric((self._model_name, *([value] if label else ())), number)
        return family

    def _histogram(self, name: str, text: str, histogram: _Histogram) -> Metric:
        family = HistogramMetricFamily(f"terrace_{name}", text, labels=("model_name",))
        family.add_metric((self._model_name,), histogram.buckets(), histogram.total)
        return family

    def _histograms(self, name: str, text: str, label: str, children: Mapping[str, _Histogram]) -> Metric:
        family = HistogramMetricFamily(f"terrace_{name}", text, labels=("model_name", label))
        for value, histogram in children.items():
            family.add_metric((self._model_name, value), histogram.buckets(), histogram.total)
        return family


class _Frozen(CollectorRegistry):
    """A registry that shows families already collected."""

    def __init__(self, families: Sequence[Metric]) -> None:
        super().__init__(auto_describe=False)
        self._families = families

    def collect(self) -> Iterator[Metric]:
        return iter(self._families)
