"""Whether operators would see anything: `make observe`, or `python -m deploy.observe`.

Starts the demo model on tiers so small that all are used, a Prometheus that scrapes it every second and evaluates the
rules, and load. Then asks what the committed boards ask, as Grafana would. Exit code 0 when every query of every panel
returned numbers, every rule was evaluated, every recorded series exists, `promtool check metrics` has nothing to say,
and the alert on a dead daemon is raised once that is killed; 1 when not; 2 when Prometheus or the daemon cannot be had.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from deploy.promserver import HERE, Line, ObserveError, Prometheus, programs
from loadgen import bench
from loadgen.bench import Settings
from loadgen.daemon import Served
from loadgen.errors import UsageError

BOARDS = tuple(sorted((HERE / "grafana").glob("*.json")))
RULES = tuple(sorted((HERE / "prometheus" / "rules").glob("*.yaml")))
RATE_INTERVAL = "10s"
"""For `$__rate_interval`; Grafana takes at least four scrapes."""
DAEMON = ("demo", "--device-gib=0.02", "--block-size=64", "--dram-gib=0.02", "--ssd-gib=1", "--ssd-min-free-gib=0",
          "--ssd-write-gib-per-day=1000", "--ttft-target-ms=500", "--tpot-target-ms=50")  # fmt: skip
"""Device and DRAM hold about 7,000 tokens each; the conversations of LOAD three times that."""
LOAD = {"turns": "5", "first": "2000", "question": "50", "output": "16", "think_s": "1-2"}
SESSIONS_PER_S = 1.0
SETTLE_S = 2.0
TABLE_COLUMNS = 130
"""Of a table that goes to a file."""
NOTICED_S = 15.0
"""A dead daemon must be noticed by then, at one scrape a second."""


@dataclass(frozen=True)
class Asked:
    """One query. `board` is a uid; `panel` and `target` are Grafana's JSON of the panel and of the query."""

    board: str
    panel: Mapping[str, Any]
    target: Mapping[str, Any]

    @property
    def title(self) -> str:
        return str(self.panel["title"])

    @property
    def legend(self) -> str:
        return str(self.target["legendFormat"])

    @property
    def expression(self) -> str:
        return str(self.target["expr"])


@dataclass(frozen=True)
class Answered:
    """What came of it. `error`: why Prometheus refused it."""

    asked: Asked
    lines: Sequence[Line] = ()
    error: str = ""

    @property
    def good(self) -> bool:
        """Some series had a number at some time; NaN is what Grafana calls no data."""
        return any(line.finite for line in self.lines)


