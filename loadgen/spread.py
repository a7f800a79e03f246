"""A length or a time that may vary: one number, or two that it is evenly spread between."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class Spread:
    """From `low` to `high`, both included; without `high`, always `low`."""

    low: float
    high: float | None = None

    @classmethod
    def parse(cls, text: str) -> Spread:
        """`512` or `128-1024`. ValueError when it is neither."""
        low, dash, high = text.partition("-")
        try:
            spread = cls(float(low), float(high) if dash else None)
        except ValueError:
            raise ValueError("must be a number, or LOW-HIGH") from None
        if spread.low < 0 or (spread.high is not None and spread.high < spread.low):
            raise ValueError("must not be negative, and HIGH not below LOW")
        return spread

    def draw(self, rng: Random) -> int:
        """A whole number, at least 1."""
        return max(1, round(self.draw_float(rng)))

    def draw_float(self, rng: Random) -> float:
        return self.low if self.high is None else rng.uniform(self.low, self.high)

    def __str__(self) -> str:
        return f"{self.low:g}" if self.high is None else f"{self.low:g}-{self.high:g}"
