"""Life of the process around the engine: the start that answers, the watchdog, what systemd hears, and the log."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from server import watchdog
from server.api.starting import Front, Starting
from server.config import Config, load_config, supervisor
from server.logs import REQUEST_ID, ConsoleLines, JsonLines, _name_request
from server.notify import Notifier
from server.startup import Startup
from server.watchdog import Watchdog
from tests.unit.api_fake import FakeEngine, make_app


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def client(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


# --- the start -------------------------------------------------------------------------------------------------------


async def test_the_start_answers_probes_with_how_far_it_is() -> None:
    """While weights load the daemon is alive and not ready, and says which part of the start goes on, and its share."""
    clock = Clock()
    startup = Startup(clock)
    async with client(Starting(startup, "tiny")) as http:
        with startup.timed("weights"):
            startup.moved(30, 120)
            clock.now_s += 2
            assert (await http.get("/livez")).status_code == 200
            answer = await http.get("/readyz")
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["status"] == "starting"
            assert answer.json()["progress"] == {"phase": "weights", "share": 0.25, "phase_s": 2.0, "elapsed_s": 2.0}
        refusal = await http.post("/v1/completions", json={"prompt": "x"})
        assert (refusal.status_code, refusal.json()["error"]["code"]) == (503, "not_ready")
        assert "status" not in refusal.json()
        scraped = (await http.get("/metrics")).text
    assert 'terrace_state{model_name="tiny",state="starting"} 1.0' in scraped
    assert 'terrace_state{model_name="tiny",state="ready"} 0.0' in scraped
    assert 'terrace_startup_phase_seconds{model_name="tiny",phase="weights"} 2.0' in scraped


async def test_the_daemon_takes_the_place_of_its_start() -> None:
    """The port answers all along: first the start, then, without a gap, the daemon itself."""
    front = Front(Starting(Startup(Clock()), "fake"))
    async with client(front) as http:
        assert (await http.get("/readyz")).status_code == 503
        front.app = make_app(FakeEngine())
        assert (await http.get("/readyz")).status_code == 200


# --- the watchdog ----------------------------------------------------------------------------------------------------


class Listener:
    """A socket as systemd holds it."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.setblocking(False)

    def heard(self) -> list[dict[str, str]]:
        found = []
        while True:
            try:
                text = self._socket.recv(4096).decode()
            except BlockingIOError:
                return found
            found.append(dict(line.split("=", 1) for line in text.split("\n")))


@pytest.fixture
def systemd(tmp_path: Path) -> Listener:
    return Listener(tmp_path / "notify")


def stuck_engine() -> Any:
    """An engine that has one request and makes no progress."""
    engine = FakeEngine()
    engine.kv.stalled_by = lambda: "kv_restore"
    request = SimpleNamespace(
        id=7, arrival_s=1.0, prompt_tokens=11, computed_tokens=4, generated=0, lease=None, tokens=[1, 2, 3],
        service=SimpleNamespace(background=False),
    )  # fmt: skip
    engine.scheduler = SimpleNamespace(running=[request], waiting=[])
    return engine


def test_systemd_hears_every_state(tmp_path: Path, systemd: Listener) -> None:
    """READY, STATUS, STOPPING, WATCHDOG and EXTEND_TIMEOUT_USEC arrive as sd_notify(3) has them."""
    notifier = Notifier(str(tmp_path / "notify"))
    notifier.needs(2.5)
    notifier.ready("ready: tiny")
    notifier.alive("3 running")
    notifier.stopping(50, "draining")
    notifier.close()
    assert systemd.heard() == [
        {"EXTEND_TIMEOUT_USEC": "2500000"},
        {"READY": "1", "STATUS": "ready: tiny"},
        {"WATCHDOG": "1", "STATUS": "3 running"},
        {"STOPPING": "1", "STATUS": "draining", "EXTEND_TIMEOUT_USEC": "50000000"},
    ]


def test_nobody_needs_to_listen(tmp_path: Path) -> None:
    """Without a supervisor, and with one that went away, notifications go nowhere and raise nothing."""
    for address in ("", str(tmp_path / "gone"), "@terrace-nobody"):
        notifier = Notifier(address)
        notifier.ready("ready")
        notifier.close()


def test_the_environment_says_who_supervises() -> None:
    """What systemd sets is read; a watchdog period that is meant for another process is not ours."""
    environ = {"NOTIFY_SOCKET": "/run/x", "WATCHDOG_USEC": "30000000"}
    assert supervisor(environ).watchdog_s == supervisor(environ | {"WATCHDOG_PID": str(os.getpid())}).watchdog_s == 30
    assert supervisor(environ | {"WATCHDOG_PID": "1"}).watchdog_s == 0
    assert (supervisor({}).address, supervisor({}).watchdog_s) == ("", 0)


