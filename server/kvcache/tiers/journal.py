"""The SSD tier's memory of what is in which frame: a checkpoint and an append-only journal, both of fixed-size records.

A record says that a block was put into a frame, dropped from it, used, or pinned. Records are appended in batches with
a checksum, so that a torn tail is seen and cut. The index may lag the data and the data the index: every slot names and
verifies itself when it is read, so the worst that a lost record can do is a miss. Hence no fsync on any hot path.

Compaction writes the live rows as a new checkpoint, makes it durable, then empties the journal; a crash in between
replays records that the checkpoint has already, which changes nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from server.kvcache.tiers.base import Recovered
from server.kvcache.tiers.files import OsIo, open_private
from server.types import BlockHash, FrameId, Note

log = logging.getLogger("terrace.ssd")

PUT, DROP, TOUCH, PIN = 1, 2, 3, 4
RECORD = np.dtype(
    [("op", "<u4"), ("frame", "<u4"), ("depth", "<u4"), ("chained", "<u4"), ("hash", "V32"), ("parent", "V32"),
     ("until_s", "<f8"), ("sequence", "<u8")]
)  # fmt: skip
"""96 bytes. `chained`: 1 when the block has a parent."""
BATCH = np.dtype([("magic", "S4"), ("count", "<u4"), ("checksum", "<u8")])
FILE_HEADER = b"terrace kv index 1\n".ljust(32, b"\0")
"""Followed by the fingerprint: an index of another model, or of another format, is not read."""
FLUSH_S = 0.5
"""How long records may wait in memory: what a kill -9 can lose of the index."""
FLUSH_RECORDS = 1024
SYNC_EVERY = 10
"""Flushes between two fdatasyncs: what a power cut can lose is about this many half seconds."""
SLACK_RECORDS = 1024
"""The journal is compacted when it holds this many records plus half the capacity."""
CHUNK_ROWS = 16_384
"""Rows per write of a checkpoint: each holds the interpreter lock for about a millisecond."""

Rows = npt.NDArray[Any]


@dataclass(slots=True)
class JournalStats:
    failures: int = 0
    checkpoints: int = 0
    damaged: int = 0
    """Batches or files that did not verify when they were read."""


def bytes_needed(capacity: int) -> int:
    """The most that index files of a tier with `capacity` frames take: two checkpoints for a moment, and a journal."""
    journal = (SLACK_RECORDS + capacity // 2 + 2 * FLUSH_RECORDS) * (RECORD.itemsize + BATCH.itemsize)
    return 2 * capacity * RECORD.itemsize + journal + 4 * 4096


class Journal:
    """Of one directory. `put` and `note` may be called on any thread and never block; one thread of its own writes."""

    def __init__(self, directory: Path, fingerprint: bytes, capacity: int, io: OsIo) -> None:
        self.stats = JournalStats()
        self._directory = directory
        self._header = FILE_HEADER + fingerprint
        self._capacity = capacity
        self._io = io
        self._rows: Rows = np.zeros(capacity, RECORD)
        self._pins: dict[BlockHash, tuple[FrameId, float]] = {}
        self._pending: list[tuple[int, FrameId, BlockHash, BlockHash | None, int, float]] = []
        self._sequence = 0
        self._journalled = 0
        self._fd: int | None = None
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="terrace-journal", daemon=True)

    # --- what the tier calls -----------------------------------------------------------------------------------------

    def open(self, wall_s: float) -> Recovered:
        """Read what the last process left, make a fresh checkpoint of it if there is much to replay, start writing."""
        rows = self._replay()
        found = _recovered(rows, self._pins, wall_s)
        self._rows[np.asarray(found.frames, np.int64)] = _pick(rows, found)
        self._fd = open_private(self._directory / "journal", os.O_RDWR | os.O_CREAT | os.O_APPEND)
        if self._journalled > SLACK_RECORDS or os.fstat(self._fd).st_size < len(self._header):
            self._compact()
        self._thread.start()
        return found

    def put(self, frame: FrameId, value: BlockHash, parent: BlockHash | None, depth: int) -> None:
        """Block `value` is in `frame` now."""
        self._enqueue([(PUT, frame, value, parent, depth, 0.0)])

    def note(self, notes: list[Note]) -> None:
        ops = {"drop": DROP, "touch": TOUCH, "pin": PIN}
        self._enqueue([(ops[note.kind], note.frame, note.hash, None, 0, note.until_s) for note in notes])

    def close(self, timeout_s: float) -> None:
        """Write all that waits and a checkpoint, then stop; give up after `timeout_s`."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _enqueue(self, records: list[tuple[int, FrameId, BlockHash, BlockHash | None, int, float]]) -> None:
        with self._wake:
            self._pending.extend(records)
            if len(self._pending) >= FLUSH_RECORDS:
                self._wake.notify()

    # --- the journal's thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        flushes = 0
        while True:
            with self._wake:
                if not self._closing:
                    self._wake.wait(FLUSH_S)
                pending, self._pending = self._pending, []
                closing = self._closing
            with self._tolerant():
                flushes += self._flush(pending)
                if closing:
                    self._compact()
                elif flushes >= SYNC_EVERY:
                    flushes = 0
                    self._io.fdatasync(self._fd or 0)
            if closing:
                break
        if self._fd is not None:
            os.close(self._fd)

    @contextlib.contextmanager
    def _tolerant(self) -> Iterator[None]:
        """An index that cannot be written costs hits after a restart, nothing else: say so once, count, go on."""
        try:
            yield
        except OSError as error:
            self.stats.failures += 1
            if self.stats.failures == 1:
                log.warning("the index of the SSD tier cannot be written (%s); it is tried again", error)

    def _flush(self, pending: list[tuple[int, FrameId, BlockHash, BlockHash | None, int, float]]) -> int:
        """Apply `pending` to the rows and append it to the journal. 1 if anything was written."""
        if not pending:
            return 0
        batch = np.zeros(len(pending), RECORD)
        for i, (op, frame, value, parent, depth, until_s) in enumerate(pending):
            self._sequence += 1
            batch[i] = (op, frame, depth, parent is not None, value, parent or b"", until_s, self._sequence)
            self._apply(batch[i], op, frame, value, until_s)
        if self._journalled + len(batch) > SLACK_RECORDS + self._capacity // 2:
            self._compact()
        else:
            self._append(batch)
        return 1

    def _apply(self, record: Any, op: int, frame: FrameId, value: BlockHash, until_s: float) -> None:
        row = self._rows[frame]
        if op == PUT:
            self._rows[frame] = record
        elif op == PIN:
            if until_s:
                self._pins[value] = (frame, until_s)
            else:
                self._pins.pop(value, None)
        elif row["op"] == PUT and row["hash"].tobytes() == value:
            if op == DROP:
                row["op"] = 0
            else:
                row["sequence"] = self._sequence

    def _append(self, batch: Rows) -> None:
        assert self._fd is not None, "a journal is opened before it is written"
        data = batch.tobytes()
        head = np.array([(b"TKVJ", len(batch), xxhash.xxh3_64_intdigest(data))], BATCH).tobytes()
        size = os.fstat(self._fd).st_size
        try:
            written = self._io.write(self._fd, head + data)
        except OSError:
            os.ftruncate(self._fd, size)
            raise
        if written < len(head) + len(data):  # a torn batch in the middle would hide all that follow
            os.ftruncate(self._fd, size)
            raise OSError(28, "short write to the journal")
        self._journalled += len(batch)

    def _compact(self) -> None:
        """The live rows become the checkpoint, and the journal is empty."""
        path = self._directory / "checkpoint.new"
        fd = open_private(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            self._io.write(fd, self._header)
            for start in range(0, self._capacity, CHUNK_ROWS):
                chunk = self._rows[start : start + CHUNK_ROWS]
                self._write_batch(fd, chunk[chunk["op"] == PUT])
            pins = [(PIN, frame, 0, 0, value, b"", until_s, 0) for value, (frame, until_s) in self._pins.items()]
            self._write_batch(fd, np.array(pins, RECORD))
            self._io.fdatasync(fd)
        finally:
            os.close(fd)
        path.rename(self._directory / "checkpoint")
        folder = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        assert self._fd is not None, "a journal is opened before it is compacted"
        os.ftruncate(self._fd, 0)
        self._io.write(self._fd, self._header)
        self._journalled = 0
        self.stats.checkpoints += 1

    def _write_batch(self, fd: int, rows: Rows) -> None:
        if len(rows):
            data = rows.tobytes()
            head = np.array([(b"TKVJ", len(rows), xxhash.xxh3_64_intdigest(data))], BATCH).tobytes()
            if self._io.write(fd, head + data) < len(head) + len(data):
                raise OSError(28, "short write to the checkpoint")

    # --- reading -----------------------------------------------------------------------------------------------------

    def _replay(self) -> Rows:
        """The rows that the files leave behind, at most one per frame; fills `_pins`."""
        checkpoint, journal = (self._read(name) for name in ("checkpoint", "journal"))
        self._journalled = len(journal)
        self._sequence = int(max(checkpoint["sequence"].max(initial=0), journal["sequence"].max(initial=0)))
        records = np.concatenate((checkpoint, journal))
        records = records[records["frame"] < self._capacity]
        for record in records[records["op"] == PIN]:
            value, until_s = record["hash"].tobytes(), float(record["until_s"])
            if until_s:
                self._pins[value] = (int(record["frame"]), until_s)
            else:
                self._pins.pop(value, None)
        last = records[(records["op"] == PUT) | (records["op"] == DROP)]
        newest = len(last) - 1 - np.unique(last["frame"][::-1], return_index=True)[1]
        rows = last[newest]
        rows = rows[rows["op"] == PUT]
        self._age(rows, records[records["op"] == TOUCH])
        return rows

    @staticmethod
    def _age(rows: Rows, touches: Rows) -> None:
        """A touched row is as recent as its last touch, if that was about the block that is there now."""
        place = np.searchsorted(rows["frame"], touches["frame"])
        inside = place < len(rows)
        place, touches = place[inside], touches[inside]
        same = (rows["frame"][place] == touches["frame"]) & (rows["hash"][place] == touches["hash"])
        np.maximum.at(rows["sequence"], place[same], touches["sequence"][same])

    def _read(self, name: str) -> Rows:
        """The records of one file up to the first that does not verify; the file is cut there."""
        path = self._directory / name
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return np.zeros(0, RECORD)
        except OSError as error:
            log.warning("cannot read %s: %s; the cache starts without it", path, error)
            self.stats.damaged += 1
            return np.zeros(0, RECORD)
        if data[: len(self._header)] != self._header:
            if data:
                log.warning("%s is not an index of this model and format; the cache starts without it", path)
                self.stats.damaged += 1
                with contextlib.suppress(OSError):
                    os.truncate(path, 0)
            return np.zeros(0, RECORD)
        end, batches = _batches(data, len(self._header))
        if end < len(data):
            self.stats.damaged += 1
            log.warning("%s is damaged after %d of %d bytes; what follows is forgotten", path, end, len(data))
            with contextlib.suppress(OSError):
                os.truncate(path, end)
        return np.concatenate(batches) if batches else np.zeros(0, RECORD)


def _batches(data: bytes, start: int) -> tuple[int, list[Rows]]:
    """Batches from `start` on that verify, and where they end."""
    found: list[Rows] = []
    while start + BATCH.itemsize <= len(data):
        head = np.frombuffer(data, BATCH, 1, start)[0]
        first = start + BATCH.itemsize
        end = first + int(head["count"]) * RECORD.itemsize
        if head["magic"] != b"TKVJ" or end > len(data):
            break
        if xxhash.xxh3_64_intdigest(memoryview(data)[first:end]) != int(head["checksum"]):
            break
        found.append(np.frombuffer(data, RECORD, int(head["count"]), first))
        start = end
    return start, found


def _hashes(column: Rows) -> list[BlockHash]:
    raw = column.tobytes()
    return [raw[i : i + 32] for i in range(0, len(raw), 32)]


def _recovered(rows: Rows, pins: dict[BlockHash, tuple[FrameId, float]], wall_s: float) -> Recovered:
    """Rows in eviction order, without those that the beginning of their chain is missing of. 1 us a row."""
    rows = rows[np.argsort(rows["sequence"], kind="stable")]
    hashes = _hashes(rows["hash"])
    index = dict(zip(hashes, range(len(hashes)), strict=True))  # of two frames with one block the later
    if len(index) < len(hashes):
        rows = rows[np.fromiter(index.values(), np.int64, len(index))]
        hashes = _hashes(rows["hash"])
        index = dict(zip(hashes, range(len(hashes)), strict=True))
    above = np.fromiter((index.get(value, -1) for value in _hashes(rows["parent"])), np.int64, len(rows))
    above[rows["chained"] == 0] = -1
    depths = rows["depth"].astype(np.int64)
    order = np.argsort(depths, kind="stable")
    edges = np.flatnonzero(np.diff(depths[order])) + 1
    levels = np.split(order, edges) if len(order) else []
    good = np.zeros(len(rows), bool)
    for level in levels:
        parent = above[level]
        linked = (parent >= 0) & good[parent] & (depths[parent] + 1 == depths[level])
        good[level] = np.where(rows["chained"][level] == 0, depths[level] == 0, linked)
    recency = rows["sequence"].astype(np.int64)
    for level in reversed(levels):
        kept = level[good[level] & (above[level] >= 0)]
        np.maximum.at(recency, above[kept], recency[kept])
    chosen = np.lexsort((-depths, recency))
    chosen = chosen[good[chosen]]
    frames = rows["frame"].astype(np.int64)
    parents = np.where(above >= 0, frames[above], -1)
    return Recovered(
        frames=frames[chosen].tolist(),
        hashes=[hashes[i] for i in chosen.tolist()],
        above=parents[chosen].tolist(),
        depths=depths[chosen].tolist(),
        pins={value: until_s for value, (_, until_s) in pins.items() if until_s > wall_s},
    )


def _pick(rows: Rows, found: Recovered) -> Rows:
    """The rows of `rows`, which is in frame order, whose frames `found` kept."""
    return rows[np.searchsorted(rows["frame"], np.asarray(found.frames, np.int64))]
