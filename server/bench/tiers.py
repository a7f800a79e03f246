"""The SSD tier against the disk: bandwidth beside fio.

Bandwidth goes through `SsdTier` itself, checksums and headers included, QUEUE_DEPTH calls at a time, and
beside it fio with the same file system, direct I/O, size per I/O and queue depth. The two take turns, because a shared
machine drifts; the ratio is that of the medians. Both overwrite and read what a round before has written.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from server.bench.report import Report
from server.kvcache.host import HostArena
from server.kvcache.tiers.base import Move, Recovered
from server.kvcache.tiers.index import MARK, PIECE_RECORDS, PUT, RECORD, Identity, batch
from server.kvcache.tiers.segments import slots_per_segment
from server.kvcache.tiers.slots import HEADER_BYTES
from server.kvcache.tiers.ssd import SsdTier

QUEUE_DEPTH = 8
CASES = ((2 * 2**20, 1), (384 * 2**10, 1), (384 * 2**10, 4))
"""Bytes of a block and neighbours per call, which are one I/O: an 8B model with grouped queries and 16 tokens to the
block; one of 1B, whose chains are laid out so that one I/O carries several blocks, and the same without that."""
ROUNDS = 5
GOAL_RATIO = 0.9
GOAL_LAG_S = 0.005
LAG_EVERY_S = 0.002
GOAL_RECOVERY_S = 2.0
CHAIN_BLOCKS = 128
RUN_BLOCKS = 16
FINGERPRINT = bytes(32)


@dataclass(frozen=True)
class Sample:
    """One pass over all blocks."""

    gb_s: float
    cpu_s_per_gb: float
    lag_s: Sequence[float] = ()
    """How late the event loop's timers were meanwhile."""


def run(*, quick: bool) -> Report:
    """All cases; see the module's docstring."""
    report = Report("tiers", quick=quick)
    fio = shutil.which("fio")
    if fio is None:
        print("fio is not installed: no comparison")
    report.header(
        "block KiB", "in one I/O", "what", "GB/s", "CPU s/GB", "lag p99 ms", "fio GB/s", "fio CPU s/GB", "ratio"
    )
    for block_bytes, run_blocks in CASES:
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:  # not /tmp, which may be memory
            asyncio.run(_bandwidth(report, Path(folder), block_bytes, run_blocks, 2**27 if quick else 2**30, fio))
    return report


# --- bandwidth -------------------------------------------------------------------------------------------------------


