"""Two results, one verdict per figure, and an exit code for CI.

With three or more repeats on both sides the repeats are compared (Welch's interval of the difference). With fewer, the
requests are: a bootstrap of the ratio. A figure is better or worse when the whole 95 % interval lies beyond the
threshold, the same when all of it lies within, and unclear otherwise.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from loadgen.errors import UsageError
from loadgen.measure import STUDENT_95
from loadgen.report import number

FIGURES = {
    "median_ttft_ms": "TTFT median ms",
    "p99_ttft_ms": "TTFT p99 ms",
    "median_tpot_ms": "TPOT median ms",
    "p99_tpot_ms": "TPOT p99 ms",
    "p99_itl_ms": "ITL p99 ms",
    "median_e2el_ms": "end to end median ms",
    "output_throughput": "output tokens/s",
    "request_goodput": "goodput/s",
}
MORE_IS_BETTER = ("output_throughput", "request_goodput")
RESAMPLES = 1000
MIN_REPEATS = 3


@dataclass(frozen=True)
class Verdict:
    """One figure of A and of B. `low`, `high`: 95 % interval of B / A; None when there is too little to tell."""

    figure: str
    before: float
    after: float
    low: float | None
    high: float | None
    word: str
    """better, worse, same or unclear."""

    @property
    def ratio(self) -> float:
        return self.after / self.before if self.before else math.nan


def load(path: Path) -> dict[str, Any]:
    """A result of `terrace bench`, or its folder. UsageError when it is none."""
    file = path / "result.json" if path.is_dir() else path
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise UsageError(f"{path}: not JSON") from None
    if not isinstance(document, dict) or "median_ttft_ms" not in document:
        raise UsageError(f"{path}: not a result of `terrace bench`")
    return document


def compare(before: Mapping[str, Any], after: Mapping[str, Any], threshold: float) -> list[Verdict]:
    """One verdict per figure that both have. `threshold` is a share: 0.05 is five percent."""
    verdicts = []
    for figure in FIGURES:
        a, b = before.get(figure), after.get(figure)
        if a is None or b is None or not a:
            continue
        interval = _of_repeats(figure, before, after) or _of_requests(figure, before, after)
        low, high = interval or (None, None)
        verdicts.append(Verdict(figure, a, b, low, high, _word(figure, b / a, interval, threshold)))
    return verdicts


def _word(figure: str, ratio: float, interval: tuple[float, float] | None, threshold: float) -> str:
    low, high = interval or (ratio, ratio)
    if low > 1 + threshold:
        return "better" if figure in MORE_IS_BETTER else "worse"
    if high < 1 - threshold:
        return "worse" if figure in MORE_IS_BETTER else "better"
    return "same" if low >= 1 - threshold and high <= 1 + threshold else "unclear"


def _of_repeats(figure: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[float, float] | None:
    """Welch's 95 % interval of the difference of means, as ratios to A's mean."""
    sides = [[repeat.get(figure) for repeat in side.get("terrace", {}).get("repeats", [])] for side in (before, after)]
    if any(len(side) < MIN_REPEATS or None in side for side in sides):
        return None
    (mean_a, var_a), (mean_b, var_b) = ((statistics.fmean(s), statistics.variance(s) / len(s)) for s in sides)
    spread = var_a + var_b
    if spread == 0:
        return mean_b / mean_a, mean_b / mean_a
    freedom = spread**2 / sum(v**2 / (len(s) - 1) for v, s in zip((var_a, var_b), sides, strict=True) if v)
    quantile = STUDENT_95[min(len(STUDENT_95), max(1, int(freedom))) - 1]
    half = quantile * math.sqrt(spread)
    return 1 + (mean_b - mean_a - half) / mean_a, 1 + (mean_b - mean_a + half) / mean_a


def _of_requests(figure: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[float, float] | None:
    """Bootstrap over requests of the ratio of a latency's median or percentile; None for rates."""
    statistic = _statistic(figure)
    if statistic is None:
        return None
    name = figure.split("_")[1]
    sides = [np.asarray(_values(side, name)) for side in (before, after)]
    if any(len(side) < 2 for side in sides):
        return None
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(RESAMPLES):
        a, b = (statistic(side[rng.integers(len(side), size=len(side))]) for side in sides)
        if a > 0:
            ratios.append(b / a)
    if not ratios:
        return None
    low, high = np.percentile(ratios, (2.5, 97.5))
    return float(low), float(high)


def _statistic(figure: str) -> Callable[[np.ndarray], float] | None:
    kind = figure.split("_")[0]
    if kind == "median":
        return lambda values: float(np.median(values))
    if kind.startswith("p") and kind[1:].replace(".", "").isdigit():
        return lambda values: float(np.percentile(values, float(kind[1:])))
    return None


def _values(document: Mapping[str, Any], name: str) -> list[float]:
    good = [not error for error in document["errors"]]
    firsts = document["ttfts"]
    gaps: Sequence[Sequence[float]] = document["itls"]
    if name == "ttft":
        return [first for first, fine in zip(firsts, good, strict=True) if fine]
    if name == "itl":
        return [gap for row, fine in zip(gaps, good, strict=True) if fine for gap in row]
    if name == "e2el":
        return [first + sum(row) for first, row, fine in zip(firsts, gaps, good, strict=True) if fine]
    lengths = document["output_lens"]
    rows = zip(gaps, lengths, good, strict=True)
    return [sum(row) / (length - 1) for row, length, fine in rows if fine and length > 1]


def invalid(document: Mapping[str, Any]) -> list[str]:
    """Why a result must not be compared; empty for one of another tool, which does not say."""
    return list(document.get("terrace", {}).get("client", {}).get("invalid_because", []))


def show(verdicts: Sequence[Verdict], console: Console) -> None:
    """The table of verdicts."""
    table = Table()
    for column in ("", "A", "B", "B / A", "95 %", "verdict"):
        table.add_column(column, justify="left" if column in ("", "verdict") else "right")
    styles = {"better": "green", "worse": "bold red", "unclear": "yellow", "same": ""}
    for v in verdicts:
        interval = "" if v.low is None or v.high is None else f"{v.low:.2f}-{v.high:.2f}"
        cells = (FIGURES[v.figure], number(v.before), number(v.after), f"{v.ratio:.3f}", interval)
        table.add_row(*cells, f"[{styles[v.word]}]{v.word}[/]" if styles[v.word] else v.word)
    console.print(table)
