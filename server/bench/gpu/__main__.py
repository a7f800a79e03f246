"""`python -m server.bench.gpu [PART ...] [--dry] [--save]`: what a GPU has to prove, in under ten minutes.

Exit codes: 0 every goal was met (or it was a dry run), 1 one was missed, 2 there is no CUDA device.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from server.bench.gpu import lines, parts
from server.bench.gpu.chip import Chip, Gpu, StandIn
from server.bench.gpu.sizes import DRY, FULL
from server.config import ServerConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the named parts, all by default."""
    args = _parser().parse_args(argv)
    by_name = {part.name: part for part in parts.PARTS}
    unknown = set(args.names) - set(by_name)
    if unknown:
        sys.stderr.write(f"unknown part {sorted(unknown)[0]!r}; there are: {', '.join(by_name)}\n")
        return 2
    if not args.dry and not torch.cuda.is_available():
        sys.stderr.write("no CUDA device is visible to torch; --dry runs all of it on a CPU, and measures nothing\n")
        return 2
    if args.alone:
        return _alone(by_name[args.alone], dry=args.dry)
    return _all([by_name[name] for name in args.names or by_name], args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m server.bench.gpu", description="Measure a GPU.")
    parser.add_argument("names", nargs="*", metavar="PART", help=", ".join(part.name for part in parts.PARTS))
    parser.add_argument("--dry", action="store_true", help="tiny, on a CPU: shows that it runs, measures nothing")
    parser.add_argument("--save", action="store_true", help="keep the result, by the name of the device")
    parser.add_argument("--output", type=Path, default=lines.RESULTS, metavar="DIR", help="where [loadgen/results]")
    parser.add_argument("--commit", default="", help="what is measured, where git cannot say")
    parser.add_argument("--limit-s", type=float, default=parts.LIMIT_S, help=f"all in all [{parts.LIMIT_S:g}]")
    parser.add_argument(
        "--alone", metavar="PART", choices=[part.name for part in parts.PARTS],
        help="one part in this process, lines as JSON; known figures as JSON on standard input",
    )  # fmt: skip
    return parser


def _chip(*, dry: bool) -> Chip:
    return StandIn() if dry else Gpu()


def _alone(part: parts.Part, *, dry: bool) -> int:
    sys.setswitchinterval(ServerConfig().switch_interval_s)  # as `terrace serve` does
    known = json.loads(sys.stdin.read() or "{}")
    problem = parts.here(_chip(dry=dry), DRY if dry else FULL, part, known, parts.say)
    sys.stderr.write(f"{problem.removeprefix('failed: ')}\n" if problem else "")
    return 1 if problem else 0


def _all(chosen: Sequence[parts.Part], args: argparse.Namespace) -> int:
    table, wanted = lines.Table(dry=args.dry), lines.goals(DRY if args.dry else FULL)
    own = [sys.executable, "-m", "server.bench.gpu", *(["--dry"] if args.dry else []), "--alone"]

    def launch(part: parts.Part, budget_s: float, known: parts.Known, take: parts.Take) -> str:
        table.part(part.name)
        return parts.apart([*own, part.name], budget_s, known, take)

    facts = _chip(dry=args.dry).facts()
    found, outcomes = list[lines.Line](), list[lines.Outcome]()

    def keep() -> Path:
        return lines.save(lines.document(facts, wanted, found, outcomes, dry=args.dry, commit=args.commit), args.output)

    def show(line: lines.Line) -> None:
        found.append(line)
        table.line(line)
        if args.save:  # what was found is kept, whatever ends the run
            keep()

    def ended(outcome: lines.Outcome) -> None:
        outcomes.append(outcome)
        table.outcome(outcome)

    parts.measure(chosen, launch, time.monotonic, show, ended, args.limit_s)
    missed = table.verdict(wanted, found)
    if args.save:
        sys.stdout.write(f"result: {keep()}\n")
    return 1 if missed and not args.dry else 0


if __name__ == "__main__":
    sys.exit(main())
