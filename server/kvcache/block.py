"""What a request holds of the cache: the block table and the lease. Loop thread only; no bytes, no I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import groupby

import numpy as np
import numpy.typing as npt

from server.types import ORDINARY, BlockHash, FrameId, Retention, SpanReport, TierName

LATE_ALREADY = -1.0
"""As a lease's `late_s`: a promise was not kept, and was counted."""


class BlockTable:
    """A request's device frames as a growing int32 array. `view()` is zero-copy and stays valid: a table only appends,
    and where it must change an entry or outgrows its buffer it moves to a new one."""

    __slots__ = ("_buffer", "_length")

    def __init__(self) -> None:
        self._buffer: npt.NDArray[np.int32] = np.empty(8, dtype=np.int32)
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> FrameId:
        assert 0 <= index < self._length, f"block {index} of a table of {self._length}"
        return int(self._buffer[index])

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


class Stage(Enum):
    """Of a load: waits for its next hop, is in one, or is over (landed, failed or no longer wanted)."""

    QUEUED = auto()
    FLYING = auto()
    OVER = auto()


@dataclass(eq=False, slots=True)
class Load:
    """One block on its way up, shared by all that want it. It holds its copy at `level`, where it is now.

    While leases wait for it it goes all the way to the device. `early_goal`: nobody waits yet, and it goes up to this
    level; None once somebody waits.
    """

    hash: BlockHash
    parent: BlockHash | None
    depth: int
    level: int
    origin: TierName
    early_goal: int | None
    stage: Stage = Stage.QUEUED
    leases: list[Lease] = field(default_factory=list)
    deadline_s: float = float("inf")


@dataclass(eq=False, slots=True)
class Lease:
    """Keeps a request's blocks on the device from eviction. Released exactly once, by `KVManager`.

    `table` are its frames in prompt order: the first `sealed` hold finished, shared blocks, those behind are private.
    The prefix `hashes` was matched; where it is longer than the table its blocks are on their way: `loads` by position
    those that are to come, `tail` the frames of those that came and wait until the table reaches them (loading goes
    from the back while computing goes from the front). A position in neither has to be computed. `served` counts the
    blocks of the table that came from the cache, by the tier they were found in. `waits_since_s`, `late_s`: since when
    and until when to wait for the next one to leave `waits_level`; it came from `waits_for`. `retention` says what
    becomes of what this request computes, and `owner` whose it is.

    For the accounts: `since_s` is when it was made, `landed_s` when the last block came that it waited for; `missed`
    counts blocks that are somewhere and are computed all the same, by reason; `gained` are the runs of the table that
    came from the cache and were not accounted for yet, each a tier, a position and a length; `decided` is what was to
    become of what lay below the device, `landed_by_tier_s` when the last block from each tier came.
    """

    hashes: Sequence[BlockHash] = ()
    table: BlockTable = field(default_factory=BlockTable)
    sealed: int = 0
    loads: dict[int, Load] = field(default_factory=dict)
    tail: dict[int, tuple[FrameId, TierName]] = field(default_factory=dict)
    served: Counter[TierName] = field(default_factory=Counter)
    waits_since_s: float = 0.0
    waits_level: int = 0
    waits_for: TierName = ""
    late_s: float | None = None
    retention: Retention = ORDINARY
    owner: int = 0
    released: bool = False
    since_s: float = 0.0
    landed_s: float = 0.0
    missed: dict[str, int] = field(default_factory=dict)
    gained: list[tuple[TierName, int, int]] = field(default_factory=list)
    decided: Sequence[SpanReport] = ()
    landed_by_tier_s: dict[TierName, float] = field(default_factory=dict)

    @property
    def loading(self) -> bool:
        """The matched prefix is not all in the table yet."""
        return len(self.hashes) > len(self.table)

    def found(self, origins: Sequence[TierName], position: int) -> None:
        """The blocks of the table from `position` on came from the cache, from these tiers."""
        for tier, group in groupby(origins):
            count = len(list(group))
            self.gain(tier, position, count)
            position += count

    def gain(self, tier: TierName, position: int, count: int) -> None:
        """The same of `count` blocks from one tier."""
        self.served[tier] += count
        self.gained.append((tier, position, count))

    def miss(self, position: int) -> None:
        """The block at this position of `hashes` is computed after all."""
        reason = "split"
        if position in self.loads:
            reason = "late" if self.late_s == LATE_ALREADY else "split"
        elif position not in self.tail:
            reason = "failed"
        self.missed[reason] = self.missed.get(reason, 0) + 1


@dataclass(frozen=True, slots=True)
class Over:
    """A request that ended, as far as it tells when its blocks will be used again. `prompt_tokens` None: all blocks."""

    prompt_tokens: int | None = None
    answered_tokens: int = 0
    background: bool = False


OVER = Over()


@dataclass(frozen=True, slots=True)
class UsedChain:
    """Blocks of a request that ended, how often each was found up to now, and of what kind each is."""

    values: list[BlockHash]
    hits: list[int]
    kinds: list[int]
    transient: bool
