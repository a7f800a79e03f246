"""What a slot of the SSD tier looks like: a 4 KiB header that names the block and carries its checksum, then the block.

    0  magic "TERRACE\\0"      8  format version   12  codec (0: raw)   16  fingerprint, 32 bytes
   48  hash, 32 bytes         80  parent's hash   112  depth           116  1 if there is a parent
  120  bytes of the block    128  xxh3-128 of the block               144  xxh3-64 of the 144 bytes before

Little-endian; zeros up to 4096. There is no generation number: an older slot under the same hash is the same block.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import xxhash

from server.kvcache.tiers.base import Move
from server.kvcache.tiers.files import ALIGNMENT
from server.types import BlockHash

HEADER_BYTES = ALIGNMENT
MAGIC = b"TERRACE\0"
FORMAT = 1
RAW = 0
"""The only codec so far: the block's own bytes."""
_HEADER = struct.Struct("<8sII32s32s32sIIQ16s")
_SEAL = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class SlotHeader:
    """What a valid header says."""

    fingerprint: bytes
    codec: int
    hash: BlockHash
    parent: BlockHash | None
    depth: int
    block_bytes: int
    digest: bytes


def write_header(page: memoryview, fingerprint: bytes, move: Move, block_bytes: int, digest: bytes) -> None:
    """Fill `page`, which is zero behind the fields, for `move`'s block with checksum `digest`."""
    _HEADER.pack_into(
        page, 0, MAGIC, FORMAT, RAW, fingerprint, move.hash, move.parent or b"", move.depth,
        move.parent is not None, block_bytes, digest,
    )  # fmt: skip
    _SEAL.pack_into(page, _HEADER.size, xxhash.xxh3_64_intdigest(page[: _HEADER.size]))


def read_header(page: memoryview) -> SlotHeader | None:
    """None unless this is a header of this format whose own checksum agrees."""
    magic, version, codec, fingerprint, value, parent, depth, chained, length, digest = _HEADER.unpack_from(page)
    (seal,) = _SEAL.unpack_from(page, _HEADER.size)
    if magic != MAGIC or version != FORMAT or seal != xxhash.xxh3_64_intdigest(page[: _HEADER.size]):
        return None
    return SlotHeader(fingerprint, codec, value, parent if chained else None, depth, length, digest)
