"""report.html, one file with everything in it, and its plots as PNG."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loadgen.measure import LATENCIES, PERCENTILES, latencies_ms, ttft_s
from loadgen.page import COLOURS, Plot, can_plot, figure, rendered, save
from loadgen.records import Outcome
from loadgen.report import TITLES, as_command, cache_lines, with_interval

SOURCES = ("computed", "device", "dram", "ssd")
PAGES = Path(__file__).parent


def write(folder: Path, document: Mapping[str, Any], outcomes: Sequence[Outcome]) -> list[Path]:
    """report.html and, with matplotlib, one PNG per plot; the paths."""
    drawn = draw(document, outcomes)
    return save(folder, "report.html", html(document, drawn), drawn)


def html(document: Mapping[str, Any], plots: Mapping[str, Plot]) -> str:
    """The page of one result."""
    return rendered(
        PAGES / "report.html.j2",
        d=document,
        ours=document["terrace"],
        plots=plots,
        latencies=[(TITLES[name], _cells(document, name)) for name in LATENCIES],
        columns=["mean", "median", *(f"p{p:g}" for p in PERCENTILES[1:])],
        cache_lines=cache_lines(document),
        as_command=as_command,
    )


def _cells(document: Mapping[str, Any], name: str) -> list[str]:
    intervals = document["terrace"]["confidence_95"]
    keys = [f"mean_{name}_ms", f"median_{name}_ms", *(f"p{p:g}_{name}_ms" for p in PERCENTILES[1:])]
    return [with_interval(document[key], intervals.get(key)) for key in keys]


def draw(document: Mapping[str, Any], outcomes: Sequence[Outcome]) -> dict[str, Plot]:
    """By file name; nothing without matplotlib."""
    good = [outcome for outcome in outcomes if outcome.error is None]
    if not can_plot() or not good:
        return {}
    plots: list[tuple[str, str, Callable[[Any], None]]] = [
        ("ttft", "TTFT by where the prompt's KV came from", lambda axes: _ttft(axes, good)),
        ("distribution", "Share of samples that took at most so long", lambda axes: _distribution(axes, good)),
        ("timeline", "Over the (first) run", lambda axes: _timeline(axes, document["terrace"]["timeline"])),
    ]
    if document["terrace"]["turns"]:
        plots.append(("turns", "By turn", lambda axes: _turns(axes, document["terrace"]["turns"])))
    if (document["terrace"]["server"] or {}).get("prompt_tokens_by_source"):
        plots.append(("sources", "Prompt tokens by what provided their KV", lambda axes: _sources(axes, document)))
    return {name: figure(title, plot) for name, title, plot in plots}


def ttft_by_arm(document: Mapping[str, Any]) -> str:
    """SVG of the distribution of TTFT of every arm of a claim, all rounds together; empty without matplotlib."""
    if not can_plot():
        return ""

    def plot(axes: Any) -> None:
        for name, arm in document["arms"].items():
            ordered = np.sort([first * 1e3 for one in arm["rounds"] for first in one["ttfts"]])
            axes.plot(ordered, np.arange(1, len(ordered) + 1) / len(ordered), label=name)
        axes.set(xlabel="TTFT of all requests, ms", ylabel="share", xscale="log", ylim=(0, 1.02))
        axes.legend(frameon=False, fontsize=8)

    return figure("", plot).svg


def slowest_source(outcome: Outcome) -> str:
    """The slowest tier that the prompt's KV came from."""
    return next((tier for tier in ("ssd", "dram", "device") if outcome.cached_by_tier.get(tier)), "computed")


def _ttft(axes: Any, good: Sequence[Outcome]) -> None:
    for source in SOURCES:
        some = [o for o in good if slowest_source(o) == source]
        if some:
            at, took = [o.scheduled_s for o in some], [ttft_s(o) * 1e3 for o in some]
            axes.plot(at, took, ".", ms=4, alpha=0.7, color=COLOURS[source], label=f"{source} ({len(some)})")
    axes.set(xlabel="scheduled, s", ylabel="TTFT, ms", yscale="log")
    axes.legend(frameon=False, fontsize=8)


def _distribution(axes: Any, good: Sequence[Outcome]) -> None:
    for name, samples in latencies_ms(good).items():
        if samples:
            ordered = np.sort(np.asarray(samples))
            axes.plot(ordered, np.arange(1, len(ordered) + 1) / len(ordered), label=TITLES[name])
    axes.set(xlabel="ms", ylabel="share", xscale="log", ylim=(0, 1.02))
    axes.legend(frameon=False, fontsize=8)


def _timeline(axes: Any, timeline: Mapping[str, Sequence[float]]) -> None:
    axes.plot(timeline["t_s"], timeline["in_flight"], color=COLOURS["dram"])
    axes.set(xlabel="s", ylim=(0, None))
    axes.set_ylabel("requests in flight", color=COLOURS["dram"])
    other = axes.twinx()
    other.plot(timeline["t_s"], timeline["chunks_per_s"], color=COLOURS["ssd"], alpha=0.6, lw=1)
    other.set_ylabel("chunks with output per s", color=COLOURS["ssd"])
    other.set_ylim(0, None)
    other.spines[["top"]].set_visible(False)


def _turns(axes: Any, turns: Sequence[Mapping[str, Any]]) -> None:
    at = [row["turn"] for row in turns]
    axes.plot(at, [row["median_ttft_ms"] for row in turns], "o-", color=COLOURS["dram"], label="TTFT median")
    axes.plot(at, [row["p99_ttft_ms"] for row in turns], "o:", color=COLOURS["dram"], label="TTFT p99")
    axes.set(xlabel="turn", ylabel="ms", ylim=(0, None), xticks=at)
    axes.legend(frameon=False, fontsize=8)


def _sources(axes: Any, document: Mapping[str, Any]) -> None:
    tokens = document["terrace"]["server"]["prompt_tokens_by_source"]
    left, everything = 0.0, sum(tokens.values()) or 1.0
    for source in SOURCES:
        share = tokens.get(source, 0.0) / everything
        axes.barh([0], [share], left=[left], color=COLOURS[source], label=f"{source} {share:.1%}")
        left += share
    axes.set(xlim=(0, 1), yticks=[], xlabel="share of prompt tokens")
    axes.legend(frameon=False, fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.15))
