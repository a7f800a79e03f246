"""KVManager: which block is where, who holds it, what moves next. The one writer of blocks, copies, pools and index.

Synchronous, deterministic, loop thread only: no I/O, no clock (`now` is passed in), no bytes. It decides; a mover moves
and reports back through `complete`. Costs: `grow` and `seal` are O(new blocks), `admit` and `release` O(blocks of the
request), `plan_transfers` and `complete` at worst O(length of the chain), and nothing is O(blocks of the cache).

How a sealed block travels: sealed on the device -> spilled in the background to the tier below -> dropped from the
device when its frame is wanted (no copy at that moment) -> onboarded when a request matches it again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from server.kvcache.block import Block, Copy, Lease
from server.kvcache.eviction import EvictionPolicy, make_policy
from server.kvcache.hashing import chain_root
from server.kvcache.pool import FramePool
from server.types import DEVICE, BlockHash, BlockLayout, FrameId, TierFault, TierName, Transfer


@dataclass(frozen=True, slots=True)
class TierSpec:
    """One tier as the manager sees it: a name, a number of frames, the name of an eviction policy."""

    name: TierName
    frames: int
    eviction: str = "lru"


@dataclass(eq=False, slots=True)
class TierState:
    name: TierName
    pool: FramePool
    policy: EvictionPolicy
    evicted_blocks: int = 0

    @property
    def available(self) -> int:
        """Frames that are free or could be made free now; exact, so whoever asks for as many gets them."""
        return self.pool.free + len(self.policy)


class KVManager:
    def __init__(
        self, layout: BlockLayout, tiers: Sequence[TierSpec], fingerprint: bytes, *, transfers_max: int = 64
    ) -> None:
        """`tiers` from fastest to slowest, the first is the device; at most `transfers_max` are in flight at once."""
        assert tiers[0].name == DEVICE, f"the first tier is the device, not {tiers[0].name!r}"
        assert len(tiers) <= 2, "one tier below the device for now"
        self.layout = layout
        self.tiers = {t.name: TierState(t.name, FramePool(t.frames), make_policy(t.eviction)) for t in tiers}
        self.device = self.tiers[DEVICE]
        self.lower = self.tiers[tiers[1].name] if len(tiers) > 1 else None
        self.index: dict[BlockHash, Block] = {}
        self.leases: set[Lease] = set()
        self.in_flight: dict[int, tuple[Transfer, Block]] = {}
        self._fingerprint = fingerprint
        self.transfers_max = transfers_max
        self._next_transfer = 0
        self.onboards: deque[tuple[Block, Copy, Copy]] = deque()
        self._spills: deque[Block] = deque(maxlen=self.device.pool.capacity)
        self._waiters: dict[Block, list[Lease]] = {}

    # --- what the scheduler asks -------------------------------------------------------------------------------------

    def root(self, cache_salt: str) -> BlockHash:
        """The chain root of one tenant."""
        return chain_root(self._fingerprint, cache_salt)

    @property
    def available_blocks(self) -> int:
        """Device frames that are free or evictable now."""
        return self.device.available

    @property
    def moving(self) -> bool:
        """Blocks are in flight or about to be: what has no room now may have room when they landed."""
        return bool(self.in_flight or self.onboards)

    def admit(self, hashes: Sequence[BlockHash], now: float) -> Lease:
        """Lease the longest resident prefix of `hashes` and plan the onboarding of what is not on the device.

        The lease may hold less than was matched where the device has no room for it. Call `release` exactly once.
        """
        lease = Lease()
        self.leases.add(lease)
        missing: list[Block] = []
        for value in hashes:
            block = self.index.get(value)
            if block is None:
                break
            if DEVICE not in block.copies:
                missing.append(block)
            self._hold(block)
            lease.blocks.append(block)
        lease.sealed = len(lease.blocks)
        self._onboard(lease, missing, now)
        for block in lease.blocks:
            block.hits += 1
        if lease.onboarding == 0:
            self._settle(lease, now)
        return lease

    def grow(self, lease: Lease, tokens: int) -> bool:
        """Make room for `tokens` tokens in all; False, and nothing changed, when the device cannot hold them."""
        wanted = self.layout.blocks_for(tokens) - len(lease.blocks)
        if wanted <= 0:
            return True
        frames = self._take(self.device, wanted)
        if frames is None:
            return False
        lease.blocks.extend(self._private_block(frame) for frame in frames)
        lease.table.extend(frames)
        return True

    def seal(self, lease: Lease, hashes: Sequence[BlockHash], full: int) -> None:
        """The first `full` blocks of `lease` are computed to their last token: name them by `hashes` and share them."""
        for position in range(lease.sealed, full):
            block, value = lease.blocks[position], hashes[position]
            twin = self.index.get(value)
            if twin is not None and not self._adopt(lease, position, twin):
                return
            if twin is None:
                self._seal_block(block, value, lease.blocks[position - 1] if position else None)
            lease.sealed = position + 1

    def release(self, lease: Lease, now: float) -> None:
        """Let go of every block: shared ones stay cached until evicted, private ones are freed at once."""
        assert not lease.released, "a lease is released exactly once"
        lease.released = True
        self.leases.remove(lease)
        self._let_go(lease.blocks, now)
        if self.lower is not None:
            self._refresh(self.lower, lease.blocks, now)

    # --- transfers ---------------------------------------------------------------------------------------------------

    def plan_transfers(self, now: float) -> list[Transfer]:
        """Transfers to start now: onboards first, a request waits for them; then spills, nobody does."""
        if self.lower is None:
            return []
        planned: list[Transfer] = []
        while self.onboards and len(self.in_flight) < self.transfers_max:
            block, source, target = self.onboards.popleft()
            planned.append(self._start(block, (self.lower.name, source.frame), (DEVICE, target.frame), now))
        while self._spills and len(self.in_flight) < self.transfers_max:
            self._spill(self._spills.popleft(), planned, now)
        return planned

    def complete(self, transfer_id: int, fault: TierFault | None, now: float) -> None:
        """The mover's report: no byte of this transfer moves any more. A faulty target is never used."""
        transfer, block = self.in_flight.pop(transfer_id)
        source_tier, target_tier = self.tiers[transfer.source[0]], self.tiers[transfer.target[0]]
        source, target = block.copies[source_tier.name], block.copies[target_tier.name]
        source.readers -= 1
        if fault is None:
            target.ready = True
            self._unpin(target_tier, target, now)
        else:
            self._discard(target_tier, target, now)
        if fault is not None and fault.reason == "corrupt" and source_tier is not self.device:
            self._discard(source_tier, source, now)
        else:
            self._unpin(source_tier, source, now)
        if target_tier is self.device:
            for lease in self._waiters.pop(block, ()):
                if not lease.released:
                    lease.onboarding -= 1
                    if lease.onboarding == 0:
                        self._settle(lease, now)

    # --- admission and onboarding ------------------------------------------------------------------------------------

    def _onboard(self, lease: Lease, missing: list[Block], now: float) -> None:
        frames = self._take(self.device, min(len(missing), self.device.available))
        assert frames is not None, "frames that are available can be taken"
        if len(frames) < len(missing):
            self._truncate(lease, lease.blocks.index(missing[len(frames)]), now)
        for block, frame in zip(missing, frames, strict=False):
            assert self.lower is not None, "a block without a device copy lives in a lower tier"
            source, target = block.copies[self.lower.name], Copy(block, frame, ready=False)
            source.readers += 1
            self._pin(self.lower, source)
            self._place(self.device, target)
            self.onboards.append((block, source, target))
        onboarded = set(missing)
        for block in lease.blocks:
            lease.found_in.append(self.lower.name if block in onboarded and self.lower is not None else DEVICE)
            if not block.copies[DEVICE].ready:
                lease.onboarding += 1
                self._waiters.setdefault(block, []).append(lease)

    def _settle(self, lease: Lease, now: float) -> None:
        """Every onboard of `lease` has landed: cut it before the first that failed, and fill its table.

        Somebody else may have sent for a failed block again: then its copy is there, but it is not ready.
        """
        for position, block in enumerate(lease.blocks):
            copy = block.copies.get(DEVICE)
            if copy is None or not copy.ready:
                self._truncate(lease, position, now)
                break
        lease.table.extend(block.copies[DEVICE].frame for block in lease.blocks)

    def _truncate(self, lease: Lease, length: int, now: float) -> None:
        dropped = lease.blocks[length:]
        del lease.blocks[length:], lease.found_in[length:]
        lease.sealed = len(lease.blocks)
        self._let_go(dropped, now)

    # --- sealing -----------------------------------------------------------------------------------------------------

    def _seal_block(self, block: Block, value: BlockHash, parent: Block | None) -> None:
        block.hash, block.parent = value, parent
        self._link(self.device, block.copies[DEVICE])
        self.index[value] = block
        if self.lower is not None:
            self._spills.append(block)

    def _adopt(self, lease: Lease, position: int, twin: Block) -> bool:
        """Someone else sealed the same content: hold theirs and give our bytes up, or to them if they have none on the
        device. False while theirs is still on its way up: sealing is tried again at the next block."""
        own = lease.blocks[position]
        theirs = twin.copies.get(DEVICE)
        if theirs is None:
            self._hold(twin)
            self._place(self.device, Copy(twin, own.copies[DEVICE].frame, ready=True))
        elif theirs.ready:
            self._hold(twin)
            self.device.pool.give_back([own.copies[DEVICE].frame])
            lease.table.replace(position, theirs.frame)
        else:
            return False
        lease.blocks[position] = twin
        return True

    # --- holding, ranking, placing -----------------------------------------------------------------------------------

    def _private_block(self, frame: FrameId) -> Block:
        block = Block(None, None, leases=1)
        block.copies[DEVICE] = Copy(block, frame, ready=True)
        return block

    def _hold(self, block: Block) -> None:
        block.leases += 1
        copy = block.copies.get(DEVICE)
        if copy is not None:
            self._pin(self.device, copy)

    def _let_go(self, blocks: list[Block], now: float) -> None:
        """Give up one lease on each block of a chain, child before parent, as the eviction policies need it."""
        private: list[FrameId] = []
        for block in reversed(blocks):
            block.leases -= 1
            copy = block.copies.get(DEVICE)
            if block.hash is None:
                private.append(block.copies[DEVICE].frame)
            elif copy is not None:
                self._unpin(self.device, copy, now)
        self.device.pool.give_back(reversed(private))

    def _refresh(self, tier: TierState, blocks: list[Block], now: float) -> None:
        """A whole chain was just used: the policy hears of it again, child before parent."""
        for block in reversed(blocks):
            copy = block.copies.get(tier.name)
            if copy is not None and copy.ranked:
                tier.policy.on_remove(block)
                tier.policy.on_insert(block, now)

    def _unpin(self, tier: TierState, copy: Copy, now: float) -> None:
        """A hold on this copy ended: unless another remains it may go, and so, perhaps, may those that it hangs on."""
        above: Copy | None = copy
        while above is not None and not above.ranked and self._may_go(tier, above):
            above.ranked = True
            tier.policy.on_insert(above.block, now)
            above = above.above
            if above is not None:
                above.pins -= 1

    def _may_go(self, tier: TierState, copy: Copy) -> bool:
        """Resident, ready, not being read, on the device not leased, and so are all that hang on it in this tier."""
        block = copy.block
        held = copy.readers or copy.pins or (tier is self.device and block.leases)
        return copy.ready and not held and block.copies.get(tier.name) is copy

    def _pin(self, tier: TierState, copy: Copy) -> None:
        """This copy may not go, and so may none that it hangs on."""
        above: Copy | None = copy
        while above is not None and above.ranked:
            above.ranked = False
            tier.policy.on_remove(above.block)
            above = above.above
            if above is not None:
                above.pins += 1

    def _place(self, tier: TierState, copy: Copy) -> None:
        copy.block.copies[tier.name] = copy
        self._link(tier, copy)

    def _link(self, tier: TierState, copy: Copy) -> None:
        """Hang a new copy, which may not go yet, on its parent's."""
        parent = copy.block.parent
        above = parent.copies.get(tier.name) if parent is not None else None
        if above is not None:
            copy.above = above
            above.pins += 1
            self._pin(tier, above)

    def _discard(self, tier: TierState, copy: Copy, now: float) -> None:
        """Drop a copy whose bytes are no good. Copies that hang on it stay, out of reach, until they are evicted."""
        self._drop(tier, copy)
        if copy.above is not None:
            self._unpin(tier, copy.above, now)

    def _drop(self, tier: TierState, copy: Copy) -> None:
        """Forget one copy and free its frame; the block leaves the index with its last copy."""
        block = copy.block
        assert not copy.readers, "a copy is not dropped while it is read"
        del block.copies[tier.name]
        if copy.ranked:
            copy.ranked = False
            tier.policy.on_remove(block)
        elif copy.above is not None:
            copy.above.pins -= 1
        tier.pool.give_back([copy.frame])
        if not block.copies:
            assert block.hash is not None, "only sealed blocks are dropped"
            del self.index[block.hash]

    # --- frames ------------------------------------------------------------------------------------------------------

    def _take(self, tier: TierState, count: int) -> list[FrameId] | None:
        """`count` frames, evicting where needed; None, and nothing changed, when that many cannot be had."""
        short = count - tier.pool.free
        if short > 0:
            if short > len(tier.policy):
                return None
            for block in list(islice(tier.policy.victims(), short)):
                self._drop(tier, block.copies[tier.name])
            tier.evicted_blocks += short
        return tier.pool.take(count)

    # --- spilling ----------------------------------------------------------------------------------------------------

    def _spill(self, block: Block, planned: list[Transfer], now: float) -> None:
        """Plan the copy of one sealed block to the lower tier, unless that would be no use or there is no room."""
        assert self.lower is not None
        source = block.copies.get(DEVICE)
        if source is None or not source.ready or self.lower.name in block.copies:
            return
        above = block.parent.copies.get(self.lower.name) if block.parent is not None else None
        if block.parent is not None and above is None:
            return  # unreachable down there without its parent
        if above is not None:
            self._pin(self.lower, above)  # the room must not come from the parent itself
        frames = self._take(self.lower, 1)
        if frames is not None:
            source.readers += 1
            self._pin(self.device, source)
            self._place(self.lower, Copy(block, frames[0], ready=False))
            planned.append(self._start(block, (DEVICE, source.frame), (self.lower.name, frames[0]), now))
        elif above is not None:
            self._unpin(self.lower, above, now)

    def _start(
        self, block: Block, source: tuple[TierName, FrameId], target: tuple[TierName, FrameId], now: float
    ) -> Transfer:
        assert block.hash is not None, "only sealed blocks travel"
        self._next_transfer += 1
        transfer = Transfer(self._next_transfer, block.hash, source, target, now)
        self.in_flight[transfer.id] = (transfer, block)
        return transfer
