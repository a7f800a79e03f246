"""A small world for tests of the SSD tier: blocks whose bytes follow from their hash, a host arena, a tiny store.

Slots of 8 KiB in segments of a few slots, so that thousands of operations take a second and every edge is near.
"""

from __future__ import annotations

import hashlib
import mmap
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from server.kvcache.host import HostArena, checksum
from server.kvcache.tiers import journal, segments
from server.kvcache.tiers.base import Move
from server.kvcache.tiers.files import OsIo
from server.kvcache.tiers.slots import HEADER_BYTES, write_header
from server.kvcache.tiers.ssd import SsdTier
from server.types import BlockHash, FrameId

BLOCK_BYTES = 4000
"""Not a multiple of the page: the padding must not matter."""
SLOT_BYTES = HEADER_BYTES + 4096
SEGMENT_SLOTS = 24
FIELDS_BYTES = 152
"""What of the header means something."""
FINGERPRINT = hashlib.sha256(b"weights").digest()


@dataclass(frozen=True)
class Block:
    """One block of a made-up chain."""

    chain: int
    depth: int

    @property
    def hash(self) -> BlockHash:
        return hashlib.sha256(f"{self.chain}/{self.depth}".encode()).digest()

    @property
    def parent(self) -> BlockHash | None:
        return Block(self.chain, self.depth - 1).hash if self.depth else None

    def move(self, host: FrameId, frame: FrameId) -> Move:
        return Move(self.hash, self.parent, self.depth, host, frame)


@cache
def content(value: BlockHash, block_bytes: int = BLOCK_BYTES) -> bytes:
    """The only right bytes of block `value`."""
    return hashlib.shake_128(value).digest(block_bytes)


@cache
def slot_image(block: Block, fingerprint: bytes = FINGERPRINT) -> tuple[bytes, bytes]:
    """What the header's fields and the block must be on disk."""
    page = memoryview(mmap.mmap(-1, HEADER_BYTES))
    data = content(block.hash)
    write_header(page, fingerprint, block.move(0, 0), BLOCK_BYTES, checksum(memoryview(data)))
    return bytes(page[:FIELDS_BYTES]), data


def small_segments(setattr: Callable[[object, str, object], None] = setattr) -> None:
    """Segments of SEGMENT_SLOTS slots that grow by 4, and a busy journal; give it `monkeypatch.setattr` in a test."""
    setattr(segments, "SEGMENT_BYTES", SEGMENT_SLOTS * SLOT_BYTES)
    setattr(segments, "GROW_BYTES", 4 * SLOT_BYTES)
    setattr(journal, "FLUSH_S", 0.002)


def make_store(
    root: Path,
    host: HostArena,
    *,
    capacity_bytes: int = 2**20,
    min_free_bytes: int = 0,
    io: OsIo | None = None,
    fingerprint: bytes = FINGERPRINT,
    wall_clock: Callable[[], float] = time.time,
) -> SsdTier:
    return SsdTier(
        root, fingerprint, host, capacity_bytes=capacity_bytes, min_free_bytes=min_free_bytes,
        clock=time.monotonic, wall_clock=wall_clock, readers=2, writers=2, io=io,
    )  # fmt: skip


def fill(host: HostArena, frame: FrameId, block: Block) -> None:
    """Put `block`'s bytes into a host frame, as a spill from the device would."""
    host.view(frame)[:] = content(block.hash, host.block_bytes)
    host.label(frame, block.hash)


def holds(host: HostArena, frame: FrameId, block: Block) -> bool:
    """Does a host frame hold exactly `block`, labelled?"""
    right = bytes(host.view(frame)) == content(block.hash, host.block_bytes)
    return right and host.digest_of(frame, block.hash) is not None