async def _bandwidth(
    report: Report, folder: Path, block_bytes: int, run_blocks: int, total_bytes: int, fio: str | None
) -> None:
    places = QUEUE_DEPTH * run_blocks
    host = HostArena(places, block_bytes)
    tier = _tier(folder, host, total_bytes + 2**26)
    await tier.open()
    hashes = []
    for frame in range(places):
        host.view(frame)[:] = os.urandom(block_bytes)
        hashes.append(bytes([frame]) * 32)
    moves = [
        Move(hashes[f % places], None, 0, f % places, f) for f in range(total_bytes // block_bytes // places * places)
    ]
    calls = [moves[i : i + run_blocks] for i in range(0, len(moves), run_blocks)]
    call_bytes = run_blocks * (HEADER_BYTES + host.stride)
    ours: dict[str, list[Sample]] = {"write": [], "read": []}
    theirs: dict[str, list[Sample]] = {"write": [], "read": []}
    for turn in range(ROUNDS + 1):  # the first round fills the files
        for what, call in (("write", tier.write), ("read", tier.read)):
            for frame in range(places):
                host.label(frame, hashes[frame])
            sample = await _through_tier(call, calls, call_bytes)
            other = await asyncio.to_thread(_through_fio, fio, folder, what, call_bytes, len(calls)) if fio else None
            report.keep(part="bandwidth", block_bytes=block_bytes, run_blocks=run_blocks, what=what, turn=turn,
                        tier=vars(sample), fio=other and vars(other), direct=tier.segments.direct)  # fmt: skip
            if turn:
                ours[what].append(sample)
                theirs[what] += [other] if other else []
    await tier.aclose()
    for what in ("write", "read"):
        _compare(report, block_bytes, run_blocks, what, ours[what], theirs[what])


def _compare(
    report: Report, block_bytes: int, run_blocks: int, what: str, ours: Sequence[Sample], theirs: Sequence[Sample]
) -> None:
    speed, cpu = (statistics.median(values) for values in zip(*((s.gb_s, s.cpu_s_per_gb) for s in ours), strict=True))
    lag_s = statistics.quantiles([lag for sample in ours for lag in sample.lag_s], n=100)[98]
    cells: list[object] = [block_bytes // 1024, run_blocks, what, f"{speed:.2f}", f"{cpu:.3f}", f"{lag_s * 1e3:.2f}"]
    case = f"{what} of {block_bytes // 1024} KiB blocks, {run_blocks} to the I/O"
    report.goal(f"{case}: event-loop lag p99 {lag_s * 1e3:.2f} ms, goal 5 ms", met=lag_s <= GOAL_LAG_S)
    if theirs:
        other = statistics.median(sample.gb_s for sample in theirs)
        ratio = speed / other
        cells += [f"{other:.2f}", f"{statistics.median(s.cpu_s_per_gb for s in theirs):.3f}", f"{ratio:.2f}"]
        goal = f"{case}, at {ratio:.0%} of fio, goal {GOAL_RATIO:.0%}"
        report.goal(goal, met=ratio >= GOAL_RATIO)
    report.row(*cells, *["-"] * (9 - len(cells)))


async def _through_tier(call: Callable, calls: Sequence[Sequence[Move]], call_bytes: int) -> Sample:
    """All calls, QUEUE_DEPTH at once; those of one lane share their host frames."""

    async def lane(first: int) -> None:
        for moves in calls[first::QUEUE_DEPTH]:
            faults = await call(moves)
            assert not any(faults), f"the disk failed during a benchmark: {faults}"

    lag_s: list[float] = []
    watch = asyncio.create_task(_watch_lag(lag_s))
    before = resource.getrusage(resource.RUSAGE_SELF)
    started_s = time.perf_counter()
    await asyncio.gather(*map(lane, range(QUEUE_DEPTH)))
    spent_s = time.perf_counter() - started_s
    after = resource.getrusage(resource.RUSAGE_SELF)
    watch.cancel()
    gigabytes = len(calls) * call_bytes / 1e9
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Sample(gigabytes / spent_s, cpu_s / gigabytes, lag_s)


async def _watch_lag(lag_s: list[float]) -> None:
    while True:
        due_s = time.perf_counter() + LAG_EVERY_S
        await asyncio.sleep(LAG_EVERY_S)
        lag_s.append(time.perf_counter() - due_s)


def _through_fio(fio: str, folder: Path, what: str, call_bytes: int, count: int) -> Sample:
    command = [
        fio, "--name=disk", f"--filename={folder / 'fio'}", f"--rw={what}", f"--bs={call_bytes}",
        f"--size={call_bytes * count}", "--direct=1", "--ioengine=libaio", f"--iodepth={QUEUE_DEPTH}",
        "--fallocate=posix", "--output-format=json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    job = json.loads(done.stdout)["jobs"][0]
    gigabytes = call_bytes * count / 1e9
    spent_s = job[what]["runtime"] / 1e3
    return Sample(gigabytes / spent_s, (job["usr_cpu"] + job["sys_cpu"]) / 100 * spent_s / gigabytes)


# --- an index of many blocks, for `scale.py` -------------------------------------------------------------------------


def open_many(folder: Path, rows: int) -> tuple[Recovered, float]:
    """Make an index of `rows` blocks in `folder` and open a tier over it: what it found, and in how many seconds."""
    host = HostArena(1, 4096)
    slot_bytes = HEADER_BYTES + host.stride
    _make_index(folder / FINGERPRINT.hex(), rows, slot_bytes)
    return asyncio.run(_open(_tier(folder, host, rows * (slot_bytes + 400) + 2**22), rows))


async def _open(tier: SsdTier, rows: int) -> tuple[Recovered, float]:
    started_s = time.perf_counter()
    found = await tier.open()
    spent_s = time.perf_counter() - started_s
    assert len(found.frames) == rows, f"{len(found.frames)} of {rows} blocks were recovered"
    await tier.aclose()
    return found, spent_s


def _make_index(directory: Path, rows: int, slot_bytes: int) -> None:
    """A checkpoint of chains, in runs of neighbours here and there, in shuffled order of use; and sparse segment files
    that have a place for each block."""
    directory.mkdir(parents=True)
    rng = np.random.default_rng(1)
    table = np.zeros(rows, RECORD)
    place = np.arange(rows)
    runs = place.reshape(-1, RUN_BLOCKS)
    table["op"], table["frame"], table["depth"] = PUT, rng.permutation(runs).ravel(), place % CHAIN_BLOCKS
    table["chained"] = table["depth"] > 0
    table["hash"] = np.frombuffer(rng.bytes(32 * rows), np.uint64).reshape(rows, 4)
    table["parent"][1:] = table["hash"][:-1]
    table["sequence"] = rng.permutation(rows) + 1
    table = table[np.argsort(table["frame"])]
    mark = np.zeros(1, RECORD)
    mark["op"], mark["sequence"] = MARK, rows
    pieces = [mark, *(table[start : start + PIECE_RECORDS] for start in range(0, rows, PIECE_RECORDS))]
    header = Identity(FINGERPRINT, 4096).header()
    (directory / "checkpoint").write_bytes(header + b"".join(batch(piece.tobytes()) for piece in pieces))
    per_segment = slots_per_segment(slot_bytes)
    for number in range(-(-rows // per_segment)):
        with (directory / f"segment-{number:05d}.kv").open("wb") as file:
            file.truncate(per_segment * slot_bytes)


def _tier(folder: Path, host: HostArena, capacity_bytes: int) -> SsdTier:
    return SsdTier(
        folder, FINGERPRINT, host, capacity_bytes=capacity_bytes, min_free_bytes=0, clock=time.monotonic,
        wall_clock=time.time,
    )  # fmt: skip


def resident_bytes() -> int:
    """Memory of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()
