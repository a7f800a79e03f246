"""Runs the loads on every server in turns, and makes tables and verdicts of what was found.

All servers of a table live side by side; whoever is not measured is stopped (SIGSTOP), so that nothing it does on the
side takes time from the one that is. With `one_at_a_time` they are started and killed instead, where memory is short.
Rounds of all servers follow each other, and a ratio is made of figures of the same round.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from loadgen import bench, report
from loadgen.client import Client
from loadgen.daemon import Server
from loadgen.errors import UsageError
from loadgen.peers.loads import LOADS, WARM_UP, Figure, Load, figures_of
from loadgen.peers.servers import KV_TOKENS, LOWER_TIERS, THREADS, Contender, Model
from loadgen.records import Outcome
from loadgen.report import number

PROBE_TOKENS = 16
SETTLE_S = 0.3
"""After the last answer, for what a server still does for it; then it is stopped."""


@dataclass
class Entry:
    """What is known of one server at one precision."""

    contender: Contender
    model: Model
    version: str | None
    problem: str | None = None
    """Why it has no figures, or not all of them: missing, not offered, or what went wrong."""
    server: Server | None = None
    text: str = ""
    """What it said to the probe."""
    figures: dict[tuple[str, str], list[float | None]] = field(default_factory=dict)
    """By load and figure: one per round; None where the load failed."""

    @property
    def name(self) -> str:
        return self.contender.name

    def median(self, load: Load, figure: Figure) -> float | None:
        known = [value for value in self.figures.get((load.name, figure.key), []) if value is not None]
        return statistics.median(known) if known else None


def entries(contenders: Sequence[Contender], model: Model) -> list[Entry]:
    """Who takes part, and who does not and why."""
    made = []
    for contender in contenders:
        entry = Entry(contender, model, contender.version())
        if entry.version is None:
            entry.problem = "missing"
        elif model.precision not in contender.kv:
            entry.problem = "not offered"
        made.append(entry)
    return made


def measure(
    taking_part: Sequence[Entry], loads: Sequence[Load], rounds: int, console: Console, *, one_at_a_time: bool = False
) -> None:
    """Fill in the figures. A server that fails is left out from there on, the others go on."""
    with ExitStack() as stack:
        able = [entry for entry in taking_part if entry.problem is None]
        if not one_at_a_time:
            for entry in able:
                _started(entry, stack, console)
        for round_ in range(rounds):
            order = able if round_ % 2 == 0 else able[::-1]
            if one_at_a_time:
                for entry in order:
                    with ExitStack() as alone:
                        _started(entry, alone, console)
                        for load in loads:
                            _measured(entry, load, round_, console)
            else:
                for load in loads:
                    for entry in order:
                        _measured(entry, load, round_, console)


def _started(entry: Entry, stack: ExitStack, console: Console) -> None:
    started_s = time.monotonic()
    try:
        entry.server = entry.contender.served(entry.model, stack)
        for settings in WARM_UP:
            bench.run_sync(_aimed(settings, entry, seed=-1))
        entry.text = asyncio.run(_probed(entry))
        time.sleep(SETTLE_S)
        entry.server.pause()
    except (UsageError, OSError) as error:
        entry.problem = str(error)
        console.print(f"{entry.name}: {entry.problem}", highlight=False, style="red", soft_wrap=True)
    else:
        console.print(f"{entry.name}: ready after {time.monotonic() - started_s:.0f} s", highlight=False)


def _aimed(settings: bench.Settings, entry: Entry, seed: int) -> bench.Settings:
    assert entry.server is not None
    return replace(settings, base_url=entry.server.url, token_ids=entry.model.shape.token_ids, seed=seed)


async def _probed(entry: Entry) -> str:
    """What it says to a prompt that is the same for all: servers with the same weights say the same."""
    settings = _aimed(bench.Settings(), entry, 0)
    client = Client(bench.target_of(settings, await bench.first_model(settings)), time.perf_counter)
    outcome = Outcome(0, 0, 0.0, PROBE_TOKENS)
    low, high = entry.model.shape.token_ids
    try:
        await client.complete([("user", [low + 37 * n % (high - low) for n in range(64)])], outcome, keep_answer=True)
    finally:
        client.close()
    if outcome.error is not None:
        raise UsageError(f"it does not answer: {outcome.detail}")
    return outcome.answer


@contextmanager
def _awake(entry: Entry) -> Iterator[None]:
    assert entry.server is not None
    entry.server.resume()
    try:
        yield
        time.sleep(SETTLE_S)
    finally:
        entry.server.pause()


def _measured(entry: Entry, load: Load, round_: int, console: Console) -> None:
    if entry.server is None or (load.most_rounds is not None and round_ >= load.most_rounds):
        return
    found: Mapping[str, float | None] = {figure.key: None for figure in load.figures}
    try:
        with _awake(entry):
            found = figures_of(load, bench.run_sync(_aimed(load.settings, entry, seed=1000 * round_)))
    except (UsageError, ValueError) as error:
        entry.problem = f"{load.name}: {error}"
        console.print(f"{entry.name}: {entry.problem}", highlight=False, style="red", soft_wrap=True)
    for key, value in found.items():
        entry.figures.setdefault((load.name, key), []).append(value)
    figure = load.figures[0]
    shown = f"{figure.title} {number(found[figure.key])} {figure.unit}"
    console.print(f"{load.name}, round {round_ + 1}, {entry.name}: {shown}", highlight=False, soft_wrap=True)


# --- what comes of it ------------------------------------------------------------------------------------------------


def document(taking_part: Sequence[Entry], loads: Sequence[Load], model: Model, *, quick: bool) -> dict[str, Any]:
    """The kept result."""
    shape = model.shape
    return {
        "shape": shape.name,
        "precision": model.precision,
        "quick": quick,
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "environment": report.environment(),
        "threads": THREADS,
        "kv_tokens": KV_TOKENS,
        "lower_tiers": LOWER_TIERS,
        "servers": [_server(entry, taking_part[0]) for entry in taking_part],
        "loads": [_load(load, taking_part) for load in loads],
    }


def _server(entry: Entry, first: Entry) -> dict[str, Any]:
    started = entry.server is not None
    return {
        "name": entry.name,
        "version": entry.version,
        "problem": entry.problem,
        "kv": entry.contender.kv.get(entry.model.precision),
        "command": entry.contender.shown(entry.model) if started else None,
        "same_characters": common(entry.text, first.text) if started else None,
        "of_characters": len(first.text),
    }


def common(one: str, other: str) -> int:
    """How many characters from the start are the same."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _load(load: Load, taking_part: Sequence[Entry]) -> dict[str, Any]:
    return {
        "name": load.name,
        "says": load.says,
        "workload": load.settings.workload,
        "parameters": load.settings.parameters,
        "sessions": load.settings.sessions,
        "max_concurrency": load.settings.max_concurrency,
        "figures": [_figure(load, figure, taking_part) for figure in load.figures],
    }


