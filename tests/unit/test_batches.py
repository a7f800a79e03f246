"""Batches below HTTP: every line exactly once, whatever crashes, fills up, is cancelled or takes too long."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import sqlite3
import stat
from collections import Counter
from pathlib import Path
from typing import Any

import aiofiles
import pytest

from server.batches.records import Page, Status
from server.errors import (
    BodyTooLarge,
    ConfigError,
    Conflict,
    InvalidRequest,
    NotFound,
    NotReady,
    Overloaded,
    QuotaExceeded,
    StepFailed,
    StorageFull,
    TerraceError,
)
from tests.unit.batch_fake import (
    ENDPOINT,
    START,
    Clock,
    FakeAnswerer,
    becomes,
    content_of,
    ended,
    line,
    lines,
    names,
    open_vault,
    outcome,
    running,
    start,
    until,
    upload,
    watched,
)


def eager(**more: Any) -> FakeAnswerer:
    """An answerer that keeps nobody waiting."""
    answerer = FakeAnswerer(**more)
    answerer.gate.set()
    return answerer


def disk_full() -> sqlite3.OperationalError:
    """What SQLite raises then."""
    error = sqlite3.OperationalError("database or disk is full")
    error.sqlite_errorcode = sqlite3.SQLITE_FULL
    return error


async def test_a_batch_from_beginning_to_end(tmp_path: Path):
    """Every line is answered once, in the order of the input; counts, tokens, times and files say so."""
    clock = Clock()
    vault = open_vault(tmp_path, clock)
    batch_id = await start(vault, lines(10))
    async with running(vault, eager()):
        record = await ended(vault, batch_id)
    assert record.status is Status.COMPLETED
    assert await outcome(vault, record) == (names(*range(1, 11)), [])
    assert (record.total, record.completed, record.failed, record.error_file_id) == (10, 10, 0, None)
    assert (record.input_tokens, record.cached_tokens, record.output_tokens) == (30, 20, 10)
    assert record.in_progress_at == record.finalizing_at == record.completed_at == START
    assert record.expires_at == START + 86_400
    made = await vault.file("", record.output_file_id or "")
    assert (made.purpose, made.filename, made.expires_at) == ("batch_output", f"{batch_id}_output.jsonl", None)
    first = (await content_of(vault, made.id))[0]
    assert set(first) == {"id", "custom_id", "response", "error"}
    assert set(first["response"]) == {"status_code", "request_id", "body"}
    assert first["response"]["body"] == {"said": "line-1"}
    assert vault.statuses["completed"] == 1
    assert vault.lines == {"completed": 10, "failed": 0, "expired": 0, "cancelled": 0}
    await vault.aclose()


async def test_what_a_line_is_refused_for_stands_in_the_error_file(tmp_path: Path):
    """A permanent error is the line's own, in the shape of an HTTP answer; the others are not touched by it."""

    def fail(name: str) -> None:
        if name == "line-2":
            raise InvalidRequest("too long", param="prompt", code="context_length_exceeded")

    vault = open_vault(tmp_path)
    batch_id = await start(vault, lines(3))
    async with running(vault, eager(fail=fail)):
        record = await ended(vault, batch_id)
    assert await outcome(vault, record) == (names(1, 3), names(2))
    assert (record.status, record.completed, record.failed) == (Status.COMPLETED, 2, 1)
    (entry,) = await content_of(vault, record.error_file_id)
    assert entry["error"] is None
    assert entry["response"]["status_code"] == 400
    assert entry["response"]["body"]["error"]["code"] == "context_length_exceeded"
    await vault.aclose()


