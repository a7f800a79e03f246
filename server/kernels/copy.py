"""Copies between pinned host memory and a CUDA device, and the pinning: the CUDA driver's own functions, by ctypes.

Knows the driver's functions, structures and errors; refuses to know frames, blocks and checksums. Nothing is built and
nothing of CUDA is needed to import it: `Driver` finds the library of the machine it runs on. All of it works in the
device's primary context, the one that torch uses, so the addresses of torch's tensors are valid here.

`cuMemcpyBatchAsync` hands a batch to the DMA engines in one call: near the link's bandwidth from 28 KiB a copy, and no
multiprocessor is taken from the model. Calls of a microsecond keep the interpreter lock, for giving it up and getting
it again costs more in a busy process; those that may block give it up.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Any, Literal

from server.errors import ConfigError

log = logging.getLogger("terrace")

LIBRARY = "libcuda.so.1"
BATCH_ABI = 12080
"""The version of `cuMemcpyBatchAsync` that is asked for: 12.8, the first, with an index of the copy that failed. Later
drivers still have it."""
STREAM_NON_BLOCKING = 1
"""Not ordered with the legacy default stream."""
EVENT_SLEEPS, EVENT_UNTIMED = 1, 2
"""A thread that waits sleeps: several would otherwise spin through a core each."""
SOURCE_IN_STREAM_ORDER, SOURCE_ANY_ORDER = 1, 3
"""When a copy may read its source: in stream order, or at any time until it is over, which suits host memory that
nobody writes to meanwhile."""
MISUSE = {1, 3, 201, 400}
"""Invalid value, not initialised, invalid context, invalid handle: errors of this program, not of the world."""

_INT, _UINT, _SIZE, _ADDRESS, _POINTER = (
    ctypes.c_int, ctypes.c_uint, ctypes.c_size_t, ctypes.c_uint64, ctypes.c_void_p,
)  # fmt: skip
QUICK = {
    "cuCtxSetCurrent": (_POINTER,),
    "cuEventCreate": (_POINTER, _UINT),
    "cuEventRecord": (_POINTER, _POINTER),
    "cuEventDestroy_v2": (_POINTER,),
    "cuGetErrorName": (_INT, _POINTER),
}
"""Driver functions that keep the interpreter lock -> argument types."""
SLOW = {
    "cuInit": (_UINT,),
    "cuDeviceGet": (_POINTER, _INT),
    "cuDevicePrimaryCtxRetain": (_POINTER, _INT),
    "cuGetProcAddress_v2": (ctypes.c_char_p, _POINTER, _INT, ctypes.c_uint64, _POINTER),
    "cuMemHostRegister_v2": (_POINTER, _SIZE, _UINT),
    "cuMemHostUnregister": (_POINTER,),
    "cuStreamCreate": (_POINTER, _UINT),
    "cuStreamSynchronize": (_POINTER,),
    "cuStreamDestroy_v2": (_POINTER,),
    "cuEventSynchronize": (_POINTER,),
    "cuMemcpyAsync": (_ADDRESS, _ADDRESS, _SIZE, _POINTER),
}
"""Driver functions that give it up -> argument types."""
BATCH = (_POINTER, _POINTER, _POINTER, _SIZE, _POINTER, _POINTER, _SIZE, _POINTER, _POINTER)
"""Arguments of `cuMemcpyBatchAsync`: targets, sources, sizes and how many; attributes, the first copy of each and how
many; the index of the copy that failed; the stream."""


class Location(ctypes.Structure):
    """`CUmemLocation`: where managed memory is thought to be. Ours is not managed, and the driver does not look."""

    _fields_ = (("type", ctypes.c_uint), ("id", ctypes.c_int))


class Attributes(ctypes.Structure):
    """`CUmemcpyAttributes`, of all copies of a batch."""

    _fields_ = (
        ("srcAccessOrder", ctypes.c_uint),
        ("srcLocHint", Location),
        ("dstLocHint", Location),
        ("flags", ctypes.c_uint),
    )


class Driver:
    """The CUDA driver and the primary context of one device; both live as long as the process. Any thread."""

    def __init__(self, ordinal: int = 0, library: str = LIBRARY) -> None:
        """`ordinal`: of the device, as torch counts them. Raises ConfigError where there is no such device."""
        self._functions: dict[str, Callable[..., int]] = {}
        try:
            for load, table in ((ctypes.PyDLL, QUICK), (ctypes.CDLL, SLOW)):
                found = load(library)
                for name, types in table.items():
                    self._functions[name] = function = getattr(found, name)
                    function.argtypes, function.restype = types, ctypes.c_int
            self.call("cuInit", 0)
            device = ctypes.c_int()
            self.call("cuDeviceGet", ctypes.byref(device), ordinal)
            self._context = self._made("cuDevicePrimaryCtxRetain", device)
        except (OSError, AttributeError) as error:  # no driver, one without a function, or no device
            raise ConfigError(f"cannot use CUDA device {ordinal}: {error}", param="model.device") from error
        self.batch = self._batch()
        if self.batch is None:
            log.warning(
                "this CUDA driver has no cuMemcpyBatchAsync (12.8 and later have): a call for each copy instead"
            )

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function of the driver. Raises OSError with its error, or RuntimeError where that is a bug of ours."""
        self.check(name, self._functions[name](*arguments))

    def check(self, what: str, code: int) -> None:
        """The same for a code that a function has returned."""
        if code:
            name = ctypes.c_char_p()
            self._functions["cuGetErrorName"](code, ctypes.byref(name))
            text = f"{what}: {name.value.decode() if name.value else 'CUDA error'} ({code})"
            raise RuntimeError(text) if code in MISUSE else OSError(text)

    def enter(self) -> None:
        """Make the context that of the calling thread: most other functions need it."""
        self.call("cuCtxSetCurrent", self._context)

    def new_stream(self) -> ctypes.c_void_p:
        self.enter()
        return self._made("cuStreamCreate", STREAM_NON_BLOCKING)

    def new_event(self) -> ctypes.c_void_p:
        """In the context that the thread has entered."""
        return self._made("cuEventCreate", EVENT_SLEEPS | EVENT_UNTIMED)

    def pin(self, address: int, size: int) -> None:
        """Page-lock `size` bytes for copies. Raises OSError."""
        self.enter()
        self.call("cuMemHostRegister_v2", address, size, 0)

    def unpin(self, address: int) -> None:
        """The whole range that was pinned at `address`. Raises OSError."""
        self.enter()
        self.call("cuMemHostUnregister", address)

    def _made(self, name: str, argument: Any) -> ctypes.c_void_p:
        """The handle that function `name` makes."""
        handle = ctypes.c_void_p()
        self.call(name, ctypes.byref(handle), argument)
        return handle

    def _batch(self) -> Callable[..., int] | None:
        """`cuMemcpyBatchAsync`, if this driver has it."""
        address, status = ctypes.c_void_p(), ctypes.c_int()
        with suppress(OSError, RuntimeError):  # the driver says "invalid value" of a version that it does not know
            self.call(
                "cuGetProcAddress_v2", b"cuMemcpyBatchAsync", ctypes.byref(address), BATCH_ABI, 0, ctypes.byref(status)
            )
        return ctypes.CFUNCTYPE(ctypes.c_int, *BATCH)(address.value) if address.value else None


