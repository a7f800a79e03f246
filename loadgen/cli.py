"""`terrace bench`: measure a server, sweep to its knee, compare two results, run this repository's own claims.

Exit codes: 0 done, 1 requests failed or an objective or comparison was missed, 2 what was asked for cannot work, 3 the
client was at its limit and the figures are not the server's, 130 interrupted (what was over by then is reported).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from loadgen import bench, compare, plots, report, sweep
from loadgen.bench import Result, Settings
from loadgen.driver import Driver
from loadgen.errors import UsageError
from loadgen.workload import WORKLOADS

ACTIONS = ("run", "sweep", "compare", "suite", "selftest", "workloads")
OPEN_FILES = 65536


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0].startswith("-") and arguments[0] not in ("-h", "--help"):
        arguments.insert(0, "run")
    args = _parser().parse_args(arguments or ["--help"])
    allow_open_files()
    try:
        return int(args.run(args))
    except UsageError as error:
        print(f"terrace bench: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("terrace bench: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="terrace bench",
        description="Measure an OpenAI-compatible server: TTFT, TPOT, ITL, goodput, and what its KV tiers did.",
        epilog="`run` may be left out: terrace bench --request-rate 4. Flags of each: terrace bench run --help",
        allow_abbrev=False,
    )
    actions = parser.add_subparsers(metavar="|".join(ACTIONS), required=True)
    run = actions.add_parser("run", help="send one load and report on it", allow_abbrev=False)
    _add_settings(run)
    run.add_argument("--min-goodput", type=float, metavar="SHARE", help="exit 1 when fewer requests are good, 0 to 1")
    run.set_defaults(run=_run)
    knee = actions.add_parser("sweep", help="raise the rate until the server no longer keeps up", allow_abbrev=False)
    _add_settings(knee)
    knee.add_argument("--steps", type=int, default=3, metavar="N", help="halvings of the last interval [3]")
    knee.set_defaults(run=_sweep)
    two = actions.add_parser("compare", help="compare two results; exit 1 when B is worse", allow_abbrev=False)
    two.add_argument("before", type=Path, metavar="A", help="result.json or its folder")
    two.add_argument("after", type=Path, metavar="B")
    two.add_argument("--threshold", type=float, default=5.0, metavar="PERCENT", help="a smaller change is none [5]")
    two.set_defaults(run=_compare)
    claims = actions.add_parser("suite", help="this repository's own claims, on daemons it starts", allow_abbrev=False)
    claims.add_argument("names", nargs="*", metavar="NAME", help="only these; default: all")
    claims.add_argument("--quick", action="store_true", help="a minute instead of many: proves that it runs")
    claims.add_argument("--output", type=Path, metavar="DIR", help="where results go [loadgen/results]")
    claims.add_argument("--table", action="store_true", help="only renew the tables in loadgen/README.md and the page")
    claims.set_defaults(run=_suite)
    itself = actions.add_parser("selftest", help="judge this client: its truth and its reach", allow_abbrev=False)
    itself.add_argument("--quick", action="store_true", help="seconds instead of minutes: proves that it runs")
    itself.add_argument("--output", type=Path, metavar="FILE", help="where the result goes [loadgen/results]")
    itself.set_defaults(run=_selftest)
    listed = actions.add_parser("workloads", help="list the workloads and their parameters", allow_abbrev=False)
    listed.set_defaults(run=_workloads)
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    server = parser.add_argument_group("server")
    server.add_argument("--base-url", default=Settings.base_url, metavar="URL", help=f"[{Settings.base_url}]")
    server.add_argument("--model", metavar="ID", help="[the first that the server names]")
    server.add_argument("--chat", action="store_true", help="use /v1/chat/completions instead of /v1/completions")
    server.add_argument("--api-key-file", type=Path, metavar="FILE", help="file that holds the API key")
    server.add_argument("--body", type=json.loads, default={}, metavar="JSON", help="more fields of every request")
    server.add_argument(
        "--no-ignore-eos", dest="ignore_eos", action="store_false", help="let the model end its answers"
    )
    server.add_argument("--timeout", dest="timeout_s", type=float, default=600.0, metavar="S", help="per request [600]")
    what = parser.add_argument_group("what to send")
    what.add_argument("--workload", default="random", metavar="NAME", help="see terrace bench workloads [random]")
    what.add_argument("-P", dest="parameters", action="append", default=[], metavar="KEY=VALUE",
                      help="a parameter of the workload; may be repeated")  # fmt: skip
    what.add_argument("--num-sessions", "--num-prompts", dest="sessions", type=_count, metavar="N",
                      help="how many to start [100, or as many as --duration or the trace has]")  # fmt: skip
    what.add_argument("--duration", dest="duration_s", type=float, metavar="S", help="start none after this")
    what.add_argument("--token-ids", type=_span, metavar="LOW:HIGH", help="send token ids of this range, not text")
    what.add_argument("--seed", type=int, default=0, metavar="N", help="[0]")
    how = parser.add_argument_group("how fast")
    how.add_argument("--request-rate", type=float, metavar="R", help="open loop: sessions per second")
    how.add_argument("--arrivals", choices=("poisson", "constant", "gamma", "ramp"), default="poisson",
                     help="[poisson]")  # fmt: skip
    how.add_argument("--burstiness", type=float, default=1.0, metavar="B", help="shape of gamma arrivals; 1 is Poisson")
    how.add_argument("--ramp-to", type=float, metavar="R", help="the rate of a ramp at the end of --duration")
    how.add_argument("--max-concurrency", type=_count, metavar="N",
                     help="without a rate: a closed loop of N sessions; with one: at most N requests at once, and "
                     "waiting for a slot counts as latency")  # fmt: skip
    how.add_argument("--warmup", type=int, default=4, metavar="N", help="requests before, not counted [4]")
    how.add_argument("--repeats", type=_count, default=1, metavar="N", help="[1]; from 2 on with 95 %% intervals")
    out = parser.add_argument_group("report")
    out.add_argument("--goodput", nargs="+", default=(), metavar="NAME:MS", help="objectives, such as ttft:200 tpot:50")
    out.add_argument("--label", metavar="TEXT", help="a name for this result")
    out.add_argument("--output", type=Path, metavar="DIR", help="write result.json, requests.*, report.html and plots")
    out.add_argument("--quiet", action="store_true", help="no live progress")


def _settings(args: argparse.Namespace) -> Settings:
    names = {field.name for field in dataclasses.fields(Settings)}
    values: dict[str, Any] = {name: value for name, value in vars(args).items() if name in names}
    values["parameters"] = dict(_pair(text) for text in args.parameters)
    values["goodput"] = tuple(args.goodput)
    if not isinstance(args.body, dict):
        raise UsageError("--body: must be a JSON object")
    if args.api_key_file is not None:
        try:
            values["api_key"] = args.api_key_file.read_text(encoding="utf-8").split()[0]
        except (OSError, IndexError) as error:
            raise UsageError(f"--api-key-file {args.api_key_file}: {error}") from None
    if args.sessions is None and args.duration_s is None and args.workload not in ("mooncake", "jsonl"):
        values["sessions"] = 100
    return Settings(**values)


def _run(args: argparse.Namespace) -> int:
    settings, console = _settings(args), Console()
    result = measured(settings, console, quiet=args.quiet, partial=True)
    report.show(result.document, console)
    if args.output is not None:
        save(args.output, result, console)
    return _code(result, args.min_goodput)


def _code(result: Result, min_goodput: float | None) -> int:
    document = result.document
    if result.interrupted:
        return 130
    if not result.valid:
        return 3
    if min_goodput is not None:
        good = (document["request_goodput"] or 0.0) * document["duration"] / max(1, document["num_prompts"])
        if good < min_goodput:
            print(f"terrace bench: {good:.1%} of the requests were good, below {min_goodput:.1%}", file=sys.stderr)
            return 1
    return 1 if document["failed"] else 0


def measured(settings: Settings, console: Console, *, quiet: bool, partial: bool = False) -> Result:
    """One benchmark, with a line that shows how it goes on when somebody looks. `partial` as in `bench.run_sync`."""
    if quiet or not console.is_terminal:
        return bench.run_sync(settings, partial=partial)
    with Live(console=console, transient=True, auto_refresh=False) as live:

        def progress(name: str, driver: Driver) -> None:
            live.update(_progress_line(name, driver), refresh=True)

        return bench.run_sync(settings, progress, partial=partial)


def _progress_line(name: str, driver: Driver) -> str:
    ended = [outcome for outcome in driver.outcomes if outcome.end_s]
    failed = sum(outcome.error is not None for outcome in ended)
    firsts = sorted(o.first_s - o.scheduled_s for o in ended[-50:] if o.chunk_s and o.error is None)
    recent = f", TTFT {firsts[len(firsts) // 2] * 1e3:.0f} ms" if firsts else ""
    return (
        f"repeat {name}: {driver.now_s:.0f} s, {len(ended)} done, {driver.in_flight} in flight, {failed} failed{recent}"
    )


def save(folder: Path, result: Result, console: Console) -> None:
    """All files of one result."""
    paths = report.write(folder, result.document, result.outcomes)
    paths += plots.write(folder, result.document, result.outcomes)
    console.print("written: " + " ".join(map(str, paths)), highlight=False, soft_wrap=True)


def _sweep(args: argparse.Namespace) -> int:
    settings, console = _settings(args), Console()
    points = sweep.sweep(settings, args.steps, lambda s: measured(s, console, quiet=args.quiet), console)
    sweep.show(points, console)
    if args.output is not None:
        for point in points:
            save(args.output / f"rate-{point.rate:g}", point.result, console)
    return 0 if any(point.kept_up for point in points) else 1


def _compare(args: argparse.Namespace) -> int:
    sides = [compare.load(args.before), compare.load(args.after)]
    for name, side in zip("AB", sides, strict=True):
        for reason in compare.invalid(side):
            raise UsageError(f"{name} is not a valid measurement: {reason}")
    verdicts = compare.compare(sides[0], sides[1], args.threshold / 100)
    compare.show(verdicts, Console())
    for name, side in zip("AB", sides, strict=True):
        if side["failed"]:
            print(f"{name}: {side['failed']} of {side['num_prompts']} requests failed")
    worse = any(verdict.word == "worse" for verdict in verdicts)
    return 1 if worse or sides[1]["failed"] > sides[0]["failed"] else 0


def _suite(args: argparse.Namespace) -> int:
    from loadgen import suite  # starts daemons; what only measures one must not need what it needs

    return suite.main(args.names, quick=args.quick, output=args.output, table=args.table)


def _selftest(args: argparse.Namespace) -> int:
    from loadgen import selftest  # starts a server

    return selftest.main(quick=args.quick, output=args.output)


def _workloads(args: argparse.Namespace) -> int:
    for name, kind in WORKLOADS.items():
        fields = dataclasses.fields(kind)
        given = {f.name: str(f.default) if f.default is not dataclasses.MISSING else "(needed)" for f in fields}
        text = " ".join((kind.__doc__ or "").split())
        print(textwrap.fill(f"{name}: {text}", 100, subsequent_indent="    "))
        print(textwrap.fill(" ".join(f"{key}={value}" for key, value in given.items()), 100,
                            initial_indent="    -P ", subsequent_indent="       "))  # fmt: skip
    return 0


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"-P {text}: must look like key=value")
    return key, value


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _span(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    try:
        span = int(low), int(high)
    except ValueError:
        raise argparse.ArgumentTypeError("must look like 100:30000") from None
    if not 0 <= span[0] < span[1]:
        raise argparse.ArgumentTypeError("LOW must be below HIGH, and not negative")
    return span


def allow_open_files() -> None:
    """Every stream is a socket."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


if __name__ == "__main__":
    sys.exit(main())
