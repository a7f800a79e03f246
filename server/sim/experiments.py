"""What `python -m server.sim.study` runs: every decision of the daemon on public traces, beside its rivals and limits.

An experiment yields jobs; a job is a function of plain data that a process can be handed, and its answer is one row.
Everything is virtual time: the same rows on any machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

from server.kvcache.eviction import POLICIES
from server.sim import bounds
from server.sim.forced import Dear
from server.sim.foresight import Foresight, Hindsight
from server.sim.profile import PRESETS
from server.sim.replay import Asked, Replay, Setup, Tiers, hash_chains, replay
from server.sim.simulate import Trace, figures, load_trace
from server.sim.writes import kept
from server.types import BlockHash, ServiceClass, Targets, Transfer

Row = dict[str, Any]
Job = Callable[[], Row]
PROFILE = PRESETS["h200-8b"]
PERCENTS = (1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0)
SPLITS = ((500, 2_500, 0), (500, 2_500, 15_000), (1_000, 5_000, 30_000))
"""Blocks of 512 tokens, 67 MB each: device, DRAM, SSD."""
SHARES = (1.0, 0.5, 0.4, 0.3, 0.2)
RIVALS = ("lru", "fifo", "lfu", "s3fifo", "sieve", "arc", "learned")
LIMITS = ("knowable", "optimal")
LOAD = 0.7
SLO = Targets(5.0, 0.1)
SLO_MS = {"ttft": SLO.ttft_s * 1e3, "tpot": SLO.tpot_s * 1e3}
SERVED = Tiers(1_000, 5_000, 30_000, "learned")
"""What scheduling is tried on."""


@cache
def trace_of(path: str, limit: int | None = None) -> Trace:
    """Each process reads it once."""
    return load_trace(path, limit)


def eviction(path: str) -> Iterable[Job]:
    """Hits of one cache, by what it evicts; every request is over before the next one comes."""
    for percent in PERCENTS:
        for policy in (*sorted(POLICIES), *LIMITS):
            yield partial(_flat, path, percent, policy)


def _flat(path: str, percent: float, policy: str) -> Row:
    trace = trace_of(path)
    asked, size = trace.asked, trace.block_tokens
    blocks = int(trace.distinct * percent / 100)
    if policy == "optimal":
        hits = bounds.optimal(asked, size, blocks)
    elif policy == "knowable":
        hits = bounds.knowable(asked, size, blocks)
    else:
        hits = bounds.by_policy(asked, size, blocks, policy)
    whole = sum(len(chain) for chain in bounds.chains(asked, size))
    return {"percent": percent, "blocks": blocks, "policy": policy, "hit": hits / whole,
            "infinite": bounds.infinite(asked, size) / whole}  # fmt: skip


def tiers(path: str) -> Iterable[Job]:
    """Hits and times to the first token on two and three tiers, at a load of 0.7."""
    for split in SPLITS:
        for policy in (*RIVALS, *LIMITS):
            yield partial(_on_tiers, path, split, policy, 1.0)


def admission(path: str) -> Iterable[Job]:
    """What an SSD tier is worth, by the share of the blocks that it writes once it is full."""
    for policy, shares in (("lru", (1.0,)), ("learned", SHARES)):
        for share in shares:
            yield partial(_on_tiers, path, SPLITS[1], policy, share)


WRITTEN = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""Shares of the writes."""


def writes(path: str) -> Iterable[Job]:
    """What anybody who chooses which blocks to write could keep of the loads from SSD."""
    yield partial(_writes, path)


def _writes(path: str) -> Row:
    trace = trace_of(path)
    asked = at_load(trace.asked, LOAD, work_s(path, SPLITS[1]))
    moved: list[tuple[float, Transfer]] = []
    left: list[tuple[float, BlockHash]] = []
    setup = Setup(PROFILE, Tiers(*SPLITS[1], "learned"), trace.block_tokens, moved=moved, left=left)
    found = replay(setup, asked)
    by_tier = figures(found, setup, {})
    likeliest = kept(moved, left, asked, hash_chains(asked, trace.block_tokens), WRITTEN)
    return {"shares": WRITTEN, "hit": by_tier["hit"], "ssd_hit": by_tier["hit_by_tier"]["ssd"], **likeliest}


