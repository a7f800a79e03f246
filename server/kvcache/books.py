"""The books of one tier: which block is in which frame, who holds it, what may go. Loop thread only; no bytes, no I/O.

Columns indexed by frame, no object per block: a tier of a million blocks costs the garbage collector nothing and some
300 bytes a block, and every operation is O(1), or O(blocks that change rank) along one chain.

A frame is free, private (owned, no hash: one request writes it) or filed (`find` leads from its hash to it; not `ready`
while a transfer fills it). `holds` counts everything that needs its bytes: leases, transfers, loads that wait, pins.
`above` is the frame of the block's parent in this tier, and `pins` counts the blocks that hang on a frame and that may
not go: while there are any, it may not either. So a chain goes suffix first. `kept` blocks, and so what they hang on,
may not go at all. `ranked` blocks are those that may go, and the eviction policy knows exactly these.
Where tenants are known that policy is `shares`, around the one that was asked for, and keeps some of them back.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice

import numpy as np

from server.kvcache.eviction import make_policy
from server.kvcache.lives import Lives
from server.kvcache.pool import FramePool
from server.kvcache.reuse import ReuseModel, class_of
from server.kvcache.shares import NOBODY, RANKED, Shares
from server.types import BlockHash, FrameId, TierName

NOWHERE = -1
EXIT_WEIGHT = 0.01
"""Of one eviction in the mean density of what is evicted."""


class TierBooks:
    def __init__(
        self, name: TierName, frames: int, eviction: str, reuse: ReuseModel | None = None, *, shared: bool = False
    ) -> None:
        """`reuse`: what all tiers know about when blocks are used again. `shared`: it matters whose a block is."""
        self.name = name
        self.reuse = reuse or ReuseModel()
        self.pool = FramePool(frames)
        self.find: dict[BlockHash, FrameId] = {}
        self.hashes: list[BlockHash | None] = [None] * frames
        self.parents: list[BlockHash | None] = [None] * frames
        self.depth = array("i", bytes(4 * frames))
        self.reach = array("i", bytes(4 * frames))
        """Depth of the deepest block that ever rested on this one here."""
        self.hits = array("i", bytes(4 * frames))
        self.holds = array("i", bytes(4 * frames))
        self.pins = array("i", bytes(4 * frames))
        self.kids = array("i", bytes(4 * frames))
        """How many blocks hang on this one here."""
        self.above = array("i", [NOWHERE]) * frames
        self.kind = array("h", bytes(2 * frames))
        """Of what kind this block is, by the request that used it last, see `reuse.kind_of`."""
        self.used_s = array("d", bytes(8 * frames))
        """When that request ended."""
        self.ready = bytearray(frames)
        self.ranked = bytearray(frames)
        self.pending = bytearray(frames)
        """1: this block is about to be copied to the tier below."""
        self.transient = bytearray(frames)
        """1: this block was asked not to outlive the process."""
        self.origin: dict[FrameId, TierName] = {}
        """Where blocks that were fetched early came from, until somebody uses them."""
        self.lives = Lives(frames)
        self.kept: set[BlockHash] = set()
        self.exit_density = 0.0
        """Hit density of what was evicted for want of room: a decayed mean."""
        self.evicted: Counter[str] = Counter({"capacity": 0, "corrupt": 0, "admin": 0})
        self.policy = make_policy(eviction, self)
        self.shares: Shares | None = None
        if shared:
            self.shares = self.policy = Shares(self, self.policy)

    @property
    def available(self) -> int:
        """Frames that are free or could be made free now; exact, so whoever asks for as many gets them."""
        return self.pool.free + len(self.policy)

    @property
    def contested(self) -> int:
        """Frames that no floor keeps for somebody at present."""
        return self.pool.capacity - (0 if self.shares is None else self.shares.reserved_blocks)

    def has(self, value: BlockHash) -> bool:
        """Is this block here, with all its bytes?"""
        frame = self.find.get(value)
        return frame is not None and bool(self.ready[frame])

    # --- frames ------------------------------------------------------------------------------------------------------

    def take(self, count: int) -> list[FrameId] | None:
        """`count` private frames, evicting where needed; None, and nothing changed, when that many cannot be had."""
        short = count - self.pool.free
        if short > 0:
            if short > len(self.policy):
                return None
            for frame in list(islice(self.policy.victims(), short)):
                self.drop(frame, "capacity")
        frames = self.pool.take(count)
        for frame in frames:
            self.holds[frame] = 1
        return frames

    def give_back(self, frames: Sequence[FrameId]) -> None:
        """Free private frames, each held once."""
        for frame in frames:
            assert self.hashes[frame] is None, "a filed frame is dropped, not given back"
            assert self.holds[frame] == 1, f"a private frame has one holder, not {self.holds[frame]}"
            self.holds[frame] = 0
            self.ready[frame] = 0
        self.pool.give_back(frames)

    def file(
        self,
        frame: FrameId,
        value: BlockHash,
        parent: BlockHash | None,
        depth: int,
        *,
        ready: bool,
        hits: int = 0,
        owner: int = NOBODY,
    ) -> None:
        """A private frame becomes the place of block `value`, and hangs on its parent's if that is here. Its one hold
        stays the caller's."""
        assert value not in self.find, f"{self.name}: a block is filed twice"
        self.find[value] = frame
        self.hashes[frame], self.parents[frame] = value, parent
        self.depth[frame] = self.reach[frame] = depth
        self.hits[frame], self.ready[frame] = hits, ready
        self.kind[frame], self.used_s[frame] = 0, self.reuse.now_s
        self.lives.came(value, self.reuse.now_s)
        if self.shares is not None:
            self.shares.filed(frame, owner)
        above = self.find.get(parent) if parent is not None else None
        if above is not None:
            self.hang(frame, above)

    def hang(self, frame: FrameId, above: FrameId) -> None:
        """Hang a held block, which hangs on nothing yet, on its parent's frame."""
        assert self.holds[frame], "only a block that may not go is hung up"
        assert self.above[frame] == NOWHERE, f"{self.name}: a block hangs on something already"
        self.above[frame] = above
        self.kids[above] += 1
        self.pins[above] += 1
        self._unrank(above)

    def drop(self, frame: FrameId, reason: str) -> None:
        """Forget the block in `frame`, which nobody holds, and free the frame. Blocks that hang on it stay: a policy
        lets them go first, but bad bytes go when they are found."""
        value, above = self.hashes[frame], self.above[frame]
        assert value is not None, "a private frame is given back, not dropped"
        assert not self.holds[frame], f"{self.name}: a block is dropped while somebody holds it"
        if reason == "capacity":
            class_ = class_of(self.hits[frame], self.kind[frame])
            density = self.reuse.class_density(class_, self.used_s[frame])
            self.exit_density += EXIT_WEIGHT * (density - self.exit_density)
            self.lives.evicted(value, self.used_s[frame], self.reuse.now_s)
        else:
            self.lives.gone(value)
            self._orphan_children(frame)
            self.pins[frame] = self.kids[frame] = 0
        if above != NOWHERE:
            self.kids[above] -= 1
        if self.ranked[frame]:
            self.ranked[frame] = 0
            (self.policy.on_evict if reason == "capacity" else self.policy.on_remove)(frame)
        elif above != NOWHERE:
            self.pins[above] -= 1
        del self.find[value]
        self.hashes[frame] = self.parents[frame] = None
        self.ready[frame] = self.pins[frame] = self.depth[frame] = self.hits[frame] = self.transient[frame] = 0
        self.pending[frame] = 0
        self.kept.discard(value)
        self.origin.pop(frame, None)
        self.lives.unused(frame)
        self.above[frame] = NOWHERE
        if self.shares is not None:
            self.shares.dropped(frame)
        self.pool.give_back((frame,))
        if reason in self.evicted:
            self.evicted[reason] += 1
        if above != NOWHERE:
            self._rank(above)

    def _orphan_children(self, frame: FrameId) -> None:
        """O(frames), 0.3 ms per million: faults and operators are rarer than evictions."""
        for child in np.flatnonzero(np.frombuffer(self.above, np.int32) == frame).tolist():
            self.above[child] = NOWHERE

    def owner_of(self, frame: FrameId) -> int:
        """Whose block is in `frame`, by `Owners`; 0 where that does not matter."""
        return NOBODY if self.shares is None else self.shares.owner[frame]

    def idle(self) -> Iterator[FrameId]:
        """All that may go, for whatever reason, children before their parents."""
        return self.policy.victims() if self.shares is None else chain(self.policy.victims(), self.shares.reserved())

    def origin_of(self, frame: FrameId) -> TierName:
        """Where the block of `frame`, which is used now, was found: here, unless it was fetched early."""
        self.lives.used(frame)
        return self.origin.pop(frame, self.name)

    def origin_moved(self, frame: FrameId) -> TierName:
        """The same of a block that moves on although nobody uses it yet."""
        self.lives.moved(frame)
        return self.origin.pop(frame, self.name)

    # --- holding -----------------------------------------------------------------------------------------------------

    def hold(self, frame: FrameId) -> None:
        self.holds[frame] += 1
        self._unrank(frame)

    def unhold(self, frame: FrameId) -> None:
        """A hold ended: unless something else keeps the block it may go, and so, perhaps, may those it hangs on. Bytes
        that never came, or went bad, go with their last holder."""
        assert self.holds[frame] > 0, f"{self.name}: a hold ended that was not there"
        self.holds[frame] -= 1
        if not self.holds[frame] and not self.ready[frame]:
            self.drop(frame, "failed")
        else:
            self._rank(frame)

    def condemn(self, frame: FrameId) -> None:
        """The bytes of this held block are bad: from now on it is not here, and it goes with its last holder."""
        assert self.holds[frame], "whoever finds bad bytes holds them"
        if self.ready[frame]:
            self.ready[frame] = 0
            self.evicted["corrupt"] += 1

    def keep(self, value: BlockHash) -> None:
        """This block, which is here, may not go until `let_go`; neither may those it hangs on."""
        self.kept.add(value)
        self._unrank(self.find[value])

    def let_go(self, value: BlockHash) -> None:
        """End `keep`. Nothing happens if the block is not kept."""
        if value in self.kept:
            self.kept.remove(value)
            self._rank(self.find[value])

    def refresh(self, values: Sequence[BlockHash], hits: Sequence[int] = (), kinds: Sequence[int] = ()) -> None:
        """A whole chain was just used: the policy hears of it again, child before parent. `hits` and `kinds` of each
        block where it was used, if that is another tier."""
        most = 0
        for position, value in reversed(list(enumerate(values))):
            frame = self.find.get(value)
            if frame is None:
                continue
            if kinds:
                self.kind[frame], self.used_s[frame] = kinds[position], self.reuse.now_s
                most = max(most, hits[position], self.hits[frame])  # of a parent that was computed anew: its child's
                self.hits[frame] = most
            if self.ranked[frame]:
                self.policy.on_remove(frame)
                self.hits[frame] = self.policy.on_insert(frame)

    def mark_pending(self, frame: FrameId, pending: bool) -> None:
        """The block in `frame` is about to be copied to the tier below, or not any more."""
        self.pending[frame] = pending
        if self.ranked[frame]:
            self.policy.on_changed(frame)

    def landed(self, frame: FrameId) -> None:
        """The bytes are all there; the transfer's hold is still the caller's."""
        self.ready[frame] = 1

    def may_go(self, frame: FrameId) -> bool:
        """Filed, ready, held by nobody, and so is all that hangs on it in this tier."""
        value = self.hashes[frame]
        if value is None or not self.ready[frame] or self.holds[frame] or self.pins[frame]:
            return False
        return value not in self.kept

    def _rank(self, frame: FrameId) -> None:
        while frame != NOWHERE and not self.ranked[frame] and self.may_go(frame):
            self.ranked[frame] = RANKED
            self.hits[frame] = self.policy.on_insert(frame)
            child, frame = frame, self.above[frame]
            if frame != NOWHERE:
                self.pins[frame] -= 1
                # Whoever found the child found the parent; a parent that was computed anew has forgotten it.
                self.hits[frame] = max(self.hits[frame], self.hits[child])
                self.reach[frame] = max(self.reach[frame], self.reach[child])

    def _unrank(self, frame: FrameId) -> None:
        while frame != NOWHERE and self.ranked[frame]:
            self.ranked[frame] = 0
            self.policy.on_remove(frame)
            frame = self.above[frame]
            if frame != NOWHERE:
                self.pins[frame] += 1

    # --- restart -----------------------------------------------------------------------------------------------------

    def recover(
        self,
        frames: Sequence[FrameId],
        hashes: Sequence[BlockHash],
        above: Sequence[FrameId],
        depths: Sequence[int],
        owners: Mapping[int, Sequence[FrameId]],
    ) -> None:
        """File what outlived the last process, in eviction order: 0.7 us a block. Only in books that are still empty,
        of a tier from which nothing is spilled: `parents` stays empty, as nobody asks for it there. `owners`: whose
        frames they are, as far as they are anybody's."""
        self.pool.occupy(frames)
        if self.shares is not None:
            self.shares.recovered(owners)
        self.find = dict(zip(hashes, frames, strict=True))
        rows = np.asarray(frames, np.int64)
        for column, values in ((self.above, above), (self.depth, depths), (self.reach, depths)):
            np.frombuffer(column, np.int32)[rows] = np.asarray(values, np.int32)
        for flags in (self.ready, self.ranked):
            np.frombuffer(flags, np.uint8)[rows] = 1
        hanging = np.asarray([parent for parent in above if parent != NOWHERE], np.int64)
        np.add.at(np.frombuffer(self.kids, np.int32), hanging, 1)
        by_frame, insert, reach = self.hashes, self.policy.on_insert, self.reach  # one loop for all three is slower
        for frame, value in zip(frames, hashes, strict=True):
            by_frame[frame] = value
        for frame, parent in zip(frames, above, strict=True):
            if parent != NOWHERE and reach[frame] > reach[parent]:
                reach[parent] = reach[frame]
        for frame in frames:
            insert(frame)
