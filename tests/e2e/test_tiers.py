"""The SSD tier over the life of real processes: kill -9, SIGTERM, a full disk, a second owner, a hard cap.

The demo model, whose prompts take long enough to compute that loading pays. How much of a hit is loaded depends on
the machine's speed, so tests only count that something was.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.demo.corpus import example
from tests.e2e.daemon import ServeProcess, Wait

PROMPTS = [example(seed=i, target_tokens=600, kind="completion").prompt for i in range(6)]
"""About 38 blocks of 48 KiB each, 11 MiB in all."""
OTHERS = [example(seed=i, target_tokens=600, kind="completion").prompt for i in range(6, 12)]
FLAGS = ("demo", "--dtype", "float32", "--threads", "1", "--device-gib", "64MiB", "--prefill-chunk-tokens", "64")
"""Short chunks: a load that is late on a busy machine costs one chunk of the hit, not all of it."""


def tiers(path: Path, *flags: str, ssd: str = "160MiB", min_free: str = "0") -> tuple[str, ...]:
    given = ("--dram-gib", "64MiB", "--ssd-gib", ssd, "--ssd-path", str(path), "--ssd-min-free-gib", min_free)
    return (*FLAGS, *given, *flags)


def ask(daemon: ServeProcess, prompts: Sequence[str], *, tokens: int = 16) -> tuple[list[str], Counter[str]]:
    """Greedy answers to prompts sent one by one, and the prompt tokens that came from the cache, by tier."""
    answers, cached = [], Counter[str]()
    with daemon.client() as http:
        for prompt in prompts:
            answer = http.post("/v1/completions", json={"prompt": prompt, "max_tokens": tokens, "temperature": 0})
            assert answer.status_code == 200, answer.text
            body = answer.json()
            answers.append(body["choices"][0]["text"])
            details = body["usage"]["prompt_tokens_details"]
            assert details["cached_tokens"] == sum(details["cached_tokens_by_tier"].values())
            cached.update(details["cached_tokens_by_tier"])
    return answers, +cached


@contextmanager
def streaming(daemon: ServeProcess, prompts: Sequence[str]) -> Iterator[None]:
    """All `prompts` are being answered, token by token, while the body runs; how that ends is not looked at."""
    started = threading.Semaphore(0)

    def stream(prompt: str) -> None:
        body: dict[str, Any] = {"prompt": prompt, "max_tokens": 1000, "ignore_eos": True, "stream": True}
        try:
            with daemon.client() as http, http.stream("POST", "/v1/completions", json=body) as answer:
                for line in answer.iter_lines():
                    if line.startswith("data: {") and json.loads(line[6:]).get("choices"):
                        started.release()
        except httpx.TransportError:
            pass  # killed

    with ThreadPoolExecutor(len(prompts)) as pool:
        for prompt in prompts:
            pool.submit(stream, prompt)
        for _ in prompts:
            assert started.acquire(timeout=60), "the streams did not start"
        yield


def disk_bytes(path: Path) -> int:
    """What the files below `path` take; some may go while we look."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_blocks * 512
            except FileNotFoundError:
                continue
    return total


def on_disk(daemon: ServeProcess, blocks: int) -> None:
    """Until so many blocks are written and the index had time to say so."""
    Wait().until(lambda: daemon.metric("terrace_ssd_written_bytes_total") > blocks * 48 * 1024, "blocks are written")


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What PROMPTS and OTHERS give without any cache."""
    with ServeProcess(tmp_path_factory.mktemp("truth") / "log", *FLAGS, "--no-prefix-caching") as daemon:
        answers, cached = ask(daemon.ready(), [*PROMPTS, *OTHERS])
    assert not cached
    assert len(set(answers)) > 6, "the answers depend on the prompt"
    return answers


def test_warm_after_kill_9(tmp_path: Path, truth: list[str]) -> None:
    """Killed in the middle of streams, the next daemon is warm once it is ready, and says the same. What it keeps is
    for the owner's eyes only."""
    cache = tmp_path / "cache"
    with ServeProcess(tmp_path / "log1", *tiers(cache)) as daemon:
        assert ask(daemon.ready(), PROMPTS)[0] == truth[:6]
        on_disk(daemon, 100)
        with streaming(daemon, OTHERS):
            Wait().until(lambda: index_bytes(cache) > 50 * 96, "the index is written")
            assert daemon.stop(signal.SIGKILL) == -signal.SIGKILL
    modes = {path: stat.S_IMODE(path.lstat().st_mode) for path in cache.rglob("*")}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o700}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o600}
    with ServeProcess(tmp_path / "log2", *tiers(cache)) as daemon:
        assert daemon.ready().metric("terrace_kv_recovered_blocks_total") > 0, "ready before it was warm"
        answers, cached = ask(daemon, PROMPTS)
        assert (answers, cached["ssd"] > 0) == (truth[:6], True)
        assert ask(daemon, OTHERS)[0] == truth[6:]
        assert daemon.metric("terrace_kv_integrity_failures_total") == 0