def _on_tiers(path: str, split: tuple[int, int, int], policy: str, share: float) -> Row:
    trace = trace_of(path)
    rules = "learned" if policy in LIMITS else policy
    setup = Setup(PROFILE, Tiers(*split, rules, share), trace.block_tokens)
    asked = at_load(trace.asked, LOAD, work_s(path, split))
    if policy == "optimal":
        setup = replace(setup, reuse=Foresight(hash_chains(asked, trace.block_tokens)))
    if policy == "knowable":
        seen = replay(setup, asked).reuse
        setup = replace(setup, reuse=Hindsight(seen))
    return {"split": "+".join(map(str, split)), "policy": policy, "share": share, **shown(replay(setup, asked), setup)}


@cache
def work_s(path: str, split: tuple[int, int, int], limit: int | None = None) -> float:
    """Seconds that these tiers, evicting by LRU, take for the whole trace if they never wait for it."""
    trace = trace_of(path, limit)
    setup = Setup(PROFILE, Tiers(*split), trace.block_tokens)
    return replay(setup, [replace(one, at_s=0.0) for one in trace.asked]).seconds


def at_load(asked: Sequence[Asked], load: float, work: float) -> list[Asked]:
    """The same requests, evenly stretched so that `work` seconds of work come in `work / load` seconds."""
    stretch = work / load / asked[-1].at_s
    return [replace(one, at_s=one.at_s * stretch) for one in asked]


def shown(found: Replay, setup: Setup, slo_ms: Mapping[str, float] | None = None) -> Row:
    """What of a replay is kept."""
    kept = ("hit", "hit_by_tier", "mean_ttft_ms", "p50_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "p99_tpot_ms", "met",
            "goodput", "requests", "refused", "virtual_s", "device_busy", "preemptions", "ssd_written_bytes",
            "background")  # fmt: skip
    found_figures = figures(found, setup, slo_ms or {})
    return {key: found_figures[key] for key in kept}


# --- who goes first --------------------------------------------------------------------------------------------------

REQUESTS = 2_000


def slo(path: str) -> Iterable[Job]:
    """Share of the requests that meet TTFT and TPOT targets, below and above what the daemon can do."""
    for load in (0.7, 0.9, 1.1):
        for policy in ("fcfs", "spf", "deadline", "deadline, refusing"):
            yield partial(_slo, path, load, policy)


def _slo(path: str, load: float, policy: str) -> Row:
    trace = trace_of(path, REQUESTS)
    wanted = ServiceClass(targets=SLO)
    asked = [replace(one, service=wanted) for one in _stretched(path, load)]
    setup = Setup(PROFILE, SERVED, trace.block_tokens, policy.partition(",")[0], refuse_late="refusing" in policy)
    return {"load": load, "policy": policy, **shown(replay(setup, asked), setup, SLO_MS)}


def _stretched(path: str, load: float) -> list[Asked]:
    split = (SERVED.device, SERVED.dram, SERVED.ssd)
    return at_load(trace_of(path, REQUESTS).asked, load, work_s(path, split, REQUESTS))


MODEST_LOAD, FLOOD_LOAD = 0.3, 1.5
FLOOD_FROM_S = (0.0, 100.0)


def fairness(path: str) -> Iterable[Job]:
    """One tenant asks for 0.3 of what the daemon can do, another for 1.5 times all of it, at once or later."""
    for policy in ("fcfs", "fair"):
        for from_s in FLOOD_FROM_S:
            for flood in (False, True):
                yield partial(_fairness, path, policy, from_s, flood)


def _fairness(path: str, policy: str, from_s: float, flood: bool) -> Row:
    """Every second conversation of the trace is the modest tenant's: its blocks are asked for by nobody else. What it
    asks for from `from_s` on, until the flood is over, counts."""
    trace = trace_of(path, REQUESTS)
    sides: tuple[list[Asked], list[Asked]] = ([], [])
    for one in trace.asked:
        sides[one.blocks[min(1, len(one.blocks) - 1)] % 2].append(one)
    split = (SERVED.device, SERVED.dram, SERVED.ssd)
    share = work_s(path, split, REQUESTS) / 2
    modest = [replace(one, service=ServiceClass("modest")) for one in at_load(sides[0], MODEST_LOAD, share)]
    other = [replace(one, service=ServiceClass("flood")) for one in at_load(sides[1], FLOOD_LOAD, share)]
    other = [replace(one, at_s=one.at_s + from_s) for one in other]
    asked = sorted([*modest, *other], key=lambda one: one.at_s) if flood else modest
    setup = Setup(PROFILE, SERVED, trace.block_tokens, policy)
    found = replay(setup, asked)
    during = max(one.at_s for one in other)
    counted = [
        one for one in found.served if one.asked.service.tenant == "modest" and from_s <= one.asked.at_s <= during
    ]
    return {"policy": policy, "from_s": from_s, "flood": flood, **shown(replace(found, served=counted), setup)}


