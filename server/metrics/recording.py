"""Where the daemon counts: plain numbers and histograms, no lock and no label look-up; about 1 us a call.

Knows what is counted; refuses to know where a number comes from. Every child exists from the start, so that a board
shows 0 and not "no data"; families of parts that this daemon does not have are absent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import inf

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.exposition import generate_latest

from server.histogram import Histogram
from server.metrics import vllm
from server.metrics.families import (
    BOUNDS,
    FINISH_REASONS,
    MISSES,
    OTHER,
    PHASES,
    REJECTIONS,
    SLOS,
    STALLS,
    STARTUP,
    STEP_KINDS,
    TIERS,
)
from server.metrics.page import Page, Series
from server.metrics.sources import (
    BatchNumbers,
    HostNumbers,
    Snapshot,
    SsdNumbers,
    TenantNumbers,
    put_batches,
    put_engine,
    put_integrity,
    put_ssd,
    put_tenants,
)
from server.types import NO_TARGETS, Targets

MAX_HTTP_CHILDREN = 512


@dataclass(frozen=True)
class Facts:
    """What does not change while the daemon runs. `targets`: of requests that name none."""

    version: str = "unknown"
    python: str = ""
    torch: str = ""
    dtype: str = ""
    kv_dtype: str = ""
    parameters: int = 0
    max_model_len: int = 32768
    weights_bytes: int = 0
    targets: Targets = NO_TARGETS
    write_bytes_per_day: float = 0.0


def lengths_up_to(limit: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50, ... until `limit` is covered."""
    series: list[int] = []
    for power in range(10):
        for digit in (1, 2, 5):
            series.append(digit * 10**power)
            if series[-1] >= limit:
                return tuple(series)
    return tuple(series)


def edges_of(facts: Facts) -> dict[str, tuple[float, ...]]:
    """Upper edges of the buckets that /metrics shows: with the targets among them, so that those who met them are
    counted exactly."""
    wanted = {"ttft": facts.targets.ttft_s, "token": facts.targets.tpot_s}
    edges = {
        kind: tuple(sorted({*bounds, *([wanted[kind]] if wanted.get(kind, inf) < inf else ())}))
        for kind, bounds in BOUNDS.items()
    }
    return edges | {"length": lengths_up_to(facts.max_model_len)}


@dataclass(slots=True)
class Ending:
    """How one request went. Seconds: `phases_s` by phase, `tpot_s` per token after the first, None where there are not
    two."""

    reason: str
    e2e_s: float
    phases_s: Mapping[str, float]
    tpot_s: float | None
    prompt_tokens: int
    generated_tokens: int
    met: Mapping[str, bool] = field(default_factory=dict)
    """By target that it had: was it met?"""


