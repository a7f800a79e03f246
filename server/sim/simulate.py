"""`terrace simulate`: what would other sizes, policies or disks have made of this trace?

Replays a trace (Mooncake's format, which the daemon records too) through the production scheduler and KV manager on
virtual time, once per combination of what is swept, and prints a row each, beside what any cache could have reached.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from loadgen.errors import UsageError
from loadgen.traces import read_mooncake
from server.errors import ConfigError, TerraceError
from server.kvcache.eviction import POLICIES as EVICTION
from server.scheduler.policy import POLICIES as SCHEDULING
from server.sim import bounds
from server.sim.profile import PRESETS, load_profile
from server.sim.replay import Asked, Replay, Served, Setup, Tiers, replay
from server.sim.stalls import CAUSES

UNITS = {"": 2**30, "gib": 2**30, "tib": 2**40, "mib": 2**20, "gb": 10**9, "tb": 10**12}
SIZE = re.compile(r"([0-9.]+)\s*(%|blocks|[a-z]*)")
DEVICE_MIN = 8
FILE_WIDTH = 200
"""Characters of a line where no terminal says how wide it is."""


@dataclass(frozen=True)
class What:
    """One combination. Sizes as typed: `80`, `80GiB`, `4TB`, `500blocks`, or `5%` of the trace's distinct blocks."""

    profile: str = "h200-8b"
    device: str = "80GiB"
    dram: str = "0"
    ssd: str = "0"
    eviction: str = "lru"
    policy: str = "fcfs"
    speedup: float = 1.0
    max_running: int = 256
    step_tokens: int = 8192


@dataclass(frozen=True)
class Trace:
    """A trace in memory."""

    asked: list[Asked]
    block_tokens: int
    distinct: int


def load_trace(path: str, limit: int | None = None) -> Trace:
    """The first `limit` requests of a trace file. UsageError names the line that is none."""
    rows = read_mooncake(path)[:limit]
    if not rows:
        raise ConfigError(f"{path} has no requests", param="trace")
    sizes = {row.block_tokens for row in rows}
    if len(sizes) > 1:
        raise ConfigError(f"{path} has blocks of {' and '.join(map(str, sorted(sizes)))} tokens", param="trace")
    start_ms, block_tokens = rows[0].at_ms, sizes.pop()
    number: dict[int, int] = {}
    asked = [
        Asked((row.at_ms - start_ms) / 1e3, row.input_tokens, max(1, row.output_tokens),
              [number.setdefault(block, len(number)) for block in row.blocks])
        for row in rows
    ]  # fmt: skip
    return Trace(asked, block_tokens, len(number))


def frames(text: str, block_bytes: int, distinct: int, name: str) -> int:
    """How many blocks a size is. ConfigError when it is none."""
    match = SIZE.fullmatch(text.strip().lower())
    try:
        if match and match[2] == "%":
            return int(float(match[1]) / 100 * distinct)
        if match and match[2] == "blocks":
            return int(match[1])
        if match and match[2] in UNITS:
            return int(float(match[1]) * UNITS[match[2]]) // block_bytes
    except ValueError:
        pass
    raise ConfigError(f"--{name} {text}: must look like 80GiB, 4TB, 5% or 500blocks", param=name)


def setup_of(what: What, trace: Trace) -> Setup:
    """The daemon of one combination. ConfigError when it cannot be."""
    profile = load_profile(what.profile)
    block_bytes = profile.kv_bytes_per_token * trace.block_tokens
    sizes = {name: frames(getattr(what, name), block_bytes, trace.distinct, name) for name in ("device", "dram", "ssd")}
    if sizes["device"] < DEVICE_MIN:
        raise ConfigError(f"--device {what.device} is {sizes['device']} blocks of {block_bytes} bytes; give it more")
    if sizes["ssd"] and not sizes["dram"]:
        raise ConfigError("--ssd needs --dram: blocks go to SSD by way of DRAM")
    for name, value, known in (("eviction", what.eviction, EVICTION), ("policy", what.policy, SCHEDULING)):
        if value not in known:
            raise ConfigError(f"--{name} {value}: there are {', '.join(sorted(known))}", param=name)
    return Setup(profile, Tiers(**sizes, eviction=what.eviction), trace.block_tokens, what.policy, what.max_running,
                 what.step_tokens)  # fmt: skip


