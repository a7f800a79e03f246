"""One second of the daemon: what it holds now, and what it did in the last few seconds and in the last minute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from server.api.status.counters import Counters, Hop, quantile
from server.metrics import Facts
from server.metrics.families import TIERS
from server.metrics.page import Page

COLUMNS = (
    "running", "waiting", "generated", "computed", *TIERS, *(f"saved_{tier}" for tier in TIERS),
    "ttft_p50", "ttft_p99", "tpot_p50", "tpot_p99", "down", "up", "written", "stalled", "failed",
)  # fmt: skip
"""Of the ring: tokens a second by what provided them and generated; net seconds saved a second by tier; seconds to the
first and per later token over the last minute; bytes a second down, up and to SSD; share of time stalled; faults."""


@dataclass(frozen=True, slots=True)
class TierNow:
    """One tier. Blocks: `capacity` in all, `used` not free, of which `referenced` are held by requests."""

    name: str
    up: bool
    capacity_bytes: float
    used_bytes: float
    capacity_blocks: float
    used_blocks: float
    referenced_blocks: float


@dataclass(frozen=True, slots=True)
class HopNow:
    """One way between two neighbouring tiers."""

    source: str
    target: str
    in_flight_blocks: float
    waiting_bytes: float


@dataclass(frozen=True, slots=True)
class Moment:
    """`time_s` is Unix time. `running` hold frames, `loading` too and wait for blocks, `waiting` queue.

    `recent` and `minute`: what happened in the last few seconds, and in the last minute or since the start.
    `today_bytes`: written to SSD since `today_since_s`, the last midnight UTC or the start. `faults`: moves that failed
    and blocks that did not verify in the time of the ring.
    """

    time_s: float
    uptime_s: float
    state: str
    running: int
    loading: int
    waiting: int
    tiers: Sequence[TierNow]
    hops: Sequence[HopNow]
    recent: Counters
    minute: Counters
    today_bytes: float
    today_since_s: float
    faults: float
    has_ssd: bool

    @property
    def from_cache(self) -> float:
        """Share of the last minute's prompt tokens that the cache had."""
        tokens = sum(self.minute.sources.values())
        return 1 - self.minute.sources.get("computed", 0.0) / tokens if tokens else 0.0

    @property
    def stalled(self) -> float:
        """Share of the last few seconds in which there was work and none could run."""
        return min(1.0, self.recent.per_s(sum(self.recent.stalled_s.values())))

    def point(self, newest: Counters) -> dict[str, float | None]:
        """What the ring keeps of it. `newest`: what happened in the last second."""
        recent, minute = self.recent, self.minute
        place = {tier: level for level, tier in enumerate(TIERS)}
        ways = {"down": 0.0, "up": 0.0}
        for (source, target), count in recent.moved_bytes.items():
            ways["down" if place[source] < place[target] else "up"] += recent.per_s(count)
        return {
            "running": self.running,
            "waiting": self.waiting + self.loading,
            "generated": recent.per_s(recent.generated),
            "computed": recent.per_s(recent.sources.get("computed", 0.0)),
            **{tier: recent.per_s(recent.sources.get(tier, 0.0)) for tier in TIERS},
            **{f"saved_{tier}": recent.per_s(recent.net_s(tier)) for tier in TIERS},
            "ttft_p50": quantile(minute.ttft_s, 0.5),
            "ttft_p99": quantile(minute.ttft_s, 0.99),
            "tpot_p50": quantile(minute.tpot_s, 0.5),
            "tpot_p99": quantile(minute.tpot_s, 0.99),
            **ways,
            "written": recent.per_s(recent.written_bytes),
            "stalled": self.stalled,
            "failed": sum(newest.faults.values()),
        }

    def shown(self, facts: Facts) -> dict[str, Any]:
        """As JSON, without verdicts and without anything of a single request."""
        recent, minute = self.recent, self.minute
        targets = {"ttft": facts.targets.ttft_s, "tpot": facts.targets.tpot_s}
        ssd = {
            "written_today_bytes": self.today_bytes,
            "since": self.today_since_s,
            "budget_bytes_per_day": facts.write_bytes_per_day,
            "written_bytes_per_s": rounded(recent.per_s(recent.written_bytes)),
        }
        return {
            "time": self.time_s,
            "uptime_s": rounded(self.uptime_s),
            "state": self.state,
            "requests": {
                "running": self.running,
                "loading": self.loading,
                "waiting": self.waiting,
                "finished_last_minute": minute.finished,
                "refused_last_minute": minute.rejected,
            },
            "tokens": {
                "prompt_per_s": {name: rounded(recent.per_s(count)) for name, count in recent.sources.items()},
                "prompt_last_minute": minute.sources,
                "generated_per_s": rounded(recent.per_s(recent.generated)),
            },
            "latency_last_minute": {
                name: {
                    "p50_s": rounded(quantile(found, 0.5)),
                    "p99_s": rounded(quantile(found, 0.99)),
                    "count": sum(found.counts),
                    "target_s": targets[name] if targets[name] < inf else None,
                }
                for name, found in (("ttft", minute.ttft_s), ("tpot", minute.tpot_s))
            },
            "tiers": [self._tier(tier) for tier in self.tiers],
            "hops": [self._hop(hop) for hop in self.hops],
            "stalled_share": rounded(self.stalled),
            "stalled_last_minute_s": {cause: rounded(seconds) for cause, seconds in minute.stalled_s.items()},
            "ssd": ssd if self.has_ssd else None,
        }

    def _tier(self, tier: TierNow) -> dict[str, Any]:
        saved, cost = self.minute.saved_s.get(tier.name, 0.0), self.minute.cost_s.get(tier.name, 0.0)
        return {
            "name": tier.name,
            "up": tier.up,
            "capacity_bytes": tier.capacity_bytes,
            "used_bytes": tier.used_bytes,
            "capacity_blocks": tier.capacity_blocks,
            "used_blocks": tier.used_blocks,
            "referenced_blocks": tier.referenced_blocks,
            "saved_last_minute_s": rounded(saved),
            "cost_last_minute_s": rounded(cost),
            "net_saved_per_s": rounded(self.recent.per_s(self.recent.net_s(tier.name))),
        }

    def _hop(self, hop: HopNow) -> dict[str, Any]:
        moved = self.recent.moved_bytes.get((hop.source, hop.target), 0.0)
        return {
            "source": hop.source,
            "target": hop.target,
            "bytes_per_s": rounded(self.recent.per_s(moved)),
            "in_flight_blocks": hop.in_flight_blocks,
            "waiting_bytes": hop.waiting_bytes,
        }


def tiers_of(page: Page) -> list[TierNow]:
    """Every tier that there is, fastest first."""
    blocks: dict[str, dict[str, float]] = {}
    for (name, state), count in page.rows("kv_blocks"):
        blocks.setdefault(name, {})[state] = count
    return [
        TierNow(
            name=name,
            up=bool(page.value("kv_tier_up", name)),
            capacity_bytes=page.value("kv_capacity_bytes", name),
            used_bytes=page.value("kv_used_bytes", name),
            capacity_blocks=sum(states.values()),
            used_blocks=sum(states.values()) - states["free"],
            referenced_blocks=states["referenced"],
        )
        for name, states in blocks.items()
    ]


def hops_of(page: Page) -> list[HopNow]:
    """Every way between neighbouring tiers."""
    hops: list[Hop] = [(source, target) for (source, target), _ in page.rows("kv_transfers_in_flight")]
    return [
        HopNow(*hop, page.value("kv_transfers_in_flight", *hop), page.value("kv_transfer_queue_bytes", *hop))
        for hop in hops
    ]


def rounded(value: float | None) -> float | None:
    """Four digits: all that anybody reads, and short to send."""
    return None if value is None else float(f"{value:.4g}")
