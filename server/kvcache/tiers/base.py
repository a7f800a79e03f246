"""The tier seam: block-sized frames on one medium. Data plane only: a tier is told which frame, it never chooses.

Every transfer has the host arena (the DRAM tier's memory) at one end, so a tier is two moves: host to tier, tier to
host. What a block holds is nobody's business here; a tier knows `block_bytes` and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from server.types import BlockHash, FrameId, Note, TierFault, TierName


@dataclass(frozen=True, slots=True)
class Move:
    """One block between frame `host` of the host arena and frame `frame` of a tier.

    `hash` says what the source must hold. `parent` is the hash of the block before it in its chain (None for a first
    block) and `depth` the number of blocks before it; a tier that outlives the process keeps both. `tenant` says whose
    it is, in at most 32 bytes of ASCII, if anybody's: it is enough to keep that of first blocks.
    """

    hash: BlockHash
    parent: BlockHash | None
    depth: int
    host: FrameId
    frame: FrameId
    tenant: str = ""


@dataclass(slots=True)
class Recovered:
    """What a tier still holds when it is opened, as columns: one row per block, in the order in which blocks should be
    evicted (least recently used first, a child before its parent).

    `above[i]` is the frame of row i's parent, which is among the rows too, or -1 for a first block. `pins` maps a hash
    to the Unix time in seconds until which it was pinned. `owners` maps a tenant to the frames that hold its blocks.
    """

    frames: Sequence[FrameId] = ()
    hashes: Sequence[BlockHash] = ()
    above: Sequence[FrameId] = ()
    depths: Sequence[int] = ()
    pins: dict[BlockHash, float] = field(default_factory=dict)
    owners: dict[str, Sequence[FrameId]] = field(default_factory=dict)


class Tier(Protocol):
    """The caller guarantees: both frames of a move stay reserved until the call returns, no frame is in two calls at
    once, at most the tier's own limit of calls are open. The tier guarantees: it returns only when no byte will move
    any more, also after cancellation; each move gets its own outcome; a read never reports success unless the bytes
    are exactly those that were written under that hash.
    """

    name: TierName
    capacity_blocks: int

    async def open(self) -> Recovered: ...
    async def write(self, moves: Sequence[Move]) -> Sequence[TierFault | None]:
        """Host to tier."""
        ...

    async def read(self, moves: Sequence[Move]) -> Sequence[TierFault | None]:
        """Tier to host."""
        ...

    def note(self, notes: Sequence[Note]) -> None:
        """Remember what concerns frames but moves no block. Loop thread; never blocks, may be lost in a crash."""
        ...

    async def aclose(self) -> None: ...
