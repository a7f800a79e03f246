"""Blocks on the move between tiers: loads up, spills down, at most so many at once. Loop thread only; no bytes, no
clock.

A load is one block on its way to the device (because leases wait for it) or to DRAM (because somebody is expected to
ask), hop by hop; all who want the block share it. A spill is a copy of a block that is ready one level above, made in
the background, parents first, so that what lies below is always the beginning of some chain. Transfers are never
cancelled: who cannot wait any longer leaves the load, and the load ends when its transfer does.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

from server.kvcache.admission import Admission
from server.kvcache.block import Lease, Load, Stage
from server.kvcache.books import TierBooks
from server.kvcache.planner import Planner
from server.kvcache.reuse import class_of
from server.kvcache.shares import Owners
from server.types import BlockHash, FrameId, Note, TierFault, TierName, Transfer

SPILLS_QUEUED_MAX = 65_536
"""Blocks waiting to be spilled over one hop; beyond it the oldest are forgotten, and stay where they are."""
HURRY_SHARE, HURRY_PACE_S = 1 / 64, 0.1
"""When a tier has evicted more than this share of itself since the last spills, or there were more than a hop takes at
once, the next wait no longer than this."""
PLAN_BLOCKS = 128
"""Transfers planned in one go, about a millisecond of the loop's time; then others have their turn."""
NO_SPACE_RETRY_S = 60.0
"""How long a tier that ran out of room for new frames makes do with those it has."""
EARLY_SHARE = 0.5
"""Share of a tier's frames that prefetches which nobody waits for yet may be on their way to; and the share of the
device's frames that must be free or evictable for them: running requests must find room to grow."""


@dataclass(slots=True)
class Flight:
    """A transfer over hop `hop` (between levels `hop` and `hop` + 1), with its load if it goes up."""

    transfer: Transfer
    hop: int
    load: Load | None


@dataclass(slots=True)
class HopQueue:
    """What waits for one hop: urgent loads, early ones (prefetches), and spills by hash, oldest first."""

    limit: int
    urgent: deque[Load] = field(default_factory=deque)
    early: deque[Load] = field(default_factory=deque)
    spills: OrderedDict[BlockHash, None] = field(default_factory=OrderedDict)
    retry_s: float | None = None
    outcomes: Counter[str] = field(
        default_factory=lambda: Counter(dict.fromkeys(("admit", "reject_cold", "reject_wear", "no_room"), 0))
    )
    """Of blocks that came down here."""
    starved: bool = False
    """A load that somebody waits for found no frame above, when last tried."""

    def next_load(self, hop: int) -> Load | None:
        """The next load that still waits here, urgent ones first; it is taken out of the queue."""
        for queue in (self.urgent, self.early):
            while queue:
                load = queue.popleft()
                here = load.stage is Stage.QUEUED and load.level == hop + 1
                if here and (queue is self.urgent or load.early_goal is not None):
                    return load
        return None


