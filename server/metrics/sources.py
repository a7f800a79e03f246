"""What other parts count, put onto a page: the engine's and the cache's moment, the SSD tier, batches, tenants. Loop
thread; the protocols say what is wanted of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from server.histogram import Histogram
from server.metrics.families import ADMISSION, DECLINED, EVICTED, FAULTS, PREFETCHED, STATES, TIERS
from server.metrics.page import Page
from server.types import HopReport, KvReport, TierReport


class Snapshot(Protocol):
    """The engine at one moment. `running` hold frames; of those `loading` are held up by loads. `waiting_by_reason`:
    those in the queue."""

    @property
    def state(self) -> str: ...
    @property
    def running(self) -> int: ...
    @property
    def loading(self) -> int: ...
    @property
    def waiting_by_reason(self) -> Mapping[str, int]: ...
    @property
    def preemptions(self) -> Mapping[str, int]: ...
    @property
    def kv(self) -> KvReport: ...


class HostNumbers(Protocol):
    """What the memory of the DRAM tier counts."""

    @property
    def corrupt(self) -> Mapping[str, int]: ...


class SsdNumbers(Protocol):
    """What only the SSD tier itself can count; `io_s` by `read` and `write`."""

    @property
    def bytes_read(self) -> int: ...
    @property
    def bytes_written(self) -> int: ...
    @property
    def io_s(self) -> Mapping[str, Histogram]: ...
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


def _whole(labels: Sequence[str], counts: Mapping[str, int]) -> dict[str, int]:
    """`counts` with all labels that there may be."""
    return dict.fromkeys(labels, 0) | dict(counts)


def put_engine(page: Page, now: Snapshot, kv_dtype: str) -> None:
    """State, queues, and the whole cache."""
    page.put_all("state", {state: int(state == now.state) for state in STATES})
    page.put("requests_running", now.running - now.loading)
    page.put_all("requests_waiting", {**now.waiting_by_reason, "kv_restore": now.loading})
    page.put_all("preemptions_total", now.preemptions)
    _put_cache(page, now.kv, kv_dtype)


def _put_cache(page: Page, kv: KvReport, kv_dtype: str) -> None:
    device = kv.tiers[0]
    used = device.referenced_blocks + device.in_flight_blocks
    page.put("kv_cache_usage_ratio", used / device.capacity_blocks)
    page.put("kv_pinned_blocks", kv.pinned_blocks)
    shape = (kv.block_tokens, device.capacity_blocks)
    page.put("cache_config_info", 1, *map(str, shape), kv_dtype, str(kv.block_bytes // kv.block_tokens))
    for tier in kv.tiers:
        _put_tier(page, tier, kv.block_bytes, kv.block_tokens)
    for tier in kv.tiers[1:]:
        page.put("kv_restore_seconds", tier.life.restore_s, tier.name)
        page.put_all("kv_restore_declined_blocks_total", _whole(DECLINED, tier.declined), tier.name)
        page.put_all("kv_admission_total", _whole(ADMISSION, kv.admissions[tier.name]), tier.name)
    for hop in kv.hops:
        _put_hop(page, hop, kv.block_bytes)
    if len(kv.tiers) > 1:
        page.put_all("kv_prefetch_blocks_total", _whole(PREFETCHED, kv.prefetched))
    if len(kv.tiers) == len(TIERS):
        page.put("kv_recovered_blocks_total", kv.recovered_blocks, kv.tiers[-1].name)


def _put_tier(page: Page, tier: TierReport, block_bytes: int, block_tokens: int) -> None:
    name, life = tier.name, tier.life
    page.put("kv_tier_up", int(tier.up), name)
    page.put("kv_tier_trips_total", tier.breaker_opened, name)
    page.put("kv_capacity_bytes", tier.capacity_blocks * block_bytes, name)
    page.put("kv_used_bytes", (tier.capacity_blocks - tier.free_blocks) * block_bytes, name)
    states = {
        "free": tier.free_blocks, "cached": tier.cached_blocks, "referenced": tier.referenced_blocks,
        "in_flight": tier.in_flight_blocks,
    }  # fmt: skip
    page.put_all("kv_blocks", states, name)
    page.put_all("kv_evicted_blocks_total", _whole(EVICTED, tier.evicted), name)
    page.put("kv_ghost_hit_tokens_total", life.ghost_hit_blocks * block_tokens, name)
    page.put("kv_recompute_avoided_seconds_total", life.avoided_s, name)
    page.put("kv_restore_cost_seconds_total", life.held_up_s, name)
    page.put("kv_eviction_age_seconds", life.eviction_age_s, name)
    page.put("kv_block_lifetime_seconds", life.lifetime_s, name)
    page.put("kv_reuse_gap_seconds", life.reuse_gap_s, name)
    page.put("kv_evict_to_reuse_seconds", life.evict_to_reuse_s, name)


def _put_hop(page: Page, hop: HopReport, block_bytes: int) -> None:
    labels = hop.source, hop.target
    page.put("kv_transfer_bytes_total", hop.moved_blocks * block_bytes, *labels)
    page.put("kv_transfer_busy_seconds_total", hop.busy_s, *labels)
    page.put("kv_transfer_duration_seconds", hop.duration_s, *labels)
    page.put("kv_transfers_in_flight", hop.in_flight_blocks, *labels)
    page.put("kv_transfer_queue_bytes", hop.waiting_blocks * block_bytes, *labels)
    page.put_all("kv_transfer_failures_total", _whole(FAULTS, hop.failed), *labels)


def put_ssd(
    page: Page, ssd: SsdNumbers, disk_bytes: Callable[[], int], device_written: Callable[[], int | None]
) -> None:
    """The SSD tier's own numbers."""
    page.put("ssd_read_bytes_total", ssd.bytes_read)
    page.put("ssd_written_bytes_total", ssd.bytes_written)
    page.put_later("ssd_device_written_bytes_total", device_written)
    page.put_all("ssd_io_seconds", ssd.io_s)
    page.put_all("ssd_io_errors_total", _whole(("EIO", "ENOSPC"), ssd.io_errors))
    page.put_later("ssd_disk_bytes", disk_bytes)
    page.put("kv_recovery_seconds", ssd.recovery_s, "ssd")


def put_integrity(page: Page, host: HostNumbers, ssd: SsdNumbers | None) -> None:
    """Blocks that did not verify, where they lay."""
    found = {("dram", kind): host.corrupt.get(kind, 0) for kind in ("label", "payload")}
    if ssd is not None:
        found["dram", "label"] += ssd.corrupt.get("label", 0)
        found |= {("ssd", kind): ssd.corrupt.get(kind, 0) for kind in ("header", "foreign", "stale", "payload")}
    for labels, count in found.items():
        page.put("kv_integrity_failures_total", count, *labels)


def put_batches(page: Page, batches: BatchNumbers) -> None:
    """Batches by status, and lines by what became of them."""
    page.put_all("batches", batches.statuses)
    page.put_all("batch_lines_total", batches.lines)


def put_tenants(page: Page, numbers: Mapping[str, TenantNumbers], owned: Mapping[str, Mapping[str, int]]) -> None:
    """What each tenant did, and what it holds of every tier."""
    for id, tenant in numbers.items():
        page.put_all("tenant_requests_total", tenant.outcomes, tenant.name)
        page.put_all("tenant_tokens_total", tenant.charged, tenant.name)
        page.put("tenant_requests_open", tenant.open, tenant.name)
        page.put_all("tenant_kv_blocks", owned.get(id, {}), tenant.name)
