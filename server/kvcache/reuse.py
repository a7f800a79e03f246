"""When will a block be used again? Learned from what was asked for, for all tiers together. Loop thread only.

Blocks are alike that were found equally often (`hits`) and whose last request was of the same kind: how many tokens of
its prompt were new, how many it answered. For each such class the model knows, by age since that request ended, which
share of the blocks that reached this age was asked for before the next (the hazard, from a life table: those that
still wait count as far as they got, in their present bin as the part of it that is over, after Cutler and Ederer,
1958). Classes with few observations lean on all that have as many hits, these on all, and those on the guess that a
block is the less likely to be used the longer it was not, which is LRU.

From that follows the hit density of a class at an age: the most hits per block and second that keeping the block from
now on can bring, over all times at which one could give it up (Gittins, 1979; Beckmann et al., LHD, NSDI 2018):

    density(age) = max over t of  P(used within t | not used until age) / E(seconds until used or t | the same)

What waiting requests will ask for is not guessed but known: such blocks are expected, and dearer than all others, the
more the sooner it is the turn of the first request that waits for them.

Only the first block of each run of equals in a request is followed, as they mostly come back or stay away together, and
at most `FOLLOWED_MAX`: when there are too many, every second one is left out, by its hash.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from math import log

import numpy as np
import numpy.typing as npt

from server.types import BlockHash

HITS_MAX = 4
"""More count as this many."""
NEW_KINDS, ANSWER_KINDS = 9, 7
ANSWER = NEW_KINDS * ANSWER_KINDS
"""The kind of blocks that hold tokens of an answer: whether clients send it back, and as it was, is up to them."""
BATCH = ANSWER + 1
"""The kind of blocks that only requests in the background have used."""
KINDS = ANSWER + 2
CLASSES = (HITS_MAX + 1) * KINDS
BINS = 48
"""Ages: below a second, then each bin 1.28 times as long as the one before, the last from a day on."""
BIN_GROWTH = 1.28
FOLLOWED_MAX = 8192
LEANING = 20.0
"""How many observations of its own make a class count as much as what it leans on."""
ENOUGH = 4.0
"""With fewer it is taken for what it leans on."""
LEARN_EVERY_S = 5.0
FADE = 0.999
"""Weight of what was known, each time that something is learned: half of it is forgotten in an hour or more."""
EDGES_S = np.concatenate([[0.0], BIN_GROWTH ** np.arange(BINS - 1)])
LONGEST_S = float(EDGES_S[-1])
WIDTHS_S = np.append(np.diff(EDGES_S), EDGES_S[-1])
GUESS = np.minimum(0.5, 0.15 * WIDTHS_S / (EDGES_S + WIDTHS_S / 2 + 5.0))
"""Hazard before anything was observed."""
PENDING = (CLASSES + 1) * BINS
"""Added to the cell of a block that is about to be copied to the tier below: it should not go before that."""
PENDING_DENSITY = 1e3
"""Added to its density: above that of any class."""
EXPECTED = [1e20 / 2**length for length in range(BINS)]
"""Density of what is expected: any numbers that fall and are above all others will do."""
_GROWTH_LOG = log(BIN_GROWTH)


def bin_of(age_s: float) -> int:
    """The bin of an age in seconds."""
    return 0 if age_s < 1 else min(BINS - 1, 1 + int(log(age_s) / _GROWTH_LOG))


def kind_of(new_tokens: int, answer_tokens: int) -> int:
    """Of a request: how many tokens of its prompt were not cached, and how many it answered, each to a factor of 4."""
    new = min(NEW_KINDS - 1, (new_tokens + 1).bit_length() // 2)
    answer = min(ANSWER_KINDS - 1, (answer_tokens + 1).bit_length() // 2)
    return new * ANSWER_KINDS + answer


def class_of(hits: int, kind: int) -> int:
    """The class of a block that was found `hits` times, the last time by a request of this kind."""
    return min(hits, HITS_MAX) * KINDS + kind


class ReuseModel:
    """`now_s` is set by whoever knows the time; nothing here reads a clock."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.version = 0
        """Changes whenever `density` does."""
        self.density: list[float]
        """Hits per block and second, by class and bin: element class * BINS + bin. Behind the last class one cell for
        each bit length of the number of requests that come before the one which expects a block. Then all that again,
        for pending blocks."""
        self._followed: OrderedDict[BlockHash, tuple[int, float]] = OrderedDict()
        self._expected: dict[BlockHash, list[int]] = {}
        """By block: how many waiting requests want it, and the number of the first of them."""
        self._numbered = self._served = 0
        self._mask = 0
        self._returned: npt.NDArray[np.float64] = np.zeros((CLASSES, BINS))
        self._reached: npt.NDArray[np.float64] = np.zeros((CLASSES, BINS))
        self._learned_s = -LEARN_EVERY_S
        self._learn()

    def asked(self, values: Sequence[BlockHash], now: float) -> None:
        """A request for this chain arrived."""
        self.now_s = now
        followed = self._followed
        for value in values:
            known = followed.pop(value, None)
            if known is not None:
                self._count(known[0], now - known[1], returned=True)

    def expect(self, values: Sequence[BlockHash]) -> int:
        """A request waits that will ask for these blocks. Returns its number, for `served`."""
        self._numbered += 1
        for value in values:
            self._expected.setdefault(value, [0, self._numbered])[0] += 1
        return self._numbered

    def served(self, values: Sequence[BlockHash], number: int) -> None:
        """The request that `expect` gave this number does not wait any more."""
        self._served = max(self._served, number)
        for value in values:
            known = self._expected[value]
            known[0] -= 1
            if not known[0]:
                del self._expected[value]

    def class_density(self, class_: int, used_s: float) -> float:
        """Hit density of a block of this class that was not used since `used_s` and that nobody is known to want."""
        return self.density[class_ * BINS + bin_of(self.now_s - used_s)]

    def likely(self, class_: int, used_s: float, leaves: float, lost: float) -> float:
        """Chance that a block of this class, not used since `used_s`, will be used after its density fell to `leaves`
        and before it fell to `lost`: below the one it is evicted from the tier above, below the other from this."""
        now = bin_of(self.now_s - used_s)
        worth, left = self._worth[class_, now:], self._left[class_, now:]
        first, last = (int(np.argmax(low)) if (low := worth <= limit).any() else len(worth) for limit in (leaves, lost))
        return float((left[first] - left[last]) / left[0]) if first < last else 0.0

    def cell(self, value: BlockHash, class_: int, used_s: float) -> int:
        """Element of `density` for this block."""
        expected = self._expected.get(value)
        if expected is None:
            return class_ * BINS + bin_of(self.now_s - used_s)
        return CLASSES * BINS + min(BINS - 1, max(0, expected[1] - self._served).bit_length())

    def left(self, values: Sequence[BlockHash], hits: Sequence[int], kinds: Sequence[int]) -> None:
        """A request ended now; these are its blocks, found so many times each up to now, and of these kinds."""
        before = -1
        for value, count, kind in zip(values, hits, kinds, strict=True):
            class_ = class_of(count, kind)
            if class_ != before and not value[0] & self._mask and value not in self._expected:
                self._followed[value] = class_, self.now_s
                self._followed.move_to_end(value)
            before = class_
        if len(self._followed) > FOLLOWED_MAX:
            self._follow_fewer()
        if self.now_s >= self._learned_s + LEARN_EVERY_S:
            self._learn()

    def _follow_fewer(self) -> None:
        """Let go of the oldest half if the oldest are past all bins, else of every second one."""
        oldest_s = next(iter(self._followed.values()))[1]
        if self.now_s - oldest_s > LONGEST_S or self._mask == 0xFF:
            for _ in range(FOLLOWED_MAX // 2):
                class_, since_s = self._followed.popitem(last=False)[1]
                self._count(class_, self.now_s - since_s, returned=False)
        else:
            self._mask = 2 * self._mask + 1
            self._followed = OrderedDict((v, known) for v, known in self._followed.items() if not v[0] & self._mask)

    def _count(self, class_: int, age_s: float, *, returned: bool) -> None:
        reached = bin_of(age_s)
        self._reached[class_, :reached] += 1
        if returned:
            self._reached[class_, reached] += 1
            self._returned[class_, reached] += 1
        else:
            self._reached[class_, reached] += min(1.0, (age_s - EDGES_S[reached]) / WIDTHS_S[reached])

    def _learn(self) -> None:
        """Hazards and densities from all observations: some 4 ms for a hundred classes."""
        self._learned_s = self.now_s
        self._returned *= FADE
        self._reached *= FADE
        reached = self._reached + self._waiting()
        seen = np.flatnonzero(reached[:, 0] >= ENOUGH)
        by_hits = (HITS_MAX + 1, KINDS, BINS)
        came_hits, reached_hits = self._returned.reshape(by_hits).sum(1), reached.reshape(by_hits).sum(1)
        common = (came_hits.sum(0) + LEANING * GUESS) / (reached_hits.sum(0) + LEANING)
        hits = (came_hits + LEANING * common) / (reached_hits + LEANING)
        hazard = np.repeat(hits, KINDS, axis=0)
        hazard[seen] = (self._returned[seen] + LEANING * hazard[seen]) / (reached[seen] + LEANING)
        self._left = unused(hazard)
        self._worth = np.repeat(densities(hits), KINDS, axis=0)
        self._worth[seen] = densities(hazard[seen])
        table = np.append(self._worth.ravel(), EXPECTED)
        self.density = np.append(table, table + PENDING_DENSITY).tolist()
        self.version += 1

    def _waiting(self) -> npt.NDArray[np.float64]:
        """How many followed blocks that nobody asked for yet reached the end of each bin; those that are in it count
        as the part of it that is over. Old bins are long: without these, most of what they know would have returned."""
        reached, entered = np.zeros((CLASSES, BINS)), np.zeros((CLASSES, BINS))
        if self._followed:
            classes, since_s = (np.asarray(column) for column in zip(*self._followed.values(), strict=True))
            ages_s = self.now_s - since_s
            bins = np.maximum(np.searchsorted(EDGES_S, ages_s, side="right") - 1, 0)
            np.add.at(entered, (classes, bins), 1)
            np.add.at(reached, (classes, bins), np.clip((ages_s - EDGES_S[bins]) / WIDTHS_S[bins], 0.0, 1.0))
        reached[:, :-1] += entered[:, :0:-1].cumsum(1)[:, ::-1]
        return reached


def unused(hazard: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Share of the blocks not used until the start of each bin, and after the last: float64 [classes, BINS + 1]."""
    left = np.ones((len(hazard), BINS + 1))
    np.cumprod(1 - hazard, axis=1, out=left[:, 1:])
    return left


def densities(hazard: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Hit density at the start of each bin, from the hazards of all bins: float64 [classes, BINS] both.

    With `left` the share not used until the start of a bin and `spent` the mean seconds that a block was kept until
    then: giving up at bin t what was kept from bin a on brings left[a] - left[t] hits in spent[t] - spent[a] seconds.
    """
    left = unused(hazard)
    spent = np.zeros_like(left)
    np.cumsum((left[:, :-1] + left[:, 1:]) / 2 * WIDTHS_S, axis=1, out=spent[:, 1:])
    hits = left[:, :-1, None] - left[:, None, 1:]
    seconds = spent[:, None, 1:] - spent[:, :-1, None]
    later = np.triu(np.ones((BINS, BINS), dtype=bool))
    return np.where(later, hits / np.where(later, seconds, 1.0), 0.0).max(axis=2)
