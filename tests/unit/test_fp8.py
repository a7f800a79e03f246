"""Products in 8-bit floats: the kernel that rounds rows, in Triton's interpreter where there is no GPU, and compiled
for one; the call of torch's product against its own checks of shapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

fp8 = pytest.importorskip("server.kernels.fp8", reason="Triton is not installed: it comes with torch's CUDA builds")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CODE = torch.float8_e4m3fn
MOST = 448.0
COMPILE = """
import json, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from server.kernels.fp8 import _product_of_few, _quantise_rows

def made(kernel, types, constants):
    names = [name for name in kernel.arg_names if name not in constants]
    signature = dict(zip(names, types.split(), strict=True)) | dict.fromkeys(constants, "constexpr")
    done = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32))
    assert len(done.asm["cubin"]) > 1000
    return done.asm["ptx"]

few = "*fp8e4nv *fp32 *fp8e4nv *fp32 *bf16 *bf16 i32 i32 i32 i64"
tile = {"BIAS": True, "ADD": True, "WHOLE": False, "OUTPUTS": 32, "DEPTH": 256}
print(json.dumps({
    "rows": made(_quantise_rows, "*bf16 *fp8e4nv *fp32 i32 i64 fp32 fp32", {"STRIP": 4096}),
    "few": made(_product_of_few, few, tile | {"ROWS": 16}),
    "more": made(_product_of_few, few, tile | {"ROWS": 64}),
}))
"""


def check(x: Tensor, codes: Tensor, scales: Tensor) -> None:
    wanted_scales = x.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / MOST
    torch.testing.assert_close(scales, wanted_scales)
    exact = (x.float() / scales).clamp(-MOST, MOST)
    wanted = exact.to(CODE).float()
    same = codes.float() == wanted
    if DEVICE == "cpu":
        # Triton's interpreter loses the carry of what is rounded up to a power of two, rounds ties away from zero, and
        # what is less than the least normal number towards it.
        step = 2.0 ** (exact.abs().log2().floor().clamp(min=-6) - 3)
        lost = (wanted.abs() > exact.abs()) & (torch.frexp(wanted).mantissa.abs() == 0.5)
        same |= lost | ((codes.float() - exact).abs() <= torch.where(exact.abs() < 2**-6, step, step / 2))
    assert same.all()


@given(
    rows=st.integers(1, 5),
    columns=st.sampled_from([1, 16, 160, 1000]),
    size=st.sampled_from([1e-20, 1e-3, 1.0, 1e4]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=40, deadline=None)
def test_rows_are_rounded_to_the_nearest_code(
    rows: int, columns: int, size: float, dtype: torch.dtype, seed: int
) -> None:
    """Every row gets the scale of its own largest number and the nearest codes, whatever lies between rows."""
    wide = torch.randn(rows, columns + 7, generator=torch.Generator().manual_seed(seed)) * size
    x = wide.to(DEVICE, dtype)[:, :columns]
    check(x, *fp8.quantise_rows(x))


def test_long_rows() -> None:
    """Rows that do not fit into registers at once are rounded by one scale all the same."""
    x = torch.randn(2, fp8.STRIP + 40).to(DEVICE, torch.bfloat16)
    x[1, -1] = 100.0
    check(x, *fp8.quantise_rows(x))


def test_it_compiles_for_the_device() -> None:
    """For Hopper, with its instructions that round to two codes at once and that multiply, of few rows in fp16, which
    holds every code. In a process of its own: one that interprets kernels cannot compile them."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert "cvt.rn.satfinite.e4m3x2.f32" in made["rows"]
    assert "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32" in made["few"]
    assert "wgmma.mma_async.sync.aligned.m64n32k32.f32.e4m3.e4m3" in made["more"]


@given(
    rows=st.integers(1, 40),
    inputs=st.sampled_from([16, 160, 512, 800]),
    outputs=st.sampled_from([16, 48, 160]),
    bias=st.booleans(),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=25, deadline=None)
def test_products_of_few_rows(rows: int, inputs: int, outputs: int, bias: bool, seed: int) -> None:
    """They are those of the rounded numbers, whether tiles end with rows, inputs and outputs or not; added to what is
    there, nothing but the result's own columns is written."""
    generator = torch.Generator().manual_seed(seed)
    x, wide = (
        torch.randn(rows, size, generator=generator).to(DEVICE, torch.bfloat16) for size in (inputs, outputs + 5)
    )
    weight = torch.randn(outputs, inputs, generator=generator).to(DEVICE).to(CODE)
    weight_scales = torch.rand(1, outputs, generator=generator).to(DEVICE)
    added = torch.randn(outputs, generator=generator).to(DEVICE, torch.bfloat16) if bias else None
    codes, scales = fp8.quantise_rows(x)
    expected = (codes.float() * scales) @ (weight.float() * weight_scales.t()).t()
    expected += 0 if added is None else added.float()
    onto, before = wide[:, :outputs], wide.clone()
    close(fp8.product(codes, scales, weight, weight_scales, added), expected)
    assert fp8.product(codes, scales, weight, weight_scales, added, onto) is onto
    close(onto, before[:, :outputs].float() + expected)
    assert torch.equal(wide[:, outputs:], before[:, outputs:])


def close(found: Tensor, expected: Tensor) -> None:
    """As bf16, which Triton's interpreter rounds towards zero."""
    torch.testing.assert_close(found.float(), expected, rtol=2**-7, atol=1e-4 * float(expected.abs().max()) + 1e-6)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [65, 200])
def test_torch_takes_the_call(rows: int, bias: bool) -> None:
    """Shapes, strides and scales are those that torch's product asks for: its checks run without a device."""
    codes, scales = torch.empty(rows, 64, dtype=CODE, device="meta"), torch.empty(rows, 1, device="meta")
    weight, weight_scales = torch.empty(48, 64, dtype=CODE, device="meta"), torch.empty(1, 48, device="meta")
    added = torch.empty(48, dtype=torch.bfloat16, device="meta") if bias else None
    out = fp8.product(codes, scales, weight, weight_scales, added)
    assert (out.shape, out.dtype) == ((rows, 48), torch.bfloat16)
