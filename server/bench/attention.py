"""Native attention beside what the machine allows: decode against memory bandwidth, prefill against torch's kernel.

Decode rows read all layers of an arena larger than the last-level cache, in turn with two plain loops that read as many
bytes: in order, and block by block as the tables have them, a layer's share of a block at a time. Another case looks
at as many tokens in few blocks, again and again: what arithmetic allows when nothing comes from memory. What counts is
the ratio within a turn, because a shared machine's bandwidth drifts.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import numpy as np
import torch
from torch import Tensor

from server.bench.report import Report
from server.kernels import int8
from server.kernels.attention import BACKENDS, AttentionBackend, AttentionBatch
from server.kernels.native import load
from server.kvcache.arena import allocate_arena
from server.registry import resolve
from server.types import BlockLayout, ModelGeometry

ROUNDS = 5
BLOCK_TOKENS = 16
CONTEXT, ROWS, PROMPT = 2048, 16, 2048
ARENA_BYTES = 640 * 2**20
"""Twice the largest last-level caches: no layer is still there when its turn comes again."""
GROUPS = ((12, 4), (16, 8))
"""Query heads and KV heads."""
HEAD_DIM = 64
FORMATS = (torch.float32, torch.bfloat16, torch.int8)
BANDWIDTH_SHARE = 0.85
CACHED_BLOCKS = 4
"""A layer's share of them fits a second-level cache in every format."""


@dataclass(frozen=True)
class _Case:
    backend: AttentionBackend
    arena: Tensor
    geometry: ModelGeometry
    kv_bytes: int
    """Read by one step over all layers."""
    frames: np.ndarray
    """int64: the blocks of all rows, as their tables have them."""
    q: Tensor
    k: Tensor
    v: Tensor

    def step(self) -> None:
        for layer in range(self.geometry.layers):
            self.backend.run(layer, self.q, self.k, self.v)


def run(*, quick: bool = False) -> Report:
    report = Report("attention", quick=quick)
    _decode(report, quick)
    _prefill(report, quick)
    return report


def _decode(report: Report, quick: bool) -> None:
    columns = ("in order", "share [min-max]", "by blocks", "share [min-max]", "in cache", "of order")
    report.header("decode", "heads", "GB/s", *columns)
    context = 128 if quick else CONTEXT
    size = ARENA_BYTES // 64 if quick else ARENA_BYTES
    for dtype in FORMATS:
        for heads, kv_heads in GROUPS:
            rows = [(context - 1, 1)] * ROWS
            case = _case("native", dtype, heads, kv_heads, rows, size)
            cached = _case("native", dtype, heads, kv_heads, rows, size, blocks=CACHED_BLOCKS)
            reads = partial(_read, case), partial(_read_blocks, case)
            calls: list[Callable[[], object]] = [case.step, *reads, cached.step]
            turns = [[_seconds(call) for call in calls] for _ in range(1 if quick else ROUNDS)]
            shares, of_blocks = ([turn[i] / turn[0] for turn in turns] for i in (1, 2))
            allowed = median(turn[1] / turn[3] for turn in turns)
            rates = [f"{case.kv_bytes / median(times) / 1e9:.1f}" for times in zip(*turns, strict=True)]
            name, found = f"{heads}/{kv_heads}", (_spread(shares), rates[2], _spread(of_blocks))
            report.row(_name(dtype), name, *rates[:2], *found, rates[3], f"{allowed:.2f}")
            report.keep(part="decode", kv_dtype=_name(dtype), heads=name, kv_bytes=case.kv_bytes, turns_s=turns)
            if not quick:
                statement = f"decode {_name(dtype)} {name}: at least {BANDWIDTH_SHARE:.0%} of the memory's bandwidth"
                report.goal(statement, met=median(shares) >= BANDWIDTH_SHARE)


