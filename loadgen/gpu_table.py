"""`python -m loadgen.gpu_table`: what was measured on GPUs, of the kept results, as the documentation has it.

Knows the results that `python -m server.bench.gpu --save` leaves in results/; refuses to know how they came about.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loadgen.report import number

RESULTS = Path(__file__).parent / "results"
NOTHING = "No GPU has been measured yet."


def kept(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The results in the repository; dry runs are none."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("gpu-*.json"))]
    return [result for result in found if not result["dry"]]


def markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """A table for each device; one sentence where there is none."""
    return "\n\n".join(map(_table, results)) or NOTHING


def _table(result: Mapping[str, Any]) -> str:
    goals = {goal["key"]: goal for goal in result["goals"]}
    lines = [f"**{_title(result)}**", "", "| what | value | share | goal | |", "|---|---|---|---|---|"]
    for line in result["lines"]:
        share = "" if line["share"] is None else f"{line['share']:.2f}"
        goal = goals.pop(line["key"], None)
        cells = (line["what"], f"{number(line['value'])} {line['unit']}", share, _goal(goal), line["note"])
        lines.append(_row(cells))
    lines += [_row((goal["says"], "not measured", "", _goal(goal), "")) for goal in goals.values()]
    troubles = [f"- {part['part']}: {part['problem']}" for part in result["parts"] if part["problem"]]
    return "\n".join([*lines, *([""] if troubles else []), *troubles])


def _title(result: Mapping[str, Any]) -> str:
    device, where = result["device"], result["environment"]
    versions = where["versions"]
    return (
        f"{device['name']}, driver {device.get('driver', 'unknown')}, CUDA {device.get('cuda', 'unknown')}, "
        f"torch {versions['torch']}, FlashInfer {device.get('flashinfer', 'absent')}, commit {where['commit']}"
    )


def _goal(goal: Mapping[str, Any] | None) -> str:
    if goal is None:
        return ""
    return f"{'>=' if goal['least'] else '<='} {goal['limit']:g}: " + ("met" if goal["met"] else "**missed**")


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def main() -> int:
    """Print the tables."""
    print(markdown(kept()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
