"""The host arena: the DRAM tier's memory, and the landing place of every transfer between tiers.

Anonymous memory, page-aligned (so that O_DIRECT reads and writes go straight into it), huge pages advised, one block
per frame. With each frame it keeps a label: which block the bytes are, and their checksum, made when they arrived. A
block leaves for another tier only if label and bytes still agree. Whoever copies to and from a CUDA device has the
memory pinned. Torch-free; any thread, one at a time per frame.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading
from collections import Counter
from collections.abc import Callable
from typing import Protocol

import numpy as np
import xxhash

from server.errors import ConfigError
from server.types import BlockHash, FrameId, TierFault

PREFAULT_SLAB_BYTES = 64 * 2**20
"""Memory is touched in slabs of this size, so that a start with a large arena can show progress and be interrupted."""
PIECE_BYTES = 512 * 1024
"""Of a copy: small enough that its checksum finds it in the processor's cache, large enough for a call each."""
HELD_BYTES = 128 * 1024
"""Blocks up to this size are copied with the interpreter lock held: some ten microseconds, where giving the lock up and
waiting for it again costs a busy process several times that."""
MADV_POPULATE_WRITE = 23
"""Linux 5.14 and later; not in Python's mmap module."""
PIN_BYTES = 8 * 2**30
"""Memory is pinned in ranges of at most this size (or one frame): a start can be interrupted between two, and the
message says how far it came."""
GIB = 2**30
REFUSALS = {
    "label": "does not hold the block that was asked for",
    "payload": "changed since it was filled",
}
"""Why a block may not leave a frame."""


class Pins(Protocol):
    """Page-locks memory for a device's DMA engines. `address` and `size` in bytes, on page edges; raises OSError."""

    def pin(self, address: int, size: int) -> None: ...
    def unpin(self, address: int) -> None:
        """The whole range that `pin` was given at `address`."""
        ...


def checksum(data: memoryview) -> bytes:
    """xxh3-128 of one block, 16 bytes. Above 10 GB/s per core, and it releases the interpreter lock."""
    return xxhash.xxh3_128_digest(data)


def _held_memmove() -> Callable[[int, int, int], object]:
    """`memmove` that keeps the interpreter lock."""
    function = ctypes.PyDLL(None).memmove
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t), ctypes.c_void_p
    return function


