"""How long blocks live in one tier, how long they are not used, and what became of those that went. Loop thread only.

Ages at eviction are of all blocks. What needs a memory of its own is kept for one block in eight, chosen by its hash,
so that the same block is followed in every tier and for ever (after SHARDS, Waldspurger et al., FAST 2015). Of those
that were evicted as many are remembered as an eighth of the tier's frames: had it had twice as many, they would be
there still, if it evicts in about the order in which it takes in.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from server.types import BlockHash, FrameId, TierLife

SAMPLE = 8
_MASK = SAMPLE - 1


def sampled(values: Sequence[BlockHash]) -> list[BlockHash]:
    """Those of `values` that are followed: 40 ns a block."""
    return [value for value in values if not value[0] & _MASK]


class Lives:
    """Of the blocks of one tier with `frames` frames. `now`: seconds, as all others here."""

    def __init__(self, frames: int) -> None:
        self.life = TierLife()
        self.prefetched = {"useful": 0, "wasted": 0}
        """Blocks that were fetched to here early: used since, or gone unused."""
        self._ghosts_max = -(-frames // SAMPLE)
        self.came_s: dict[BlockHash, float] = {}
        """When those that are here came, of those that are followed."""
        self._ghosts: OrderedDict[BlockHash, float] = OrderedDict()
        """When they were evicted, longest ago first."""
        self.early: set[FrameId] = set()
        """What was fetched to here early and not used yet."""

    def came(self, value: BlockHash, now: float) -> None:
        """The block is here from now on, or on its way."""
        if not value[0] & _MASK:
            self.came_s[value] = now
            self._ghosts.pop(value, None)

    def evicted(self, value: BlockHash, used_s: float, now: float) -> None:
        """It went for want of room. `used_s`: when it was used last; 0: before this process."""
        if used_s:
            self.life.eviction_age_s.observe(now - used_s)
        if not value[0] & _MASK:
            came_s = self.came_s.pop(value, None)
            if came_s is not None:
                self.life.lifetime_s.observe(now - came_s)
            self._ghosts[value] = now
            if len(self._ghosts) > self._ghosts_max:
                self._ghosts.popitem(last=False)

    def gone(self, value: BlockHash) -> None:
        """It went for another reason."""
        self.came_s.pop(value, None)

    def asked_again(self, used_s: float, now: float) -> None:
        """A sampled block that is here is asked for; `used_s` as above."""
        if used_s:
            self.life.reuse_gap_s.observe(now - used_s)

    def asked_in_vain(self, value: BlockHash, now: float) -> None:
        """A sampled block that is not here is asked for."""
        evicted_s = self._ghosts.pop(value, None)
        if evicted_s is not None:
            self.life.evict_to_reuse_s.observe(now - evicted_s)
            self.life.ghost_hit_blocks += SAMPLE

    # --- what was fetched early --------------------------------------------------------------------------------------

    def fetched(self, frame: FrameId) -> None:
        """The block in `frame` was brought here although nobody waited for it."""
        self.early.add(frame)

    def used(self, frame: FrameId) -> None:
        """Somebody has use for it."""
        if frame in self.early:
            self.early.remove(frame)
            self.prefetched["useful"] += 1

    def moved(self, frame: FrameId) -> None:
        """It goes on, still for nobody: what becomes of it is counted where it ends."""
        self.early.discard(frame)

    def unused(self, frame: FrameId) -> None:
        """It is gone from `frame`."""
        if frame in self.early:
            self.early.remove(frame)
            self.prefetched["wasted"] += 1
