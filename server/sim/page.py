"""simulation.html, one file with everything in it, and its plots as PNG."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loadgen.page import COLOURS, Plot, can_plot, figure, rendered, save
from server.sim import summary
from server.sim.stalls import CAUSES
from server.sim.summary import Column, Row

WIDTH, HEAD, LINE = 6.4, 1.05, 0.27
"""Inches: of a plot, of what is around its bars, and of a bar."""
LOG_FROM = 20
"""Times are on a logarithmic axis where the longest is more than so many times the shortest."""
CAUSE_COLOURS = dict(zip(CAUSES, ("#9aa5b1", "#e08e45", "#e9c46a", "#2a9d8f", "#c0504d"), strict=True))


def write(folder: Path, document: Mapping[str, Any]) -> list[Path]:
    """simulation.html and, with matplotlib, one PNG per plot; the paths."""
    drawn = draw(document)
    return save(folder, "simulation.html", html(document, drawn), drawn)


def html(document: Mapping[str, Any], plots: Mapping[str, Plot]) -> str:
    """The page."""
    tables = [
        _table(chosen, document["rows"]) for chosen in (summary.columns(document), summary.stall_columns(document))
    ]
    given = {name: value for name, value in document["options"].items() if name not in document["swept"]}
    return rendered(
        Path(__file__).with_name("simulation.html.j2"),
        d=document,
        tables=tables,
        plots=plots,
        given=given,
        causes=CAUSES,
        remarks=summary.remarks(document),
    )


def _table(chosen: Sequence[Column], rows: Sequence[Row]) -> dict[str, Any]:
    """Headings, of which a group spans those without one that follow it; and cells."""
    groups: list[tuple[str, int]] = []
    for column in chosen:
        if groups and not column.group and groups[-1][0]:
            groups[-1] = (groups[-1][0], groups[-1][1] + 1)
        else:
            groups.append((column.group, 1))
    return {"groups": groups, "names": [column.name for column in chosen],
            "rows": [[column.cell(row) for column in chosen] for row in rows]}  # fmt: skip


def draw(document: Mapping[str, Any]) -> dict[str, Plot]:
    """By file name; nothing without matplotlib."""
    rows = document["rows"]
    if not can_plot():
        return {}
    plots: list[tuple[str, str, Callable[[Any], None]]] = [
        ("hits", "Prompt tokens from the cache, by tier", lambda axes: _hits(axes, rows)),
        ("ttft", "Time to first token", lambda axes: _ttft(axes, rows)),
        ("stalls", "Where the time to first token went, mean per request", lambda axes: _stalls(axes, rows)),
    ]
    if any(row["blocks"]["ssd"] for row in rows):
        plots.append(("written", "Written to SSD", lambda axes: _written(axes, rows)))
    size = (WIDTH, HEAD + LINE * max(3, len(rows)))
    names = document["swept"]

    def labelled(plot: Callable[[Any], None]) -> Callable[[Any], None]:
        def whole(axes: Any) -> None:
            plot(axes)
            labels = [", ".join(summary.named(row, [name]).partition("=")[2] for name in names) for row in rows]
            axes.set_yticks(range(len(rows)), labels)
            axes.set(ylim=(len(rows) - 0.4, -0.6), ylabel=", ".join(names))
            axes.grid(visible=False, axis="y")

        return whole

    return {name: figure(title, labelled(plot), size) for name, title, plot in plots}


def _stacked(axes: Any, parts: Mapping[str, Sequence[float]], colours: Mapping[str, str]) -> None:
    left = [0.0] * len(next(iter(parts.values())))
    for name, values in parts.items():
        if any(values):
            axes.barh(range(len(values)), values, 0.7, left=left, color=colours[name], label=name)
        left = [start + value for start, value in zip(left, values, strict=True)]


def _legend(axes: Any, columns: int) -> None:
    axes.legend(frameon=False, fontsize=8, ncols=columns, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0,
                columnspacing=1.2, handlelength=1.2)  # fmt: skip


def _hits(axes: Any, rows: Sequence[Row]) -> None:
    tiers = {tier: [100 * row["hit_by_tier"][tier] for row in rows] for tier in ("device", "dram", "ssd")}
    _stacked(axes, tiers, COLOURS)
    for position, row in enumerate(rows):
        limit = 100 * row["limits"]["optimal"]
        axes.plot([limit, limit], [position - 0.42, position + 0.42], color="#1f2933", lw=2,
                  label=None if position else "optimal")  # fmt: skip
    axes.axvline(100 * rows[0]["limits"]["infinite"], color="#c81e1e", ls="--", lw=1.2, label="infinite")
    axes.set(xlabel="% of prompt tokens", xlim=(0, None))
    _legend(axes, 5)


def _ttft(axes: Any, rows: Sequence[Row]) -> None:
    shown = [(position, row) for position, row in enumerate(rows) if row["mean_ttft_ms"] is not None]
    at = [position for position, _ in shown]
    unit, scale = summary.time_unit(rows)
    ends = ([row[f"{key}_ttft_ms"] * scale for _, row in shown] for key in ("p50", "p99"))
    axes.hlines(at, *ends, color="#c3ccd5", lw=3)
    marks = (("p50", "o", "device"), ("mean", "D", "computed"), ("p90", "s", "dram"), ("p99", "^", "ssd"))
    for key, mark, colour in marks:
        values = [row[f"{key}_ttft_ms"] * scale for _, row in shown]
        axes.plot(values, at, mark, color=COLOURS[colour], ms=6, label=key)
    times = [row[f"{key}_ttft_ms"] for _, row in shown for key in ("p50", "p99")]
    if times and max(times) > LOG_FROM * min(times):
        axes.set(xlabel=unit, xscale="log")
    else:
        axes.set(xlabel=unit, xlim=(0, None))
    _legend(axes, 4)


def _stalls(axes: Any, rows: Sequence[Row]) -> None:
    unit, scale = summary.time_unit(rows)
    causes = {cause: [row["stalls_s"][cause] * 1e3 * scale / max(1, row["requests"] - row["refused"]) for row in rows]
              for cause in CAUSES}  # fmt: skip
    _stacked(axes, causes, CAUSE_COLOURS)
    axes.set(xlabel=unit, xlim=(0, None))
    _legend(axes, 5)


def _written(axes: Any, rows: Sequence[Row]) -> None:
    axes.barh(range(len(rows)), [row["ssd_written_bytes"] / 1e9 for row in rows], 0.7, color=COLOURS["ssd"])
    axes.set(xlabel="GB", xlim=(0, None))
