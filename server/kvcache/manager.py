"""KVManager: which block is where, who holds it, what is loaded and what is computed. The face of the cache.

Synchronous, deterministic, loop thread only: no I/O, no clock (`now` is passed in), no bytes. It decides; a mover moves
and reports back through `complete`. Costs: `grow` and `seal` are O(new blocks), `admit` and `release` O(blocks of the
request), `plan_transfers` and `complete` O(what moves), and nothing is O(blocks of the cache).

How a sealed block travels: sealed on the device -> spilled in the background to the tiers below -> dropped from the
device when its frame is wanted (no copy at that moment) -> loaded when a request matches it again, as far as that beats
computing it. A preempted request, a parked session and a restarted daemon are all the same: blocks below, a later
match.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

from server.kvcache.accounts import Accounts
from server.kvcache.admission import Admission
from server.kvcache.block import LATE_ALREADY, OVER, Lease, Over, UsedChain
from server.kvcache.books import NOWHERE, TierBooks
from server.kvcache.hashing import chain_root
from server.kvcache.planner import Planner, WriteBudget
from server.kvcache.reuse import ANSWER, BATCH, ReuseModel, kind_of
from server.kvcache.shares import NOBODY, Owners
from server.kvcache.tiers.base import Recovered
from server.kvcache.traffic import Traffic
from server.types import DEVICE, BlockHash, BlockLayout, CacheLimit, FrameId, Note, TierFault, TierName, Transfer

FIRST_GUESS = (0.001, 0.001)
"""Seconds per block and latency of a hop that nobody measured yet."""
SPILL_PACE_S = 0.4
"""Spills wait this long for others: together they cost the loop a tenth of what each alone does, and nobody waits for
them. Under a load of short device hits, 0.1 s cost 4 % of TTFT, 0.4 s nothing."""
SPILL_GRACE_S = 0.2
"""Those that are due wait at most this long while a prompt is computed: somebody waits for its first token."""
ALL = 1 << 40
"""More blocks than any request has."""


@dataclass(frozen=True, slots=True)
class TierSpec:
    """One tier as the manager sees it: a name, a number of frames, the name of an eviction policy.

    `in_flight_max`: blocks moving at once, per direction, between this tier and the one above.
    """

    name: TierName
    frames: int
    eviction: str = "lru"
    in_flight_max: int = 8


class KVManager:
    def __init__(
        self,
        layout: BlockLayout,
        tiers: Sequence[TierSpec],
        fingerprint: bytes,
        *,
        guesses: Sequence[tuple[float, float]] | None = None,
        write_bytes_per_day: float = 0.0,
        write_share: float = 1.0,
        pin_ratio: float = 0.25,
        wall_offset_s: float = 0.0,
        spill_pace_s: float = SPILL_PACE_S,
        reuse: ReuseModel | None = None,
        shared: bool = False,
    ) -> None:
        """`tiers` from fastest to slowest, the first is the device. `guesses[k]` are seconds per block and latency from
        tier k+1 to tier k until they were measured. `wall_offset_s`: Unix time minus `now`, for what outlives us.
        `reuse`: what is known of when blocks are used again; nothing yet by default. `shared`: tenants may have limits,
        see `share`."""
        assert tiers[0].name == DEVICE, f"the first tier is the device, not {tiers[0].name!r}"
        self.layout = layout
        self.reuse = reuse or ReuseModel()
        self.owners = Owners()
        self.levels = [TierBooks(tier.name, tier.frames, tier.eviction, self.reuse, shared=shared) for tier in tiers]
        self.tiers = {books.name: books for books in self.levels}
        self.device = self.levels[0]
        hops = len(tiers) - 1
        self.planner = Planner([t.name for t in tiers], layout.block_tokens, list(guesses or [FIRST_GUESS] * hops))
        self.traffic = Traffic(
            self.levels,
            [tier.in_flight_max for tier in tiers[1:]],
            self.planner,
            Admission(write_share, WriteBudget(write_bytes_per_day), layout.block_bytes),
            spill_pace_s,
            self.owners,
        )
        self.accounts = Accounts(self.levels, self.planner.step, layout.block_tokens)
        self.leases: set[Lease] = set()
        self.wake_s = float("inf")
        """When somebody must look again although nothing happened: a load is late by then."""
        self.declined: Counter[tuple[TierName, str]] = Counter(
            {(b.name, reason): 0 for b in self.levels[1:] for reason in ("slower_than_recompute", "disabled")}
        )
        self.pin_blocks_max = int(pin_ratio * self.levels[-1].pool.capacity)
        self.recovered_blocks = 0
        self._used_chains: list[UsedChain] = []
        self._wall_offset_s = wall_offset_s
        self._fingerprint = fingerprint
        self._expiries: list[tuple[float, BlockHash]] = []
        self._pin_sizes: dict[BlockHash, int] = {}

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
        return self.traffic.moving

    def stalled_by(self) -> str:
        """Why nobody can run although there are requests: loads, frames for them, or spills that still hold frames."""
        lacking = next((k for k, hop in enumerate(self.traffic.hops) if hop.starved), None)
        if lacking is not None:
            return "host_pool_full" if lacking else "no_free_blocks"
        return "kv_restore" if self.traffic.loads else "spill_backpressure"

    def knows(self, value: BlockHash) -> bool:
        """Is this block anywhere?"""
        return any(value in books.find for books in self.levels)

    def would_load(self, hashes: Sequence[BlockHash]) -> bool:
        """Is the first of these blocks that is not on the device to be had from below?"""
        if len(self.levels) == 1:
            return False
        missing = next((value for value in hashes if not self.device.has(value)), None)
        return missing is not None and self.traffic.level_of(missing) is not None

    def share(self, limits: Mapping[str, Mapping[TierName, CacheLimit]]) -> None:
        """These are the tenants from now on, and what each may hold and keep of each tier; floors leave room in every
        tier, and in the device for any request. What others had, they keep until it goes. Needs `shared`."""
        for tenant in limits:
            self.owners.register(tenant)
        for books in self.levels:
            assert books.shares is not None, "tenants share a cache that was made for it"
            books.shares.set_limits(
                {self.owners.number(who): tiers[books.name] for who, tiers in limits.items() if books.name in tiers}
            )

    def admit(self, hashes: Sequence[BlockHash], now: float, *, floor_s: float = 0.0, tenant: str = "") -> Lease:
        """Lease the longest known prefix of `hashes` that is on the device or worth loading, and send for the latter.

        Then `join` puts into the table what came, and `compute_until` says how far to compute meanwhile. `floor_s`: how
        long the step takes that is run before anything that was sent for can be used. `tenant`: whose request it is,
        and so whose all blocks of its chain are. Call `release` exactly once.
        """
        self.reuse.now_s = now
        device = self.device
        # A tenant that has no limits yet may get some: what it has is its own from the start.
        lease = Lease(owner=NOBODY if device.shares is None else self.owners.register(tenant), since_s=now)
        self.leases.add(lease)
        frames = []
        for value in hashes:
            if not device.has(value):
                break
            frame = device.find[value]
            device.hold(frame)
            frames.append(frame)
        lease.table.extend(frames)
        lease.sealed = len(frames)
        lease.hashes = hashes[: len(frames)]
        if device.origin:
            lease.found([device.origin_of(frame) for frame in frames], 0)
        else:
            lease.gain(DEVICE, 0, len(frames))
        if len(frames) < len(hashes) and len(self.levels) > 1:
            self._send_for(lease, hashes, now, floor_s)
        return lease

    def _send_for(self, lease: Lease, hashes: Sequence[BlockHash], now: float, floor_s: float) -> None:
        """Match on below the device, and want what is worth it, the last block first."""
        start = len(lease.table)
        found = self._levels_of(hashes, start)
        levels, probed, declined = self._worth_loading(found, len(lease.table), now, floor_s)
        if declined is not None:
            lease.missed[declined] = len(found) - len(levels)
        lease.hashes = hashes[: start + len(levels)]
        for position in probed:
            self.traffic.load_early(hashes, start + position, found[position] - 1)
        queued = self.traffic.queued()
        lease.decided = self.planner.decided(found, len(levels), start, queued, declined or "")
        longest_s = max((self.planner.load_s(k, n, queued) for k, n in Counter(levels).items() if k), default=0.0)
        deadline_s = now + self.planner.deadline_s(longest_s)
        for position in range(start + len(levels) - 1, start - 1, -1):
            value = hashes[position]
            if self.device.has(value):
                frame = self.device.find[value]
                self.device.hold(frame)
                lease.tail[position] = (frame, self.device.origin_of(frame))
            else:
                self.traffic.want(lease, hashes, position, deadline_s)

    def price(self, lease: Lease, tokens: int, queued: list[int]) -> tuple[float, int]:
        """What it would cost to take the device from a lease of `tokens` computed tokens: seconds until all is back,
        by loading or computing, and how many frames that gives. O(log blocks): what others hold too is a prefix."""
        table, holds, size = lease.table, self.device.holds, self.layout.block_tokens
        shared = bisect_left(range(lease.sealed), True, key=lambda place: holds[table[place]] == 1)
        frames = len(table) - shared
        seconds = self.planner.step.tokens_s(shared * size, tokens - shared * size)
        below = self.level_below(lease) if lease.sealed > shared else None
        if below is not None:
            rest = self.planner.step.tokens_s(lease.sealed * size, tokens - lease.sealed * size)
            seconds = min(seconds, self.planner.load_s(below, lease.sealed - shared, queued) + rest)
        return seconds, frames

    def level_below(self, lease: Lease) -> int | None:
        """The fastest level below the device that has the last block which `lease` shares; None: there is none."""
        if len(self.levels) == 1 or not lease.sealed:
            return None
        value = self.device.hashes[lease.table[lease.sealed - 1]]
        return next((k for k in range(1, len(self.levels)) if value in self.levels[k].find), None)

    def _levels_of(self, hashes: Sequence[BlockHash], start: int) -> list[int]:
        """Where each block from `start` on is, until one is nowhere."""
        levels = []
        for value in islice(hashes, start, None):
            level = self.traffic.level_of(value)
            if level is None:
                break
            levels.append(level)
        return levels

    def _worth_loading(
        self, levels: list[int], above: int, now: float, floor_s: float
    ) -> tuple[list[int], range, str | None]:
        """`levels`, of blocks that follow `above` others, up to the first run of blocks whose tier is off or too slow
        for them; which blocks of that run to load all the same, to learn whether it is still too slow; and which of
        both it is, if either."""
        queued = self.traffic.queued()
        start = 0
        while start < len(levels):
            level, end = levels[start], start
            while end < len(levels) and levels[end] == level:
                end += 1
            if level:
                name = self.levels[level].name
                reason = None
                if not self.planner.breakers[name].allows(now):
                    reason = "disabled"
                elif not self.planner.worth(level, above + start, end - start, queued, floor_s):
                    reason = "slower_than_recompute"
                if reason is not None:
                    probed = 0 if reason == "disabled" else self.planner.probe(level, end - start, now)
                    self.declined[(name, reason)] += len(levels) - start - probed
                    return levels[:start], range(end - probed, end), reason
            start = end
        return levels, range(0), None

    def join(self, lease: Lease) -> int:
        """Append to the table what it has reached: blocks that came from below or that somebody else computed. The
        table must hold finished blocks only. Returns how many."""
        assert lease.sealed == len(lease.table), "a table with private blocks is joined"
        device, table, before = self.device, lease.table, len(lease.table)
        origins = []
        while len(table) < len(lease.hashes):
            position = len(table)
            came = lease.tail.pop(position, None)
            if came is None:
                value = lease.hashes[position]
                if not device.has(value):
                    break
                frame = device.find[value]
                came = (frame, device.origin_of(frame))
                device.hold(frame)
                if position in lease.loads:
                    self.traffic.leave(lease, position)
            frame, origin = came
            if position and device.above[frame] == NOWHERE:
                device.hang(frame, table[position - 1])
            table.extend((frame,))
            origins.append(origin)
        lease.found(origins, before)
        lease.sealed = len(table)
        if lease.sealed > before:
            lease.late_s = None
        return lease.sealed - before

    def compute_until(self, lease: Lease, now: float, *, floor_s: float = 0.0) -> int:
        """Up to which block the request may compute now. Equal to the table's length: it should wait for its loads;
        then `wake_s` is no later than the moment at which it should not any more."""
        front, end = len(lease.table), len(lease.hashes)
        if lease.sealed < front:  # its last block is on its way up for somebody else: do without what came behind it
            return front + 1
        load = lease.loads.get(front)
        stop = front
        if load is None:  # nobody brings this block: compute up to one that is here or on its way
            while stop < end and stop not in lease.loads and stop not in lease.tail:
                stop += 1
            return stop if stop < end else ALL
        while stop < end and (other := lease.loads.get(stop)) is not None and other.level == load.level:
            stop += 1
        blocks, queued = stop - front, self.traffic.queued(lease)
        if lease.late_s is None or lease.waits_level != load.level:  # a hop further up is progress too
            lease.waits_since_s, lease.waits_level, lease.waits_for = now, load.level, load.origin
            estimate_s = self.planner.load_s(load.level, blocks, queued)
            lease.late_s = now + self.planner.patience_s(estimate_s, front, blocks)
        if now >= lease.late_s:
            self._late(lease, load.level, blocks, now)
            return stop if stop < end else ALL
        share = self.planner.front(load.level, front, blocks, queued, floor_s)
        if not share:
            self.wake_s = min(self.wake_s, lease.late_s)
        return front + share if front + share < end else ALL

    def _late(self, lease: Lease, level: int, blocks: int, now: float) -> None:
        """A promise was not kept: count it against the tier, once per wait. Any landing clears the tier's name."""
        if lease.late_s != LATE_ALREADY:
            assert lease.late_s is not None, "who is late was promised something"
            self.planner.up[level - 1].late(lease.late_s - lease.waits_since_s, blocks)
            lease.late_s = LATE_ALREADY
            self.planner.breakers[self.levels[level].name].failed(now)

    def grow(self, lease: Lease, tokens: int) -> bool:
        """Make room for `tokens` tokens in all; False, and nothing changed, when the device cannot hold them."""
        start = len(lease.table)
        if (wanted := self.layout.blocks_for(tokens) - start) <= 0:
            return True
        frames = self.device.take(wanted)
        if frames is None:
            return False
        for frame in frames:
            self.device.ready[frame] = 1
        lease.table.extend(frames)
        for position in range(start, min(start + wanted, len(lease.hashes))):
            lease.miss(position)
            if position in lease.loads:
                self.traffic.leave(lease, position)
            elif position in lease.tail:
                self.device.unhold(lease.tail.pop(position)[0])
        return True

    def seal(self, lease: Lease, hashes: Sequence[BlockHash], full: int, *, in_step: bool = False) -> None:
        """The first `full` blocks of `lease` are computed: name them by `hashes` and share them. `in_step`: a step
        reads the table as it is, so no block is exchanged."""
        device = self.device
        for position in range(lease.sealed, full):
            value, frame = hashes[position], lease.table[position]
            twin = device.find.get(value)
            if twin is None:
                parent = hashes[position - 1] if position else None
                hits = int(lease.retention.session)
                device.file(frame, value, parent, position, ready=True, hits=hits, owner=lease.owner)
                device.transient[frame] = lease.retention.transient
                self.traffic.spill(value)
            elif device.ready[twin] and not in_step:  # somebody else was first: hold theirs, give ours up
                device.hold(twin)
                device.give_back((frame,))
                lease.table.replace(position, twin)
            else:
                return  # theirs is on its way up, or ours is being read: sealing is tried again at the next block
            lease.sealed = position + 1

    def asked(self, hashes: Sequence[BlockHash], now: float) -> None:
        """A request arrived that could use these blocks."""
        self.reuse.asked(hashes, now)
        self.accounts.asked(hashes, now)

    def expect(self, hashes: Sequence[BlockHash]) -> int:
        """A request has to wait that will use these blocks: they should be the last to go. The number it returns goes
        to `expected_no_more`."""
        number = self.reuse.expect(hashes)
        for books in self.levels:
            tip = next((frame for value in reversed(hashes) if (frame := books.find.get(value)) is not None), None)
            if tip is not None and books.ranked[tip]:
                books.policy.on_changed(tip)
        return number

    def expected_no_more(self, hashes: Sequence[BlockHash], number: int) -> None:
        """The request of `expect` runs now, or was given up."""
        self.reuse.served(hashes, number)

    def release(self, lease: Lease, *, over: Over | None = OVER) -> None:
        """Let go of every block: shared ones stay cached until evicted, private ones are freed at once. `over`: what
        the request was like; None: it is not over, and will be back."""
        assert not lease.released, "a lease is released exactly once"
        lease.released = True
        self.leases.remove(lease)
        for position in list(lease.loads):
            self.traffic.leave(lease, position)
        device, frames = self.device, lease.table.view().tolist()
        if over is not None:
            self._note_use(lease, frames[: lease.sealed], over)
        device.give_back(frames[lease.sealed :])
        for position in sorted(lease.tail, reverse=True):
            device.unhold(lease.tail[position][0])
        for frame in reversed(frames[: lease.sealed]):
            device.unhold(frame)

    def _note_use(self, lease: Lease, frames: Sequence[FrameId], over: Over) -> None:
        """A request ends: its blocks are of its kind from now on, here at once and in the tiers below soon."""
        device, now, size = self.device, self.reuse.now_s, self.layout.block_tokens
        asked = len(frames) if over.prompt_tokens is None else min(len(frames), over.prompt_tokens // size)
        kind = kind_of(max(0, asked - lease.served.total()) * size, over.answered_tokens)
        kinds = [kind] * asked + [ANSWER] * (len(frames) - asked)
        if over.background:  # what it found is others' and stays theirs
            found = min(len(frames), len(lease.hashes))
            kinds = [device.kind[frame] for frame in frames[:found]] + [BATCH] * (len(frames) - found)
        for frame, its_kind in zip(frames, kinds, strict=True):
            device.kind[frame], device.used_s[frame] = its_kind, now
        for frame in frames[: len(lease.hashes)]:
            device.hits[frame] += 1
        values = [value for frame in frames if (value := device.hashes[frame]) is not None]
        assert len(values) == len(frames), "what is sealed has a name"
        chain = UsedChain(values, [device.hits[frame] for frame in frames], kinds, lease.retention.transient)
        self.reuse.left(values, chain.hits, kinds)
        if len(self.levels) > 1:
            self._used_chains.append(chain)

    def _catch_up(self) -> None:
        """What nobody waits for: a chain that was released is recent in the tiers below, too."""
        for chain in self._used_chains:
            self._used(chain)
        self._used_chains.clear()

    def _used(self, chain: UsedChain) -> None:
        """This chain was just used: it is recent in every tier, and what lacks a copy below is spilled again."""
        values = chain.values
        for level, (above, books) in enumerate(pairwise(self.levels)):
            books.refresh(values, chain.hits, chain.kinds)
            for value in values:
                if not chain.transient and value in above.find:
                    above.transient[above.find[value]] = 0
                if value not in books.find and value in above.find:
                    self.traffic.spill(value, level)
        if len(self.levels) > 2:
            bottom = self.levels[-1]
            tip = next((value for value in reversed(values) if bottom.has(value)), None)
            if tip is not None:
                self.traffic.notes.append(Note("touch", tip, bottom.find[tip]))

    # --- transfers ---------------------------------------------------------------------------------------------------

    def prefetch(self, hashes: Sequence[BlockHash], *, soon: bool = False) -> None:
        """A request for this chain was received: what is below DRAM starts to come up to DRAM, or, if the request is
        scheduled as `soon` as that is possible, all to the device; and nothing of it is old."""
        goal = 0 if soon else 1
        if len(self.levels) < 2 + goal:
            return
        start = next((i for i, value in enumerate(hashes) if not self.device.has(value)), len(hashes))
        levels = self._levels_of(hashes, start)
        if not levels:
            return
        self.levels[1].refresh(hashes[: start + len(levels)])
        slowest = max(levels)
        if slowest <= goal or not self.planner.breakers[self.levels[slowest].name].closed:
            return
        if self.planner.worth(slowest, start, levels.count(slowest), self.traffic.queued(), 0.0):
            self.traffic.prefetch(hashes, start, goal)

    def plan_transfers(self, now: float, *, prefilling: bool = False) -> list[Transfer]:
        """Transfers to start now: loads first, a request waits for them; then spills, nobody does, and while a prompt
        is computed they are put off for a moment."""
        self.reuse.now_s = now
        self._catch_up()
        self.traffic.put_off_spills(SPILL_GRACE_S * prefilling)
        while self._expiries and self._expiries[0][0] <= now:
            self._expire_pin(heapq.heappop(self._expiries)[1], now)
        planned = self.traffic.plan(now)
        self.wake_s = min(self.wake_s, self.traffic.wake_s)
        return planned

    def recover(self, found: Recovered) -> None:
        """Take over what the lowest tier still holds. Once, before anything else."""
        bottom = self.levels[-1]
        owners = {self.owners.register(tenant): frames for tenant, frames in found.owners.items()}
        bottom.recover(found.frames, found.hashes, found.above, found.depths, owners)
        self.recovered_blocks = len(found.frames)
        for tip, until_unix_s in found.pins.items():
            if bottom.has(tip):
                until_s = until_unix_s - self._wall_offset_s
                self.traffic.kept[tip] = until_s
                self._pin_sizes[tip] = bottom.depth[bottom.find[tip]] + 1
                heapq.heappush(self._expiries, (until_s, tip))
                bottom.keep(tip)

    def take_notes(self) -> list[Note]:
        """What the lowest tier should remember, since the last call."""
        notes, self.traffic.notes = self.traffic.notes, []
        return notes

    def flush(self) -> None:
        """Spill all that has no copy below, oldest first, so that parents go before their children; fetch no more."""
        self._catch_up()
        self.traffic.end_early()
        for level, below in enumerate(self.levels[1:]):
            for value in self.levels[level].find:
                if value not in below.find:
                    self.traffic.spill(value, level)

    @property
    def more_to_plan(self) -> bool:
        """The last `plan_transfers` stopped for the others' sake: call it again as soon as they had their turn."""
        return self.traffic.cut_short

    @property
    def busy(self) -> bool:
        """Blocks move, or could if transfers were planned now. Spills that have no room to go to do not count."""
        return bool(self._used_chains) or self.traffic.moving or self.traffic.spill_s != float("inf")

    @property
    def frames_total(self) -> int:
        return sum(books.pool.capacity for books in self.levels)

    def complete(self, transfer_id: int, fault: TierFault | None, now: float) -> None:
        """The mover's report: no byte of this transfer moves any more. A faulty target is never used."""
        self.traffic.complete(transfer_id, fault, now)

    # --- what an operator asks ---------------------------------------------------------------------------------------

    def pin(self, hashes: Sequence[BlockHash], until_s: float, now: float) -> int:
        """Keep the known prefix of `hashes` in the lowest tier until `until_s`; how many blocks that are, 0 when the
        share that pins may hold is used up. What is not down there yet is kept from the moment it gets there."""
        known = next((i for i, value in enumerate(hashes) if not self.knows(value)), len(hashes))
        if not known:
            return 0
        tip, kept = hashes[known - 1], self.traffic.kept
        if tip not in kept and self.pinned_blocks + known > self.pin_blocks_max:
            return 0
        kept[tip] = max(until_s, kept.get(tip, 0.0))
        self._pin_sizes[tip] = known
        heapq.heappush(self._expiries, (kept[tip], tip))
        bottom = self.levels[-1]
        if bottom.has(tip):
            bottom.keep(tip)
        else:
            for value in hashes[:known]:
                for level, books in enumerate(self.levels[:-1]):
                    if books.has(value) and value not in self.levels[level + 1].find:
                        self.traffic.spill(value, level)
        self._note_pin(tip, kept[tip])
        return known

    def unpin(self, hashes: Sequence[BlockHash]) -> int:
        """End the pins on this chain; how many there were."""
        tips = [value for value in hashes if value in self.traffic.kept]
        for tip in tips:
            self._forget_pin(tip)
        return len(tips)

    @property
    def pinned_blocks(self) -> int:
        """Blocks that pins hold, a shared beginning counted for each: never too few."""
        return sum(self._pin_sizes.values())

    def _expire_pin(self, tip: BlockHash, now: float) -> None:
        if self.traffic.kept.get(tip, now + 1) <= now:
            self._forget_pin(tip)

    def _forget_pin(self, tip: BlockHash) -> None:
        del self.traffic.kept[tip], self._pin_sizes[tip]
        self.levels[-1].let_go(tip)
        self._note_pin(tip, 0.0)

    def _note_pin(self, tip: BlockHash, until_s: float) -> None:
        frame = self.levels[-1].find.get(tip)
        if len(self.levels) > 2 and frame is not None:
            self.traffic.notes.append(Note("pin", tip, frame, until_s and until_s + self._wall_offset_s))

    def evict(self, hashes: Sequence[BlockHash]) -> int:
        """Drop every copy of these blocks that nobody holds, the last of the chain first; how many blocks are gone."""
        gone = 0
        for value in reversed(hashes):
            known = self.knows(value)
            for books in self.levels:
                frame = books.find.get(value)
                if frame is not None and books.may_go(frame):
                    self._drop(books, frame)
            gone += known and not self.knows(value)
        return gone

    def clear(self) -> int:
        """Drop every copy that nobody holds; how many."""
        count = 0
        for books in self.levels:
            for frame in list(books.idle()):
                self._drop(books, frame)
                count += 1
        return count

    def _drop(self, books: TierBooks, frame: FrameId) -> None:
        value = books.hashes[frame]
        assert value is not None, "only a filed block is dropped"
        if books is self.levels[-1] and len(self.levels) > 2:
            self.traffic.notes.append(Note("drop", value, frame))
        books.drop(frame, "admin")
