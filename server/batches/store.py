"""State of files and batches in one SQLite database. One thread, the one that made the `Store`; never the loop thread.

Everything that counts is one transaction, and nothing else counts: a file exists if it has a row, a line is done if it
has a row in `results`, and the primary key of that table is why no line can be done twice. `synchronous=FULL`: what was
committed survives a power cut too, at one fdatasync (1 to 10 ms) a commit; results are committed in groups, so a batch
pays that a few dozen times a second at most, off the loop thread.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from server.batches.records import ENDED, BatchRecord, FileRecord, LineError, LineResult, Page, Status
from server.config import BatchConfig
from server.errors import ConfigError, Conflict, InvalidRequest, NotFound, Overloaded, QuotaExceeded, StorageFull

VERSION = 1
PRUNED_ROWS = 1000
"""Results deleted per transaction: a commit of somebody else waits for no more than that."""
BUSY_S = 30.0
"""How long somebody who looks at the database with another program may hold it up."""
RETRY_FULL_S = 60

_SCHEMA = """
CREATE TABLE files(
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, tenant TEXT NOT NULL, bytes INTEGER NOT NULL,
    created_at INTEGER NOT NULL, filename TEXT NOT NULL, purpose TEXT NOT NULL, expires_at INTEGER
);
CREATE INDEX files_of_tenant ON files(tenant, seq);
CREATE TABLE batches(
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, tenant TEXT NOT NULL, endpoint TEXT NOT NULL,
    input_file_id TEXT NOT NULL, model TEXT NOT NULL, metadata TEXT NOT NULL, output_ttl_s INTEGER,
    created_at INTEGER NOT NULL, expires_at INTEGER NOT NULL, status TEXT NOT NULL, in_progress_at INTEGER,
    finalizing_at INTEGER, completed_at INTEGER, failed_at INTEGER, expired_at INTEGER, cancelling_at INTEGER,
    cancelled_at INTEGER, total INTEGER NOT NULL, completed INTEGER NOT NULL, failed INTEGER NOT NULL,
    input_tokens INTEGER NOT NULL, cached_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL, output_file_id TEXT,
    error_file_id TEXT, errors TEXT NOT NULL, result_bytes INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX batches_of_tenant ON batches(tenant, seq);
CREATE TABLE results(
    batch_id TEXT NOT NULL, line INTEGER NOT NULL, ok INTEGER NOT NULL, content BLOB NOT NULL,
    PRIMARY KEY (batch_id, line)
);
"""
_FILE_COLUMNS = [field.name for field in fields(FileRecord)]
_BATCH_COLUMNS = [field.name for field in fields(BatchRecord)]
_ENDED = "(" + ", ".join(f"'{status}'" for status in sorted(ENDED)) + ")"


class Store:
    def __init__(self, path: Path, limits: BatchConfig, connect: Callable[..., sqlite3.Connection]) -> None:
        """Opens or makes the database. The caller owns its directory. Raises ConfigError when it is not one of ours."""
        self._limits = limits
        self._db = connect(path, timeout=BUSY_S, isolation_level=None)
        try:
            self._open()
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise ConfigError(
                f"cannot use {path}: {error}; restore it, or move it away to begin anew", param="batch.data_path"
            ) from error

    def _open(self) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version > VERSION:
            raise sqlite3.DatabaseError(f"its format is {version}, of a later version than this daemon's {VERSION}")
        if version == 0:
            self._db.execute("PRAGMA auto_vacuum=INCREMENTAL")
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.execute("PRAGMA journal_size_limit=67108864")
        if version == 0:
            with self._transaction():
                for statement in _SCHEMA.split(";\n"):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version={VERSION}")

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All of it or nothing. A full disk is StorageFull."""
        try:
            self._db.execute("BEGIN IMMEDIATE")
            yield
            self._db.execute("COMMIT")
        except BaseException as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            if isinstance(error, sqlite3.OperationalError) and error.sqlite_errorcode == sqlite3.SQLITE_FULL:
                raise StorageFull("the disk of files and batches is full") from error
            raise

    # --- files -------------------------------------------------------------------------------------------------------

    def check_room(self, tenant: str) -> None:
        """Raises QuotaExceeded when the tenant may add no file."""
        used, limit = self._files_of(tenant), self._limits.max_files_per_tenant
        if used >= limit:
            raise QuotaExceeded(
                f"max_files_per_tenant is {limit}, and that many exist or will be made by batches in work; delete some"
            )
        self._check_bytes(tenant, 1)

    def add_file(self, record: FileRecord) -> None:
        """The commit of an upload. Raises QuotaExceeded."""
        with self._transaction():
            self.check_room(record.tenant)
            self._check_bytes(record.tenant, record.bytes)
            self._insert("files", asdict(record))

    def file(self, tenant: str, file_id: str) -> FileRecord:
        """Raises NotFound."""
        rows = self._db.execute("SELECT * FROM files WHERE id=? AND tenant=?", (file_id, tenant))
        for row in _named(rows):
            return _file(row)
        raise NotFound(f"there is no file {file_id[:100]!r}", param="file_id", code="file_not_found")

    def files(self, tenant: str, purpose: str | None, page: Page) -> tuple[list[FileRecord], bool]:
        """One page, and whether there is more. Raises InvalidRequest when `page.after` is no file of the tenant."""
        rows, more = self._page("files", tenant, page, "AND (? IS NULL OR purpose=?)", (purpose, purpose))
        return [_file(row) for row in rows], more

    def delete_file(self, tenant: str, file_id: str) -> None:
        """Raises NotFound, and Conflict while a batch reads the file."""
        with self._transaction():
            self.file(tenant, file_id)
            reader = self._db.execute(
                f"SELECT id FROM batches WHERE input_file_id=? AND status NOT IN {_ENDED}", (file_id,)
            ).fetchone()
            if reader:
                raise Conflict(
                    f"the batch {reader[0]} reads this file; cancel it or wait for its end", code="file_in_use"
                )
            self._db.execute("DELETE FROM files WHERE id=?", (file_id,))

    def drop_expired_files(self, now: int) -> list[str]:
        """Forgets files past their time that no batch reads; their ids, so that their content can go too."""
        found = self._db.execute(
            "SELECT id FROM files WHERE expires_at<=? AND id NOT IN "
            f"(SELECT input_file_id FROM batches WHERE status NOT IN {_ENDED})",
            (now,),
        ).fetchall()
        if found:
            with self._transaction():
                self._db.executemany("DELETE FROM files WHERE id=?", found)
        return [file_id for (file_id,) in found]

    def file_ids(self) -> set[str]:
        """Of all tenants: whatever other content lies around belongs to nobody."""
        return {file_id for (file_id,) in self._db.execute("SELECT id FROM files")}

    # --- batches -----------------------------------------------------------------------------------------------------

    def add_batch(self, record: BatchRecord) -> None:
        """Raises NotFound, InvalidRequest (the input file), Overloaded and QuotaExceeded (limits)."""
        with self._transaction():
            if self.file(record.tenant, record.input_file_id).purpose != "batch":
                raise InvalidRequest(
                    "'input_file_id' must be a file with the purpose 'batch'; upload one", param="input_file_id"
                )
            limit = self._limits.max_batches_per_tenant
            if self._open_of(record.tenant) >= limit:
                raise Overloaded(
                    f"max_batches_per_tenant is {limit}, and that many are in work; wait for one or cancel one",
                    retry_after_s=RETRY_FULL_S,
                    code="too_many_batches",
                )
            if self._files_of(record.tenant) + 2 > self._limits.max_files_per_tenant:
                raise QuotaExceeded(
                    f"max_files_per_tenant is {self._limits.max_files_per_tenant}, which leaves no room for the two "
                    "that a batch makes; delete some"
                )
            self._check_bytes(record.tenant, 1)
            self._insert("batches", _batch_row(record))
            self._db.execute(
                f"DELETE FROM batches WHERE seq IN (SELECT seq FROM batches WHERE tenant=? AND status IN {_ENDED} "
                "ORDER BY seq DESC LIMIT -1 OFFSET ?)",
                (record.tenant, self._limits.max_ended_batches),
            )

    def batch(self, batch_id: str, tenant: str | None = None) -> BatchRecord:
        """One batch; of `tenant` only, if given. Raises NotFound."""
        rows = self._db.execute(
            "SELECT * FROM batches WHERE id=? AND (? IS NULL OR tenant=?)", (batch_id, tenant, tenant)
        )
        for row in _named(rows):
            return _batch(row)
        raise NotFound(f"there is no batch {batch_id[:100]!r}", param="batch_id", code="batch_not_found")

    def batches(self, tenant: str, page: Page) -> tuple[list[BatchRecord], bool]:
        """One page, and whether there is more. Raises InvalidRequest when `page.after` is no batch of the tenant."""
        rows, more = self._page("batches", tenant, page, "", ())
        return [_batch(row) for row in rows], more

    def open_batches(self) -> list[BatchRecord]:
        """Every batch that has not ended, of all tenants, oldest first."""
        rows = self._db.execute(f"SELECT * FROM batches WHERE status NOT IN {_ENDED} ORDER BY seq")
        return [_batch(row) for row in _named(rows)]

    def statuses(self) -> dict[str, int]:
        """How many batches are remembered in each status."""
        found = dict(self._db.execute("SELECT status, COUNT(*) FROM batches GROUP BY status").fetchall())
        return {status.value: found.get(status.value, 0) for status in Status}

    def cancel(self, tenant: str, batch_id: str, now: int) -> BatchRecord:
        """The batch, cancelling from now on or before. Raises NotFound, and Conflict when it is too late for that."""
        with self._transaction():
            record = self.batch(batch_id, tenant)
            if record.status not in (Status.VALIDATING, Status.IN_PROGRESS, Status.CANCELLING):
                raise Conflict(f"the batch is {record.status} and can no longer be cancelled", code="not_cancellable")
            self._move(batch_id, (Status.VALIDATING, Status.IN_PROGRESS), Status.CANCELLING, now)
        return self.batch(batch_id)

    def begin(self, batch_id: str, total: int, now: int) -> BatchRecord:
        """The input is valid and has `total` lines: in progress, unless it was cancelled meanwhile."""
        with self._transaction():
            self._move(batch_id, (Status.VALIDATING,), Status.IN_PROGRESS, now, total=total)
        return self.batch(batch_id)

    def fail(self, batch_id: str, errors: Sequence[LineError], now: int) -> BatchRecord:
        """Failed, unless it has ended meanwhile."""
        shown = json.dumps([asdict(error) for error in errors])
        with self._transaction():
            self._move(batch_id, set(Status) - ENDED, Status.FAILED, now, errors=shown, result_bytes=0)
        return self.batch(batch_id)

    def finalize(self, batch_id: str, now: int) -> BatchRecord:
        """Every line has its result: finalizing, unless it was cancelled meanwhile."""
        with self._transaction():
            self._move(batch_id, (Status.IN_PROGRESS,), Status.FINALIZING, now)
        return self.batch(batch_id)

    def end(
        self, record: BatchRecord, status: Status, output: FileRecord | None, error: FileRecord | None, now: int
    ) -> BatchRecord:
        """The commit of a batch: its files, which are complete, exist from now on. `record.unfinished` lines of it are
        in the error file without ever having had a result. False start of a crash: nothing of it is there."""
        with self._transaction():
            for made in (output, error):
                if made is not None:
                    self._insert("files", asdict(made))
            moved = self._move(
                record.id,
                (record.status,),
                status,
                now,
                failed=record.failed + record.unfinished,
                output_file_id=output and output.id,
                error_file_id=error and error.id,
                result_bytes=0,
            )
            if not moved:
                raise Conflict(f"the batch is not {record.status} any more")
        return self.batch(record.id)

    def _move(self, batch_id: str, before: Collection[Status], after: Status, now: int, **more: Any) -> bool:
        """Whether the batch was in one of `before` and is in `after` now. Within a transaction."""
        values = {"status": after.value, f"{after}_at": now} | more
        changes = ", ".join(f"{name}=:{name}" for name in values)
        known = ", ".join(f"'{status}'" for status in before)
        done = self._db.execute(
            f"UPDATE batches SET {changes} WHERE id=:id AND status IN ({known})", values | {"id": batch_id}
        )
        return done.rowcount == 1

    # --- results -----------------------------------------------------------------------------------------------------

    def add_results(self, results: Sequence[LineResult]) -> None:
        """These lines are done, all of them or none. Each must belong to an open batch and have had no result."""
        with self._transaction():
            for result in results:
                tokens = result.tokens
                self._db.execute(
                    "INSERT INTO results(batch_id, line, ok, content) VALUES (?, ?, ?, ?)",
                    (result.batch_id, result.line, result.ok, result.content),
                )
                counted = self._db.execute(
                    "UPDATE batches SET completed=completed+?, failed=failed+?, input_tokens=input_tokens+?, "
                    "cached_tokens=cached_tokens+?, output_tokens=output_tokens+?, result_bytes=result_bytes+? "
                    f"WHERE id=? AND status NOT IN {_ENDED}",
                    (
                        int(result.ok),
                        int(not result.ok),
                        tokens.input,
                        tokens.cached,
                        tokens.output,
                        len(result.content) + 1,
                        result.batch_id,
                    ),
                )
                assert counted.rowcount == 1, "a result came after its batch had ended"

    def finished_lines(self, batch_id: str) -> set[int]:
        """Numbers of the lines that have a result."""
        return {line for (line,) in self._db.execute("SELECT line FROM results WHERE batch_id=?", (batch_id,))}

    def results(self, batch_id: str, after: int, count: int) -> list[LineResult]:
        """At most `count` results of lines beyond number `after`, in their order, without their tokens."""
        rows = self._db.execute(
            "SELECT line, ok, content FROM results WHERE batch_id=? AND line>? ORDER BY line LIMIT ?",
            (batch_id, after, count),
        )
        return [LineResult(batch_id, line, bool(ok), content) for line, ok, content in rows]

    def stale(self) -> list[str]:
        """Ids of batches that have ended, or are forgotten, and still have results."""
        rows = self._db.execute(
            f"SELECT DISTINCT batch_id FROM results EXCEPT SELECT id FROM batches WHERE status NOT IN {_ENDED}"
        )
        return [batch_id for (batch_id,) in rows]

    def prune(self, batch_id: str) -> bool:
        """Deletes some results of a batch that has ended, and gives their pages back; whether there may be more."""
        with self._transaction():
            gone = self._db.execute(
                "DELETE FROM results WHERE rowid IN (SELECT rowid FROM results WHERE batch_id=? LIMIT ?)",
                (batch_id, PRUNED_ROWS),
            ).rowcount
        self._db.executescript("PRAGMA incremental_vacuum")  # `execute` would give back a single page
        return bool(gone == PRUNED_ROWS)

    # --- quotas ------------------------------------------------------------------------------------------------------

    def used_bytes(self, tenant: str) -> int:
        """Of the tenant's files, and of results that will be files."""
        (used,) = self._db.execute(
            "SELECT (SELECT COALESCE(SUM(bytes), 0) FROM files WHERE tenant=:tenant) + "
            "(SELECT COALESCE(SUM(result_bytes), 0) FROM batches WHERE tenant=:tenant)",
            {"tenant": tenant},
        ).fetchone()
        return int(used)

    def _check_bytes(self, tenant: str, more: int) -> None:
        used, limit = self.used_bytes(tenant), self._limits.max_bytes_per_tenant
        if used + more > limit:
            raise QuotaExceeded(
                f"max_bytes_per_tenant is {limit}: {used} are used, this would make it {used + more}; delete some files"
            )

    def _files_of(self, tenant: str) -> int:
        """Files that exist, and those that batches in work will make."""
        (count,) = self._db.execute("SELECT COUNT(*) FROM files WHERE tenant=?", (tenant,)).fetchone()
        return int(count) + 2 * self._open_of(tenant)

    def _open_of(self, tenant: str) -> int:
        (count,) = self._db.execute(
            f"SELECT COUNT(*) FROM batches WHERE tenant=? AND status NOT IN {_ENDED}", (tenant,)
        ).fetchone()
        return int(count)

    # --- rows --------------------------------------------------------------------------------------------------------

    def _insert(self, table: str, row: dict[str, Any]) -> None:
        names = ", ".join(row)
        places = ", ".join(f":{name}" for name in row)
        self._db.execute(f"INSERT INTO {table}({names}) VALUES ({places})", row)

    def _page(
        self, table: str, tenant: str, page: Page, where: str, values: tuple[Any, ...]
    ) -> tuple[list[dict[str, Any]], bool]:
        beyond, order = (">", "ASC") if page.ascending else ("<", "DESC")
        start = 0 if page.ascending else 2**63 - 1
        if page.after is not None:
            row = self._db.execute(f"SELECT seq FROM {table} WHERE id=? AND tenant=?", (page.after, tenant)).fetchone()
            if row is None:
                raise InvalidRequest("'after' must be the id of an object of this list", param="after")
            (start,) = row
        rows = self._db.execute(
            f"SELECT * FROM {table} WHERE tenant=? AND seq{beyond}? {where} ORDER BY seq {order} LIMIT ?",
            (tenant, start, *values, page.limit + 1),
        )
        found = list(_named(rows))
        return found[: page.limit], len(found) > page.limit


def _named(cursor: sqlite3.Cursor) -> Iterator[dict[str, Any]]:
    names = [column[0] for column in cursor.description]
    return (dict(zip(names, row, strict=True)) for row in cursor)


def _file(row: dict[str, Any]) -> FileRecord:
    return FileRecord(**{name: row[name] for name in _FILE_COLUMNS})


def _batch_row(record: BatchRecord) -> dict[str, Any]:
    coded = {"metadata": json.dumps(record.metadata), "errors": "[]", "status": record.status.value}
    return asdict(record) | coded


def _batch(row: dict[str, Any]) -> BatchRecord:
    decoded = {
        "metadata": json.loads(row["metadata"]),
        "errors": tuple(LineError(**error) for error in json.loads(row["errors"])),
        "status": Status(row["status"]),
    }
    return BatchRecord(**{name: row[name] for name in _BATCH_COLUMNS} | decoded)
