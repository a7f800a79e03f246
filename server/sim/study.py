"""`python -m server.sim.study`: the tables of STUDY.md, from public traces, in virtual time.

    python -m server.sim.study --traces conversation.jsonl.gz synthetic.jsonl.gz [--only NAME ...] [--jobs 2]
    python -m server.sim.study --table          # make STUDY.md anew from the kept results

Every experiment of `experiments.py` is run on every trace and kept under `results/`, by the trace's name; goals are
printed, and the exit code is 1 when one is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import track

from loadgen.errors import UsageError
from loadgen.report import environment
from server.errors import TerraceError
from server.sim import experiments
from server.sim.experiments import Job, Row

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent / "STUDY.md"
SMALL_PERCENT = 25.0
"""Up to here a cache is small or of middle size."""


class Goal(NamedTuple):
    """What must hold, and whether it does."""

    statement: str
    met: bool


class Experiment(NamedTuple):
    """`jobs` of the paths of so many `traces`; a table and goals of the rows that come of them."""

    title: str
    jobs: Callable[..., Iterable[Job]]
    table: Callable[[Sequence[Row]], list[str]]
    goals: Callable[[Sequence[Row]], list[Goal]]
    traces: int = 1


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table."""
    return [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows)]


def by(rows: Sequence[Row], *keys: str) -> dict[Any, Row]:
    """Rows by the values under these keys."""
    return {tuple(row[key] for key in keys) if len(keys) > 1 else row[keys[0]]: row for row in rows}


# --- eviction --------------------------------------------------------------------------------------------------------


def closed(cells: Mapping[Any, Row], percent: float) -> float:
    """How much of the way from LRU to what can be known `learned` goes."""
    lru, learned, limit = (cells[percent, name]["hit"] for name in ("lru", "learned", "knowable"))
    return float((learned - lru) / (limit - lru)) if limit > lru else 1.0


def eviction_table(rows: Sequence[Row]) -> list[str]:
    cells = by(rows, "percent", "policy")
    names = [*(name for name in dict.fromkeys(row["policy"] for row in rows) if name not in experiments.LIMITS)]
    names.sort(key=lambda name: (name != "lru", name == "learned", name))
    lines = []
    for percent in dict.fromkeys(row["percent"] for row in rows):
        row = cells[percent, "lru"]
        shares = [f"{cells[percent, name]['hit']:.4f}" for name in (*names, *experiments.LIMITS)]
        lines.append([f"{percent:g} %", f"{row['blocks']:,}", *shares, f"{row['infinite']:.4f}",
                      f"{closed(cells, percent):.0%}"])  # fmt: skip
    return markdown(["cache", "blocks", *names, *experiments.LIMITS, "infinite", "closed"], lines)


def eviction_goals(rows: Sequence[Row]) -> list[Goal]:
    cells = by(rows, "percent", "policy")
    percents = list(dict.fromkeys(row["percent"] for row in rows))
    least = min(closed(cells, percent) for percent in percents if percent <= SMALL_PERCENT)
    worst = min(cells[percent, "learned"]["hit"] / (cells[percent, "lru"]["hit"] or 1.0) for percent in percents)
    return [
        Goal(f"up to {SMALL_PERCENT:g} % of the distinct blocks, at least 40 % of the way from LRU to what can be "
             f"known is closed (least {least:.0%})", least >= 0.4),
        Goal(f"never more than 1 % below LRU (worst {worst:.3f} x)", worst >= 0.99),
    ]  # fmt: skip


# --- tiers -----------------------------------------------------------------------------------------------------------


