"""A million blocks: what indexing them costs at start and afterwards, and what a copy between DRAM and device costs.

Scale: an SSD tier is opened over an index of 10^4 to 10^6 blocks in chains (sparse segment files: a start reads no
slot) and taken over by a KV manager, as at every start of the daemon; then blocks are looked up, chain by chain in
random order, and evicted and filed anew. Copies: blocks go from the host arena to a device arena of this machine and
back through `DeviceTier`, with labels and checksums, in turns with plain memory moves of the same bytes on one thread.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import random
import tempfile
import time
from itertools import chain
from pathlib import Path
from statistics import median

import torch

from server.bench.report import Report
from server.bench.tiers import CHAIN_BLOCKS, open_many, resident_bytes
from server.kvcache.arena import allocate_arena
from server.kvcache.host import HostArena
from server.kvcache.manager import KVManager, TierSpec
from server.kvcache.tiers.base import Move
from server.kvcache.tiers.device import DeviceTier
from server.types import DEVICE, DRAM, SSD, BlockLayout

SIZES = (10_000, 100_000, 1_000_000)
OPERATIONS = 20_000
GOAL_START_S = 2.0
GOAL_FLAT = 2.0
"""Cost per block at 10^6 over that at 10^4: caches of the processor do not hold a million blocks."""
GOAL_COPY = 0.8
COPY_BLOCKS = (2 * 2**20, 384 * 2**10)
COPY_BYTES = 512 * 2**20
ROUNDS = 5
LAYOUT = BlockLayout(1, 1, 1, 4, 1024)


def run(*, quick: bool) -> Report:
    """Both parts; see the module's docstring."""
    report = Report("scale", quick=quick)
    report.header("blocks", "open s", "take over s", "start s", "RAM B/block", "lookup us", "evict+file us")
    costs = {}
    for count in SIZES[:1] if quick else SIZES:
        costs[count] = _scale(report, count)
    first, last = costs[min(costs)], costs[max(costs)]
    report.goal(
        f"start with {max(costs):,} blocks in {last[0]:.2f} s (goal {GOAL_START_S} s)", met=last[0] <= GOAL_START_S
    )
    for name, position in (("lookup", 1), ("eviction", 2)):
        ratio = last[position] / first[position]
        statement = f"{name} costs {ratio:.2f} x as much per block at {max(costs):,} blocks as at {min(costs):,}"
        report.goal(statement, met=ratio <= GOAL_FLAT)
    report.header("block KiB", "memmove GB/s", "onboard GB/s", "spill GB/s", "onboard/mm", "spill/mm", "CPU s/GB")
    for block_bytes in COPY_BLOCKS:
        asyncio.run(_copies(report, block_bytes, quick=quick))
    return report


def _scale(report: Report, count: int) -> tuple[float, float, float]:
    """Seconds to start, microseconds per lookup, microseconds per eviction."""
    gc.collect()
    before = resident_bytes()
    gc.disable()  # as the daemon does at its start
    with tempfile.TemporaryDirectory() as folder:
        found, open_s = open_many(Path(folder), count)
    tiers = [TierSpec(DEVICE, 64), TierSpec(DRAM, 64), TierSpec(SSD, count)]
    started = time.perf_counter()
    kv = KVManager(LAYOUT, tiers, bytes(32))
    kv.recover(found)
    take_s = time.perf_counter() - started
    gc.enable()
    hashes = list(found.hashes)
    del found
    gc.collect()
    ram = (resident_bytes() - before) / count
    chains = [hashes[i : i + CHAIN_BLOCKS] for i in range(0, count, CHAIN_BLOCKS)]
    random.Random(0).shuffle(chains)
    hashes = list(chain.from_iterable(chains))[:OPERATIONS]
    started = time.perf_counter()
    for value in hashes:
        kv.traffic.level_of(value)
    lookup_us = (time.perf_counter() - started) / len(hashes) * 1e6
    books, fresh = kv.levels[-1], [index.to_bytes(32) for index in range(OPERATIONS)]
    started = time.perf_counter()
    for value in fresh:
        frames = books.take(1)
        assert frames is not None, "everything may go"
        books.file(frames[0], value, None, 0, ready=True)
        books.unhold(frames[0])
    evict_us = (time.perf_counter() - started) / OPERATIONS * 1e6
    report.row(f"{count:,}", f"{open_s:.2f}", f"{take_s:.2f}", f"{open_s + take_s:.2f}", f"{ram:.0f}",
               f"{lookup_us:.2f}", f"{evict_us:.2f}")  # fmt: skip
    report.keep(blocks=count, open_s=open_s, take_over_s=take_s, ram_bytes=ram, lookup_us=lookup_us, evict_us=evict_us)
    return open_s + take_s, lookup_us, evict_us


async def _copies(report: Report, block_bytes: int, *, quick: bool) -> None:
    frames = (COPY_BYTES // (8 if quick else 1)) // block_bytes
    layout = BlockLayout(1, 1, 1, 4, block_bytes // 8)
    arena = allocate_arena(frames, layout, torch.float32)
    arena.fill_(1.0)
    host = HostArena(frames, block_bytes)
    host.prefault()
    tier = DeviceTier(arena, host)
    moves = [Move(frame.to_bytes(32), None, 0, frame, frame) for frame in range(frames)]
    calls = [moves[i : i + 8] for i in range(0, frames, 8)]
    await _timed(tier.read, calls)
    samples: dict[str, list[float]] = {"memmove": [], "onboard": [], "spill": []}
    cpu_s = []
    for _ in range(2 if quick else ROUNDS):
        samples["memmove"].append(await asyncio.to_thread(_memmove, arena, host, frames))
        before = time.process_time()
        samples["spill"].append(await _timed(tier.read, calls))
        samples["onboard"].append(await _timed(tier.write, calls))
        cpu_s.append((time.process_time() - before) / (2 * frames * block_bytes / 1e9))
    await tier.aclose()
    rate = {name: frames * block_bytes / 1e9 / median(seconds) for name, seconds in samples.items()}
    ratios = {name: rate[name] / rate["memmove"] for name in ("onboard", "spill")}
    report.row(block_bytes // 1024, *(f"{rate[name]:.2f}" for name in ("memmove", "onboard", "spill")),
               *(f"{ratio:.2f}" for ratio in ratios.values()), f"{median(cpu_s):.2f}")  # fmt: skip
    report.keep(block_bytes=block_bytes, seconds=samples, cpu_s_per_gb=cpu_s)
    for name, ratio in ratios.items():
        report.goal(f"{name} of {block_bytes // 1024} KiB blocks at {ratio:.0%} of memmove", met=ratio >= GOAL_COPY)


async def _timed(copy: object, calls: list[list[Move]]) -> float:
    started = time.perf_counter()
    outcomes = await asyncio.gather(*(copy(call) for call in calls))  # type: ignore[operator]
    seconds = time.perf_counter() - started
    assert not any(fault for outcome in outcomes for fault in outcome), "a copy failed"
    return seconds


def _memmove(arena: torch.Tensor, host: HostArena, frames: int) -> float:
    started = time.perf_counter()
    for frame in range(frames):
        ctypes.memmove(arena.data_ptr() + frame * host.block_bytes, host.frame_address(frame), host.block_bytes)
    return time.perf_counter() - started
