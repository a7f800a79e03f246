"""FlashInfer's kernels for a decoder's small steps and products in fp8, against the same in fp32 torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from server.kernels.flashinfer import FP8_MAX, Operations
from server.models.cuda import CudaLinear
from server.models.fp8 import Fp8Linear
from server.models.layers import rotate
from tests.gpu.variants import DEVICE

pytestmark = pytest.mark.gpu
fp8 = pytest.importorskip("server.kernels.fp8", reason="needs Triton")

RELATIVE = 2**-7
"""Of bfloat16: inputs, and a result that is rounded once or twice on its way."""


def drawn(*shape: int) -> torch.Tensor:
    """bfloat16, on the device, of order one."""
    generator = torch.Generator().manual_seed(len(shape) * 1000 + shape[-1])
    return torch.randn(shape, generator=generator).to(DEVICE, torch.bfloat16)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.float(), expected, rtol=RELATIVE, atol=RELATIVE)


@pytest.mark.parametrize(("rows", "size"), [(1, 160), (7, 4096), (300, 128)])
def test_norm(rows: int, size: int) -> None:
    """Root-mean-square norm of whole vectors, and in place of heads that are slices of a projection."""
    operations, x, gain = Operations(), drawn(rows, size), drawn(size)
    close(operations.rms_norm(x, gain, 1e-5), F.rms_norm(x.float(), (size,), gain.float(), 1e-5))
    wide = drawn(rows, 6, 128)
    heads, gain = wide[:, 1:4], drawn(128)
    before, expected = wide.clone(), F.rms_norm(heads.float(), (128,), gain.float(), 1e-5)
    operations.rms_norm_heads_(heads, gain, 1e-5)
    close(heads, expected)
    assert torch.equal(wide[:, [0, 4, 5]], before[:, [0, 4, 5]])


@pytest.mark.parametrize("inner", [384, 14336])
def test_gated_activation(inner: int) -> None:
    """silu(gate) * up of the two halves."""
    x = drawn(33, 2 * inner)
    gate, up = x.float().chunk(2, dim=-1)
    close(Operations().silu_mul(x), F.silu(gate) * up)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_rotation(head_dim: int) -> None:
    """Queries and keys rotate where they lie in the projection, by the angles of their own rows; values stay."""
    qkv = drawn(9, 8, head_dim)
    q, k, v = qkv.split((4, 2, 2), dim=1)
    angle = torch.rand(9, head_dim // 2, device=DEVICE) * 1000
    cos, sin = angle.cos(), angle.sin()
    full_cos, full_sin = torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]
    expected = [rotate(x.float(), full_cos, full_sin) for x in (q, k)]
    values = v.clone()
    rows = torch.arange(9, dtype=torch.int32, device=DEVICE)
    Operations().rotate_(q, k, torch.cat((cos, sin), dim=-1), rows)
    for found, wanted in zip((q, k), expected, strict=True):
        close(found, wanted)
    assert torch.equal(v, values)


def test_a_product_is_added_in_place() -> None:
    """The residual takes the product that is added to it, rounded once."""
    linear = CudaLinear(256, 512, False, torch.bfloat16, DEVICE)
    linear.weight.copy_(drawn(512, 256) / 16)
    x, onto = drawn(5, 256), drawn(5, 512)
    expected = onto.float() + x.float() @ linear.weight.float().t()
    assert linear.add_to(x, onto) is onto
    close(onto, expected)


@pytest.mark.parametrize(("rows", "inputs"), [(1, 4096), (300, 160), (3, 28672)])
def test_rows_are_rounded_to_fp8(rows: int, inputs: int) -> None:
    """Codes times scales are the row, to half a step of e4m3; the largest number of a row is hit."""
    x = drawn(rows, inputs) * 7
    codes, scales = fp8.quantise_rows(x)
    torch.testing.assert_close(scales, x.float().abs().amax(dim=1, keepdim=True) / FP8_MAX)
    torch.testing.assert_close(codes.float() * scales, x.float(), rtol=2**-4, atol=float(scales.max()) * 2**-9)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none(bad: float) -> None:
    """It is seen in the row that has it, and in no other."""
    x = drawn(3, 64)
    x[1, 5] = bad
    codes, scales = fp8.quantise_rows(x)
    assert (codes.float() * scales).isfinite().all(dim=1).tolist() == [True, False, True]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 16, 33, 64, 65, 300])
def test_products_in_fp8(rows: int, bias: bool) -> None:
    """They are those of the rounded numbers, whether Triton or torch multiplies, and `add_to` adds them in place."""
    linear = Fp8Linear(4096, 1024, bias, DEVICE)
    linear.part(0, 1024).copy_(drawn(1024, 4096) / 64)
    if linear.bias is not None:
        linear.bias.copy_(drawn(1024))
    x, onto = drawn(rows, 4096), drawn(rows, 1024)
    codes, scales = fp8.quantise_rows(x)
    weight = linear.codes.float() * linear.scales.t()
    product = (codes.float() * scales) @ weight.t()
    expected = product + (0 if linear.bias is None else linear.bias.float())
    bound = RELATIVE * (1 + product.abs())  # torch rounds the product, then adds the bias
    assert ((linear(x).float() - expected).abs() <= bound + RELATIVE * expected.abs()).all()
    residual = onto.float()
    assert linear.add_to(x, onto) is onto
    assert ((onto.float() - residual - expected).abs() <= bound + RELATIVE * (residual + expected).abs()).all()