async def test_a_busy_server_is_no_error_of_a_line(tmp_path: Path):
    """Overloaded and not ready are waited out, however often; what the server fails on is tried three times."""
    refusals: Counter[str] = Counter()

    def fail(name: str) -> None:
        refusals[name] += 1
        if name == "line-1" and refusals[name] < 20:
            raise Overloaded("full", retry_after_s=1) if refusals[name] % 2 else NotReady("starting")
        if name == "line-2":
            raise StepFailed("the step failed")

    vault = open_vault(tmp_path)
    batch_id = await start(vault, lines(2))
    async with running(vault, eager(fail=fail)):
        record = await ended(vault, batch_id)
    assert await outcome(vault, record) == (names(1), names(2))
    assert refusals == {"line-1": 20, "line-2": 3}
    await vault.aclose()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", [("empty_file", None)]),
        (b"\n \n", [("empty_file", None)]),
        (line(1) + b"\n{nonsense\n\n" + line(2), [("invalid_json", 2)]),
        (line(1) + b"\n" + line(2) + b"\n" + line(1), [("duplicate_custom_id", 3)]),
        (line(1, url="/v1/chat/completions"), [("invalid_value", 1)]),
        (line(1, body={"prompt": "x" * 2000}) + b"\n" + line(2, url="/"), [("line_too_long", 1), ("invalid_value", 2)]),
        (lines(6), [("too_many_lines", None)]),
    ],
    ids=["empty", "blank", "json", "duplicate", "url", "long", "many"],
)
async def test_an_invalid_input_fails_the_batch(tmp_path: Path, content: bytes, expected: list[tuple[str, int | None]]):
    """Nothing is run; the errors say what is wrong and in which line, also where limits were lowered since."""
    vault = open_vault(tmp_path)
    batch_id = await start(vault, content)
    await vault.aclose()
    vault = open_vault(tmp_path, max_batch_lines=5, max_batch_line_bytes=1000)
    answerer = eager()
    async with running(vault, answerer):
        record = await ended(vault, batch_id)
    assert (record.status, record.failed_at, record.in_progress_at) == (Status.FAILED, START, None)
    assert [(error.code, error.line) for error in record.errors] == expected
    assert answerer.begun == []
    assert (record.output_file_id, record.error_file_id) == (None, None)
    await vault.aclose()


async def test_errors_of_an_input_are_bounded(tmp_path: Path):
    """However much is wrong, a hundred errors say enough."""
    vault = open_vault(tmp_path)
    batch_id = await start(vault, b"{\n" * 1000)
    async with running(vault, eager()):
        assert len((await ended(vault, batch_id)).errors) == 100
    await vault.aclose()


async def test_long_and_odd_lines_are_read_whole(tmp_path: Path):
    """Lines longer than a chunk, blank lines, CRLF and a last line without a newline are all one line each."""
    content = line(1, body={"prompt": "é" * 300_000}) + b"\r\n\n\n" + line(2) + b"\r\n" + line(3)
    vault = open_vault(tmp_path, max_batch_line_bytes=4 * 2**20)
    batch_id = await start(vault, content)
    async with running(vault, eager()):
        assert await outcome(vault, await ended(vault, batch_id)) == (names(1, 2, 3), [])
    await vault.aclose()


# --- crashes ---------------------------------------------------------------------------------------------------------


async def test_a_crash_at_any_commit_repeats_no_line_and_loses_none(tmp_path: Path):
    """The directory as it is before and after every commit of a batch: from each copy a new daemon ends the batch with
    every line exactly once, and runs none again whose result was committed."""
    copies: list[Path] = []
    source = tmp_path / "source"

    def watch(statement: str) -> None:
        # Right before a commit, and at the beginning of the next transaction, which is right after one.
        if statement.startswith(("COMMIT", "BEGIN")):
            copies.append(tmp_path / f"copy-{len(copies)}")
            shutil.copytree(source, copies[-1])

    vault = open_vault(source, below={"connect": watched(watch)}, batch_lines_in_flight=3)
    batch_id = await start(vault, lines(12))
    begun = len(copies)
    async with running(vault, eager()):
        await ended(vault, batch_id)
    await vault.aclose()
    assert len(copies) - begun >= 10
    for copy in copies[begun:]:
        vault = open_vault(copy)
        done = await vault.finished_lines(batch_id)
        over = (await vault.batch(batch_id)).status is Status.COMPLETED
        answerer = eager()
        async with running(vault, answerer):
            record = await ended(vault, batch_id)
        assert await outcome(vault, record) == (names(*range(1, 13)), []), copy
        assert (record.completed, record.failed) == (12, 0)
        again = {name for _, name in answerer.begun}
        assert again == (set() if over else set(names(*range(1, 13))) - set(names(*done)))
        await vault.aclose()
        vault = open_vault(copy)  # what the end left to be tidied up is tidied up at the next start at the latest
        assert await vault.finished_lines(batch_id) == set()
        kept = {file.id for file in (await vault.files("", None, Page(100)))[0]}
        assert kept == set(os.listdir(copy / "batches" / "content")) == {record.input_file_id, record.output_file_id}
        await vault.aclose()
        shutil.rmtree(copy)


