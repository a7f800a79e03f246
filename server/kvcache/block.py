"""What a block is and who holds it: Block, Copy, Lease and the block table. Loop thread only; no bytes, no I/O."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from server.types import BlockHash, FrameId, TierName


@dataclass(eq=False, slots=True)
class Copy:
    """One block's bytes in one frame of one tier.

    `ready` is false while a transfer fills it. `readers` counts transfers that read it. `ranked` says that the tier's
    eviction policy holds the block, that is, that this copy may go. `pins` counts the copies in the same tier whose
    `above` is this one and that may not go: while there are any, this copy may not either (suffix first).
    """

    block: Block
    frame: FrameId
    ready: bool
    readers: int = 0
    pins: int = 0
    above: Copy | None = None
    ranked: bool = False


@dataclass(eq=False, slots=True)
class Block:
    """`block_tokens` consecutive tokens' KV. Unsealed (hash None): private to one lease. Sealed: immutable and shared.

    `hits` counts the leases that found it by match; eviction policies may rank by it.
    """

    hash: BlockHash | None
    parent: Block | None
    copies: dict[TierName, Copy] = field(default_factory=dict)
    leases: int = 0
    hits: int = 0


class BlockTable:
    """A request's device frames as a growing int32 array. `view()` is zero-copy and stays valid: a table only appends,
    and where it must change an entry or outgrows its buffer it moves to a new one."""

    __slots__ = ("_buffer", "_length")

    def __init__(self) -> None:
        self._buffer: npt.NDArray[np.int32] = np.empty(8, dtype=np.int32)
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def view(self) -> npt.NDArray[np.int32]:
        return self._buffer[: self._length]

    def extend(self, frames: Iterable[FrameId]) -> None:
        added = np.fromiter(frames, dtype=np.int32)
        end = self._length + len(added)
        if end > len(self._buffer):
            grown = np.empty(max(end, 2 * len(self._buffer)), dtype=np.int32)
            grown[: self._length] = self._buffer[: self._length]
            self._buffer = grown
        self._buffer[self._length : end] = added
        self._length = end

    def replace(self, index: int, frame: FrameId) -> None:
        self._buffer = self._buffer.copy()
        self._buffer[index] = frame


@dataclass(eq=False, slots=True)
class Lease:
    """Keeps a request's blocks on the device from eviction, in prompt order. Released exactly once, by `KVManager`.

    The first `sealed` blocks carry a hash. `onboarding` blocks must still land before the request may run; while it is
    above zero `table` is incomplete. `found_in` names the tier of each block that was matched.
    """

    blocks: list[Block] = field(default_factory=list)
    table: BlockTable = field(default_factory=BlockTable)
    sealed: int = 0
    onboarding: int = 0
    found_in: list[TierName] = field(default_factory=list)
    released: bool = False