class Metrics:
    """All numbers of one daemon. Loop thread, but for the text of a page, which any thread may make."""

    def __init__(self, model_name: str, facts: Facts | None = None) -> None:
        self.facts = facts or Facts()
        self.startup_s = dict.fromkeys(STARTUP, 0.0)
        """Seconds by part of the start; written by whoever starts the daemon."""
        self._snapshot: Callable[[], Snapshot] | None = None
        self._batches: BatchNumbers | None = None
        self._recorded: Mapping[str, int] | None = None
        self._host: HostNumbers | None = None
        self._ssd: tuple[SsdNumbers, Callable[[], int], Callable[[], int | None]] | None = None
        self._tenants: Callable[[], Mapping[str, TenantNumbers]] | None = None
        self._process = CollectorRegistry(auto_describe=False)
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self._process)
        self._series = Series({"model_name": model_name})
        self._vllm_series = Series({"model_name": model_name, "engine": "0"})
        self._edges = edges_of(self.facts)
        self._bounds = {
            kind: tuple(sorted({*edges, *vllm.BOUNDS.get(kind, ())})) for kind, edges in self._edges.items()
        }
        self._http: dict[tuple[str, str, str], int] = {}
        self._count_requests()
        self._count_work()

    def _count_requests(self) -> None:
        self._finished = dict.fromkeys(FINISH_REASONS, 0)
        self._rejected = dict.fromkeys(REJECTIONS, 0)
        self._good, self._bad = dict.fromkeys(SLOS, 0), dict.fromkeys(SLOS, 0)
        self._first_token_s = {source: self._histogram("ttft") for source in ("none", *TIERS)}
        self._inter_token_s = self._histogram("token")
        self._output_token_s = self._histogram("token")
        self._e2e_s = self._histogram("request")
        self._phase_s = {phase: self._histogram("request") for phase in PHASES}
        self._prompt_len = self._histogram("length")
        self._generation_len = self._histogram("length")

    def _count_work(self) -> None:
        self._prompt_tokens = self._looked_up_tokens = self._generated_tokens = 0
        self._served_tokens = dict.fromkeys(TIERS, 0)
        self._missed_tokens = dict.fromkeys(MISSES, 0)
        self._busy_s = self._between_s = self._host_s = 0.0
        self._stall_s = dict.fromkeys(STALLS, 0.0)
        self._step_s = {kind: self._histogram("move") for kind in STEP_KINDS}
        self._batch_tokens = self._histogram("batch")
        self._lag_s = self._histogram("move")

    def _histogram(self, buckets: str) -> Histogram:
        return Histogram(self._bounds[buckets])

    # --- who else counts ---------------------------------------------------------------------------------------------

    def bind(self, snapshot: Callable[[], Snapshot]) -> None:
        """From now on every scrape pulls the gauges through `snapshot`, on the thread that calls `page`."""
        self._snapshot = snapshot

    def bind_host(self, numbers: HostNumbers) -> None:
        """There is a DRAM tier: show what its memory refused."""
        self._host = numbers

    def bind_ssd(
        self, numbers: SsdNumbers, disk_bytes: Callable[[], int], device_written: Callable[[], int | None]
    ) -> None:
        """There is an SSD tier: show what it counts, what it takes on disk, and what anybody wrote to the drive, if
        that is known. The two functions are called in any thread."""
        self._ssd = numbers, disk_bytes, device_written

    def bind_recorder(self, outcomes: Mapping[str, int]) -> None:
        """Requests are recorded: show how many were, and how many were left out."""
        self._recorded = outcomes

    def bind_batches(self, numbers: BatchNumbers) -> None:
        """Batches are kept: show how many there are, and what became of their lines."""
        self._batches = numbers

    def bind_tenants(self, numbers: Callable[[], Mapping[str, TenantNumbers]]) -> None:
        """There are tenants with names: show what each did and holds. `numbers` are by the id that the cache knows."""
        self._tenants = numbers

    # --- per step ----------------------------------------------------------------------------------------------------

    def step(self, kind: str, seconds: float, tokens: int, host_seconds: float) -> None:
        """One forward pass of `tokens` tokens took `seconds` on the device and `host_seconds` on the loop: less than
        nothing where it began before the one before it was committed, which a counter must not show."""
        self._step_s[kind].observe(seconds)
        self._batch_tokens.observe(tokens)
        self._busy_s += seconds
        self._between_s += host_seconds
        self._host_s = max(self._host_s, self._between_s)

    def stalled(self, cause: str, seconds: float) -> None:
        """There was work for so long, and none of it could run."""
        self._stall_s[cause] += seconds

    def generated(self, tokens: int) -> None:
        """A step gave so many tokens to their requests."""
        self._generated_tokens += tokens

    def inter_token(self, gap_s: float, count: int) -> None:
        """`count` tokens of different requests each came `gap_s` after the one before."""
        self._inter_token_s.observe(gap_s, count)

    def loop_lag(self, seconds: float) -> None:
        """A timer of the event loop fired `seconds` late."""
        self._lag_s.observe(seconds)

    # --- per request -------------------------------------------------------------------------------------------------

    def first_token(self, seconds: float, source: str = "none") -> None:
        """A request's first token came `seconds` after it was received; `source` is the slowest tier it drew on."""
        self._first_token_s[source].observe(seconds)

    def prompt_done(self, tokens: int, looked_up: int, served: Mapping[str, int], missed: Mapping[str, int]) -> None:
        """A prompt of `tokens` tokens is done. `looked_up` of them might have come from the cache; `served` did, by
        tier, and `missed` would have but for a reason."""
        self._prompt_tokens += tokens
        self._looked_up_tokens += looked_up
        unknown = looked_up
        for tier, count in served.items():
            self._served_tokens[tier] += count
            unknown -= count
        for reason, count in missed.items():
            self._missed_tokens[reason] += count
            unknown -= count
        self._missed_tokens["not_cached"] += unknown

    def finished(self, ending: Ending) -> None:
        """One request ended."""
        self._finished[ending.reason] += 1
        self._e2e_s.observe(ending.e2e_s)
        for phase, seconds in ending.phases_s.items():
            self._phase_s[phase].observe(seconds)
        self._prompt_len.observe(ending.prompt_tokens)
        self._generation_len.observe(ending.generated_tokens)
        if ending.tpot_s is not None:
            self._output_token_s.observe(ending.tpot_s)
        for target, met in ending.met.items():
            (self._good if met else self._bad)[target] += 1
        if ending.met:
            (self._good if all(ending.met.values()) else self._bad)["all"] += 1

    def rejected(self, reason: str) -> None:
        """A request was turned away before it was queued."""
        self._rejected[reason if reason in self._rejected else OTHER] += 1

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

    # --- a scrape ----------------------------------------------------------------------------------------------------

    def page(self) -> Page:
        """Everything as of now: 0.3 ms. Loop thread: it reads what the loop writes."""
        page = Page()
        now = self._snapshot() if self._snapshot is not None else None
        self._put_requests(page)
        self._put_work(page)
        self._put_facts(page)
        if self._tenants is not None:
            put_tenants(page, self._tenants(), now.kv.owned if now is not None else {})
        if now is not None:
            put_engine(page, now, self.facts.kv_dtype)
            page.put("device_memory_bytes", now.kv.tiers[0].capacity_blocks * now.kv.block_bytes, "kv")
        return page

    def text(self, page: Page) -> bytes:
        """The exposition (version 0.0.4) of a page and of the process, 2 ms. Any thread, once a page: asks the system
        for some numbers."""
        return page.text(self._series, self._edges).encode() + generate_latest(self._process)

    def vllm_text(self, page: Page) -> bytes:
        """The same under vLLM's names, as far as there is a counterpart. Any thread."""
        return vllm.text(page, self._vllm_series, self._edges).encode()

    def render(self) -> bytes:
        """The whole exposition at once. Loop thread."""
        return self.text(self.page())

    def _put_requests(self, page: Page) -> None:
        for key, count in self._http.items():
            page.put("http_requests_total", count, *key)
        page.put_all("requests_finished_total", self._finished)
        page.put_all("admission_rejections_total", self._rejected)
        if self._recorded is not None:
            page.put_all("recorded_requests_total", self._recorded)
        if self._batches is not None:
            put_batches(page, self._batches)
        page.put_all("time_to_first_token_seconds", self._first_token_s)
        page.put("inter_token_latency_seconds", self._inter_token_s)
        page.put("request_time_per_output_token_seconds", self._output_token_s)
        page.put("e2e_request_latency_seconds", self._e2e_s)
        page.put_all("request_phase_seconds", self._phase_s)
        for slo in SLOS:
            page.put("slo_requests_total", self._good[slo], slo, "good")
            page.put("slo_requests_total", self._bad[slo], slo, "bad")
        targets = {"ttft": self.facts.targets.ttft_s, "tpot": self.facts.targets.tpot_s}
        page.put_all(
            "slo_threshold_seconds", {slo: seconds if seconds < inf else 0 for slo, seconds in targets.items()}
        )

    def _put_work(self, page: Page) -> None:
        page.put("prompt_tokens_total", self._prompt_tokens)
        page.put("generation_tokens_total", self._generated_tokens)
        computed = self._prompt_tokens - sum(self._served_tokens.values())
        page.put_all("prompt_tokens_by_source_total", {"computed": computed} | self._served_tokens)
        page.put("request_prompt_tokens", self._prompt_len)
        page.put("request_generation_tokens", self._generation_len)
        page.put("kv_lookup_tokens_total", self._looked_up_tokens)
        page.put_all("kv_hit_tokens_total", self._served_tokens)
        page.put_all("kv_miss_tokens_total", self._missed_tokens)
        page.put_all("engine_step_seconds", self._step_s)
        page.put("engine_batch_tokens", self._batch_tokens)
        page.put("engine_busy_seconds_total", self._busy_s)
        page.put("engine_host_seconds_total", self._host_s)
        page.put_all("engine_stall_seconds_total", self._stall_s)
        page.put("event_loop_lag_seconds", self._lag_s)

    def _put_facts(self, page: Page) -> None:
        facts = self.facts
        page.put("device_memory_bytes", facts.weights_bytes, "weights")
        page.put_all("startup_phase_seconds", self.startup_s)
        page.put("build_info", 1, facts.version, facts.python, facts.torch)
        page.put("model_info", 1, facts.dtype, str(facts.parameters), str(facts.max_model_len))
        if self._host is not None:
            put_integrity(page, self._host, self._ssd[0] if self._ssd is not None else None)
        if self._ssd is not None:
            put_ssd(page, *self._ssd)
            page.put("ssd_write_budget_bytes_per_day", facts.write_bytes_per_day)