async def test_a_shutdown_aborts_lines_and_a_start_goes_on(tmp_path: Path):
    """Lines that run at a shutdown are aborted and not counted; the next start runs them and those after them."""
    vault = open_vault(tmp_path, batch_lines_in_flight=2)
    batch_id = await start(vault, lines(5))
    answerer = FakeAnswerer()
    async with running(vault, answerer):
        await until(lambda: len(answerer.running) == 2)
    assert answerer.running == []
    await vault.aclose()
    vault = open_vault(tmp_path)
    assert (await vault.batch(batch_id)).status is Status.IN_PROGRESS
    async with running(vault, eager()):
        assert await outcome(vault, await ended(vault, batch_id)) == (names(1, 2, 3, 4, 5), [])
    await vault.aclose()


async def test_a_job_that_fails_waits_for_its_commits(tmp_path: Path):
    """A batch that is taken up again while a result of it still waits for a full disk does not run that line again."""
    full = False
    refused = 0

    def watch(statement: str) -> None:
        nonlocal refused
        if full and statement == "COMMIT":
            refused += 1
            raise disk_full()

    def fail(name: str) -> None:
        nonlocal full
        if ("", "line-2") not in answerer.begun:
            raise Overloaded("not before both are begun", retry_after_s=1)
        if name == "line-1":
            full = True
        elif not refused:
            raise Overloaded("not before a commit was refused", retry_after_s=1)
        elif full:
            raise RuntimeError("a bug")

    vault = open_vault(tmp_path, below={"connect": watched(watch)}, batch_lines_in_flight=2)
    answerer = eager(fail=fail)
    batch_id = await start(vault, lines(2))
    async with running(vault, answerer):
        await until(lambda: refused > 0 and not answerer.running)
        begun = answerer.begun.count(("", "line-1"))
        for _ in range(20):
            vault.changed.set()
            await asyncio.sleep(0.001)
        full = False
        record = await ended(vault, batch_id, poke=True)
    assert await outcome(vault, record) == (names(1, 2), [])
    assert answerer.begun.count(("", "line-1")) == begun
    await vault.aclose()


@pytest.mark.parametrize("nth", range(1, 13))
async def test_a_full_disk_at_any_commit_loses_nothing(tmp_path: Path, nth: int):
    """The nth commit finds the disk full, and so do the three after it: the batch waits, and then ends as if nothing
    had been."""
    commits = 0
    begun = False

    def watch(statement: str) -> None:
        nonlocal commits
        if begun and statement == "COMMIT":
            commits += 1
            if nth <= commits < nth + 4:
                raise disk_full()

    vault = open_vault(tmp_path, below={"connect": watched(watch)}, batch_lines_in_flight=2)
    batch_id = await start(vault, lines(8))
    begun = True
    async with running(vault, eager()):
        record = await ended(vault, batch_id, poke=True)
    assert await outcome(vault, record) == (names(*range(1, 9)), [])
    kept = {file.id for file in (await vault.files("", None, Page(100)))[0]}
    assert kept == set(os.listdir(tmp_path / "batches" / "content"))
    await vault.aclose()


class FullDisk:
    """Opens content whose writes fail with ENOSPC while `full`."""

    def __init__(self) -> None:
        self.full = False

    async def open(self, path: Path, mode: Any) -> Any:
        handle = await aiofiles.open(path, mode, buffering=0)
        plain = handle.write

        async def write(data: bytes) -> int:
            if self.full:
                raise OSError(errno.ENOSPC, "no space")
            return await plain(data[:100])  # and a short write is not an end

        handle.write = write  # type: ignore[method-assign]
        return handle


