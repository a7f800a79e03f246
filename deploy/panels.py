"""Panels and boards as plain data, and how they become Grafana's JSON. Knows the look, not what is shown."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    dashboard,
    heatmap,
    prometheus,
    stat,
    timeseries,
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as options
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models import heatmap as heat
from grafana_foundation_sdk.models import prometheus as query

from server.metrics.families import FAMILIES, PREFIX, Family

DATASOURCE_UID = "terrace-prometheus"
"""Of the data source that compose.yaml provisions, with which the boards' variable begins. Elsewhere Grafana takes what
it has."""
COLUMNS = 24
HEIGHT = 8
"""Grid rows of a panel; 4 where it is a number or a few."""
COLOURS = {
    "computed": "#9aa5b1",
    "none": "#9aa5b1",
    "device": "#2a9d8f",
    "dram": "#4c78a8",
    "ssd": "#e08e45",
    "target": "#d62728",
    "budget": "#d62728",
}
"""By legend, the same everywhere: where KV came from, and what should not be crossed."""
TIERED = {"{{tier}}", "{{source}}", "{{kv_source}}"}
"""Legends that become the former."""
METRIC = re.compile(r"\b((?:terrace|process)_\w+)(?:\{([^}]*)\})?")
"""A metric of a daemon in PromQL, and the selectors that it has; what rules record has a colon and is not one."""


@dataclass(frozen=True)
class Panel:
    """One panel. `queries` are PromQL by legend; a legend names labels as `{{label}}`.

    In a query `$i` stands for Grafana's rate interval, and every metric gets the selectors of the board's variables.
    """

    title: str
    unit: str
    """Grafana's id: s, percentunit, bytes, Bps, reqps, short, ..."""
    description: str
    queries: dict[str, str]
    kind: str = "lines"
    """`lines`, `stack`, `number` (now), `name` (the labels that hold now), `bars` (fill levels now), `heatmap`."""
    width: int = 8
    """Of the 24 columns."""
    log: bool = False
    """Values span powers of ten: a logarithmic axis."""

    signed: bool = False
    """Values below zero mean something."""

    @property
    def height(self) -> int:
        return 4 if self.kind in ("number", "name") else HEIGHT


@dataclass(frozen=True)
class Board:
    """`rows` are panels by heading, left to right; they wrap at 24 columns."""

    uid: str
    title: str
    description: str
    rows: dict[str, tuple[Panel, ...]]


def family_of(metric: str) -> Family | None:
    """What the daemon declares of a metric in PromQL, which may be a part of a histogram; None: it is no metric of its
    own."""
    name = metric.removeprefix(PREFIX)
    whole = FAMILIES.get(re.sub("_(bucket|sum|count)$", "", name))
    return whole if whole is not None and whole.kind == "histogram" else FAMILIES.get(name)


def expression(text: str) -> str:
    """`text` as Grafana is to ask it: interval and selectors filled in."""

    def select(match: re.Match[str]) -> str:
        name, own = match[1], match[2]
        family = family_of(name)
        ours = ['instance=~"$instance"', *(['model_name=~"$model"'] if family and family.of_model else [])]
        return f"{name}{{{', '.join([*ours, *([own] if own else [])])}}}"

    return METRIC.sub(select, text).replace("$i]", "$__rate_interval]")


def as_json(board: Board) -> str:
    """The board as Grafana imports it."""
    link = dashboard.DashboardLink("Terrace").type(model.DashboardLinkType.DASHBOARDS).tags(["terrace"])
    made = (
        dashboard.Dashboard(board.title)
        .uid(board.uid)
        .description(board.description)
        .tags(["terrace"])
        .timezone("browser")
        .time("now-1h", "now")
        .refresh("10s")
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .link(link.keep_time(True).include_vars(True))
        .with_variable(_source())
        .with_variable(_variable("instance", "instance", "Instance"))
        .with_variable(_variable("model", "model_name", "Model"))
    )
    number, y = 0, 0
    for heading, panels in board.rows.items():
        number += 1
        made.with_row(dashboard.Row(heading).id(number).grid_pos(model.GridPos(h=1, w=COLUMNS, x=0, y=y)))
        y += 1
        for line in _lines(panels):
            x = 0
            for panel in line:
                number += 1
                where = model.GridPos(h=panel.height, w=panel.width, x=x, y=y)
                made.with_panel(_panel(panel).id(number).grid_pos(where))
                x += panel.width
            y += max(panel.height for panel in line)
    return json.dumps(json.loads(JSONEncoder().encode(made.build())), indent=1, sort_keys=True) + "\n"


