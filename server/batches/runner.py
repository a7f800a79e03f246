"""Runs batches: a few lines of all of them at a time, every line exactly once, however often the daemon dies.

Loop thread. It knows lines as bytes with a name and leaves what is in them to the `Answerer`. The store is the truth: a
batch is taken up where its committed results leave off, so a start after a crash is an ordinary start. A line whose
result was not committed is run again, one whose result was is never run again; nothing in between can be seen, because
a result is written nowhere else until the batch ends.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
import sys
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Container, Iterator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass, field
from math import ceil
from typing import Any
from uuid import uuid4

from server.batches.content import ContentWriter, lines_of
from server.batches.records import Answer, Answerer, BatchRecord, LineError, LineResult, Status
from server.batches.vault import Vault
from server.errors import NotFound, NotReady, Overloaded, StorageFull, TerraceError, error_body

log = logging.getLogger("terrace.batches")

MAX_TRIES = 3
"""How often a line is run that the server fails on: a line that kills its step must not do so for ever."""
MAX_ERRORS = 100
"""Errors shown of an input file."""
CHECKED_LINES = 256
CHECKED_BYTES = 2**20
"""Lines that are checked in one go on a thread: about 10 ms."""
ASSEMBLED_LINES = 32
"""Results in memory at once while a file is put together."""
LOOK_S = 60.0
"""At least that often the runner looks for what is past its time, and takes up again what failed."""
SETTLE_S = 5.0
"""How long a shutdown waits for results that are ready to be committed."""
_STORAGE_ERRORS = (StorageFull, OSError, sqlite3.OperationalError)
_EXPIRED = {"code": "batch_expired", "message": "The line could not be run before the completion window ended."}
_CANCELLED = {"code": "batch_cancelled", "message": "The batch was cancelled before the line was run."}


Lines = AsyncGenerator[tuple[int, bytes], None]
"""(number from 1, line) of an input file."""


def backoff_s(tries: int) -> float:
    """Pause before try number `tries` + 1 of what was refused for now: 0.25 s, doubled up to 16 s."""
    return float(min(16.0, 0.25 * 2 ** min(tries, 10)))


class Window:
    """The lines in flight. Tenants whose batches have lines left share the places equally, and a tenant's batches its
    share, rounded up; of those below their share, who has fewest gets the next place, or who was served longest ago.

    A share is kept free for its owner: it asks for one place at a time, and places come free in groups, one group a
    commit. Loop thread.
    """

    def __init__(self, size: int) -> None:
        self._size = self._free = size
        self._members: Counter[str] = Counter()
        self._held: Counter[tuple[str, ...]] = Counter()
        self._served: dict[tuple[str, ...], int] = {}
        self._turn = 0
        self._waiting: dict[asyncio.Future[None], tuple[str, str]] = {}

    @contextmanager
    def sharing(self, tenant: str, batch_id: str) -> Iterator[None]:
        """The batch has lines left to run."""
        self._members[tenant] += 1
        try:
            yield
        finally:
            self._members[tenant] -= 1
            self._members = +self._members
            self._served.pop((tenant, batch_id), None)
            self._grant()

    async def acquire(self, tenant: str, batch_id: str) -> None:
        """Waits for a place, which `release` gives back. The batch is `sharing`."""
        future = asyncio.get_running_loop().create_future()
        self._waiting[future] = (tenant, batch_id)
        self._grant()
        try:
            await future
        except asyncio.CancelledError:
            if self._waiting.pop(future, None) is None:
                self.release(tenant, batch_id)
            raise

    def release(self, tenant: str, batch_id: str) -> None:
        self._free += 1
        for holder in ((tenant,), (tenant, batch_id)):
            self._held[holder] -= 1
            if not self._held[holder]:
                del self._held[holder]
        self._grant()

    def _grant(self) -> None:
        while self._free and (below := [future for future in self._waiting if self._below_share(future)]):
            future = min(below, key=self._rank)
            tenant, batch_id = self._waiting.pop(future)
            self._free -= 1
            self._turn += 1
            for holder in ((tenant,), (tenant, batch_id)):
                self._held[holder] += 1
                self._served[holder] = self._turn
            future.set_result(None)

    def _below_share(self, future: asyncio.Future[None]) -> bool:
        tenant, batch_id = self._waiting[future]
        share = ceil(self._size / max(1, len(self._members)))
        part = ceil(share / max(1, self._members[tenant]))
        return self._held[tenant,] < share and self._held[tenant, batch_id] < part

    def _rank(self, future: asyncio.Future[None]) -> tuple[int, ...]:
        tenant, batch_id = self._waiting[future]
        holders = ((tenant,), (tenant, batch_id))
        return tuple(number for holder in holders for number in (self._held[holder], self._served.get(holder, 0)))


class Commits:
    """Results on their way to disk. While one group is committed the next gathers: a commit holds as many as came."""

    def __init__(self, vault: Vault, backoff: Callable[[int], float]) -> None:
        self._vault = vault
        self._backoff = backoff
        self._waiting: list[tuple[LineResult, asyncio.Future[None]]] = []
        self._pending: Counter[str] = Counter()
        self._some = asyncio.Event()
        self._landed = asyncio.Event()

    async def add(self, result: LineResult) -> None:
        """Returns when `result` is on disk. Whoever is cancelled here finds it committed all the same, once `settled`
        has returned."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((result, future))
        self._pending[result.batch_id] += 1
        self._some.set()
        await future

    async def settled(self, batch_id: str) -> None:
        """Returns when no result of the batch waits or is being committed."""
        while self._pending[batch_id]:
            await self._landed.wait()

    async def all_settled(self) -> None:
        """The same for every batch."""
        while self._pending.total():
            await self._landed.wait()

    async def run(self) -> None:
        """For ever. A disk that fails or is full holds up everything and loses nothing."""
        while True:
            await self._some.wait()
            self._some.clear()
            group, self._waiting = self._waiting, []
            await self._commit([result for result, _ in group])
            for result, future in group:
                self._pending[result.batch_id] -= 1
                if not future.done():
                    future.set_result(None)
            self._pending = +self._pending
            self._landed.set()
            self._landed = asyncio.Event()

    async def _commit(self, results: list[LineResult]) -> None:
        tries = 0
        while True:
            try:
                return await self._vault.add_results(results)
            except _STORAGE_ERRORS as error:
                if not tries:
                    log.warning("results of batches cannot be committed and wait: %s", error)
            await asyncio.sleep(self._backoff(tries))
            tries += 1


