"""Copies between pinned host memory and a CUDA device, and the pinning: the CUDA driver's own functions, by ctypes.

Knows the driver's functions, structures and errors; refuses to know frames, and where a checksum is kept. Nothing of
CUDA is needed to import it: `Driver` finds the library of the machine it runs on. All of it works in the device's
primary context, the one that torch uses, so the addresses of torch's tensors are valid here.

Blocks are checked, copied and waited for by the native library (native/transfer.c), which gets the driver's functions
as pointers: one call for many blocks, all of it without the interpreter lock. In Python every block would cost several
hand-overs of that lock: they bound copies to a fraction of the link, and hold up the thread that launches steps.
`cuMemcpyBatchAsync` hands a burst to the DMA engines in one call, and no multiprocessor is taken from the model.
"""

from __future__ import annotations

import ctypes
import logging
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

from server.errors import ConfigError
from server.kernels.native import load
from server.types import DIGEST_BYTES, Moved

log = logging.getLogger("terrace")

LIBRARY = "libcuda.so.1"
BATCH_ABI = 12080
"""The version of `cuMemcpyBatchAsync` that is asked for: 12.8, the first, with an index of the copy that failed. Later
drivers still have it."""
STREAM_NON_BLOCKING = 1
"""Not ordered with the legacy default stream."""
EVENT_SLEEPS, EVENT_UNTIMED = 1, 2
EVENT_FLAGS = EVENT_SLEEPS | EVENT_UNTIMED
"""A thread that waits for a burst sleeps: it would otherwise spin through a core. Without EVENT_SLEEPS it does."""
SOURCE_IN_STREAM_ORDER, SOURCE_ANY_ORDER = 1, 3
"""When a copy may read its source: in stream order, or at any time until it is over, which suits host memory that
nobody writes to meanwhile."""
MISUSE = {1, 3, 201, 400}
"""Invalid value, not initialised, invalid context, invalid handle: errors of this program, not of the world."""

_INT, _UINT, _SIZE, _POINTER = ctypes.c_int, ctypes.c_uint, ctypes.c_size_t, ctypes.c_void_p
QUICK = {
    "cuCtxSetCurrent": (_POINTER,),
    "cuEventCreate": (_POINTER, _UINT),
    "cuEventDestroy_v2": (_POINTER,),
    "cuGetErrorName": (_INT, _POINTER),
    "cuMemcpyAsync": (ctypes.c_uint64, ctypes.c_uint64, _SIZE, _POINTER),
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
    "cuStreamDestroy_v2": (_POINTER,),
}
"""Driver functions that give it up -> argument types."""
NATIVE = {
    "enter": "cuCtxSetCurrent",
    "batch": "cuMemcpyBatchAsync",
    "copy": "cuMemcpyAsync",
    "record": "cuEventRecord",
    "wait": "cuEventSynchronize",
    "sync": "cuStreamSynchronize",
}
"""Fields of `struct link` -> driver functions that the native library calls. The first five are also what can fail of a
copy, in the order of `enum step`."""
STEPS = tuple(NATIVE.values())[:5]
LANES = 2
"""Bursts that may be in flight at once, at most: `LANES` of transfer.h."""
SUM_MIN_BYTES = 241
"""The smallest block that the native library has a checksum for."""


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
        self.addresses: dict[str, int | None] = {}
        """Of the functions that the native library calls, by field of `struct link`."""
        try:
            for kind, table in ((ctypes.PyDLL, QUICK), (ctypes.CDLL, SLOW)):
                found = kind(library)
                for name, types in table.items():
                    self._functions[name] = function = getattr(found, name)
                    function.argtypes, function.restype = types, ctypes.c_int
            for field, name in NATIVE.items():
                if field != "batch":
                    self.addresses[field] = ctypes.cast(getattr(found, name), ctypes.c_void_p).value
            self.call("cuInit", 0)
            device = ctypes.c_int()
            self.call("cuDeviceGet", ctypes.byref(device), ordinal)
            self.context = self._made("cuDevicePrimaryCtxRetain", device)
        except (OSError, AttributeError) as error:  # no driver, one without a function, or no device
            raise ConfigError(f"cannot use CUDA device {ordinal}: {error}", param="model.device") from error
        self.addresses["batch"] = self._batch()
        if not self.addresses["batch"]:
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
        self.call("cuCtxSetCurrent", self.context)

    def new_stream(self) -> ctypes.c_void_p:
        """Enters the context. Raises OSError."""
        self.enter()
        return self._made("cuStreamCreate", STREAM_NON_BLOCKING)

    def new_event(self) -> ctypes.c_void_p:
        """In the context that the thread has entered. Raises OSError."""
        return self._made("cuEventCreate", EVENT_FLAGS)

    def pin(self, address: int, size: int) -> None:
        """Page-lock `size` bytes for copies. Raises OSError."""
        self.enter()
        self.call("cuMemHostRegister_v2", address, size, 0)

    def unpin(self, address: int) -> None:
        """The whole range that was pinned at `address`. Raises OSError."""
        self.enter()
        self.call("cuMemHostUnregister", address)

    def destroy(self, stream: int, events: Iterable[int]) -> None:
        """When nothing is enqueued. Raises OSError."""
        self.enter()
        for event in events:
            self.call("cuEventDestroy_v2", event)
        self.call("cuStreamDestroy_v2", stream)

    def _made(self, name: str, argument: Any) -> ctypes.c_void_p:
        """The handle that function `name` makes."""
        handle = ctypes.c_void_p()
        self.call(name, ctypes.byref(handle), argument)
        return handle

    def _batch(self) -> int | None:
        """Address of `cuMemcpyBatchAsync`, if this driver has it."""
        address, status = ctypes.c_void_p(), ctypes.c_int()
        with suppress(OSError, RuntimeError):  # the driver says "invalid value" of a version that it does not know
            self.call(
                "cuGetProcAddress_v2", b"cuMemcpyBatchAsync", ctypes.byref(address), BATCH_ABI, 0, ctypes.byref(status)
            )
        return address.value


