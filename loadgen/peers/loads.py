"""What is asked of every server, which figures come of it, what ours must reach; and how to read figures off a run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from loadgen.bench import Result, Settings
from loadgen.measure import tokens_of, tpot_s, ttft_s
from loadgen.records import Outcome

TURNS = 6
Read = Callable[[Sequence[Outcome]], float]


@dataclass(frozen=True)
class Figure:
    """One number of a load."""

    key: str
    title: str
    unit: str
    read: Read
    goal: float | None = None
    """At least so many times as good as the best peer."""
    more_is_better: bool = False


@dataclass(frozen=True)
class Load:
    """One load, and what is read off it."""

    name: str
    says: str
    settings: Settings
    figures: tuple[Figure, ...]
    most_rounds: int | None = None
    """Of a load that takes long and has many requests in each round."""

    def quick(self) -> Load:
        """The same with little of it: proves that it runs."""
        few = max(2, (self.settings.sessions or 0) // 6)
        parameters = self.settings.parameters
        if "output" in parameters:
            parameters = parameters | {"output": str(min(int(parameters["output"]), 16))}
        return replace(self, settings=replace(self.settings, sessions=few, parameters=parameters))


def ttft_ms(share: float, pick: Callable[[Outcome], bool] = lambda outcome: True) -> Read:
    """The quantile `share` of TTFT over the requests that `pick` takes."""
    return lambda outcomes: float(np.quantile([1e3 * ttft_s(o) for o in outcomes if pick(o)], share))


def later_ttft_ms(share: float) -> Read:
    """Over the later half of the sessions."""

    def read(outcomes: Sequence[Outcome]) -> float:
        middle = (max(o.session for o in outcomes) + 1) / 2
        return ttft_ms(share, lambda o: o.session >= middle)(outcomes)

    return read


def tpot_ms(share: float) -> Read:
    return lambda outcomes: float(np.quantile([1e3 * t for o in outcomes if (t := tpot_s(o)) is not None], share))


def decode_rate(outcomes: Sequence[Outcome]) -> float:
    """Output tokens per second of one stream, after the first."""
    gap_ms = tpot_ms(0.5)(outcomes)
    if not gap_ms:
        raise ValueError("all tokens came at once: the model is too small to be timed")
    return 1e3 / gap_ms


def output_rate(outcomes: Sequence[Outcome]) -> float:
    """Output tokens per second of all requests together."""
    first_s, last_s = min(o.scheduled_s for o in outcomes), max(o.end_s for o in outcomes)
    return sum(tokens_of(o) for o in outcomes) / (last_s - first_s)


def prompt_rate(outcomes: Sequence[Outcome]) -> float:
    """Prompt tokens per second until the first token is out."""
    return statistics.median(o.prompt_tokens / ttft_s(o) for o in outcomes)


def _settings(workload: str, sessions: int, at_once: int, **parameters: object) -> Settings:
    shown = {key: str(value) for key, value in parameters.items()}
    return Settings(workload=workload, parameters=shown, sessions=sessions, max_concurrency=at_once, warmup=1)


DRAWN = {"temperature": 0.7, "top_p": 0.95}
"""What a request of a load asks for that draws its tokens; all others are greedy."""


def _turn(number: int) -> Figure:
    return Figure(f"turn_{number + 1}", f"TTFT of turn {number + 1}", "ms", ttft_ms(0.5, lambda o: o.turn == number))


LOADS = (
    Load(
        "single",
        "One stream: 128 tokens of prompt, 128 of output.",
        _settings("random", 2, 1, input=128, output=128),
        (
            Figure("decode", "decode", "tok/s", decode_rate, goal=1.0, more_is_better=True),
            Figure("ttft_p50", "TTFT p50", "ms", ttft_ms(0.5)),
            Figure("tpot_p50", "TPOT p50", "ms", tpot_ms(0.5)),
            Figure("tpot_p99", "TPOT p99", "ms", tpot_ms(0.99)),
        ),
    ),
    Load(
        "drawn",
        "One stream, its tokens drawn at a temperature of 0.7 with a top_p of 0.95.",
        replace(_settings("random", 2, 1, input=128, output=128), body=DRAWN),
        (
            Figure("decode", "decode", "tok/s", decode_rate, goal=1.0, more_is_better=True),
            Figure("tpot_p50", "TPOT p50", "ms", tpot_ms(0.5)),
            Figure("tpot_p99", "TPOT p99", "ms", tpot_ms(0.99)),
        ),
    ),
    Load(
        "concurrent",
        "16 at once: 128 tokens of prompt, 64 of output.",
        _settings("random", 16, 16, input=128, output=64),
        (
            Figure("output", "output of all", "tok/s", output_rate, goal=1.2, more_is_better=True),
            Figure("ttft_p50", "TTFT p50", "ms", ttft_ms(0.5)),
            Figure("ttft_p99", "TTFT p99", "ms", ttft_ms(0.99)),
            Figure("tpot_p50", "TPOT p50", "ms", tpot_ms(0.5)),
            Figure("tpot_p99", "TPOT p99", "ms", tpot_ms(0.99)),
        ),
    ),
    Load(
        "prefill",
        "Prompts of 2,048 tokens, one at a time.",
        _settings("random", 2, 1, input=2048, output=2),
        (
            Figure("prompt", "prompt", "tok/s", prompt_rate, goal=1.0, more_is_better=True),
            Figure("ttft_p50", "TTFT p50", "ms", ttft_ms(0.5)),
        ),
    ),
    Load(
        "shared",
        "A system prompt of 1,500 tokens, then 50 of one's own; one at a time, the first one not counted.",
        _settings("shared-prefix", 7, 1, groups=1, prefix=1500, question=50, output=8),
        (
            Figure("ttft_p50", "TTFT p50", "ms", ttft_ms(0.5, lambda o: o.session > 0), goal=2.0),
            Figure("ttft_p99", "TTFT p99", "ms", ttft_ms(0.99, lambda o: o.session > 0)),
        ),
    ),
    Load(
        "many-shared",
        "16 such system prompts, three times as many tokens as the first tier holds, one drawn for each request; one "
        "at a time, the first half not counted.",
        _settings("shared-prefix", 48, 1, groups=16, prefix=1500, question=50, output=8),
        (
            Figure("ttft_p50", "TTFT p50", "ms", later_ttft_ms(0.5), goal=2.0),
            Figure("ttft_p99", "TTFT p99", "ms", later_ttft_ms(0.99)),
        ),
        most_rounds=3,
    ),
    Load(
        "multi-turn",
        "12 conversations at once, each of 6 turns: more tokens than the first tier holds.",
        _settings("multi-turn", 12, 12, turns=TURNS, first=600, question=60, output=8, think_s=1),
        (
            Figure("later_p50", "TTFT p50, turns 2-6", "ms", ttft_ms(0.5, lambda o: o.turn > 0), goal=2.0),
            Figure("later_p99", "TTFT p99, turns 2-6", "ms", ttft_ms(0.99, lambda o: o.turn > 0)),
            *map(_turn, range(TURNS)),
        ),
        most_rounds=3,
    ),
)  # fmt: skip
WARM_UP = (
    _settings("random", 16, 16, input=64, output=8),
    _settings("random", 1, 1, input=2048, output=2),
)
"""Before anything is counted: every size of step was there once."""


def figures_of(load: Load, result: Result) -> dict[str, float]:
    """By key. ValueError when a request failed: figures of the others would be of another load."""
    failed = [o for o in result.outcomes if o.error is not None]
    if failed:
        raise ValueError(f"{len(failed)} of {len(result.outcomes)} requests failed: {failed[0].detail}")
    return {figure.key: figure.read(result.outcomes) for figure in load.figures}