ONLINE_LOAD = 0.5


def coserving(path: str, batch: str) -> Iterable[Job]:
    """A trace with bursts at half of what the daemon can do, beside a batch without end in the background."""
    for who in ("online alone", "batch alone", "both"):
        yield partial(_coserving, path, batch, who)


def _coserving(path: str, batch: str, who: str) -> Row:
    trace = trace_of(path, REQUESTS)
    online = _stretched(path, ONLINE_LOAD) if who != "batch alone" else []
    first = trace.distinct
    in_background = who == "both"
    service = ServiceClass(background=in_background)
    work = [replace(one, at_s=0.0, service=service, blocks=[first + block for block in one.blocks])
            for one in trace_of(batch).asked] if who != "online alone" else []  # fmt: skip
    setup = Setup(PROFILE, SERVED, trace.block_tokens)
    found = replay(setup, [*work, *online])
    tokens = sum(one.asked.prompt_tokens - one.cached_tokens + one.asked.output_tokens for one in found.served)
    return {"who": who, "tokens_per_s": tokens / found.seconds, **shown(found, setup)}


# --- load, compute, or both ------------------------------------------------------------------------------------------

SPLIT_BLOCK = 64
SPLIT_TOKENS = (2_048, 8_192, 32_768, 65_536)
SPLIT_RATES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)
"""Of an SSD, in multiples of the rate at which loading a prefix takes as long as computing it."""
SUFFIX_TOKENS = 32


def split() -> Iterable[Job]:
    """Time to the first token of a prompt whose prefix lies on SSD: loaded, computed, or as the planner chooses."""
    for tokens in SPLIT_TOKENS:
        for rate in SPLIT_RATES:
            yield partial(_split, tokens, rate)


def _split(tokens: int, rate: float) -> Row:
    compute_s = PROFILE.step_s(PROFILE.prefill(0, tokens))
    bytes_per_s = rate * tokens * PROFILE.kv_bytes_per_token / compute_s
    profile = replace(PROFILE, ssd_read=replace(PROFILE.ssd_read, bytes_per_s=bytes_per_s))
    blocks = tokens // SPLIT_BLOCK
    tiers = Tiers(2 * blocks, 2 * blocks, 16 * blocks)
    lengths = {"load": (tiers, Dear()), "compute": (Tiers(tiers.device), None), "own": (tiers, None)}
    found = {}
    for way, (these, step_cost) in lengths.items():
        setup = Setup(profile, these, SPLIT_BLOCK, step_tokens=2_048, step_cost=step_cost)
        last = replay(setup, _prefix_left_below(blocks)).served[-1]
        assert last.ttft_s is not None, "it is served"
        found[way] = last.ttft_s * 1e3
    better = min(found["load"], found["compute"])
    return {"tokens": tokens, "rate": rate, **{f"{way}_ms": ms for way, ms in found.items()},
            "ratio": found["own"] / better, "apart": found["load"] / found["compute"] - 1,
            "at_once_ms": 1 / (1 / found["load"] + 1 / found["compute"])}  # fmt: skip


def _prefix_left_below(blocks: int) -> list[Asked]:
    """A prefix, others as long until it is in neither upper tier, and it again with some tokens more."""
    length = blocks * SPLIT_BLOCK
    prompts = [range(first, first + blocks) for first in range(0, 7 * blocks, blocks)]
    asked = [Asked(600.0 * n, length, 1, prompt) for n, prompt in enumerate(prompts)]
    return [*asked, Asked(600.0 * len(asked), length + SUFFIX_TOKENS, 1, (*prompts[0], 1 << 30))]
