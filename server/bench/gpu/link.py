"""What the machine allows: memory, matrix products, the link, pinned memory, the tiers.

Later parts state their figures as shares of these, so everything is measured, nothing taken from a data sheet.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import numpy as np
import torch

from server.bench.gpu.chip import BareStream, Chip
from server.bench.gpu.lines import Line
from server.bench.gpu.sizes import GIB, Sizes
from server.kvcache.host import HostArena
from server.kvcache.tiers.base import Move
from server.kvcache.tiers.cuda import CudaTier
from server.kvcache.tiers.ssd import SsdTier
from server.place import GPU_RUN_BYTES

ROUNDS = 3
OPEN_CALLS = 4
"""To the tier at once, each of `place.GPU_RUN_BYTES`: its threads never wait for the next call."""
DISK_CALLS = 8
DISK_RUN_BYTES = 8 * 2**20


def run(chip: Chip, sizes: Sizes, known: Mapping[str, float]) -> Iterator[Line]:
    yield from _ceilings(chip, sizes)
    shape = sizes.shape
    block_bytes = shape.layout(shape.layers, sizes.block_tokens[0], chip.dtype.itemsize).block_bytes
    yield from _pinned(chip, sizes, block_bytes)
    yield from _link(chip, sizes, block_bytes)
    yield from asyncio.run(_disk(sizes, block_bytes))


def _ceilings(chip: Chip, sizes: Sizes) -> Iterator[Line]:
    yield _memory(chip, sizes)
    chip.release()
    a, b = (torch.randn(sizes.matrix, sizes.matrix, device=chip.device, dtype=chip.dtype) for _ in range(2))
    product_s = chip.seconds(lambda: a @ b, sizes.times)
    rate = 2 * sizes.matrix**3 / median(product_s) / 1e12
    yield Line("matmul", f"product of matrices of {sizes.matrix:,} x {sizes.matrix:,}", rate, "TFLOP/s",
               raw={"seconds": product_s})  # fmt: skip


def _memory(chip: Chip, sizes: Sizes) -> Line:
    source = torch.empty(int(sizes.memory_gib * GIB) // 4, device=chip.device).normal_()
    target = torch.empty_like(source)
    copy_s = chip.seconds(lambda: target.copy_(source), sizes.times)
    read_s = chip.seconds(source.sum, sizes.times)
    best = max(2 * source.nbytes / median(copy_s), source.nbytes / median(read_s))
    raw = {"copy_s": copy_s, "read_s": read_s}
    return Line("memory", "device memory, the better of a copy and a sum", best / 1e9, "GB/s", raw=raw)


def _pinned(chip: Chip, sizes: Sizes, block_bytes: int) -> Iterator[Line]:
    """How long a start with a DRAM tier takes for its memory."""
    size = int(sizes.pinned_gib * GIB)
    started_s = time.perf_counter()
    host = HostArena(size // block_bytes, block_bytes)
    host.prefault()
    touched_s = time.perf_counter()
    up, down = chip.copies(host)
    pinned_s = time.perf_counter()
    up.close()
    down.close()
    host.unregister()
    yield Line("pinned.touch", f"taking {sizes.pinned_gib:g} GiB of host memory", touched_s - started_s, "s")
    yield Line("pinned.pin", "pinning it", pinned_s - touched_s, "s")


def _link(chip: Chip, sizes: Sizes, block_bytes: int) -> Iterator[Line]:
    """Copies of whole blocks, in any order at both ends, half of the memory for each direction: without checksums and
    all in flight at once, which is what the link can do; then through the tier."""
    half = max(OPEN_CALLS, int(sizes.link_gib * GIB) // block_bytes)
    host = HostArena(2 * half, block_bytes)
    host.prefault()
    arena = torch.zeros(2 * half, block_bytes, dtype=torch.uint8, device=chip.device)
    for frame in range(half):
        host.view(frame)[:] = np.random.default_rng(frame).bytes(block_bytes)
    chip.synchronise()
    up, down = chip.copies(host)
    size, single = half * block_bytes, _Ends(host, arena, half)
    found: dict[str, list[float]] = {"h2d": [], "d2h": [], "both": []}
    for _ in range(ROUNDS + 1):
        found["h2d"].append(_timed(single.up(up)))
        found["d2h"].append(_timed(single.down(down)))
        found["both"].append(_timed(single.up(up), single.down(down)))
    rates = {what: size / median(seconds[1:]) for what, seconds in found.items()}
    yield Line("h2d", "host to device", rates["h2d"] / 1e9, "GB/s", raw={"seconds": found["h2d"]})
    yield Line("d2h", "device to host", rates["d2h"] / 1e9, "GB/s", raw={"seconds": found["d2h"]})
    yield Line("both", "both at once, each way", rates["both"] / 1e9, "GB/s", raw={"seconds": found["both"]})
    tier = CudaTier(arena, host, up, down, time.monotonic)
    tier_s = asyncio.run(_through_tier(tier, host, half, block_bytes))
    for what, ceiling, says in (("up", "h2d", "DRAM to device"), ("down", "d2h", "device to DRAM")):
        rate = size / median(tier_s[what][1:])
        yield Line(f"tier.{what}", f"{says} through the tier, checksums included", rate / 1e9, "GB/s",
                   rate / rates[ceiling], raw={"seconds": tier_s[what]})  # fmt: skip


class _Ends:
    """Addresses of one half for copies up, of the other one for copies down, shuffled at the device's end."""

    def __init__(self, host: HostArena, arena: torch.Tensor, half: int) -> None:
        order = np.random.default_rng(0).permutation(half).tolist()
        here, there = host.frame_address, arena.data_ptr()
        self._host = [[here(frame) for frame in range(half)], [here(half + frame) for frame in range(half)]]
        self._device = [[there + at * host.block_bytes for at in order],
                        [there + (half + at) * host.block_bytes for at in order]]  # fmt: skip
        self._size = host.block_bytes

    def up(self, stream: BareStream) -> Callable[[], None]:
        return lambda: stream.copy(self._device[0], self._host[0], self._size)

    def down(self, stream: BareStream) -> Callable[[], None]:
        return lambda: stream.copy(self._host[1], self._device[1], self._size)


