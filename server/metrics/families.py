"""Every family that /metrics shows, declared once: name, kind, unit, what it says, and the values that labels may take.

Names are without their prefix `terrace_`. Base units stand in the name; counters end in `_total`. A label's values are
a closed set, all of them there from the start, or OPEN: names that the operator gave or routes of our own, and bounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from server.histogram import AGE_S, MOVE_S

PREFIX = "terrace_"
MODEL = "model_name"
"""The label that all families have but those that are the process's."""
OPEN: tuple[str, ...] = ()

TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
TOKEN_S = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
REQUEST_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
BATCH_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
BOUNDS = {
    "ttft": TTFT_S, "token": TOKEN_S, "request": REQUEST_S, "move": MOVE_S, "batch": BATCH_TOKENS, "age": AGE_S,
    "length": (),
}  # fmt: skip
"""Upper edges of buckets. `ttft` and `token` also get the configured target, and `length` depends on the model."""

TIERS = ("device", "dram", "ssd")
LOWER = TIERS[1:]
STEP_KINDS = ("prefill", "decode", "mixed")
WAITING = ("capacity", "shared_prefix", "background", "kv_restore")
FINISH_REASONS = ("stop", "length", "abort", "error")
OTHER = "other"
"""Label value for anything outside a closed set: a scrape must not grow with what clients send."""
REJECTIONS = ("queue_full", "too_late", "too_long", "draining", "rate_limit", OTHER)
PREEMPTIONS = ("spill", "recompute")
PHASES = ("queue", "kv_restore", "prefill", "decode")
SLOS = ("ttft", "tpot", "all")
STALLS = ("kv_restore", "spill_backpressure", "no_free_blocks", "host_pool_full")
MISSES = ("not_cached", "slower_than_recompute", "disabled", "split", "late", "failed")
DECLINED = ("slower_than_recompute", "disabled")
FAULTS = ("io", "corrupt", "no_space", "timeout")
PREFETCHED = ("useful", "late", "wasted", "cancelled")
EVICTED = ("capacity", "corrupt", "admin")
ADMISSION = ("admit", "reject_cold", "reject_wear", "no_room")
INTEGRITY = ("label", "payload", "header", "foreign", "stale")
BLOCK_STATES = ("free", "cached", "referenced", "in_flight")
STATES = ("starting", "ready", "draining", "stopped", "failed")
STARTUP = ("download", "weights", "kv_alloc", "host_alloc", "index_recovery", "warmup")


