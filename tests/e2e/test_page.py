"""The live page against a real daemon under load: over HTTP, in a browser and in a terminal."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from server.api.status.schema import DaemonStatus
from server.cli import main
from tests.e2e.browser import Browser, find_browser
from tests.e2e.daemon import Served, ServerThread, Wait, tiny_config

KEYS = {"server.api_keys": ("tenant",), "server.admin_keys": ("admin",)}
ADMIN = {"authorization": "Bearer admin"}
SIZES = {"wide": (1280, 900), "narrow": (390, 844)}


@pytest.fixture(scope="module")
def tiered(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Three small tiers, so that blocks move, and keys."""
    tiers = {
        "kv.device_gib": 0.25 / 1024,
        "kv.dram_gib": 0.5 / 1024,
        "kv.ssd_gib": 4 / 1024,
        "kv.ssd_path": str(tmp_path_factory.mktemp("ssd")),
        "kv.ssd_min_free_gib": 0,
        "scheduler.ttft_target_ms": 500,
    }
    with ServerThread(tiny_config(model_folder, **tiers, **KEYS)) as running:
        yield running


@contextmanager
def load(served: Served) -> Iterator[None]:
    """Two clients that ask one question after the other until the context ends."""
    over = threading.Event()

    def ask(client: int) -> None:
        with served.client(headers={"authorization": "Bearer tenant"}) as http:
            number = 0
            while not over.is_set():
                number += 1
                prompt = f"{client} {number % 7} " + "a question " * 20
                body = {"prompt": prompt, "max_tokens": 60, "ignore_eos": True}
                assert http.post("/v1/completions", json=body).status_code == 200

    threads = [threading.Thread(target=ask, args=(client,)) for client in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def test_the_stream_tells_what_goes_on(tiered: Served) -> None:
    """The past, then a sample every second, with requests for the admin; /status is the same and as documented."""
    with load(tiered), tiered.client(headers=ADMIN) as http, http.stream("GET", "/status/stream") as answer:
        events, name = [], ""
        for line in answer.iter_lines():
            field, _, value = line.partition(": ")
            name = value if field == "event" else name
            if field == "data":
                events.append((name, json.loads(value)))
            if len(events) == 9:
                break
        status = DaemonStatus.model_validate_json(http.get("/status").text)
    assert [name for name, _ in events] == ["history", *["status", "live"] * 4]
    samples = [data for name, data in events if name == "status"]
    times = [sample["time"] for sample in samples]
    assert times == sorted(set(times))
    assert samples[-1]["tokens"]["generated_per_s"] > 0
    assert sum(samples[-1]["tokens"]["prompt_last_minute"].values()) > 0
    assert max(data["count"] for name, data in events if name == "live") >= 1
    assert [tier.name for tier in status.tiers] == ["device", "dram", "ssd"]
    assert status.state == "ready"
    assert status.verdicts[2].answer == "Nothing"


@pytest.fixture(scope="module")
def chromium() -> str:
    path = find_browser()
    if path is None:
        pytest.skip("no Chromium on the path (Debian: the package chromium)")
    return path


@pytest.mark.parametrize(("size", "dark"), [("wide", False), ("narrow", True)])
def test_the_page_in_a_browser(chromium: str, tiered: Served, tmp_path: Path, size: str, dark: bool) -> None:
    """It asks for a key, shows numbers that change by the second, fits the window, asks nobody but its daemon, and has
    no complaint; an action is done only after a yes."""
    with load(tiered), Browser(chromium, tmp_path / "profile") as page:
        page.open(f"{tiered.url}/ui", *SIZES[size], dark=dark)
        seen = Wait()
        seen.until(lambda: page.value("document.querySelector('#key-dialog')?.open") is True, "it asks for a key")
        complaints = [text for text in page.complaints if "401" not in text]  # the browser notes the refusal itself
        assert complaints == []
        page.complaints.clear()
        page.value("document.querySelector('#key-input').value = 'admin'")
        page.value("document.querySelector('#key-form button.primary').click()")
        seen.until(lambda: page.value("document.querySelector('#link').textContent") == "live", "it is connected")
        times = set()

        def changed() -> bool:
            times.add(page.value("document.querySelector('#uptime').textContent"))
            return len(times) >= 3

        seen.until(changed, "two updates came")
        seen.until(lambda: page.value("document.querySelectorAll('.chart canvas').length") == 8, "all is drawn")
        verdicts = page.value("[...document.querySelectorAll('.verdict h2')].map((node) => node.textContent)")
        assert verdicts == ["Is it serving well?", "Is tiering paying?", "What is wrong?"]
        assert page.value("document.documentElement.scrollWidth") == SIZES[size][0]
        labels = page.value("[...document.querySelectorAll('.plot')].map((node) => node.getAttribute('aria-label'))")
        assert all("now:" in label for label in labels)
        page.value("document.querySelector('#clear-button').click()")
        assert page.value("document.querySelector('#ask-dialog').open")
        page.value("document.querySelector('#ask-dialog button[value=no]').click()")
        assert page.value("document.querySelector('#steer-result').textContent") == ""
        page.value("document.querySelector('#clear-button').click()")
        page.value("document.querySelector('#ask-yes').click()")
        result = "document.querySelector('#steer-result').textContent"
        seen.until(lambda: "blocks are forgotten" in page.value(result), "the cache is emptied")
        page.screenshot(tmp_path / "page.png")
        assert page.complaints == []
        assert {url for url in page.requests if not url.startswith(tiered.url)} == set()
        assert sum(url.endswith("/v1/cache/clear") for url in page.requests) == 1
    assert (tmp_path / "page.png").stat().st_size > 50_000


def test_the_documentation_in_a_browser(chromium: str, tiered: Served, tmp_path: Path) -> None:
    """/docs shows every route and every shape with nothing but what the daemon sends."""
    with Browser(chromium, tmp_path / "profile") as page, tiered.client() as http:
        page.open(f"{tiered.url}/docs", *SIZES["wide"])
        document = http.get("/openapi.json").json()
        routes = sum(len(methods) for methods in document["paths"].values())
        count = "document.querySelectorAll('#routes details').length"
        Wait().until(lambda: page.value(count) == routes, "every route is shown")
        assert page.value("document.querySelectorAll('#shapes details').length") == len(
            document["components"]["schemas"]
        )
        assert page.complaints == []
        assert {url for url in page.requests if not url.startswith(tiered.url)} == set()


def test_top_once_is_plain_text(tiered: Served, capsys: pytest.CaptureFixture[str]) -> None:
    """One look, without control characters, with what the page shows."""
    assert main(["top", tiered.url, "--key", "admin", "--once"]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    for words in (
        "tiny",
        "Is it serving well?",
        "What is wrong?",
        "device",
        "dram",
        "ssd",
        "first token",
        "device → dram",
    ):
        assert words in shown


def test_top_says_what_is_wrong(
    tiered: Served, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No daemon, no key, a wrong key, no URL: one line each, exit code 2. The key may come from the environment."""
    for arguments, words in (
        (["http://127.0.0.1:9"], "is `terrace serve` running there?"),
        ([tiered.url], "set TERRACE_KEY"),
        ([tiered.url, "--key", "guess"], "wants a key that it knows"),
        (["http://[::"], "no URL"),
    ):
        assert main(["top", *arguments, "--once"]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("terrace: error: ")
        assert captured.err.count("\n") == 1
        assert words in captured.err
        assert captured.out == ""
    monkeypatch.setenv("TERRACE_KEY", "tenant")
    assert main(["top", tiered.url, "--once"]) == 0


def test_top_goes_on_until_it_is_interrupted(tiered: Served) -> None:
    """On a terminal it draws every second; Ctrl-C ends it with 0 and gives the terminal back."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "server", "top", tiered.url, "--key", "admin"]
    environ = os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environ)
    os.close(theirs)
    shown = b""
    while shown.count(b"What is wrong?") < 3:
        shown += os.read(ours, 65536)
    process.send_signal(signal.SIGINT)
    rest = b""
    with suppress(OSError):  # how a terminal says that nobody is on its other side
        while chunk := os.read(ours, 65536):
            rest += chunk
    assert process.wait(30) == 0
    assert b"\x1b[?1049l" in rest, "the alternate screen is left"
    assert b"Traceback" not in shown + rest
    os.close(ours)