async def test_a_disk_that_fills_up_under_content_is_507_and_a_wait(tmp_path: Path):
    """An upload is refused and leaves nothing; a batch that cannot write its output waits and ends later."""
    disk = FullDisk()
    vault = open_vault(tmp_path, below={"open_content": disk.open})
    batch_id = await start(vault, lines(20))
    disk.full = True
    with pytest.raises(StorageFull) as caught:
        await upload(vault, lines(1))
    assert caught.value.status == 507
    assert len(os.listdir(tmp_path / "batches" / "content")) == 1
    async with running(vault, eager()):
        await becomes(vault, batch_id, lambda record: record.status is Status.FINALIZING)
        disk.full = False
        record = await ended(vault, batch_id, poke=True)
    assert await outcome(vault, record) == (names(*range(1, 21)), [])
    await vault.aclose()


async def test_the_floor_of_free_space_is_kept(tmp_path: Path):
    """Below it uploads and new batches are refused and running ones wait; above it they go on."""
    free = 10 * 2**30
    vault = open_vault(tmp_path, below={"free_bytes": lambda path: free}, data_min_free_gib=1.0)
    file_id = await upload(vault, lines(3))
    batch_id = (await vault.create_batch("", ENDPOINT, file_id, "fake", None, None)).id
    free = 2**29
    for refused in (upload(vault, lines(1)), vault.create_batch("", ENDPOINT, file_id, "fake", None, None)):
        with pytest.raises(StorageFull, match="data_min_free_gib"):
            await refused
    answerer = eager()
    async with running(vault, answerer):
        await becomes(vault, batch_id, lambda record: record.status is Status.IN_PROGRESS)
        await asyncio.sleep(0.01)
        assert answerer.begun == []
        free = 2 * 2**30
        assert await outcome(vault, await ended(vault, batch_id)) == (names(1, 2, 3), [])
    await vault.aclose()


async def test_an_input_that_is_gone_fails_the_batch(tmp_path: Path):
    """Content that somebody removed by hand ends the batch with a reason; it does not stand for ever."""
    vault = open_vault(tmp_path)
    batch_id = await start(vault, lines(3))
    (content,) = (tmp_path / "batches" / "content").iterdir()
    content.unlink()
    async with running(vault, eager()):
        record = await ended(vault, batch_id)
    assert (record.status, [error.code for error in record.errors]) == (Status.FAILED, ["input_file_lost"])
    await vault.aclose()


# --- cancelled and expired -------------------------------------------------------------------------------------------


async def test_cancel_keeps_what_is_done(tmp_path: Path):
    """Running lines are aborted, no more begin; finished ones stay in the output, the others are in the error file."""

    def fail(name: str) -> None:
        if name == "line-2":
            answerer.gate.clear()

    vault = open_vault(tmp_path, batch_lines_in_flight=1)
    answerer = eager(fail=fail)
    batch_id = await start(vault, lines(6))
    async with running(vault, answerer):
        await until(lambda: answerer.running == [("", "line-3")])
        cancelling = await vault.cancel("", batch_id)
        assert (cancelling.status, cancelling.cancelling_at) == (Status.CANCELLING, START)
        assert (await vault.cancel("", batch_id)).status in (Status.CANCELLING, Status.CANCELLED)
        record = await ended(vault, batch_id)
    assert (record.status, record.completed, record.failed) == (Status.CANCELLED, 2, 4)
    assert await outcome(vault, record) == (names(1, 2), names(3, 4, 5, 6))
    assert {entry["error"]["code"] for entry in await content_of(vault, record.error_file_id)} == {"batch_cancelled"}
    assert vault.lines["cancelled"] == 4
    with pytest.raises(Conflict, match="cancelled"):
        await vault.cancel("", batch_id)
    await vault.aclose()


async def test_cancel_before_anything_ran(tmp_path: Path):
    """A batch that was never begun is cancelled without a file, also when the daemon died in between."""
    vault = open_vault(tmp_path)
    batch_id = await start(vault, lines(6))
    await vault.cancel("", batch_id)
    await vault.aclose()
    vault = open_vault(tmp_path)
    async with running(vault, eager()):
        record = await ended(vault, batch_id)
    assert (record.status, record.output_file_id, record.error_file_id) == (Status.CANCELLED, None, None)
    await vault.aclose()


