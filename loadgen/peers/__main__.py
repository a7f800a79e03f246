"""`python -m loadgen.peers`: Terrace and every other CPU server that is installed, the same weights, the same loads.

    python -m loadgen.peers install [NAME ...]     # all of them by default; minutes and gigabytes
    python -m loadgen.peers list
    python -m loadgen.peers table                  # of the kept results
    python -m loadgen.peers --shape 125m --precision bf16

Exit codes: 0 done, 1 a goal was missed, 2 what was asked for cannot work.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from loadgen.cli import allow_open_files
from loadgen.errors import UsageError
from loadgen.peers import side_by_side
from loadgen.peers.install import INSTALLERS, install, installed
from loadgen.peers.servers import CONTENDERS, MODELS, PRECISIONS, Contender, Model
from loadgen.peers.shapes import SHAPES

RESULTS = Path(__file__).parents[1] / "results"
ROUNDS = 5
QUICK_ROUNDS = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments.insert(0, "run")
    args = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # servers are killed then too
    try:
        return int(args.run(args))
    except UsageError as error:
        print(f"loadgen.peers: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadgen.peers", description="CPU servers side by side.")
    actions = parser.add_subparsers(required=True, metavar="run|install|list|table")
    add = actions.add_parser("install", help="install peers under .peers/")
    add.add_argument("names", nargs="*", metavar="NAME", help=f"[all] {', '.join(INSTALLERS)}")
    add.add_argument("--torch-index", metavar="URL", help="package index for torch alone, such as PyTorch's for CPUs")
    add.set_defaults(run=_install)
    actions.add_parser("list", help="which are installed").set_defaults(run=_list)
    table = actions.add_parser("table", help="of the kept results, as loadgen/README.md has it")
    table.add_argument("folder", nargs="?", type=Path, default=RESULTS, help="where they are [loadgen/results]")
    table.set_defaults(run=_table)
    run = actions.add_parser("run", help="measure (this word may be left out)")
    run.add_argument("--only", default="", metavar="NAMES", help="these peers, with commas between [all]")
    run.add_argument("--shape", default="125m", choices=SHAPES, help="[125m]")
    every = ",".join(PRECISIONS)
    run.add_argument("--precision", default=every, metavar="NAMES", help=f"of the weights [{every}]")
    run.add_argument("--loads", default="", metavar="NAMES", help="these loads [all]")
    run.add_argument("--repeats", type=int, default=ROUNDS, metavar="N", help=f"rounds [{ROUNDS}]")
    run.add_argument("--one-at-a-time", action="store_true", help="start and kill them in turns: less memory, longer")
    run.add_argument("--quick", action="store_true", help="one round of little: proves that it runs; keeps no result")
    run.add_argument("--output", type=Path, metavar="DIR", help="where results go [loadgen/results]")
    run.set_defaults(run=_run)
    return parser


def _install(args: argparse.Namespace) -> int:
    for name in args.names or INSTALLERS:
        if name not in INSTALLERS:
            raise UsageError(f"install {name}: there are {', '.join(INSTALLERS)}")
    failed = 0
    for name in args.names or INSTALLERS:
        try:
            print(f"{name:14} {install(name, args.torch_index)}", flush=True)
        except UsageError as error:
            failed += 1
            print(f"{name:14} NOT INSTALLED: {error}", flush=True)
    return int(failed > 0)


def _list(args: argparse.Namespace) -> int:
    del args
    for name in INSTALLERS:
        print(f"{name:14} {installed(name) or 'missing'}")
    return 0


def _table(args: argparse.Namespace) -> int:
    print(side_by_side.summary(kept(args.folder)))
    return 0


def kept(folder: Path) -> list[dict[str, Any]]:
    """The results in a folder."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("cpu-peers-*.json"))]


def _run(args: argparse.Namespace) -> int:
    allow_open_files()
    console = Console(width=None if sys.stdout.isatty() else 160)
    precisions, contenders = _precisions(args.precision), _contenders(args.only)
    loads = side_by_side.chosen(args.loads)
    if args.quick:
        loads = [load.quick() for load in loads]
    MODELS.mkdir(parents=True, exist_ok=True)
    missed = 0
    for precision in precisions:
        model = Model(SHAPES[args.shape], precision)
        taking_part = side_by_side.entries(contenders, model)
        side_by_side.measure(taking_part, loads, QUICK_ROUNDS if args.quick else args.repeats, console,
                             one_at_a_time=args.one_at_a_time)  # fmt: skip
        result = side_by_side.document(taking_part, loads, model, quick=args.quick)
        side_by_side.show(result, console)
        missed += len(side_by_side.missed(result))
        for goal in side_by_side.missed(result):
            console.print(f"GOAL MISSED: {goal}", highlight=False)
        folder = args.output or (None if args.quick else RESULTS)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"cpu-peers-{args.shape}-{precision}.json"
            path.write_text(json.dumps(result, separators=(",", ":")) + "\n", encoding="utf-8")
            path.with_suffix(".md").write_text(side_by_side.markdown(result) + "\n", encoding="utf-8")
    return 1 if missed and not args.quick else 0


def _precisions(names: str) -> list[str]:
    wanted = names.split(",")
    for name in wanted:
        if name not in PRECISIONS:
            raise UsageError(f"--precision {name}: there are {', '.join(PRECISIONS)}")
    return wanted


def _contenders(only: str) -> list[Contender]:
    """Ours, and the named peers."""
    ours, *peers = CONTENDERS
    wanted = [name for name in only.split(",") if name] or [peer.name for peer in peers]
    for name in wanted:
        if name not in [peer.name for peer in peers]:
            raise UsageError(f"--only {name}: there are {', '.join(peer.name for peer in peers)}")
    return [ours, *(peer for peer in peers if peer.name in wanted)]


if __name__ == "__main__":
    sys.exit(main())
