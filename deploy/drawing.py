"""The boards as pictures, drawn from what Prometheus answered: Grafana's layout and the story, not its look."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from deploy.observe import Answered
from deploy.panels import COLOURS, COLUMNS
from deploy.promserver import Line

COLUMN_INCHES, ROW_INCHES = 0.75, 0.34
MARGINS = {"left": 0.9, "right": 0.25, "above": 1.3, "below": 1.2}
"""Of a panel, in columns and rows of the grid."""
UNITS = {"s": "s", "bytes": "B", "Bps": "B/s", "reqps": "/s", "ops": "/s"}
Named = Sequence[tuple[str, Line]]
"""Series by legend."""


def draw(answers: Sequence[Answered], folder: Path) -> list[Path]:
    """One PNG per board; the paths. Needs matplotlib."""
    folder.mkdir(parents=True, exist_ok=True)
    of_boards = [answer for answer in answers if "gridPos" in answer.asked.panel]
    return [_board(name, list(some), folder) for name, some in groupby(of_boards, lambda answer: answer.asked.board)]


def _board(name: str, answers: Sequence[Answered], folder: Path) -> Path:
    from matplotlib.figure import Figure

    places = [answer.asked.panel["gridPos"] for answer in answers]
    rows = max(place["y"] + place["h"] for place in places)
    figure = Figure(figsize=(COLUMNS * COLUMN_INCHES, rows * ROW_INCHES))
    figure.suptitle(name, y=0.999, va="top")
    for _, some in groupby(answers, lambda answer: answer.asked.panel["id"]):
        panel_answers = list(some)
        panel = panel_answers[0].asked.panel
        axes = figure.add_axes(_place(panel["gridPos"], rows))
        axes.set_title(panel["title"], fontsize=9, loc="left")
        _panel(axes, panel, [(_legend(a, line), line) for a in panel_answers for line in a.lines if line.finite])
    path = folder / f"{name}.png"
    figure.savefig(path, dpi=80)
    return path


def _place(place: Mapping[str, int], rows: int) -> tuple[float, float, float, float]:
    """Left, bottom, width and height as shares of the figure."""
    left, right, above, below = MARGINS.values()
    bottom = 1 - (place["y"] + place["h"] - below) / rows
    width, height = place["w"] - left - right, place["h"] - above - below
    return (place["x"] + left) / COLUMNS, bottom, width / COLUMNS, height / rows


def _panel(axes: Any, panel: Mapping[str, Any], named: Named) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylabel(UNITS.get(defaults["unit"], ""), fontsize=7)
    if panel["type"] == "stat":
        axes.axis("off")
        form = ".1%" if defaults["unit"] == "percentunit" else ".4g"
        text = "\n".join(f"{name} {line.finite[-1][1]:{form}}".strip() for name, line in named)
        axes.text(0, 0.9, text, va="top", fontsize=9)
    elif panel["type"] == "bargauge":
        names, values = [name for name, _ in named], [line.finite[-1][1] for _, line in named]
        axes.barh(names, values, color=[COLOURS.get(name) for name in names])
        axes.set_xlim(0, 1)
    elif panel["type"] == "heatmap":
        _heatmap(axes, [line for _, line in named])
    else:
        _lines(axes, defaults["custom"], named)


def _lines(axes: Any, look: Mapping[str, Any], named: Named) -> None:
    """Over seconds since the first point of all."""
    import numpy as np
    from matplotlib.ticker import LogLocator

    times = sorted({when for _, line in named for when, _ in line.points})
    at = [when - times[0] for when in times]
    series = [[dict(line.points).get(when, float("nan")) for when in times] for _, line in named]
    names = [name for name, _ in named]
    colours = [COLOURS.get(name, f"C{number}") for number, name in enumerate(names)]
    if look.get("stacking", {}).get("mode") == "normal":
        tops = np.cumsum(np.nan_to_num(series), axis=0)
        for name, colour, top, below in zip(names, colours, tops, [np.zeros(len(at)), *tops]):
            axes.fill_between(at, below, top, label=name, color=colour, alpha=0.7, lw=0)
    else:
        for name, colour, values in zip(names, colours, series):
            axes.plot(at, values, lw=1, label=name, color=colour)
    if look.get("scaleDistribution", {}).get("type") == "log":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    if named:
        axes.legend(fontsize=6, frameon=False, ncols=2)


def _heatmap(axes: Any, lines: Sequence[Line]) -> None:
    """Buckets are cumulative: each less the one below it."""
    import numpy as np

    if not lines:
        return
    lines = sorted(lines, key=lambda line: float(line.labels["le"]))
    length = min(len(line.points) for line in lines)
    cumulative = np.array([[value for _, value in line.points[-length:]] for line in lines])
    axes.imshow(np.diff(cumulative, axis=0, prepend=0), aspect="auto", origin="lower", cmap="Oranges")
    axes.set_yticks(range(len(lines)), [line.labels["le"] for line in lines])


def _legend(answer: Answered, line: Line) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda match: line.labels.get(match[1], ""), answer.asked.legend)
