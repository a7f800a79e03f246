"""The SSD tier: blocks in fixed slots of segment files, each naming and verifying itself, warm after any crash.

A slot is a 4 KiB header and the block, rounded up to 4 KiB, written with one `pwritev` and read with one `preadv`
straight into the host arena; slots that lie side by side go in one call. The header names fingerprint, hash, parent and
depth and carries the checksum that the bytes had when they came from the device. A read succeeds only if all of that is
what was asked for: a stale, torn, misdirected, foreign or flipped slot is a miss, never data.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import mmap
import os
import struct
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from server.kvcache.host import HostArena, checksum
from server.kvcache.tiers.base import Move, Recovered
from server.kvcache.tiers.files import Buffers, OsIo
from server.kvcache.tiers.journal import Journal, bytes_needed
from server.kvcache.tiers.pool import IoPool, Work
from server.kvcache.tiers.segments import ALIGNMENT, DirectoryLock, Segments
from server.types import SSD, Note, TierFault

HEADER_BYTES = ALIGNMENT
MAGIC = b"TERRACE1"
RAW = 0
"""The only codec so far: the block's own bytes."""
_HEADER = struct.Struct("<8sI32s32s32sIIQ16s")
"""Magic, codec, fingerprint, hash, parent, depth, 1 if there is a parent, bytes, checksum; then the header's own."""
_SEAL = struct.Struct("<Q")
MAX_IO_BYTES = 8 * 2**20
"""Of one system call; a longer run is split."""
CLOSE_S = 5.0
"""How long a stuck disk may hold up the end of the process, per thread at worst."""


@dataclass(slots=True)
class SsdStats:
    """Written by many threads under one lock; read by anyone."""

    bytes_read: int = 0
    bytes_written: int = 0
    read_s: float = 0.0
    write_s: float = 0.0
    reads: int = 0
    writes: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    """By kind: what exactly did not agree, or which error the system gave."""
    recovered_blocks: int = 0
    recovery_s: float = 0.0