def _figure(load: Load, figure: Figure, taking_part: Sequence[Entry]) -> dict[str, Any]:
    rounds = {entry.name: entry.figures.get((load.name, figure.key), []) for entry in taking_part}
    medians = {entry.name: entry.median(load, figure) for entry in taking_part}
    ours, *peers = medians
    best = best_of({name: medians[name] for name in peers}, figure)
    against = None if best is None else ratios(rounds[ours], rounds[best], figure)
    made: dict[str, Any] = {"key": figure.key, "title": figure.title, "unit": figure.unit, "rounds": rounds,
                            "medians": medians, "best_peer": best, "goal": figure.goal}  # fmt: skip
    if against:
        made["ratio"] = {"median": statistics.median(against), "least": min(against), "most": max(against)}
    if figure.goal is not None:
        made["met"] = bool(against) and made["ratio"]["median"] >= figure.goal
    return made


def best_of(medians: Mapping[str, float | None], figure: Figure) -> str | None:
    """The peer with the best median; None when there is none."""
    known = {name: value for name, value in medians.items() if value is not None}
    if not known:
        return None
    return (max if figure.more_is_better else min)(known, key=known.__getitem__)


def ratios(ours: Sequence[float | None], theirs: Sequence[float | None], figure: Figure) -> list[float]:
    """Per round in which both have the figure: how many times as good ours is; above 1 is better."""
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=False) if a is not None and b is not None]
    return [a / b if figure.more_is_better else b / a for a, b in pairs]


HEAD = ("load", "figure")
TAIL = ("to the best peer", "goal")


def rows(result: Mapping[str, Any]) -> list[list[str]]:
    """The table, headings first: medians over the rounds; the ratio's median and extremes."""
    servers = result["servers"]
    made = [[*HEAD, *map(_heading, servers), *TAIL]]
    for load in result["loads"]:
        for at, figure in enumerate(load["figures"]):
            cells = [number(figure["medians"][server["name"]]) for server in servers]
            made.append([load["name"] if at == 0 else "", f"{figure['title']}, {figure['unit']}", *cells,
                         _ratio(figure), _goal(figure)])  # fmt: skip
    return made


