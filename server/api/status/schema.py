"""The answer of GET /status as pydantic models, for the OpenAPI document."""

from __future__ import annotations

from typing import Literal

from server.api.schema import _Response


class Verdict(_Response):
    """One question that an operator has, and its answer."""

    question: str
    level: Literal["good", "watch", "bad", "idle"]
    answer: str
    why: list[str]


class StatusRequests(_Response):
    running: int
    loading: int
    waiting: int
    finished_last_minute: dict[str, float]
    refused_last_minute: dict[str, float]


class StatusTokens(_Response):
    """Of prompts by what provided them: computed, or a tier. Per second: over the last ten."""

    prompt_per_s: dict[str, float]
    prompt_last_minute: dict[str, float]
    generated_per_s: float


class StatusLatency(_Response):
    """Null: of no request in the last minute, or no target."""

    p50_s: float | None
    p99_s: float | None
    count: int
    target_s: float | None


class StatusTier(_Response):
    name: str
    up: bool
    capacity_bytes: float
    used_bytes: float
    capacity_blocks: float
    used_blocks: float
    referenced_blocks: float
    saved_last_minute_s: float
    cost_last_minute_s: float
    net_saved_per_s: float


class StatusHop(_Response):
    source: str
    target: str
    bytes_per_s: float
    in_flight_blocks: float
    waiting_bytes: float


class StatusSsd(_Response):
    """`since`: Unix time of the last midnight UTC, or of the start. `budget_bytes_per_day`: 0 if there is none."""

    written_today_bytes: float
    since: float
    budget_bytes_per_day: float
    written_bytes_per_s: float


class StatusLiveRequest(_Response):
    """`id`: the beginning of its X-Request-Id. `tenant`: told to admins only."""

    id: str
    phase: Literal["queued", "loading", "prefill", "decode", "sending"]
    background: bool
    prompt_tokens: int
    generated_tokens: int
    cached_tokens_by_tier: dict[str, int]
    age_s: float
    tenant: str | None = None


class StatusWarning(_Response):
    time_s: float
    level: str
    message: str
    count: int


class StatusLive(_Response):
    """`sees`: all requests (an admin), a tenant's own, or none. `requests`: the oldest of `count`."""

    sees: Literal["all", "own", "none"]
    count: int
    requests: list[StatusLiveRequest]
    warnings: list[StatusWarning] | None


class DaemonStatus(_Response):
    """The daemon at one moment. `point`: what the stream's history has of it, by column."""

    model: str
    version: str
    interval_s: float
    time: float
    uptime_s: float
    state: str
    requests: StatusRequests
    tokens: StatusTokens
    latency_last_minute: dict[str, StatusLatency]
    tiers: list[StatusTier]
    hops: list[StatusHop]
    stalled_share: float
    stalled_last_minute_s: dict[str, float]
    ssd: StatusSsd | None
    verdicts: list[Verdict]
    watchers: int
    point: dict[str, float | None]
    live: StatusLive
