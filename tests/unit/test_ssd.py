"""The SSD tier on a healthy disk and on a sick one, one property at a time."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from server.errors import ConfigError
from server.kvcache.host import HostArena
from server.kvcache.tiers import pool, ssd
from server.kvcache.tiers.check import list_caches, verify_cache
from server.kvcache.tiers.files import Buffers, OsIo, move_all
from server.kvcache.tiers.journal import bytes_needed
from server.kvcache.tiers.segments import list_directories
from server.kvcache.tiers.slots import HEADER_BYTES
from server.kvcache.tiers.ssd import SsdTier, frames_within
from server.types import TierFault
from tests.system.ssd_store import (
    BLOCK_BYTES,
    FINGERPRINT,
    SEGMENT_SLOTS,
    SLOT_BYTES,
    Block,
    fill,
    holds,
    make_store,
    small_segments,
)

HOST_FRAMES = 32
MIB = 2**20


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    small_segments(monkeypatch.setattr)


@pytest.fixture
def host() -> HostArena:
    return HostArena(HOST_FRAMES, BLOCK_BYTES)


class SpyIo(OsIo):
    """Says what was called; `before` may raise, wait, or give another number of bytes to move."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []
        self.before: Callable[[str, int, int], int | None] = lambda name, offset, size: None

    def preadv(self, fd: int, buffers: Buffers, offset: int) -> int:
        return super().preadv(fd, self._cut("preadv", buffers, offset), offset)

    def pwritev(self, fd: int, buffers: Buffers, offset: int) -> int:
        return super().pwritev(fd, self._cut("pwritev", buffers, offset), offset)

    def fallocate(self, fd: int, offset: int, length: int) -> None:
        self.before("fallocate", offset, length)
        super().fallocate(fd, offset, length)

    def _cut(self, name: str, buffers: Buffers, offset: int) -> Buffers:
        size = sum(map(len, buffers))
        self.calls.append((name, offset, size))
        limit = self.before(name, offset, size)
        if limit is None:
            return buffers
        found = []
        for buffer in buffers:
            found.append(buffer[:limit])
            limit -= len(found[-1])
        return found


async def write(tier: SsdTier, host: HostArena, places: dict[int, Block]) -> list[TierFault | None]:
    """Write blocks to frames, through as many host frames."""
    moves = []
    for i, (frame, block) in enumerate(places.items()):
        fill(host, i, block)
        moves.append(block.move(i, frame))
    return list(await tier.write(moves))


async def read(tier: SsdTier, host: HostArena, places: dict[int, Block]) -> list[TierFault | None]:
    """Read them back into the same host frames; success is checked against the only right bytes."""
    outcomes = list(await tier.read([block.move(i, frame) for i, (frame, block) in enumerate(places.items())]))
    for i, (outcome, block) in enumerate(zip(outcomes, places.values(), strict=True)):
        assert holds(host, i, block) is (outcome is None), "a label exactly where the block is"
    return outcomes


def chain(length: int, first_frame: int = 0, number: int = 0) -> dict[int, Block]:
    return {first_frame + depth: Block(number, depth) for depth in range(length)}


# --- I/O -------------------------------------------------------------------------------------------------------------


async def test_neighbours_share_one_call(tmp_path: Path, host: HostArena):
    """Moves to adjacent slots are one system call whatever their order, but never across two segments."""
    io = SpyIo()
    tier = make_store(tmp_path, host, io=io)
    await tier.open()
    io.calls.clear()
    start = SEGMENT_SLOTS - 3
    places = dict(reversed(chain(6, start).items())) | {50: Block(1, 0)}
    assert await write(tier, host, places) == [None] * 7
    sizes = sorted(size for _, _, size in io.calls)
    assert sizes == [SLOT_BYTES, 3 * SLOT_BYTES, 3 * SLOT_BYTES]
    assert await read(tier, host, places) == [None] * 7
    await tier.aclose()


