"""Pages of one file each, with everything in it, and plots. Knows the look, not what is shown. Plots need matplotlib
(`pip install 'terrace[plots]'`); without it pages have their tables only.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from loadgen.report import number

COLOURS = {"computed": "#9aa5b1", "device": "#2a9d8f", "dram": "#4c78a8", "ssd": "#e08e45"}
SIZE = (6.4, 3.0)
"""Inches of a plot."""


class Plot(NamedTuple):
    """One plot, drawn. `svg` is for a page, `png` the bytes of a file."""

    title: str
    svg: str
    png: bytes


def can_plot() -> bool:
    """Whether matplotlib is here; it is set up to draw without a screen."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    return True


def figure(title: str, plot: Callable[[Any], None], size: tuple[float, float] = SIZE) -> Plot:
    """Have `plot` draw into axes of `size` inches. Only where `can_plot`."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    drawn = Figure(figsize=size, layout="constrained")
    axes = drawn.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    plot(axes)
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":  # 1, 2, 5, 10, 20 ... and not 2 x 10^1
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("")
    svg, png = io.StringIO(), io.BytesIO()
    drawn.savefig(svg, format="svg")
    drawn.savefig(png, format="png", dpi=130)
    text = svg.getvalue()
    return Plot(title, text[text.index("<svg") :], png.getvalue())


def rendered(template: Path, **values: Any) -> str:
    """A page in the style of all. Everything that a server or a person wrote is escaped."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["number"] = number
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    return environment.from_string(template.read_text(encoding="utf-8")).render(style=style, **values)


def save(folder: Path, name: str, html: str, plots: Mapping[str, Plot]) -> list[Path]:
    """The page, and a PNG per plot, named by its key; the paths."""
    page = folder / name
    page.write_text(html, encoding="utf-8")
    paths = [page]
    for key, plot in plots.items():
        paths.append(folder / f"{key}.png")
        paths[-1].write_bytes(plot.png)
    return paths