@dataclass(slots=True)
class _Job:
    """A batch in work. `stop`: no more lines; it was cancelled or is past its time."""

    record: BatchRecord
    stop: asyncio.Event = field(default_factory=asyncio.Event)


class Runner:
    def __init__(self, vault: Vault, answerer: Answerer, backoff: Callable[[int], float] = backoff_s) -> None:
        self._vault = vault
        self._answerer = answerer
        self._backoff = backoff
        self._window = Window(vault.limits.batch_lines_in_flight)
        self._commits = Commits(vault, backoff)
        self._jobs: dict[str, tuple[_Job, asyncio.Task[None]]] = {}

    async def run(self) -> None:
        """Until cancelled: then running lines are aborted, and go on as if new at the next start."""
        committing = asyncio.create_task(self._commits.run())
        try:
            while True:
                self._vault.changed.clear()
                wait_s = await self._look()
                looking = asyncio.create_task(self._vault.changed.wait())
                await asyncio.wait({looking, committing}, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
                looking.cancel()
                if committing.done():
                    committing.result()  # raises: the books are wrong, and more results would not mend them
        finally:
            tasks = [task for _, task in self._jobs.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            with suppress(TimeoutError):
                async with asyncio.timeout(SETTLE_S):
                    await self._commits.all_settled()
            committing.cancel()
            await asyncio.gather(committing, return_exceptions=True)

    async def _look(self) -> float:
        """Compares what is open with what is in work, and starts and stops jobs; seconds until it should look again."""
        try:
            await self._vault.drop_expired_files()
            records = await self._vault.open_batches()
        except _STORAGE_ERRORS as error:
            log.warning("batches cannot be looked at: %s", error)
            return LOOK_S
        left_s = LOOK_S
        for record in records:
            if record.id not in self._jobs:
                self._start(_Job(record))
            job, _ = self._jobs[record.id]
            if record.status is Status.CANCELLING or record.expires_at <= self._vault.now:
                job.stop.set()
            else:
                left_s = min(left_s, record.expires_at - self._vault.now)
        return max(0.1, left_s)

    def _start(self, job: _Job) -> None:
        task = asyncio.create_task(self._work(job))
        self._jobs[job.record.id] = job, task

    async def _work(self, job: _Job) -> None:
        """One batch from where it stands to its end. After an error it is taken up again at a later look."""
        record = job.record
        try:
            await self._commits.settled(record.id)
            if record.status is Status.VALIDATING:
                await _unless(job.stop, self._validate(record))
                record = await self._vault.batch(record.id)
            if record.status is Status.IN_PROGRESS:
                await _unless(job.stop, self._run_lines(record))
            await self._finish(record.id)
        except NotFound:
            gone = LineError("input_file_lost", "the content of the input file is gone from the disk", None, None)
            await self._vault.fail(record.id, [gone])
            await self._vault.drop_results(record.id)
        except Exception as error:  # noqa: BLE001 - one batch must not take the others with it
            log.error("batch %s waits and is tried again: %s", record.id, _reason(error))
        finally:
            del self._jobs[record.id]

    # --- validating --------------------------------------------------------------------------------------------------

    async def _validate(self, record: BatchRecord) -> None:
        """In progress, or failed with what is wrong in which line."""
        limit_bytes = self._vault.limits.max_batch_line_bytes
        checker = _Checker(self._answerer, record.endpoint, limit_bytes)
        group: list[tuple[int, bytes]] = []
        size = 0
        async with aclosing(self._lines(record, limit_bytes)) as lines:
            async for number, line in lines:
                group.append((number, line))
                size += len(line)
                if len(group) == CHECKED_LINES or size >= CHECKED_BYTES:
                    await asyncio.to_thread(checker.check, group)
                    group, size = [], 0
                if len(checker.errors) >= MAX_ERRORS:
                    break
        await asyncio.to_thread(checker.check, group)
        total, limit = len(checker.names), self._vault.limits.max_batch_lines
        if total > limit:
            checker.errors.append(LineError("too_many_lines", f"max_batch_lines is {limit}; split it", None, None))
        if not total and not checker.errors:
            checker.errors.append(LineError("empty_file", "the input file has no lines", None, None))
        if checker.errors:
            await self._vault.fail(record.id, checker.errors[:MAX_ERRORS])
            log.info("batch %s failed: its input is not valid", record.id)
        else:
            await self._vault.begin(record.id, total)
            log.info("batch %s: %d lines", record.id, total)

    async def _lines(self, record: BatchRecord, limit_bytes: int = sys.maxsize) -> Lines:
        """The lines of the input; once they are valid, of whatever length."""
        async with (
            self._vault.reading(record.input_file_id) as handle,
            aclosing(lines_of(handle, limit_bytes)) as lines,
        ):
            async for number, line in lines:
                yield number, line

    # --- running -----------------------------------------------------------------------------------------------------

    async def _run_lines(self, record: BatchRecord) -> None:
        """Every line that has no result gets one. A line keeps its place in the window until its result is on disk, so
        the window bounds what a slow disk lets pile up in memory too."""
        done = await self._vault.finished_lines(record.id)
        async with asyncio.TaskGroup() as group, aclosing(self._lines(record)) as lines:
            more = True
            while more:
                await self._room(record)
                with self._window.sharing(record.tenant, record.id):
                    more = await self._start_lines(record, lines, done, group)

    async def _start_lines(
        self, record: BatchRecord, lines: Lines, done: Container[int], group: asyncio.TaskGroup
    ) -> bool:
        """Starts those of `lines` that are not done while there is room for results; whether there may be more."""
        async for number, line in lines:
            if number in done:
                continue
            await self._window.acquire(record.tenant, record.id)
            task = group.create_task(self._run_line(record, number, line))
            task.add_done_callback(lambda _: self._window.release(record.tenant, record.id))
            if not await self._vault.has_room(record.tenant):
                return True
        return False

    async def _room(self, record: BatchRecord) -> None:
        """Returns when there is room for more results, on the disk and within the quota."""
        tries = 0
        while not await self._vault.has_room(record.tenant):
            if not tries:
                log.warning("batch %s waits for room: max_bytes_per_tenant or data_min_free_gib is reached", record.id)
            await asyncio.sleep(self._backoff(tries))
            tries += 1

    async def _run_line(self, record: BatchRecord, number: int, line: bytes) -> None:
        name = _name(line)
        try:
            answer = await self._answered(record, line)
            content, ok, tokens = _answered_line(name, 200, answer.body), True, answer.tokens
            result = LineResult(record.id, number, ok, content, tokens)
        except TerraceError as error:
            body = json.dumps(error_body(error), separators=(",", ":")).encode()
            result = LineResult(record.id, number, False, _answered_line(name, error.status, body))
        await self._commits.add(result)

    async def _answered(self, record: BatchRecord, line: bytes) -> Answer:
        """The answer, tried again while the server has no room or is not ready, and a few times when it failed. Raises
        TerraceError, which is then the answer."""
        refused = failed = 0
        while True:
            try:
                return await self._answerer.answer(record.endpoint, line, record.tenant)
            except (Overloaded, NotReady):
                refused += 1
            except TerraceError as error:
                failed += 1
                if error.status < 500 or failed == MAX_TRIES:
                    raise
            await asyncio.sleep(self._backoff(refused + failed - 1))

    # --- the end -----------------------------------------------------------------------------------------------------

    async def _finish(self, batch_id: str) -> None:
        """Ends the batch, which runs no line any more: complete, cancelled, or past its time."""
        await self._commits.settled(batch_id)
        record = await self._vault.batch(batch_id)
        if record.status is Status.IN_PROGRESS and not record.unfinished:
            record = await self._vault.finalize(batch_id)
        if record.status is Status.FINALIZING:
            await self._end(record, Status.COMPLETED, None)
        elif record.status is Status.CANCELLING:
            await self._end(record, Status.CANCELLED, _CANCELLED)
        elif record.status in (Status.IN_PROGRESS, Status.VALIDATING):
            assert record.expires_at <= self._vault.now, "a batch stopped for no reason"
            await self._end(record, Status.EXPIRED, _EXPIRED)

    async def _end(self, record: BatchRecord, status: Status, unfinished: dict[str, str] | None) -> None:
        """Puts the files together and ends the batch. Lines without a result go to the error file as `unfinished`."""
        output, error = _Made(self._vault), _Made(self._vault)
        try:
            if record.in_progress_at is not None:  # else no line was ever looked at
                results = _Results(self._vault, record.id)
                async with aclosing(self._lines(record)) as lines:
                    async for number, line in lines:
                        result = await results.of(number)
                        if result is not None:
                            await (output if result.ok else error).write(result.content)
                        else:
                            assert unfinished is not None, "a complete batch lacks a result"
                            await error.write(_unrun_line(_name(line), unfinished))
            made = await output.sealed(), await error.sealed()
        except BaseException:
            await output.discard()
            await error.discard()
            raise
        ended = await self._vault.end(record, status, *made)
        log.info("batch %s is %s: %d completed, %d failed", record.id, status, ended.completed, ended.failed)
        await self._vault.drop_results(record.id)


async def _unless(stop: asyncio.Event, work: Any) -> None:
    """`work` to its end, or until `stop` is set; then it is cancelled and over."""
    working, stopping = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        for task in (working, stopping):
            task.cancel()
        await asyncio.gather(working, stopping, return_exceptions=True)


class _Checker:
    """What is wrong in an input file. One thread at a time."""

    def __init__(self, answerer: Answerer, endpoint: str, limit_bytes: int) -> None:
        self.errors: list[LineError] = []
        self.names: dict[str, int] = {}
        """custom_id -> line. At most max_batch_lines of them, and the lines of one more group."""
        self._answerer = answerer
        self._endpoint = endpoint
        self._limit_bytes = limit_bytes

    def check(self, lines: list[tuple[int, bytes]]) -> None:
        for number, line in lines:
            if len(line) > self._limit_bytes:
                words = f"the line is longer than max_batch_line_bytes, {self._limit_bytes}"
                self.errors.append(LineError("line_too_long", words, None, number))
                continue
            try:
                name = self._answerer.check(self._endpoint, line)
            except TerraceError as error:
                self.errors.append(LineError(error.code, error.message, error.param, number))
                continue
            first = self.names.setdefault(name, number)
            if first != number:
                words = f"'custom_id' must be unique, line {first} has the same"
                self.errors.append(LineError("duplicate_custom_id", words, "custom_id", number))


class _Results:
    """The results of one batch by ascending line number, a few in memory at a time."""

    def __init__(self, vault: Vault, batch_id: str) -> None:
        self._vault = vault
        self._batch_id = batch_id
        self._page: list[LineResult] = []
        self._last = 0
        self._more = True

    async def of(self, line: int) -> LineResult | None:
        if not self._page and self._more:
            self._page = await self._vault.results(self._batch_id, self._last, ASSEMBLED_LINES)
            self._more = bool(self._page)
            self._page.reverse()
        if not self._page or self._page[-1].line != line:
            return None
        self._last = line
        return self._page.pop()


class _Made:
    """A file that a batch makes, if it has any line."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault
        self._writer: ContentWriter | None = None

    async def write(self, line: bytes) -> None:
        if self._writer is None:
            self._writer = await self._vault.create_content()
        await self._writer.write(line + b"\n")

    async def sealed(self) -> ContentWriter | None:
        if self._writer is not None:
            await self._writer.seal()
        return self._writer

    async def discard(self) -> None:
        if self._writer is not None:
            await self._writer.discard()


def _reason(error: Exception) -> str:
    """For the log: of an error that is not about storage only the type, because its message may quote a prompt."""
    inner = error.exceptions[0] if isinstance(error, ExceptionGroup) else error
    return str(inner) if isinstance(inner, _STORAGE_ERRORS) else type(inner).__name__


def _name(line: bytes) -> str:
    """The `custom_id` of a line that was found valid once."""
    return str(json.loads(line)["custom_id"])


def _answered_line(name: str, status: int, body: bytes) -> bytes:
    """A line of the output or error file around an HTTP answer, `body`, which is JSON already."""
    head = {"id": f"batch_req_{uuid4().hex}", "custom_id": name}
    start = json.dumps(head, separators=(",", ":"))[:-1]
    middle = f',"response":{{"status_code":{status},"request_id":"{uuid4().hex}","body":'
    return start.encode() + middle.encode() + body + b'},"error":null}'


def _unrun_line(name: str, error: dict[str, str]) -> bytes:
    """A line of the error file for a request that never got an answer."""
    line = {"id": f"batch_req_{uuid4().hex}", "custom_id": name, "response": None, "error": error}
    return json.dumps(line, separators=(",", ":")).encode()
