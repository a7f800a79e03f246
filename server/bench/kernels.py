"""The native kernels beside what this machine can do: a plain read loop, and torch's matrix products.

Linear layers with few rows are bound by reading weights, so they are judged by the share of the bandwidth that a read
loop over the same memory gets; copies of the weights take turns, together larger than the last-level cache. With many
rows they are bound by arithmetic and judged by torch's product of the same shape: fp32 formats by MKL's, those for
which the processor has bf16 tiles by oneDNN's in bf16. All take turns, and ratios are taken within a turn.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from server.bench.report import Report
from server.kernels.native import load, select
from server.kernels.native.linear import FORMATS, PackedLinear, Workspace

SHAPES = {
    "4096 x 4096": (4096, 4096),
    "125M down": (2048, 768),
    "125M q, k, v": (768, 1280),
    "0.6B q, k, v": (1024, 4096),
    "0.6B down": (3072, 1024),
}
"""Inputs and outputs: a square, and layers in the shapes of a Llama of 125M and of Qwen3-0.6B."""
FEW, MANY = (1, 4, 16), (512, 2048)
GOAL_READ, GOAL_TORCH = 0.85, 0.90
IDLE_S = 0.02
"""Torch's threads spin for a while after a product, which whoever comes next would pay for."""


def run(*, quick: bool) -> Report:
    """Run the benchmark; see the module."""
    report = Report("kernels", quick=quick)
    library = load()
    if library is None:
        report.goal("the native kernels are built", met=False)
        return report
    isa = select(library, "auto")
    print(f"instruction set {isa}, {torch.get_num_threads()} threads")
    few_rows(report, quick)
    many_rows(report, quick, isa)
    return report


def few_rows(report: Report, quick: bool) -> None:
    """Bandwidth of linear layers with few rows."""
    turns, total = (1, 2**26) if quick else (5, 2**29)
    report.header("few rows       ", "format", *(f"{rows} rows" for rows in FEW), "read GB/s", "1 row", "16 rows")
    for name, (inputs, outputs) in SHAPES.items():
        for format in FORMATS:
            layers = _copies(inputs, outputs, format, total)
            speeds: dict[int, list[float]] = {rows: [] for rows in FEW}
            size, reads = layers[0].nbytes, []
            for _ in range(turns):
                reads.append(read_speed(layers))
                for rows in FEW:
                    x, y = torch.randn(rows, inputs), torch.empty(rows, outputs)
                    taken = _timed([_call(layer, x, y) for layer in layers])
                    speeds[rows].append(size * len(layers) / taken / 1e9)
            share = {rows: median(a / b for a, b in zip(speeds[rows], reads)) for rows in FEW}
            report.keep(shape=[inputs, outputs], format=format, read_gb_s=reads, gb_s=speeds)
            medians = [f"{median(speeds[rows]):.1f}" for rows in FEW]
            report.row(name, format, *medians, f"{median(reads):.1f}", f"{share[FEW[0]]:.0%}", f"{share[FEW[-1]]:.0%}")
            if not quick:
                met = share[1] >= GOAL_READ
                report.goal(f"{name} {format}: one row at {GOAL_READ:.0%} of the read loop ({share[1]:.0%})", met=met)


def many_rows(report: Report, quick: bool, isa: str) -> None:
    """GFLOP/s of linear layers with many rows."""
    turns, work = (1, 1e8) if quick else (5, 4e10)
    report.header("many rows      ", "rows", "torch fp32", "torch bf16", *FORMATS)
    for name, (inputs, outputs) in SHAPES.items():
        for rows in MANY:
            flops = 2 * rows * inputs * outputs
            times = _product_times(rows, inputs, outputs, turns, max(1, int(work / flops)))
            report.keep(shape=[inputs, outputs], rows=rows, seconds=times)
            report.row(name, rows, *(f"{flops / median(taken) / 1e9:.0f}" for taken in times.values()))
            for format in FORMATS if not quick else ():
                peer = "torch bf16" if isa == "amx" and format not in ("float32", "float16") else "torch fp32"
                ratio = median(theirs / ours for theirs, ours in zip(times[peer], times[format]))
                met = ratio >= GOAL_TORCH
                report.goal(f"{name}, {rows} rows, {format}: {GOAL_TORCH:.0%} of {peer} ({ratio:.0%})", met=met)


def _product_times(rows: int, inputs: int, outputs: int, turns: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of one product by contender, one entry a turn."""
    x, weights, y = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.empty(rows, outputs)
    half_x, half_weights = x.bfloat16(), weights.bfloat16()
    contenders: dict[str, Callable[[], object]] = {
        "torch fp32": partial(F.linear, x, weights),
        "torch bf16": partial(F.linear, half_x, half_weights),
    }
    for format in FORMATS:
        layer = PackedLinear(inputs, outputs, format)
        layer.fill(0, weights)
        contenders[format] = partial(layer.into, x, y)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(turns):
        for name, product in contenders.items():
            time.sleep(IDLE_S)
            product()
            times[name].append(_timed([product] * repeats) / repeats)
    return times


def read_speed(layers: list[PackedLinear]) -> float:
    """GB/s at which a plain loop reads the weights."""
    library, total = load(), ctypes.c_uint64()
    assert library is not None
    sums, threads = ctypes.addressof(total), torch.get_num_threads()
    spans = [layer.span for layer in layers]
    reads = [partial(library.terrace_read, address, size // 64 * 64, sums, threads) for address, size in spans]
    return sum(size for _, size in spans) / _timed(reads) / 1e9


def _call(layer: PackedLinear, x: Tensor, y: Tensor) -> Callable[[], object]:
    """The library's function alone, as `read_speed` calls it: a step has one call for all its matrices."""
    library, rows, threads = load(), x.shape[0], torch.get_num_threads()
    assert library is not None
    scratch = layer.workspace.reserve(library.terrace_linear_scratch(layer.address, rows, threads))
    pointers = (x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0))
    return partial(library.terrace_linear, layer.address, *pointers, rows, 0, scratch, threads)


def _copies(inputs: int, outputs: int, format: str, total: int) -> list[PackedLinear]:
    """As many layers as have `total` bytes."""
    workspace, weights = Workspace(), torch.randn(outputs, inputs)
    layers: list[PackedLinear] = []
    while sum(layer.nbytes for layer in layers) < total:
        layer = PackedLinear(inputs, outputs, format, workspace=workspace)
        if not layers:
            layer.fill(0, weights)
        else:
            layer.copy(layers[0])
        layers.append(layer)
    return layers


def _timed(calls: Sequence[Callable[[], object]]) -> float:
    """Seconds that the calls take together."""
    started = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - started
