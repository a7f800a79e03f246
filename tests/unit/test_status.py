"""The sampler, what it concludes, and who may see what of it."""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import pytest

from server.api.app import create_app
from server.api.status import routes
from server.api.status.counters import quantile
from server.api.status.moment import COLUMNS
from server.api.status.ring import Ring
from server.api.status.schema import DaemonStatus
from server.api.status.status import RING_POINTS, Status
from server.api.status.verdict import Verdict
from server.api.status.warnings import KEPT, MESSAGE_CHARS, WarningLog
from server.histogram import Histogram
from server.metrics import Ending, Facts, Metrics
from server.types import KvReport, Targets, TierLife
from tests.unit.api_fake import FakeEngine, a_report, client, make_app, make_service
from tests.unit.asgi_call import Call, settle

MIB = 2**20
EMPTY_SSD = ("ssd", 8, 8, 0, 0)
BODY = {"prompt": "a secret prompt", "max_tokens": 50}


@dataclass
class Ssd:
    """The numbers of an SSD tier."""

    bytes_read: int = 0
    bytes_written: int = 0
    io_s: dict[str, Histogram] = field(default_factory=dict)
    io_errors: dict[str, int] = field(default_factory=dict)
    corrupt: dict[str, int] = field(default_factory=dict)
    recovery_s: float = 0.0


@dataclass
class Gauges:
    """The engine's moment, as a test sets it."""

    state: str = "ready"
    running: int = 0
    waiting: int = 0
    loading: int = 0
    kv: KvReport = field(default_factory=lambda: a_report(("device", 8, 2, 4, 2), ("dram", 8, 8, 0, 0), EMPTY_SSD))
    waiting_by_reason: dict[str, int] = field(default_factory=lambda: {"capacity": 0})
    preemptions: dict[str, int] = field(default_factory=lambda: {"spill": 0, "recompute": 0})


class Watched:
    """A sampler over metrics and a clock that the test moves."""

    def __init__(self, **facts: Any) -> None:
        self.now_s = 0.0
        self.gauges = Gauges()
        self.metrics = Metrics("m", Facts(version="1.2.3", **facts))
        self.metrics.bind(lambda: self.gauges)
        self.ssd = Ssd()
        self.metrics.bind_ssd(self.ssd, lambda: 0, lambda: None)
        wall_s = 20_000 * 86_400 + 3600.0
        self.status = Status(self.metrics, "m", lambda: self.now_s, lambda: wall_s + self.now_s, max_watchers=2)

    def after(self, seconds: int = 1) -> dict[str, Any]:
        """What is shown so much later, sampled every second."""
        for _ in range(seconds):
            self.now_s += 1
            self.status.sample()
        shown: dict[str, Any] = json.loads(self.status.shown())
        return shown

    def serve(self, ttft_s: float = 0.1, tpot_s: float = 0.02, **served: int) -> None:
        """A prompt of 100 tokens and its answer of 10."""
        self.metrics.prompt_done(100, 100, served, {})
        self.metrics.first_token(ttft_s, "none")
        self.metrics.generated(10)
        self.metrics.finished(Ending("stop", 1.0, {"queue": 0.0}, tpot_s, 100, 10))

    def verdict(self, place: int) -> Verdict:
        return Verdict(**self.after()["verdicts"][place])


def test_the_ring_keeps_the_newest_points_in_order():
    """Bounded by its length, oldest first, also when it is not full; a number that is missing stays missing."""
    ring = Ring(["a"], 3)
    ring.add(1.0, {"a": 10.0})
    assert {name: list(column) for name, column in ring.columns().items()} == {"time": [1.0], "a": [10.0]}
    for second in range(2, 6):
        ring.add(float(second), {"a": None if second == 5 else float(second)})
    assert list(ring.columns()["time"]) == [3.0, 4.0, 5.0]
    assert ring.last() == {"time": 5.0, "a": None}
    assert ring.sum("a") == 7.0


@pytest.mark.parametrize(
    ("values", "share", "found"),
    [((), 0.5, None), ((0.5,) * 4, 0.5, 0.5), ((0.5, 1.5), 0.5, 1.0), ((9.0,), 0.99, 2.0), ((1.5,) * 10, 0.9, 1.9)],
)
def test_quantiles_are_those_of_prometheus(values: tuple[float, ...], share: float, found: float | None):
    """A straight line inside the bucket, the highest edge beyond all, nothing of nothing."""
    histogram = Histogram((1.0, 2.0))
    for value in values:
        histogram.observe(value)
    assert quantile(histogram, share) == (None if found is None else pytest.approx(found))