async def test_what_the_window_leaves_over_expires(tmp_path: Path):
    """At the end of the completion window lines that are not done go to the error file as expired, done ones stay."""
    clock = Clock()
    vault = open_vault(tmp_path, clock, batch_lines_in_flight=2)
    answerer = eager(fail=lambda name: answerer.gate.clear() if name == "line-2" else None)
    batch_id = await start(vault, lines(5))
    async with running(vault, answerer):
        await until(lambda: len(answerer.running) == 2 and not answerer.gate.is_set())
        clock.now += 86_400
        vault.changed.set()
        record = await ended(vault, batch_id)
    done, undone = await outcome(vault, record)
    assert (record.status, record.expired_at) == (Status.EXPIRED, START + 86_400)
    assert done == names(*range(1, len(done) + 1))
    assert done + undone == names(1, 2, 3, 4, 5)
    assert record.completed == len(done) >= 1
    assert {entry["error"]["code"] for entry in await content_of(vault, record.error_file_id)} == {"batch_expired"}
    assert vault.lines["expired"] == len(undone)
    await vault.aclose()


async def test_a_batch_expires_while_no_daemon_runs(tmp_path: Path):
    """Whether it was begun or not: the next start ends it as expired."""
    clock = Clock()
    vault = open_vault(tmp_path, clock)
    batch_id = await start(vault, lines(5))
    await vault.aclose()
    clock.now += 86_401
    vault = open_vault(tmp_path, clock)
    async with running(vault, eager()):
        record = await ended(vault, batch_id)
    assert (record.status, record.output_file_id) == (Status.EXPIRED, None)
    await vault.aclose()


# --- sharing ---------------------------------------------------------------------------------------------------------


async def test_batches_share_the_window(tmp_path: Path):
    """Two tenants have half of the window each, whoever came first and however many batches either has; a tenant's
    batches share its half."""
    vault = open_vault(tmp_path, batch_lines_in_flight=8)
    answerer = FakeAnswerer()
    first = [await start(vault, lines(40), "a"), await start(vault, lines(40), "a")]
    async with running(vault, answerer):
        await until(lambda: len(answerer.running) == 8)
        second = await start(vault, lines(40), "b")
        while len(answerer.begun) < 40:
            answerer.gate.set()
            await asyncio.sleep(0)
            answerer.gate.clear()
            await asyncio.sleep(0.002)
        await until(lambda: len(answerer.running) == 8)
        assert Counter(tenant for tenant, _ in answerer.running) == {"a": 4, "b": 4}
        answerer.gate.set()
        for batch_id in (*first, second):
            assert (await ended(vault, batch_id)).completed == 40
    assert answerer.most == 8
    await vault.aclose()


async def test_a_tenant_over_its_bytes_waits(tmp_path: Path):
    """Results count; at the limit the batch waits, and goes on when files are deleted."""
    content = lines(30)
    vault = open_vault(tmp_path, max_bytes_per_tenant=2 * len(content) + 500, batch_lines_in_flight=1)
    other = await upload(vault, content)
    batch_id = await start(vault, content)
    async with running(vault, eager()):
        await until(lambda: vault.lines["completed"] > 0)
        await asyncio.sleep(0.05)
        assert (await vault.batch(batch_id)).unfinished > 10
        with pytest.raises(QuotaExceeded, match="max_bytes_per_tenant"):
            await upload(vault, content)
        await vault.delete_file("", other)
        await becomes(vault, batch_id, lambda record: record.completed >= 6)
    await vault.aclose()


# --- limits and ownership --------------------------------------------------------------------------------------------


async def test_limits_are_named(tmp_path: Path):
    """Each limit refuses with its own name, and refuses nothing below it."""
    vault = open_vault(
        tmp_path,
        max_file_bytes=2000,
        max_batch_lines=10,
        max_batch_line_bytes=500,
        max_files_per_tenant=4,
        max_batches_per_tenant=1,
    )
    cases: list[tuple[bytes, str, type[TerraceError]]] = [
        (lines(11), "max_batch_lines", BodyTooLarge),
        (line(1, body={"prompt": "x" * 500}), "max_batch_line_bytes", BodyTooLarge),
        (line(1, body={"prompt": "x" * 2500}), "max_file_bytes", BodyTooLarge),
    ]
    for content, limit, kind in cases:
        with pytest.raises(kind, match=limit):
            await upload(vault, content)
    file_id = await upload(vault, lines(10))
    await vault.create_batch("", ENDPOINT, file_id, "fake", None, None)
    with pytest.raises(Overloaded, match="max_batches_per_tenant"):
        await vault.create_batch("", ENDPOINT, file_id, "fake", None, None)
    await upload(vault, lines(1))
    with pytest.raises(QuotaExceeded, match="max_files_per_tenant"):  # two are taken by what the batch will make
        await upload(vault, lines(1))
    await upload(vault, lines(1), tenant="other")
    assert len(os.listdir(tmp_path / "batches" / "content")) == 3
    await vault.aclose()


