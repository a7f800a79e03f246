"""Counts per bucket: the one shape in which distributions are kept, wherever they are observed.

`observe` costs a bisection and two additions, 0.4 us, and takes no lock: one thread per histogram, or a lock around it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

MOVE_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
"""For steps, transfers, reads and writes."""
AGE_S = (0.1, 1, 5, 15, 30, 60, 120, 300, 600, 1800, 3600, 10800, 43200, 86400)
"""For how long blocks stay, and how long they are not used."""


@dataclass(slots=True)
class Histogram:
    """`bounds` are inclusive upper edges, ascending; `counts` has one more, for what is above all, and is not
    cumulative. `total` is the sum of all values."""

    bounds: Sequence[float]
    counts: list[int] = field(init=False)
    total: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float, count: int = 1) -> None:
        """`count` times the same value."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.total += value * count

    def copy(self) -> Histogram:
        """As it is now."""
        other = Histogram(self.bounds)
        other.counts, other.total = self.counts.copy(), self.total
        return other
