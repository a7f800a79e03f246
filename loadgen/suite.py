"""Runs the claims of `claims.py` on daemons it starts, keeps what it found, and makes the documentation's table of it.

The daemons of a claim live side by side and are measured in turns, round after round, so that what else the machine
does hits all of them. A round of an arm is one run of the load with a seed of its own. Raw results lie in
`results/CLAIM.json`; `report.html` beside them shows all of them.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from loadgen import agreement, bench, plots, report, selftest
from loadgen.bench import Result, Settings
from loadgen.claims import CLAIMS, Arm, Claim, Goal, Spare
from loadgen.daemon import Served
from loadgen.errors import UsageError
from loadgen.measure import latencies_ms, ttft_s
from loadgen.page import rendered
from loadgen.report import number

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent / "README.md"
MARKS = {
    part: (f"<!-- {part}: made by `terrace bench suite --table` -->", f"<!-- /{part} -->")
    for part in ("suite", "selftest", "agreement")
}
"""Between them lies a table of the documentation."""
HEAVY, HEAVY_OF_OURS = ("itls", "start_times", "errors"), ("timeline", "repeats", "formulas")
"""Left out of the kept result: its size, and not what a claim rests on."""
SETTLE_S = 1.0


@dataclass
class Found:
    """What came of one claim: per arm the result of every round."""

    claim: Claim
    rounds: dict[str, list[Result]] = field(default_factory=dict)

    def document(self, quick: bool) -> dict[str, Any]:
        """The kept result."""
        return {
            "claim": self.claim.name,
            "says": self.claim.says,
            "quick": quick,
            "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
            "environment": report.environment(),
            "only_later_turns": self.claim.only_later_turns,
            "arms": {arm.name: self._arm(arm) for arm in self.claim.arms},
            "verdicts": verdicts(self),
        }

    def _arm(self, arm: Arm) -> dict[str, Any]:
        results = self.rounds[arm.name]
        return {
            "flags": list(arm.flags),
            "disk_mb_per_s": arm.disk_mb_per_s,
            "beside": None if arm.beside is None else asdict(arm.beside),
            "settings": None if arm.settings is None else asdict(arm.settings),
            "ttft_ms": [median_ttft_ms(self.claim, result) for result in results],
            "hit_ratio": hit_ratio(self.claim, results),
            "failed": sum(result.document["failed"] for result in results),
            "invalid": [why for result in results for why in result.document["terrace"]["client"]["invalid_because"]],
            "remarks": remarks(results),
            "rounds": [kept(result.document) for result in results],
        }


def kept(document: Mapping[str, Any]) -> dict[str, Any]:
    """What of a round's result is kept."""
    ours = {key: value for key, value in document["terrace"].items() if key not in HEAVY_OF_OURS}
    return {key: value for key, value in document.items() if key not in HEAVY} | {"terrace": ours}


def counted(claim: Claim, result: Result) -> list[Any]:
    """The requests that a claim is about."""
    return [o for o in result.outcomes if o.error is None and (o.turn > 0 or not claim.only_later_turns)]


def median_ttft_ms(claim: Claim, result: Result) -> float:
    return statistics.median(ttft_s(outcome) * 1e3 for outcome in counted(claim, result))


def hit_ratio(claim: Claim, results: Sequence[Result]) -> float:
    """Of the prompt tokens of what is counted: how many came from the cache."""
    outcomes = [outcome for result in results for outcome in counted(claim, result)]
    return sum(o.cached_tokens for o in outcomes) / max(1, sum(o.prompt_tokens for o in outcomes))


def remarks(results: Sequence[Result]) -> list[str]:
    return [text for result in results for text in (result.document["terrace"]["server"] or {}).get("remarks", [])]


def verdicts(found: Found) -> list[dict[str, Any]]:
    """One per goal, and one for what the report must say, each with whether it is met."""
    claim = found.claim
    made = [_spare(found, goal) if isinstance(goal, Spare) else _against_first(found, goal) for goal in claim.goals]
    if claim.remark is not None:
        last = claim.arms[-1].name
        said = [text for text in remarks(found.rounds[last]) if claim.remark.lower() in text.lower()]
        made.append({"arm": last, "statement": "its report says what is wrong with the tier", "met": bool(said)})
    bad = [r for results in found.rounds.values() for r in results if r.document["failed"] or not r.valid]
    made.append({"arm": "all", "statement": "no request failed, the client was never late", "met": not bad})
    return made


def _against_first(found: Found, goal: Goal) -> dict[str, Any]:
    claim = found.claim
    first = claim.arms[0].name
    pairs = zip(found.rounds[goal.arm], found.rounds[first], strict=True)
    ratios = [_figure_ms(claim, goal, one) / _figure_ms(claim, goal, other) for one, other in pairs]
    name = goal.latency.upper()
    if goal.quantile != 0.5:
        name += " mean" if goal.quantile is None else f" p{100 * goal.quantile:g}"
    return _verdict(goal, name, f"{name} {_bounds(goal)} x that of {first}", ratios)


