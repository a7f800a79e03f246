"""The device tier of a CUDA device over a fake one, and the pinning of the host arena, one property at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from random import Random

import pytest
import torch

from server.errors import ConfigError
from server.kernels.copy import LANES
from server.kvcache import host as host_module
from server.kvcache.host import HostArena, checksum
from server.kvcache.tiers import cuda
from server.kvcache.tiers.cuda import CudaTier
from server.types import MOVED
from tests.fake_device import FAULTS, POISON, FakeDevice, FakePins
from tests.system.ssd_store import BLOCK_BYTES, Block, content, fill, holds

FRAMES = 16


@pytest.fixture
def host() -> HostArena:
    return HostArena(FRAMES, BLOCK_BYTES)


async def until(happened: Callable[[], bool]) -> None:
    for _ in range(5000):
        if happened():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it did not happen")


async def test_blocks_are_checked_while_others_are_copied(host: HostArena, monkeypatch: pytest.MonkeyPatch):
    """A block is found to be spoilt while the copies of another job are in flight: one burst on each lane."""
    monkeypatch.setattr(cuda, "JOB_BYTES", 2 * BLOCK_BYTES)
    device = FakeDevice(FRAMES, host)
    tier = device.tier()
    blocks = [Block(0, depth) for depth in range(8)]
    for i, block in enumerate(blocks):
        fill(host, i, block)
    first = asyncio.ensure_future(tier.write([block.move(i, i) for i, block in enumerate(blocks[:6])]))
    await until(lambda: len(device.up.batches) == LANES)
    for i in (6, 7):
        host.view(i)[0] ^= 1
    outcomes = await tier.write([blocks[i].move(i, i) for i in (6, 7)])
    assert [fault and fault.reason for fault in outcomes] == ["corrupt", "corrupt"]
    assert not first.done()
    assert len(device.up.batches) == LANES
    device.free = True
    while device.up.batches:
        device.up.happen(Random(0))
    assert await first == [None] * 6
    assert all(device.block(i) == content(block.hash) for i, block in enumerate(blocks[:6]))
    assert device.up.most_bytes == LANES * 2 * BLOCK_BYTES
    await tier.aclose()
    assert device.misuses == []


@pytest.mark.parametrize("refused", FAULTS)
async def test_what_fails_is_a_fault_of_its_job_alone(host: HostArena, monkeypatch: pytest.MonkeyPatch, refused: str):
    """What the device refuses faults the blocks of that job, not those of the call's other jobs."""
    monkeypatch.setattr(cuda, "JOB_BYTES", BLOCK_BYTES)
    monkeypatch.setattr(cuda, "ONBOARD_THREADS", 1)
    device = FakeDevice(FRAMES, host, free=True)
    tier = device.tier()
    for i in range(3):
        fill(host, i, Block(i, 0))
    device.up.refuse = refused
    outcomes = await tier.write([Block(i, 0).move(i, i) for i in range(3)])
    assert [fault and fault.reason for fault in outcomes] == ["io", None, None]
    device.down.refuse = refused
    outcomes = await tier.read([Block(i, 0).move(8 + i, i) for i in (1, 2)])
    assert sorted(fault.reason for fault in outcomes if fault) == ["io"]
    assert [holds(host, 8 + i, Block(i, 0)) for i in (1, 2)] == [fault is None for fault in outcomes]
    await tier.aclose()
    assert device.misuses == []


async def test_bursts_before_an_error_count(host: HostArena, monkeypatch: pytest.MonkeyPatch):
    """What was copied and waited for before something fails is there; the rest is not tried."""
    for name in ("BURST_UP_BYTES", "BURST_DOWN_BYTES"):
        monkeypatch.setattr(cuda, name, 2 * BLOCK_BYTES)
    device = FakeDevice(FRAMES, host)
    tier = device.tier()
    for i in range(6):
        fill(host, i, Block(i, 0))
    calls = (tier.write, device.up, 0), (tier.read, device.down, 6)
    for call, stream, host_frame in calls:
        task = asyncio.ensure_future(call([Block(i, 0).move(host_frame + i, i) for i in range(6)]))
        for fail in (False, True):
            await until(lambda stream=stream: bool(stream.batches))
            first = stream.batches[0]
            while not first.over.is_set():
                stream.happen(Random(0), fail=fail)
        outcomes = await task
        assert [fault and fault.reason for fault in outcomes] == [None] * 2 + ["io"] * 4
        assert outcomes[2] is not None
        assert "cuEventSynchronize: CUDA_ERROR_UNKNOWN (999)" in outcomes[2].detail
        for i in range(2, 6):  # for the way down
            device.write(i, content(Block(i, 0).hash))
    assert [holds(host, 6 + i, Block(i, 0)) for i in range(6)] == [True] * 2 + [False] * 4
    await tier.aclose()


async def test_corrupt_blocks_are_counted(host: HostArena):
    """What does not leave the host arena shows in its counters, as on other devices."""
    tier = FakeDevice(FRAMES, host, free=True).tier()
    fill(host, 0, Block(0, 0))
    host.view(0)[17] ^= 1
    outcomes = await tier.write([Block(0, 0).move(0, 0), Block(1, 0).move(1, 1)])
    assert [fault and fault.reason for fault in outcomes] == ["corrupt", "corrupt"]
    assert host.corrupt == {"payload": 1, "label": 1}
    await tier.aclose()


