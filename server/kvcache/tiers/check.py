"""Looking at caches on disk from outside: what is there, and does it verify? Read-only, no lock, any thread.

Beside a running daemon the answers are a moment old: a block that it rewrites meanwhile may be reported as stale.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from server.kvcache.host import checksum
from server.kvcache.tiers.files import ALIGNMENT
from server.kvcache.tiers.index import PUT, Identity, Rows, identify
from server.kvcache.tiers.journal import read_index
from server.kvcache.tiers.segments import list_directories, segment_numbers, slots_per_segment
from server.kvcache.tiers.slots import HEADER_BYTES, RAW, read_header
from server.types import BlockHash, FrameId


@dataclass(frozen=True, slots=True)
class CacheInfo:
    """One cache below a root. `used_s`: Unix time of its last change; `owned`: a daemon has it open."""

    path: Path
    fingerprint: bytes
    bytes: int
    blocks: int
    block_bytes: int
    used_s: float
    owned: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the slot of one indexed block is worth. `fault` is empty when it verifies."""

    frame: FrameId
    hash: BlockHash
    depth: int
    fault: str


def list_caches(root: Path) -> list[CacheInfo]:
    """Every cache below `root`, least recently used first. Raises OSError."""
    found = []
    for info in list_directories(root):
        identity, rows = _index(info.path)
        block_bytes = identity.block_bytes if identity else 0
        fingerprint = bytes.fromhex(info.path.name)
        found.append(CacheInfo(info.path, fingerprint, info.bytes, len(rows), block_bytes, info.used_s, info.owned))
    return found


def verify_cache(directory: Path) -> Iterator[Verdict]:
    """Read every indexed block of one cache, in the order of frames, and say whether it is what the index says."""
    identity, rows = _index(directory)
    if identity is None:
        return
    slot_bytes = _slot_bytes(identity)
    per_segment = slots_per_segment(slot_bytes)
    buffer = memoryview(mmap.mmap(-1, slot_bytes))
    segment, fd = -1, -1
    try:
        for row in rows:
            frame = int(row["frame"])
            number, slot = divmod(frame, per_segment)
            if number != segment:
                if fd >= 0:
                    os.close(fd)
                segment, fd = number, _open(directory / f"segment-{number:05d}.kv")
            fault = "there is no such segment" if fd < 0 else _fault(fd, slot * slot_bytes, buffer, row, identity)
            yield Verdict(frame, row["hash"].tobytes(), int(row["depth"]), fault)
    finally:
        if fd >= 0:
            os.close(fd)


def _index(directory: Path) -> tuple[Identity | None, Rows]:
    """Rows of the frames that hold a block."""
    for name in ("checkpoint", "journal"):
        try:
            identity = identify(directory / name)
        except OSError:
            continue
        if identity is not None:
            segments = max((number for number, _ in segment_numbers(directory)), default=-1) + 1
            frames = segments * slots_per_segment(_slot_bytes(identity))  # none is believed beyond what has a place
            table = read_index(directory, identity, frames).table
            return identity, table[np.flatnonzero(table["op"] == PUT)]
    return None, np.zeros(0, np.dtype([("frame", "<u4")]))


def _slot_bytes(identity: Identity) -> int:
    return HEADER_BYTES + -(-identity.block_bytes // ALIGNMENT) * ALIGNMENT


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return -1


def _fault(fd: int, offset: int, buffer: memoryview, row: Rows, identity: Identity) -> str:
    try:
        got = os.preadv(fd, [buffer], offset)
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    if got < len(buffer):
        return "the segment ends before it"
    found = read_header(buffer)
    if found is None:
        return "no valid header"
    if (found.fingerprint, found.codec, found.block_bytes) != (identity.fingerprint, RAW, identity.block_bytes):
        return "another model's block"
    parent = row["parent"].tobytes() if row["chained"] else None
    if (found.hash, found.parent, found.depth) != (row["hash"].tobytes(), parent, int(row["depth"])):
        return "another block"
    if checksum(buffer[HEADER_BYTES : HEADER_BYTES + identity.block_bytes]) != found.digest:
        return "the bytes are not those that were written"
    return ""
