"""To the knee: the highest rate at which a server keeps up.

It keeps up when no request fails, the run ends at the rate that was offered, and, with objectives, nearly every request
meets them. The rate doubles until it does not, then the interval is halved a few times.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from loadgen.bench import Result, Settings
from loadgen.errors import UsageError
from loadgen.report import number

KEPT_UP_SHARE = 0.95
"""Of the offered rate, and of the requests that must be good."""
MAX_DOUBLINGS = 12


@dataclass(frozen=True)
class Point:
    """One rate and what came of it."""

    rate: float
    result: Result
    kept_up: bool
    why: str
    """What it failed at; empty when it kept up."""


def sweep(
    settings: Settings, steps: int, measure: Callable[[Settings], Result], console: Console | None = None
) -> list[Point]:
    """Points in order of rate. The first rate is `settings.request_rate`."""
    if settings.request_rate is None:
        raise UsageError("sweep: say where to start: --request-rate")
    points: list[Point] = []

    def try_rate(rate: float) -> Point:
        result = measure(dataclasses.replace(settings, request_rate=rate, repeats=1))
        why = failing(rate, result)
        points.append(Point(rate, result, not why, why))
        if console is not None:
            console.print(f"{rate:g}/s: {why or 'kept up'}", highlight=False)
        return points[-1]

    rate = settings.request_rate
    low, high = 0.0, rate
    for _ in range(MAX_DOUBLINGS):
        if not try_rate(high).kept_up:
            break
        low, high = high, high * 2
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if try_rate(middle).kept_up else (low, middle)
    return sorted(points, key=lambda point: point.rate)


def failing(rate: float, result: Result) -> str:
    """Why the server did not keep up with `rate`; empty when it did."""
    document = result.document
    if not result.valid:
        return "the client was at its limit"
    if document["failed"]:
        return f"{document['failed']} requests failed"
    starts = document["start_times"]
    offered_s = (len(starts) - 1) / rate if len(starts) > 1 else 0.0
    good = document["request_goodput"]
    if good is not None:
        share = good * document["duration"] / document["num_prompts"]
        return "" if share >= KEPT_UP_SHARE else f"{share:.0%} of the requests met the objectives"
    # Without objectives: what is in flight must not pile up. The tail of the last requests is not the rate's fault.
    tail_s = (document["p99_e2el_ms"] or 0.0) / 1e3
    first = document["terrace"]["turns"]
    if offered_s and not first:
        quarter = max(1, len(starts) // 4)
        early, late = (
            sorted(part)[len(part) // 2] for part in (document["ttfts"][:quarter], document["ttfts"][-quarter:])
        )
        if late > 2 * early and late - early > offered_s * (1 - KEPT_UP_SHARE):
            return f"TTFT grew from {early * 1e3:.0f} to {late * 1e3:.0f} ms: requests pile up"
    if document["duration"] - tail_s > offered_s / KEPT_UP_SHARE and offered_s:
        return f"{document['request_throughput']:.2f}/s came back"
    return ""


def show(points: Sequence[Point], console: Console) -> None:
    """The table of all rates and the knee."""
    table = Table()
    for column in ("rate/s", "came back/s", "TTFT median ms", "TTFT p99 ms", "TPOT p99 ms", "goodput/s", "kept up"):
        table.add_column(column, justify="right")
    for point in points:
        d = point.result.document
        cells = [d["median_ttft_ms"], d["p99_ttft_ms"], d["p99_tpot_ms"], d["request_goodput"]]
        table.add_row(f"{point.rate:g}", f"{d['request_throughput']:.2f}", *map(number, cells), point.why or "yes")
    console.print(table)
    knee = max((point.rate for point in points if point.kept_up), default=None)
    console.print("no rate was kept up with" if knee is None else f"the knee: {knee:g} sessions/s", highlight=False)
