"""Judges the load generator itself: against a server whose every latency is scripted, and up to its own limit.

Truth: log-normal latencies and a stall; each percentile that is reported against the one of the script. Limit: the
client must share its core with others who never rest, and has to say that its figures are no good. Reach: more and more
streams. A run that is off without saying so is a lie, and fails.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from loadgen import bench, report
from loadgen.bench import Result, Settings
from loadgen.measure import LATENCIES, PERCENTILES
from loadgen.scripted import due_times, stalled

RESULT = Path(__file__).parent / "results" / "selftest.json"
GOAL_ERROR = 0.02
GOAL_STREAMS, GOAL_CHUNKS_PER_S = 2000, 20_000.0


@dataclass(frozen=True)
class Case:
    """A load whose answers are scripted. Seconds."""

    name: str
    requests: int
    over_s: float
    """They are sent evenly over this."""
    script: Mapping[str, float]
    """What each request asks of the server; see `scripted.due_times`."""
    stall: tuple[float, float] | None = None
    rivals: int = 0
    """Processes that want the client's core all the time."""

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One line of a JSONL workload each."""
        gap_ms = self.over_s * 1e3 / self.requests
        tokens = int(self.script["tokens"])
        return [
            {"prompt": "tell", "timestamp": n * gap_ms, "output_tokens": tokens, "body": {"script": self._of(n)}}
            for n in range(self.requests)
        ]

    def _of(self, number: int) -> dict[str, float]:
        return {**self.script, "seed": number}

    def injected(self) -> dict[str, float]:
        """Every percentile that a perfect client of a perfect server reports, milliseconds."""
        samples: dict[str, list[float]] = {name: [] for name in LATENCIES}
        for number, row in enumerate(self.rows):
            sent_s = row["timestamp"] / 1e3
            at_s = [stalled(sent_s + due_s, self.stall) for due_s in due_times(self._of(number))]
            samples["ttft"].append(at_s[0] - sent_s)
            samples["e2el"].append(at_s[-1] - sent_s)
            samples["tpot"].append((at_s[-1] - at_s[0]) / (len(at_s) - 1))
            samples["itl"] += np.diff(at_s).tolist()
        return {
            f"p{percentile:g}_{name}_ms": float(np.percentile(samples[name], percentile)) * 1e3
            for name in LATENCIES
            for percentile in PERCENTILES
        }


TRUTH = Case("truth", 2400, 30.0, {"ttft": 0.2, "itl": 0.03, "tokens": 20, "sigma": 0.5}, (12.0, 13.5))


def crowd(streams: int, seconds: float = 10.0, rivals: int = 0) -> Case:
    """So many streams at once, ten chunks a second each; two thousand a second begin, and each lasts `seconds`."""
    script = {"ttft": 0.3, "itl": 0.1, "tokens": 10 * seconds, "sigma": 0.3}
    name = f"{streams:,} streams" + (f", {rivals} busy processes on its core" if rivals else "")
    return Case(name, streams, streams / ARRIVALS_PER_S, script, rivals=rivals)


ARRIVALS_PER_S = 2000.0
LIMIT = crowd(2000, rivals=3)
REACH = tuple(crowd(streams) for streams in (500, 1000, 2000, 4000, 6000))
"""Beyond that it is the scripted server that cannot keep up."""
QUICK = (Case("truth", 60, 1.5, {"ttft": 0.1, "itl": 0.02, "tokens": 10, "sigma": 0.5}, (0.7, 1.0)), crowd(50, 1.0))


@dataclass
class Row:
    """What came of one case."""

    case: str
    requests: int
    streams: int
    """At once, at most."""
    chunks_per_s: float
    """While that many were there: the median over the run's tenths of a second that had any."""
    lateness_p99_ms: float
    lag_p99_ms: float
    cpu_share: float
    server_late_p99_ms: float
    worst: str
    """The figure that is furthest from what was injected."""
    error: float
    """How far, as a share of what was injected."""
    failed: int
    invalid: list[str] = field(default_factory=list)
    injected: dict[str, float] = field(default_factory=dict)
    reported: dict[str, float] = field(default_factory=dict)

    @property
    def lies(self) -> bool:
        """Off, and not marked."""
        return not self.invalid and (self.error > GOAL_ERROR or self.failed > 0)


@contextmanager
def scripted_server(flags: Sequence[str] = ()) -> Iterator[tuple[str, list[float]]]:
    """The URL of a server process that ends with the block; then the list has the p99 of its lateness, seconds."""
    command = [sys.executable, "-m", "loadgen.scripted", *flags]
    root = Path(__file__).parent.parent
    late: list[float] = []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}", late
        finally:
            out, _ = process.communicate()
        late.append(float(out))


@contextmanager
def crowded_core(rivals: int) -> Iterator[None]:
    """This process has one core only, and `rivals` that never rest have the same one. Nothing when there are none."""
    if not rivals:
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(rivals)]
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        for process in busy:
            process.kill()
            process.wait()


