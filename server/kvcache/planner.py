"""Load or compute? Measured rates of every hop and of the device, and what follows from them. Pure, loop thread only.

Computing n blocks of a prompt adds C(n) to a step, more the more tokens precede them; loading them over a hop takes
L(n) = latency + (queued + n) * block_s. A request whose next n blocks lie in a tier below has three ways, and takes the
shortest:

    compute   C(n)             the step that ends its prompt pays the base in any case
    wait      L(n)             but at least the step that the others run meanwhile
    split     base + C(k)      a step more, over k blocks from the front, while the others are loaded from the back;
                               k such that both end together: base + C(k) = L(n - k)    (after Cake, ICML 2025)

Nothing here is trusted for long. All rates are decayed means of what was just measured; a load that is later than
promised is no longer waited for; and a tier that fails or stalls is switched off by its breaker and tried again later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from server.histogram import MOVE_S, Histogram
from server.kvcache.step_cost import StepCost
from server.types import SpanReport, TierName

BLOCK_DECAY = 0.97
"""Per landing: the pace is that of the last thirty or so, as blocks that are read in one go land together."""
SLOWER_WEIGHT, FASTER_WEIGHT = 0.2, 0.6
"""Of one new burst in the mean latency: one slow answer is an accident, two quick ones are good news."""
OUTLIER_FACTOR = 8.0
"""One gap or latency counts for at most this many times the mean: a stall of a minute says nothing about the pace once
it is over, and a tier that did become that slow is known to be after a few landings."""
RUN_SHARE = 1 / 8
"""Blocks that land within this share of their burst's latency after its first came with that one: in one read. They
say nothing about the pace."""
GUESS_BLOCKS = 8.0
"""How many landings the first guess is worth."""
LATE_FACTOR = 1.5
"""A load may take this many times its estimate before the request that waits for it computes instead."""
LATE_GRACE_S = 0.002
"""Added to that: timers and threads are not more punctual."""
LATE_SHARE = 0.03
"""But never less than this share of the time that computing takes: what a stalled tier may cost the first who asks."""
DEADLINE_FACTOR = 8.0
"""After this many times its estimate, plus DEADLINE_GRACE_S, a load is given up: its tier has failed once."""
DEADLINE_GRACE_S = 0.25
WORTH_RATIO = 0.75
"""A hit is loaded only if that takes at most this share of the time that computing it takes: estimates err, and near
break-even there is nothing to win."""
SPLIT_RATIO = 0.75
"""A step more, beside the load, is run only if that takes at most this share of the waiting: it slows the load down and
holds up whoever comes next."""
PROBE_EVERY_S = 1.0
"""A tier that seems too slow is measured again this often: the last blocks of a hit are loaded, and nobody waits."""
PROBE_SHARE = 8
"""One in so many blocks of that hit."""
BREAKER_FAILURES = 3
"""Failures in a row that switch a tier off."""
BREAKER_FIRST_S = 1.0
BREAKER_LONGEST_S = 60.0
"""For how long: doubling from the first to the longest while trials fail."""


class Hop:
    """Blocks moving one way between two neighbouring tiers, as seen by their landings.

    `latency_s` is the mean time from the start of a burst to its first landing, `block_s` the mean gap between landings
    while something is in flight, but no more than a whole burst took per block; both decay, and both start from a
    guess.
    """

    __slots__ = ("_blocks", "_burst_blocks", "_first_s", "_gaps", "_gaps_s", "_mark_s", "_start_s", "_time_s", "busy_s",
                 "duration_s", "failed", "fresh", "in_flight", "latency_s", "moved_blocks", "probe_s")  # fmt: skip

    def __init__(self, block_s: float, latency_s: float) -> None:
        self.latency_s = latency_s
        self.in_flight = 0
        self.moved_blocks = 0
        self.busy_s = 0.0
        self.probe_s = 0.0
        self.failed = dict.fromkeys(("io", "corrupt", "no_space", "timeout"), 0)
        self.duration_s = Histogram(MOVE_S)
        """Start to landing of a block."""
        self.fresh = True
        """Nothing has landed since this hop was last idle."""
        self._blocks = GUESS_BLOCKS
        self._time_s = GUESS_BLOCKS * block_s
        self._mark_s = self._start_s = 0.0
        self._burst_blocks = 0
        self._first_s = 0.0
        self._gaps, self._gaps_s = 0, 0.0

    @property
    def block_s(self) -> float:
        return self._time_s / self._blocks

    @property
    def first_s(self) -> float:
        """What the next block takes longer than its turn: nothing once a burst is landing."""
        return self.latency_s if self.fresh or not self.in_flight else 0.0

    def started(self, now: float) -> None:
        if self.in_flight == 0:
            self._mark_s = self._start_s = now
            self._burst_blocks = 0
            self.fresh = True
        self.in_flight += 1

    def landed(self, now: float, *, good: bool) -> None:
        self.in_flight -= 1
        gap_s, self._mark_s = now - self._mark_s, now
        self.busy_s += gap_s
        if not good:
            return
        self.moved_blocks += 1
        self._burst_blocks += 1
        if self.fresh:
            weight = SLOWER_WEIGHT if gap_s > self.latency_s else FASTER_WEIGHT
            self.latency_s += weight * (min(gap_s, OUTLIER_FACTOR * self.latency_s) - self.latency_s)
            self.fresh = False
            self._first_s = gap_s
            self._gaps, self._gaps_s = 0, 0.0
        else:
            self._gaps += 1
            self._gaps_s += min(gap_s, OUTLIER_FACTOR * max(self.block_s, self.latency_s / GUESS_BLOCKS))
            if now - self._start_s >= (1 + RUN_SHARE) * self._first_s:
                self._learn_pace()
        if not self.in_flight:
            self._no_slower((now - self._start_s) / self._burst_blocks)

    def _learn_pace(self) -> None:
        kept = BLOCK_DECAY**self._gaps
        self._blocks = self._blocks * kept + self._gaps
        self._time_s = self._time_s * kept + self._gaps_s
        self._gaps, self._gaps_s, self._first_s = 0, 0.0, 0.0

    def _no_slower(self, block_s: float) -> None:
        """A whole burst, its latency included, took that much per block."""
        if block_s < self.block_s:
            self._time_s += FASTER_WEIGHT * (block_s * self._blocks - self._time_s)

    def late(self, waited_s: float, blocks: int) -> None:
        """In `waited_s` not even `blocks` blocks arrived: it is at least that slow, as far as anybody knows."""
        self._time_s = max(self._time_s, self._blocks * waited_s / blocks)


@dataclass(slots=True)
class Breaker:
    """Switches a sick tier off. Closed: all may use it. Open: nobody, but for one trial each time `until_s` passes."""

    failures: int = 0
    until_s: float = 0.0
    backoff_s: float = BREAKER_FIRST_S
    opened: int = 0

    @property
    def closed(self) -> bool:
        return self.failures < BREAKER_FAILURES

    def allows(self, now: float) -> bool:
        """May this tier be used now? When it is off, a True is the trial: ask once and use it."""
        if self.closed:
            return True
        if now < self.until_s:
            return False
        self.until_s = now + self.backoff_s
        return True

    def failed(self, now: float) -> None:
        was_closed = self.closed
        self.failures += 1
        if self.closed:
            return
        if was_closed:
            self.opened += 1
        else:
            self.backoff_s = min(2 * self.backoff_s, BREAKER_LONGEST_S)
        self.until_s = now + self.backoff_s

    def worked(self) -> None:
        self.failures = 0
        self.backoff_s = BREAKER_FIRST_S


class Planner:
    """`tiers` from fastest to slowest; `block_s[k]` is the first guess for loading one block from tier k+1 to tier
    k."""

    def __init__(self, tiers: list[TierName], block_tokens: int, guesses: list[tuple[float, float]]) -> None:
        self.up = [Hop(block_s, latency_s) for block_s, latency_s in guesses]
        self.down = [Hop(block_s, latency_s) for block_s, latency_s in guesses]
        self.breakers = {name: Breaker() for name in tiers[1:]}
        self.step = StepCost()
        self._names = tiers
        self._block_tokens = block_tokens

    def decided(
        self, levels: Sequence[int], taken: int, start: int, queued: list[int], declined: str
    ) -> list[SpanReport]:
        """For the record: of blocks on `levels`, behind `start` others, the first `taken` are used or sent for, the
        others are computed because of `declined`."""
        spans = []
        for used, part in ((True, levels[:taken]), (False, levels[taken:])):
            for level, run in groupby(part):
                blocks = len(list(run))
                load_s = self.load_s(level, blocks, queued) if level else 0.0
                decision = "compute" if not used else "load" if level else "use"
                reason = "" if used else declined
                compute_s = self.compute_s(start, blocks)
                spans.append(SpanReport(self._names[level], blocks, decision, reason, load_s, compute_s))
                start += blocks
        return spans

    def load_s(self, level: int, blocks: int, queued: list[int]) -> float:
        """Seconds until `blocks` blocks of tier `level` are on the device, behind `queued[k]` blocks on each hop. The
        hops work at the same time, so the slowest counts, and one latency each."""
        hops = self.up[:level]
        slowest_s = max((queued[k] + blocks) * hop.block_s for k, hop in enumerate(hops))
        return slowest_s + sum(hop.latency_s for hop in hops)

    def compute_s(self, start: int, blocks: int) -> float:
        """Seconds to compute `blocks` blocks of a prompt, behind `start` others, on a device that does nothing else."""
        return self.step.base_s + self._computing_s(start, blocks)

    def front(self, level: int, start: int, blocks: int, queued: list[int], floor_s: float) -> int:
        """How many of `blocks` blocks, which follow `start` others and could be loaded from tier `level`, to compute
        now, from the front; 0: wait for them all, `blocks`: do without. `floor_s`: how long the step takes that others
        run meanwhile."""
        return self._choose(level, start, blocks, queued, floor_s)[1]

    def worth(self, level: int, start: int, blocks: int, queued: list[int], floor_s: float) -> bool:
        """Would loading spare enough computing to be worth the trouble?"""
        cost_s, _ = self._choose(level, start, blocks, queued, floor_s)
        return not self.step.known or cost_s <= WORTH_RATIO * self._computing_s(start, blocks)

    def probe(self, level: int, blocks: int, now: float) -> int:
        """Of a hit that is not worth loading, how many blocks to load all the same: without that nobody would ever
        learn that the tier is fast again. 0 most of the time, and while anything is on its way over that hop."""
        hop = self.up[level - 1]
        if now < hop.probe_s or hop.in_flight:
            return 0
        hop.probe_s = now + PROBE_EVERY_S
        return -(-blocks // PROBE_SHARE)

    def _choose(self, level: int, start: int, blocks: int, queued: list[int], floor_s: float) -> tuple[float, int]:
        """Seconds of the shortest way, and the blocks to compute first. Before the first step was measured: wait."""
        hops = self.up[:level]
        ahead, slowest = max(zip(queued, hops, strict=False), key=lambda pair: (pair[0] + blocks) * pair[1].block_s)
        load_s = (ahead + blocks) * slowest.block_s + sum(hop.first_s for hop in hops)
        if not self.step.known:
            return max(load_s, floor_s), 0
        wait_s, compute_s = max(load_s, floor_s), self._computing_s(start, blocks)
        best = (wait_s, 0) if wait_s < compute_s else (compute_s, blocks)
        base_s = self.step.base_s
        low, high = 0, blocks
        while high - low > 1:  # `low` blocks are computed before the others came, `high` are not
            middle = (low + high) // 2
            early = base_s + self._computing_s(start, middle) <= load_s - middle * slowest.block_s
            low, high = (middle, high) if early else (low, middle)
        split_s = max(load_s - low * slowest.block_s, floor_s)
        return (split_s, low) if low and split_s < SPLIT_RATIO * best[0] else best

    def _computing_s(self, start: int, blocks: int) -> float:
        """Seconds that `blocks` blocks behind `start` others add to a step that is run anyway."""
        return self.step.tokens_s(start * self._block_tokens, blocks * self._block_tokens)

    def patience_s(self, estimate_s: float, start: int, blocks: int) -> float:
        """How long to wait without any progress for `blocks` blocks behind `start` others that were promised in
        `estimate_s`: giving up too early costs computing all of them, so a share of that is always granted."""
        return max(LATE_FACTOR * estimate_s + LATE_GRACE_S, LATE_SHARE * self._computing_s(start, blocks))

    def deadline_s(self, estimate_s: float) -> float:
        """When to give a load up."""
        return DEADLINE_FACTOR * estimate_s + DEADLINE_GRACE_S


@dataclass(slots=True)
class WriteBudget:
    """Endurance: at most `bytes_per_day` bytes written, as a bucket that fills all day and holds `hold_s` worth of it.

    It starts empty but for a minute's worth, so that restarts cannot overrun the day. 0 bytes: no limit.
    """

    bytes_per_day: float
    hold_s: float = 3600.0
    level: float = 0.0
    filled_s: float | None = None

    def fill(self, now: float) -> None:
        per_s = self.bytes_per_day / 86_400
        if self.filled_s is None:
            self.level = 60 * per_s
        else:
            self.level = min(self.level + (now - self.filled_s) * per_s, self.hold_s * per_s)
        self.filled_s = now

    def short(self, now: float) -> bool:
        """Less than half is left: it is time to choose."""
        if not self.bytes_per_day:
            return False
        self.fill(now)
        return self.level < 0.5 * self.hold_s * self.bytes_per_day / 86_400

    def spend(self, count: int, now: float) -> bool:
        """Take `count` bytes; False, and nothing taken, when they are not there."""
        if not self.bytes_per_day:
            return True
        self.fill(now)
        if self.level < count:
            return False
        self.level -= count
        return True
