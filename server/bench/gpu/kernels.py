"""Attention by itself: decode with both kinds of kernels, block sizes and layouts, prefill with both generations.

A decode step reads a cache of the whole model's depth, replayed as a graph, so that launches do not count. Where a
batch has more blocks than the pool, tables name blocks several times, in another order each time: a layer's share of
the pool is many times the second-level cache, so that hardly any read is spared by that.

`layer-first` is what other servers have, each layer's pages side by side. It is played by a model of one layer over as
many pages, run as often as there are layers; a batch of one row would lie in the second-level cache then and is left
out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import numpy as np
import torch

from server.bench.gpu.chip import Chip
from server.bench.gpu.lines import Line, failed
from server.bench.gpu.sizes import GIB, Sizes
from server.bench.gpu.steps import make_model
from server.kernels.attention import AttentionBackend, AttentionBatch
from server.kvcache.arena import allocate_arena
from server.models.base import Model

TENSOR_CORES, CUDA_CORES = "tensor-cores", "cuda-cores"
PREFILL = ("fa2", "fa3")
Case = tuple[AttentionBackend, AttentionBatch, list[torch.Tensor]]
"""A backend, what it is to plan, and q, k and v for each layer."""


@dataclass(frozen=True)
class Decode:
    rows: int
    context: int
    kernel: str = TENSOR_CORES
    block_tokens: int = 16
    layer_first: bool = False

    @property
    def key(self) -> str:
        views = "layer-first" if self.layer_first else "block-major"
        return f"attention.{self.rows}x{self.context}.{self.kernel}.{self.block_tokens}.{views}"

    def __str__(self) -> str:
        views = ", layer-first" if self.layer_first else ""
        return f"decode {self.rows} x {self.context:,}, {self.kernel}, blocks of {self.block_tokens}{views}"


def decodes(sizes: Sizes) -> Iterator[Decode]:
    """Each variation by itself, beside what the daemon does."""
    usual, larger = sizes.block_tokens
    for rows, context in sizes.decode_cases():
        yield Decode(rows, context, block_tokens=usual)
        yield Decode(rows, context, CUDA_CORES, usual)
        yield Decode(rows, context, block_tokens=larger)
        if rows > 1:
            yield Decode(rows, context, block_tokens=usual, layer_first=True)


def first(chip: Chip, sizes: Sizes, known: Mapping[str, float]) -> Iterator[Line]:
    """The first use of every kernel, which compiles it where that was not done before: all at once, as each by itself
    keeps only some of the cores busy."""
    works: dict[str, Callable[[], object]] = {"operations of a layer": partial(_layer, chip, sizes)}
    for kernel in (TENSOR_CORES, CUDA_CORES):
        decode = Decode(1, 32, kernel, sizes.block_tokens[0])
        works[f"decode with {kernel}"] = partial(_once, partial(_decode_case, chip, sizes, decode))
    for kernel in PREFILL:
        works[f"prefill with {kernel}"] = partial(_once, partial(_prefill_case, chip, sizes, kernel, 0))
    with ThreadPoolExecutor(len(works)) as pool:
        yield from pool.map(lambda what: _first(chip, what, works[what]), works)
    chip.synchronise()


def _once(case: Callable[[], Case]) -> None:
    attention, batch, vectors = case()
    attention.plan(batch)
    attention.run(0, *vectors)


def _first(chip: Chip, what: str, work: Callable[[], object]) -> Line:
    def line() -> Line:
        started_s = time.perf_counter()
        work()
        return Line(f"first.{what}", f"first {what}", time.perf_counter() - started_s, "s")

    return _attempted(chip, f"first.{what}", f"first {what}", "s", line)


def run(chip: Chip, sizes: Sizes, known: Mapping[str, float]) -> Iterator[Line]:
    for case in decodes(sizes):
        yield _attempted(chip, case.key, str(case), "GB/s", partial(_decode, chip, sizes, case, known))
    for prefix in sizes.prefixes:
        for kernel in PREFILL:
            what = f"prefill of {sizes.chunks[0]:,} behind {prefix:,}, {kernel}"
            key = f"attention.prefill.{prefix}.{kernel}"
            yield _attempted(
                chip, key, what, "TFLOP/s", partial(_prefill, chip, sizes, kernel, prefix, known, key, what)
            )


def _attempted(chip: Chip, key: str, what: str, unit: str, measure: Callable[[], Line]) -> Line:
    """A kernel that is not made for this device is a line without a figure; the others go on."""
    chip.release()
    try:
        return measure()
    except Exception as error:  # noqa: BLE001 - libraries raise what they like
        return failed(key, what, unit, error)


def _decode(chip: Chip, sizes: Sizes, case: Decode, known: Mapping[str, float]) -> Line:
    seconds = _decode_s(chip, sizes, case, sizes.times)
    size = case.rows * case.context * sizes.shape.layout(sizes.shape.layers, 1, chip.dtype.itemsize).token_bytes
    rate = size / median(seconds) / 1e9
    return Line(case.key, str(case), rate, "GB/s", _share(rate, known, "memory"), raw={"bytes": size, "s": seconds})


def _decode_s(chip: Chip, sizes: Sizes, case: Decode, times: int) -> list[float]:
    """Seconds of attention over all layers."""
    attention, batch, vectors = _decode_case(chip, sizes, case)
    backend = chip.graph(attention, case.rows)
    backend.plan(batch)
    layers = [0 if case.layer_first else layer for layer in range(sizes.shape.layers)]
    replay = chip.capture(lambda: [backend.run(layer, *vectors) for layer in layers])
    return chip.seconds(replay, times)


def _decode_case(chip: Chip, sizes: Sizes, case: Decode) -> Case:
    shape, depth = sizes.shape, 1 if case.layer_first else sizes.shape.layers
    layout = shape.layout(depth, case.block_tokens, chip.dtype.itemsize)
    per_row = layout.blocks_for(case.context)
    # The last frame is for padding; each row writes to a frame of its own, the last of its table.
    frames = min(int(sizes.pool_gib * GIB) // layout.block_bytes, case.rows * per_row) + 1
    arena = allocate_arena(frames, layout, chip.dtype, chip.device).normal_()
    rng = np.random.default_rng(0)
    rounds = -(-case.rows * per_row // (frames - 1))
    named = np.concatenate([rng.permutation(frames - 1) for _ in range(rounds)]).astype(np.int32)
    tables = np.split(named[: case.rows * per_row], case.rows)
    for row, table in enumerate(tables):
        table[-1] = row
    contexts = np.full(case.rows, case.context, np.int32)
    attention = chip.attention(arena, shape.geometry(depth), case.rows, decode=case.kernel)
    batch = AttentionBatch(np.arange(case.rows + 1, dtype=np.int32), contexts - 1, contexts, tables)
    return attention, batch, _vectors(chip, sizes, case.rows)


def _prefill(
    chip: Chip, sizes: Sizes, kernel: str, prefix: int, known: Mapping[str, float], key: str, what: str
) -> Line:
    seconds = _prefill_s(chip, sizes, kernel, prefix, sizes.times)
    rate = sizes.shape.attention_flops(sizes.shape.layers, prefix, sizes.chunks[0]) / median(seconds) / 1e12
    return Line(key, what, rate, "TFLOP/s", _share(rate, known, "matmul"), raw={"s": seconds})


def _prefill_s(chip: Chip, sizes: Sizes, kernel: str, prefix: int, times: int) -> list[float]:
    """Seconds of attention over all layers of one chunk of a prompt, launched kernel by kernel."""
    attention, batch, vectors = _prefill_case(chip, sizes, kernel, prefix)
    attention.plan(batch)
    return chip.seconds(lambda: [attention.run(layer, *vectors) for layer in range(sizes.shape.layers)], times)


def _prefill_case(chip: Chip, sizes: Sizes, kernel: str, prefix: int) -> Case:
    shape, tokens = sizes.shape, sizes.chunks[0]
    layout = shape.layout(shape.layers, sizes.block_tokens[0], chip.dtype.itemsize)
    blocks = layout.blocks_for(prefix + tokens)
    arena = allocate_arena(blocks + 1, layout, chip.dtype, chip.device).normal_()
    attention = chip.attention(arena, shape.geometry(shape.layers), 1, prefill=kernel)
    table = np.random.default_rng(0).permutation(blocks).astype(np.int32)
    start, length = np.array([prefix], np.int32), np.array([tokens], np.int32)
    batch = AttentionBatch(np.array([0, tokens], np.int32), start, start + length, [table])
    return attention, batch, _vectors(chip, sizes, tokens)


def _layer(chip: Chip, sizes: Sizes) -> None:
    """Norms, rotation, activation and products, once: models of one layer and a small vocabulary."""
    small = replace(sizes, shape=replace(sizes.shape, layers=1, vocab=256))
    for quantization in ("none", "fp8"):
        _step(chip, small, make_model(chip, small, quantization))


def _step(chip: Chip, small: Sizes, model: Model) -> None:
    g = model.geometry
    layout = small.shape.layout(1, small.block_tokens[0], chip.dtype.itemsize)
    arena = allocate_arena(2, layout, chip.dtype, chip.device)
    attention = chip.attention(arena, g, 1)
    four, table = np.array([4], np.int32), np.zeros(1, np.int32)
    attention.plan(AttentionBatch(np.array([0, 4], np.int32), four - 4, four, [table]))
    ids = torch.arange(4, device=chip.device)
    model.logits(model.forward(ids, ids, attention, ids))


def _vectors(chip: Chip, sizes: Sizes, tokens: int) -> list[torch.Tensor]:
    """q, k and v of so many tokens."""
    shape = sizes.shape
    return [torch.randn(tokens, heads, shape.head_dim, device=chip.device, dtype=chip.dtype)
            for heads in (shape.heads, shape.kv_heads, shape.kv_heads)]  # fmt: skip


def _share(rate: float, known: Mapping[str, float], ceiling: str) -> float | None:
    return rate / known[ceiling] if ceiling in known else None