async def test_long_runs_are_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: HostArena):
    """No call moves more than MAX_IO_BYTES."""
    monkeypatch.setattr(ssd, "MAX_IO_BYTES", 5 * SLOT_BYTES)
    io = SpyIo()
    tier = make_store(tmp_path, host, io=io)
    await tier.open()
    io.calls.clear()
    assert await write(tier, host, chain(12)) == [None] * 12
    assert sorted(size // SLOT_BYTES for _, _, size in io.calls) == [2, 5, 5]
    await tier.aclose()


@pytest.mark.parametrize("limit", [4096, 3 * 4096, 5 * 4096 + 100])
async def test_short_calls_are_continued(tmp_path: Path, host: HostArena, limit: int):
    """A call that moves only some bytes goes on where it stopped, at a multiple of 4096."""
    io = SpyIo()
    tier = make_store(tmp_path, host, io=io)
    await tier.open()
    io.calls.clear()
    io.before = lambda name, offset, size: min(limit, size) if name == "preadv" or limit % 4096 == 0 else None
    assert await write(tier, host, chain(8)) == [None] * 8
    if limit % 4096 == 0:
        assert len(io.calls) > 3
        assert await read(tier, host, chain(8)) == [None] * 8
    await tier.aclose()


def test_a_call_that_moves_nothing_ends_the_loop():
    """An end of file is a short count, not an endless loop; odd counts are rounded down."""
    buffers = [memoryview(bytearray(4096)) for _ in range(4)]
    counts = iter((4096 + 17, 8192, 0))
    offsets = []

    def call(fd: int, rest: Buffers, offset: int) -> int:
        offsets.append((offset, sum(map(len, rest))))
        return next(counts)

    assert move_all(call, 0, buffers, 0) == 3 * 4096
    assert offsets == [(0, 16384), (4096, 12288), (12288, 4096)]


async def test_one_bad_sector_takes_one_block(tmp_path: Path, host: HostArena):
    """When a run cannot be read, its blocks are tried one by one."""
    io = SpyIo()
    tier = make_store(tmp_path, host, io=io)
    await tier.open()
    await write(tier, host, chain(5))

    def bad(name: str, offset: int, size: int) -> None:
        if name == "preadv" and offset <= 3 * SLOT_BYTES < offset + size:
            raise OSError(errno.EIO, "Input/output error")

    io.before = bad
    outcomes = await read(tier, host, chain(5))
    assert [outcome and outcome.reason for outcome in outcomes] == [None, None, None, "io", None]
    assert tier.stats.io_errors == {"EIO": 2}
    await tier.aclose()


async def test_without_o_direct_it_goes_through_the_page_cache(tmp_path: Path, host: HostArena, caplog):
    """A file system that refuses O_DIRECT is used all the same, and the log says so."""

    class NoDirect(OsIo):
        def open(self, path: Path, flags: int) -> int:
            if flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return super().open(path, flags)

    tier = make_store(tmp_path, host, io=NoDirect())
    await tier.open()
    assert not tier.segments.direct
    assert "page cache" in caplog.text
    assert await write(tier, host, chain(5)) == [None] * 5
    assert await read(tier, host, chain(5)) == [None] * 5
    await tier.aclose()


@pytest.mark.parametrize("persistent", [False, True])
async def test_whichever_call_fails_every_block_is_right_or_refused(tmp_path: Path, host: HostArena, persistent: bool):
    """The n-th system call fails, for n = 1, 2, ... until none is left to fail; once, or from then on."""
    for nth in range(1, 100):
        io = SpyIo()
        tier = make_store(tmp_path / str(nth), host, io=io)
        await tier.open()
        count = 0

        def fail(name: str, offset: int, size: int) -> None:
            nonlocal count
            count += 1
            if count == nth or (persistent and count > nth):  # noqa: B023 - called within this turn
                raise OSError(errno.EIO, "Input/output error")

        io.before = fail
        places = chain(3, SEGMENT_SLOTS - 2) | chain(2, 5, number=1)
        written = await write(tier, host, places)
        outcomes = await read(tier, host, places)
        if not persistent:
            assert all(w is None or r is not None for w, r in zip(written, outcomes, strict=True))
        assert tier.stats.io_errors["EIO"] == (max(0, count - nth + 1) if persistent else count >= nth)
        await tier.aclose()
        if count < nth:
            break
    assert 5 < nth < 99, "the sweep ended because nothing was left to fail"


async def test_a_cancelled_call_waits_for_the_disk_however_often(tmp_path: Path, host: HostArena):
    """Cancelled twice, a write still returns only when its last byte is written."""
    io, go = SpyIo(), threading.Event()
    tier = make_store(tmp_path, host, io=io)
    await tier.open()
    io.before = lambda name, offset, size: go.wait() and None
    task = asyncio.ensure_future(write(tier, host, {0: Block(0, 0), 9: Block(1, 0)}))
    for _ in range(2):
        await asyncio.sleep(0.01)
        task.cancel()
    await asyncio.sleep(0.01)
    assert not task.done()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await read(tier, host, {0: Block(0, 0), 9: Block(1, 0)}) == [None, None]
    await tier.aclose()


async def test_writes_let_reads_go_first_but_not_for_ever(monkeypatch: pytest.MonkeyPatch):
    """While a read is queued a write waits; when its patience ends it goes."""
    go, order = threading.Event(), []
    monkeypatch.setattr(pool, "WRITE_YIELDS_S", 60.0)
    threads = pool.IoPool(1, 1)
    reads = asyncio.ensure_future(threads.read([lambda: go.wait() and order.append("read"), go.wait]))
    write = asyncio.ensure_future(threads.write([lambda: order.append("write")]))
    await asyncio.sleep(0.01)
    before = list(order)
    go.set()
    await asyncio.gather(reads, write)
    assert before == []
    assert order == ["read", "write"]
    go.clear()
    monkeypatch.setattr(pool, "WRITE_YIELDS_S", 0.001)
    reads = asyncio.ensure_future(threads.read([go.wait, go.wait]))
    await threads.write([lambda: order.append("impatient")])
    go.set()
    await reads
    assert order[-1] == "impatient"


async def test_a_bug_in_a_thread_reaches_the_caller():
    """An exception that is no OSError is not swallowed, and the thread lives on."""
    threads = pool.IoPool(1, 1)
    with pytest.raises(ZeroDivisionError):
        await threads.read([lambda: 1 // 0, lambda: 1])
    assert await threads.read([lambda: 2]) == [2]


async def test_a_stuck_disk_does_not_hold_up_the_end(tmp_path: Path, host: HostArena, monkeypatch: pytest.MonkeyPatch):
    """Closing gives up, and open calls end as timeouts; the lock stays until the process, which may write, is gone."""
    monkeypatch.setattr(ssd, "CLOSE_S", 0.05)
    io, go = SpyIo(), threading.Event()
    tier = make_store(tmp_path, host, io=io)
    await tier.open()
    io.before = lambda name, offset, size: go.wait() and None
    task = asyncio.ensure_future(write(tier, host, chain(1)))
    await asyncio.sleep(0.01)
    await tier.aclose()
    (outcome,) = await task
    assert outcome is not None
    assert outcome.reason == "timeout"
    with pytest.raises(ConfigError):
        make_store(tmp_path, host)
    go.set()


# --- directories, limits ---------------------------------------------------------------------------------------------


async def test_only_the_owner_can_read_it(tmp_path: Path, host: HostArena):
    """Blocks are what people typed: directory 0700, files 0600, whatever the umask."""
    before = os.umask(0)
    try:
        tier = make_store(tmp_path, host)
        await tier.open()
        await write(tier, host, chain(3))
        await tier.aclose()
    finally:
        os.umask(before)
    assert stat.S_IMODE(tier.directory.stat().st_mode) == 0o700
    files = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tier.directory.iterdir()}
    assert files == dict.fromkeys(("LOCK", "checkpoint", "journal", "segment-00000.kv"), 0o600)


async def test_symbolic_links_are_not_followed(tmp_path: Path, host: HostArena):
    """A segment that is a link is not written through; it is as if the disk refused it."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "root" / FINGERPRINT.hex()).mkdir(parents=True)
    (tmp_path / "root" / FINGERPRINT.hex() / "segment-00000.kv").symlink_to(victim)
    tier = make_store(tmp_path / "root", host)
    await tier.open()
    (outcome,) = await write(tier, host, chain(1))
    assert outcome is not None
    assert victim.read_bytes() == b"precious"
    await tier.aclose()


async def test_a_directory_has_one_owner(tmp_path: Path, host: HostArena):
    """The second is told who the first is and what to do, until the first is gone."""
    first = make_store(tmp_path, host)
    await first.open()
    with pytest.raises(ConfigError, match=f"{first.directory} is in use .*pid {os.getpid()}.*--ssd-path"):
        make_store(tmp_path, host)
    other = make_store(tmp_path, host, fingerprint=bytes(32))
    await other.open()
    await other.aclose()
    await first.aclose()
    again = make_store(tmp_path, host)
    await again.open()
    await again.aclose()


@pytest.mark.parametrize("slot_bytes", [8192, 4096 + 384 * 1024, 4096 + 2 * MIB])
def test_slots_and_index_fit_the_cap(slot_bytes: int):
    """For any cap, and not one slot more would fit."""
    for capacity in (0, 10_000, MIB, 7 * MIB + 1, 2**30, 10**12):
        frames = frames_within(capacity, slot_bytes)
        assert frames == 0 or frames * slot_bytes + bytes_needed(frames) <= capacity
        assert (frames + 1) * slot_bytes + bytes_needed(frames + 1) > capacity


async def test_the_cap_holds_also_when_it_shrinks(tmp_path: Path, host: HostArena):
    """A full tier is within its cap; opened with a smaller one, it keeps what fits and is within that."""
    tier = make_store(tmp_path, host, capacity_bytes=2 * MIB)
    await tier.open()
    size = tier.capacity_blocks
    for start in range(0, size, 16):
        places = {frame: Block(frame, 0) for frame in range(start, min(size, start + 16))}
        assert set(await write(tier, host, places)) == {None}
        assert tier.disk_bytes <= 2 * MIB
    await tier.aclose()
    small = make_store(tmp_path, host, capacity_bytes=MIB)
    found = await small.open()
    assert 50 < small.capacity_blocks < size
    assert sorted(found.frames) == list(range(small.capacity_blocks))
    assert small.disk_bytes <= MIB
    assert small.segments.bytes <= small.capacity_blocks * SLOT_BYTES
    assert await read(small, host, {frame: Block(frame, 0) for frame in found.frames[-10:]}) == [None] * 10
    await small.aclose()
    assert small.disk_bytes <= MIB


async def test_the_free_space_floor_holds(tmp_path: Path, host: HostArena):
    """No segment grows into the last free bytes; what has a place already can still be rewritten."""

    class Crowded(OsIo):
        free = 100 * MIB

        def free_bytes(self, directory: Path) -> int:
            return self.free

    io = Crowded()
    tier = make_store(tmp_path, host, io=io, min_free_bytes=50 * MIB)
    await tier.open()
    assert await write(tier, host, chain(4)) == [None] * 4
    io.free = 50 * MIB
    outcomes = await write(tier, host, {0: Block(1, 0), 4: Block(2, 0)})
    assert [outcome and outcome.reason for outcome in outcomes] == [None, "no_space"]
    assert tier.stats.io_errors == {"ENOSPC": 1}
    io.free = 51 * MIB
    assert await write(tier, host, {4: Block(2, 0)}) == [None]
    await tier.aclose()


async def test_models_that_nobody_serves_make_room(tmp_path: Path, host: HostArena):
    """Unowned directories count against the cap and go whole, least recently used first; owned ones are left alone."""
    for number in (1, 2, 3, 4):
        other = make_store(tmp_path, host, capacity_bytes=8 * MIB, fingerprint=bytes([number]) * 32)
        await other.open()
        for start in (0, 32, 64):
            await write(other, host, {frame: Block(frame, 0) for frame in range(start, start + 32)})
        await other.aclose()
        for path in other.directory.iterdir():
            os.utime(path, (number, number))
    owned = make_store(tmp_path, host, capacity_bytes=8 * MIB, fingerprint=bytes([2]) * 32)
    await owned.open()
    size = sum(info.bytes for info in list_directories(tmp_path) if not info.owned)
    tier = make_store(tmp_path, host, capacity_bytes=size)
    await tier.open()
    names = {info.path.name[:2] for info in list_directories(tmp_path)}
    assert names == {FINGERPRINT.hex()[:2], "02", "03", "04"}, "its own index already needs more than is left"
    for start in range(0, tier.capacity_blocks - 32, 32):
        assert set(await write(tier, host, {frame: Block(frame, 0) for frame in range(start, start + 32)})) == {None}
        assert sum(info.bytes for info in list_directories(tmp_path) if info.path != owned.directory) <= size
    assert {info.path.name[:2] for info in list_directories(tmp_path)} == {FINGERPRINT.hex()[:2], "02"}
    await owned.aclose()
    await tier.aclose()


# --- restart ---------------------------------------------------------------------------------------------------------


async def test_a_restart_is_warm(tmp_path: Path, host: HostArena):
    """Everything that was written is recovered and reads back, without a slot being read to open it."""
    io = SpyIo()
    tier = make_store(tmp_path, host)
    await tier.open()
    await write(tier, host, chain(20, 30))
    await tier.aclose()
    tier = make_store(tmp_path, host, io=io)
    found = await tier.open()
    assert found.frames == list(range(49, 29, -1))
    assert all(name == "pwritev" or (offset == 0 and size == 4096) for name, offset, size in io.calls), "only the probe"
    assert tier.stats.recovered_blocks == 20
    assert await read(tier, host, chain(20, 30)) == [None] * 20
    await tier.aclose()


async def test_a_lost_segment_loses_its_blocks(tmp_path: Path, host: HostArena):
    """Rows of a segment that is gone, or too short, are dropped with all that hang on them, and counted."""
    tier = make_store(tmp_path, host)
    await tier.open()
    await write(tier, host, chain(6, SEGMENT_SLOTS - 3) | chain(4, 0, number=1))
    await tier.aclose()
    (tier.directory / "segment-00001.kv").unlink()
    os.truncate(tier.directory / "segment-00000.kv", (SEGMENT_SLOTS - 1) * SLOT_BYTES)
    tier = make_store(tmp_path, host)
    found = await tier.open()
    assert sorted(found.frames) == [0, 1, 2, 3, SEGMENT_SLOTS - 3, SEGMENT_SLOTS - 2]
    assert tier.stats.dropped_at_recovery == 4
    await tier.aclose()


async def test_caches_can_be_listed_and_verified_from_outside(tmp_path: Path, host: HostArena):
    """Each cache with its blocks, owned or not; each block good or with what is wrong with it."""
    assert list_caches(tmp_path / "nowhere") == []
    tier = make_store(tmp_path, host)
    await tier.open()
    await write(tier, host, chain(5, SEGMENT_SLOTS - 2))
    await tier.aclose()
    (info,) = list_caches(tmp_path)
    assert (info.fingerprint, info.blocks, info.block_bytes, info.owned) == (FINGERPRINT, 5, BLOCK_BYTES, False)
    assert info.bytes == tier.disk_bytes
    assert [verdict.fault for verdict in verify_cache(tier.directory)] == [""] * 5
    with (tier.directory / "segment-00000.kv").open("r+b") as file:
        file.seek((SEGMENT_SLOTS - 2) * SLOT_BYTES + HEADER_BYTES)
        file.write(b"!")
        file.seek((SEGMENT_SLOTS - 1) * SLOT_BYTES + 60)
        file.write(b"!")
    with (tier.directory / "segment-00001.kv").open("r+b") as file:
        first = file.read(SLOT_BYTES)
        file.seek(SLOT_BYTES)
        file.write(first)
        file.truncate(2 * SLOT_BYTES)
    faults = {verdict.frame: verdict.fault for verdict in verify_cache(tier.directory)}
    assert list(faults.values()) == [
        "the bytes are not those that were written", "no valid header", "", "another block",
        "the segment ends before it",
    ]  # fmt: skip
    for name in ("checkpoint", "journal"):
        (tier.directory / name).unlink()
    assert list(verify_cache(tier.directory)) == []
    assert [info.blocks for info in list_caches(tmp_path)] == [0]
