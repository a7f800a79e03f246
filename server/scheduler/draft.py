"""A step being put together: rows in the order they were granted, and what is left of its tokens and of its time."""

from __future__ import annotations

from math import inf

from server.kvcache.step_cost import StepCost
from server.types import RequestId, StepRow

MIN_CHUNK_TOKENS = 64
"""Of a prompt, however little time is left: a prompt gets on."""


class Draft:
    """`budget`: tokens left. `until_s`: how long the step may take, as far as that is known; it only limits what is
    asked about, with `fitting`."""

    __slots__ = ("_context", "_cost", "_decodes", "_prompt_s", "_prompts", "budget", "rows", "until_s")

    def __init__(self, budget: int, cost: StepCost) -> None:
        self.budget = budget
        self.until_s = inf
        self.rows: dict[RequestId, StepRow] = {}
        self._cost = cost
        self._decodes = self._prompts = self._context = 0
        self._prompt_s = 0.0

    def add(self, row: StepRow) -> None:
        self.rows[row.request_id] = row
        self._count(row, 1)

    def drop(self, id: RequestId) -> None:
        row = self.rows.pop(id, None)
        if row is not None:
            self._count(row, -1)

    @property
    def seconds(self) -> float:
        """What the step takes as it is now."""
        return self._cost.step_s(self._decodes, self._context, self._prompt_s)

    @property
    def decode_s(self) -> float:
        """What it would take without its prompts."""
        return self._cost.step_s(self._decodes, self._context, 0.0)

    @property
    def has_prompts(self) -> bool:
        """Does somebody's prompt get on in it?"""
        return self._prompts > 0

    @property
    def full(self) -> bool:
        """Nobody else's prompt gets anything: no tokens are left, or one prompt has its part and no time is."""
        return self.budget == 0 or (self._prompts > 0 and self.until_s < inf and not self.fitting(0, MIN_CHUNK_TOKENS))

    def least(self, count: int) -> int:
        """What a prompt gets of `count` tokens however little time is left: the first one of a step gets on."""
        return 0 if self._prompts else min(count, MIN_CHUNK_TOKENS)

    def fitting(self, start: int, count: int) -> int:
        """How many of `count` tokens behind `start` others fit into the time that is left."""
        if self.until_s == inf:
            return count
        if count == 1:
            after_s = self._cost.step_s(self._decodes + 1, self._context + start, self._prompt_s)
            return int(after_s <= self.until_s)
        if self.seconds > self.until_s:
            return 0
        # Asked about a step too long by exactly `until_s` of prompts: one that computing bounds, not the decodes.
        longer_s = self._cost.step_s(self._decodes, self._context, self._prompt_s + self.until_s)
        return self._cost.affordable(start, 2 * self.until_s - longer_s, count)

    def _count(self, row: StepRow, sign: int) -> None:
        count = len(row.tokens)
        self.budget -= sign * count
        if count == 1:
            self._decodes += sign
            self._context += sign * row.start
        else:
            self._prompts += sign
            self._prompt_s += sign * self._cost.tokens_s(row.start, count)
            if not self._prompts:
                self._prompt_s = 0.0  # nor what rounding leaves of prompts that were dropped
