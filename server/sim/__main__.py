"""`python -m server.sim`: run seeded scenarios of the whole daemon on virtual time, or replay one that failed."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from server.sim.clock import SimFailure
from server.sim.scenario import run_seed
from server.sim.soak import run_soak


def _range(text: str) -> range:
    first, separator, last = text.partition("..")
    return range(int(first), int(last) + 1) if separator else range(int(first))


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 when every seed passed, 1 with the command that replays each failure otherwise."""
    parser = argparse.ArgumentParser(prog="python -m server.sim", description=__doc__)
    parser.add_argument("--seed", type=int, help="run this one")
    parser.add_argument("--seeds", type=_range, default=range(1000), metavar="A..B", help="run these (default 0..999)")
    parser.add_argument("--soak-hours", type=float, metavar="H", help="instead: one daemon for so many virtual hours")
    parser.add_argument("-v", "--verbose", action="store_true", help="one line per seed")
    options = parser.parse_args(argv)
    if options.soak_hours is not None:
        return _soak(options.soak_hours)
    seeds = range(options.seed, options.seed + 1) if options.seed is not None else options.seeds
    total: Counter[str] = Counter()
    failed = 0
    started_s = time.monotonic()
    for seed in seeds:
        try:
            outcome = run_seed(seed)
        except SimFailure as failure:
            failed += 1
            print(f"FAILED {failure}\n  replay: python -m server.sim --seed {seed} -v", flush=True)
            continue
        total += outcome.counts
        if options.verbose or options.seed is not None:
            print(outcome)
    elapsed_s = time.monotonic() - started_s
    print(f"{len(seeds) - failed} of {len(seeds)} seeds passed in {elapsed_s:.1f} s ({len(seeds) / elapsed_s:.1f}/s)")
    print(" ".join(f"{name}={count}" for name, count in sorted(total.items())))
    return 1 if failed else 0


def _soak(hours: float) -> int:
    started_s = time.monotonic()
    try:
        soak = run_soak(hours)
    except SimFailure as failure:
        print(f"FAILED {failure}")
        return 1
    print(f"{hours:g} virtual hours in {time.monotonic() - started_s:.0f} s\n{soak.outcome}")
    print("median (largest) in the first and in the second half:")
    for size in soak.sizes():
        halves = (f"{median:6g} ({most})" for median, most in zip(size.medians, size.largest, strict=True))
        print(f"  {size.name:16}", *(f"{half:16}" for half in halves))
    return 0


if __name__ == "__main__":
    sys.exit(main())