def _timed(*works: Callable[[], None]) -> float:
    """Seconds until all of them, begun together, are over. Raises what one of them raises."""
    with ThreadPoolExecutor(len(works)) as threads:
        started_s = time.perf_counter()
        for done in [threads.submit(work) for work in works]:
            done.result()
        return time.perf_counter() - started_s


async def _through_tier(tier: CudaTier, host: HostArena, half: int, block_bytes: int) -> dict[str, list[float]]:
    """Seconds for one half of the arena each way, in calls as the daemon makes them; closes the tier."""
    found: dict[str, list[float]] = {"up": [], "down": []}
    run = max(1, GPU_RUN_BYTES // block_bytes)
    moves = [Move(frame.to_bytes(32, "big"), None, 0, frame, frame) for frame in range(half)]
    for move in moves:
        host.label(move.host, move.hash)
    calls = [moves[at : at + run] for at in range(0, half, run)]
    for _ in range(ROUNDS + 1):
        found["up"].append(await _carried(tier.write, calls, OPEN_CALLS))
        found["down"].append(await _carried(tier.read, calls, OPEN_CALLS))
    await tier.aclose()
    return found


async def _carried(call: Callable, calls: Sequence[Sequence[Move]], lanes: int) -> float:
    """Seconds for all calls, so many at once. Raises RuntimeError where a block was refused."""

    async def lane(first: int) -> None:
        for moves in calls[first::lanes]:
            faults = [fault for fault in await call(moves) if fault is not None]
            if faults:
                raise RuntimeError(f"{len(faults)} blocks failed, the first: {faults[0].detail}")

    started_s = time.perf_counter()
    await asyncio.gather(*map(lane, range(lanes)))
    return time.perf_counter() - started_s


async def _disk(sizes: Sizes, block_bytes: int) -> list[Line]:
    """The SSD tier, checksums included, on the file system of the current directory: others may be memory."""
    blocks = int(sizes.disk_gib * GIB) // block_bytes
    host = HostArena(blocks, block_bytes)
    host.prefault()
    run = max(1, DISK_RUN_BYTES // block_bytes)
    moves = [Move(frame.to_bytes(32, "big"), None, 0, frame, frame) for frame in range(blocks)]
    calls = [moves[at : at + run] for at in range(0, blocks, run)]
    lines = []
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        tier = SsdTier(
            Path(folder), bytes(32), host, capacity_bytes=2 * blocks * (block_bytes + 4096) + 2**26, min_free_bytes=0,
            clock=time.monotonic, wall_clock=time.time,
        )  # fmt: skip
        await tier.open()
        for move in moves:
            host.view(move.host)[:16] = move.hash[-16:]
            host.label(move.host, move.hash)
        for what, call in (("write", tier.write), ("read", tier.read)):
            seconds = await _carried(call, calls, DISK_CALLS)
            note = "direct" if tier.segments.direct else "through the page cache"
            lines.append(
                Line(f"disk.{what}", f"SSD tier, {what}", blocks * block_bytes / seconds / 1e9, "GB/s", note=note)
            )
        await tier.aclose()
    return lines