def _heading(server: Mapping[str, Any]) -> str:
    """Its name; with why it has no figures, in a word."""
    if server["problem"] is None or server["command"] is not None:
        return str(server["name"])
    why = server["problem"] if server["problem"] in ("missing", "not offered") else "failed"
    return f"{server['name']} ({why})"


def _ratio(figure: Mapping[str, Any]) -> str:
    ratio = figure.get("ratio")
    if ratio is None:
        return "-"
    spread = "" if ratio["least"] == ratio["most"] else f" [{ratio['least']:.2f}-{ratio['most']:.2f}]"
    return f"{ratio['median']:.2f} x {figure['best_peer']}{spread}"


def _goal(figure: Mapping[str, Any]) -> str:
    if figure["goal"] is None:
        return ""
    return f"{figure['goal']:g} x: " + ("met" if figure["met"] else "**missed**")


def title(result: Mapping[str, Any]) -> str:
    where = result["environment"]
    return (
        f"{result['shape']}, {result['precision']} weights: medians of {_rounds(result)} rounds, "
        f"{result['threads']} threads, {result['kv_tokens']:,} tokens of KV in the first tier; "
        f"{where['cores']} cores of {where['processor']}, commit {where['commit']}"
    )


def _rounds(result: Mapping[str, Any]) -> int:
    return max((len(values) for load in result["loads"] for f in load["figures"] for values in f["rounds"].values()),
               default=0)  # fmt: skip


def notes(result: Mapping[str, Any]) -> list[str]:
    """A line per server: version, KV, whether it says what the first one says, what went wrong."""
    lines = []
    for server in result["servers"]:
        parts = [f"{server['name']}: {server['version'] or 'missing'}"]
        if server["command"] is not None:
            parts.append(f"KV in {server['kv']}")
        if server["of_characters"]:
            parts.append(
                f"first {server['same_characters']} of {server['of_characters']} characters as the first server's"
            )
        if server["problem"] not in (None, "missing"):
            parts.append(str(server["problem"]))
        lines.append(", ".join(parts))
    return lines


def markdown(result: Mapping[str, Any]) -> str:
    """Title, table and notes for the documentation."""
    headings, *body = rows(result)
    lines = [f"**{title(result)}**", "", f"| {' | '.join(headings)} |", "|" + "---|" * len(headings)]
    lines += [f"| {' | '.join(row)} |" for row in body]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes(result))])


def summary(results: Sequence[Mapping[str, Any]]) -> str:
    """What has a goal, of several results, as a table for the documentation."""
    lines = ["| | weights | Terrace | best peer | times as good | goal |", "|---|---|---|---|---|---|"]
    for load, key in [(one.name, figure.key) for one in LOADS for figure in one.figures]:
        for result in results:
            for other, same in _with_goals(result):
                if (other, same["key"]) != (load, key):
                    continue
                best, ours = same["best_peer"], next(iter(same["medians"].values()))
                theirs = "-" if best is None else f"{number(same['medians'][best])} {best}"
                cells = (f"{load}: {same['title']}, {same['unit']}", f"{result['shape']}, {result['precision']}",
                         number(ours), theirs, _ratio(same).replace(f" x {best}", ""), _goal(same))  # fmt: skip
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _with_goals(result: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(load["name"], f) for load in result["loads"] for f in load["figures"] if f["goal"] is not None]


def show(result: Mapping[str, Any], console: Console) -> None:
    """The same for the terminal."""
    table = Table(title=title(result), title_justify="left")
    headings, *body = rows(result)
    for at, heading in enumerate(headings):
        table.add_column(heading, justify="left" if at < len(HEAD) else "right")
    for row in body:
        table.add_row(*(cell.replace("**missed**", "[red]missed[/]") for cell in row))
    console.print(table)
    for note in notes(result):
        console.print(note, highlight=False, markup=False)


def missed(result: Mapping[str, Any]) -> list[str]:
    """The goals that were not met."""
    return [
        f"{load['name']}: {figure['title']} at least {figure['goal']:g} x the best peer's"
        for load in result["loads"]
        for figure in load["figures"]
        if figure["goal"] is not None and not figure["met"]
    ]


def chosen(names: str) -> list[Load]:
    """The named loads, all for an empty text. UsageError when there is no such load."""
    known = {load.name: load for load in LOADS}
    wanted = [name for name in names.split(",") if name] or list(known)
    for name in wanted:
        if name not in known:
            raise UsageError(f"--loads {name}: there are {', '.join(known)}")
    return [known[name] for name in wanted]