def _prefill(report: Report, quick: bool) -> None:
    report.header("prefill", "heads", "native ms", "torch ms", "torch/native", "GFLOP/s")
    prompt = 128 if quick else PROMPT
    for dtype in FORMATS:
        for heads, kv_heads in GROUPS:
            ours = _case("native", dtype, heads, kv_heads, [(0, prompt)], 0)
            plain = torch.float32 if dtype == torch.int8 else dtype
            theirs = _case("cpu", plain, heads, kv_heads, [(0, prompt)], 0)
            turns = [(_seconds(ours.step), _seconds(theirs.step)) for _ in range(1 if quick else ROUNDS)]
            native_s, torch_s = (median(times) for times in zip(*turns, strict=True))
            flops = 4 * HEAD_DIM * heads * prompt * (prompt + 1) / 2
            name, ratio = f"{heads}/{kv_heads}", median(b / a for a, b in turns)
            cells = (f"{native_s * 1e3:.1f}", f"{torch_s * 1e3:.1f}", f"{ratio:.2f}", f"{flops / native_s / 1e9:.0f}")
            report.row(_name(dtype), name, *cells)
            report.keep(part="prefill", kv_dtype=_name(dtype), heads=name, prompt=prompt, turns_s=turns)
            if not quick:
                report.goal(f"prefill {_name(dtype)} {name}: at least as fast as torch's kernel", met=ratio >= 1)


def _case(
    name: str, dtype: torch.dtype, heads: int, kv_heads: int, rows: list[tuple[int, int]], arena_bytes: int,
    *, blocks: int | None = None,
) -> _Case:  # fmt: skip
    """Rows of (cached, fed) on shuffled frames; as many layers as fill `arena_bytes`, at least one. `blocks`: all there
    are, for all rows together; None: each row has its own."""
    counts = [-(-(start + fed) // BLOCK_TOKENS) for start, fed in rows]
    scale_bytes = int8.SCALE_BYTES if dtype == torch.int8 else 0
    layout = BlockLayout(1, kv_heads, HEAD_DIM, dtype.itemsize, BLOCK_TOKENS, scale_bytes)
    layer_bytes = sum(counts) * layout.block_bytes
    layers = max(1, arena_bytes // layer_bytes)
    held = blocks or sum(counts)
    arena = allocate_arena(held, replace(layout, layers=layers), dtype)
    if dtype == torch.int8:
        values, scales = int8.planes(arena)
        values.random_(-127, 128)
        scales.fill_(0.02)
    else:
        arena.normal_()
    shape = ModelGeometry(
        layers=layers,
        hidden=heads * HEAD_DIM,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=HEAD_DIM,
        vocab=1,
        max_positions=1 << 20,
        scale=HEAD_DIM**-0.5,
        windows=(None,) * layers,
    )
    starts, fed = (np.array(column, np.int32) for column in zip(*rows, strict=True))
    frames = (np.random.default_rng(0).permutation(sum(counts)) % held).astype(np.int32)
    bounds = np.concatenate(([0], np.cumsum(fed))).astype(np.int32)
    backend = resolve("attention backend", BACKENDS, name)(arena, shape)
    backend.plan(AttentionBatch(bounds, starts, starts + fed, np.split(frames, np.cumsum(counts)[:-1])))
    tokens = int(bounds[-1])
    vectors = (torch.randn(tokens, n, HEAD_DIM) for n in (heads, kv_heads, kv_heads))
    return _Case(backend, arena, shape, layers * layer_bytes, frames.astype(np.int64), *vectors)


def _read(case: _Case) -> None:
    """Every byte of the arena once, in order."""
    library, total = load(), ctypes.c_uint64()
    assert library is not None
    size = case.arena.nbytes // 64 * 64
    library.terrace_read(case.arena.data_ptr(), size, ctypes.addressof(total), torch.get_num_threads())


def _read_blocks(case: _Case) -> None:
    """Likewise, block by block: layer after layer, the blocks as the rows' tables have them."""
    library, total, frames = load(), ctypes.c_uint64(), case.arena.shape[0]
    assert library is not None
    layers = case.geometry.layers
    order = (case.frames * layers + np.arange(layers)[:, None]).ravel()
    size = case.arena.nbytes // (frames * layers)
    address, count = case.arena.data_ptr(), len(order)
    library.terrace_read_pieces(
        address, size, order.ctypes.data, count, ctypes.addressof(total), torch.get_num_threads()
    )


def _spread(shares: Sequence[float]) -> str:
    return f"{median(shares):.2f} [{min(shares):.2f}-{max(shares):.2f}]"


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
