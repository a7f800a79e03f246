"""Blocks between pinned memory and the device: bit for bit, by both ways to copy, many at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest
import torch

from server.kernels.copy import CudaCopyStream, Driver
from server.kvcache.host import HostArena
from server.kvcache.tiers.base import Move
from server.kvcache.tiers.cuda import CudaTier
from tests.gpu.variants import DEVICE

pytestmark = pytest.mark.gpu

BLOCKS = 24


@asynccontextmanager
async def tier_of(host: HostArena, *, batches: bool) -> AsyncIterator[tuple[CudaTier, torch.Tensor]]:
    """A tier of as many frames as half the host's, and its memory, poisoned."""
    arena = torch.full((host.frames // 2, host.block_bytes), 0xFF, dtype=torch.uint8, device=DEVICE)
    torch.cuda.synchronize()
    driver = Driver()
    if not batches:
        driver.addresses["batch"] = None
    host.register(driver)
    up, down = CudaCopyStream(driver, "up"), CudaCopyStream(driver, "down")
    tier = CudaTier(arena, host, up, down, time.monotonic)
    yield tier, arena
    await tier.aclose()
    assert host.edges == [], "closing unpins"


def filled(block_bytes: int) -> tuple[HostArena, list[bytes]]:
    """Twice as many frames as blocks, the first half of them labelled with random bytes, and these."""
    host = HostArena(2 * BLOCKS, block_bytes)
    host.prefault()
    data = [np.random.default_rng(block).bytes(block_bytes) for block in range(BLOCKS)]
    for block, content in enumerate(data):
        host.view(block)[:] = content
        host.label(block, bytes([block]) * 32)
    return host, data


@pytest.mark.parametrize("batches", [True, False], ids=["batched", "one by one"])
@pytest.mark.parametrize("block_bytes", [3072, 48 * 1024, 2 * 2**20, 6 * 2**20])
async def test_a_round_trip_changes_nothing(batches: bool, block_bytes: int) -> None:
    """Blocks of all sizes go up into shuffled frames and come down into others, several calls at once, bit for bit."""
    host, data = filled(block_bytes)
    frames = np.random.default_rng(0).permutation(BLOCKS).tolist()
    async with tier_of(host, batches=batches) as (tier, arena):
        up = [Move(bytes([block]) * 32, None, 0, block, frames[block]) for block in range(BLOCKS)]
        down = [Move(bytes([block]) * 32, None, 0, BLOCKS + block, frames[block]) for block in range(BLOCKS)]
        for call, moves in ((tier.write, up), (tier.read, down)):
            outcomes = await asyncio.gather(*(call(moves[start : start + 5]) for start in range(0, BLOCKS, 5)))
            assert [fault for part in outcomes for fault in part] == [None] * BLOCKS
        for block in range(BLOCKS):
            assert arena[frames[block]].cpu().numpy().tobytes() == data[block]
            assert bytes(host.view(BLOCKS + block)) == data[block]


async def test_a_block_that_changed_does_not_go_up() -> None:
    """A byte that was flipped in DRAM is a fault of that block, its frame stays as it was, and the others arrive."""
    host, data = filled(2 * 2**20)
    async with tier_of(host, batches=True) as (tier, arena):
        host.view(1)[12345] ^= 1
        outcomes = await tier.write([Move(bytes([block]) * 32, None, 0, block, block) for block in range(3)])
        assert [fault and fault.reason for fault in outcomes] == [None, "corrupt", None]
        assert arena[1].eq(0xFF).all()
        assert arena[2].cpu().numpy().tobytes() == data[2]


async def test_what_a_kernel_wrote_comes_down() -> None:
    """Once a step is over for the host, a spill reads what it wrote, whatever else the device computes meanwhile."""
    host, _ = filled(2 * 2**20)
    async with tier_of(host, batches=True) as (tier, arena):
        busy = torch.randn(4096, 4096, device=DEVICE)
        for turn in range(8):
            arena.fill_(turn)
            torch.cuda.synchronize()
            for _ in range(20):
                busy = torch.tanh(busy @ busy)
            moves = [Move(bytes([turn, block]) * 16, None, 0, BLOCKS + block, block) for block in range(BLOCKS)]
            assert await tier.read(moves) == [None] * BLOCKS
            assert all(bytes(host.view(BLOCKS + block)) == bytes([turn]) * 2 * 2**20 for block in range(BLOCKS))
