"""From what the client saw to figures: TTFT, TPOT, ITL, end-to-end latency, goodput, and how sure they are."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loadgen.driver import Run
from loadgen.errors import UsageError
from loadgen.records import Outcome

PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)
LATENCIES = ("ttft", "tpot", "itl", "e2el")
FORMULAS = {
    "ttft": "arrival of the first token - scheduled time",
    "tpot": "(arrival of the last token - arrival of the first) / (output tokens - 1), per request",
    "itl": "gap between two chunks with output that follow each other, all requests together",
    "e2el": "arrival of the last token - scheduled time",
    "goodput": "requests that succeeded and met every objective, per second",
    "lateness": "time of sending - scheduled time",
}
# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom; beyond the table the normal one is used.
STUDENT_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


@dataclass(frozen=True)
class Objectives:
    """What a request must meet to count as good, milliseconds by latency."""

    limits_ms: Mapping[str, float]

    @classmethod
    def parse(cls, texts: Sequence[str]) -> Objectives:
        """`ttft:200 tpot:50`, also with commas between. UsageError when one is not such a pair."""
        limits: dict[str, float] = {}
        for text in (part for item in texts for part in item.split(",") if part):
            name, _, limit = text.partition(":")
            try:
                limits[name] = float(limit)
            except ValueError:
                raise UsageError(f"--goodput {text}: must look like ttft:200, in milliseconds") from None
            if name not in ("ttft", "tpot", "e2el"):
                raise UsageError(f"--goodput {text}: there are ttft, tpot and e2el")
        return cls(limits)

    def met(self, outcome: Outcome) -> bool:
        """Whether this request succeeded within every limit."""
        values = {"ttft": ttft_s, "tpot": tpot_s, "e2el": e2el_s}
        return outcome.error is None and all(
            (value := values[name](outcome)) is None or value * 1e3 <= limit for name, limit in self.limits_ms.items()
        )


def ttft_s(outcome: Outcome) -> float:
    return outcome.first_s - outcome.scheduled_s


def e2el_s(outcome: Outcome) -> float:
    return outcome.last_s - outcome.scheduled_s


def tokens_of(outcome: Outcome) -> int:
    """Output tokens as the server counted them, or chunks where it does not say."""
    return outcome.output_tokens or len(outcome.chunk_s)


def tpot_s(outcome: Outcome) -> float | None:
    """None for a single token: there is nothing between."""
    tokens = tokens_of(outcome)
    return (outcome.last_s - outcome.first_s) / (tokens - 1) if tokens > 1 else None


def itl_s(outcome: Outcome) -> list[float]:
    return [after - before for before, after in zip(outcome.chunk_s, outcome.chunk_s[1:], strict=False)]


def latencies_ms(good: Sequence[Outcome]) -> dict[str, list[float]]:
    """All samples of the four latencies of requests that succeeded."""
    return {
        "ttft": [ttft_s(o) * 1e3 for o in good],
        "tpot": [t * 1e3 for o in good if (t := tpot_s(o)) is not None],
        "itl": [gap * 1e3 for o in good for gap in itl_s(o)],
        "e2el": [e2el_s(o) * 1e3 for o in good],
    }


def distribution(name: str, samples: Sequence[float]) -> dict[str, float | None]:
    """mean, median, std and percentiles (linear interpolation) under the keys that other tools use; None: no sample."""
    shown = np.asarray(samples, float)
    some = bool(len(shown))
    values: dict[str, float | None] = {
        f"mean_{name}_ms": float(shown.mean()) if some else None,
        f"median_{name}_ms": float(np.median(shown)) if some else None,
        f"std_{name}_ms": float(shown.std()) if some else None,
    }
    found = np.percentile(shown, PERCENTILES) if some else [None] * len(PERCENTILES)
    for percentile, value in zip(PERCENTILES, found, strict=True):
        values[f"p{percentile:g}_{name}_ms"] = None if value is None else float(value)
    return values


def summarize(run: Run, objectives: Objectives) -> dict[str, Any]:
    """One run's figures: counts, rates, distributions, what the client was like."""
    good = [o for o in run.outcomes if o.error is None]
    seconds = run.seconds or math.nan
    inputs, outputs = sum(o.prompt_tokens for o in good), sum(tokens_of(o) for o in good)
    document: dict[str, Any] = {
        "duration": run.seconds,
        "completed": len(good),
        "failed": len(run.outcomes) - len(good),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(good) / seconds,
        "request_goodput": sum(map(objectives.met, good)) / seconds if objectives.limits_ms else None,
        "output_throughput": outputs / seconds,
        "total_token_throughput": (inputs + outputs) / seconds,
        "max_concurrent_requests": most_at_once(run.outcomes),
    }
    for name, samples in latencies_ms(good).items():
        document |= distribution(name, samples)
    return document


