"""The device tier of a CPU-only machine: a RAM arena, and copy threads between it and the host arena.

Copies are plain memory moves outside the interpreter lock. Every block gets its checksum when it arrives in the host
arena and is checked against it when it leaves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor

from server.kvcache.host import HostArena
from server.kvcache.tiers.base import Move, Recovered
from server.types import DEVICE, Note, TierFault

COPY_THREADS = 2
"""One does not saturate the memory of a server, and a request waits for what they bring."""
Copy = Callable[[Sequence[Move]], list[TierFault | None]]


class DeviceTier:
    """`arena` is `[frames, ...]`, contiguous, on the CPU; `host` has frames of the same number of bytes."""

    def __init__(self, arena: Tensor, host: HostArena) -> None:
        assert arena.device.type == "cpu", "this tier copies between two places in RAM"
        assert arena[0].numel() * arena.itemsize == host.block_bytes, "device and host blocks have the same size"
        self.name = DEVICE
        self.capacity_blocks = arena.shape[0]
        self._arena = arena
        self._host = host
        self._threads = ThreadPoolExecutor(COPY_THREADS, "terrace-copy")

    async def open(self) -> Recovered:
        """Nothing outlives the process here."""
        return Recovered()

    async def write(self, moves: Sequence[Move]) -> Sequence[TierFault | None]:
        return await self._call(self._onboard, moves)

    async def read(self, moves: Sequence[Move]) -> Sequence[TierFault | None]:
        return await self._call(self._spill, moves)

    def note(self, notes: Sequence[Note]) -> None:
        """Nothing needs to be remembered."""

    async def aclose(self) -> None:
        await asyncio.to_thread(self._threads.shutdown)

    async def _call(self, copy: Copy, moves: Sequence[Move]) -> list[TierFault | None]:
        """Run `copy` on a copy thread; also when the caller is cancelled, return only when it is over."""
        work = asyncio.get_running_loop().run_in_executor(self._threads, copy, moves)
        cancelled = False
        while not work.done():
            try:
                await asyncio.shield(work)
            except asyncio.CancelledError:
                cancelled = True
        if cancelled:
            raise asyncio.CancelledError
        return work.result()

    def _onboard(self, moves: Sequence[Move]) -> list[TierFault | None]:
        return [self._host.give_out(move.host, move.hash, self._address(move.frame)) for move in moves]

    def _spill(self, moves: Sequence[Move]) -> list[TierFault | None]:
        for move in moves:
            self._host.take_in(move.host, move.hash, self._address(move.frame))
        return [None] * len(moves)

    def _address(self, frame: int) -> int:
        return self._arena.data_ptr() + frame * self._host.block_bytes