class SsdTier:
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

        Raises ConfigError when the directory cannot be used or has another owner.
        """
        assert len(fingerprint) == 32, "a fingerprint is 32 bytes"
        self.name = SSD
        self.stats = SsdStats()
        self._host = host
        self._fingerprint = fingerprint
        self._clock = clock
        self._wall_clock = wall_clock
        self._slot_bytes = HEADER_BYTES + host.stride
        self.capacity_blocks = frames_within(capacity_bytes, self._slot_bytes)
        self.directory = root / fingerprint.hex()
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = DirectoryLock(self.directory)
        self._io = io or OsIo()
        self.segments = Segments(
            self.directory,
            self.capacity_blocks,
            self._slot_bytes,
            cap_bytes=capacity_bytes,
            min_free_bytes=min_free_bytes,
            io=self._io,
        )
        self.journal = Journal(self.directory, fingerprint, self.capacity_blocks, self._io)
        self._threads = IoPool(readers, writers)
        self._counting = threading.Lock()
        self._headers = threading.local()
        self._run_blocks = max(1, MAX_IO_BYTES // self._slot_bytes)

    async def open(self) -> Recovered:
        """Take over what is on disk: O(index), no slot is read. Rows whose slot does not exist are dropped."""
        return await asyncio.to_thread(self._open)

    def _open(self) -> Recovered:
        started_s = self._clock()
        self.segments.open()
        found = self.journal.open(self._wall_clock())
        if not all(map(self.segments.holds, found.frames)):
            found = _without(found, {frame for frame in found.frames if not self.segments.holds(frame)})
        self.stats.recovered_blocks = len(found.frames)
        self.stats.recovery_s = self._clock() - started_s
        return found

    async def write(self, moves: Sequence[Move]) -> Sequence[TierFault | None]:
        return await self._each_run(moves, self._threads.write, self._write_run)

    async def read(self, moves: Sequence[Move]) -> Sequence[TierFault | None]:
        return await self._each_run(moves, self._threads.read, self._read_run)

    def note(self, notes: Sequence[Note]) -> None:
        self.journal.note(list(notes))

    async def aclose(self) -> None:
        """Finish what is open, as far as the disk lets us, and leave an index that the next start reads at once."""
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._threads.close(CLOSE_S)
        self.journal.close(CLOSE_S)
        self.segments.close()
        self._lock.release()

    # --- runs --------------------------------------------------------------------------------------------------------

    async def _each_run(
        self,
        moves: Sequence[Move],
        submit: Callable[[Work], Coroutine[Any, Any, Any]],
        carry: Callable[[Sequence[Move]], list[TierFault | None]],
    ) -> list[TierFault | None]:
        """`carry` for every run of neighbouring slots, all at once; outcomes in the order of `moves`."""
        runs = list(self._runs(moves))
        done = await asyncio.gather(*(submit(partial(carry, [moves[i] for i in run])) for run in runs))
        outcomes: list[TierFault | None] = [None] * len(moves)
        for run, results in zip(runs, done, strict=True):
            for i, result in zip(run, results, strict=True):
                outcomes[i] = result
        return outcomes

    def _runs(self, moves: Sequence[Move]) -> Iterator[list[int]]:
        run: list[int] = []
        for i in sorted(range(len(moves)), key=lambda i: moves[i].frame):
            if run:
                last = moves[run[-1]].frame
                joined = moves[i].frame == last + 1 and self.segments.runs_on(last) and len(run) < self._run_blocks
                if not joined:
                    yield run
                    run = []
            run.append(i)
        if run:
            yield run

    def _header_views(self, count: int) -> list[memoryview]:
        """`count` page-aligned header buffers of this thread."""
        pages: memoryview | None = getattr(self._headers, "pages", None)
        if pages is None:
            pages = memoryview(mmap.mmap(-1, self._run_blocks * HEADER_BYTES))
            self._headers.pages = pages
        return [pages[i * HEADER_BYTES : (i + 1) * HEADER_BYTES] for i in range(count)]

    def _write_run(self, moves: Sequence[Move]) -> list[TierFault | None]:
        """One run, one I/O. Blocks that are not what they should be split it: bytes that nobody vouches for are not
        written."""
        outcomes: list[TierFault | None] = []
        good: list[tuple[Move, bytes]] = []
        for move in moves:
            digest = self._host.digest_of(move.host, move.hash)
            if digest is None:
                outcomes += self._put(good)
                good = []
                outcomes.append(self._fault("corrupt", "label", "the host frame does not hold this block"))
            else:
                good.append((move, digest))
        return outcomes + self._put(good)

    def _put(self, blocks: Sequence[tuple[Move, bytes]]) -> list[TierFault | None]:
        if not blocks:
            return []
        first, count = blocks[0][0].frame, len(blocks)
        buffers: list[memoryview] = []
        for header, (move, digest) in zip(self._header_views(count), blocks, strict=True):
            self._fill_header(header, move, digest)
            buffers += (header, self._host.padded(move.host))
        started_s = self._clock()
        try:
            self.segments.ensure(first, count)
            fd, offset = self.segments.place(first)
            written = self._io.pwritev(fd, buffers, offset)
        except OSError as error:
            return [self._os_fault(error)] * count
        self._count_io(written, started_s, reading=False)
        outcomes: list[TierFault | None] = []
        for i, (move, _) in enumerate(blocks):
            whole = written >= (i + 1) * self._slot_bytes
            outcomes.append(None if whole else self._fault("io", "short_write", f"wrote {written} bytes"))
            if whole:
                self.journal.put(move.frame, move.hash, move.parent, move.depth)
        return outcomes

    def _read_run(self, moves: Sequence[Move]) -> list[TierFault | None]:
        headers = self._header_views(len(moves))
        buffers: list[memoryview] = []
        for header, move in zip(headers, moves, strict=True):
            self._host.expect_nothing(move.host)
            buffers += (header, self._host.padded(move.host))
        started_s = self._clock()
        try:
            fd, offset = self.segments.place(moves[0].frame)
            got = self._preadv(fd, buffers, offset)
        except OSError as error:
            return [self._os_fault(error)] * len(moves)
        self._count_io(got, started_s, reading=True)
        outcomes: list[TierFault | None] = []
        for i, (header, move) in enumerate(zip(headers, moves, strict=True)):
            if got < (i + 1) * self._slot_bytes:
                outcomes.append(self._fault("io", "short_read", f"read {got} bytes"))
            else:
                outcomes.append(self._verify(header, move))
        return outcomes

    def _preadv(self, fd: int, buffers: Buffers, offset: int) -> int:
        got = self._io.preadv(fd, buffers, offset)
        if not self.segments.direct:
            with contextlib.suppress(OSError):  # what was read is in our own arena now, once is enough
                os.posix_fadvise(fd, offset, got, os.POSIX_FADV_DONTNEED)
        return got

    # --- headers -----------------------------------------------------------------------------------------------------

    def _fill_header(self, header: memoryview, move: Move, digest: bytes) -> None:
        _HEADER.pack_into(
            header, 0, MAGIC, RAW, self._fingerprint, move.hash, move.parent or b"", move.depth,
            move.parent is not None, self._host.block_bytes, digest,
        )  # fmt: skip
        _SEAL.pack_into(header, _HEADER.size, xxhash.xxh3_64_intdigest(header[: _HEADER.size]))

    def _verify(self, header: memoryview, move: Move) -> TierFault | None:
        """Label the host frame if the slot is exactly what was asked for; else say what is wrong with it."""
        (seal,) = _SEAL.unpack_from(header, _HEADER.size)
        magic, codec, fingerprint, value, parent, depth, chained, length, digest = _HEADER.unpack_from(header, 0)
        if magic != MAGIC or seal != xxhash.xxh3_64_intdigest(header[: _HEADER.size]):
            return self._fault("corrupt", "header", f"slot {move.frame} has no valid header")
        if fingerprint != self._fingerprint or codec != RAW or length != self._host.block_bytes:
            return self._fault("corrupt", "foreign", f"slot {move.frame} was written by another model")
        if value != move.hash or depth != move.depth or (parent if chained else None) != move.parent:
            return self._fault("corrupt", "stale", f"slot {move.frame} holds another block")
        if checksum(self._host.view(move.host)) != digest:
            return self._fault("corrupt", "payload", f"the bytes of slot {move.frame} are not what was written")
        self._host.label(move.host, move.hash, digest)
        return None

    # --- counting ----------------------------------------------------------------------------------------------------

    def _count_io(self, count: int, started_s: float, *, reading: bool) -> None:
        spent_s = self._clock() - started_s
        with self._counting:
            if reading:
                self.stats.bytes_read += count
                self.stats.read_s += spent_s
                self.stats.reads += 1
            else:
                self.stats.bytes_written += count
                self.stats.write_s += spent_s
                self.stats.writes += 1

    def _fault(self, reason: str, kind: str, detail: str) -> TierFault:
        with self._counting:
            self.stats.faults[kind] += 1
        return TierFault(reason, detail)

    def _os_fault(self, error: OSError) -> TierFault:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return self._fault("no_space" if full else "io", errno.errorcode.get(error.errno or 0, "EIO"), str(error))


def frames_within(capacity_bytes: int, slot_bytes: int) -> int:
    """How many slots, with the index files that they need, never exceed `capacity_bytes`."""
    frames = max(0, capacity_bytes // slot_bytes)
    while frames > 0 and frames * slot_bytes + bytes_needed(frames) > capacity_bytes:
        excess = frames * slot_bytes + bytes_needed(frames) - capacity_bytes
        frames -= max(1, excess // (slot_bytes + 300))
    return max(0, frames)


def _without(found: Recovered, lost: set[int]) -> Recovered:
    """`found` without the frames `lost` and all that hangs on them."""
    below: dict[int, list[int]] = {}
    for frame, above in zip(found.frames, found.above, strict=True):
        below.setdefault(above, []).append(frame)
    gone, doubtful = set(lost), list(lost)
    while doubtful:
        for frame in below.get(doubtful.pop(), ()):
            if frame not in gone:
                gone.add(frame)
                doubtful.append(frame)
    rows = [i for i, frame in enumerate(found.frames) if frame not in gone]
    return Recovered(
        frames=[found.frames[i] for i in rows],
        hashes=[found.hashes[i] for i in rows],
        above=[found.above[i] for i in rows],
        depths=[found.depths[i] for i in rows],
        pins=found.pins,
    )
