"""What a step costs, learned from the steps that ran. Pure, loop thread only.

Two lines through recent steps, older ones fading, no slope below zero:

    decode only    floor + row_s * rows + context_s * context
    with prompts   base  + token_s * tokens + pair_s * (query, key) pairs     and never less than the decode of its rows

They are kept apart, because a step that only decodes is bound by reading weights and cache, and a step with a prompt by
computing: a hundred decodes in a row would otherwise teach that prompts are free.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from server.types import StepRow

DECAY = 0.98
"""Weight of what was known, per step of the same kind."""
RIDGE = 1e-3
"""How reluctantly a slope is used, as a share of its own weight: while steps are all alike, one slope says it all, the
tokens' where prompts are computed, the floor where not."""


@dataclass(frozen=True, slots=True)
class StepWork:
    """What a step computes. `pairs`: of the rows with several tokens; `context`: tokens before those with one."""

    tokens: int
    pairs: int = 0
    context: int = 0
    decodes: bool = False
    """No row has more than one token."""

    @classmethod
    def of(cls, rows: Iterable[StepRow]) -> Self:
        tokens = pairs = context = 0
        for row in rows:
            count = len(row.tokens)
            tokens += count
            if count == 1:
                context += row.start
            else:
                pairs += pairs_of(row.start, count)
        return cls(tokens, pairs, context, decodes=not pairs)


def pairs_of(start: int, count: int) -> int:
    """(query, key) pairs of `count` tokens behind `start` others."""
    return count * start + count * (count + 1) // 2


class StepCost:
    """Seconds of steps: `observe` those that ran, ask about those to come. All zero before the first one."""

    def __init__(self) -> None:
        self._prompts, self._decodes = _Line(leading=1), _Line(leading=0)

    def observe(self, work: StepWork, seconds: float) -> None:
        """A step took that long."""
        if work.decodes:
            self._decodes.observe(work.tokens, work.context, seconds)
        else:
            attention_s = self._decodes.slopes[2] * work.context
            self._prompts.observe(work.tokens, work.pairs, max(seconds - attention_s, 0.1 * seconds))

    @property
    def known(self) -> bool:
        return bool(self._prompts.weight or self._decodes.weight)

    @property
    def base_s(self) -> float:
        """Of a step more that computes a part of a prompt, beside the tokens."""
        return (self._prompts if self._prompts.weight else self._decodes).slopes[0]

    @property
    def floor_s(self) -> float:
        """Of the shortest step there is."""
        base_s, token_s, _ = (self._decodes if self._decodes.weight else self._prompts).slopes
        return base_s + token_s

    def tokens_s(self, start: int, count: int) -> float:
        """What `count` tokens of a prompt behind `start` others add to a step with prompts."""
        _, token_s, pair_s = (self._prompts if self._prompts.weight else self._decodes).slopes
        if not self._prompts.weight:
            pair_s = 0.0
        return token_s * count + pair_s * pairs_of(start, count)

    def decode_s(self, context: int) -> float:
        """What one request that decodes behind `context` tokens adds to a step."""
        if not self._decodes.weight:
            return self.tokens_s(context, 1)
        _, row_s, context_s = self._decodes.slopes
        return row_s + context_s * context

    def step_s(self, decodes: int, context: int, prompt_s: float) -> float:
        """Of a step with `decodes` rows of one token behind `context` others in all, and `tokens_s` of its prompts."""
        if not self._decodes.weight:
            return self.base_s + self.tokens_s(0, decodes) + prompt_s
        floor_s, row_s, context_s = self._decodes.slopes
        decode_s = floor_s + row_s * decodes + context_s * context
        if not prompt_s:
            return decode_s
        return max(decode_s, self.base_s + self.tokens_s(0, decodes) + context_s * context + prompt_s)

    def affordable(self, start: int, seconds: float, most: int) -> int:
        """How many tokens of a prompt, behind `start` others, add at most `seconds` to a step; no more than `most`."""
        if self.tokens_s(start, most) <= seconds:
            return most
        low, high = 0, most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.tokens_s(start, middle) <= seconds else (low, middle)
        return low


class _Line:
    """Least squares of seconds on (1, x, z), each step weighted by the inverse square of its seconds, so that what is
    kept small is the relative error. `leading`: the slope that says all while steps are alike."""

    __slots__ = ("_fresh", "_leading", "_sums", "_targets", "_values", "weight")

    def __init__(self, leading: int) -> None:
        self._leading = leading
        self.weight = 0.0
        self._sums = [0.0] * 6  # 11 1x 1z xx xz zz
        self._targets = [0.0] * 3
        self._values = (0.0, 0.0, 0.0)
        self._fresh = True

    def observe(self, x: float, z: float, seconds: float) -> None:
        if seconds <= 0:
            return
        one, x, z = 1 / seconds, x / seconds, z / seconds
        products = (one * one, one * x, one * z, x * x, x * z, z * z)
        self._sums = [DECAY * old + new for old, new in zip(self._sums, products, strict=True)]
        self._targets = [DECAY * old + new for old, new in zip(self._targets, (one, x, z), strict=True)]
        self.weight = DECAY * self.weight + 1
        self._fresh = False

    @property
    def slopes(self) -> tuple[float, float, float]:
        """Of 1, x and z; the best of all that are not negative, by trying which ones to leave out."""
        if not self._fresh:
            self._values = self._solve()
            self._fresh = True
        return self._values

    def _solve(self) -> tuple[float, float, float]:
        used = [0, 1, 2]
        while used:
            found = self._solve_with(used)
            worst = min(range(len(used)), key=lambda i: found[i])
            if found[worst] >= 0:
                values = dict(zip(used, found, strict=True))
                return values.get(0, 0.0), values.get(1, 0.0), values.get(2, 0.0)
            del used[worst]
        return 0.0, 0.0, 0.0

    def _solve_with(self, used: list[int]) -> list[float]:
        """Gaussian elimination of the normal equations of the features in `used`, each scaled to a diagonal of one."""
        rows = ((0, 1, 2), (1, 3, 4), (2, 4, 5))
        scale = [self._sums[rows[i][i]] ** 0.5 or 1.0 for i in used]
        size = len(used)
        matrix = [
            [self._sums[rows[i][j]] / (scale[a] * scale[b]) for b, j in enumerate(used)] for a, i in enumerate(used)
        ]
        right = [self._targets[i] / scale[a] for a, i in enumerate(used)]
        for a, i in enumerate(used):
            matrix[a][a] = 1.0 if i == self._leading else 1 + RIDGE
        for a in range(size):
            for b in range(a + 1, size):
                factor = matrix[b][a] / matrix[a][a]
                right[b] -= factor * right[a]
                for c in range(a, size):
                    matrix[b][c] -= factor * matrix[a][c]
        found = [0.0] * size
        for a in reversed(range(size)):
            rest = sum(matrix[a][b] * found[b] for b in range(a + 1, size))
            found[a] = (right[a] - rest) / matrix[a][a]
        return [value / scale[a] for a, value in enumerate(found)]