async def test_a_stuck_engine_is_dumped_once_and_the_watchdog_starves(
    tmp_path: Path, systemd: Listener, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Progress feeds systemd's watchdog. Without it the state and all stacks are written once, and nothing is fed until
    steps end again; another stall is written again. No token is in what is written."""
    stacks = []
    monkeypatch.setattr(watchdog, "dump_stacks", lambda: stacks.append(1))
    engine = stuck_engine()
    dog = Watchdog(10.0, Notifier(str(tmp_path / "notify")))
    dog._look()
    assert systemd.heard() == [{"EXTEND_TIMEOUT_USEC": "10000000"}]
    dog.watch(engine)
    fed = []
    with caplog.at_level(logging.WARNING):
        for seconds in (0.0, 9.9, 10.0, 11.0, 12.0, 0.0, 10.0):
            engine.stuck_for_s = seconds
            dog._look()
            fed.append(len(systemd.heard()))
    assert fed == [1, 1, 0, 0, 0, 1, 0]
    assert len(stacks) == 2
    dumps = [record.getMessage() for record in caplog.records if record.getMessage().startswith("stuck: ")]
    assert len(dumps) == 2
    state = json.loads(dumps[0].split("; ", 1)[1])
    assert state["running"][0] | {"loading": False} == {
        "id": 7, "arrival_s": 1.0, "prompt_tokens": 11, "computed_tokens": 4, "generated": 0, "blocks": 0,
        "loading": False, "background": False,
    }  # fmt: skip
    assert state["tiers"]["device"]["blocks"] == 8


async def test_the_watchdog_looks_until_cancelled(tmp_path: Path, systemd: Listener) -> None:
    """It feeds systemd at least three times in the period that it asks for."""
    dog = Watchdog(10.0, Notifier(str(tmp_path / "notify")), period_s=0.03)
    dog.watch(stuck_engine())
    task = asyncio.create_task(dog.run())
    heard = 0
    while heard < 3:
        await asyncio.sleep(0.01)
        heard += len(systemd.heard())
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def test_stacks_name_every_thread(capfd: pytest.CaptureFixture[str]) -> None:
    """A dump shows where this thread is."""
    watchdog.dump_stacks()
    assert "test_stacks_name_every_thread" in capfd.readouterr().err


# --- the log ---------------------------------------------------------------------------------------------------------


def a_record(**extra: Any) -> logging.LogRecord:
    record = logging.getLogger("terrace.test").makeRecord(
        "terrace.test", logging.WARNING, __file__, 1, "batch %s waits", ("b-1",), None, extra=extra
    )
    assert _name_request(record)
    return record


def test_a_line_is_json_with_its_fields() -> None:
    """One object per event: time, level, logger, message, and what the event says beside it."""
    entry = json.loads(JsonLines().format(a_record(tier="ssd", blocks=3)))
    assert entry.pop("time")
    assert entry == {
        "level": "warning", "logger": "terrace.test", "message": "batch b-1 waits", "tier": "ssd", "blocks": 3,
    }  # fmt: skip


def test_a_line_for_people_has_the_same_fields() -> None:
    """On a terminal fields follow the message, and a warning is coloured."""
    plain = ConsoleLines(coloured=False).format(a_record(tier="ssd"))
    assert plain.endswith("WARNING batch b-1 waits tier=ssd")
    assert ConsoleLines(coloured=True).format(a_record()).startswith("\x1b[33m")


def test_lines_of_a_request_carry_its_id() -> None:
    """Whatever is logged while a request is served names it; an id that is given stays."""
    token = REQUEST_ID.set("req-1")
    try:
        assert json.loads(JsonLines().format(a_record()))["request_id"] == "req-1"
        assert json.loads(JsonLines().format(a_record(request_id="other")))["request_id"] == "other"
    finally:
        REQUEST_ID.reset(token)
    assert "request_id" not in json.loads(JsonLines().format(a_record()))


async def test_the_id_of_a_request_reaches_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """What a client calls its request, by header or in the body, is what the log calls it."""
    seen = []

    class Noting(FakeEngine):
        def submit(self, spec: Any) -> Any:
            seen.append(REQUEST_ID.get())
            return super().submit(spec)

    async with client(make_app(Noting())) as http:
        body = {"model": "fake", "prompt": "hi", "max_tokens": 1}
        await http.post("/v1/completions", json=body, headers={"X-Request-Id": "by-header"})
        await http.post("/v1/completions", json=body | {"request_id": "by-body"})
    assert seen == ["by-header", "by-body"]


# --- reload ----------------------------------------------------------------------------------------------------------


def test_a_configuration_can_be_read_again(tmp_path: Path) -> None:
    """Flags and environment stay, files are read anew; some values are taken, the others are named."""
    file, keys = tmp_path / "terrace.toml", tmp_path / "keys"
    keys.write_text("one\n")
    file.write_text(f'[server]\napi_key_file = "{keys}"\nlog_level = "info"\n[kv]\ndevice_gib = 1\n')

    def load() -> Config:
        return load_config({"server.port": "9"}, file, {"TERRACE_API_KEYS": "env"})

    config = load()
    assert config.server.api_keys == ("env", "one")
    keys.write_text("two\n")
    file.write_text(f'[server]\napi_key_file = "{keys}"\nlog_level = "debug"\n[kv]\ndevice_gib = 2\n')
    mixed, others = config.taking(load(), {"server.api_keys", "server.log_level"})
    assert (mixed.server.api_keys, mixed.server.log_level, mixed.server.port) == (("env", "two"), "debug", 9)
    assert (mixed.kv.device_gib, others) == (1, ["kv.device_gib"])