def _lines(panels: Sequence[Panel]) -> list[list[Panel]]:
    """`panels` in lines of at most 24 columns."""
    lines: list[list[Panel]] = [[]]
    for panel in panels:
        if sum(other.width for other in lines[-1]) + panel.width > COLUMNS:
            lines.append([])
        lines[-1].append(panel)
    return lines


def _source() -> dashboard.DatasourceVariable:
    """Which Prometheus to ask."""
    provisioned = model.VariableOption(text="Prometheus", value=DATASOURCE_UID, selected=True)
    return dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus").current(provisioned)


def _variable(name: str, label: str, title: str) -> dashboard.QueryVariable:
    """All values of `label` that daemons have; several may be picked."""
    return (
        dashboard.QueryVariable(name)
        .label(title)
        .datasource(_datasource())
        .query(f"label_values(terrace_requests_running, {label})")
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(model.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .current(model.VariableOption(text="All", value="$__all", selected=True))
    )


def _datasource() -> model.DataSourceRef:
    return model.DataSourceRef(type_val="prometheus", uid="${datasource}")


def _panel(panel: Panel) -> Any:
    made = _KINDS[panel.kind](panel)
    made.title(panel.title).description(panel.description).unit(panel.unit).datasource(_datasource())
    for letter, (legend, text) in zip(ascii_uppercase, panel.queries.items()):
        target = prometheus.Dataquery().ref_id(letter).datasource(_datasource()).expr(expression(text))
        target.legend_format(legend).editor_mode(query.QueryEditorMode.CODE)
        if panel.kind in ("number", "name", "bars"):
            target.instant()
        if panel.kind == "heatmap":
            target.format(query.PromQueryFormat.HEATMAP)
        made.with_target(target)
    for legend, colour in COLOURS.items():
        if legend in panel.queries or TIERED & panel.queries.keys():
            fixed = model.DynamicConfigValue("color", {"mode": "fixed", "fixedColor": colour})
            made.override_by_name(legend, [fixed])
    return made


def _timeseries(panel: Panel) -> timeseries.Panel:
    legend = common.VizLegendOptions().show_legend(True).placement(options.LegendPlacement.BOTTOM)
    made = (
        timeseries.Panel()
        .line_width(1)
        .show_points(options.VisibilityMode.NEVER)
        .span_nulls(False)
        .legend(legend.display_mode(options.LegendDisplayMode.LIST))
        .tooltip(common.VizTooltipOptions().mode(options.TooltipDisplayMode.MULTI))
    )
    if panel.log:
        made.scale_distribution(common.ScaleDistributionConfig().type(options.ScaleDistribution.LOG).log(10))
    elif not panel.signed:
        made.min(0)
    return made


def _stack(panel: Panel) -> timeseries.Panel:
    stacking = common.StackingConfig().mode(options.StackingMode.NORMAL).group("A")
    return _timeseries(panel).stacking(stacking).fill_opacity(60)


def _reduced() -> common.ReduceDataOptions:
    return common.ReduceDataOptions().calcs(["lastNotNull"]).values(False).fields("")


def _number(panel: Panel) -> stat.Panel:
    made = stat.Panel().reduce_options(_reduced()).graph_mode(options.BigValueGraphMode.NONE)
    return made.color_mode(options.BigValueColorMode.NONE).text_mode(options.BigValueTextMode.AUTO)


def _name(panel: Panel) -> stat.Panel:
    return _number(panel).text_mode(options.BigValueTextMode.NAME)


def _bars(panel: Panel) -> bargauge.Panel:
    made = bargauge.Panel().reduce_options(_reduced()).min(0).max(1)
    return made.orientation(options.VizOrientation.HORIZONTAL).display_mode(options.BarGaugeDisplayMode.BASIC)


def _heatmap(panel: Panel) -> heatmap.Panel:
    colour = heatmap.HeatmapColorOptions().mode(heat.HeatmapColorMode.SCHEME).scheme("Oranges").steps(64)
    axis = heatmap.YAxisConfig().unit(panel.unit)
    return heatmap.Panel().calculate(False).color(colour).y_axis(axis).cell_gap(1)


_KINDS: dict[str, Callable[[Panel], Any]] = {
    "lines": _timeseries,
    "stack": _stack,
    "number": _number,
    "name": _name,
    "bars": _bars,
    "heatmap": _heatmap,
}