def test_rates_are_of_ten_seconds_and_percentiles_of_a_minute():
    """What happened is shown as long as it is recent, and not longer."""
    watched = Watched(targets=Targets(0.25, 0.05))
    for _ in range(10):
        watched.serve(device=16, dram=32)
    shown = watched.after()
    assert shown["tokens"]["prompt_per_s"] == {"computed": 520.0, "device": 160.0, "dram": 320.0, "ssd": 0.0}
    shown = watched.after(9)
    assert shown["tokens"]["prompt_per_s"]["computed"] == 52.0
    assert shown["tokens"]["generated_per_s"] == 10.0
    assert shown["latency_last_minute"]["ttft"]["target_s"] == 0.25
    assert 0.08 < shown["latency_last_minute"]["ttft"]["p50_s"] <= 0.1
    assert shown["latency_last_minute"]["tpot"]["count"] == 10
    shown = watched.after(10)
    assert shown["tokens"]["generated_per_s"] == 0.0
    assert shown["tokens"]["prompt_last_minute"] == {"computed": 520, "device": 160, "dram": 320, "ssd": 0}
    assert watched.after(41)["latency_last_minute"]["ttft"]["p50_s"] is None
    assert len(shown["point"]) == len(COLUMNS) + 1


def test_seconds_saved_are_net_of_what_loads_cost():
    """By tier: computing that hits made unnecessary, less the waiting for them."""
    watched = Watched()
    kv = watched.gauges.kv
    lives = [TierLife(), TierLife(), TierLife()]
    watched.gauges.kv = replace(kv, tiers=[replace(t, life=life) for t, life in zip(kv.tiers, lives, strict=True)])
    watched.after(10)
    lives[1].avoided_s, lives[1].held_up_s = 3.0, 1.0
    device, dram, _ = watched.after()["tiers"]
    assert (dram["saved_last_minute_s"], dram["cost_last_minute_s"], dram["net_saved_per_s"]) == (3.0, 1.0, 0.2)
    assert device["net_saved_per_s"] == 0.0
    lives[1].held_up_s = 4.0
    assert watched.verdict(1) == Verdict(
        "Is tiering paying?", "watch", "No", ["dram costs 1.00 s a minute more than it saves."]
    )


def test_a_day_of_writes_begins_at_midnight():
    """Bytes written to SSD are those since the start, and from midnight UTC on those since then."""
    watched = Watched(write_bytes_per_day=100.0 * MIB)
    watched.after()
    watched.ssd.bytes_written = 95 * MIB
    ssd = watched.after()["ssd"]
    assert (ssd["written_today_bytes"], ssd["budget_bytes_per_day"]) == (95 * MIB, 100 * MIB)
    assert ssd["since"] % 86_400 == 3600
    trouble = watched.verdict(2)
    assert (trouble.level, trouble.why) == ("watch", ["95.0 MiB of the 100.0 MiB a day were written to SSD already."])
    watched.now_s += 23 * 3600
    watched.ssd.bytes_written = 96 * MIB
    assert watched.after()["ssd"] | {"written_bytes_per_s": 0} == {
        "written_today_bytes": 0, "since": 20_001 * 86_400, "budget_bytes_per_day": 100 * MIB, "written_bytes_per_s": 0,
    }  # fmt: skip


def test_what_serves_well_is_said_so():
    """With targets met and half the prompt found, all three answers are good ones, with their numbers."""
    watched = Watched(targets=Targets(0.25, 0.05))
    watched.gauges.running = 3
    watched.serve(device=50)
    serving, tiering, trouble = watched.after()["verdicts"]
    assert [v["level"] for v in (serving, tiering, trouble)] == ["good", "good", "good"]
    assert "targets met" in serving["why"][0]
    assert serving["why"][1].startswith("3 running, 0 waiting")
    assert "50 % of prompt tokens came from the cache" in tiering["why"][1]