def index_bytes(cache: Path) -> int:
    return sum(path.stat().st_size for name in ("checkpoint", "journal") for path in cache.glob(f"*/{name}"))


def test_warm_after_sigterm_and_one_owner(tmp_path: Path, truth: list[str]) -> None:
    """SIGTERM at once after the answers writes down what is hot; the next daemon serves it. Meanwhile a second one on
    the same directory ends with exit code 2 and one line that names the directory and the way out."""
    cache = tmp_path / "cache"
    with ServeProcess(tmp_path / "log1", *tiers(cache)) as daemon:
        assert ask(daemon.ready(), PROMPTS)[0] == truth[:6]
        assert daemon.stop(signal.SIGTERM) == 0
    with ServeProcess(tmp_path / "log2", *tiers(cache)) as daemon:
        assert daemon.ready().metric("terrace_kv_recovered_blocks_total") >= 6 * 30, "ready before it was warm"
        with ServeProcess(tmp_path / "log3", *tiers(cache)) as second:
            assert second.process.wait(60) == 2
        (line,) = second.said().splitlines()
        (directory,) = cache.iterdir()
        assert line.startswith("terrace: error: ")
        assert str(directory) in line
        assert "--ssd-path" in line
        answers, cached = ask(daemon, PROMPTS)
        assert (answers, cached["ssd"] > 0) == (truth[:6], True)


@contextmanager
def small_disk(path: Path, mebibytes: int) -> Iterator[Path]:
    """A file system of so many MiB at `path`; skips the test where it may not be mounted."""
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "none", str(path)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk(tmp_path: Path, truth: list[str]) -> None:
    """A cap larger than the disk, which others fill, too: no request notices, the shortage is counted, the log says
    what would fit, and the daemon ends as it should."""
    with (
        small_disk(tmp_path / "disk", 8) as disk,
        ServeProcess(tmp_path / "log", *tiers(disk / "cache", "--drain-flush-s", "1")) as daemon,
    ):
        daemon.ready()
        (disk / "others").write_bytes(bytes(6 * 2**20))
        assert ask(daemon, [*PROMPTS, *OTHERS])[0] == truth
        assert ask(daemon, PROMPTS)[0] == truth[:6]
        Wait().until(lambda: daemon.metric("terrace_ssd_io_errors_total") > 0, "the shortage to be counted")
        assert "the SSD tier does not fit and takes what there is: " in daemon.said()
        assert daemon.metric("terrace_requests_finished_total") == len(truth) + 6
        assert daemon.stop(signal.SIGTERM) == 0


def test_the_free_space_floor(tmp_path: Path, truth: list[str]) -> None:
    """With less free than must stay free nothing is written, and no request notices."""
    cache = tmp_path / "cache"
    with ServeProcess(tmp_path / "log", *tiers(cache, "--drain-flush-s", "1", min_free="1000000")) as daemon:
        assert ask(daemon.ready(), PROMPTS)[0] == truth[:6]
        assert daemon.metric("terrace_ssd_written_bytes_total") == 0
        assert daemon.stop(signal.SIGTERM) == 0
    assert disk_bytes(cache) < 2**20


def test_the_cap_holds(tmp_path: Path, truth: list[str]) -> None:
    """A load larger than the cap never takes more disk than that; a restart with a smaller cap shrinks what is there,
    and keeps to it as well. The answers are right throughout."""
    cache = tmp_path / "cache"
    for turn, mebibytes in enumerate((10, 6)):
        most, over = [0], threading.Event()

        def watch(most: list[int] = most, over: threading.Event = over) -> None:
            while not over.wait(0.005):
                most[0] = max(most[0], disk_bytes(cache))

        with ServeProcess(tmp_path / f"log{turn}", *tiers(cache, ssd=f"{mebibytes}MiB")) as daemon:
            daemon.ready()
            assert disk_bytes(cache) <= mebibytes * 2**20, "ready before the disk was within the cap"
            watcher = threading.Thread(target=watch)
            watcher.start()
            try:
                assert ask(daemon, [*PROMPTS, *OTHERS])[0] == truth
                assert ask(daemon, PROMPTS)[0] == truth[:6]
                assert daemon.stop(signal.SIGTERM) == 0
            finally:
                over.set()
                watcher.join()
        assert mebibytes * 2**20 * 0.5 < most[0] <= mebibytes * 2**20
