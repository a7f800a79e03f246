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
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from math import inf, isfinite
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import track

from loadgen.errors import UsageError
from loadgen.measure import Objectives
from loadgen.report import environment
from loadgen.traces import Recorded, read_mooncake
from server.errors import ConfigError, TerraceError
from server.kvcache.eviction import POLICIES as EVICTION
from server.scheduler.policy import POLICIES as SCHEDULING
from server.sim import bounds, page, summary
from server.sim.profile import PRESETS, load_profile
from server.sim.replay import Asked, Replay, Served, Setup, Tiers, replay
from server.sim.stalls import CAUSES
from server.types import NO_TARGETS, ONLINE, ServiceClass, Targets

Item = TypeVar("Item")
Result = TypeVar("Result")

FORMAT = 1
"""Of simulation.json."""
UNITS = {"": 2**30, "gib": 2**30, "tib": 2**40, "mib": 2**20, "gb": 10**9, "tb": 10**12}
SIZE = re.compile(r"([0-9.]+)\s*(%|blocks|[a-z]*)")
BACKGROUND = ServiceClass(background=True)
DEVICE_MIN = 8
"""Blocks: fewer hold no request worth the name."""
FILE_WIDTH = 120
"""Characters of a line where no terminal says how wide it is."""


@dataclass(frozen=True)
class What:
    """One combination. Sizes as typed: `80`, `80GiB`, `4TB`, `500blocks`, or `5%` of the trace's distinct blocks.
    `load`: arrivals come at so much of what this daemon can do; 0: at the trace's own times."""

    profile: str = "h200-8b"
    device: str = "80GiB"
    dram: str = "0"
    ssd: str = "0"
    eviction: str = "learned"
    ssd_write_share: float = 1.0
    policy: str = "fcfs"
    refuse_late: int = 0
    max_running: int = 256
    step_tokens: int = 8192
    speedup: float = 1.0
    load: float = 0.0


HELP = {
    "profile": ("NAME", f"model and machine: {', '.join(PRESETS)}, or a JSON file"),
    "device": ("SIZE", "for KV: 80GiB, 4TB, 500blocks, or 5%% of the trace's distinct blocks"),
    "dram": ("SIZE", "DRAM tier"),
    "ssd": ("SIZE", "SSD tier"),
    "eviction": ("NAME", ", ".join(sorted(EVICTION))),
    "ssd_write_share": ("X", "of the blocks that come down to a full SSD tier, the share to write"),
    "policy": ("NAME", f"scheduling: {', '.join(sorted(SCHEDULING))}"),
    "refuse_late": ("0|1", "1: refuse at once who is not expected to meet the --slo of its TTFT"),
    "max_running": ("N", "requests running at once"),
    "step_tokens": ("N", "tokens per step"),
    "speedup": ("X", "shrink the time between requests"),
    "load": ("X", "stretch it so that the work is X times what this daemon can do; 0: do not"),
}


@dataclass(frozen=True)
class Trace:
    """A trace in memory. Times count from the first request; blocks are numbered from 0."""

    asked: list[Asked]
    block_tokens: int
    distinct: int

    @property
    def span_s(self) -> float:
        return self.asked[-1].at_s


class NoWayDown(ConfigError):
    """An SSD tier without one of DRAM above it. In a sweep such a combination is left out."""


