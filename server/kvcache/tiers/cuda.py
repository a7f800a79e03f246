"""The device tier of a CUDA device: its memory, and copies by its DMA engines between that and the pinned host arena.

Knows addresses and checksums; refuses to know CUDA, which is behind `CopyStream`, and what a block holds.

**Checksums.** A block is checked against its label before it goes up, and gets its checksum when it came down. Cold
memory is hashed at about 10 GB/s a core, a link moves 55 GB/s (PCIe 5 x16): so a call is cut into jobs that several
threads work at, and while the DMA engine copies the blocks of one, the others hash. Device memory corrects its own
errors.

**Bursts.** Whatever waits in a copy engine stands before the small copies of a step: its tokens going up, its sampled
tokens coming back. So the bound is on what is in flight, for each direction, and not on the number of threads: two
bursts up, the second of which is copied while the thread of the first wakes up, and one down. What they cost the time
between tokens is the benchmark's `decode.moving` (`server.bench.gpu.steps`).

**One call.** A job is one call into the native library, which hashes, copies and waits without the interpreter lock.
Done in Python, each block takes that lock several times: the threads then wait for it longer than for the link, and
the thread that launches steps waits for them. What is left of Python is the same for each job, whatever its size, so
that jobs are large.

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
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

from server.kvcache.host import HostArena
from server.kvcache.tiers.base import Move, Recovered
from server.kvcache.tiers.pool import IoPool
from server.types import DEVICE, MOVED, REFUSED, Moved, Note, TierFault

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("terrace")

JOB_BYTES = 16 * 2**20
"""What a thread does in one call of the native library."""
BURST_UP_BYTES = 8 * 2**20
"""Twice this is in flight to the device: 150 us each at 55 GB/s. A step's tokens go up while the step before computes,
and can wait."""
BURST_DOWN_BYTES = 4 * 2**20
"""All that is in flight to the host: 76 us, which sampled tokens, read back by the same engine, may have to wait."""
ONBOARD_THREADS = 6
"""Somebody waits for what they bring: so many hash as fast as the link copies, and leave cores to the rest."""
SPILL_THREADS = 3
"""More than a prefill makes: one copies while the others hash."""
CLOSE_S = 5.0
"""How long a device that does not answer may hold up the end of the process."""

Outcomes = list[TierFault | None]


class CopyStream(Protocol):
    """Copies between pinned host memory and a device in one direction. Any thread, without the interpreter lock. What
    is in flight is a few bursts of at most `burst` bytes, whoever calls; when a call returns, no byte of it moves any
    more."""

    def up(self, targets: Sequence[int], sources: Sequence[int], size: int, burst: int, digests: bytes) -> Moved:
        """Copy `size` bytes from each address of `sources`, in host memory, to that of `targets`, unless their checksum
        is not that of `digests`: 16 bytes each. A block that is refused leaves its target as it was."""
        ...

    def down(self, targets: Sequence[int], sources: Sequence[int], size: int, burst: int) -> Moved:
        """Copy likewise to host memory; then take the checksums of what came."""
        ...

    def close(self) -> None:
        """When no call is open. Raises OSError."""
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
        outcomes: Outcomes = [None] * len(moves)
        known: list[int] = []
        digests: list[bytes] = []
        for i, move in enumerate(moves):
            digest = self._host.digest_of(move.host, move.hash)
            if digest is None:
                outcomes[i] = self._host.refuse("label", move.host)
            else:
                known.append(i)
                digests.append(digest)
        labelled = [moves[i] for i in known]
        moved = self._up.up(self._device_ends(labelled), self._host_ends(labelled), self._host.block_bytes,
                            BURST_UP_BYTES, b"".join(digests))  # fmt: skip
        for i, state in zip(known, moved.states, strict=True):
            if state == REFUSED:
                outcomes[i] = self._host.refuse("payload", moves[i].host)
            elif state != MOVED:
                outcomes[i] = TierFault("io", str(moved.error))
        return outcomes

    def _spill(self, moves: Sequence[Move]) -> Outcomes:
        for move in moves:
            self._host.expect_nothing(move.host)
        moved = self._down.down(self._host_ends(moves), self._device_ends(moves), self._host.block_bytes,
                                BURST_DOWN_BYTES)  # fmt: skip
        outcomes: Outcomes = []
        for i, (move, state) in enumerate(zip(moves, moved.states, strict=True)):
            if state == MOVED:
                self._host.label(move.host, move.hash, moved.digest(i))
            outcomes.append(None if state == MOVED else TierFault("io", str(moved.error)))
        return outcomes

    def _device_ends(self, moves: Sequence[Move]) -> list[int]:
        """Addresses of the blocks."""
        first = self._arena.data_ptr()
        return [first + move.frame * self._host.block_bytes for move in moves]

    def _host_ends(self, moves: Sequence[Move]) -> list[int]:
        return [self._host.frame_address(move.host) for move in moves]


def _joined(parts: Sequence[Outcomes]) -> Outcomes:
    return [outcome for part in parts for outcome in part]