def measured(case: Case) -> Row:
    """Run one case the way `terrace bench --workload jsonl` does."""
    with (
        tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file,
        scripted_server([] if case.stall is None else ["--stall", *map(str, case.stall)]) as (url, late),
        crowded_core(case.rivals),
    ):
        file.writelines(json.dumps(row) + "\n" for row in case.rows)
        file.flush()
        settings = Settings(base_url=url, workload="jsonl", parameters={"path": file.name}, sessions=None, warmup=8)
        result = bench.run_sync(settings)
    return judged(case, result, late[0])


def judged(case: Case, result: Result, server_late_s: float) -> Row:
    """Hold what was reported against what was injected."""
    document, injected = result.document, case.injected()
    errors = {key: abs(document[key] - value) / value for key, value in injected.items()}
    worst = max(errors, key=errors.__getitem__)
    client = document["terrace"]["client"]
    return Row(
        case.name, case.requests, document["max_concurrent_requests"], chunk_rate(result),
        client["lateness_ms"]["p99"], client["loop_lag_ms"]["p99"], client["cpu_share"], server_late_s * 1e3, worst,
        errors[worst], document["failed"], client["invalid_because"], injected,
        {key: document[key] for key in injected},
    )  # fmt: skip


def chunk_rate(result: Result) -> float:
    """Chunks per second in the middle half of the run."""
    at_s = np.sort([at for outcome in result.outcomes for at in outcome.chunk_s])
    low, high = np.quantile(at_s, (0.25, 0.75))
    return float(((at_s >= low) & (at_s < high)).sum() / (high - low))


def verdicts(truth: Row, limit: Row, crowds: Sequence[Row]) -> list[dict[str, Any]]:
    """The goals, and whether they are met."""
    best = max((row for row in crowds if not row.invalid), key=lambda row: row.streams, default=None)
    reached = "nothing" if best is None else f"{best.streams:,} and {best.chunks_per_s:,.0f}"
    return [
        {"statement": f"truth: every percentile within {GOAL_ERROR:.0%} of what was injected ({truth.error:.2%})",
         "met": truth.error <= GOAL_ERROR and not truth.invalid},
        {"statement": f"limit: marked invalid (off by {limit.error:.0%})", "met": bool(limit.invalid)},
        {"statement": "no run was off without being marked", "met": not any(r.lies for r in (truth, limit, *crowds))},
        {"statement": f"reach: {GOAL_STREAMS:,} streams and {GOAL_CHUNKS_PER_S:,.0f} chunks/s with lateness p99 below "
                      f"5 ms ({reached})",
         "met": best is not None and best.streams >= GOAL_STREAMS and best.chunks_per_s >= GOAL_CHUNKS_PER_S},
    ]  # fmt: skip


HEADER = (
    "| case | streams | chunks/s | sent late, p99 | loop lag, p99 | CPU | worst percentile is off by | marked |",
    "|---|---|---|---|---|---|---|---|",
)


def line(row: Row) -> str:
    """One line of the table."""
    cells = [row.case, f"{row.streams:,}", f"{row.chunks_per_s:,.0f}", f"{row.lateness_p99_ms:.2f} ms",
             f"{row.lag_p99_ms:.2f} ms", f"{row.cpu_share:.0%}", f"{row.error:.2%} ({row.worst})",
             "invalid" if row.invalid else ""]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def table(path: Path = RESULT) -> str:
    """The documentation's table, from what was kept."""
    if not path.is_file():
        return "Nothing was measured yet."
    document = json.loads(path.read_text(encoding="utf-8"))
    lines = [*HEADER, *(line(Row(**row)) for row in document["rows"])]
    return "\n".join([*lines, "", *map(verdict_line, document["verdicts"])])


def verdict_line(verdict: Mapping[str, Any]) -> str:
    return f"- {'goal met' if verdict['met'] else '**goal missed**'}: {verdict['statement']}"


def main(*, quick: bool, output: Path | None) -> int:
    """Measure, print and keep; 1 when a goal is missed. `quick` proves that it runs: no goals, nothing is kept."""
    console = Console()

    def shown(case: Case) -> Row:
        row = measured(case)
        console.print(line(row), highlight=False, soft_wrap=True)
        return row

    for text in HEADER:
        console.print(text, highlight=False, soft_wrap=True)
    if quick:
        return 1 if any(shown(case).failed for case in QUICK) else 0
    truth, limit, *crowds = [shown(case) for case in (TRUTH, LIMIT, *REACH)]
    found = verdicts(truth, limit, crowds)
    document = {"date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()), "environment": report.environment(),
                "rows": [vars(row) for row in (truth, limit, *crowds)], "verdicts": found}  # fmt: skip
    for verdict in found:
        console.print(verdict_line(verdict), highlight=False, soft_wrap=True)
    path = output or RESULT
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, separators=(",", ":")) + "\n", encoding="utf-8")
    return 0 if all(verdict["met"] for verdict in found) else 1
