"""Files and batches that survive restarts: the store on its one thread, and the content beside it. Loop thread.

One directory, one owner. What a method has returned is on disk; what a crash interrupts has not happened.

```
<data_path>/batches/    0700
    LOCK                flock of the owner; survives no crash, needs no cleaning
    state.sqlite3       every file, batch and result (store.py)
    content/<file id>   0600; ids are random, no name of a client's is ever a path
```
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from server.batches.content import ContentDirectory, ContentWriter, Handle, Open
from server.batches.records import WINDOW_S, BatchRecord, FileRecord, LineError, LineResult, Outcome, Page, Status
from server.batches.store import Store
from server.config import BatchConfig
from server.errors import BodyTooLarge, ConfigError, NotFound, Overloaded, StorageFull, TerraceError
from server.ownership import DirectoryLock

log = logging.getLogger("terrace.batches")

UPLOADS_PER_TENANT = 4
"""Uploads of one tenant at once: each may hold a file of the largest size that no quota counts yet."""
FILE_TTL_S = 30 * 86_400
"""How long an uploaded file is kept that says nothing of it, as with OpenAI."""

T = TypeVar("T")


class Upload:
    """One file on its way in. What it breaks of the limits is said as soon as it can be known."""

    def __init__(self, writer: ContentWriter, limits: BatchConfig) -> None:
        self._writer = writer
        self._limits = limits
        self._lines = 0
        self._line_bytes = 0

    async def write(self, data: bytes) -> None:
        """Raises BodyTooLarge that names the limit, StorageFull, OSError."""
        limits = self._limits
        if self._writer.bytes + len(data) > limits.max_file_bytes:
            raise BodyTooLarge(
                f"the file is larger than max_file_bytes, {limits.max_file_bytes}; split it", param="file"
            )
        for number, piece in enumerate(data.split(b"\n")):
            if number:
                self._lines += 1
                self._line_bytes = 0
            self._line_bytes += len(piece)
            if self._line_bytes > limits.max_batch_line_bytes:
                raise BodyTooLarge(
                    f"line {self._lines + 1} is longer than max_batch_line_bytes, {limits.max_batch_line_bytes}",
                    param="file",
                )
        if self._lines + bool(self._line_bytes) > limits.max_batch_lines:
            raise BodyTooLarge(
                f"the file has more lines than max_batch_lines, {limits.max_batch_lines}; split it", param="file"
            )
        await self._writer.write(data)


class Vault:
    def __init__(
        self,
        limits: BatchConfig,
        data_path: Path,
        wall_clock: Callable[[], float],
        *,
        connect: Callable[..., sqlite3.Connection] = sqlite3.connect,
        open_content: Open | None = None,
        free_bytes: Callable[[Path], int] | None = None,
    ) -> None:
        """Takes the directory over, and removes what a crash left half made. `connect`, `open_content` and `free_bytes`
        stand for what is below, for tests. Raises ConfigError when the directory is unusable or another daemon's."""
        root = data_path / "batches"
        self.limits = limits
        self.changed = asyncio.Event()
        """A batch is new or is to be cancelled: whoever runs batches should look."""
        self.lines: Counter[str] = Counter({outcome.value: 0 for outcome in Outcome})
        """Lines by what became of them, since the start."""
        self._wall_clock = wall_clock
        self._uploads: Counter[str] = Counter()
        try:
            self._lock = DirectoryLock(root, "batch.data_path")
        except OSError as error:
            raise ConfigError(f"cannot use {root}: {error.strerror}", param="batch.data_path") from error
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        try:
            database = root / "state.sqlite3"
            database.touch(mode=0o600)
            self._store = self._thread.submit(Store, database, limits, connect).result()
            min_free_bytes = int(limits.data_min_free_gib * 2**30)
            self._content = ContentDirectory(root / "content", min_free_bytes, open_content, free_bytes)
            self._recover()
        except OSError as error:
            self._let_go()
            raise ConfigError(f"cannot use {root}: {error.strerror}", param="batch.data_path") from error
        except BaseException:
            self._let_go()
            raise

    def _recover(self) -> None:
        gone = self._content.sweep(self._thread.submit(self._store.file_ids).result())
        for batch_id in self._thread.submit(self._store.stale).result():
            while self._thread.submit(self._store.prune, batch_id).result():
                pass
        self._statuses = self._thread.submit(self._store.statuses).result()
        open_batches = len(self._thread.submit(self._store.open_batches).result())
        log.info("batches: %d go on; %d half made files removed", open_batches, gone)

    def _let_go(self) -> None:
        self._thread.shutdown()
        self._lock.release()

    async def aclose(self) -> None:
        """After whoever runs batches. The directory is free for another daemon."""
        await self._do(self._store.close)
        self._let_go()

    @property
    def statuses(self) -> Mapping[str, int]:
        """How many batches are remembered in each status."""
        return self._statuses

    @property
    def now(self) -> int:
        """Unix seconds."""
        return int(self._wall_clock())

    async def _do(self, call: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *arguments)

    async def _change(self, call: Callable[..., T], *arguments: Any) -> T:
        """`call`, which changes the status of a batch."""

        def change() -> tuple[T, dict[str, int]]:
            return call(*arguments), self._store.statuses()

        result, self._statuses = await self._do(change)
        return result

    # --- files -------------------------------------------------------------------------------------------------------

    @contextmanager
    def _uploading(self, tenant: str) -> Iterator[None]:
        if self._uploads[tenant] >= UPLOADS_PER_TENANT:
            raise Overloaded(f"{UPLOADS_PER_TENANT} uploads are under way; wait for one", retry_after_s=5)
        self._uploads[tenant] += 1
        try:
            yield
        finally:
            self._uploads[tenant] -= 1

    async def upload(self, tenant: str, receive: Callable[[Upload], Awaitable[tuple[str, int]]]) -> FileRecord:
        """Takes in one file: `await receive(upload)` writes all of it and returns (filename, seconds to keep it).

        Raises Overloaded, QuotaExceeded, BodyTooLarge, StorageFull, and what `receive` raises; then there is no file.
        """
        with self._uploading(tenant):
            await self._do(self._store.check_room, tenant)
            writer = await self._content.create(f"file-{secrets.token_hex(16)}")
            try:
                filename, ttl_s = await receive(Upload(writer, self.limits))
                await writer.seal()
            except BaseException:
                await writer.discard()
                raise
            record = FileRecord(writer.id, tenant, writer.bytes, self.now, filename, "batch", self.now + ttl_s)
            try:
                await self._do(self._store.add_file, record)
            except (TerraceError, sqlite3.Error):  # not when cancelled: it may have been committed
                await writer.discard()
                raise
            return record

    async def file(self, tenant: str, file_id: str) -> FileRecord:
        """Raises NotFound."""
        return await self._do(self._store.file, tenant, file_id)

    async def files(self, tenant: str, purpose: str | None, page: Page) -> tuple[list[FileRecord], bool]:
        """One page, and whether there is more. Raises InvalidRequest."""
        return await self._do(self._store.files, tenant, purpose, page)

    async def delete_file(self, tenant: str, file_id: str) -> None:
        """Raises NotFound, Conflict."""
        await self._do(self._store.delete_file, tenant, file_id)
        await self._content.remove(file_id)

    async def drop_expired_files(self) -> None:
        """Files past their time are gone, but for those that a batch reads."""
        for file_id in await self._do(self._store.drop_expired_files, self.now):
            await self._content.remove(file_id)

    def reading(self, file_id: str) -> AbstractAsyncContextManager[Handle]:
        """The content of a file that exists. Raises NotFound when it was deleted since."""
        return self._reading(file_id)

    @asynccontextmanager
    async def _reading(self, file_id: str) -> AsyncIterator[Handle]:
        try:
            async with self._content.reading(file_id) as handle:
                yield handle
        except FileNotFoundError:
            raise NotFound(f"there is no file {file_id!r}", param="file_id", code="file_not_found") from None

    # --- batches, as clients see them --------------------------------------------------------------------------------

    async def create_batch(
        self,
        tenant: str,
        endpoint: str,
        input_file_id: str,
        model: str,
        metadata: Mapping[str, str] | None,
        output_ttl_s: int | None,
    ) -> BatchRecord:
        """Raises NotFound, InvalidRequest, Overloaded, QuotaExceeded, StorageFull."""
        await self._content.check_room(0)
        now = self.now
        record = BatchRecord(
            id=f"batch_{secrets.token_hex(16)}",
            tenant=tenant,
            endpoint=endpoint,
            input_file_id=input_file_id,
            model=model,
            metadata=metadata,
            output_ttl_s=output_ttl_s,
            created_at=now,
            expires_at=now + WINDOW_S,
        )
        await self._change(self._store.add_batch, record)
        self.changed.set()
        return record

    async def batch(self, batch_id: str, tenant: str | None = None) -> BatchRecord:
        """One batch; of `tenant` only, if given. Raises NotFound."""
        return await self._do(self._store.batch, batch_id, tenant)

    async def batches(self, tenant: str, page: Page) -> tuple[list[BatchRecord], bool]:
        """One page, and whether there is more. Raises InvalidRequest."""
        return await self._do(self._store.batches, tenant, page)

    async def cancel(self, tenant: str, batch_id: str) -> BatchRecord:
        """Raises NotFound, Conflict."""
        record = await self._change(self._store.cancel, tenant, batch_id, self.now)
        self.changed.set()
        return record

    # --- batches, as their runner sees them --------------------------------------------------------------------------

    async def open_batches(self) -> list[BatchRecord]:
        """Every batch that has not ended, oldest first."""
        return await self._do(self._store.open_batches)

    async def begin(self, batch_id: str, total: int) -> BatchRecord:
        """The input is valid and has `total` lines."""
        return await self._change(self._store.begin, batch_id, total, self.now)

    async def fail(self, batch_id: str, errors: Sequence[LineError]) -> BatchRecord:
        """The input is not valid, or gone."""
        return await self._change(self._store.fail, batch_id, errors, self.now)

    async def finalize(self, batch_id: str) -> BatchRecord:
        """Every line has its result."""
        return await self._change(self._store.finalize, batch_id, self.now)

    async def has_room(self, tenant: str) -> bool:
        """Whether results of this tenant may be added: the disk has room, and so has its quota."""
        try:
            await self._content.check_room(0)
        except StorageFull:
            return False
        return await self._do(self._store.used_bytes, tenant) < self.limits.max_bytes_per_tenant

    async def add_results(self, results: Sequence[LineResult]) -> None:
        """These lines are done, all of them or none. Raises StorageFull, sqlite3.Error."""
        await self._do(self._store.add_results, results)
        for result in results:
            self.lines[Outcome.COMPLETED if result.ok else Outcome.FAILED] += 1

    async def finished_lines(self, batch_id: str) -> set[int]:
        """Numbers of the lines that have a result."""
        return await self._do(self._store.finished_lines, batch_id)

    async def results(self, batch_id: str, after: int, count: int) -> list[LineResult]:
        """At most `count` results of lines beyond number `after`, in their order, without their tokens."""
        return await self._do(self._store.results, batch_id, after, count)

    async def create_content(self) -> ContentWriter:
        """For a file that a batch makes. Raises StorageFull, OSError."""
        return await self._content.create(f"file-{secrets.token_hex(16)}")

    async def end(
        self, record: BatchRecord, status: Status, output: ContentWriter | None, error: ContentWriter | None
    ) -> BatchRecord:
        """The batch has ended: its files, which are sealed, exist from now on, unless this raises."""
        writers = [writer for writer in (output, error) if writer is not None]
        made = [
            None if writer is None else self._made(record, writer, kind)
            for writer, kind in ((output, "output"), (error, "error"))
        ]
        try:
            ended = await self._change(self._store.end, record, status, *made, self.now)
        except (TerraceError, sqlite3.Error):  # not when cancelled: it may have been committed
            for writer in writers:
                await writer.discard()
            raise
        if status in (Status.EXPIRED, Status.CANCELLED):
            self.lines[status.value] += record.unfinished
        return ended

    async def drop_results(self, batch_id: str) -> None:
        """The results of a batch that has ended are in its files: they need no room any more."""
        while await self._do(self._store.prune, batch_id):
            pass

    def _made(self, record: BatchRecord, writer: ContentWriter, kind: str) -> FileRecord:
        expires_at = None if record.output_ttl_s is None else self.now + record.output_ttl_s
        name = f"{record.id}_{kind}.jsonl"
        return FileRecord(writer.id, record.tenant, writer.bytes, self.now, name, "batch_output", expires_at)
