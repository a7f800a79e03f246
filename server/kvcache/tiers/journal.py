"""The SSD tier's memory of what is in which frame: a checkpoint, and a journal of what has changed since.

Records are appended in the background, in checksummed batches, so that a torn tail is seen. The index may lag the data
and the data the index: every slot names and verifies itself when it is read, so the worst that a lost record can do is
a miss. Hence no fsync on any hot path: one every few seconds bounds what a power cut can lose of the index.

Compaction writes the live rows as a new checkpoint, makes it durable, then empties the journal. A crash in between
leaves a journal whose records the checkpoint's mark says are covered already.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from server.kvcache.tiers.base import Move, Recovered
from server.kvcache.tiers.files import OsIo
from server.kvcache.tiers.index import (
    BATCH_BYTES,
    DROP,
    MARK,
    PIECE_RECORDS,
    PIN,
    PUT,
    RECORD,
    TOUCH,
    Identity,
    Present,
    Rows,
    batch,
    fold,
    identify,
    pack,
    read_records,
    recover,
)  # fmt: skip
from server.types import BlockHash, FrameId, Note

log = logging.getLogger("terrace.ssd")

FLUSH_S = 0.5
"""How long records may wait in memory: what a kill -9 can lose of the index."""
FLUSH_RECORDS = 1024
"""This many do not wait."""
MAX_PENDING = 64 * FLUSH_RECORDS
"""Beyond this, when the disk holds up the thread, records are lost."""
SYNC_FLUSHES = 10
"""Flushes between two fdatasyncs: a power cut loses about this many half seconds of the index."""
RETRY_FLUSHES = 20
"""After a failure, flushes until the index is written again, whole."""
SLACK_RECORDS = 1024
"""The journal is compacted when it holds this many records plus half the capacity: a constant cost per record."""

_OPS = {"drop": DROP, "touch": TOUCH, "pin": PIN}
_Pending = tuple[int, FrameId, BlockHash, "BlockHash | None", int, float, str]


@dataclass(slots=True)
class JournalStats:
    """Written by the journal's thread, read by anyone."""

    failures: int = 0
    checkpoints: int = 0
    damaged: int = 0
    """Files that were not whole when they were read: a torn tail after a crash is one."""
    lost: int = 0
    """Records that were never written because too many waited."""