class CudaMark:
    """An event behind a batch."""

    def __init__(self, driver: Driver, event: ctypes.c_void_p) -> None:
        self._driver = driver
        self._event = event

    def wait(self) -> None:
        """Once, on the thread that enqueued the batch. Raises OSError where a copy failed: the context is lost then,
        and with it all that was going on in it."""
        try:
            self._driver.call("cuEventSynchronize", self._event)
        finally:
            self._driver.call("cuEventDestroy_v2", self._event)


class CudaCopyStream:
    """A stream of its own for copies in one direction: "up" to the device or "down" from it. Any thread.

    `edges`: addresses where ranges of pinned memory begin; no copy crosses one. Host memory that is copied up must not
    be written to until the copy is over.
    """

    def __init__(self, driver: Driver, direction: Literal["up", "down"], edges: Collection[int] = ()) -> None:
        self._driver = driver
        self._edges = frozenset(edges)
        self._attributes = Attributes(SOURCE_ANY_ORDER if direction == "up" else SOURCE_IN_STREAM_ORDER)
        self._stream = driver.new_stream()

    def enqueue(self, targets: Sequence[int], sources: Sequence[int], size: int) -> CudaMark:
        """Copy `size` bytes from each address of `sources` to that of `targets`. Raises OSError where that cannot be;
        no byte of the batch moves any more then."""
        runs = merged(targets, sources, size, self._edges)
        self._driver.enter()
        event = self._driver.new_event()
        try:
            if self._driver.batch is None:
                for run in runs:
                    self._driver.call("cuMemcpyAsync", *run, self._stream)
            else:
                self._copy_batch(self._driver.batch, runs)
            self._driver.call("cuEventRecord", event, self._stream)
        except (OSError, RuntimeError):
            with suppress(OSError, RuntimeError):  # the first error is the one to tell
                self._driver.call("cuStreamSynchronize", self._stream)  # some of it may be on its way
            with suppress(OSError, RuntimeError):
                self._driver.call("cuEventDestroy_v2", event)
            raise
        return CudaMark(self._driver, event)

    def close(self) -> None:
        """When nothing is enqueued. Raises OSError."""
        self._driver.enter()
        self._driver.call("cuStreamDestroy_v2", self._stream)

    def _copy_batch(self, batch: Callable[..., int], runs: Sequence[tuple[int, int, int]]) -> None:
        targets, sources, sizes = ((ctypes.c_uint64 * len(runs))(*column) for column in zip(*runs, strict=True))
        first, failed = ctypes.c_size_t(0), ctypes.c_size_t()
        code = batch(
            targets, sources, sizes, len(runs), ctypes.byref(self._attributes), ctypes.byref(first), 1,
            ctypes.byref(failed), self._stream,
        )  # fmt: skip
        self._driver.check(f"cuMemcpyBatchAsync of {len(runs)} copies", code)


def merged(
    targets: Sequence[int], sources: Sequence[int], size: int, edges: Collection[int]
) -> list[tuple[int, int, int]]:
    """Copies of `size` bytes as (target, source, bytes), in order: where both ends of one begin where those of the last
    one end, they are one copy; but none crosses an address of `edges`."""
    runs: list[tuple[int, int, int]] = []
    for target, source in zip(targets, sources, strict=True):
        if runs and target not in edges and source not in edges:
            last_target, last_source, length = runs[-1]
            if (last_target + length, last_source + length) == (target, source):
                runs[-1] = (last_target, last_source, length + size)
                continue
        runs.append((target, source, size))
    return runs
