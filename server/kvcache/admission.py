"""Which blocks are worth writing to SSD? Loop thread only, no clock.

While the tier has free frames, all: a write costs nothing but wear, and what is down there survives a crash. Once every
write evicts something, only the share of the blocks that comes down which is likeliest to be used again, after it left
DRAM and before it leaves the SSD. What is turned away is offered again when it was used again.

How likely that is, `ReuseModel` knows; from which likelihood on a block belongs to that share, nobody does, so it is
found by trial: each block that is admitted raises the bar a little, each other one lowers it, such that it stands still
when the share is met (stochastic approximation of a quantile, Robbins and Monro 1951).
"""

from __future__ import annotations

from math import log

from server.kvcache.planner import WriteBudget

STEP = 0.002
"""By how much one block moves the bar, on a logarithmic scale."""
LIKELY_MIN = 1e-4
"""All that is less likely is equal."""
SHORT_FACTOR = 0.5
"""Of the share, when the endurance budget is short."""


class Admission:
    """`share`: of the blocks that come down to a full tier, how many are written, 0 to 1. `budget`: for their bytes."""

    def __init__(self, share: float, budget: WriteBudget, block_bytes: int) -> None:
        self._share = share
        self._budget = budget
        self._block_bytes = block_bytes
        self._bar = log(0.01)

    def admit(self, likely: float, now: float, *, full: bool, kept: bool) -> str:
        """`admit`, `reject_cold` or `reject_wear`. `likely`: to be used again while it is there; `full`: some other
        block has to go for this one; `kept`: somebody asked for it to be kept."""
        short = self._budget.short(now)
        if (full or short) and not kept and not self._chosen(likely, short=short):
            return "reject_cold"
        return "admit" if self._budget.spend(self._block_bytes, now) else "reject_wear"

    def left_out(self) -> None:
        """A block came down that cannot be written, as what it hangs on was not."""
        self._move(-self._share)

    def _chosen(self, likely: float, *, short: bool) -> bool:
        share = self._share * SHORT_FACTOR if short else self._share
        good = share >= 1 or log(max(likely, LIKELY_MIN)) >= self._bar
        self._move(good - share)
        return good

    def _move(self, by: float) -> None:
        self._bar = max(log(LIKELY_MIN), self._bar + STEP * by)