def load_trace(
    path: str, limit: int | None = None, targets: Targets = NO_TARGETS, background: str | None = None
) -> Trace:
    """The first `limit` requests of a trace file, with these `targets` where it says none; and all of another file, in
    the `background` from the beginning on. UsageError names the line that is none."""
    rows = read_mooncake(path)[:limit]
    if not rows:
        raise ConfigError(f"{path} has no requests", param="trace")
    sizes = {row.block_tokens for row in rows}
    if len(sizes) > 1:
        raise ConfigError(f"{path} has blocks of {' and '.join(map(str, sorted(sizes)))} tokens", param="trace")
    start_ms, block_tokens = rows[0].at_ms, sizes.pop()
    number: dict[int, int] = {}
    asked = []
    for row in rows:
        if len(row.blocks) != -(-row.input_tokens // block_tokens):
            raise ConfigError(f"{path}, the request at {row.at_ms:g} ms: {len(row.blocks)} hash_ids for "
                              f"{row.input_tokens} tokens in blocks of {block_tokens}", param="trace")  # fmt: skip
        blocks = [number.setdefault(block, len(number)) for block in row.blocks]
        asked.append(Asked((row.at_ms - start_ms) / 1e3, row.input_tokens, max(1, row.output_tokens), blocks,
                           _class_of(row, targets)))  # fmt: skip
    if all(one.service.background for one in asked):
        raise ConfigError(f"{path}: all requests are in the background; there must be others", param="trace")
    if background is not None:
        other = load_trace(background)
        if other.block_tokens != block_tokens:
            raise ConfigError(f"{background} has blocks of {other.block_tokens} tokens, {path} of {block_tokens}",
                              param="background")  # fmt: skip
        first = len(number)
        batch = [replace(one, at_s=0.0, blocks=[first + block for block in one.blocks], service=BACKGROUND)
                 for one in other.asked]  # fmt: skip
        return Trace([*batch, *asked], block_tokens, first + other.distinct)
    return Trace(asked, block_tokens, len(number))


def _class_of(row: Recorded, targets: Targets) -> ServiceClass:
    """What a line says of its request's class, and `targets` where it says nothing of these."""
    ttft_s = targets.ttft_s if row.ttft_target_ms is None else row.ttft_target_ms / 1e3
    tpot_s = targets.tpot_s if row.tpot_target_ms is None else row.tpot_target_ms / 1e3
    if row.background:
        ttft_s = tpot_s = inf
    return ServiceClass(row.tenant, row.priority, row.background, Targets(ttft_s, tpot_s))


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
        raise NoWayDown("--ssd needs --dram: blocks go to SSD by way of DRAM", param="ssd")
    for name, value, known in (("eviction", what.eviction, EVICTION), ("policy", what.policy, SCHEDULING)):
        if value not in known:
            raise ConfigError(f"--{name} {value}: there are {', '.join(sorted(known))}", param=name)
    for name in ("max_running", "step_tokens", "speedup", "ssd_write_share", "load"):
        value = getattr(what, name)
        if not isfinite(value) or value < 0 or (value == 0 and name != "load"):
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be above 0", param=name)
    if what.refuse_late not in (0, 1):
        raise ConfigError(f"--refuse-late {what.refuse_late}: must be 0 or 1", param="refuse_late")
    if what.ssd_write_share > 1:
        raise ConfigError(f"--ssd-write-share {what.ssd_write_share}: must be 1 at most", param="ssd_write_share")
    if what.load and what.speedup != 1:
        raise ConfigError("--load sets when requests come; leave --speedup away", param="load")
    if what.load and not trace.span_s:
        raise ConfigError("--load: all requests of the trace come at the same time", param="load")
    tiers = Tiers(**sizes, eviction=what.eviction, write_share=what.ssd_write_share)
    return Setup(profile, tiers, trace.block_tokens, what.policy, what.max_running, what.step_tokens,
                 bool(what.refuse_late))  # fmt: skip


# --- one combination -------------------------------------------------------------------------------------------------


def daemon_of(what: What) -> What:
    """Whose capacity is meant by `load`: the same machine and sizes with the first policies there were, so that all
    policies of a sweep get the same arrivals."""
    return What(what.profile, what.device, what.dram, what.ssd, "lru", policy="fcfs", max_running=what.max_running,
                step_tokens=what.step_tokens)  # fmt: skip


def work_s(daemon: What, trace: Trace) -> float:
    """How long a daemon takes for the whole trace when it need never wait for the next request."""
    online = [replace(one, at_s=0.0, service=ONLINE) for one in trace.asked if not one.service.background]
    return replay(setup_of(daemon, trace), online).seconds


def run(job: tuple[What, float | None], trace: Trace, slo_ms: Mapping[str, float]) -> dict[str, Any]:
    """Replay one combination, with its daemon's `work_s` where a load is wanted; its figures."""
    what, work = job
    setup = setup_of(what, trace)
    stretch = 1 / what.speedup if work is None else work / what.load / trace.span_s
    asked = trace.asked if stretch == 1 else [replace(one, at_s=one.at_s * stretch) for one in trace.asked]
    started_s = time.perf_counter()
    found = replay(setup, asked)
    tiers = setup.tiers
    return {
        **asdict(what),
        "blocks": {"device": tiers.device, "dram": tiers.dram, "ssd": tiers.ssd},
        "capacity_requests_per_s": None if work is None else len(asked) / work,
        **figures(found, setup, slo_ms),
        "wall_s": time.perf_counter() - started_s,
    }


def figures(found: Replay, setup: Setup, slo_ms: Mapping[str, float]) -> dict[str, Any]:
    """What a replay shows: milliseconds, shares of prompt tokens, bytes. Refused requests count as refused only, and as
    not having met the SLO."""
    online = [one for one in found.served if not one.asked.service.background]
    good = [one for one in online if one.refused is None]
    prompt = sum(one.asked.prompt_tokens for one in good) or 1
    hits = {name: sum(one.by_tier.get(name, 0) for one in good) / prompt for name in ("device", "dram", "ssd")}
    block_bytes = setup.profile.kv_bytes_per_token * setup.block_tokens
    moved = {f"{hop.source}>{hop.target}": hop.moved_blocks * block_bytes for hop in found.kv.hops}
    met = sum(_met(one, slo_ms) for one in good)
    seconds = found.seconds or 1.0
    return {
        "requests": len(online),
        "refused": len(online) - len(good),
        "refused_because": dict(Counter(one.refused for one in online if one.refused is not None)),
        "hit": sum(hits.values()),
        "hit_by_tier": hits,
        **_distribution("ttft", [one.ttft_s for one in good if one.ttft_s is not None]),
        **_distribution("tpot", [one.tpot_s for one in good if one.tpot_s is not None]),
        **_distribution("e2el", [one.e2e_s for one in good if one.e2e_s is not None]),
        "stalls_s": {cause: sum(one.stalls_s[cause] for one in good) for cause in CAUSES},
        "met": met / len(online),
        "goodput": met / seconds,
        "virtual_s": found.seconds,
        "device_busy": found.busy_s / seconds,
        "device_idle_loading": found.idle_loading_s / seconds,
        "steps": found.steps,
        "preemptions": found.preemptions,
        "moved_bytes": moved,
        "ssd_written_bytes": moved.get("dram>ssd", 0),
        "background": {
            "requests": len(found.served) - len(online),
            "ended": sum(one.e2e_s is not None for one in found.served if one.asked.service.background),
            "tokens_per_s": found.background_tokens / seconds,
        },
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
    online = [one for one in trace.asked if not one.service.background]
    prompt = sum(one.prompt_tokens for one in online)
    blocks = {"optimal": bounds.optimal(online, trace.block_tokens, capacity),
              "infinite": bounds.infinite(online, trace.block_tokens)}  # fmt: skip
    return {name: count * trace.block_tokens / prompt for name, count in blocks.items()}


# --- all of them -----------------------------------------------------------------------------------------------------


def simulate(chosen: Sequence[What], trace: Trace, slo_ms: Mapping[str, float], jobs: int = 1) -> list[dict[str, Any]]:
    """A row per combination, `jobs` processes at once. ConfigError before anything is replayed if one cannot be."""
    tiers = [setup_of(what, trace).tiers for what in chosen]
    daemons = list(dict.fromkeys(daemon_of(what) for what in chosen if what.load))
    measured = dict(zip(daemons, _each(partial(work_s, trace=trace), daemons, jobs, "capacity"), strict=True))
    work = [(what, measured[daemon_of(what)] if what.load else None) for what in chosen]
    rows = _each(partial(run, trace=trace, slo_ms=slo_ms), work, jobs, "replay")
    capacities = [one.device + one.dram + one.ssd for one in tiers]
    known = {capacity: limits(trace, capacity) for capacity in set(capacities)}
    for row, capacity in zip(rows, capacities, strict=True):
        row["limits"] = known[capacity]
    return rows


def _each(work: Callable[[Item], Result], items: Sequence[Item], jobs: int, label: str) -> list[Result]:
    """In order, with a bar on a terminal."""
    console = Console(stderr=True)

    def gathered(results: Iterable[Result]) -> list[Result]:
        quiet = not console.is_terminal or not items
        return list(track(results, label, len(items), console=console, transient=True, disable=quiet))

    if jobs == 1 or len(items) < 2:
        return gathered(map(work, items))
    with ProcessPoolExecutor(min(jobs, len(items))) as pool:
        return gathered(pool.map(work, items))


def document_of(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that was asked for and found; what simulation.json holds."""
    slo_ms = dict(Objectives.parse(args.slo).limits_ms)
    targets = Targets(*(slo_ms.get(name, inf) / 1e3 for name in ("ttft", "tpot")))
    trace = load_trace(args.trace, args.limit, targets, args.background)
    base = What(**{field.name: getattr(args, field.name) for field in fields(What)})
    chosen, left_out = possible(combinations(base, args.sweep), trace)
    rows = simulate(chosen, trace, slo_ms, args.jobs)
    names = swept(chosen, args.sweep)
    return {
        "format": FORMAT,
        "date": time.strftime("%Y%m%d-%H%M%S", time.gmtime()),
        "trace": {
            "name": Path(args.trace).name,
            "requests": len(trace.asked),
            "prompt_tokens": sum(one.prompt_tokens for one in trace.asked),
            "output_tokens": sum(one.output_tokens for one in trace.asked),
            "span_s": trace.span_s,
            "block_tokens": trace.block_tokens,
            "distinct_blocks": trace.distinct,
        },
        "options": {
            **asdict(base),
            "limit": args.limit,
            "background": args.background,
            "sweep": args.sweep,
            "slo_ms": slo_ms,
        },
        "profiles": {name: asdict(load_profile(name)) for name in dict.fromkeys(what.profile for what in chosen)},
        "swept": names,
        "left_out": [summary.named(asdict(what), names) for what in left_out],
        "findings": summary.findings(rows, names),
        "rows": rows,
        "environment": environment(),
    }


def combinations(base: What, sweeps: Sequence[str]) -> list[What]:
    """`base` with every combination of what the sweeps name; each once."""
    axes = [[(name, value) for value in values] for name, values in map(_axis, sweeps)]
    return list(dict.fromkeys(replace(base, **dict(chosen)) for chosen in itertools.product(*axes)))


def _axis(text: str) -> tuple[str, list[Any]]:
    """`dram=0,256GiB`: the name, and the values of the type that it has."""
    kinds: dict[str, type[Any]] = {name: type(value) for name, value in asdict(What()).items()}
    name, _, values = text.partition("=")
    name = name.replace("-", "_")
    if name not in kinds or not values:
        raise ConfigError(f"--sweep {text}: must look like dram=0,256GiB; there are {', '.join(kinds)}")
    try:
        return name, [kinds[name](value) for value in values.split(",")]
    except ValueError as error:
        raise ConfigError(f"--sweep {text}: {error}") from None


def possible(wanted: Sequence[What], trace: Trace) -> tuple[list[What], list[What]]:
    """Those that can be, and those with an SSD tier and no DRAM above it. ConfigError for any other mistake, or if
    none can be."""
    left_out: dict[What, NoWayDown] = {}
    for what in wanted:
        try:
            setup_of(what, trace)
        except NoWayDown as error:
            left_out[what] = error
    if len(left_out) == len(wanted):
        raise left_out[wanted[0]]
    return [what for what in wanted if what not in left_out], list(left_out)


def swept(chosen: Sequence[What], sweeps: Sequence[str]) -> list[str]:
    """The names of what differs between the combinations, in the order in which they were given."""
    given = dict.fromkeys(_axis(text)[0] for text in sweeps)
    return [name for name in given if len({getattr(what, name) for what in chosen}) > 1]


# --- the command line ------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 2 what was asked for cannot work."""
    args = _parser().parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH, highlight=False, soft_wrap=False)
    try:
        document = document_of(args)
        written = [] if args.output is None else write(args.output, document)
        summary.show(document, console)
        for path in written:
            console.print(f"written: {path}", soft_wrap=True)
        return 0
    except (TerraceError, UsageError) as error:
        print(f"terrace simulate: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def write(folder: Path, document: Mapping[str, Any]) -> list[Path]:
    """simulation.json, simulation.html and, with matplotlib, one PNG per plot; the paths. ConfigError if not there."""
    path = folder / "simulation.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        return [path, *page.write(folder, document)]
    except OSError as error:
        raise ConfigError(f"--output {folder}: {error.strerror}", param="output") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="terrace simulate", description=(__doc__ or "").partition("\n\n")[2], allow_abbrev=False,
        usage="%(prog)s TRACE [--device SIZE] [--dram SIZE] [--ssd SIZE]\n"
        "                        [--sweep NAME=A,B,C] ... [--output DIR] [...]",
        epilog="example: terrace simulate traffic.jsonl --sweep dram=0,256GiB,512GiB --sweep ssd=0,4TB --slo ttft:2000",
    )  # fmt: skip
    parser.add_argument("trace", metavar="TRACE", help="JSON lines, also gzipped; `serve --record-path` writes them")
    parser.add_argument("--sweep", action="append", default=[], metavar="NAME=A,B,C",
                        help="all of these instead of one; more than once for all combinations")  # fmt: skip
    parser.add_argument("--slo", nargs="+", default=[], metavar="NAME:MS",
                        help="such as ttft:2000 tpot:50; what requests want, if the trace does not say")  # fmt: skip
    parser.add_argument("--background", metavar="TRACE", help="all of this one too, in the background")
    parser.add_argument("--limit", type=_count, metavar="N", help="only the first N requests")
    parser.add_argument("--jobs", type=_count, default=1, metavar="N", help="combinations at once [1]")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write simulation.json, simulation.html and plots")
    group = parser.add_argument_group("what can be swept, and its value where it is not")
    for name, default in asdict(What()).items():
        metavar, text = HELP[name]
        group.add_argument(f"--{name.replace('_', '-')}", dest=name, type=type(default), default=default,
                           metavar=metavar, help=f"{text} [{default:g}]" if isinstance(default, float)
                           else f"{text} [{default}]")  # fmt: skip
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be above 0")
    return value


if __name__ == "__main__":
    sys.exit(main())