async def test_uploads_at_once_are_bounded(tmp_path: Path):
    """A tenant may have four uploads under way; a fifth is told to wait, another tenant is not."""
    vault = open_vault(tmp_path)
    gate = asyncio.Event()

    async def slow(into: Any) -> tuple[str, int]:
        await gate.wait()
        return "f", 3600

    pending = [asyncio.create_task(vault.upload("a", slow)) for _ in range(4)]
    await until(lambda: len(os.listdir(tmp_path / "batches" / "content")) == 4)
    with pytest.raises(Overloaded):
        await upload(vault, b"", tenant="a")
    await upload(vault, b"", tenant="b")
    pending[0].cancel()
    gate.set()
    await asyncio.gather(*pending, return_exceptions=True)
    await upload(vault, b"", tenant="a")
    assert len(os.listdir(tmp_path / "batches" / "content")) == 5
    await vault.aclose()


async def test_the_database_gives_back_what_results_took(tmp_path: Path):
    """What a batch needed while it ran is free again when it has ended: the database is as small as it was."""
    vault = open_vault(tmp_path)
    batch_id = await start(vault, b"".join(line(n, custom_id="x" * 10_000 + str(n)) + b"\n" for n in range(100)))
    answerer = FakeAnswerer()
    async with running(vault, answerer):
        await until(lambda: len(answerer.running) == 64)
        answerer.gate.set()
        record = await ended(vault, batch_id)
    await vault.aclose()
    await open_vault(tmp_path).aclose()
    assert (tmp_path / "batches" / "content" / str(record.output_file_id)).stat().st_size > 1_000_000
    assert (tmp_path / "batches" / "state.sqlite3").stat().st_size < 100_000


async def test_ended_batches_are_forgotten_in_the_end(tmp_path: Path):
    """Only so many ended batches of a tenant are remembered, the newest."""
    vault = open_vault(tmp_path, max_ended_batches=2)
    file_id = await upload(vault, b"")
    made = []
    async with running(vault, eager()):
        for _ in range(4):
            made.append((await vault.create_batch("", ENDPOINT, file_id, "fake", None, None)).id)
            await ended(vault, made[-1])
        await vault.create_batch("", ENDPOINT, file_id, "fake", None, None)
    known = [record.id for record in (await vault.batches("", Page(100)))[0]]
    assert known[1:] == [made[3], made[2]]
    await vault.aclose()


async def test_files_go_when_their_time_is_over(tmp_path: Path):
    """Past `expires_at` a file is gone, content and all, but not while a batch reads it."""
    clock = Clock()
    vault = open_vault(tmp_path, clock)
    idle, read = await upload(vault, lines(1)), await upload(vault, lines(2))
    batch_id = (await vault.create_batch("", ENDPOINT, read, "fake", None, 7200)).id
    clock.now += 3600
    answerer = FakeAnswerer()
    async with running(vault, answerer):
        await until(lambda: len(answerer.running) == 2)
        assert [file.id for file in (await vault.files("", None, Page(10)))[0]] == [read]
        with pytest.raises(Conflict, match=batch_id):
            await vault.delete_file("", read)
        answerer.gate.set()
        record = await ended(vault, batch_id)
        await vault.drop_expired_files()
    (left,) = (await vault.files("", None, Page(10)))[0]
    assert (left.id, left.expires_at) == (record.output_file_id, START + 3600 + 7200)
    assert os.listdir(tmp_path / "batches" / "content") == [left.id]
    with pytest.raises(NotFound):
        await vault.file("", idle)
    await vault.aclose()


