"""What every tier promises, for every tier there is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from server.kvcache.host import HostArena
from server.kvcache.tiers import TIERS
from server.kvcache.tiers.base import Tier
from server.registry import resolve
from server.types import Note
from tests.fake_device import FakeDevice
from tests.system.ssd_store import BLOCK_BYTES, Block, fill, holds, make_store

HOST_FRAMES = 24
Make = Callable[[HostArena, Path], Tier]


def _device(host: HostArena, folder: Path) -> Tier:
    return resolve("tier", TIERS, "device")(torch.zeros(32, BLOCK_BYTES, dtype=torch.uint8), host)


def _cuda(host: HostArena, folder: Path) -> Tier:
    device = FakeDevice(32, host, free=True)
    return resolve("tier", TIERS, "cuda")(device.arena, host, device.up, device.down, lambda: 0.0)


MAKE: dict[str, Make] = {"device": _device, "cuda": _cuda, "ssd": lambda host, folder: make_store(folder, host)}


@pytest.fixture
def host() -> HostArena:
    return HostArena(HOST_FRAMES, BLOCK_BYTES)


@pytest.fixture(params=sorted(TIERS))
async def tier(request: Any, host: HostArena, tmp_path: Path) -> AsyncIterator[Tier]:
    tier = MAKE[request.param](host, tmp_path)
    assert list((await tier.open()).frames) == []
    yield tier
    await tier.aclose()


def chain(length: int, number: int = 0) -> list[Block]:
    return [Block(number, depth) for depth in range(length)]


async def test_round_trip(tier: Tier, host: HostArena):
    """What was written comes back bit for bit, labelled, into any host frame, in any order."""
    blocks = chain(10)
    for i, block in enumerate(blocks):
        fill(host, i, block)
    frames = [7, 3, 4, 5, 20, 21, 22, 0, 1, 9]
    assert await tier.write([block.move(i, frames[i]) for i, block in enumerate(blocks)]) == [None] * 10
    back = [block.move(23 - i, frames[i]) for i, block in enumerate(blocks)][::-1]
    assert await tier.read(back) == [None] * 10
    assert all(holds(host, 23 - i, block) for i, block in enumerate(blocks))


async def test_every_move_has_its_own_outcome(tier: Tier, host: HostArena):
    """A host frame that does not hold the block it should is refused; its neighbours in the call are not."""
    blocks = chain(5)
    for i, block in enumerate(blocks):
        fill(host, i, block)
    host.label(2, Block(9, 9).hash)
    host.expect_nothing(4)
    outcomes = await tier.write([block.move(i, i) for i, block in enumerate(blocks)])
    assert [outcome and outcome.reason for outcome in outcomes] == [None, None, "corrupt", None, "corrupt"]
    good = [0, 1, 3]
    assert await tier.read([blocks[i].move(10 + i, i) for i in good]) == [None] * 3
    assert all(holds(host, 10 + i, blocks[i]) for i in good)


async def test_a_frame_can_be_used_again(tier: Tier, host: HostArena):
    """The later of two blocks in one frame is the one that is there."""
    for block in (Block(1, 0), Block(2, 0), Block(3, 0)):
        fill(host, 0, block)
        assert await tier.write([block.move(0, 5)]) == [None]
        assert await tier.read([block.move(1, 5)]) == [None]
        assert holds(host, 1, block)
        tier.note([Note("drop", block.hash, 5)])


async def test_calls_may_overlap(tier: Tier, host: HostArena):
    """Calls on different frames do not disturb each other."""
    blocks = chain(12)
    for i, block in enumerate(blocks):
        fill(host, i, block)
    writes = [tier.write([block.move(i, i)]) for i, block in enumerate(blocks)]
    assert await asyncio.gather(*writes) == [[None]] * 12
    reads = [tier.read([block.move(12 + i, i)]) for i, block in enumerate(blocks)]
    assert await asyncio.gather(*reads) == [[None]] * 12
    assert all(holds(host, 12 + i, block) for i, block in enumerate(blocks))


async def test_a_cancelled_call_returns_when_no_byte_moves(tier: Tier, host: HostArena):
    """What happens to the host frames after a cancelled call has returned cannot reach the tier."""
    blocks = chain(HOST_FRAMES)
    for i, block in enumerate(blocks):
        fill(host, i, block)
    task = asyncio.ensure_future(tier.write([block.move(i, (5 * i) % 32) for i, block in enumerate(blocks)]))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    for i in range(HOST_FRAMES):
        host.expect_nothing(i)
        host.view(i)[:] = bytes(BLOCK_BYTES)
    outcomes = await tier.read([block.move(i, (5 * i) % 32) for i, block in enumerate(blocks)])
    assert all(holds(host, i, blocks[i]) for i, outcome in enumerate(outcomes) if outcome is None)


async def test_nothing_to_move_is_fine(tier: Tier):
    """Empty calls and notes do nothing."""
    assert list(await tier.write([])) == []
    assert list(await tier.read([])) == []
    tier.note([])
