"""Eviction that knows what no daemon can know: limits to hold the learned policy against, on the production code.

`Foresight` knows when every block is asked for next: Belady's rule (1966), as far as hits go that prefixes allow.
`Hindsight` knows how blocks of each class behave on this very trace, over all of it and before it begins, but of no
block what will become of it: that is all that can be known without knowing arrivals which have not happened, as far as
what a daemon can see of a request tells blocks apart. Use both with the policy `learned`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from server.kvcache.reuse import BINS, CLASSES, PENDING, ReuseModel
from server.types import BlockHash

NEVER = CLASSES * BINS - 1
"""Cell of what is not asked for again: the last of those that belong to no waiting request."""


class Foresight(ReuseModel):
    """`asked`, which must be called for all requests in this order, is told by the cache itself."""

    def __init__(self, chains: Sequence[Sequence[BlockHash]]) -> None:
        super().__init__()
        self._bucket = len(chains) // NEVER + 1
        self._uses: defaultdict[BlockHash, list[int]] = defaultdict(list)
        for number in reversed(range(len(chains))):
            for value in chains[number]:
                self._uses[value].append(number)
        for cell in range(NEVER + 1):
            worth = 0.0 if cell == NEVER else 1 / (1 + cell)
            self.density[cell] = worth
            self.density[cell + PENDING] = worth

    def asked(self, values: Sequence[BlockHash], now: float) -> None:
        """A request for this chain arrived: those before it did, too."""
        self.now_s = now
        for value in values:
            uses = self._uses[value]
            if uses:
                uses.pop()

    def left(self, values: Sequence[BlockHash], hits: Sequence[int], kinds: Sequence[int]) -> None:
        """There is nothing to learn."""

    def cell(self, value: BlockHash, class_: int, used_s: float) -> int:
        """By when it is asked for next, unless somebody waits for it."""
        if value in self._expected:
            return super().cell(value, class_, used_s)
        uses = self._uses.get(value)
        return uses[-1] // self._bucket if uses else NEVER


class Hindsight(ReuseModel):
    """Knows from the beginning on all that `seen` has learned, and learns no more."""

    def __init__(self, seen: ReuseModel) -> None:
        super().__init__()
        self._returned = seen._returned.copy()
        self._reached = seen._reached + seen._waiting()
        self._learn()
        self._learned_s = float("inf")

    def asked(self, values: Sequence[BlockHash], now: float) -> None:
        """Nothing is learned from it."""
        self.now_s = now

    def left(self, values: Sequence[BlockHash], hits: Sequence[int], kinds: Sequence[int]) -> None:
        """Nor from this."""
