"""What is found: lines, the goals that they are held to, the table, and the result that is kept.

Knows figures and limits; refuses to know how anything is measured.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from server.bench.gpu.sizes import Sizes
from server.bench.report import Report, environment

RESULTS = Path(__file__).parents[3] / "loadgen" / "results"
WIDTH = 62
"""Of the column that says what was measured."""


@dataclass(frozen=True)
class Line:
    """One figure. `key`: by which goals and later parts know it; `value`: None where it could not be had, and `note`
    says why. `share`: of what the machine allows, or of what it is compared with; a goal judges it where there is one,
    else the value."""

    key: str
    what: str
    value: float | None
    unit: str
    share: float | None = None
    note: str = ""
    raw: Mapping[str, Any] = field(default_factory=dict)

    @property
    def judged(self) -> float | None:
        return self.value if self.share is None else self.share


def failed(key: str, what: str, unit: str, error: Exception) -> Line:
    """In place of a figure that could not be had: the others go on."""
    return Line(key, what, None, unit, note=f"failed: {type(error).__name__}: {error}".split("\n")[0][:160])


@dataclass(frozen=True)
class Goal:
    """The line `key` must be at least `limit`, or at most that."""

    key: str
    says: str
    limit: float
    least: bool = True

    def met(self, line: Line | None) -> bool:
        judged = None if line is None else line.judged
        if judged is None:
            return False
        return judged >= self.limit if self.least else judged <= self.limit

    def statement(self, line: Line | None) -> str:
        judged = None if line is None else line.judged
        found = "not measured" if judged is None else f"{judged:.3g}"
        return f"{self.says}: {found}, goal {'>=' if self.least else '<='} {self.limit:g}"


def goals(sizes: Sizes) -> list[Goal]:
    """All there are, in the order of the table."""
    context = sizes.contexts[0]
    return [
        Goal("tier.up", "DRAM to device through the tier, of the link", 0.85),
        *(Goal(f"decode.{rows}", f"decode of {rows} rows from {context:,} tokens on, of the roofline", 0.8)
          for rows in sizes.rows),
        Goal("decode.launch", f"device thread per decode step of {sizes.rows[-1]} rows, ms", 1.0, least=False),
        Goal("decode.moving", "p99 between tokens while blocks come and go, times that in quiet", 1.05, least=False),
        *(Goal(f"prefill.{prompt}", f"prefill of {prompt:,} tokens, of the matrix product", 0.55)
          for prompt in sizes.prompts),
        Goal("ttft.dram", f"TTFT of {sizes.prefix:,} tokens found in DRAM, of computing them", 0.2, least=False),
        Goal("ttft.ssd", f"TTFT of {sizes.ssd_prefix:,} tokens found on SSD, of computing them", 1.05, least=False),
        Goal("ttft.ssd.slow", "the same with a slow disk", 1.05, least=False),
        Goal("engine.host", f"loop thread per decode step of {sizes.rows[-1]} rows, ms", 1.0, least=False),
        Goal("engine.launch", "device thread per such step of the daemon, ms", 1.0, least=False),
        Goal("http", f"{sizes.streams} streams over HTTP, of the engine's own tokens/s", 0.9),
    ]  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """How a part went. `problem`: empty, or why it has not all of its lines."""

    part: str
    seconds: float
    problem: str


class Table:
    """Lines as they come, on the terminal."""

    def __init__(self, *, dry: bool) -> None:
        self._report = Report("gpu", quick=dry)
        self._report.header(f"{'what':>{WIDTH}}", "value", "unit", "share", "note")

    def part(self, name: str) -> None:
        self._report.row(f"--- {name} ---", "", "", "", "")

    def line(self, line: Line) -> None:
        value = "-" if line.value is None else f"{line.value:,.3f}" if line.value < 100 else f"{line.value:,.0f}"
        share = "" if line.share is None else f"{line.share:.3f}"
        self._report.row(line.what, value, line.unit, share, line.note)

    def outcome(self, outcome: Outcome) -> None:
        if outcome.problem:
            self._report.row(f"{outcome.part}: {outcome.problem}", "", "", "", "")

    def verdict(self, wanted: Iterable[Goal], lines: Sequence[Line]) -> int:
        """Says which goals are met; how many are not."""
        by_key = {line.key: line for line in lines}
        for goal in wanted:
            line = by_key.get(goal.key)
            self._report.goal(goal.statement(line), met=goal.met(line))
        self._report.print_verdict()
        return len(self._report.missed)


def document(
    facts: Mapping[str, Any],
    wanted: Iterable[Goal],
    lines: Sequence[Line],
    outcomes: Sequence[Outcome],
    *,
    dry: bool,
    commit: str,
) -> dict[str, Any]:
    """Everything, for JSON. `facts`: of the device; `commit`: what was measured, "" to ask git."""
    where = environment()
    by_key = {line.key: line for line in lines}
    judged = [
        {"key": goal.key, "says": goal.says, "limit": goal.limit, "least": goal.least,
         "value": by_key[goal.key].judged if goal.key in by_key else None, "met": goal.met(by_key.get(goal.key))}
        for goal in wanted
    ]  # fmt: skip
    return {
        "benchmark": "gpu",
        "dry": dry,
        "device": dict(facts),
        "environment": where | ({"commit": commit} if commit else {}),
        "parts": [asdict(outcome) for outcome in outcomes],
        "lines": [asdict(line) for line in lines],
        "goals": judged,
    }


def save(found: Mapping[str, Any], folder: Path) -> Path:
    """Write it; the path, named by the device."""
    name = re.sub(r"[^a-z0-9]+", "-", str(found["device"]["name"]).lower()).strip("-")
    path = folder / f"gpu-{name}.json"
    path.write_text(json.dumps(found, separators=(",", ":")) + "\n", encoding="utf-8")
    return path
