"""The device tier of a CUDA device: its memory, and copies by its DMA engines between that and the pinned host arena.

Knows addresses and checksums; refuses to know CUDA, which is behind `CopyStream`, and what a block holds.

**Checksums.** A block is checked against its label before it goes up, and gets its checksum when it came down. Cold
memory is hashed at about 10 GB/s a core, a link moves 55 GB/s (PCIe 5 x16): so a call is cut into jobs that several
threads work at, and while the DMA engine copies one job, other threads hash the next ones. Both run outside the
interpreter lock. Device memory corrects its own errors.

**Order.** No event ties these streams to the compute stream, because a frame changes its role only when the host has
seen the end of what went before:
- A block is sealed at commit, when the tokens of the step that wrote it have reached the host, so that step is over on
  the device; nobody writes to a sealed block. A spill may read it at any time.
- A device frame is free, and may be the target of an onboard, when no step that names it runs any more.
- An onboarded block is given to a step after its call returned, when the host has seen its copy end; kernels launched
  later see the bytes. The same holds for the host's own reads after a spill.

**Layer by layer.** To let a step begin before all of a block has come, each layer's share of it would be a copy of its
own with an event that the attention of that layer waits for, in captured graphs too, and a step would run on blocks
whose copy may yet fail. That gains the smaller of load and compute, of requests that wait for both. It is left until a
measurement asks for it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

from server.kvcache.host import HostArena
from server.kvcache.tiers.base import Move, Recovered
from server.kvcache.tiers.pool import IoPool
from server.types import DEVICE, Note, TierFault

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("terrace")

JOB_BYTES = 4 * 2**20
"""What is submitted at once, and all that is in flight to the host: 76 us at 55 GB/s, which the sampled tokens, read
back by the same DMA engine, may have to wait. Two blocks of an 8B model: Python's share of a job stays small."""
ONBOARD_THREADS = 6
"""Somebody waits for what they bring: so many hash as fast as the link copies."""
SPILL_THREADS = 2
"""20 GB/s, several times what a prefill makes: one hashes while the other's copy runs."""
CLOSE_S = 5.0
"""How long a device that does not answer may hold up the end of the process."""

Outcomes = list[TierFault | None]


class Mark(Protocol):
    """A place in a stream of copies."""

    def wait(self) -> None:
        """Return when every copy before this place is over; once, on the thread that enqueued, and without the
        interpreter lock. Raises OSError where they failed: the targets hold anything, but no byte moves any more."""
        ...


class CopyStream(Protocol):
    """Copies between pinned host memory and a device in one direction, batch after batch; within a batch in any order.
    Any thread."""

    def enqueue(self, targets: Sequence[int], sources: Sequence[int], size: int) -> Mark:
        """Copy `size` bytes from each address of `sources` to that of `targets`, as many, at least one. Raises OSError
        where that cannot be: no byte of the batch moves any more then."""
        ...

    def close(self) -> None:
        """When nothing is enqueued. Raises OSError."""
        ...


class CudaTier:
    """`arena` is `[frames, ...]`, contiguous, on the device; `host` is registered and has frames of as many bytes (its
    frames may lie further apart). `up` copies to the device and `down` from it; the tier closes both, and unregisters
    `host`, when it is closed. `clock`: monotonic seconds."""

    def __init__(
        self, arena: Tensor, host: HostArena, up: CopyStream, down: CopyStream, clock: Callable[[], float]
    ) -> None:
        assert arena.is_contiguous(), "a block is one range of bytes"
        assert arena[0].numel() * arena.itemsize == host.block_bytes, "device and host blocks have the same size"
        assert host.edges, "the host arena must be registered: copies from other memory go through a driver's buffer"
        self.name = DEVICE
        self.capacity_blocks = arena.shape[0]
        self._arena = arena
        self._host = host
        self._up = up
        self._down = down
        self._clock = clock
        self._one_spill = threading.Lock()
        """Held while copies to the host are in flight."""
        # A pool for each direction: neither waits for the other.
        self._writers = IoPool(0, ONBOARD_THREADS)
        self._readers = IoPool(SPILL_THREADS, 0)

    async def open(self) -> Recovered:
        """Nothing outlives the process here."""
        return Recovered()

    async def write(self, moves: Sequence[Move]) -> Sequence[TierFault | None]:
        """Onboard. Raises TimeoutError where the tier was closed and the device did not answer."""
        return _joined(await self._writers.write([partial(self._onboard, job) for job in self._jobs(moves)]))

    async def read(self, moves: Sequence[Move]) -> Sequence[TierFault | None]:
        """Spill. Raises TimeoutError likewise."""
        return _joined(await self._readers.read([partial(self._spill, job) for job in self._jobs(moves)]))

    def note(self, notes: Sequence[Note]) -> None:
        """Nothing needs to be remembered."""

    async def aclose(self) -> None:
        """Finish what is open, as far as the device lets us."""
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        idle = self._writers.close(CLOSE_S, self._clock)
        idle &= self._readers.close(CLOSE_S, self._clock)
        if not idle:  # a DMA engine may still have the addresses: all stays as it is until the process ends
            log.warning("the device tier could not be closed: the device does not answer")
            return
        try:
            self._up.close()
            self._down.close()
            self._host.unregister()
        except OSError as error:
            log.warning("the device tier was not closed cleanly: %s", error)

    # --- jobs, on copy threads ---------------------------------------------------------------------------------------

    def _jobs(self, moves: Sequence[Move]) -> list[Sequence[Move]]:
        blocks = max(1, JOB_BYTES // self._host.block_bytes)
        return [moves[first : first + blocks] for first in range(0, len(moves), blocks)]

    def _onboard(self, moves: Sequence[Move]) -> Outcomes:
        outcomes = [self._host.verify(move.host, move.hash) for move in moves]
        good = [move for move, fault in zip(moves, outcomes, strict=True) if fault is None]
        if not good:
            return outcomes
        try:
            self._up.enqueue(self._device_ends(good), self._host_ends(good), self._host.block_bytes).wait()
        except OSError as error:
            return [fault or TierFault("io", str(error)) for fault in outcomes]
        return outcomes

    def _spill(self, moves: Sequence[Move]) -> Outcomes:
        for move in moves:
            self._host.expect_nothing(move.host)
        try:
            for start in range(0, self._host.block_bytes, JOB_BYTES):
                size = min(JOB_BYTES, self._host.block_bytes - start)
                with self._one_spill:
                    self._down.enqueue(self._host_ends(moves, start), self._device_ends(moves, start), size).wait()
        except OSError as error:
            return [TierFault("io", str(error))] * len(moves)
        for move in moves:
            self._host.label(move.host, move.hash)
        return [None] * len(moves)

    def _device_ends(self, moves: Sequence[Move], start: int = 0) -> list[int]:
        """Addresses of byte `start` of each block."""
        first = self._arena.data_ptr() + start
        return [first + move.frame * self._host.block_bytes for move in moves]

    def _host_ends(self, moves: Sequence[Move], start: int = 0) -> list[int]:
        return [self._host.frame_address(move.host) + start for move in moves]


def _joined(parts: Sequence[Outcomes]) -> Outcomes:
    return [outcome for part in parts for outcome in part]
