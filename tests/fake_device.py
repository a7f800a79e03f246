"""A device without a device: memory that only copies touch, and a driver whose copies happen when, and in which order
within a batch, the test says. The worst device that is legal: a target is torn from the moment it was enqueued, and the
source is read at the last moment.

The native library calls the driver's functions, which are here, on the threads of the tier; the thread of the test lets
copies happen, or fail. `free`: whoever waits lets his own happen.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch

from server.kernels.copy import LANES, Link
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
    failed: bool = False
    over: threading.Event = field(default_factory=threading.Event)


STATUS = ctypes.c_int
FUNCTIONS = {
    "enter": ctypes.CFUNCTYPE(STATUS, ctypes.c_void_p),
    "batch": ctypes.CFUNCTYPE(
        STATUS, *(ctypes.POINTER(ctypes.c_uint64),) * 2, ctypes.POINTER(ctypes.c_size_t), ctypes.c_size_t,
        *(ctypes.c_void_p,) * 2, ctypes.c_size_t, *(ctypes.c_void_p,) * 2,
    ),
    "copy": ctypes.CFUNCTYPE(STATUS, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p),
    "record": ctypes.CFUNCTYPE(STATUS, *(ctypes.c_void_p,) * 2),
    "wait": ctypes.CFUNCTYPE(STATUS, ctypes.c_void_p),
    "sync": ctypes.CFUNCTYPE(STATUS, ctypes.c_void_p),
}  # fmt: skip
"""Fields of `struct link` -> their types."""
UNKNOWN = 999
FAULTS = ("enter", "batch", "record")
"""Functions that can refuse what they are asked for; `batch` has enqueued half of it by then."""


def check(function: str, code: int) -> None:
    raise OSError(f"{function}: CUDA_ERROR_UNKNOWN ({code})")


class FakeStream(Link):
    """A FIFO of batches; `targets` and `sources` are the ranges of addresses that it may copy to and from. `batches`:
    has the driver a function for several copies?"""

    def __init__(self, device: FakeDevice, targets: range, sources: range, lanes: int, *, batches: bool = True) -> None:
        self._functions = {name: kind(self._guarded(name)) for name, kind in FUNCTIONS.items()}
        addresses = {name: ctypes.cast(function, ctypes.c_void_p).value for name, function in self._functions.items()}
        super().__init__(addresses | ({} if batches else {"batch": None}), check, lanes)
        self.fields.events = (ctypes.c_void_p * LANES)(*range(1, LANES + 1))
        self.device = device
        self.batches: list[Batch] = []
        self.refuse = ""
        """The function of `FAULTS` that fails the next time."""
        self.most_bytes = 0
        """The most that was ever in flight."""
        self.closed = False
        self.misuses: list[BaseException] = []
        """What was done that a device would not forgive. There must not be any."""
        self._ends = (targets, sources)
        self._mine: dict[int, list[Batch]] = {}
        """By thread: what it has enqueued since it recorded an event. That is what it learns the fate of; on a device
        where a copy has failed, the others' waits would fail, too."""
        self._recorded: dict[int, list[Batch]] = {}
        self._lock = threading.Lock()

    @property
    def in_flight_bytes(self) -> int:
        return sum(size for batch in self.batches for _, _, size in batch.copies)

    def happen(self, random: Random, *, fail: bool = False) -> None:
        """One copy of the oldest batch happens, or the whole batch fails; nothing where there is none."""
        with self._lock:
            if not self.batches:
                return
            batch = self.batches[0]
            if fail:
                batch.failed = True
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

    # --- the driver's functions --------------------------------------------------------------------------------------

    def _guarded(self, name: str) -> Callable[..., int]:
        """A function of the driver: errors of it go to `misuses`, since nobody above the library would see them."""

        def call(*arguments: Any) -> int:
            try:
                if self.refuse != name:
                    return getattr(self, f"_{name}")(*arguments) or 0
                self.refuse = ""
                if name == "batch":
                    self._enqueue([arguments[end][i] for i in range(arguments[3] // 2)] for end in range(3))
            except BaseException as error:  # noqa: BLE001 - of this file's assertions
                self.misuses.append(error)
            return UNKNOWN

        return call

    def _enter(self, context: int) -> None:
        assert not self.closed, "the stream is closed"

    def _batch(self, targets: Any, sources: Any, sizes: Any, count: int, *_: Any) -> None:
        assert count, "an empty batch"
        self._enqueue([end[i] for i in range(count)] for end in (targets, sources, sizes))

    def _copy(self, target: int, source: int, size: int, stream: int) -> None:
        self._enqueue(([target], [source], [size]))

    def _enqueue(self, columns: Iterable[Sequence[int]]) -> None:
        copies = list(zip(*columns, strict=True))
        if not copies:
            return
        for target, source, size in copies:
            for address, legal in zip((target, source), self._ends, strict=True):
                assert address in legal, "an address outside of the memory"
                assert address + size - 1 in legal, "a copy that ends outside of the memory"
        with self._lock:
            for target, _, size in copies:
                ctypes.memset(target, TORN, size)
            self.batches.append(Batch(copies))
            self._mine.setdefault(threading.get_ident(), []).append(self.batches[-1])
            self.most_bytes = max(self.most_bytes, self.in_flight_bytes)

    def _record(self, event: int, stream: int) -> None:
        with self._lock:
            self._recorded[event] = self._mine.pop(threading.get_ident(), [])

    def _wait(self, event: int) -> int:
        return max(map(self._until_over, self._recorded.get(event, [])), default=0)

    def _sync(self, stream: int) -> int:
        with self._lock:
            batches = list(self.batches)
            self._mine.pop(threading.get_ident(), None)
        return max(map(self._until_over, batches), default=0)

    def _until_over(self, batch: Batch) -> int:
        while self.device.free and not batch.over.is_set():
            self.happen(Random(0))
        assert batch.over.wait(WAIT_S), "nobody let the copies happen"
        return UNKNOWN if batch.failed else 0


class FakeDevice:
    """Device memory of `frames` blocks, poisoned, beside `host`, and a stream each way."""

    def __init__(
        self, frames: int, host: HostArena, *, free: bool = False, arena: torch.Tensor | None = None,
        batches: bool = True,
    ) -> None:  # fmt: skip
        """`arena`: the memory, if it is there already; uint8 [frames, block_bytes]. `batches`: see `FakeStream`."""
        self.free = free
        fresh = torch.full((frames, host.block_bytes), POISON, dtype=torch.uint8) if arena is None else arena
        self.arena = fresh
        here = range(self.arena.data_ptr(), self.arena.data_ptr() + self.arena.numel())
        there = range(host.address, host.address + host.frames * host.stride)
        self.up = FakeStream(self, here, there, LANES, batches=batches)
        self.down = FakeStream(self, there, here, 1, batches=batches)
        self.pins = FakePins()
        host.register(self.pins)
        self._host = host

    @property
    def misuses(self) -> list[BaseException]:
        return self.up.misuses + self.down.misuses

    def tier(self) -> CudaTier:
        return CudaTier(self.arena, self._host, self.up, self.down, lambda: 0.0)

    def block(self, frame: int) -> bytes:
        return self.arena[frame].numpy().tobytes()

    def write(self, frame: int, data: bytes) -> None:
        """As a kernel would."""
        self.arena[frame] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