def run(what: What, trace: Trace, slo_ms: Mapping[str, float]) -> dict[str, Any]:
    """Replay one combination; its figures."""
    setup = setup_of(what, trace)
    asked = trace.asked
    if what.speedup != 1:
        asked = [replace(one, at_s=one.at_s / what.speedup) for one in asked]
    started_s = time.perf_counter()
    found = replay(setup, asked)
    return {**asdict(what), **figures(found, setup, slo_ms), "wall_s": time.perf_counter() - started_s}


def figures(found: Replay, setup: Setup, slo_ms: Mapping[str, float]) -> dict[str, Any]:
    """What a replay shows: milliseconds, shares of prompt tokens, bytes."""
    good = [one for one in found.served if one.refused is None]
    prompt = sum(one.asked.prompt_tokens for one in good)
    hits = {name: sum(one.by_tier.get(name, 0) for one in good) / prompt for name in ("device", "dram", "ssd")}
    ttft = [one.ttft_s for one in good if one.ttft_s is not None]
    tpot = [one.tpot_s for one in good if one.tpot_s is not None]
    block_bytes = setup.profile.kv_bytes_per_token * setup.block_tokens
    moved = {f"{hop.source}>{hop.target}": hop.moved_blocks * block_bytes for hop in found.kv.hops}
    met = sum(_met(one, slo_ms) for one in good)
    return {
        "requests": len(found.served),
        "refused": len(found.served) - len(good),
        "hit": sum(hits.values()),
        "hit_by_tier": hits,
        **_distribution("ttft", ttft),
        **_distribution("tpot", tpot),
        "stalls_s": {cause: sum(one.stalls_s[cause] for one in good) for cause in CAUSES},
        "met": met / len(found.served),
        "goodput": met / found.seconds if found.seconds else 0.0,
        "virtual_s": found.seconds,
        "device_busy": found.busy_s / found.seconds if found.seconds else 0.0,
        "steps": found.steps,
        "preemptions": found.preemptions,
        "moved_bytes": moved,
        "ssd_written_bytes": moved.get("dram>ssd", 0),
        "declined_blocks": {tier.name: dict(tier.declined) for tier in found.kv.tiers},
    }


def _met(one: Served, slo_ms: Mapping[str, float]) -> bool:
    values = {"ttft": one.ttft_s, "tpot": one.tpot_s, "e2el": one.e2e_s}
    return all((value := values[name]) is None or value * 1e3 <= limit for name, limit in slo_ms.items())


def _distribution(name: str, samples: Sequence[float]) -> dict[str, float | None]:
    if not samples:
        return dict.fromkeys(f"{key}_{name}_ms" for key in ("mean", "p50", "p90", "p99"))
    p50, p90, p99 = np.percentile(samples, (50, 90, 99)) * 1e3
    return {f"mean_{name}_ms": float(np.mean(samples)) * 1e3, f"p50_{name}_ms": float(p50),
            f"p90_{name}_ms": float(p90), f"p99_{name}_ms": float(p99)}  # fmt: skip


def limits(trace: Trace, capacity: int) -> dict[str, float]:
    """Shares of prompt tokens that a cache of `capacity` blocks could serve: knowing the future, and without end."""
    prompt = sum(one.prompt_tokens for one in trace.asked)
    blocks = {"optimal": bounds.optimal(trace.asked, trace.block_tokens, capacity),
              "infinite": bounds.infinite(trace.asked, trace.block_tokens)}  # fmt: skip
    return {name: count * trace.block_tokens / prompt for name, count in blocks.items()}


