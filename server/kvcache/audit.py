"""The invariants of the KV manager, each one function that raises InvariantViolation. Reads all, changes nothing.

`check` costs O(frames of the tiers): it runs after every rule of the property machine, at the end of every simulation,
and in the daemon when it goes idle.
"""

from __future__ import annotations

from collections import Counter

from server.kvcache.block import Stage
from server.kvcache.books import NOWHERE, TierBooks
from server.kvcache.manager import KVManager
from server.kvcache.shares import NOBODY, RESERVED, Shares
from server.types import BlockHash, FrameId


class InvariantViolation(AssertionError):
    """The books do not add up: admission must stop and the process must end. Never clamp."""


def _require(fact: bool, message: str) -> None:
    if not fact:
        raise InvariantViolation(message)


def frames_add_up(kv: KVManager) -> None:
    """Per tier, free, filed and private frames are disjoint and are all there are; private ones are some lease's."""
    private = {frame for lease in kv.leases for frame in lease.table.view()[lease.sealed :].tolist()}
    for books in kv.levels:
        filed, free = list(books.find.values()), books.pool.free_frames()
        owned = len(filed) + (len(private) if books is kv.device else 0)
        _require(len(set(filed)) == len(filed), f"{books.name}: a frame is filed twice")
        _require(not free & set(filed), f"{books.name}: a free frame is filed")
        if books is kv.device:
            _require(not private & free, "device: a private frame is free")
            _require(not private & set(filed), "device: a private frame is shared")
        total = owned + len(free) + books.pool.unusable()
        _require(total == books.pool.capacity, f"{books.name}: {books.pool.capacity} frames, {owned} owned, "
                 f"{len(free)} free, {books.pool.unusable()} withheld")  # fmt: skip
        for value, frame in books.find.items():
            _require(books.hashes[frame] == value, f"{books.name}: a block is filed under another hash")
        _require(books.origin.keys() <= set(books.find.values()), f"{books.name}: an origin of a block that is gone")
        _require(books.lives.early <= set(books.find.values()), f"{books.name}: fetched early, and not there")
        _require(books.lives.came_s.keys() <= books.find.keys(), f"{books.name}: follows a block that is gone")


def holds_add_up(kv: KVManager) -> None:
    """Every hold has its holder: a lease, a load, or a transfer; what is not ready is being filled or given up."""
    held: Counter[tuple[str, FrameId]] = Counter()
    device = kv.device.name
    for lease in kv.leases:
        _require(not lease.released, "a released lease is still live")
        held.update((device, frame) for frame in lease.table.view().tolist())
        held.update((device, frame) for frame, _ in lease.tail.values())
    for load in kv.traffic.loads.values():
        books = kv.levels[load.level]
        _require(load.hash in books.find, f"{books.name}: a load's block is not where it is loaded from")
        held[(books.name, books.find[load.hash])] += 1
    for flight in kv.traffic.in_flight.values():
        held[flight.transfer.target] += 1
        if flight.load is None:
            held[flight.transfer.source] += 1
    for books in kv.levels:
        for frame in range(books.pool.capacity):
            expected = held[(books.name, frame)]
            found = books.holds[frame]
            _require(found == expected, f"{books.name}: frame {frame} counts {found} holds, {expected} are known")
            if books.hashes[frame] is not None and not books.ready[frame]:
                _require(expected > 0, f"{books.name}: frame {frame} is not ready and nobody fills it")


def leases_are_sound(kv: KVManager) -> None:
    """A lease's sealed part is filed under its own chain, and what it waits for is beyond its table."""
    for lease in kv.leases:
        frames = lease.table.view().tolist()
        _require(lease.sealed <= len(frames), "more blocks are sealed than there are")
        for position in range(lease.sealed):
            value = kv.device.hashes[frames[position]]
            _require(value is not None and bool(kv.device.ready[frames[position]]), "a sealed block is not ready")
            _require(position >= len(lease.hashes) or value == lease.hashes[position], "a lease holds a foreign block")
        for frame in frames[lease.sealed :]:
            _require(kv.device.hashes[frame] is None, "an unsealed block is shared")
        for position, (frame, _) in lease.tail.items():
            _require(position >= len(frames), "a block came that the table has already")
            _require(kv.device.hashes[frame] == lease.hashes[position], "a foreign block came")
        for position, load in lease.loads.items():
            _require(position >= len(frames), "a block is waited for that the table has already")
            _require(lease in load.leases and load.hash == lease.hashes[position], "a lease waits for a foreign load")
        _require(not lease.loads.keys() & lease.tail.keys(), "a block that came is waited for")