class Traffic:
    def __init__(
        self,
        levels: Sequence[TierBooks],
        limits: Sequence[int],
        planner: Planner,
        admission: Admission,
        spill_pace_s: float,
        owners: Owners,
    ) -> None:
        """`limits[k]`: blocks in flight at once, per direction, between levels k and k+1. `admission` is for writes to
        the lowest of three levels."""
        self.levels = levels
        self.planner = planner
        self.hops = [HopQueue(limit) for limit in limits]
        self.loads: dict[BlockHash, Load] = {}
        self.in_flight: dict[int, Flight] = {}
        self.notes: list[Note] = []
        self.kept: dict[BlockHash, float] = {}
        """Blocks that the lowest tier must keep, and until when."""
        self.early_blocks = 0
        self.prefetched = {"late": 0, "cancelled": 0}
        """Early loads that somebody came to wait for, and those that came to nothing."""
        self.cut_short = False
        """The last plan would have had more transfers but for PLAN_BLOCKS."""
        self._spill_pace_s = spill_pace_s
        self._spill_grace_s = 0.0
        self._spill_due = False
        self._due_since_s: float | None = None
        self._retry_s = inf
        self._evicted_before = [0] * len(limits)
        self._backlog = False
        self._admission = admission
        self._owners = owners
        self._deadlines: list[tuple[float, int, Load]] = []
        self._next_id = 0
        self._now_s = 0.0

    @property
    def moving(self) -> bool:
        """Something is in flight or about to be, other than spills that wait."""
        return bool(self.in_flight or self.loads)

    @property
    def spilling(self) -> bool:
        """There are blocks to spill still."""
        return any(hop.spills for hop in self.hops)

    @property
    def spill_s(self) -> float:
        """When to plan spills next, if there are new ones, or new room for old ones: not all the time, but before what
        waits is evicted."""
        if not self._spill_due:
            return float("inf")
        pace_s = min(self._spill_pace_s, HURRY_PACE_S) if self._hurry else self._spill_pace_s
        return (self._due_since_s or 0.0) + max(pace_s, self._spill_grace_s)

    @property
    def wake_s(self) -> float:
        """When to call `plan` for the sake of spills, whatever else happens: also those that wait for a tier which is
        off or has no room for new frames are tried again, though nobody asks for anything."""
        return min(self.spill_s, self._retry_s)

    @property
    def _hurry(self) -> bool:
        return self._backlog or any(
            level.evicted["capacity"] - before > HURRY_SHARE * level.pool.capacity
            for level, before in zip(self.levels, self._evicted_before, strict=False)
        )

    def put_off_spills(self, grace_s: float) -> None:
        """Let spills that are due wait this long from now on."""
        self._spill_grace_s = grace_s

    def queued(self, lease: Lease | None = None) -> list[int]:
        """Blocks ahead on every hop of somebody new, or of `lease`, whose own loads do not count."""
        own = len(lease.loads) if lease is not None else 0
        return [max(0, len(hop.urgent) + self.planner.up[k].in_flight - own) for k, hop in enumerate(self.hops)]

    def level_of(self, value: BlockHash) -> int | None:
        """The fastest level that has this block, or the one that it is on its way from; None: it is nowhere."""
        if self.levels[0].has(value):
            return 0
        load = self.loads.get(value)
        if load is not None:
            return load.level
        return next((level for level, books in enumerate(self.levels) if books.has(value)), None)

    # --- loads come and go -------------------------------------------------------------------------------------------

    def want(self, lease: Lease, values: Sequence[BlockHash], position: int, deadline_s: float) -> None:
        """`lease` waits for block `position` of the chain `values`, which is at some level below the device."""
        value = values[position]
        load = self.loads.get(value)
        if load is None:
            load = self._new_load(values, position, None)
        elif load.early_goal is not None:
            self._no_longer_early(load)
            self.prefetched["late"] += 1
        if load.stage is Stage.QUEUED and not load.leases:
            self.hops[load.level - 1].urgent.append(load)
        if not load.leases:
            load.deadline_s = deadline_s
            self._next_id += 1
            heapq.heappush(self._deadlines, (deadline_s, self._next_id, load))
        load.leases.append(lease)
        lease.loads[position] = load

    def leave(self, lease: Lease, position: int) -> None:
        """`lease` does not wait for this block any more."""
        load = lease.loads.pop(position)
        load.leases.remove(lease)
        self._give_up_if_unwanted(load)

    def _give_up_if_unwanted(self, load: Load) -> None:
        """A load in the queue that nobody waits for ends here; one in flight ends when it lands."""
        if load.stage is Stage.QUEUED and not load.leases and load.early_goal is None:
            books = self.levels[load.level]
            self._end(load)
            books.unhold(books.find[load.hash])

    def prefetch(self, values: Sequence[BlockHash], start: int, goal: int) -> None:
        """Somebody will ask for the chain `values` from position `start` on: bring what is below `goal` up to there."""
        for position in range(start, len(values)):
            level = self.level_of(values[position])
            if level is None or self.early_blocks >= EARLY_SHARE * self.levels[goal].pool.capacity:
                return
            if level > goal:
                self.load_early(values, position, goal)

    def load_early(self, values: Sequence[BlockHash], position: int, goal: int) -> None:
        """Bring block `position` of the chain `values`, which is below level `goal`, up to there; nobody waits."""
        if values[position] not in self.loads:
            load = self._new_load(values, position, goal)
            self.hops[load.level - 1].early.append(load)
            self.early_blocks += 1

    def end_early(self) -> None:
        """Nobody is expected any more: prefetches end, those in flight when they land."""
        for load in [load for load in self.loads.values() if load.early_goal is not None]:
            self._no_longer_early(load)
            self.prefetched["cancelled"] += 1
            self._give_up_if_unwanted(load)

    def _no_longer_early(self, load: Load) -> None:
        load.early_goal = None
        self.early_blocks -= 1

    def _new_load(self, values: Sequence[BlockHash], position: int, early_goal: int | None) -> Load:
        value = values[position]
        level = self.level_of(value)
        assert level, "only what is below the device is loaded"
        books = self.levels[level]
        books.hold(books.find[value])
        frame = books.find[value]
        origin = books.origin_of(frame) if early_goal is None else books.origin_moved(frame)
        parent = values[position - 1] if position else None
        load = self.loads[value] = Load(value, parent, position, level, origin, early_goal)
        return load

    def _end(self, load: Load) -> None:
        """Nobody gets anything from this load any more. The caller has seen to its hold; and to it that it is not early
        any more, if it came to something."""
        for lease in load.leases:
            del lease.loads[load.depth]
        load.leases.clear()
        load.stage = Stage.OVER
        if load.early_goal is not None:
            self._no_longer_early(load)
            self.prefetched["cancelled"] += 1
        del self.loads[load.hash]

    def _expire(self, now: float) -> None:
        """Who waits for a load that is past its deadline computes instead; the load's tier has failed once."""
        while self._deadlines and self._deadlines[0][0] <= now:
            load = heapq.heappop(self._deadlines)[2]
            if load.stage is Stage.OVER or load.deadline_s > now or not load.leases:
                continue
            for lease in load.leases:
                del lease.loads[load.depth]
            load.leases.clear()
            self._failed(load.level, "timeout", now)
            self._give_up_if_unwanted(load)

    def _failed(self, level: int, reason: str, now: float) -> None:
        self.planner.up[level - 1].failed[reason] += 1
        if reason != "corrupt":
            self.planner.breakers[self.levels[level].name].failed(now)

    # --- transfers ---------------------------------------------------------------------------------------------------

    def plan(self, now: float) -> list[Transfer]:
        """Transfers to start now: loads first, a request waits for them; then spills, nobody does."""
        self._now_s = now
        self._expire(now)
        planned: list[Transfer] = []
        due_since_s = self._due_since_s
        for hop in range(len(self.hops)):
            self._plan_up(hop, planned, now)
        if self._spill_due and self._due_since_s is None:  # those that come after this one go with it
            self._due_since_s = now
        if now >= self.wake_s:
            self._retry_s = inf
            self._spill_due, self._due_since_s = False, None
            self._evicted_before = [level.evicted["capacity"] for level in self.levels[:-1]]
            for hop in range(len(self.hops)):
                self._plan_down(hop, planned, now)
            self._backlog = self.spilling
        self.cut_short = len(planned) >= PLAN_BLOCKS
        if self.cut_short and self.spilling:
            self._spill_due, self._due_since_s = True, due_since_s
        return planned

    def _plan_up(self, hop: int, planned: list[Transfer], now: float) -> None:
        queue, target, source = self.hops[hop], self.levels[hop], self.levels[hop + 1]
        queue.starved = False
        while self.planner.up[hop].in_flight < queue.limit and len(planned) < PLAN_BLOCKS:
            load = queue.next_load(hop)
            if load is None:
                return
            if self._came_otherwise(load):
                continue
            early = load.early_goal is not None
            crowded = early and not hop and target.available < EARLY_SHARE * target.contested
            frames = None if crowded else target.take(1)
            if frames is None:
                (queue.early if early else queue.urgent).appendleft(load)
                queue.starved = not early
                return
            origin = source.find[load.hash]
            owner = source.owner_of(origin)
            target.file(frames[0], load.hash, load.parent, load.depth, ready=False, owner=owner)
            target.kind[frames[0]], target.used_s[frames[0]] = source.kind[origin], source.used_s[origin]
            load.stage = Stage.FLYING
            self.planner.up[hop].started(now)
            places = (source.name, source.find[load.hash]), (target.name, frames[0])
            planned.append(self._start(load.hash, load.parent, load.depth, places, hop, load, now))

    def _came_otherwise(self, load: Load) -> bool:
        """The block of this queued load is further up already, as somebody computed it: no need to move it."""
        source = self.levels[load.level]
        goal = 0 if self.levels[0].has(load.hash) else load.level - 1
        frame = self.levels[goal].find.get(load.hash)
        if frame is None:
            return False
        held = source.find[load.hash]
        if self.levels[goal].ready[frame] and load.leases:
            self.levels[goal].hold(frame)
            load.level = goal
            self._risen(load, frame)
        else:
            self._end(load)
        source.unhold(held)
        return True

    def _start(
        self,
        value: BlockHash,
        parent: BlockHash | None,
        depth: int,
        places: tuple[tuple[TierName, FrameId], tuple[TierName, FrameId]],
        hop: int,
        load: Load | None,
        now: float,
    ) -> Transfer:
        self._next_id += 1
        target = self.levels[hop if load is not None else hop + 1]
        tenant = self._owners.tenants[target.owner_of(places[1][1])]
        transfer = Transfer(self._next_id, value, places[0], places[1], now, parent, depth, tenant)
        self.in_flight[transfer.id] = Flight(transfer, hop, load)
        return transfer

    def complete(self, transfer_id: int, fault: TierFault | None, now: float) -> None:
        """The mover's report: no byte of this transfer moves any more. A faulty target is never used."""
        self._now_s = now
        flight = self.in_flight.pop(transfer_id)
        self._spill_due = self.spilling
        if fault is None:
            hops = self.planner.up if flight.load is not None else self.planner.down
            hops[flight.hop].duration_s.observe(now - flight.transfer.planned_s)
        if flight.load is not None:
            self._came_up(flight, flight.load, fault, now)
        else:
            self._went_down(flight, fault, now)

    def _came_up(self, flight: Flight, load: Load, fault: TierFault | None, now: float) -> None:
        hop = flight.hop
        source, target = self.levels[hop + 1], self.levels[hop]
        source_frame, target_frame = flight.transfer.source[1], flight.transfer.target[1]
        self.planner.up[hop].landed(now, good=fault is None)
        if fault is None:
            self.planner.breakers[source.name].worked()
            target.landed(target_frame)
            target.hits[target_frame] = max(target.hits[target_frame], source.hits[source_frame])
            source.unhold(source_frame)
            load.level = hop
            self._risen(load, target_frame)
            return
        self._failed(hop + 1, fault.reason, now)
        if fault.reason == "corrupt":
            self._condemn(source, source_frame, load.hash)
        target.unhold(target_frame)
        source.unhold(source_frame)
        self._try_below(load)

    def _condemn(self, books: TierBooks, frame: FrameId, value: BlockHash) -> None:
        books.condemn(frame)
        if books is self.levels[-1] and len(self.levels) > 2:
            self.notes.append(Note("drop", value, frame))

    def _try_below(self, load: Load) -> None:
        """A load failed: take the block from a slower tier if that has it too, else give up."""
        below = next((k for k in range(load.level + 1, len(self.levels)) if self.levels[k].has(load.hash)), None)
        if below is None or not load.leases:
            self._end(load)
            return
        books = self.levels[below]
        books.hold(books.find[load.hash])
        load.level, load.stage = below, Stage.QUEUED
        self.hops[below - 1].urgent.append(load)

    def _risen(self, load: Load, frame: FrameId) -> None:
        """The load's block is at `load.level` now, where the load holds `frame`."""
        if load.level == 0:
            self._deliver(load, frame)
        elif load.leases or (load.early_goal is not None and load.early_goal < load.level):
            load.stage = Stage.QUEUED
            hop = self.hops[load.level - 1]
            (hop.urgent if load.leases else hop.early).append(load)
        else:
            self._land_early(load, frame)
            self._end(load)
            self.levels[load.level].unhold(frame)

    def _deliver(self, load: Load, frame: FrameId) -> None:
        device = self.levels[0]
        if not load.leases:
            self._land_early(load, frame)
        for lease in load.leases:
            device.hold(frame)
            lease.tail[load.depth] = (frame, load.origin)
            lease.late_s, lease.landed_s = None, self._now_s  # progress: patience begins anew
            lease.landed_by_tier_s[load.origin] = self._now_s
        self._end(load)
        device.unhold(frame)

    def _land_early(self, load: Load, frame: FrameId) -> None:
        """Nobody waits for this block, which is where it was to go."""
        books = self.levels[load.level]
        books.origin[frame] = load.origin
        if load.early_goal is not None:
            self._no_longer_early(load)
            books.lives.fetched(frame)

    # --- spills ------------------------------------------------------------------------------------------------------

    def spill(self, value: BlockHash, level: int = 0) -> None:
        """Block `value`, ready at `level`, should have a copy one level below some time."""
        if level < len(self.hops):
            queue = self.hops[level].spills
            queue[value] = None
            self._mark(level, value, pending=True)
            self._spill_due = True
            if len(queue) > SPILLS_QUEUED_MAX:
                self._mark(level, queue.popitem(last=False)[0], pending=False)

    def _mark(self, level: int, value: BlockHash, *, pending: bool) -> None:
        frame = self.levels[level].find.get(value)
        if frame is not None:
            self.levels[level].mark_pending(frame, pending)

    def _plan_down(self, hop: int, planned: list[Transfer], now: float) -> None:
        queue, below = self.hops[hop], self.levels[hop + 1]
        if queue.retry_s is not None and now >= queue.retry_s:
            queue.retry_s = None
            below.pool.thaw()
        room = min(queue.limit - self.planner.down[hop].in_flight, below.available, PLAN_BLOCKS - len(planned))
        breaker = self.planner.breakers[below.name]
        if queue.spills and room <= 0 and queue.retry_s is not None:
            self._retry_s = min(self._retry_s, queue.retry_s)
        if not queue.spills or room <= 0:
            return
        if not breaker.allows(now):
            self._retry_s = min(self._retry_s, breaker.until_s)
            return
        batch = self._spill_batch(hop, room if breaker.closed else 1, now)
        source = self.levels[hop]
        parents = [source.parents[source.find[value]] for value in batch]
        anchors = [below.find[parent] for parent in parents if parent is not None and parent in below.find]
        for anchor in anchors:  # the room must not come from the parents themselves
            below.hold(anchor)
        fitting = min(len(batch), below.available)
        frames = below.take(fitting) or []
        for value, frame in zip(batch, sorted(frames), strict=False):
            self._spill_to(hop, value, frame, planned, now)
        for anchor in anchors:
            below.unhold(anchor)
        for value in reversed(batch[fitting:]):
            queue.spills[value] = None
            queue.spills.move_to_end(value, last=False)

    def _spill_batch(self, hop: int, room: int, now: float) -> list[BlockHash]:
        """The next blocks, parents first, that are still there, not below yet, and admitted there."""
        queue, source, below = self.hops[hop], self.levels[hop], self.levels[hop + 1]
        batch: dict[BlockHash, None] = {}
        line: list[BlockHash] = []
        while (line or queue.spills) and len(batch) < room:
            line = line or self._next_line(queue, source)
            value = line.pop()
            frame = source.find.get(value)
            if frame is None:
                continue
            if not source.ready[frame] or value in below.find:
                source.mark_pending(frame, False)
                continue
            parent = source.parents[frame]
            if parent is not None and parent not in batch and parent not in below.find:
                queue.outcomes["no_room"] += 1  # unreachable down there without its parent
                if hop:
                    self._admission.left_out()
            elif hop == 0 or self._admits(source, frame, now):
                queue.outcomes["admit"] += 1
                batch[value] = None
                continue
            source.mark_pending(frame, False)
        for value in line:  # no room for these now
            queue.spills[value] = None
            queue.spills.move_to_end(value, last=False)
        return list(batch)

    @staticmethod
    def _next_line(queue: HopQueue, source: TierBooks) -> list[BlockHash]:
        """The oldest spill and, behind it, those of its ancestors that wait too: they landed in another order."""
        line = [queue.spills.popitem(last=False)[0]]
        while (frame := source.find.get(line[-1])) is not None:
            parent = source.parents[frame]
            if parent is None or parent not in queue.spills:
                break
            del queue.spills[parent]
            line.append(parent)
        return line

    def _admits(self, source: TierBooks, frame: FrameId, now: float) -> bool:
        """May this block be written to the lowest tier, as far as its wear is concerned?"""
        if source.transient[frame]:
            return False
        below, class_ = self.levels[-1], class_of(source.hits[frame], source.kind[frame])
        full = not below.pool.free
        leaves = source.exit_density or inf  # nothing left that tier yet: what counts is what survives a crash
        likely = source.reuse.likely(class_, source.used_s[frame], leaves, below.exit_density)
        outcome = self._admission.admit(likely, now, full=full, kept=source.hashes[frame] in self.kept)
        if outcome != "admit":
            self.hops[-1].outcomes[outcome] += 1
        return outcome == "admit"

    def _spill_to(self, hop: int, value: BlockHash, frame: FrameId, planned: list[Transfer], now: float) -> None:
        source, below = self.levels[hop], self.levels[hop + 1]
        origin = source.find[value]
        parent, depth = source.parents[origin], source.depth[origin]
        source.hold(origin)
        source.pending[origin] = 0
        hits, owner = source.hits[origin], source.owner_of(origin)
        below.file(frame, value, parent, depth, ready=False, hits=hits, owner=owner)
        below.transient[frame] = source.transient[origin]
        below.kind[frame], below.used_s[frame] = source.kind[origin], source.used_s[origin]
        self.planner.down[hop].started(now)
        places = (source.name, origin), (below.name, frame)
        planned.append(self._start(value, parent, depth, places, hop, None, now))

    def _went_down(self, flight: Flight, fault: TierFault | None, now: float) -> None:
        hop, value = flight.hop, flight.transfer.hash
        source, below = self.levels[hop], self.levels[hop + 1]
        origin, frame = flight.transfer.source[1], flight.transfer.target[1]
        self.planner.down[hop].landed(now, good=fault is None)
        if fault is None:
            self.planner.breakers[below.name].worked()
            below.landed(frame)
            if value in self.kept and below is self.levels[-1]:
                below.keep(value)
            self.spill(value, hop + 1)
        else:
            self._spill_failed(hop, fault, now)
            if fault.reason == "corrupt" and hop:
                self._condemn(source, origin, value)
        below.unhold(frame)
        if fault is not None and fault.reason == "no_space":
            self._no_space(hop, frame, now)
        source.unhold(origin)

    def _spill_failed(self, hop: int, fault: TierFault, now: float) -> None:
        self.planner.down[hop].failed[fault.reason] += 1
        if fault.reason in ("io", "timeout"):
            self.planner.breakers[self.levels[hop + 1].name].failed(now)

    def _no_space(self, hop: int, frame: FrameId, now: float) -> None:
        """The medium is full before its cap is reached: make do with the frames there are, and try again later."""
        pool = self.levels[hop + 1].pool
        pool.withhold(frame)
        self.hops[hop].retry_s = now + NO_SPACE_RETRY_S
