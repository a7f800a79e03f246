"""How well could anyone choose which blocks to write to SSD? What is known when a block comes down, against what became
of it: loaded again before it was evicted, and how often.

The trace is replayed on tiers that write everything, and every write is noted. Then its loads are predicted from all
that a daemon can know at that moment (`FEATURES`) by gradient boosted trees (Friedman 2001; scikit-learn's), which
learn from the whole trace but the conversations they are asked about: five folds, no conversation in two. That is more
than a daemon can have, as most of what the model learns from lies in the future. Writing fewer blocks leaves room in
which the others stay longer, which this does not see.

A daemon could also wait and choose when DRAM evicts a block, by what it knows then; what a crash takes would be more.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from server.sim.replay import Asked
from server.types import DRAM, SSD, BlockHash, Transfer

FEATURES = (
    "depth",
    "blocks of the prompt",
    "blocks behind it",
    "uses so far",
    "new tokens",
    "blocks since the first new",
    "turn",
    "seconds since the turn before",
    "prompt tokens",
    "answered tokens",
    "answered the turn before",
    "seconds since its last use but one",
    "continuations",
    "age",
    "time",
)
FOLDS = 5
Array = npt.NDArray[np.float64]


@dataclass(slots=True)
class Write:
    """One block copied to SSD, and how often it was loaded from there until it was written again or evicted."""

    block: BlockHash
    at_s: float
    loads: int = 0


def writes_of(moved: Sequence[tuple[float, Transfer]]) -> list[Write]:
    """The writes among all transfers of a replay, in order, with their loads."""
    found: list[Write] = []
    last: dict[BlockHash, Write] = {}
    for at_s, transfer in moved:
        if transfer.target[0] == SSD:
            last[transfer.hash] = write = Write(transfer.hash, at_s)
            found.append(write)
        elif transfer.source[0] == SSD and transfer.target[0] == DRAM:
            last[transfer.hash].loads += 1
    return found


@dataclass(slots=True)
class _Past:
    """What the requests of a trace tell of its blocks, in order of time."""

    asked: Sequence[Asked]
    chains: Sequence[Sequence[BlockHash]]
    uses: dict[BlockHash, list[int]] = field(default_factory=dict)
    """The requests that asked for a block."""
    place: dict[BlockHash, int] = field(default_factory=dict)
    first_new: list[int] = field(default_factory=list)
    before: list[int | None] = field(default_factory=list)
    """The request that this one goes on from."""
    turn: list[int] = field(default_factory=list)
    forks_s: dict[BlockHash, list[float]] = field(default_factory=lambda: defaultdict(list))
    """When each continuation of a block came for the first time."""

    def __post_init__(self) -> None:
        for number, chain in enumerate(self.chains):
            new = next((n for n, block in enumerate(chain) if block not in self.uses), len(chain))
            before = self.uses[chain[new - 1]][-1] if new else None
            self.first_new.append(new)
            self.before.append(before)
            self.turn.append(0 if before is None else self.turn[before] + 1)
            for depth in range(max(1, new), len(chain)):
                self.forks_s[chain[depth - 1]].append(self.asked[number].at_s)
            for depth, block in enumerate(chain):
                self.uses.setdefault(block, []).append(number)
                self.place[block] = depth

    def row(self, write: Write) -> list[float]:
        """`FEATURES` of a write; all -1 for a block of an answer, which no prompt of a trace holds."""
        uses = self.uses.get(write.block)
        if uses is None:
            return [-1.0] * len(FEATURES)
        seen = max(1, bisect_right(uses, write.at_s, key=lambda number: self.asked[number].at_s))
        number, depth = uses[seen - 1], self.place[write.block]
        one, length, new = self.asked[number], len(self.chains[number]), self.first_new[number]
        earlier = self.before[number]
        before = None if earlier is None else self.asked[earlier]
        return [
            depth,
            length,
            length - depth,
            seen,
            one.prompt_tokens * (1 - new / max(1, length)),
            depth - new,
            self.turn[number],
            -1.0 if before is None else one.at_s - before.at_s,
            one.prompt_tokens,
            one.output_tokens,
            -1.0 if before is None else before.output_tokens,
            one.at_s - self.asked[uses[seen - 2]].at_s if seen > 1 else -1.0,
            bisect_right(self.forks_s.get(write.block, []), write.at_s),
            write.at_s - one.at_s,
            write.at_s,
        ]

    def conversation(self, write: Write) -> int:
        """The same for all blocks of requests that have more than their first block, which may be everybody's, in
        common."""
        uses = self.uses.get(write.block)
        chain = self.chains[uses[0]] if uses else [write.block]
        return hash(chain[min(1, len(chain) - 1)])


def at_eviction(found: Sequence[Write], left: Sequence[tuple[float, BlockHash]]) -> list[Write]:
    """The same, but at the time at which DRAM evicted the block; those that it never did are left out, as they are
    neither written then nor loaded."""
    times: dict[BlockHash, list[float]] = defaultdict(list)
    for at_s, value in left:
        times[value].append(at_s)
    later = []
    for write in found:
        after = times[write.block][bisect_left(times[write.block], write.at_s) :]
        if after:
            later.append(Write(write.block, after[0], write.loads))
    return later


def kept(
    moved: Sequence[tuple[float, Transfer]],
    left: Sequence[tuple[float, BlockHash]],
    asked: Sequence[Asked],
    chains: Sequence[Sequence[BlockHash]],
    shares: Sequence[float],
) -> dict[str, list[float]]:
    """Share of all loads from SSD that were of the likeliest `shares` of the writes: `known`, by what a daemon can
    know when it could write, `later`, by what it knows when the block is evicted from DRAM, and `future`, by what
    became of them. `moved` and `left`: see `Setup`. `chains`: the blocks of each request that was `asked`.

    Raises ModuleNotFoundError without scikit-learn, which the extra `study` brings.
    """
    writes, past = writes_of(moved), _Past(asked, chains)
    loads = np.asarray([write.loads for write in writes], dtype=np.float64)
    later = at_eviction(writes, left)
    count = [share * len(writes) for share in shares]
    return {
        "known": _top(_likely(writes, past), loads, count),
        "later": _top(_likely(later, past), np.asarray([write.loads for write in later], dtype=np.float64), count),
        "future": _top(loads, loads, count),
    }


def _likely(writes: Sequence[Write], past: _Past) -> Array:
    """How likely it is that a block is loaded, as learned from all conversations but its own: float64 [writes]."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.model_selection import GroupKFold

    rows = np.asarray([past.row(write) for write in writes])
    loads = np.asarray([write.loads for write in writes])
    groups = np.asarray([past.conversation(write) for write in writes])
    likely = np.zeros(len(writes))
    for learn, judge in GroupKFold(FOLDS).split(rows, loads, groups):
        model = HistGradientBoostingClassifier(random_state=0).fit(rows[learn], loads[learn] > 0)
        likely[judge] = model.predict_proba(rows[judge])[:, 1]
    return likely


def _top(score: Array, loads: Array, counts: Sequence[float]) -> list[float]:
    """Share of the `loads` that so many writes of the highest `score` have."""
    running = np.cumsum(loads[np.argsort(-score, kind="stable")]) / loads.sum()
    return [float(running[min(len(loads), max(1, round(count))) - 1]) for count in counts]