def client_section(run: Run) -> dict[str, Any]:
    """What tells whether the client kept up, and latency from the time of sending for comparison."""
    good = [o for o in run.outcomes if o.error is None]
    late_ms = [(o.sent_s - o.scheduled_s) * 1e3 for o in run.outcomes]
    from_sent = distribution("ttft", [(o.first_s - o.sent_s) * 1e3 for o in good])
    from_sent |= distribution("e2el", [(o.last_s - o.sent_s) * 1e3 for o in good])
    return {
        "valid": not run.invalid,
        "interrupted": run.interrupted,
        "invalid_because": run.invalid,
        "lateness_ms": _spread(late_ms),
        "loop_lag_ms": _spread([lag * 1e3 for lag in run.lag_s]),
        "cpu_share": run.cpu_share,
        "from_sent": from_sent,
    }


def cache_section(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Prompt tokens by where their KV came from, as the answers' usage says."""
    good = [o for o in outcomes if o.error is None]
    by_tier: Counter[str] = Counter()
    for outcome in good:
        by_tier.update(outcome.cached_by_tier)
    prompt, cached = sum(o.prompt_tokens for o in good), sum(o.cached_tokens for o in good)
    return {"prompt_tokens": prompt, "cached_tokens": cached, "by_tier": dict(by_tier),
            "hit_ratio": cached / prompt if prompt else None}  # fmt: skip


def turns_section(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """TTFT and hits by turn, where sessions have several."""
    rows = []
    for turn in range(1 + max((o.turn for o in outcomes), default=0)):
        good = [o for o in outcomes if o.turn == turn and o.error is None]
        if good:
            ttft = distribution("ttft", [ttft_s(o) * 1e3 for o in good])
            rows.append({"turn": turn + 1, "completed": len(good), **cache_section(good), **ttft})
    return rows if len(rows) > 1 else []


def errors_section(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """How often each kind of failure, with one example."""
    kinds = Counter(o.error for o in outcomes if o.error)
    return {
        kind: {"count": count, "example": next(o.detail for o in outcomes if o.error == kind)}
        for kind, count in kinds.most_common()
    }


def confidence(repeats: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """95 % interval of the mean over repeats of every figure that is a number in all of them (Student's t)."""
    if len(repeats) < 2:
        return {}
    quantile = STUDENT_95[len(repeats) - 2] if len(repeats) - 2 < len(STUDENT_95) else 1.96
    intervals = {}
    for key in repeats[0]:
        values = [repeat.get(key) for repeat in repeats]
        if all(isinstance(value, int | float) for value in values):
            numbers = [float(value) for value in values if value is not None]
            half = quantile * statistics.stdev(numbers) / math.sqrt(len(numbers))
            intervals[key] = [statistics.fmean(numbers) - half, statistics.fmean(numbers) + half]
    return intervals


def most_at_once(outcomes: Sequence[Outcome]) -> int:
    """The most requests that were in flight at one time."""
    edges = sorted([(o.sent_s, 1) for o in outcomes] + [(o.end_s, -1) for o in outcomes])
    most = now = 0
    for _, step in edges:
        now += step
        most = max(most, now)
    return most


def timeline(outcomes: Sequence[Outcome], points: int = 200) -> dict[str, list[float]]:
    """Requests in flight and output chunks per second over the run, for a plot."""
    end_s = max((o.end_s for o in outcomes), default=0.0)
    if end_s <= 0:
        return {"t_s": [], "in_flight": [], "chunks_per_s": []}
    edges = np.linspace(0, end_s, points + 1)
    starts, ends = (np.sort([getattr(o, name) for o in outcomes]) for name in ("sent_s", "end_s"))
    middle = (edges[:-1] + edges[1:]) / 2
    in_flight = np.searchsorted(starts, middle, "right") - np.searchsorted(ends, middle, "right")
    chunks, _ = np.histogram([at for o in outcomes for at in o.chunk_s], edges)
    return {"t_s": middle.tolist(), "in_flight": in_flight.tolist(),
            "chunks_per_s": (chunks / (edges[1] - edges[0])).tolist()}  # fmt: skip


def merged(runs: Sequence[Run], pick: Callable[[Run], Sequence[Outcome]] = lambda run: run.outcomes) -> list[Outcome]:
    """The outcomes of all repeats."""
    return [outcome for run in runs for outcome in pick(run)]


def _spread(samples: Sequence[float]) -> dict[str, float]:
    values = np.asarray(samples if samples else [0.0], float)
    p50, p99 = np.percentile(values, (50, 99))
    return {"p50": float(p50), "p99": float(p99), "max": float(values.max())}