def _figure_ms(claim: Claim, goal: Goal, result: Result) -> float:
    samples = latencies_ms(counted(claim, result))[goal.latency]
    return statistics.fmean(samples) if goal.quantile is None else float(np.quantile(samples, goal.quantile))


def _spare(found: Found, goal: Spare) -> dict[str, Any]:
    first = found.claim.arms[0].name
    rounds = zip(found.rounds[goal.arm], found.rounds[goal.full], found.rounds[first], strict=True)
    ratios = []
    for beside, full, alone in rounds:
        served = _served(full)["tokens_per_s"] * (1 - _served(alone)["busy_ratio"])
        others = _served(beside)["tokens_per_s"] - asked_tokens_per_s(beside)
        ratios.append(others / served)
    statement = f"for others {_bounds(goal)} x what {goal.full} does in the time that {first} leaves"
    return _verdict(goal, "spare time used", statement, ratios)


def _served(result: Result) -> dict[str, float]:
    server = result.document["terrace"]["server"]
    if not server or "tokens_per_s" not in server:
        raise UsageError("the daemon does not say how much it computed")
    return dict(server)


def asked_tokens_per_s(result: Result) -> float:
    """Computed and generated for the requests that are measured, per second of the server's counting."""
    good = [outcome for outcome in result.outcomes if outcome.error is None]
    tokens = sum(o.prompt_tokens - o.cached_tokens + o.output_tokens for o in good)
    return tokens / _served(result)["seconds"]


def _bounds(goal: Goal | Spare) -> str:
    if not goal.least:
        return f"at most {goal.most:g}"
    return f"at least {goal.least:g}" if goal.most == inf else f"between {goal.least:g} and {goal.most:g}"


def _verdict(goal: Goal | Spare, figure: str, statement: str, ratios: Sequence[float]) -> dict[str, Any]:
    ratio = statistics.median(ratios)
    return {"arm": goal.arm, "statement": statement, "figure": figure, "ratio": ratio, "rounds": list(ratios),
            "met": goal.least <= ratio <= goal.most}  # fmt: skip


# --- running ---------------------------------------------------------------------------------------------------------


def measure(claim: Claim, rounds: int, console: Console) -> Found:
    """Start the daemons of a claim, measure them in turns, kill them."""
    found = Found(claim, {arm.name: [] for arm in claim.arms})
    with ExitStack() as stack:
        if claim.kill:
            for number_of in range(rounds):
                disk = stack.enter_context(tempfile.TemporaryDirectory())
                _killed(claim, disk, number_of, found, console)
            return found
        served: dict[Any, Served] = {}
        for arm in claim.arms:
            if _daemon(arm) not in served:
                disk = stack.enter_context(tempfile.TemporaryDirectory())
                served[_daemon(arm)] = stack.enter_context(Served(_flags(arm, disk), arm.disk_mb_per_s))
        for number_of in range(rounds):
            for arm in claim.arms if number_of % 2 == 0 else claim.arms[::-1]:
                result = _round(claim.settings, arm, served[_daemon(arm)].url, number_of)
                found.rounds[arm.name].append(result)
                _said(claim, arm, number_of, result, console)
    return found


def _killed(claim: Claim, disk: str, number_of: int, found: Found, console: Console) -> None:
    """The load on a fresh daemon, kill -9, a start, the very same load."""
    fresh, again = claim.arms
    served = Served(_flags(fresh, disk))
    with served:
        for arm in (fresh, again):
            result = _round(claim.settings, arm, served.url, number_of)
            found.rounds[arm.name].append(result)
            _said(claim, arm, number_of, result, console)
            if arm is fresh:
                time.sleep(SETTLE_S)  # what goes to the disk in the background gets there
                served.kill()
                served.start()


def _daemon(arm: Arm) -> tuple[Any, ...]:
    """What tells the daemons of arms apart."""
    return arm.flags, arm.disk_mb_per_s


def _flags(arm: Arm, disk: str) -> list[str]:
    return [flag.replace("{disk}", disk) for flag in arm.flags]


def _round(settings: Settings, arm: Arm, url: str, number_of: int) -> Result:
    asked = replace(arm.settings or settings, base_url=url, seed=1000 * number_of, label=arm.name)
    if arm.beside is None:
        return bench.run_sync(asked)
    result = asyncio.run(_beside(asked, replace(arm.beside, base_url=url, seed=1000 * number_of + 1)))
    if result.interrupted:
        raise KeyboardInterrupt
    return result


async def _beside(settings: Settings, other: Settings) -> Result:
    """Measure while `other` is sent too, from the same client."""
    background = asyncio.create_task(bench.run(other))
    try:
        await asyncio.sleep(SETTLE_S)
        if background.done():
            background.result()
        return await bench.run(settings)
    finally:
        background.cancel()
        await asyncio.gather(background, return_exceptions=True)