class HostArena:
    """`frames` frames of `block_bytes` bytes each, `stride` bytes apart (a multiple of the page size, 4096)."""

    def __init__(self, frames: int, block_bytes: int) -> None:
        assert frames > 0, f"an arena needs at least one frame, got {frames}"
        self.frames = frames
        self.block_bytes = block_bytes
        self.stride = -(-block_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._pages = mmap.mmap(-1, frames * self.stride, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError, AttributeError):  # a kernel without huge pages
            self._pages.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = memoryview(self._pages)
        self.address: int = np.frombuffer(self._pages, np.uint8).ctypes.data
        self._labels: list[tuple[BlockHash, bytes] | None] = [None] * frames
        self.corrupt: Counter[str] = Counter()
        """Blocks that did not leave for the device: `label` (the frame held something else), `payload`."""
        self._counting = threading.Lock()
        self._pins: Pins | None = None
        self.edges: list[int] = []
        """Addresses where pinned ranges begin, each on the edge of a frame, since no copy of a device may cross one;
        empty while nothing is pinned."""
        self._memmove = _held_memmove() if block_bytes <= HELD_BYTES else ctypes.memmove

    def prefault(self) -> None:
        """Take all memory now, not at first touch: 2 MiB of page faults cost more than the copy that meets them."""
        for start in range(0, len(self._pages), PREFAULT_SLAB_BYTES):
            length = min(PREFAULT_SLAB_BYTES, len(self._pages) - start)
            try:
                self._pages.madvise(MADV_POPULATE_WRITE, start, length)
            except OSError:  # an older kernel: touch every page
                np.frombuffer(self._pages, np.uint8, length, start)[:: mmap.PAGESIZE] = 0

    def register(self, pins: Pins) -> None:
        """Pin all memory, after `prefault`. Raises ConfigError, with nothing pinned, where the system does not allow
        it. Blocking, for seconds perhaps."""
        assert not self.edges, "the arena is pinned once"
        # A page that a child shares is copied at the next write: the device would go on with the old one.
        self._pages.madvise(mmap.MADV_DONTFORK)
        self._pins = pins
        step = max(1, PIN_BYTES // self.stride) * self.stride
        for start in range(0, len(self._pages), step):
            try:
                pins.pin(self.address + start, min(step, len(self._pages) - start))
            except OSError as error:
                self.unregister()
                raise ConfigError(
                    f"dram_gib: only {start / GIB:.3g} of {len(self._pages) / GIB:.3g} GiB could be pinned for CUDA "
                    f"({error}); lower --dram-gib, or raise the limit on locked memory (ulimit -l) and the memory of "
                    "the control group",
                    param="kv.dram_gib",
                ) from error
            self.edges.append(self.address + start)

    def unregister(self) -> None:
        """Undo `register`, when nothing moves any more; a process that ends without it can hang for a while. Nothing to
        do where nothing is pinned. Raises OSError; called again, it goes on with the next range."""
        while self.edges:
            assert self._pins is not None, "what is pinned was pinned by somebody"
            self._pins.unpin(self.edges.pop())

    def view(self, frame: FrameId) -> memoryview:
        """The block in `frame`: `block_bytes` writable bytes."""
        start = frame * self.stride
        return self._bytes[start : start + self.block_bytes]

    def padded(self, frame: FrameId) -> memoryview:
        """The whole of `frame`, `stride` bytes: what O_DIRECT can read and write."""
        start = frame * self.stride
        return self._bytes[start : start + self.stride]

    def frame_address(self, frame: FrameId) -> int:
        return self.address + frame * self.stride

    # --- labels ------------------------------------------------------------------------------------------------------

    def expect_nothing(self, frame: FrameId) -> None:
        """Bytes are about to arrive: until `label`, nothing may leave this frame."""
        self._labels[frame] = None

    def label(self, frame: FrameId, hash: BlockHash, digest: bytes | None = None) -> bytes:
        """The bytes in `frame` are block `hash`; returns their checksum, made here unless `digest` is given."""
        digest = checksum(self.view(frame)) if digest is None else digest
        self._labels[frame] = (hash, digest)
        return digest

    def digest_of(self, frame: FrameId, hash: BlockHash) -> bytes | None:
        """The checksum that `frame`'s bytes had when they arrived, or None if it does not hold block `hash`."""
        label = self._labels[frame]
        return label[1] if label is not None and label[0] == hash else None

    def refuse(self, kind: str, frame: FrameId) -> TierFault:
        """Count a block that may not leave `frame`, for a reason of `REFUSALS`; the fault to tell."""
        with self._counting:
            self.corrupt[kind] += 1
        return TierFault("corrupt", f"host frame {frame} {REFUSALS[kind]}")

    # --- copies to and from other memory -----------------------------------------------------------------------------

    def take_in(self, frame: FrameId, hash: BlockHash, source: int) -> None:
        """Copy block `hash` from address `source` into `frame` and label it."""
        self._labels[frame] = None
        self._labels[frame] = (hash, self._copy(frame, self.frame_address(frame), source))

    def give_out(self, frame: FrameId, hash: BlockHash, target: int) -> TierFault | None:
        """Copy block `hash` from `frame` to address `target`. A fault, and nothing there to be trusted, when `frame`
        holds something else or its bytes have changed since they arrived."""
        digest = self.digest_of(frame, hash)
        if digest is None:
            return self.refuse("label", frame)
        same = self._copy(frame, target, self.frame_address(frame)) == digest
        return None if same else self.refuse("payload", frame)

    def _copy(self, frame: FrameId, target: int, source: int) -> bytes:
        """Copy one block, of which `frame` is one end; the checksum of what is in `frame` then. Piece by piece: the sum
        finds what was just copied in the processor's cache."""
        state, view = xxhash.xxh3_128(), self.view(frame)
        for start in range(0, self.block_bytes, PIECE_BYTES):
            length = min(PIECE_BYTES, self.block_bytes - start)
            self._memmove(target + start, source + start, length)
            state.update(view[start : start + length])
        return state.digest()