@dataclass(frozen=True, slots=True)
class Family:
    """`labels`: beside MODEL, which it has where `of_model`. `buckets`: a key of BOUNDS. `unit`: base unit, or the noun
    that is counted."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    help: str
    labels: dict[str, tuple[str, ...]]
    buckets: str = ""
    of_model: bool = True

    @property
    def label_names(self) -> tuple[str, ...]:
        return ((MODEL,) if self.of_model else ()) + tuple(self.labels)


def _counter(name: str, unit: str, text: str, **labels: tuple[str, ...]) -> Family:
    return Family(name, "counter", unit, text, labels)


def _gauge(name: str, unit: str, text: str, **labels: tuple[str, ...]) -> Family:
    return Family(name, "gauge", unit, text, labels)


def _histogram(name: str, unit: str, buckets: str, text: str, **labels: tuple[str, ...]) -> Family:
    return Family(name, "histogram", unit, text, labels, buckets)


def _requests() -> Iterator[Family]:
    yield Family("http_requests_total", "counter", "requests", "HTTP answers by route, method and status.",
                 {"route": OPEN, "method": OPEN, "code": OPEN}, of_model=False)  # fmt: skip
    yield _gauge("requests_running", "requests", "Requests that hold frames of the device.")
    yield _gauge("requests_waiting", "requests", "Requests that cannot go on: in the queue for room (capacity), for a "
                 "prefix that a running one computes (shared_prefix) or for an idle moment (background); or admitted, "
                 "while blocks are loaded (kv_restore).", reason=WAITING)  # fmt: skip
    yield _counter("requests_finished_total", "requests", "Requests that ended.", finish_reason=FINISH_REASONS)
    yield _counter("admission_rejections_total", "requests", "Requests refused before queueing.", reason=REJECTIONS)
    yield _counter("preemptions_total", "requests", "Running requests that had to give their frames up, by what "
                   "becomes of what they computed: a copy is below (spill), or only what stays cached (recompute).",
                   action=PREEMPTIONS)  # fmt: skip
    yield _counter("recorded_requests_total", "requests", "Requests for the recording.", outcome=("written", "dropped"))
    yield _gauge("batches", "batches", "Batches remembered.", status=OPEN)
    yield _counter("batch_lines_total", "lines", "Lines of batches that are over.", outcome=OPEN)


def _latencies() -> Iterator[Family]:
    yield _histogram("time_to_first_token_seconds", "seconds", "ttft",
                     "Received to first token, by the slowest tier that KV came from.",
                     kv_source=("none", *TIERS))  # fmt: skip
    yield _histogram("inter_token_latency_seconds", "seconds", "token", "Gap between tokens of a request.")
    yield _histogram("request_time_per_output_token_seconds", "seconds", "token",
                     "Mean gap between tokens, per request.")  # fmt: skip
    yield _histogram("e2e_request_latency_seconds", "seconds", "request", "Received to finished.")
    yield _histogram("request_phase_seconds", "seconds", "request", "Time per phase of a finished request: until it is "
                     "admitted, held up by blocks that are being loaded, computing its prompt, answering.",
                     phase=PHASES)  # fmt: skip
    yield _counter("slo_requests_total", "requests", "Online requests with a target that ended: bad if one was missed "
                   "or the server failed them, else good.", slo=SLOS, result=("good", "bad"))  # fmt: skip
    yield _gauge("slo_threshold_seconds", "seconds", "Target of requests that name none; 0: any time will do.",
                 slo=SLOS[:-1])  # fmt: skip


def _tokens() -> Iterator[Family]:
    yield _counter("prompt_tokens_total", "tokens", "Tokens of prompts that are done.")
    yield _counter("generation_tokens_total", "tokens", "Tokens generated.")
    yield _counter("prompt_tokens_by_source_total", "tokens",
                   "Prompt tokens by what provided their KV; sums to terrace_prompt_tokens_total.",
                   source=("computed", *TIERS))  # fmt: skip
    yield _histogram("request_prompt_tokens", "tokens", "length", "Prompt length of finished requests.")
    yield _histogram("request_generation_tokens", "tokens", "length", "Generated length of finished requests.")


def _engine() -> Iterator[Family]:
    yield _histogram("engine_step_seconds", "seconds", "move", "Duration of a forward pass.", kind=STEP_KINDS)
    yield _histogram("engine_batch_tokens", "tokens", "batch", "Tokens per forward pass.")
    yield _counter("engine_busy_seconds_total", "seconds", "Time spent in forward passes.")
    yield _counter("engine_host_seconds_total", "seconds", "Loop time spent to plan and commit steps.")
    yield _counter("engine_stall_seconds_total", "seconds", "Time in which there was work and none could run: blocks "
                   "were being loaded, or waited for a frame of the device or of DRAM, or spills held the frames.",
                   cause=STALLS)  # fmt: skip
    yield _gauge("device_memory_bytes", "bytes", "What the device holds.", kind=("weights", "kv"))
    yield _histogram("event_loop_lag_seconds", "seconds", "move", "How late the event loop's timers fire.")


def _tiers() -> Iterator[Family]:
    yield _gauge("kv_tier_up", "boolean", "0 while a tier is switched off because it fails or stalls.", tier=TIERS)
    yield _counter("kv_tier_trips_total", "trips", "How often a tier was switched off.", tier=TIERS)
    yield _gauge("kv_capacity_bytes", "bytes", "Size of a tier.", tier=TIERS)
    yield _gauge("kv_used_bytes", "bytes", "Bytes of a tier that hold blocks.", tier=TIERS)
    yield _gauge("kv_blocks", "blocks", "Frames by what they hold: nothing, a cached block that nobody uses, one in "
                 "use, or one that is arriving.", tier=TIERS, state=BLOCK_STATES)  # fmt: skip
    yield _gauge("kv_cache_usage_ratio", "ratio", "Share of device frames in use.")
    yield _gauge("kv_pinned_blocks", "blocks", "Blocks that pins and retention hold.")
    yield _gauge("cache_config_info", "info", "Shape of the cache; always 1.",
                 block_size=OPEN, num_device_blocks=OPEN, kv_dtype=OPEN, bytes_per_token=OPEN)  # fmt: skip


def _value() -> Iterator[Family]:
    yield _counter("kv_lookup_tokens_total", "tokens", "Prompt tokens looked up in the cache: all of prompts that are "
                   "done, but for those that may not come from it.")  # fmt: skip
    yield _counter("kv_hit_tokens_total", "tokens", "Prompt tokens served, by the tier found in.", tier=TIERS)
    yield _counter("kv_miss_tokens_total", "tokens", "Prompt tokens looked up and computed; with the hits they sum to "
                   "the lookups. not_cached: known nowhere; slower_than_recompute, disabled: their tier was too slow "
                   "or switched off; split: computed while others were loaded; late, failed: their load was.",
                   reason=MISSES)  # fmt: skip
    yield _counter("kv_ghost_hit_tokens_total", "tokens", "Prompt tokens that a tier of twice the size would have "
                   "had, by a sample of what it evicted: an estimate.", tier=TIERS)  # fmt: skip
    yield _histogram("kv_restore_seconds", "seconds", "move", "From finding blocks below the device to having them all "
                     "on it, per request, by the slowest tier.", tier=LOWER)  # fmt: skip
    yield _counter("kv_recompute_avoided_seconds_total", "seconds", "Device time that hits would have cost to compute, "
                   "by measured steps: an estimate.", tier=TIERS)  # fmt: skip
    yield _counter("kv_restore_cost_seconds_total", "seconds", "Time that requests were held up by loads, by the tier "
                   "they came from: measured.", tier=TIERS)  # fmt: skip
    yield _counter("kv_restore_declined_blocks_total", "blocks", "Blocks that a tier had and that were not loaded.",
                   tier=LOWER, reason=DECLINED)  # fmt: skip


def _transfers() -> Iterator[Family]:
    hop = {"src": TIERS, "dst": TIERS}
    yield _counter("kv_transfer_bytes_total", "bytes", "Bytes moved.", **hop)
    yield _counter("kv_transfer_busy_seconds_total", "seconds", "Time with a move in flight.", **hop)
    yield _histogram("kv_transfer_duration_seconds", "seconds", "move", "Start to landing of a block.", **hop)
    yield _gauge("kv_transfers_in_flight", "blocks", "Blocks in flight.", **hop)
    yield _gauge("kv_transfer_queue_bytes", "bytes", "Bytes waiting to move.", **hop)
    yield _counter("kv_transfer_failures_total", "blocks", "Moves that failed.", **hop, reason=FAULTS)
    yield _counter("kv_prefetch_blocks_total", "blocks", "Blocks fetched before a request needed them: used afterwards "
                   "(useful), needed while on their way (late), evicted unused (wasted), or given up (cancelled).",
                   outcome=PREFETCHED)  # fmt: skip


def _lives() -> Iterator[Family]:
    yield _counter("kv_evicted_blocks_total", "blocks", "Blocks dropped.", tier=TIERS, reason=EVICTED)
    yield _histogram("kv_eviction_age_seconds", "seconds", "age", "Last use to eviction for want of room.", tier=TIERS)
    yield _histogram("kv_block_lifetime_seconds", "seconds", "age", "Arrival in a tier to eviction for want of room, "
                     "of one in eight blocks.", tier=TIERS)  # fmt: skip
    yield _histogram("kv_reuse_gap_seconds", "seconds", "age", "Last use of a cached block to the next request for it, "
                     "by the fastest tier that has it, of one in eight blocks.", tier=TIERS)  # fmt: skip
    yield _histogram("kv_evict_to_reuse_seconds", "seconds", "age", "Eviction for want of room to the next request for "
                     "the block, of one in eight blocks.", tier=TIERS)  # fmt: skip
    yield _counter("kv_admission_total", "blocks", "Blocks on their way down to a tier, by whether they are written.",
                   tier=LOWER, decision=ADMISSION)  # fmt: skip


def _ssd() -> Iterator[Family]:
    yield _counter("ssd_read_bytes_total", "bytes", "Bytes read from SSD.")
    yield _counter("ssd_written_bytes_total", "bytes", "Bytes written to SSD.")
    yield _counter("ssd_device_written_bytes_total", "bytes", "Bytes that anybody wrote to the drive, since it was "
                   "attached; only where the system tells.")  # fmt: skip
    yield _gauge("ssd_write_budget_bytes_per_day", "bytes", "Most bytes to write to SSD per day; 0: no limit.")
    yield _histogram("ssd_io_seconds", "seconds", "move", "Reads and writes of the SSD tier, each a run of blocks.",
                     op=("read", "write"))  # fmt: skip
    yield _counter("ssd_io_errors_total", "calls", "Reads and writes that failed, by errno.", errno=OPEN)
    yield _gauge("ssd_disk_bytes", "bytes", "What the cache takes on disk, index included.")
    yield _counter("kv_integrity_failures_total", "blocks", "Blocks refused because they did not verify.",
                   tier=LOWER, kind=INTEGRITY)  # fmt: skip
    yield _counter("kv_recovered_blocks_total", "blocks", "Blocks that the last start found.", tier=("ssd",))
    yield _gauge("kv_recovery_seconds", "seconds", "How long the last start took to take over what was there.",
                 tier=("ssd",))  # fmt: skip


def _process() -> Iterator[Family]:
    yield _gauge("state", "boolean", "1 for the daemon's state, 0 for the others.", state=STATES)
    yield _gauge("startup_phase_seconds", "seconds", "How long each part of the start took.", phase=STARTUP)
    yield _gauge("build_info", "info", "What is running; always 1.", version=OPEN, python=OPEN, torch=OPEN)
    yield _gauge("model_info", "info", "What is served; always 1.", dtype=OPEN, parameters=OPEN, max_model_len=OPEN)


def _tenants() -> Iterator[Family]:
    yield _counter("tenant_requests_total", "requests", "Requests by what became of them.", tenant=OPEN, outcome=OPEN)
    yield _counter("tenant_tokens_total", "tokens", "Tokens of requests that are over; `cached` ones of prompts are "
                   "not charged.", tenant=OPEN, kind=OPEN)  # fmt: skip
    yield _gauge("tenant_requests_open", "requests", "Requests that are not over.", tenant=OPEN)
    yield _gauge("tenant_kv_blocks", "blocks", "Blocks of a tenant in a tier.", tenant=OPEN, tier=TIERS)


GROUPS = (_requests, _latencies, _tokens, _engine, _tiers, _value, _transfers, _lives, _ssd, _process, _tenants)
FAMILIES = {family.name: family for group in GROUPS for family in group()}