# --- the command line ------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 2 what was asked for cannot work."""
    args = _parser().parse_args(argv)
    try:
        return _simulate(args, Console(width=None if sys.stdout.isatty() else FILE_WIDTH))
    except (TerraceError, UsageError) as error:
        print(f"terrace simulate: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="terrace simulate", description=(__doc__ or "").partition("\n\n")[2],
                                     allow_abbrev=False)  # fmt: skip
    parser.add_argument("trace", metavar="TRACE", help="Mooncake JSON lines, also gzipped; see serve --record-path")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N requests")
    helps = {"profile": f"{', '.join(PRESETS)} or a JSON file", "device": "80GiB, 5%% or 500blocks",
             "eviction": ", ".join(sorted(EVICTION)), "policy": ", ".join(sorted(SCHEDULING)),
             "speedup": "shrink the time between requests", "max_running": "requests running at once",
             "step_tokens": "tokens per step"}  # fmt: skip
    for name, default in asdict(What()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", dest=name, type=type(default), default=default,
                            metavar=name.upper(), help=f"{helps.get(name, '')} [{default}]")  # fmt: skip
    parser.add_argument("--sweep", action="append", default=[], metavar="NAME=A,B,C",
                        help="all of these instead of one; repeat for all combinations")  # fmt: skip
    parser.add_argument("--slo", nargs="+", default=[], metavar="NAME:MS", help="such as ttft:2000 tpot:50")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="combinations at once [1]")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write simulation.json there")
    return parser


def _simulate(args: argparse.Namespace, console: Console) -> int:
    trace = load_trace(args.trace, args.limit)
    base = What(**{field.name: getattr(args, field.name) for field in fields(What)})
    chosen = combinations(base, args.sweep)
    for what in chosen:
        setup_of(what, trace)  # what cannot work is known before an hour has passed
    work = partial(run, trace=trace, slo_ms=slo(args.slo))
    if args.jobs > 1:
        with ProcessPoolExecutor(args.jobs) as pool:
            rows = list(pool.map(work, chosen))
    else:
        rows = [work(what) for what in chosen]
    for what, row in zip(chosen, rows, strict=True):
        tiers = setup_of(what, trace).tiers
        row["limits"] = limits(trace, tiers.device + tiers.dram + tiers.ssd)
    show(rows, swept(chosen), console)
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        path = args.output / "simulation.json"
        path.write_text(json.dumps({"trace": Path(args.trace).name, "rows": rows}) + "\n", encoding="utf-8")
        console.print(f"written: {path}", highlight=False)
    return 0


def slo(texts: Sequence[str]) -> dict[str, float]:
    """`ttft:2000 tpot:50`, milliseconds."""
    from loadgen.measure import Objectives

    return dict(Objectives.parse(texts).limits_ms)


def combinations(base: What, sweeps: Sequence[str]) -> list[What]:
    """`base` with every combination of what the sweeps name."""
    kinds: dict[str, type[Any]] = {name: type(value) for name, value in asdict(What()).items()}
    axes: list[list[tuple[str, Any]]] = []
    for text in sweeps:
        name, _, values = text.partition("=")
        name = name.replace("-", "_")
        if name not in kinds or not values:
            raise ConfigError(f"--sweep {text}: must look like dram=0,256GiB; there are {', '.join(kinds)}")
        try:
            axes.append([(name, kinds[name](value)) for value in values.split(",")])
        except ValueError as error:
            raise ConfigError(f"--sweep {text}: {error}") from None
    return [replace(base, **dict(chosen)) for chosen in itertools.product(*axes)]


def swept(chosen: Sequence[What]) -> list[str]:
    """The names of what differs between the combinations."""
    return [field.name for field in fields(What) if len({getattr(what, field.name) for what in chosen}) > 1]


def show(rows: Sequence[Mapping[str, Any]], names: Sequence[str], console: Console) -> None:
    """The table: a row per combination."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    columns = [*names, "hit", "device", "dram", "ssd", "optimal", "infinite", "TTFT mean", "p50", "p99", "TPOT p99",
               "met", "busy", "SSD GB written", "refused"]  # fmt: skip
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows:
        hits = [f"{share:.1%}" for share in (row["hit"], *row["hit_by_tier"].values(), *row["limits"].values())]
        times = [_ms(row[key]) for key in ("mean_ttft_ms", "p50_ttft_ms", "p99_ttft_ms", "p99_tpot_ms")]
        others = [f"{row['met']:.1%}", f"{row['device_busy']:.0%}", f"{row['ssd_written_bytes'] / 1e9:,.0f}"]
        table.add_row(*(str(row[name]) for name in names), *hits, *times, *others, str(row["refused"]))
    console.print(table)


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f} ms" if value >= 100 else f"{value:.1f} ms"


if __name__ == "__main__":
    sys.exit(main())