@pytest.mark.parametrize(
    ("what", "place", "level", "words"),
    [
        ("late", 0, "bad", "The first token takes 998 ms (p99), the target is 250 ms."),
        ("late", 0, "bad", "The first token takes 875 ms (the median), the target is 250 ms."),
        ("late now and then", 0, "watch", "The first token takes 950 ms (p99), the target is 250 ms."),
        ("unwritten", 2, "watch", "3 blocks of the last minute were not written to SSD: beyond the write budget."),
        ("refused", 0, "watch", "1 requests were turned away in the last minute (queue_full 1)."),
        ("draining", 0, "watch", "It takes no new requests."),
        ("failed", 0, "bad", "It takes no new requests."),
        ("nothing", 0, "idle", "0 running, 0 waiting, 0 tokens a second."),
        ("nothing", 1, "idle", "No prompt was computed in the last minute."),
        ("late", 1, "idle", "No prompt of the last minute was known already."),
        ("off", 2, "bad", "dram is switched off: it failed or stalled. It is tried again by itself."),
        ("error", 2, "bad", "1 requests ended with an error in the last minute."),
        ("stalled", 2, "watch", "Work stood still for 50 % of the last minute (kv_restore)."),
        ("failed", 2, "bad", "The engine has failed; only a restart helps."),
        ("fault", 2, "watch", "2 moves failed or blocks did not verify in the last 15 minutes; "
         "all were computed anew."),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(what: str, place: int, level: str, words: str):
    """Every kind of trouble changes the answer that it belongs to, and says in numbers what it is."""
    watched = Watched(targets=Targets(0.25, 0.05))
    watched.after()
    kv = watched.gauges.kv
    if what == "late":
        watched.serve(ttft_s=0.8)
    elif what == "late now and then":
        for ttft_s in (*[0.01] * 19, 0.8):
            watched.serve(ttft_s)
    elif what == "unwritten":
        watched.gauges.kv = replace(kv, admissions={tier: {"reject_wear": 3} for tier in ("dram", "ssd")})
    elif what == "refused":
        watched.metrics.rejected("queue_full")
    elif what in ("draining", "failed"):
        watched.gauges.state = what
    elif what == "off":
        watched.gauges.kv = replace(kv, tiers=[kv.tiers[0], replace(kv.tiers[1], up=False), kv.tiers[2]])
    elif what == "error":
        watched.metrics.finished(Ending("error", 1.0, {}, None, 1, 1))
    elif what == "stalled":
        watched.metrics.stalled("kv_restore", 1.0)
    elif what == "fault":
        watched.gauges.kv = replace(kv, hops=[replace(kv.hops[0], failed={"io": 2}), *kv.hops[1:]])
        watched.after()  # the ring has it from the next second on
    verdict = watched.verdict(place)
    assert (verdict.level, words in verdict.why) == (level, True), verdict


async def test_json_is_made_once_however_many_watch():
    """The sample and the history are encoded once a second; memory does not grow with time."""
    watched = Watched()
    assert watched.status.shown() is watched.status.shown()
    assert await watched.status.history() is await watched.status.history()
    before = watched.status.shown()
    watched.after(RING_POINTS + 50)
    assert watched.status.shown() is not before
    history = json.loads(await watched.status.history())
    assert set(history) == {"time", *COLUMNS}
    assert {len(column) for column in history.values()} == {RING_POINTS}
    assert history["ttft_p50"][-1] is None


def test_the_log_of_warnings_is_short_and_holds_first_lines():
    """The newest KEPT of warnings and errors, equal neighbours counted, no traceback, cut to a length."""
    kept = WarningLog()
    log = logging.Logger("terrace.test")
    log.addHandler(kept)
    log.info("not this")
    for _ in range(3):
        log.warning("a disk is slow")
    log.error("x" * 1000 + "\nand more")
    long, slow = kept.newest()
    assert (slow.level, slow.message, slow.count) == ("warning", "a disk is slow", 3)
    assert (long.level, long.message) == ("error", "x" * MESSAGE_CHARS)
    for number in range(2 * KEPT):
        log.warning("number %d", number)
    assert [entry.message for entry in kept.newest()] == [f"number {n}" for n in reversed(range(KEPT, 2 * KEPT))]


# --- who may see what ------------------------------------------------------------------------------------------------


async def looked(app: Any, key: str | None, path: str = "/status") -> httpx.Response:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    async with client(app, headers=headers) as http:
        return await http.get(path)


async def test_a_tenant_sees_sums_and_its_own_requests_an_admin_all() -> None:
    """Nothing of one tenant's request or of the log reaches another; no text reaches anybody."""
    engine, warnings = FakeEngine(), WarningLog()
    engine.gate.clear()
    warnings.emit(logging.makeLogRecord({"levelname": "WARNING", "msg": "only for admins"}))
    app = make_app(engine, keys=["one", "two"], admin_keys=["root"], warnings=warnings)
    calls = []
    for key, name in (("one", "first"), ("two", "second")):
        headers = {"authorization": f"Bearer {key}", "x-request-id": f"{name}-request"}
        calls.append(Call(app, BODY, headers=headers))
        await settle(lambda: len(engine.open) == len(calls))
    seen = {key: (await looked(app, key)).text for key in ("one", "two", "root")}
    for key, text in seen.items():
        live = DaemonStatus.model_validate_json(text).live
        assert [request.id for request in live.requests] == {
            "one": ["first-reques"], "two": ["second-reque"], "root": ["first-reques", "second-reque"],
        }[key]  # fmt: skip
        assert live.sees == ("all" if key == "root" else "own")
        assert all(request.prompt_tokens == 1 + len(BODY["prompt"]) for request in live.requests)
        assert all((request.tenant is not None) == (key == "root") for request in live.requests)
        assert ("only for admins" in text) == (live.warnings is not None) == (key == "root")
        assert "secret" not in text
    assert "second-reque" not in seen["one"]
    assert "first-reques" not in seen["two"]
    for key in (None, "three"):
        assert (await looked(app, key)).status_code == (await looked(app, key, "/status/stream")).status_code == 401
    for call in calls:
        call.leave.set()
        await call.task
    assert json.loads((await looked(app, "root")).text)["live"]["count"] == 0, "what is over is not shown"


async def test_without_api_keys_only_an_admin_key_hides_anything() -> None:
    """No key at all: everybody is the admin, as for the cache. An admin key alone: others see sums only."""
    assert json.loads((await looked(make_app(FakeEngine()), None)).text)["live"]["sees"] == "all"
    app = make_app(FakeEngine(), admin_keys=["root"])
    assert json.loads((await looked(app, None)).text)["live"]["sees"] == "none"
    assert json.loads((await looked(app, "root")).text)["live"]["sees"] == "all"
    assert (await looked(app, "guess")).status_code == 401


def events(call: Call) -> list[tuple[str, Any]]:
    blocks = [block.split("\ndata: ") for block in b"".join(call.received).decode().split("\n\n") if block]
    return [(name.removeprefix("event: "), json.loads(data)) for name, data in blocks]


async def test_a_stream_is_the_past_once_and_then_every_second() -> None:
    """What a watcher that was away for a while gets next is the newest, nothing is kept for it; its place is free when
    it leaves, and at the end of the sampler every stream ends."""
    service = make_service(FakeEngine(), max_watchers=2)
    app = create_app(service)
    calls = [Call(app, {}, "/status/stream", "GET") for _ in range(2)]
    await settle_with_threads(lambda: all(len(call.received) == 2 for call in calls))
    full = await looked(app, None, "/status/stream")
    assert (full.status_code, full.json()["error"]["code"], full.headers["retry-after"]) == (
        429,
        "too_many_watchers",
        "10",
    )
    first, second = calls
    second.reading.clear()
    for _ in range(3):
        service.status.sample()
        await settle()
    assert [name for name, _ in events(first)] == ["history"] + ["status", "live"] * 4
    times = [data["time"] for name, data in events(first) if name == "status"]
    assert times == sorted(times)
    second.reading.set()
    await settle()
    assert [name for name, _ in events(second)] == ["history"] + ["status", "live"] * 3, "a second was skipped"
    assert events(second)[-2][1]["time"] == times[-1]
    first.leave.set()
    await first.task
    assert service.status.watchers == 1
    sampler = asyncio.create_task(service.status.run())
    await settle()
    sampler.cancel()
    await second.task
    assert second.ended
    assert service.status.watchers == 0


async def test_who_reads_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A watcher that takes nothing for STALLED_S makes room for others."""
    monkeypatch.setattr(routes, "STALLED_S", 0.01)
    service = make_service(FakeEngine())
    call = Call(create_app(service), {}, "/status/stream", "GET")
    await settle_with_threads(lambda: len(call.received) == 2)
    call.reading.clear()
    service.status.sample()
    await call.task
    assert service.status.watchers == 0
    assert not call.ended, "it was cut off"


async def settle_with_threads(until: Any) -> None:
    """As `settle`, where another thread has to get something done."""
    for _ in range(1000):
        if until():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not come about")
