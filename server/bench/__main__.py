"""`python -m server.bench [NAME ...] [--quick] [--save]`: exit code 1 when a stated goal is missed."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from server.bench.report import Report

BENCHES = {
    "abuse": "server.bench.abuse:run",
    "attention": "server.bench.attention:run",
    "scheduler": "server.bench.scheduler:run",
    "metrics": "server.bench.metrics:run",
    "kernels": "server.bench.kernels:run",
    "model": "server.bench.model:run",
    "clients": "server.bench.clients:run",
    "grid": "server.bench.grid:run",
    "isolation": "server.bench.isolation:run",
    "quality": "server.bench.quality:run",
    "sampling": "server.bench.sampling:run",
    "scale": "server.bench.scale:run",
    "soak": "server.bench.soak:run",
    "split": "server.bench.split:run",
    "streaming": "server.bench.streaming:run",
    "structured": "server.bench.structured:run",
    "turns": "server.bench.turns:run",
    "tiers": "server.bench.tiers:run",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the named benchmarks, all by default; the exit code is 0 when every goal was met."""
    parser = argparse.ArgumentParser(
        prog="python -m server.bench", description="Measure this machine.", allow_abbrev=False
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(BENCHES)}; default: all")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller runs: a smoke test, not a measurement")
    parser.add_argument("--save", action="store_true", help="keep the raw results under server/bench/results/")
    args = parser.parse_args(argv)
    unknown = set(args.names) - set(BENCHES)
    if unknown:
        parser.error(f"unknown benchmark {sorted(unknown)[0]!r}; there are: {', '.join(BENCHES)}")
    missed = 0
    for name in args.names or BENCHES:
        module, _, function = BENCHES[name].partition(":")
        report: Report = getattr(importlib.import_module(module), function)(quick=args.quick)
        missed += len(report.missed)
        report.print_verdict()
        if args.save:
            print(f"raw results: {report.save()}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