class _Fields(ctypes.Structure):
    """`struct link` of native/transfer.h."""

    _fields_ = (
        *((field, ctypes.c_void_p) for field in (*NATIVE, "context", "stream", "attributes")),
        ("events", ctypes.c_void_p * LANES),
        ("locks", ctypes.c_uint64 * 8 * LANES),
        ("lanes", ctypes.c_uint32),
        ("turn", ctypes.c_uint32),
    )


class _Job(ctypes.Structure):
    """`struct job`."""

    _fields_ = (
        *((field, ctypes.c_int64) for field in ("count", "bytes", "burst")),
        *((field, ctypes.c_void_p) for field in ("targets", "sources", "digests", "states")),
        ("step", ctypes.c_int32),
    )


class Link:
    """Copies in one direction by the native library. Any thread, without the interpreter lock; however many call, at
    most `lanes` bursts of copies are in flight: blocks of `burst` bytes in all, or a piece of that size of a larger
    block.

    `functions`: those of `NATIVE`, by field; `check` raises OSError for a code that one of them returned, RuntimeError
    where that is a bug of ours. Whoever makes a link sets context, stream, events and attributes in `fields`. Raises
    ConfigError without the native library.
    """

    def __init__(self, functions: Mapping[str, int | None], check: Callable[[str, int], None], lanes: int) -> None:
        library = load()
        if library is None:
            raise ConfigError(
                "device 'cuda' needs the native library, which could not be built or loaded: install a C compiler and "
                "reinstall, `pip install --force-reinstall --no-deps terrace`",
                param="model.device",
            )
        self._library = library
        self._check = check
        self.fields = _Fields(**functions)
        self.fields.lanes = lanes
        library.terrace_link(ctypes.byref(self.fields))

    def up(self, targets: Sequence[int], sources: Sequence[int], size: int, burst: int, digests: bytes) -> Moved:
        """Copy `size` bytes from each address of `sources`, in host memory, to that of `targets`, unless their checksum
        is another than that of `digests`, 16 bytes each: REFUSED. Nothing moves any more when this returns."""
        assert len(digests) == DIGEST_BYTES * len(targets), "a checksum for each block"
        return self._run(self._library.terrace_up, targets, sources, size, burst, digests)

    def down(self, targets: Sequence[int], sources: Sequence[int], size: int, burst: int) -> Moved:
        """Copy `size` bytes from each address of `sources` to that of `targets`, in host memory, and take the checksums
        of what came: those of MOVED blocks count. Nothing moves any more when this returns."""
        return self._run(self._library.terrace_down, targets, sources, size, burst, bytes(DIGEST_BYTES * len(targets)))

    def copy(self, targets: Sequence[int], sources: Sequence[int], size: int) -> None:
        """All at once and without checksums, for benchmarks to compare with. Raises OSError."""
        moved = self._run(self._library.terrace_copy, targets, sources, size, size, b"")
        if moved.error is not None:
            raise moved.error

    def _run(
        self, function: Callable[..., int], targets: Sequence[int], sources: Sequence[int], size: int, burst: int,
        digests: bytes,
    ) -> Moved:  # fmt: skip
        assert size >= SUM_MIN_BYTES, f"blocks of {size} bytes have no checksum"
        assert burst > 0, "a burst has bytes"
        assert len(targets) == len(sources), "a source for each target"
        ends = [array("Q", addresses) for addresses in (targets, sources)]
        states = ctypes.create_string_buffer(len(targets))
        sums = ctypes.create_string_buffer(digests, len(digests))
        job = _Job(len(targets), size, burst, *(end.buffer_info()[0] for end in ends), ctypes.addressof(sums),
                   ctypes.addressof(states))  # fmt: skip
        code = function(ctypes.byref(self.fields), ctypes.byref(job))
        error = None
        try:
            if code:
                self._check(STEPS[job.step], code)
        except OSError as failed:
            error = failed
        return Moved(states.raw, sums.raw, error)


class CudaCopyStream(Link):
    """A stream of its own for copies in one direction: "up" to the device or "down" from it. Any thread.

    Host memory that is copied up must not be written to until the call returns. Raises ConfigError without the native
    library, OSError where the device refuses.
    """

    def __init__(self, driver: Driver, direction: Literal["up", "down"]) -> None:
        super().__init__(driver.addresses, driver.check, LANES if direction == "up" else 1)
        self._driver = driver
        self._attributes = Attributes(SOURCE_ANY_ORDER if direction == "up" else SOURCE_IN_STREAM_ORDER)
        self.fields.context = driver.context
        self.fields.stream = driver.new_stream()
        self.fields.events = (ctypes.c_void_p * LANES)(*(driver.new_event().value for _ in range(LANES)))
        self.fields.attributes = ctypes.addressof(self._attributes)

    def close(self) -> None:
        """When no call is open. Raises OSError."""
        self._driver.destroy(self.fields.stream, self.fields.events)
