"""A storm of faults over a real SSD tier in real files: `python -m tests.system.ssd_faults --count 60000 --seed 1`.

Beside the tier runs a model that knows the only right bytes of every block, and looks at the files itself to know what
a read must find. Counted: wrong bytes reported as success (must be 0), exceptions (0), damage that a read did not
report (0), and good slots that a read refused (0). Every error that was injected into a read or write of blocks must
be in the tier's own counters.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random

from server.kvcache.host import HostArena
from server.kvcache.tiers.base import Recovered
from server.kvcache.tiers.files import Buffers, OsIo
from server.kvcache.tiers.ssd import SsdTier
from server.types import Note, TierFault
from tests.system.ssd_store import (
    BLOCK_BYTES,
    FIELDS_BYTES,
    FINGERPRINT,
    SEGMENT_SLOTS,
    SLOT_BYTES,
    Block,
    content,
    fill,
    holds,
    make_store,
    slot_image,
    small_segments,
)  # fmt: skip

CHAINS, DEPTH = 12, 12
HOST_FRAMES = 48
ERRORS = (errno.EIO, errno.EACCES, errno.ENOSPC)
ON_WRITE = ("error", "torn_error", "torn_success", "misdirected", "lost", "flipped", "short", "stalled")
ON_READ = ("error", "flipped", "misdirected", "short", "ends_early", "stalled")
ON_INDEX = ("error", "short")
AT_REST = ("flip", "foreign", "swap", "old", "zero", "truncate")
ON_FILES = ("flip", "cut", "zero_tail", "garbage", "gone", "foreign_version")


class FaultyIo(OsIo):
    """Makes one call in `every` go wrong, any thread; says what it did. Off while `every` is 0."""

    def __init__(self, rng: Random) -> None:
        self.every = 0
        self.injected: Counter[str] = Counter()
        self.errors = 0
        """Errors raised, and reads ended early, in reads and writes of blocks: the tier must count each."""
        self.disturbed: set[tuple[str, int]] = set()
        """File name and slot of every block of a read that went wrong somehow."""
        self.flipped: set[tuple[str, int]] = set()
        """The same of blocks that were given wrong bits."""
        self._rng = rng
        self._lock = threading.Lock()
        self._names: dict[int, str] = {}

    def open(self, path: Path, flags: int) -> int:
        if self._pick("open", ("error",)):
            raise OSError(errno.EACCES, "injected")
        fd = super().open(path, flags)
        self._names[fd] = path.name
        return fd

    def pwritev(self, fd: int, buffers: Buffers, offset: int) -> int:
        kind = self._pick("write", ON_WRITE)
        data = b"".join(buffers)
        if kind == "error":
            raise self._error()
        if kind in ("torn_error", "torn_success", "short"):
            self._patch(fd, data[: self._draw(0, len(data) // 512) * 512], offset)
            if kind == "torn_error":
                raise self._error()
            if kind == "torn_success":
                return len(data)
            return super().pwritev(fd, _first(buffers, self._draw(1, len(data) // 4096) * 4096), offset)
        if kind == "misdirected":
            self._patch(fd, data, self._draw(0, max(0, os.fstat(fd).st_size - len(data)) // SLOT_BYTES) * SLOT_BYTES)
            return len(data)
        if kind == "lost":
            return len(data)
        if kind == "flipped" and len(data) % SLOT_BYTES == 0:
            self._patch(fd, _flipped(data, self.bit(len(data))), offset)
            return len(data)
        return super().pwritev(fd, buffers, offset)

    def preadv(self, fd: int, buffers: Buffers, offset: int) -> int:
        kind = self._pick("read", ON_READ)
        size = sum(map(len, buffers))
        if kind is not None:
            slots = range(offset // SLOT_BYTES, -(-(offset + size) // SLOT_BYTES))
            with self._lock:
                self.disturbed.update((self._names[fd], slot) for slot in slots)
        if kind == "error":
            raise self._error()
        if kind == "ends_early":
            with self._lock:
                self.errors += 1
            return 0
        if kind == "short":
            return super().preadv(fd, _first(buffers, self._draw(1, size // 4096) * 4096), offset)
        if kind == "misdirected":
            offset = self._draw(0, max(0, os.fstat(fd).st_size - size) // SLOT_BYTES) * SLOT_BYTES
        got = super().preadv(fd, buffers, offset)
        if kind == "flipped" and offset % SLOT_BYTES == size % SLOT_BYTES == 0 and got == size:
            bit = self.bit(size)
            position, rest = bit // 8, bit // 8
            for buffer in buffers:
                if rest < len(buffer):
                    buffer[rest] ^= 1 << bit % 8
                    break
                rest -= len(buffer)
            with self._lock:
                self.flipped.add((self._names[fd], (offset + position) // SLOT_BYTES))
        return got

    def write(self, fd: int, data: bytes) -> int:
        kind = self._pick("index", ON_INDEX)
        if kind == "error":
            raise OSError(self._rng.choice(ERRORS), "injected")
        if kind == "short":
            return super().write(fd, data[: self._draw(0, len(data) - 1)])
        return super().write(fd, data)

    def fallocate(self, fd: int, offset: int, length: int) -> None:
        if self._pick("grow", ("error",)):
            raise self._error()
        super().fallocate(fd, offset, length)

    def fdatasync(self, fd: int) -> None:
        if self._pick("sync", ("error",)):
            raise OSError(errno.EIO, "injected")

    def _pick(self, call: str, kinds: Sequence[str]) -> str | None:
        with self._lock:
            if not self.every or self._rng.randrange(self.every):
                return None
            kind = self._rng.choice(kinds)
            self.injected[f"{call}:{kind}"] += 1
        if kind == "stalled":
            time.sleep(0.002)
        return kind

    def _error(self) -> OSError:
        with self._lock:
            self.errors += 1
            return OSError(self._rng.choice(ERRORS), "injected")

    def _draw(self, low: int, high: int) -> int:
        with self._lock:
            return self._rng.randint(low, max(low, high))

    def bit(self, size: int) -> int:
        """A bit that matters, of a run of slots."""
        slot = self._draw(0, size // SLOT_BYTES - 1) * SLOT_BYTES
        where = self._draw(0, FIELDS_BYTES - 1) if self._draw(0, 1) else 4096 + self._draw(0, BLOCK_BYTES - 1)
        return (slot + where) * 8 + self._draw(0, 7)

    def _patch(self, fd: int, data: bytes, offset: int) -> None:
        """Write past O_DIRECT's rules, through another descriptor."""
        other = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
        try:
            os.pwrite(other, data, offset)
        finally:
            os.close(other)


