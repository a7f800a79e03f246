"""The SSD tier: blocks in fixed slots of segment files, each naming and verifying itself, warm after any crash.

A slot is a 4 KiB header and the block, rounded up to 4 KiB, written with one `pwritev` and read with one `preadv`
straight into the host arena; slots that lie side by side go in one call. A read succeeds only if header and bytes are
exactly what was asked for: a stale, torn, misdirected, foreign or flipped slot is a fault, never data. What the disk
does wrong comes back as a `TierFault` per block and is counted; nothing is raised and nothing is retried.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import mmap
import os
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from server.histogram import MOVE_S, Histogram
from server.kvcache.host import HostArena, checksum
from server.kvcache.tiers.base import Move, Recovered
from server.kvcache.tiers.files import Buffers, OsIo, move_all
from server.kvcache.tiers.index import Identity
from server.kvcache.tiers.journal import Journal, JournalStats, bytes_needed
from server.kvcache.tiers.pool import IoPool, Work
from server.kvcache.tiers.segments import Limits, Segments, disk_bytes
from server.kvcache.tiers.slots import HEADER_BYTES, RAW, read_header, write_header
from server.ownership import DirectoryLock
from server.types import SSD, Note, TierFault

Carry = Callable[[Sequence[Move]], list[TierFault | None]]
Submit = Callable[[Sequence[Work]], Awaitable[list[list[TierFault | None]]]]

log = logging.getLogger("terrace.ssd")

MAX_IO_BYTES = 8 * 2**20
"""Of one system call; a longer run is split, over the threads."""
MAX_IO_BLOCKS = 512
"""Two buffers each, and the system takes 1,024 (IOV_MAX)."""
CLOSE_S = 5.0
"""How long a stuck disk may hold up the end of the process: once for blocks, once for the index."""


@dataclass(slots=True)
class SsdStats:
    """Counters since the start, written by many threads under one lock, read by anyone."""

    bytes_read: int = 0
    bytes_written: int = 0
    io_s: dict[str, Histogram] = field(default_factory=lambda: {op: Histogram(MOVE_S) for op in ("read", "write")})
    """Seconds of each `read` and `write` of one run, whatever number of blocks that is."""
    io_errors: Counter[str] = field(default_factory=Counter)
    """Calls that failed, by errno name; `SHORT`: they ended early."""
    corrupt: Counter[str] = field(default_factory=Counter)
    """Blocks refused: `label` (the host frame held something else), `header`, `foreign`, `stale`, `payload`."""
    recovered_blocks: int = 0
    dropped_at_recovery: int = 0
    """Rows of the index whose slot or chain is not there."""
    recovery_s: float = 0.0
    journal: JournalStats = field(default_factory=JournalStats)


class SsdTier:
    """Loop thread. Calls may overlap; the disk's queue is as deep as there are threads."""

    def __init__(
        self,
        root: Path,
        fingerprint: bytes,
        host: HostArena,
        *,
        capacity_bytes: int,
        min_free_bytes: int,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        readers: int = 8,
        writers: int = 4,
        io: OsIo | None = None,
    ) -> None:
        """At most `capacity_bytes` on disk, index included, and never less than `min_free_bytes` free for others.

        Raises ConfigError when the directory has another owner, OSError when it cannot be used.
        """
        assert len(fingerprint) == 32, "a fingerprint is 32 bytes"
        self.name = SSD
        self.directory = root / fingerprint.hex()
        self._io = io or OsIo()
        self._host = host
        self._fingerprint = fingerprint
        self._clock = clock
        self._wall_clock = wall_clock
        self._slot_bytes = HEADER_BYTES + host.stride
        self._run_blocks = max(1, min(MAX_IO_BLOCKS, MAX_IO_BYTES // self._slot_bytes))
        self.capacity_blocks = frames_within(capacity_bytes, self._slot_bytes)
        self._lock = DirectoryLock(self.directory, "kv.ssd_path")
        limits = Limits(capacity_bytes, bytes_needed(self.capacity_blocks), min_free_bytes)
        self.segments = Segments(self.directory, self.capacity_blocks, self._slot_bytes, limits, self._io)
        self._journal = Journal(self.directory, Identity(fingerprint, host.block_bytes), self.capacity_blocks, self._io)
        self.stats = SsdStats(journal=self._journal.stats)
        self._threads = IoPool(readers, writers)
        self._counting = threading.Lock()
        self._headers = threading.local()

    async def open(self) -> Recovered:
        """Take over what is on disk: O(index), no slot is read. Raises OSError when the directory cannot be used."""
        return await asyncio.to_thread(self._open)

    def _open(self) -> Recovered:
        started_s = self._clock()
        self.segments.open()
        found, rows = self._journal.open(self.segments.present, self._wall_clock())
        self.stats.recovered_blocks = len(found.frames)
        self.stats.dropped_at_recovery = rows - len(found.frames)
        self.stats.recovery_s = self._clock() - started_s
        log.info(
            "SSD tier: %d blocks recovered in %.2f s, %d dropped; room for %d; %s",
            len(found.frames), self.stats.recovery_s, self.stats.dropped_at_recovery, self.capacity_blocks,
            "O_DIRECT" if self.segments.direct else "page cache",
        )  # fmt: skip
        return found

    @property
    def disk_bytes(self) -> int:
        """What the directory takes now, index included. A few system calls: for metrics, not for hot paths."""
        return disk_bytes(self.directory)

    async def write(self, moves: Sequence[Move]) -> Sequence[TierFault | None]:
        """Host to tier. Faults: `corrupt` (the host frame holds something else), `io`, `no_space`."""
        return await self._each_run(moves, self._write_run, self._threads.write)

    async def read(self, moves: Sequence[Move]) -> Sequence[TierFault | None]:
        """Tier to host. Faults: `corrupt`, `io`."""
        return await self._each_run(moves, self._read_run, self._threads.read)

    async def _each_run(self, moves: Sequence[Move], carry: Carry, submit: Submit) -> list[TierFault | None]:
        """`carry` for every run of neighbouring slots, all at once; the outcomes in the order of `moves`."""
        runs = list(self._runs(moves))
        outcomes: list[TierFault | None] = [None] * len(moves)
        try:
            done = await submit([partial(carry, [moves[i] for i in run]) for run in runs])
        except TimeoutError as error:  # closed while the disk did not answer
            return [TierFault("timeout", str(error))] * len(moves)
        for run, results in zip(runs, done, strict=True):
            for i, outcome in zip(run, results, strict=True):
                outcomes[i] = outcome
        return outcomes

    def note(self, notes: Sequence[Note]) -> None:
        self._journal.note(notes)

    async def aclose(self) -> None:
        """Finish what is open, as far as the disk lets us, and leave an index that the next start reads at once."""
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        idle = self._threads.close(CLOSE_S, self._clock)
        idle &= self._journal.close(CLOSE_S)
        if idle:  # else a stuck thread still has the descriptors: directory and lock stay ours until the process ends
            self.segments.close()
            self._lock.release()
        else:
            log.warning("the SSD tier could not be closed: the disk does not answer")

    # --- runs --------------------------------------------------------------------------------------------------------

    def _runs(self, moves: Sequence[Move]) -> Iterator[list[int]]:
        """Indexes of `moves` whose slots lie side by side, as many as go into one I/O."""
        run: list[int] = []
        for i in sorted(range(len(moves)), key=lambda i: moves[i].frame):
            if run:
                last = moves[run[-1]].frame
                if moves[i].frame != last + 1 or not self.segments.runs_on(last) or len(run) == self._run_blocks:
                    yield run
                    run = []
            run.append(i)
        if run:
            yield run

    def _header_pages(self, count: int) -> list[memoryview]:
        """`count` page-aligned header buffers of this thread."""
        pages: memoryview | None = getattr(self._headers, "pages", None)
        if pages is None:
            pages = memoryview(mmap.mmap(-1, self._run_blocks * HEADER_BYTES))
            self._headers.pages = pages
        return [pages[i * HEADER_BYTES : (i + 1) * HEADER_BYTES] for i in range(count)]

    def _write_run(self, moves: Sequence[Move]) -> list[TierFault | None]:
        """One run, one I/O. Bytes that nobody vouches for are not written, and split it."""
        outcomes: list[TierFault | None] = []
        good: list[tuple[Move, bytes]] = []
        for move in moves:
            digest = self._host.digest_of(move.host, move.hash)
            if digest is not None:
                good.append((move, digest))
                continue
            outcomes += self._put(good)
            good = []
            outcomes.append(self._corrupt("label", f"host frame {move.host} does not hold the block to be written"))
        return outcomes + self._put(good)

    def _put(self, blocks: Sequence[tuple[Move, bytes]]) -> list[TierFault | None]:
        if not blocks:
            return []
        first, count = blocks[0][0].frame, len(blocks)
        buffers: list[memoryview] = []
        for page, (move, digest) in zip(self._header_pages(count), blocks, strict=True):
            write_header(page, self._fingerprint, move, self._host.block_bytes, digest)
            buffers += (page, self._host.padded(move.host))
        started_s = self._clock()
        try:
            self.segments.ensure(first, count)
            fd, offset = self.segments.place(first)
            written = move_all(self._pwritev, fd, buffers, offset)
        except OSError as error:
            return self._failed(error, count)
        whole = written // self._slot_bytes
        with self._counting:
            self.stats.bytes_written += written
            self.stats.io_s["write"].observe(self._clock() - started_s)
        self._journal.put([move for move, _ in blocks[:whole]])
        return [*[None] * whole, *self._cut_short(written, count - whole)]

    def _read_run(self, moves: Sequence[Move]) -> list[TierFault | None]:
        pages = self._header_pages(len(moves))
        buffers: list[memoryview] = []
        for page, move in zip(pages, moves, strict=True):
            self._host.expect_nothing(move.host)
            buffers += (page, self._host.padded(move.host))
        started_s = self._clock()
        try:
            fd, offset = self.segments.place(moves[0].frame)
            got = move_all(self._preadv, fd, buffers, offset)
        except OSError as error:
            faults = self._failed(error, len(moves))
            if len(moves) > 1:  # one bad sector must not take its neighbours along
                return [outcome for move in moves for outcome in self._read_run([move])]
            return faults
        whole = got // self._slot_bytes
        with self._counting:
            self.stats.bytes_read += got
            self.stats.io_s["read"].observe(self._clock() - started_s)
        outcomes = [self._verify(page, move) for page, move in zip(pages[:whole], moves[:whole], strict=True)]
        return outcomes + self._cut_short(got, len(moves) - whole)

    def _verify(self, page: memoryview, move: Move) -> TierFault | None:
        """Label the host frame if the slot is exactly what was asked for; else say what is wrong with it."""
        slot, found = move.frame, read_header(page)
        if found is None:
            return self._corrupt("header", f"slot {slot} has no valid header")
        if (found.fingerprint, found.codec, found.block_bytes) != (self._fingerprint, RAW, self._host.block_bytes):
            return self._corrupt("foreign", f"slot {slot} was written by another model")
        if (found.hash, found.parent, found.depth) != (move.hash, move.parent, move.depth):
            return self._corrupt("stale", f"slot {slot} holds another block")
        if checksum(self._host.view(move.host)) != found.digest:
            return self._corrupt("payload", f"the bytes in slot {slot} are not those that were written")
        self._host.label(move.host, move.hash, found.digest)
        return None

    # --- system calls ------------------------------------------------------------------------------------------------

    def _preadv(self, fd: int, buffers: Buffers, offset: int) -> int:
        got = self._io.preadv(fd, buffers, offset)
        self._uncache(fd, offset, got)
        return got

    def _pwritev(self, fd: int, buffers: Buffers, offset: int) -> int:
        written = self._io.pwritev(fd, buffers, offset)
        self._uncache(fd, offset, written)
        return written

    def _uncache(self, fd: int, offset: int, length: int) -> None:
        """Without O_DIRECT: what we keep in our own arena need not be in the page cache, too."""
        if not self.segments.direct:
            with contextlib.suppress(OSError):  # advice
                os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)

    # --- faults ------------------------------------------------------------------------------------------------------

    def _corrupt(self, kind: str, detail: str) -> TierFault:
        with self._counting:
            self.stats.corrupt[kind] += 1
        return TierFault("corrupt", detail)

    def _failed(self, error: OSError, count: int) -> list[TierFault | None]:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        with self._counting:
            self.stats.io_errors[errno.errorcode.get(error.errno or 0, "EIO")] += 1
        return [TierFault("no_space" if full else "io", str(error))] * count

    def _cut_short(self, moved: int, count: int) -> list[TierFault | None]:
        if not count:
            return []
        with self._counting:
            self.stats.io_errors["SHORT"] += 1
        return [TierFault("io", f"it ended after {moved} bytes")] * count


def frames_within(capacity_bytes: int, slot_bytes: int) -> int:
    """How many slots, with the index files that they need, never exceed `capacity_bytes`."""
    low, high = 0, max(0, capacity_bytes // slot_bytes)
    while low < high:
        middle = (low + high + 1) // 2
        if middle * slot_bytes + bytes_needed(middle) <= capacity_bytes:
            low = middle
        else:
            high = middle - 1
    return low
