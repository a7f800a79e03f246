"""The index of the SSD tier as bytes: records in checksummed batches, how they fold into rows, and rows into blocks.

Checkpoint and journal have one format: a file header that names format, model and block size, then batches of 96-byte
records. A batch that does not verify is skipped, and reading goes on at the next one that does. Everything here works
on whole columns: a million records fold in about a second. Pure functions over files; nothing is written.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from server.kvcache.tiers.base import Recovered
from server.types import BlockHash, FrameId

PUT, DROP, TOUCH, PIN, MARK = 1, 2, 3, 4, 5
"""A block is in a frame now; is gone; was used; is pinned until. MARK: the checkpoint covers all up to here."""
RECORD = np.dtype(
    [("op", "<u4"), ("frame", "<u4"), ("depth", "<u4"), ("chained", "<u4"), ("hash", "<u8", 4), ("parent", "<u8", 4),
     ("until_s", "<f8"), ("sequence", "<u8")]
)  # fmt: skip
"""`chained`: 1 when the block has a parent; else `parent` says whose it is, with all that follow it, if anybody's.
`sequence` counts records since the directory was made."""
_RECORD = struct.Struct("<IIII32s32sdQ")
assert _RECORD.size == RECORD.itemsize == 96, "one record has one size"
_BATCH = struct.Struct("<4sIQ")
BATCH_MAGIC = b"TKVB"
BATCH_BYTES = _BATCH.size
_FILE = struct.Struct("<24sQ32s")
DEPTH_BITS = 20
"""A chain has less than a million blocks, and fewer than 2^43 records are ever written: one number orders both."""
PIECE_RECORDS = 16_384
"""Records that are written as one batch of a checkpoint, and folded at once: 1.5 MiB, about a millisecond."""
FILE_MAGIC = b"terrace kv index 1"
FILE_BYTES = _FILE.size

Rows = npt.NDArray[Any]
"""Of dtype RECORD. As a table: row f is what frame f holds, `op` PUT or nothing, `sequence` its last use."""
Present = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.bool_]]
"""Which of these frames have a place on disk?"""


@dataclass(frozen=True, slots=True)
class Identity:
    """Whose index a file is."""

    fingerprint: bytes
    block_bytes: int

    def header(self) -> bytes:
        return _FILE.pack(FILE_MAGIC, self.block_bytes, self.fingerprint)


def pack(
    op: int,
    frame: FrameId,
    value: BlockHash,
    parent: BlockHash | None,
    depth: int,
    until_s: float,
    tenant: str,
    sequence: int,
) -> bytes:
    """One record. `tenant` counts only where there is no parent."""
    above = tenant.encode("ascii") if parent is None else parent
    return _RECORD.pack(op, frame, depth, parent is not None, value, above, until_s, sequence)


def batch(records: bytes) -> bytes:
    """Whole records as one batch: on disk it is there and right, or it is not there."""
    return _BATCH.pack(BATCH_MAGIC, len(records) // RECORD.itemsize, xxhash.xxh3_64_intdigest(records)) + records


# --- reading ---------------------------------------------------------------------------------------------------------


def identify(path: Path) -> Identity | None:
    """Whose index file this is; None when it is none of this format. Raises OSError."""
    with path.open("rb") as file:
        data = file.read(FILE_BYTES)
    if len(data) < FILE_BYTES:
        return None
    magic, block_bytes, fingerprint = _FILE.unpack(data)
    return Identity(fingerprint, block_bytes) if magic.rstrip(b"\0") == FILE_MAGIC else None


def read_records(path: Path, identity: Identity) -> tuple[list[Rows], bool]:
    """All records of a file that verify, in order, in pieces that fit a cache, and whether the file was whole.

    Raises OSError.
    """
    data = path.read_bytes()
    if not data:  # cut for a new checkpoint, and not written to since
        return [], True
    if data[:FILE_BYTES] != identity.header():
        return [], False
    pieces: list[Rows] = []
    small: list[Rows] = []
    whole = True
    start = FILE_BYTES
    while 0 <= start < len(data):
        end = _batch_end(data, start)
        if end is None:
            whole = False
            start = data.find(BATCH_MAGIC, start + 1)
            continue
        first = start + BATCH_BYTES
        small.append(np.frombuffer(data, RECORD, (end - first) // RECORD.itemsize, first))
        start = end
        if sum(map(len, small)) >= PIECE_RECORDS or len(small) >= PIECE_RECORDS:
            pieces.append(np.concatenate(small))
            small = []
    return [*pieces, *([np.concatenate(small)] if small else [])], whole


def _batch_end(data: bytes, start: int) -> int | None:
    """Where the batch at `start` ends, if one is there and verifies."""
    first = start + BATCH_BYTES
    if first > len(data):
        return None
    magic, count, checksum = _BATCH.unpack_from(data, start)
    end = first + count * RECORD.itemsize
    if magic != BATCH_MAGIC or end > len(data):
        return None
    return end if xxhash.xxh3_64_intdigest(memoryview(data)[first:end]) == checksum else None


# --- folding ---------------------------------------------------------------------------------------------------------


def fold(table: Rows, records: Rows) -> None:
    """Apply `records`, in order, to `table`, one row per frame. Records of frames beyond the table are ignored.

    A drop, touch or pin counts only for the block it names, and only if that was put before it.
    """
    op, frame = records["op"], records["frame"]
    fits = frame < len(table)
    puts = np.flatnonzero((op == PUT) & fits)
    puts = puts[_last_of_each(frame[puts])]
    table[frame[puts]] = records[puts]
    records = records[(op != PUT) & (op != MARK) & fits]
    op = records["op"]
    for drop in _meant(table, records[op == DROP]):
        table["op"][drop["frame"]] = 0
    for pin in _meant(table, records[op == PIN]):
        pin = pin[_last_of_each(pin["frame"])]
        table["until_s"][pin["frame"]] = pin["until_s"]
    for touch in _meant(table, records[op == TOUCH]):
        np.maximum.at(table["sequence"], touch["frame"], touch["sequence"])


def _meant(table: Rows, records: Rows) -> Iterator[Rows]:
    """Those of `records` that concern what `table` holds now; nothing at all if there are none."""
    if len(records):
        rows = table[records["frame"]]
        same = (rows["op"] == PUT) & (rows["sequence"] < records["sequence"])
        same &= (rows["hash"] == records["hash"]).all(axis=1)
        if same.any():
            yield records[same]


def _last_of_each(values: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """For each distinct value the index of its last occurrence."""
    if len(values) < 2 or (values[1:] > values[:-1]).all():  # a checkpoint is in the order of frames
        return np.arange(len(values))
    return len(values) - 1 - np.unique(values[::-1], return_index=True)[1]


# --- blocks ----------------------------------------------------------------------------------------------------------


def recover(table: Rows, present: Present, wall_s: float) -> Recovered:
    """What `table` says is there, in eviction order, without blocks whose chain is broken; those leave `table` too.

    A block is as recent as the most recent of itself and all that follow it, so that no chain loses its beginning
    before its end.
    """
    used = np.flatnonzero(table["op"] == PUT)
    table = table[: used[-1] + 1 if len(used) else 0]
    there = np.zeros(len(table), bool)
    there[used[present(used)]] = True
    above, good = _link(table, there)
    table["op"][~good] = 0
    recency = _with_followers(table["sequence"].astype(np.int64), above)
    depths = table["depth"].astype(np.int64)
    frames = np.flatnonzero(good)
    frames = frames[np.argsort((recency[frames] << DEPTH_BITS) - depths[frames])]
    hashes: list[BlockHash] = table["hash"][frames].view("V32").ravel().tolist()
    until_s = table["until_s"][frames]
    return Recovered(
        frames=frames.tolist(),
        hashes=hashes,
        above=above[frames].tolist(),
        depths=depths[frames].tolist(),
        pins={hashes[i]: float(until_s[i]) for i in np.flatnonzero(until_s > wall_s).tolist()},
        owners=_owners(table, above, frames),
    )


def _owners(table: Rows, above: npt.NDArray[np.int64], frames: npt.NDArray[np.int64]) -> dict[str, Sequence[FrameId]]:
    """Tenant -> those of `frames`, whose chains are whole, that are its; it is on record with the first block of each
    chain."""
    firsts = frames[above[frames] < 0]
    firsts = firsts[(table["parent"][firsts] != 0).any(axis=1)]
    if not len(firsts):
        return {}
    numbers: dict[str, int] = {}
    whose = np.zeros(len(table), np.int64)
    for frame, name in zip(firsts.tolist(), table["parent"][firsts].view("S32").ravel().tolist(), strict=True):
        whose[frame] = numbers.setdefault(name.decode("ascii", "replace"), len(numbers) + 1)
    first = np.where(above < 0, np.arange(len(table)), above)
    while (first[frames] != first[first[frames]]).any():
        first = first[first]
    whose = whose[first[frames]]
    order = np.argsort(whose, kind="stable")
    ends = np.searchsorted(whose[order], np.arange(len(numbers) + 2))
    return {name: frames[order[ends[n] : ends[n + 1]]].tolist() for name, n in numbers.items()}


def _link(table: Rows, there: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """For each row of `table` that is `there` the frame of its parent or -1, and whether it and its whole chain are
    there, each block once."""
    hashes, depths = np.ascontiguousarray(table["hash"]), table["depth"].astype(np.int64)
    good, keys = there.copy(), _mix(hashes)
    order = np.flatnonzero(good)
    order = order[np.argsort(keys[order])]
    if (keys[order][1:] == keys[order][:-1]).any():  # one block in two frames: the later wins
        order = order[np.lexsort((table["sequence"][order], keys[order]))]
        good[order[np.flatnonzero(keys[order][1:] == keys[order][:-1])]] = False
        order = order[good[order]]
    above = np.full(len(table), -1, np.int64)
    chained = np.flatnonzero(good & (table["chained"] != 0))
    parents = table["parent"][chained]
    parent = _find(parents, hashes, keys, order, chained - 1, good)
    linked = (hashes.take(parent, axis=0) == parents).all(axis=1) & good[parent]
    linked &= depths[parent] + 1 == depths[chained]
    above[chained[linked]] = parent[linked]
    good &= np.where(table["chained"] != 0, above >= 0, depths == 0)
    return above, _whole(good, above)


def _find(
    wanted: Rows, hashes: Rows, keys: Rows, order: npt.NDArray[np.int64], guess: npt.NDArray[np.int64], good: Rows
) -> npt.NDArray[np.int64]:
    """For each of the `wanted` hashes the row that may have it, which the caller compares in full. `order`: good rows
    by their `keys`, a 64-bit mix of each hash; a collision can lose a block, never invent one. `guess`: where each
    probably is, as chains are written parents first, side by side."""
    place = np.maximum(guess, 0)
    far = np.flatnonzero((hashes[place, 0] != wanted[:, 0]) | ~good[place])
    if len(far) and len(order):
        needles = _mix(wanted[far])
        sorting = np.argsort(needles)  # ascending needles walk the keys once instead of missing the cache each time
        found = np.empty(len(far), np.int64)
        found[sorting] = np.searchsorted(keys[order], needles[sorting])
        place[far] = order[np.minimum(found, len(order) - 1)]
    return place


def _whole(good: npt.NDArray[np.bool_], above: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """`good` and all above it good: each round looks twice as far up, so the longest chain takes log2 of it rounds."""
    good = good.copy()
    reach = above.copy()
    rows = np.flatnonzero(reach >= 0)
    while len(rows):
        up = reach[rows]
        good[rows] &= good[up]
        reach[rows] = reach[up]
        rows = rows[reach[rows] >= 0]
    return good


def _with_followers(recency: npt.NDArray[np.int64], above: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The maximum of each row and all that hang on it, found in the same way."""
    recency = recency.copy()
    reach = above.copy()
    rows = np.flatnonzero(reach >= 0)
    while len(rows):
        up = reach[rows]
        np.maximum.at(recency, up, recency[rows])
        reach[rows] = reach[up]
        rows = rows[reach[rows] >= 0]
    return recency


def _mix(hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """64 bits that depend on all 256 of each hash."""
    odd = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x27D4EB2F165667C5], np.uint64)
    return hashes @ odd