def tiers_table(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        tiers = row["hit_by_tier"]
        lines.append([row["split"], row["policy"], f"{row['hit']:.3f}", *(f"{tiers[t]:.3f}" for t in tiers),
                      seconds(row["mean_ttft_ms"]), seconds(row["p50_ttft_ms"]), seconds(row["p99_ttft_ms"]),
                      f"{row['ssd_written_bytes'] / 1e9:,.0f}"])  # fmt: skip
    header = ["device+DRAM+SSD", "eviction", "hits", "device", "DRAM", "SSD", "TTFT mean s", "p50 s", "p99 s", "SSD GB"]
    return markdown(header, lines)


def tiers_goals(rows: Sequence[Row]) -> list[Goal]:
    cells = by(rows, "split", "policy")
    splits = list(dict.fromkeys(row["split"] for row in rows))
    hits = min(cells[split, "learned"]["hit"] / cells[split, "lru"]["hit"] for split in splits)
    ttft = max(cells[split, "learned"]["mean_ttft_ms"] / cells[split, "lru"]["mean_ttft_ms"] for split in splits)
    return [Goal(f"hits never more than 1 % below LRU (worst {hits:.3f} x)", hits >= 0.99),
            Goal(f"mean TTFT never more than 1 % above LRU (worst {ttft:.3f} x)", ttft <= 1.01)]  # fmt: skip


def admission_table(rows: Sequence[Row]) -> list[str]:
    whole = next(row for row in rows if row["policy"] == "learned" and row["share"] == 1)
    lines = [[row["policy"], f"{row['share']:g}", f"{row['hit']:.4f}", f"{row['hit_by_tier']['ssd']:.4f}",
              f"{row['ssd_written_bytes'] / 1e9:,.0f}", f"{row['hit'] / whole['hit']:.1%}",
              f"{row['ssd_written_bytes'] / whole['ssd_written_bytes']:.1%}",
              seconds(row["mean_ttft_ms"])] for row in rows]  # fmt: skip
    header = ["eviction", "`ssd_write_share`", "hits", "of the SSD", "written GB", "hits kept", "bytes written",
              "TTFT mean s"]  # fmt: skip
    return markdown(header, lines)


def admission_goals(rows: Sequence[Row]) -> list[Goal]:
    whole = next(row for row in rows if row["policy"] == "learned" and row["share"] == 1)
    good = [row for row in rows if row["policy"] == "learned" and row["hit"] >= 0.95 * whole["hit"]]
    least = min(row["ssd_written_bytes"] for row in good) / whole["ssd_written_bytes"]
    return [Goal(f"95 % of write-all's hits with at most 40 % of its bytes ({least:.1%})", least <= 0.4)]


def writes_table(rows: Sequence[Row]) -> list[str]:
    [row] = rows
    lines = [[name, *(f"{share:.1%}" for share in row[key])]
             for name, key in (("told what becomes of each", "future"), ("by all that is known", "known"),
                                ("and by what is known when DRAM evicts it", "later"))]  # fmt: skip
    return markdown(["loads kept, of so many writes", *(f"{share:.0%}" for share in row["shares"])], lines)


def needed(row: Row) -> float:
    """Share of the loads from SSD that has to be kept so that 95 % of all hits are, if the other tiers keep theirs."""
    return float(1 - 0.05 * row["hit"] / row["ssd_hit"])


def writes_goals(rows: Sequence[Row]) -> list[Goal]:
    [row] = rows
    best = max(row[key][list(row["shares"]).index(0.4)] for key in ("known", "later"))
    words = f"95 % of the hits need {needed(row):.1%} of the loads; by all that is known, 40 % of the writes have"
    return [Goal(f"{words} as many ({best:.1%})", best >= needed(row))]


# --- scheduling ------------------------------------------------------------------------------------------------------


def slo_table(rows: Sequence[Row]) -> list[str]:
    lines = [[f"{row['load']:g}", row["policy"], f"{row['met']:.1%}", f"{row['goodput']:.3f}",
              f"{row['refused']:,}", seconds(row["p50_ttft_ms"]), seconds(row["mean_ttft_ms"]),
              seconds(row["p99_ttft_ms"])] for row in rows]  # fmt: skip
    return markdown(["load", "policy", "SLO met", "goodput/s", "refused", "TTFT p50 s", "mean s", "p99 s"], lines)


def slo_goals(rows: Sequence[Row]) -> list[Goal]:
    cells = by(rows, "load", "policy")
    ratios = {load: cells[load, "deadline"]["goodput"] / max(1e-9, cells[load, "fcfs"]["goodput"])
              for load in dict.fromkeys(row["load"] for row in rows)}  # fmt: skip
    return [Goal(f"goodput of deadline at {load:g}: at least {goal} x fcfs ({ratios[load]:.2f} x)",
                 ratios[load] >= goal) for load, goal in ((0.7, 1.0), (0.9, 1.0), (1.1, 1.3))]  # fmt: skip


def fairness_table(rows: Sequence[Row]) -> list[str]:
    lines = [[row["policy"], f"{row['from_s']:g} s", "yes" if row["flood"] else "no", str(row["requests"]),
              *(seconds(row[f"{which}_ttft_ms"]) for which in ("p50", "mean", "p99"))] for row in rows]  # fmt: skip
    header = ["policy", "from", "flood", "requests of the modest", "TTFT p50 s", "mean s", "p99 s"]
    return markdown(header, lines)


def fairness_goals(rows: Sequence[Row]) -> list[Goal]:
    cells = by(rows, "policy", "from_s", "flood")
    goals = []
    for from_s in dict.fromkeys(row["from_s"] for row in rows):
        with_it, alone = (cells["fair", from_s, flood]["p99_ttft_ms"] for flood in (True, False))
        words = f"with fair, a flood from {from_s:g} s on moves the modest tenant's p99 TTFT by less than 10 %"
        goals.append(Goal(f"{words} ({with_it / alone:.3f} x)", with_it < 1.1 * alone))
    return goals


def coserving_table(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        batch = row["tokens_per_s"] if row["who"] == "batch alone" else row["background"]["tokens_per_s"]
        online = row["who"] != "batch alone"
        times = [row[key] for key in ("mean_ttft_ms", "p99_ttft_ms")] if online else []
        paces = [row[key] for key in ("mean_tpot_ms", "p99_tpot_ms")] if online else []
        lines.append([row["who"], *(map(seconds, times) if online else ("", "")),
                      *((f"{value:.1f}" for value in paces) if online else ("", "")),
                      f"{batch:,.0f}" if batch else "", f"{row['device_busy']:.1%}"])  # fmt: skip
    return markdown(["", "TTFT mean s", "p99 s", "TPOT mean ms", "p99 ms", "batch tokens/s", "device busy"], lines)


def coserving_goals(rows: Sequence[Row]) -> list[Goal]:
    cells = by(rows, "who")
    alone, batch, both = (cells[who] for who in ("online alone", "batch alone", "both"))
    goals = []
    for key, name in (("p99_ttft_ms", "p99 TTFT"), ("p99_tpot_ms", "p99 TPOT")):
        ratio = both[key] / alone[key]
        goals.append(Goal(f"{name} at most 1.10 x that of online alone ({ratio:.3f} x)", ratio <= 1.1))
    allowed = batch["tokens_per_s"] * (1 - alone["device_busy"])
    share = both["background"]["tokens_per_s"] / allowed if allowed else 1.0
    goals.append(Goal(f"the batch gets at least half of what the idle time allows ({share:.0%})", share >= 0.5))
    return goals


def split_table(rows: Sequence[Row]) -> list[str]:
    lines = [[f"{row['tokens']:,}", f"{row['rate']:g}", *(f"{row[f'{way}_ms']:,.0f}" for way in
              ("load", "compute", "own", "at_once")), f"{row['ratio']:.2f}"] for row in rows]  # fmt: skip
    header = ["prefix tokens", "SSD rate", "load ms", "compute ms", "planner ms", "1 / (1/load + 1/compute)", "ratio"]
    return markdown(header, lines)


def split_goals(rows: Sequence[Row]) -> list[Goal]:
    worst = max(row["ratio"] for row in rows)
    equal = max(row["ratio"] for row in rows if abs(row["apart"]) <= 0.1)
    return [Goal(f"at most 1.05 x the better of loading and computing in every cell (worst {worst:.3f} x)",
                 worst <= 1.05),
            Goal(f"at most 0.65 x where the two are equal (worst {equal:.3f} x)", equal <= 0.65)]  # fmt: skip


def seconds(ms: float | None) -> str:
    """Of milliseconds; empty if there are none."""
    return "" if ms is None else f"{ms / 1e3:,.2f}"


EXPERIMENTS = {
    "eviction": Experiment("One cache, by what it evicts", experiments.eviction, eviction_table, eviction_goals),
    "tiers": Experiment("Two and three tiers, load 0.7", experiments.tiers, tiers_table, tiers_goals),
    "admission": Experiment("What is written to SSD", experiments.admission, admission_table, admission_goals),
    "writes": Experiment("What could be chosen to be written", experiments.writes, writes_table, writes_goals),
    "slo": Experiment("Targets under load", experiments.slo, slo_table, slo_goals),
    "fairness": Experiment("One tenant floods", experiments.fairness, fairness_table, fairness_goals),
    "coserving": Experiment("A batch in the background", experiments.coserving, coserving_table, coserving_goals, 2),
    "split": Experiment("Load, compute, or both", experiments.split, split_table, split_goals, 0),
}


# --- running ---------------------------------------------------------------------------------------------------------


def inputs(experiment: Experiment, traces: Sequence[str]) -> list[tuple[str, ...]]:
    """On what it is run: nothing, each trace, or each with the next one beside it."""
    if experiment.traces == 0:
        return [()]
    if experiment.traces == 1:
        return [(trace,) for trace in traces]
    return [(trace, traces[(number + 1) % len(traces)]) for number, trace in enumerate(traces)]


def run(name: str, paths: tuple[str, ...], pool: ProcessPoolExecutor, console: Console) -> dict[str, Any]:
    """All rows of one experiment on one input."""
    jobs = list(EXPERIMENTS[name].jobs(*paths))
    quiet = not console.is_terminal
    rows = list(track(pool.map(_call, jobs), name, len(jobs), console=console, transient=True, disable=quiet))
    named = [Path(path).name.partition(".")[0] for path in paths]
    return {"experiment": name, "traces": named, "rows": rows, "environment": environment()}


def _call(job: Job) -> Row:
    return job()


def load() -> list[dict[str, Any]]:
    """The kept results, in the order of the experiments."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    return sorted(found, key=lambda one: list(EXPERIMENTS).index(one["experiment"]))


def lines_of(document: Mapping[str, Any]) -> list[str]:
    """A table, and the goals below it."""
    experiment = EXPERIMENTS[document["experiment"]]
    goals = experiment.goals(document["rows"])
    return [*experiment.table(document["rows"]), "",
            *(f"- {'Met' if goal.met else '**Missed**'}: {goal.statement}." for goal in goals)]  # fmt: skip


def page(documents: Sequence[Mapping[str, Any]]) -> str:
    """STUDY.md."""
    head, _, _ = PAGE.read_text(encoding="utf-8").partition("<!-- results")
    lines = [head + "<!-- results: made by `python -m server.sim.study --table` -->", ""]
    title = None
    for document in documents:
        experiment = EXPERIMENTS[document["experiment"]]
        if experiment.title != title:
            title = experiment.title
            lines += [f"## {title}", ""]
        if document["traces"]:
            lines += [f"**{', beside it '.join(document['traces'])}**", ""]
        lines += [*lines_of(document), ""]
    commits = sorted({str(document["environment"]["commit"]) for document in documents})
    return "\n".join([*lines, f"Commits {', '.join(commits)}.", ""])


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 all goals met, 1 one was missed, 2 what was asked for cannot work."""
    args = _parser().parse_args(argv)
    console = Console(highlight=False, soft_wrap=True)
    if args.table:
        PAGE.write_text(page(load()), encoding="utf-8")
        return 0
    missed = 0
    try:
        with ProcessPoolExecutor(args.jobs) as pool:
            for name in args.only or EXPERIMENTS:
                for paths in inputs(EXPERIMENTS[name], args.traces):
                    document = run(name, paths, pool, console)
                    stem = "-".join([name, *document["traces"]])
                    args.output.mkdir(parents=True, exist_ok=True)
                    (args.output / f"{stem}.json").write_text(json.dumps(document) + "\n", encoding="utf-8")
                    console.print("\n".join(["", stem, "", *lines_of(document)]))
                    missed += sum(not goal.met for goal in EXPERIMENTS[name].goals(document["rows"]))
    except (TerraceError, UsageError) as error:
        print(f"study: error: {error}", file=sys.stderr)
        return 2
    return int(missed > 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m server.sim.study", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--traces", nargs="+", default=[], metavar="FILE", help="in Mooncake's format")
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, metavar="NAME", help=", ".join(EXPERIMENTS))
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes at once [1]")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="for the results as JSON")
    parser.add_argument("--table", action="store_true", help="run nothing: make STUDY.md anew from the kept results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
