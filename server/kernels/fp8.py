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


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [rows, columns], bf16 or fp16, of any stride but 1 within a row -> codes e4m3 [rows, columns] and scales fp32
    [rows, 1]: x is about codes * scales. One kernel. A row with a number that is none becomes one of those."""
    rows, columns = x.shape
    codes = torch.empty(rows, columns, dtype=CODE, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    strip = min(triton.next_power_of_2(columns), STRIP)
    _quantise_rows[(rows,)](x, codes, scales, columns, x.stride(0), FP8_MAX, LEAST_PEAK, STRIP=strip, num_warps=8)
    return codes, scales


def product(codes: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None) -> Tensor:
    """(codes * scales) times (weight * weight_scales) transposed, plus `bias`: bf16 [rows, out].

    codes e4m3 [rows, in], scales fp32 [rows, 1], weight e4m3 [out, in], weight_scales fp32 [1, out], bias bf16 [out].
    `in` and `out` are multiples of 16. Sums are fp32: tensor cores alone ("fast accumulation", which others use) keep
    some 14 bits, and a sum of 4,096 numbers of one sign was 5 % too small.
    """
    return F.scaled_mm(
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