async def test_a_large_block_moves_in_pieces(host: HostArena, monkeypatch: pytest.MonkeyPatch):
    """Blocks above the limit of what is in flight are copied piece by piece, and are whole in the end."""
    monkeypatch.setattr(cuda, "BURST_UP_BYTES", 1500)
    monkeypatch.setattr(cuda, "BURST_DOWN_BYTES", 1300)
    device = FakeDevice(FRAMES, host, free=True)
    tier = device.tier()
    for i in range(4):
        fill(host, i, Block(i, 0))
    assert await tier.write([Block(i, 0).move(i, i) for i in range(4)]) == [None] * 4
    assert await tier.read([Block(i, 0).move(9 - i, i) for i in range(4)]) == [None] * 4
    assert all(holds(host, 9 - i, Block(i, 0)) for i in range(4))
    assert (device.up.most_bytes, device.down.most_bytes) == (1500, 1300)
    await tier.aclose()
    assert device.misuses == []


def test_more_blocks_than_one_call_of_the_driver_takes():
    """Bursts of very small blocks end at the driver's calls of 256 copies; without checksums all are in flight."""
    host = HostArena(600, 256)
    device = FakeDevice(600, host, free=True)
    ends = [host.frame_address(i) for i in range(600)], [device.arena[i].data_ptr() for i in range(600)]
    for i in range(600):
        device.write(i, content(Block(i, 0).hash, 256))
    moved = device.down.down(*ends, 256, 2**20)
    assert moved.states == bytes([MOVED]) * 600
    assert device.down.most_bytes == 256 * 256
    for i in range(600):
        assert moved.digest(i) == checksum(host.view(i)) == checksum(memoryview(content(Block(i, 0).hash, 256)))
    device.arena.fill_(POISON)
    device.up.copy(ends[1], ends[0], 256)
    assert all(device.block(i) == content(Block(i, 0).hash, 256) for i in range(600))
    assert device.misuses == []


async def test_a_driver_without_batches_copies_one_by_one(host: HostArena):
    """Before CUDA 12.8: a call for each copy, and the same outcomes."""
    device = FakeDevice(FRAMES, host, free=True, batches=False)
    tier = device.tier()
    for i in range(6):
        fill(host, i, Block(i, 0))
    host.view(2)[0] ^= 1
    outcomes = await tier.write([Block(i, 0).move(i, i) for i in range(6)])
    assert [fault is None for fault in outcomes] == [i != 2 for i in range(6)]
    assert [device.block(i) == content(Block(i, 0).hash) for i in range(6)] == [i != 2 for i in range(6)]
    assert device.misuses == []
    await tier.aclose()


async def test_closing_leaves_nothing_behind(host: HostArena):
    """Streams are closed and memory is unpinned once nothing moves."""
    device = FakeDevice(FRAMES, host, free=True)
    tier = device.tier()
    assert device.pins.pinned
    await tier.aclose()
    assert not device.pins.pinned
    assert device.up.closed
    assert device.down.closed


async def test_a_stuck_device_does_not_hold_up_the_end(host: HostArena, monkeypatch: pytest.MonkeyPatch):
    """Closing gives up: open calls end as timeouts, and memory that may still be copied to stays pinned."""
    monkeypatch.setattr(cuda, "CLOSE_S", 0.05)
    device = FakeDevice(FRAMES, host)
    tier = device.tier()
    fill(host, 0, Block(0, 0))
    task = asyncio.ensure_future(tier.write([Block(0, 0).move(0, 0)]))
    await until(lambda: bool(device.up.batches))
    await tier.aclose()
    with pytest.raises(TimeoutError):
        await task
    assert device.pins.pinned
    assert not device.up.closed
    device.up.happen(Random(0))


def test_the_host_arena_must_be_pinned(host: HostArena):
    """Memory that the driver would copy through a buffer of its own is refused at once."""
    device = FakeDevice(FRAMES, HostArena(FRAMES, BLOCK_BYTES))
    with pytest.raises(AssertionError, match="registered"):
        CudaTier(torch.zeros(4, BLOCK_BYTES, dtype=torch.uint8), host, device.up, device.down, lambda: 0.0)


@pytest.mark.parametrize("block_bytes", [4000, 3 * 4096, 2**16])
def test_no_block_straddles_two_pinned_ranges(block_bytes: int, monkeypatch: pytest.MonkeyPatch):
    """Ranges begin and end with a frame, cover the arena without a gap, and are as large as asked for or one frame."""
    monkeypatch.setattr(host_module, "PIN_BYTES", 5 * 4096)
    host, pins = HostArena(23, block_bytes), FakePins()
    host.register(pins)
    assert host.edges == list(pins.pinned)
    assert len(host.edges) > 1
    following = [*host.edges[1:], host.address + 23 * host.stride]
    assert [address + size for address, size in pins.pinned.items()] == following
    assert all((edge - host.address) % host.stride == 0 for edge in host.edges)
    assert all(size <= max(5 * 4096, host.stride) for size in pins.pinned.values())
    host.unregister()
    assert (pins.pinned, host.edges) == ({}, [])
    host.unregister()


def test_memory_that_cannot_be_pinned_is_one_line_to_act_on(host: HostArena, monkeypatch: pytest.MonkeyPatch):
    """The message names the setting and the limits that there are, and nothing stays pinned."""
    monkeypatch.setattr(host_module, "PIN_BYTES", 4 * 4096)
    pins = FakePins(fails_at=2)
    with pytest.raises(ConfigError, match=r"dram_gib: only .*OUT_OF_MEMORY.*--dram-gib.*ulimit -l.*control group"):
        host.register(pins)
    assert (pins.pinned, host.edges) == ({}, [])