async def test_a_tenant_sees_only_its_own(tmp_path: Path):
    """Another tenant's ids are unknown in every call, and its objects in no list."""
    vault = open_vault(tmp_path)
    batch_id = await start(vault, lines(1), "a")
    file_id = (await vault.batch(batch_id, "a")).input_file_id
    for strange in (
        vault.file("b", file_id),
        vault.delete_file("b", file_id),
        vault.batch(batch_id, "b"),
        vault.cancel("b", batch_id),
        vault.create_batch("b", ENDPOINT, file_id, "fake", None, None),
    ):
        with pytest.raises(NotFound):
            await strange
    assert (await vault.files("b", None, Page(10))) == ([], False)
    assert (await vault.batches("b", Page(10))) == ([], False)
    with pytest.raises(InvalidRequest, match="after"):
        await vault.files("b", None, Page(10, file_id))
    await vault.aclose()


async def test_pages_are_complete_and_disjoint(tmp_path: Path):
    """Whatever the size of a page, both ways: every object once, in the order of creation."""
    vault = open_vault(tmp_path)
    made = [await upload(vault, b"") for _ in range(5)]
    for ascending in (True, False):
        for limit in (1, 2, 5, 7):
            seen: list[str] = []
            more = True
            while more:
                page = Page(limit, seen[-1] if seen else None, ascending)
                found, more = await vault.files("", "batch", page)
                seen += [file.id for file in found]
            assert seen == (made if ascending else made[::-1])
    assert (await vault.files("", "batch_output", Page(10)))[0] == []
    await vault.aclose()


async def test_one_directory_has_one_owner(tmp_path: Path):
    """A second daemon is told who has it and what to do; then the directory is free. Nothing in it is for others."""
    vault = open_vault(tmp_path / "data")
    await start(vault, lines(1))
    with pytest.raises(ConfigError, match=r"in use by another daemon.*--data-path"):
        open_vault(tmp_path / "data")
    root = tmp_path / "data" / "batches"
    for path in (root, *root.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path
    await vault.aclose()
    await open_vault(tmp_path / "data").aclose()


async def test_a_database_of_something_else_is_a_config_error(tmp_path: Path):
    """Damage and later versions are one line that says what to do, and leave the directory free."""
    await open_vault(tmp_path).aclose()
    path = tmp_path / "batches" / "state.sqlite3"
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version=99")
    db.close()
    with pytest.raises(ConfigError, match="later version"):
        open_vault(tmp_path)
    path.write_bytes(b"nonsense" * 1000)
    with pytest.raises(ConfigError, match="not a database"):
        open_vault(tmp_path)
    path.unlink()
    await open_vault(tmp_path).aclose()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot use"):
        open_vault(tmp_path / "file")


async def test_an_upload_that_breaks_off_leaves_nothing(tmp_path: Path):
    """What its sender raises is passed on, and neither a row nor content is left."""
    vault = open_vault(tmp_path)

    async def breaks(into: Any) -> tuple[str, int]:
        await into.write(lines(3))
        raise InvalidRequest("gone")

    with pytest.raises(InvalidRequest, match="gone"):
        await vault.upload("", breaks)
    assert os.listdir(tmp_path / "batches" / "content") == []
    assert (await vault.files("", None, Page(10)))[0] == []
    await vault.aclose()


async def test_nothing_of_a_prompt_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """A bug that quotes a prompt is logged by its type alone, and the batch is taken up again."""
    caplog.set_level("DEBUG")
    failing = True

    def fail(name: str) -> None:
        if failing:
            raise RuntimeError("the prompt was: secret")

    vault = open_vault(tmp_path)
    batch_id = await start(vault, lines(1))
    async with running(vault, eager(fail=fail)):
        await until(lambda: "RuntimeError" in caplog.text)
        failing = False
        await ended(vault, batch_id, poke=True)
    assert "secret" not in caplog.text
    await vault.aclose()


def test_metadata_survives(tmp_path: Path):
    """What a client attaches to a batch is there after a restart, character by character."""

    async def body() -> None:
        vault = open_vault(tmp_path)
        file_id = await upload(vault, lines(1))
        metadata = {"näme": 'va"lue\n', "": ""}
        record = await vault.create_batch("", ENDPOINT, file_id, "fake", metadata, 3600)
        await vault.aclose()
        vault = open_vault(tmp_path)
        assert await vault.batch(record.id) == record
        assert json.dumps(metadata) == json.dumps((await vault.batch(record.id)).metadata)
        await vault.aclose()

    asyncio.run(body())
