"""The boards as pictures, drawn from what Prometheus answered: not Grafana's look, but its layout, and the story."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from deploy.observe import Answered
from deploy.panels import COLOURS, COLUMNS
from deploy.promserver import Line

COLUMN_INCHES, ROW_INCHES = 0.75, 0.34
UNITS = {"s": "s", "percentunit": "", "bytes": "B", "Bps": "B/s", "reqps": "/s", "ops": "/s"}


def draw(answers: Sequence[Answered], folder: Path) -> list[Path]:
    """One PNG per board; the paths."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    shown = [answer for answer in answers if answer.asked.kind != "recorded"]
    return [_board(name, list(some), folder) for name, some in groupby(shown, lambda answer: answer.asked.board)]


def _board(name: str, answers: Sequence[Answered], folder: Path) -> Path:
    from matplotlib.figure import Figure

    rows = max(answer.asked.place[1] + answer.asked.place[3] for answer in answers)
    figure = Figure(figsize=(COLUMNS * COLUMN_INCHES, rows * ROW_INCHES))
    figure.suptitle(name, y=0.999, va="top")
    for (panel, place), some in groupby(answers, lambda answer: (answer.asked.panel, answer.asked.place)):
        x, y, width, height = place
        left, right, above, below = 0.9, 0.25, 1.3, 1.2
        axes = figure.add_axes(
            ((x + left) / COLUMNS, 1 - (y + height - below) / rows, (width - left - right) / COLUMNS,
             (height - above - below) / rows)
        )  # fmt: skip
        axes.set_title(panel, fontsize=9, loc="left")
        _panel(axes, list(some))
    path = folder / f"{name}.png"
    figure.savefig(path, dpi=80)
    return path


def _panel(axes: Any, answers: Sequence[Answered]) -> None:
    kind = answers[0].asked.kind
    named = [(_legend(answer, line), line) for answer in answers for line in answer.lines if line.finite]
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    if kind == "stat":
        axes.axis("off")
        text = "\n".join(f"{name} {line.finite[-1][1]:.4g}".strip() for name, line in named)
        axes.text(0, 0.9, text, va="top", fontsize=9)
    elif kind == "bargauge":
        axes.barh([name for name, _ in named], [line.finite[-1][1] for _, line in named])
        axes.set_xlim(0, 1)
    elif kind == "heatmap":
        _heatmap(axes, [line for _, line in named])
    else:
        _lines(axes, named)
        axes.set_ylabel(UNITS.get(answers[0].asked.unit, ""), fontsize=7)


def _lines(axes: Any, named: Sequence[tuple[str, Line]]) -> None:
    begin = min((line.points[0][0] for _, line in named), default=0.0)
    for name, line in named:
        axes.plot([when - begin for when, _ in line.points], [value for _, value in line.points], lw=1, label=name,
                  color=COLOURS.get(name))  # fmt: skip
    if named:
        axes.legend(fontsize=6, frameon=False, ncols=2)


def _heatmap(axes: Any, lines: Sequence[Line]) -> None:
    """Buckets are cumulative: each less the one below it."""
    import numpy as np

    if not lines:
        return
    lines = sorted(lines, key=lambda line: float(line.labels["le"]))
    least = min(len(line.points) for line in lines)
    cumulative = np.array([[value for _, value in line.points[-least:]] for line in lines])
    axes.imshow(np.diff(cumulative, axis=0, prepend=0), aspect="auto", origin="lower", cmap="Oranges")
    axes.set_yticks(range(len(lines)), [line.labels["le"] for line in lines])


def _legend(answer: Answered, line: Line) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda match: line.labels.get(match[1], ""), answer.asked.legend)