def _said(claim: Claim, arm: Arm, number_of: int, result: Result, console: Console) -> None:
    shown = f"TTFT {median_ttft_ms(claim, result):.1f} ms, {hit_ratio(claim, [result]):.0%} from the cache"
    if arm.beside is not None or arm.settings is not None:
        served = _served(result)
        others = served["tokens_per_s"] - (asked_tokens_per_s(result) if arm.settings is None else 0.0)
        shown += f", {others:.0f} tokens/s of it, device busy {served['busy_ratio']:.0%}"
    console.print(f"{claim.name}, round {number_of + 1}, {arm.name}: {shown}", highlight=False)


# --- what is kept and shown ------------------------------------------------------------------------------------------


def main(names: Sequence[str], *, quick: bool, output: Path | None, table: bool) -> int:
    """Measure the named claims, all by default; 1 when a goal is missed. `table`: only renew README and page."""
    folder = output or RESULTS
    if table:
        README.write_text(renewed(README.read_text(encoding="utf-8")), encoding="utf-8")
        (RESULTS / "report.html").write_text(page(load(RESULTS)), encoding="utf-8")
        return 0
    unknown = set(names) - {claim.name for claim in CLAIMS}
    if unknown:
        raise UsageError(f"suite {min(unknown)}: there are {', '.join(claim.name for claim in CLAIMS)}")
    if quick and output is None:
        raise UsageError("suite --quick: give --output; what a quick run finds is not kept among the results")
    folder.mkdir(parents=True, exist_ok=True)
    console = Console()
    missed = 0
    for claim in CLAIMS:
        if names and claim.name not in names:
            continue
        found = measure(claim.quick() if quick else claim, 1 if quick else claim.rounds, console)
        document = found.document(quick)
        (folder / f"{claim.name}.json").write_text(json.dumps(document, separators=(",", ":")) + "\n", encoding="utf-8")
        for verdict in document["verdicts"]:
            console.print(f"  {verdict_line(verdict)}", highlight=False)
            missed += not verdict["met"]
    (folder / "report.html").write_text(page(load(folder)), encoding="utf-8")
    console.print(f"report: {folder / 'report.html'}", highlight=False)
    return 1 if missed and not quick else 0


def verdict_line(verdict: Mapping[str, Any]) -> str:
    """`goal met: DRAM: TTFT at most 0.5 x that of tiers off: 0.21`."""
    ratio = f": {verdict['ratio']:.2f}" if "ratio" in verdict else ""
    return f"{'goal met' if verdict['met'] else 'GOAL MISSED'}: {verdict['arm']}: {verdict['statement']}{ratio}"


def load(folder: Path) -> list[dict[str, Any]]:
    """The kept results of a folder, in the order of the claims."""
    paths = [folder / f"{claim.name}.json" for claim in CLAIMS]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]


def page(documents: Sequence[Mapping[str, Any]]) -> str:
    """One self-contained page about all claims."""
    drawn = {document["claim"]: plots.ttft_by_arm(document) for document in documents}
    return rendered(plots.PAGES / "suite.html.j2", documents=documents, plots=drawn, verdict_line=verdict_line,
                          as_command=report.as_command)  # fmt: skip


def table(documents: Sequence[Mapping[str, Any]]) -> str:
    """The documentation's table: a row per claim and arm."""
    lines = [
        "| claim | arm | TTFT median ms | from the cache | against the first | goal |",
        "|---|---|---|---|---|---|",
    ]
    for document in documents:
        for name, arm in document["arms"].items():
            judged = [v for v in document["verdicts"] if v["arm"] == name and "ratio" in v]
            against = ", ".join(_multiple(verdict, alone=len(judged) == 1) for verdict in judged)
            goal = "" if not judged else "met" if all(verdict["met"] for verdict in judged) else "**missed**"
            cells = [document["claim"] if name == next(iter(document["arms"])) else "", name,
                     number(statistics.median(arm["ttft_ms"])), f"{arm['hit_ratio']:.0%}", against, goal]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    if not documents:
        return "Nothing was measured yet."
    commits = sorted({str(document["environment"]["commit"]) for document in documents})
    machines = sorted({f"{d['environment']['cores']} cores of {d['environment']['processor']}" for d in documents})
    return "\n".join([*lines, "", f"Commit {', '.join(commits)}; {', '.join(machines)}."])


def _multiple(verdict: Mapping[str, Any], *, alone: bool) -> str:
    figure = "" if alone else f"{verdict['figure']} "
    return f"{figure}{verdict['ratio']:.2f} x"


def renewed(text: str) -> str:
    """`text` with the tables between its marks made anew from the kept results."""
    for part, made in (
        ("suite", table(load(RESULTS))),
        ("selftest", selftest.table()),
        ("agreement", agreement.table()),
    ):
        begin, end = MARKS[part]
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}\n\n{made}\n\n{end}{after}"
    return text