def _first(buffers: Buffers, size: int) -> list[memoryview]:
    found = []
    for buffer in buffers:
        found.append(buffer[:size])
        size -= len(found[-1])
        if size <= 0:
            break
    return found


def _flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


class Storm:
    """Sessions of one store, each opened after a clean end or a crash, possibly damaged in between."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.rng = Random(seed)
        self.injected: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.problems: list[str] = []
        self._folder = folder
        self._root = folder / "0"
        self._number = 0
        self._old: dict[tuple[str, int], bytes] = {}
        self.io = FaultyIo(self.rng)
        self._host = HostArena(HOST_FRAMES, BLOCK_BYTES)
        self._books: dict[int, Block] = {}
        """Frame -> the block that the tier said it wrote, or recovered, there."""

    @property
    def count(self) -> int:
        return self.injected.total() + self.io.injected.total()

    async def session(self) -> None:
        """Open, work under faults, close or crash, then damage what is left."""
        self.io.every = self.rng.choice((0, 20))
        tier = make_store(self._root, self._host, io=self.io)
        self._take_over(tier, await tier.open())
        self.io.every = self.rng.choice((3, 5, 20))
        errors, faults = self.io.errors, Counter(self.outcomes)
        for _ in range(self.rng.randint(5, 60)):
            await self.rng.choice((self._write, self._read, self._read, self._note, self._damage))(tier)
        self.io.every = self.rng.choice((0, 3))
        self._compare_counts(tier, self.io.errors - errors, self.outcomes - faults)
        if self.rng.random() < 0.4:
            await self._crash(tier)
        else:
            await tier.aclose()
        if self.rng.random() < 0.5:
            self._damage_index()
        self._books = {}

    # --- work --------------------------------------------------------------------------------------------------------

    def _take_over(self, tier: SsdTier, found: Recovered) -> None:
        """Rows must be well-formed; which of them are still good only a read can tell."""
        known = {Block(c, d).hash: Block(c, d) for c in range(CHAINS) for d in range(DEPTH)}
        place = {frame: i for i, frame in enumerate(found.frames)}
        self._expect(len(place) == len(found.frames), "a frame was recovered twice")
        self._expect(len(set(found.hashes)) == len(found.hashes), "a block was recovered twice")
        rows = zip(found.frames, found.hashes, found.above, found.depths, strict=True)
        for i, (frame, value, above, depth) in enumerate(rows):
            block = known.get(value)
            self._expect(block is not None and depth == block.depth, "a block was recovered that never was")
            self._expect(0 <= frame < tier.capacity_blocks, "a frame beyond the capacity")
            if block is not None:
                self._books[frame] = block
                if block.depth == 0:
                    self._expect(above == -1, "a first block with something above")
                else:
                    self._expect(place.get(above, -1) > i, "a parent that is missing or would be evicted first")
                    self._expect(found.hashes[place[above]] == block.parent, "another block above")

    async def _write(self, tier: SsdTier) -> None:
        """Runs of neighbouring frames, in a few calls at once; sometimes a host frame holds something else."""
        frames = self._some_frames(tier)
        moves, blocks, lies = [], [], set()
        for host, frame in enumerate(frames):
            block = Block(self.rng.randrange(CHAINS), self.rng.randrange(DEPTH))
            fill(self._host, host, block)
            if self.rng.random() < 0.03:
                self._host.label(host, Block(99, 0).hash)
                lies.add(frame)
                self.injected["mislabelled"] += 1
            moves.append(block.move(host, frame))
            blocks.append(block)
            self._books.pop(frame, None)
        for move, block, outcome in zip(moves, blocks, await self._calls(tier.write, moves), strict=True):
            if outcome is None:
                self._expect(move.frame not in lies, "bytes of another block were written")
                self._books[move.frame] = block
            self.outcomes[f"write {outcome.reason if outcome else 'ok'}"] += 1

    async def _read(self, tier: SsdTier) -> None:
        """Every outcome is compared with what the files really hold."""
        frames = [frame for frame in self._some_frames(tier) if frame in self._books]
        good = {frame: self._on_disk(tier, frame) for frame in frames}
        moves = [self._books[frame].move(host, frame) for host, frame in enumerate(frames)]
        self.io.flipped.clear()
        self.io.disturbed.clear()
        outcomes = await self._calls(tier.read, moves)
        for move, outcome in zip(moves, outcomes, strict=True):
            block = self._books[move.frame]
            self.outcomes[f"read {outcome.reason if outcome else 'ok'}"] += 1
            place = (f"segment-{move.frame // SEGMENT_SLOTS:05d}.kv", move.frame % SEGMENT_SLOTS)
            disturbed = place in self.io.disturbed or (outcome is not None and outcome.detail == "cancelled")
            if outcome is None:
                self._expect(holds(self._host, move.host, block), f"WRONG BYTES as success from frame {move.frame}")
                self._expect(good[move.frame] or disturbed, f"damage in frame {move.frame} was not reported")
                self._expect(place not in self.io.flipped, f"flipped bits in frame {move.frame} were not reported")
            else:
                self._expect(self._host.digest_of(move.host, block.hash) is None, "a failed read left a label")
                self._expect(disturbed or not good[move.frame], f"good frame {move.frame} was refused: {outcome}")
                if outcome.reason == "corrupt" and not disturbed:  # as the daemon does
                    del self._books[move.frame]
                    tier.note([Note("drop", block.hash, move.frame)])

    async def _calls(self, call, moves) -> list[TierFault | None]:
        """One call or two at once; sometimes the caller is cancelled, and nothing may move when it is back."""
        middle = self.rng.randint(0, len(moves)) if self.rng.random() < 0.3 else len(moves)
        tasks = [asyncio.ensure_future(call(part)) for part in (moves[:middle], moves[middle:])]
        cancel = self.rng.random() < 0.05
        if cancel:
            await asyncio.sleep(0)
            tasks[0].cancel()
            self.injected["cancelled"] += 1
        outcomes: list[TierFault | None] = []
        for task, part in zip(tasks, (moves[:middle], moves[middle:]), strict=True):
            try:
                outcomes += await task
            except asyncio.CancelledError:  # nobody knows how it went: take it as failed, and the frame as free
                outcomes += [TierFault("io", "cancelled")] * len(part)
                for move in part:
                    self._host.expect_nothing(move.host)
        return outcomes

    async def _note(self, tier: SsdTier) -> None:
        for frame in self.rng.sample(sorted(self._books), min(3, len(self._books))):
            kind = self.rng.choice(("touch", "pin", "drop"))
            tier.note([Note(kind, self._books[frame].hash, frame, time.time() + 60)])
            if kind == "drop":
                del self._books[frame]

    def _some_frames(self, tier: SsdTier) -> list[int]:
        frames: list[int] = []
        while len(frames) < HOST_FRAMES // 2:
            start = self.rng.randrange(tier.capacity_blocks)
            run = range(start, min(tier.capacity_blocks, start + self.rng.randint(1, 8)))
            frames += [frame for frame in run if frame not in frames]
            if self.rng.random() < 0.3:
                break
        return frames

    # --- damage ------------------------------------------------------------------------------------------------------

    def _on_disk(self, tier: SsdTier, frame: int) -> bool:
        """Does the file hold exactly what the books say? Looked up without any code of the tier."""
        path, offset = self._slot(tier.directory, frame)
        with contextlib.suppress(OSError), path.open("rb") as file:
            data = os.pread(file.fileno(), SLOT_BYTES, offset)
            fields, block = slot_image(self._books[frame])
            whole = len(data) == SLOT_BYTES
            return whole and data[:FIELDS_BYTES] == fields and data[4096 : 4096 + BLOCK_BYTES] == block
        return False

    def _slot(self, directory: Path, frame: int) -> tuple[Path, int]:
        number, slot = divmod(frame, SEGMENT_SLOTS)
        return directory / f"segment-{number:05d}.kv", slot * SLOT_BYTES

    async def _damage(self, tier: SsdTier) -> None:
        """Something happens to a slot at rest."""
        if not self._books:
            return
        frame = self.rng.choice(sorted(self._books))
        path, offset = self._slot(tier.directory, frame)
        kind = self.rng.choice(AT_REST)
        with contextlib.suppress(OSError), path.open("r+b") as file:
            fd = file.fileno()
            data = os.pread(fd, SLOT_BYTES, offset)
            if len(data) < SLOT_BYTES:
                return
            key = (path.name, offset)
            if kind == "flip":
                data = _flipped(data, self.io.bit(SLOT_BYTES))
            elif kind == "foreign":
                fields, _ = slot_image(self._books[frame], bytes(32))
                data = fields + data[FIELDS_BYTES:]
            elif kind == "swap":
                other = self.rng.randrange(max(1, os.fstat(fd).st_size // SLOT_BYTES)) * SLOT_BYTES
                theirs = os.pread(fd, SLOT_BYTES, other)
                os.pwrite(fd, data, other)
                data = theirs
            elif kind == "old":
                self._old[key], data = data, self._old.get(key, data)
            elif kind == "zero":
                data = bytes(SLOT_BYTES)
            if kind == "truncate":
                os.ftruncate(fd, offset + self.rng.randrange(SLOT_BYTES))
            else:
                os.pwrite(fd, data, offset)
            self.injected[f"at_rest:{kind}"] += 1

    def _damage_index(self) -> None:
        for path in (self._root / FINGERPRINT.hex() / name for name in ("checkpoint", "journal")):
            if self.rng.random() < 0.5 or not path.exists() or not (data := path.read_bytes()):
                continue
            kind = self.rng.choice(ON_FILES)
            cut = self.rng.randrange(len(data))
            damaged = {
                "flip": _flipped(data, cut * 8),
                "cut": data[:cut],
                "zero_tail": data[:cut] + bytes(len(data) - cut),
                "garbage": data[:cut] + self.rng.randbytes(300),
                "foreign_version": data.replace(b"index 1", b"index 2", 1),
            }
            if kind == "gone":
                path.unlink()
            else:
                path.write_bytes(damaged[kind])
            self.injected[f"index:{kind}"] += 1

    async def _crash(self, tier: SsdTier) -> None:
        """What kill -9 leaves: the files as they are at this moment, less the end of what was written last."""
        self._number += 1
        after = self._folder / str(self._number)
        with contextlib.suppress(shutil.Error):  # checkpoint.new is renamed under our eyes; the rest is copied
            shutil.copytree(self._root, after)
        await tier.aclose()
        shutil.rmtree(self._root)
        self._root = after
        journal = after / FINGERPRINT.hex() / "journal"
        if journal.exists() and self.rng.random() < 0.5:
            os.truncate(journal, self.rng.randint(0, journal.stat().st_size))
        self.injected["crash"] += 1

    # --- judging -----------------------------------------------------------------------------------------------------

    def _compare_counts(self, tier: SsdTier, errors: int, outcomes: Counter[str]) -> None:
        stats = tier.stats
        self._expect(stats.io_errors.total() >= errors, f"{errors} errors injected, counted {stats.io_errors}")
        corrupt = outcomes["read corrupt"] + outcomes["write corrupt"]
        self._expect(stats.corrupt.total() >= corrupt, f"{corrupt} blocks refused, counted {stats.corrupt}")
        self._expect(tier.disk_bytes <= 2**20, f"{tier.disk_bytes} bytes on disk, over the cap")

    def _expect(self, fact: bool, otherwise: str) -> None:
        if not fact:
            self.problems.append(otherwise)


async def run(folder: Path, count: int, seed: int) -> Storm:
    """Sessions until `count` faults were injected or something is wrong."""
    storm = Storm(folder, seed)
    while storm.count < count and not storm.problems:
        await storm.session()
        content.cache_clear()
    return storm


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.system.ssd_faults", allow_abbrev=False)
    parser.add_argument("--count", type=int, default=60_000, help="faults to inject")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="where to put the store; default: a temporary folder")
    args = parser.parse_args(argv)
    small_segments()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        started_s = time.monotonic()
        storm = asyncio.run(run(Path(folder), args.count, args.seed))
    injected = storm.injected + storm.io.injected
    for kinds in (injected, storm.outcomes):
        print("\n".join(f"{number:>9}  {kind}" for kind, number in sorted(kinds.items())))
    spent_s = time.monotonic() - started_s
    print(f"{storm.count} faults in {spent_s:.0f} s, seed {args.seed}: {len(storm.problems)} problems")
    for problem in storm.problems:
        print(problem)
    return 1 if storm.problems else 0


if __name__ == "__main__":
    sys.exit(main())
