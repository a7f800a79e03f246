"""A device without a device: memory that only copies touch, and streams whose copies happen when, and in which order
within a batch, the test says. The worst device that is legal: a target is torn from the moment it was enqueued, and the
source is read at the last moment.

Threads of the tier enqueue and wait; the thread of the test lets copies happen, or fail. `free`: whoever waits lets his
own happen.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import torch

from server.kvcache.host import HostArena
from server.kvcache.tiers.cuda import CudaTier

POISON = 0xFF
TORN = 0xAA
WAIT_S = 20.0
"""A thread that waits longer than this has been forgotten by the test."""


class FakePins:
    """Pins nothing, and keeps what it was asked for; `fails_at`: the call of `pin` that fails, from 0."""

    def __init__(self, fails_at: int = -1) -> None:
        self.pinned: dict[int, int] = {}
        self._fails_at = fails_at

    def pin(self, address: int, size: int) -> None:
        if len(self.pinned) == self._fails_at:
            raise OSError("cuMemHostRegister_v2: CUDA_ERROR_OUT_OF_MEMORY (2)")
        self.pinned[address] = size

    def unpin(self, address: int) -> None:
        del self.pinned[address]


@dataclass
class Batch:
    """Copies that were enqueued together: those that are still to happen, as (target, source, bytes)."""

    copies: list[tuple[int, int, int]]
    error: str = ""
    over: threading.Event = field(default_factory=threading.Event)


class FakeMark:
    def __init__(self, stream: FakeStream, batch: Batch) -> None:
        self._stream = stream
        self._batch = batch

    def wait(self) -> None:
        if self._stream.device.free:
            while not self._batch.over.is_set():
                self._stream.happen(Random(0))
        assert self._batch.over.wait(WAIT_S), "nobody let the copies happen"
        if self._batch.error:
            raise OSError(self._batch.error)


class FakeStream:
    """A FIFO of batches; `targets` and `sources` are the ranges of addresses that it may copy to and from."""

    def __init__(self, device: FakeDevice, targets: range, sources: range) -> None:
        self.device = device
        self.batches: list[Batch] = []
        self.refuse = 0
        """So many calls of `enqueue` fail from now on."""
        self.most_bytes = 0
        """The most that was ever in flight."""
        self.closed = False
        self._ends = (targets, sources)
        self._lock = threading.Lock()

    @property
    def in_flight_bytes(self) -> int:
        return sum(size for batch in self.batches for _, _, size in batch.copies)

    def enqueue(self, targets: Sequence[int], sources: Sequence[int], size: int) -> FakeMark:
        copies = [(*ends, size) for ends in zip(targets, sources, strict=True)]
        assert copies, "an empty batch"
        assert not self.closed, "the stream is closed"
        for copy in copies:
            for address, legal in zip(copy, self._ends):
                assert address in legal, "an address outside of the memory"
                assert address + size - 1 in legal, "a copy that ends outside of the memory"
        with self._lock:
            if self.refuse:
                self.refuse -= 1
                raise OSError("cuMemcpyBatchAsync: CUDA_ERROR_UNKNOWN (999)")
            for target, _, _ in copies:
                ctypes.memset(target, TORN, size)
            self.batches.append(batch := Batch(copies))
            self.most_bytes = max(self.most_bytes, self.in_flight_bytes)
        return FakeMark(self, batch)

    def happen(self, random: Random, *, fail: bool = False) -> None:
        """One copy of the oldest batch happens, or the whole batch fails; nothing where there is none."""
        with self._lock:
            if not self.batches:
                return
            batch = self.batches[0]
            if fail:
                batch.error = "cuEventSynchronize: CUDA_ERROR_UNKNOWN (999)"
                batch.copies.clear()
            else:
                target, source, size = batch.copies.pop(random.randrange(len(batch.copies)))
                ctypes.memmove(target, source, size)
            if not batch.copies:
                self.batches.pop(0)
                batch.over.set()

    def close(self) -> None:
        assert not self.batches, "closed while copies are in flight"
        self.closed = True


class FakeDevice:
    """Device memory of `frames` blocks, poisoned, beside `host`, and a stream each way."""

    def __init__(self, frames: int, host: HostArena, *, free: bool = False, arena: torch.Tensor | None = None) -> None:
        """`arena`: the memory, if it is there already; uint8 [frames, block_bytes]."""
        self.free = free
        fresh = torch.full((frames, host.block_bytes), POISON, dtype=torch.uint8) if arena is None else arena
        self.arena = fresh
        here = range(self.arena.data_ptr(), self.arena.data_ptr() + self.arena.numel())
        there = range(host.address, host.address + host.frames * host.stride)
        self.up = FakeStream(self, here, there)
        self.down = FakeStream(self, there, here)
        self.pins = FakePins()
        host.register(self.pins)
        self._host = host

    def tier(self) -> CudaTier:
        return CudaTier(self.arena, self._host, self.up, self.down, lambda: 0.0)

    def block(self, frame: int) -> bytes:
        return self.arena[frame].numpy().tobytes()

    def write(self, frame: int, data: bytes) -> None:
        """As a kernel would."""
        self.arena[frame] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
