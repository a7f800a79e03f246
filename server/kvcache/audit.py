"""The invariants of the KV manager, each one function that raises InvariantViolation. Reads all, changes nothing.

`check` costs O(blocks of the cache): it runs after every rule of the property machine, at the end of every simulation,
and in the daemon when it goes idle.
"""

from __future__ import annotations

from collections import Counter

from server.kvcache.block import Block
from server.kvcache.manager import KVManager, TierState
from server.types import DEVICE, FrameId


class InvariantViolation(AssertionError):
    """The books do not add up: admission must stop and the process must end. Never clamp."""


def _require(fact: bool, message: str) -> None:
    if not fact:
        raise InvariantViolation(message)


def _known_blocks(kv: KVManager) -> set[Block]:
    return set(kv.index.values()) | {block for lease in kv.leases for block in lease.blocks}


def frames_add_up(kv: KVManager) -> None:
    """Per tier, free and owned frames are disjoint and are all there are; each owned frame has one copy."""
    blocks = _known_blocks(kv)
    for name, tier in kv.tiers.items():
        owned: list[FrameId] = [block.copies[name].frame for block in blocks if name in block.copies]
        free = tier.pool.free_frames()
        _require(len(set(owned)) == len(owned), f"{name}: a frame is owned twice")
        _require(not free & set(owned), f"{name}: a free frame is owned")
        _require(len(owned) + len(free) == tier.pool.capacity, f"{name}: {tier.pool.capacity} frames, "
                 f"{len(owned)} owned, {len(free)} free")  # fmt: skip


def residency_holds(kv: KVManager) -> None:
    """An indexed block carries its own hash and has a copy: ready, or on its way from a ready one."""
    for value, block in kv.index.items():
        _require(block.hash == value, "a block is indexed under another hash")
        _require(any(copy.ready for copy in block.copies.values()), "an indexed block has no ready copy")


def leases_match_holders(kv: KVManager) -> None:
    """A block's lease count equals the number of live leases that hold it, and a lease's table its frames."""
    held = Counter(block for lease in kv.leases for block in lease.blocks)
    for block in _known_blocks(kv):
        _require(block.leases == held[block], f"a block counts {block.leases} leases, {held[block]} hold it")
        _require(block.hash is not None or block.leases == 1, "an unsealed block is private to one lease")
    for lease in kv.leases:
        _require(not lease.released, "a released lease is still live")
        if not lease.onboarding:
            frames = [block.copies[DEVICE].frame for block in lease.blocks]
            _require(lease.table.view().tolist() == frames, "a block table differs from the frames of its lease")
        sealed = [block.hash is not None for block in lease.blocks]
        _require(sealed == [i < lease.sealed for i in range(len(sealed))], "sealed blocks are not the lease's prefix")


def flights_are_protected(kv: KVManager) -> None:
    """What a transfer reads or writes is neither evictable, nor free, nor forgotten; readers equal transfers."""
    reading: Counter[tuple[str, FrameId]] = Counter(transfer.source for transfer, _ in kv.in_flight.values())
    queued = [(kv.lower.name, source.frame) for _, source, _ in kv.onboards] if kv.lower else []
    reading.update(queued)
    for transfer, block in kv.in_flight.values():
        target = block.copies.get(transfer.target[0])
        _require(target is not None and target.frame == transfer.target[1], "a transfer's target frame changed hands")
        _require(target is not None and not target.ready, "a transfer's target is ready before it landed")
    for block in _known_blocks(kv):
        for name, copy in block.copies.items():
            expected = reading[(name, copy.frame)]
            _require(copy.readers == expected, f"{name}: {copy.readers} readers counted, {expected} transfers read")
    _require(len(kv.in_flight) <= kv.transfers_max, "more transfers in flight than allowed")


def _rank_is_exact(kv: KVManager, tier: TierState) -> None:
    ranked = list(tier.policy.victims())
    _require(len(ranked) == len(set(ranked)) == len(tier.policy), f"{tier.name}: the policy's books differ")
    for block in ranked:
        copy = block.copies.get(tier.name)
        _require(copy is not None and copy.ranked and copy.ready and not copy.readers and not copy.pins,
                 f"{tier.name}: unfit victim")  # fmt: skip
        _require(tier is not kv.device or not block.leases, "a leased block is evictable")
    evictable = [
        block for block in kv.index.values()
        if (copy := block.copies.get(tier.name)) and copy.ready and not copy.readers and not copy.pins
        and not (tier is kv.device and block.leases)
    ]  # fmt: skip
    _require(len(evictable) == len(ranked), f"{tier.name}: {len(evictable)} evictable, {len(ranked)} ranked")


def suffix_first(kv: KVManager) -> None:
    """Each policy ranks exactly what may go and yields children before parents; a copy's pins are counted right."""
    for name, tier in kv.tiers.items():
        _rank_is_exact(kv, tier)
        pins: Counter[int] = Counter()
        for block in kv.index.values():
            copy = block.copies.get(name)
            if copy is not None and copy.above is not None and not copy.ranked:
                pins[id(copy.above)] += 1
        for block in kv.index.values():
            copy = block.copies.get(name)
            if copy is not None:
                _require(copy.block is block, f"{name}: a copy belongs to another block")
                _require(copy.pins == pins[id(copy)], f"{name}: {copy.pins} pins counted, {pins[id(copy)]} are there")
        yielded: set[int] = set()
        for block in tier.policy.victims():
            copy = block.copies[name]
            _require(id(copy.above) not in yielded, f"{name}: the policy yields a parent before its resident child")
            yielded.add(id(copy))


def quiet_when_idle(kv: KVManager) -> None:
    """No leases: then nothing waits and every owned frame belongs to a sealed block."""
    if not kv.leases:
        _require(not kv.onboards or kv.lower is not None, "an onboard waits without a tier to come from")
        _require(all(block.hash is not None for block in _known_blocks(kv)), "a private block outlived its lease")


INVARIANTS = (
    frames_add_up,
    residency_holds,
    leases_match_holders,
    flights_are_protected,
    suffix_first,
    quiet_when_idle,
)


def check(kv: KVManager) -> None:
    """Raise InvariantViolation at the first invariant that does not hold."""
    for invariant in INVARIANTS:
        invariant(kv)