def bytes_needed(capacity: int) -> int:
    """The most that the index of a tier with `capacity` frames takes: two checkpoints for a moment, and a journal."""
    journal = _limit(capacity) * (RECORD.itemsize + BATCH_BYTES)
    checkpoint = capacity * RECORD.itemsize + (capacity // PIECE_RECORDS + 2) * (RECORD.itemsize + BATCH_BYTES)
    return journal + 2 * checkpoint + 4 * 4096


def _limit(capacity: int) -> int:
    return SLACK_RECORDS + capacity // 2


@dataclass(slots=True)
class Index:
    """What index files leave behind: the table, the last sequence number, records in the journal, what was damaged."""

    table: Rows
    last: int = 0
    journalled: int = 0
    damaged: list[str] = field(default_factory=list)


def read_index(directory: Path, identity: Identity, capacity: int) -> Index:
    """Of the files in `directory`, as far as they are there and verify."""
    index = Index(np.zeros(capacity, RECORD))
    covered = 0
    for name in ("checkpoint", "journal"):
        path = directory / name
        try:
            pieces, whole = read_records(path, identity)
        except FileNotFoundError:
            continue
        except OSError as error:
            index.damaged.append(f"{name}: {error.strerror}")
            continue
        count = sum(map(len, pieces))
        if not whole:
            index.damaged.append(f"{name}: {count} records verify, the rest does not")
        for records in pieces:
            index.last = max(index.last, int(records["sequence"].max()))
            if name == "checkpoint":
                covered = max(covered, int(records["sequence"][records["op"] == MARK].max(initial=0)))
                fold(index.table, records)
            else:
                fold(index.table, records[records["sequence"] > covered])
                index.journalled = count
    return index


class Journal:
    """Of one directory. `put` and `note` may be called on any thread and never block; one thread of its own writes.

    In memory it keeps one 96-byte row per frame, taken from the system as frames are filled.
    """

    def __init__(self, directory: Path, identity: Identity, capacity: int, io: OsIo) -> None:
        self.stats = JournalStats()
        self._directory = directory
        self._identity = identity
        self._capacity = capacity
        self._io = io
        self._table: Rows = np.zeros(0, RECORD)
        self._pending: list[_Pending] = []
        self._sequence = 0
        self._journalled = 0
        self._behind = True
        """The files lack records, or are damaged: the next thing to write is a checkpoint."""
        self._fd = -1
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="terrace-journal", daemon=True)

    # --- what the tier calls -----------------------------------------------------------------------------------------

    def open(self, present: Present, wall_s: float) -> tuple[Recovered, int]:
        """Read what the last process left, and start writing. Also how many rows there were before any was dropped."""
        index = read_index(self._directory, self._identity, self._capacity)
        for what in index.damaged:
            log.warning("the index of the SSD tier in %s is damaged (%s); blocks are lost", self._directory, what)
        self.stats.damaged += len(index.damaged)
        self._table, self._sequence, self._journalled = index.table, index.last, index.journalled
        rows = int(np.count_nonzero(self._table["op"] == PUT))
        found = recover(self._table, present, wall_s)
        self._behind = bool(index.damaged) or rows > len(found.frames) or not self._go_on()
        self._thread.start()
        return found, rows

    def _go_on(self) -> bool:
        """Whether the journal that is there can be written on: files that are whole are not written anew at a start."""
        path = self._directory / "journal"
        with contextlib.suppress(OSError):
            if identify(path) == self._identity and (self._directory / "checkpoint").exists():
                self._fd = self._io.open(path, os.O_RDWR | os.O_APPEND)
                return True
        return False

    def put(self, moves: Sequence[Move]) -> None:
        """These blocks are there now."""
        self._enqueue([(PUT, move.frame, move.hash, move.parent, move.depth, 0.0, move.tenant) for move in moves])

    def note(self, notes: Sequence[Note]) -> None:
        self._enqueue([(_OPS[note.kind], note.frame, note.hash, None, 0, note.until_s, "") for note in notes])

    def close(self, timeout_s: float) -> bool:
        """Write all that waits and a checkpoint, then stop. False if that takes longer than `timeout_s`."""
        if self._thread.ident is None:  # never opened
            return True
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _enqueue(self, records: list[_Pending]) -> None:
        with self._wake:
            if len(self._pending) + len(records) > MAX_PENDING:
                self.stats.lost += len(records)
                return
            self._pending += records
            if len(self._pending) >= FLUSH_RECORDS:
                self._wake.notify()

    # --- the journal's thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        unsynced = rest = 0
        closing = False
        while not closing:
            with self._wake:
                if not self._closing and len(self._pending) < FLUSH_RECORDS:
                    self._wake.wait(FLUSH_S)
                pending, self._pending = self._pending, []
                closing = self._closing
            records = self._pack(pending)
            fold(self._table, np.frombuffer(records, RECORD))
            rest = max(0, rest - 1)
            try:
                unsynced += self._write(records, closing=closing, resting=rest > 0)
                if unsynced >= SYNC_FLUSHES:
                    self._io.fdatasync(self._fd)
                    unsynced = 0
            except OSError as error:
                self._failed(error)
                rest = RETRY_FLUSHES
        if self._fd >= 0:
            os.close(self._fd)

    def _failed(self, error: OSError) -> None:
        """An index that cannot be written costs hits after a restart, nothing else: say so once, count, go on."""
        self._behind = True
        self.stats.failures += 1
        if self.stats.failures == 1:
            log.warning("the index of the SSD tier cannot be written (%s); it is tried again", error)

    def _pack(self, pending: list[_Pending]) -> bytes:
        start = self._sequence + 1
        self._sequence += len(pending)
        return b"".join(pack(*record, start + i) for i, record in enumerate(pending))

    def _write(self, records: bytes, *, closing: bool, resting: bool) -> int:
        """Bring the files up to date with the table, of which `records` are the newest part. 1 if that wrote some."""
        count = len(records) // RECORD.itemsize
        if closing or (self._behind and not resting):
            self._compact()
        elif resting or not count:
            return 0
        elif self._journalled + count > _limit(self._capacity):
            self._compact()
        else:
            self._whole_write(self._fd, batch(records))
            self._journalled += count
        return 1

    def _compact(self) -> None:
        """The live rows become the checkpoint, and the journal is empty."""
        path = self._directory / "checkpoint.new"
        path.unlink(missing_ok=True)
        with self._opened(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as fd:
            mark = pack(MARK, 0, b"", None, 0, 0.0, "", self._sequence)
            self._whole_write(fd, self._identity.header() + batch(mark))
            for start in range(0, self._capacity, PIECE_RECORDS):
                chunk = self._table[start : start + PIECE_RECORDS]
                live = chunk[chunk["op"] == PUT]
                if len(live):
                    self._whole_write(fd, batch(live.tobytes()))
            self._io.fdatasync(fd)
        path.rename(self._directory / "checkpoint")
        with self._opened(self._directory, os.O_RDONLY | os.O_DIRECTORY) as fd:
            os.fsync(fd)
        if self._fd < 0:
            self._fd = self._io.open(self._directory / "journal", os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.ftruncate(self._fd, 0)
        self._whole_write(self._fd, self._identity.header())
        self._journalled = 0
        self._behind = False
        self.stats.checkpoints += 1

    def _whole_write(self, fd: int, data: bytes) -> None:
        written = self._io.write(fd, data)
        if written < len(data):
            raise OSError(errno.ENOSPC, f"{written} of {len(data)} bytes of the index were written")

    @contextlib.contextmanager
    def _opened(self, path: Path, flags: int) -> Iterator[int]:
        fd = self._io.open(path, flags)
        try:
            yield fd
        finally:
            os.close(fd)