def flights_are_sound(kv: KVManager) -> None:
    """A transfer's target is filed, its own, and not ready; hops are within their limits; loads are where they say."""
    traffic = kv.traffic
    for flight in traffic.in_flight.values():
        name, frame = flight.transfer.target
        books = kv.tiers[name]
        _require(books.find.get(flight.transfer.hash) == frame, f"{name}: a transfer's target changed hands")
        _require(not books.ready[frame], f"{name}: a transfer's target is ready before it landed")
    for hop, queue in enumerate(traffic.hops):
        up = sum(f.hop == hop and f.load is not None for f in traffic.in_flight.values())
        down = sum(f.hop == hop and f.load is None for f in traffic.in_flight.values())
        _require(up == kv.planner.up[hop].in_flight <= queue.limit, f"hop {hop}: loads in flight")
        _require(down == kv.planner.down[hop].in_flight <= queue.limit, f"hop {hop}: spills in flight")
    flying = {id(flight.load) for flight in traffic.in_flight.values() if flight.load is not None}
    for value, load in traffic.loads.items():
        _require(value == load.hash and load.stage is not Stage.OVER, "a load that is over is still known")
        _require(
            (load.stage is Stage.FLYING) == (id(load) in flying), "a load flies without a transfer, or the reverse"
        )
        _require(all(load.depth in lease.loads for lease in load.leases), "a load has a lease that does not wait")
    early = sum(load.early_goal is not None for load in traffic.loads.values())
    _require(early == traffic.early_blocks, f"{traffic.early_blocks} prefetches counted, {early} are there")


def _links(books: TierBooks) -> None:
    pins: Counter[FrameId] = Counter()
    kids: Counter[FrameId] = Counter()
    for frame in books.find.values():
        above = books.above[frame]
        if above != NOWHERE:
            known = books.parents[frame]  # recovered blocks know it by `above` alone
            _require(known in (None, books.hashes[above]), f"{books.name}: a block hangs on a stranger")
            kids[above] += 1
            if not books.ranked[frame]:
                pins[above] += 1
    for frame in range(books.pool.capacity):
        _require(books.pins[frame] == pins[frame],
                 f"{books.name}: {books.pins[frame]} pins counted, {pins[frame]} are there")  # fmt: skip
        _require(books.kids[frame] == kids[frame],
                 f"{books.name}: {books.kids[frame]} children counted, {kids[frame]} are there")  # fmt: skip


def suffix_first(kv: KVManager) -> None:
    """Each policy ranks exactly what may go, but for what a floor keeps, and yields children before parents; pins are
    counted right."""
    for books in kv.levels:
        victims, ranked = list(books.policy.victims()), list(books.idle())
        _require(len(ranked) == len(set(ranked)), f"{books.name}: a block is ranked twice")
        _require(len(victims) == len(books.policy), f"{books.name}: the policy's books differ")
        fit = {frame for frame in books.find.values() if books.may_go(frame)}
        _require(set(ranked) == fit, f"{books.name}: {len(fit)} blocks may go, {len(ranked)} are ranked")
        _require(fit == {f for f in books.find.values() if books.ranked[f]}, f"{books.name}: ranks are off")
        _links(books)
        yielded: set[FrameId] = set()
        for frame in ranked:
            _require(books.above[frame] not in yielded, f"{books.name}: the policy yields a parent before its child")
            yielded.add(frame)


def shares_are_kept(kv: KVManager) -> None:
    """A chain has one owner, in all tiers; blocks are counted right; floors keep exactly what they should."""
    owners: dict[BlockHash, int] = {}
    for books in kv.levels:
        if books.shares is None:
            continue
        counted: Counter[int] = Counter()
        for value, frame in books.find.items():
            owner = books.owner_of(frame)
            counted[owner] += 1
            _require(owners.setdefault(value, owner) == owner, f"{books.name}: a block has two owners")
            above = books.above[frame]
            _require(above == NOWHERE or books.owner_of(above) == owner, f"{books.name}: a chain has two owners")
        _require(counted == books.shares.owned, f"{books.name}: {books.shares.owned} owned, {counted} are there")
        _floors(books, books.shares)


def _floors(books: TierBooks, shares: Shares) -> None:
    reserved = list(shares.reserved())
    marked = {frame for frame in books.find.values() if books.ranked[frame] == RESERVED}
    _require(marked == set(reserved), f"{books.name}: {len(marked)} blocks are marked as reserved, {len(reserved)} are")
    kept = Counter(books.owner_of(frame) for frame in reserved)
    for owner in kept.keys() | shares.owned.keys():
        _require(kept[owner] == shares.due(owner), f"{books.name}: {kept[owner]} blocks of {owner} are reserved, "
                 f"{shares.due(owner)} are due")  # fmt: skip
    _require(not kept[NOBODY], f"{books.name}: nobody has a floor")


INVARIANTS = (frames_add_up, holds_add_up, leases_are_sound, flights_are_sound, suffix_first, shares_are_kept)


def check(kv: KVManager) -> None:
    """Raise InvariantViolation at the first invariant that does not hold."""
    for invariant in INVARIANTS:
        invariant(kv)