@dataclass
class Found:
    """Everything that was looked at. It is as it should be when `faults` is empty."""

    answers: list[Answered] = field(default_factory=list)
    rules: list[dict[str, Any]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    """Faults that are of no single query or rule."""

    @property
    def faults(self) -> list[str]:
        queries = [
            f"{a.asked.board}: {a.asked.title}: {a.error or 'no data'}: {a.asked.expression}"
            for a in self.answers
            if not a.good
        ]
        rules = [f"rule {r['name']}: {r.get('lastError') or r['health']}" for r in self.rules if r["health"] != "ok"]
        return queries + rules + self.remarks


def asked_by(board: Mapping[str, Any]) -> list[Asked]:
    """Every query of a board's JSON."""
    return [Asked(board["uid"], panel, target) for panel in board["panels"] for target in panel.get("targets", ())]


def variables(board: Mapping[str, Any], prometheus: Prometheus) -> dict[str, str]:
    """What Grafana puts in for the board's variables when all values are picked."""
    values = {"__rate_interval": RATE_INTERVAL}
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            match = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"])
            assert match, f"variable {variable['name']} asks for something else: {variable['query']}"
            found = prometheus.label_values(match[1], match[2])
            if not found:
                raise ObserveError(f"{board['title']}: nothing to pick for the variable {variable['name']}")
            values[variable["name"]] = "|".join(re.escape(value) for value in found).replace("\\", "\\\\")
    return values


def filled(expression: str, values: Mapping[str, str]) -> str:
    """`expression` with its `$variables` replaced; what is none, such as `${1}`, stays."""
    return re.sub(r"\$(\w+)", lambda match: values.get(match[1], match[0]), expression)


def ask(prometheus: Prometheus, asked: Asked, values: Mapping[str, str], since_s: float) -> Answered:
    """Over the whole time of the observation."""
    try:
        return Answered(asked, prometheus.query_range(filled(asked.expression, values), since_s, time.time()))
    except ObserveError as error:
        return Answered(asked, error=str(error))


def observe(seconds: float, boards: Sequence[Mapping[str, Any]]) -> Found:
    """Put load on a daemon for `seconds`, then ask. UsageError or ObserveError when something does not start."""
    found = Found()
    with tempfile.TemporaryDirectory(prefix="terrace-observe-") as scratch:
        folder = Path(scratch)
        (folder / "prometheus").mkdir()
        with (
            Served([*DAEMON, f"--ssd-path={folder / 'ssd'}"]) as daemon,
            Prometheus(folder / "prometheus", daemon.url.removeprefix("http://"), RULES) as prometheus,
        ):
            since_s = time.time()
            _put_load(daemon.url, seconds)
            time.sleep(SETTLE_S)
            for board in boards:
                values = variables(board, prometheus)
                found.answers += [ask(prometheus, asked, values, since_s) for asked in asked_by(board)]
            found.rules = _evaluated(prometheus)
            found.answers += [
                ask(prometheus, _recorded(r), {}, since_s) for r in found.rules if r["type"] == "recording"
            ]
            found.remarks += _lint(httpx.get(f"{daemon.url}/metrics", timeout=30, trust_env=False).text)
            daemon.kill()
            if not _noticed(prometheus):
                found.remarks.append(f"TerraceDown was not raised within {NOTICED_S:g} s of the daemon's death")
    return found


def _put_load(url: str, seconds: float) -> None:
    """Conversations, in open loop, none begun after `seconds`."""
    load = Settings(base_url=url, workload="multi-turn", parameters=LOAD, sessions=None, duration_s=seconds,
                    request_rate=SESSIONS_PER_S, warmup=2)  # fmt: skip
    bench.run_sync(load)


def _evaluated(prometheus: Prometheus) -> list[dict[str, Any]]:
    """All rules, once each was evaluated."""
    deadline_s = time.monotonic() + NOTICED_S
    while any(rule["health"] == "unknown" for rule in prometheus.rules()) and time.monotonic() < deadline_s:
        time.sleep(SETTLE_S)
    return prometheus.rules()


def _recorded(rule: Mapping[str, Any]) -> Asked:
    return Asked("rules", {"title": rule["name"]}, {"legendFormat": "", "expr": rule["name"]})


def _lint(metrics: str) -> list[str]:
    command = [str(programs() / "promtool"), "check", "metrics"]
    checked = subprocess.run(command, input=metrics, capture_output=True, text=True, check=False)
    return [
        f"promtool check metrics: {line}" for line in (checked.stdout + checked.stderr).splitlines() if line.strip()
    ]


def _noticed(prometheus: Prometheus) -> bool:
    """The alert on a dead daemon is pending: it fires once that has lasted."""
    deadline_s = time.monotonic() + NOTICED_S
    while time.monotonic() < deadline_s:
        if any(rule["name"] == "TerraceDown" and rule["state"] in ("pending", "firing") for rule in prometheus.rules()):
            return True
        time.sleep(0.5)
    return False


def show(found: Found, console: Console) -> None:
    """One table of all queries, one line of all rules, and the faults."""
    table = Table("board", "panel", "legend", "series", "with numbers", "latest", box=SIMPLE)
    for answer in found.answers:
        numbers = [line.finite for line in answer.lines if line.finite]
        latest = f"{numbers[0][-1][1]:.4g}" if numbers else answer.error or "no data"
        cells = (answer.asked.board, answer.asked.title, answer.asked.legend, str(len(answer.lines)), str(len(numbers)))
        table.add_row(*cells, latest, style=None if answer.good else "red")
    console.print(table)
    alerts = [rule for rule in found.rules if rule["type"] == "alerting"]
    raised = sorted({rule["name"] for rule in alerts if rule["state"] != "inactive"})
    good = sum(answer.good for answer in found.answers)
    console.print(f"{good} of {len(found.answers)} queries return data; {len(found.rules)} rules are evaluated, "
                  f"{len(alerts)} of them alerts; raised under load: {', '.join(raised) or 'none'}")  # fmt: skip
    for fault in found.faults:
        console.print(f"fault: {fault}", style="red", markup=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m deploy.observe", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60, help="of load (default: 60)")
    parser.add_argument(
        "--board", type=Path, action="append", default=[], metavar="JSON", help="ask for one more board"
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="draw both boards there as PNG")
    args = parser.parse_args(arguments)
    try:
        boards = [json.loads(path.read_text(encoding="utf-8")) for path in (*BOARDS, *args.board)]
        found = observe(args.seconds, boards)
    except (OSError, ValueError, ObserveError, UsageError) as error:
        print(f"observe: error: {error}", file=sys.stderr)
        return 2
    console = Console()
    console.width = max(console.width, TABLE_COLUMNS)
    show(found, console)
    if args.output is not None:
        from deploy.drawing import draw

        for path in draw(found.answers, args.output):
            print(path)
    return 1 if found.faults else 0


if __name__ == "__main__":
    sys.exit(main())
