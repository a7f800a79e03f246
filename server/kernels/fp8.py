"""Matrix products in 8-bit floats (e4m3) on a GPU: rows of activations are rounded just before, torch multiplies.

Knows rows, codes and scales; refuses to know models. Needs Triton, which torch's CUDA builds bring along, and a GPU
that multiplies in fp8 with a scale for each row and each output: compute capability 9.0 (Hopper) or later.

Every row has a scale of its own, so that what one request feeds does not touch how another's is rounded. Scales come
from the row alone, no calibration: the recipe that is called dynamic per-token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import ScalingType

from server.kernels.flashinfer import FP8_MAX

CODE = torch.float8_e4m3fn
LEAST_PEAK = 1e-12
"""A row of smaller numbers is rounded as if this were its largest: its scale must not be 0."""
STRIP = 16384
"""Columns that a thread block has in registers at once, 64 for each of its threads."""
FEW_ROWS = 64
"""Up to so many rows a product reads the weights once, several blocks ahead. Torch's has tiles of 128 rows and 128
outputs: for one row of 4,096 inputs and outputs 32 thread blocks at work, of 132."""
FEW_TILES = ((32, 512, 4, 4), (64, 128, 6, 4))
"""Of such a product: outputs, inputs, stages of loads under way, warps; the second where outputs suffice. On an H200
the best of seven, over the layers of Llama-3-8B and 1, 32 and 64 rows."""
MANY_OUTPUTS = 16384


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [rows, columns], bf16 or fp16, of any stride but 1 within a row -> codes e4m3 [rows, columns] and scales fp32
    [rows, 1]: x is about codes * scales. One kernel. A row with a number that is none becomes one of those."""
    rows, columns = x.shape
    codes = torch.empty(rows, columns, dtype=CODE, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    strip = min(triton.next_power_of_2(columns), STRIP)
    _quantise_rows[(rows,)](x, codes, scales, columns, x.stride(0), FP8_MAX, LEAST_PEAK, STRIP=strip, num_warps=8)
    return codes, scales


def product(
    codes: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    onto: Tensor | None = None,
) -> Tensor:
    """(codes * scales) times (weight * weight_scales) transposed, plus `bias`: bf16 [rows, out]; or that added to
    `onto`, bf16 [rows, out] of any stride but 1 within a row, which is returned.

    codes e4m3 [rows, in], scales fp32 [rows, 1], weight e4m3 [out, in], weight_scales fp32 [1, out], bias bf16 [out].
    `in` and `out` are multiples of 16. Sums are fp32: tensor cores alone ("fast accumulation", which others use) keep
    some 14 bits, and sums of thousands of numbers of one sign come out several percent too small.
    """
    if len(codes) <= FEW_ROWS:
        return _of_few(codes, scales, weight, weight_scales, bias, onto)
    result = F.scaled_mm(
        codes,
        weight.t(),
        scales,
        ScalingType.RowWise,
        weight_scales,
        ScalingType.RowWise,
        bias=bias,
        output_dtype=torch.bfloat16,
        use_fast_accum=False,
    )
    return result if onto is None else onto.add_(result)


def _of_few(
    codes: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, onto: Tensor | None
) -> Tensor:
    (rows, inputs), outputs = codes.shape, len(weight)
    result = torch.empty(rows, outputs, dtype=torch.bfloat16, device=codes.device) if onto is None else onto
    if rows == 0:
        return result
    tile, depth, stages, warps = FEW_TILES[outputs >= MANY_OUTPUTS]
    height = max(16, triton.next_power_of_2(rows))
    depth = min(depth, max(32, triton.next_power_of_2(inputs)))
    _product_of_few[(triton.cdiv(outputs, tile),)](
        codes, scales, weight, weight_scales, result if bias is None else bias, result, rows, inputs, outputs,
        result.stride(0), BIAS=bias is not None, ADD=onto is not None, WHOLE=inputs % depth == 0,
        ROWS=height, OUTPUTS=tile, DEPTH=depth, num_stages=stages, num_warps=warps,
    )  # fmt: skip
    return result


@triton.jit(do_not_specialize=["rows"])
def _product_of_few(  # type: ignore[no-untyped-def]
    codes, scales, weight, weight_scales, bias, result, rows, inputs, outputs, stride, BIAS: tl.constexpr,
    ADD: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One program for OUTPUTS outputs of all rows, over all inputs in order."""
    row, out = tl.arange(0, ROWS), tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    deep = tl.arange(0, DEPTH)
    here, there = row < rows, out < outputs
    x_at = codes + row[:, None] * inputs + deep[None, :]
    w_at = weight + out[None, :].to(tl.int64) * inputs + deep[:, None]
    sums = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for start in range(0, inputs, DEPTH):
        if WHOLE:
            x = tl.load(x_at + start, mask=here[:, None], other=0.0)
            w = tl.load(w_at + start, mask=there[None, :], other=0.0)
        else:
            inside = start + deep < inputs
            x = tl.load(x_at + start, mask=here[:, None] & inside[None, :], other=0.0)
            w = tl.load(w_at + start, mask=there[None, :] & inside[:, None], other=0.0)
        sums = tl.dot(x, w, sums, max_num_imprecise_acc=32)
    x_scales = tl.load(scales + row, mask=here, other=0.0)
    found = sums * x_scales[:, None] * tl.load(weight_scales + out, mask=there, other=0.0)[None, :]
    if BIAS:
        found += tl.load(bias + out, mask=there, other=0.0).to(tl.float32)[None, :]
    at = result + row[:, None].to(tl.int64) * stride + out[None, :]
    within = here[:, None] & there[None, :]
    if ADD:
        found += tl.load(at, mask=within, other=0.0).to(tl.float32)
    tl.store(at, found.to(tl.bfloat16), mask=within)


@triton.jit
def _quantise_rows(x, codes, scales, columns, stride, most, least_peak, STRIP: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program for each row: its largest number, then its codes. The second look at x finds it in the cache."""
    row = tl.program_id(0).to(tl.int64)
    within = tl.arange(0, STRIP)
    peaks = tl.zeros((STRIP,), tl.float32)
    for start in range(0, columns, STRIP):
        values = tl.load(x + row * stride + start + within, mask=start + within < columns, other=0.0).to(tl.float32)
        peaks = tl.maximum(peaks, tl.abs(values))
    scale = tl.maximum(tl.max(peaks), least_peak) / most
    tl.store(scales + row, scale)
    for start in range(0, columns, STRIP):
        inside = start + within < columns
        values = tl.load(x + row * stride + start + within, mask=inside, other=0.0).to(tl.float32)
        bounded = tl.clamp(values / scale, -most, most, propagate_nan=tl.PropagateNan.ALL)
        tl.store(codes + row * columns + start + within, bounded.to(tl.float8e4nv), mask=inside)
