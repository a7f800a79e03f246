"""Packed linear layers: every format on every instruction set this machine has, against float64 on the same weights."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

from server.kernels.native import ISAS, load, select
from server.kernels.native.linear import FORMATS, PackedLinear, Workspace

library = load()
if library is None:
    pytest.skip("the native kernels were not built", allow_module_level=True)


def present() -> list[str]:
    found = []
    for isa in ISAS:
        try:
            found.append(select(library, isa))
        except ValueError:
            continue
    select(library, "auto")
    return found


PRESENT = present()
CODES = torch.tensor([-126, -91, -70, -53, -38, -25, -13, -2, 8, 19, 31, 45, 60, 78, 101, 127.0])
LEVELS = torch.tensor([-64, -45, -34, -25, -18, -12, -6, -1, 4, 9, 15, 21, 29, 38, 50, 63.0])
INTEGERS = ("w8a8", "w4a8")
EPS32, EPS_BF16 = 2.0**-24, 2.0**-8
"""Unit roundoffs."""


@pytest.fixture(params=PRESENT)
def isa(request):
    select(library, request.param)
    yield request.param
    select(library, "auto")


def make(inputs, outputs, format, *, bias=False, gated=False, seed=0, threads=2) -> tuple[PackedLinear, Tensor, Tensor]:
    """A layer, the weights it was filled with in two pieces, and its bias (zero without)."""
    generator = torch.Generator().manual_seed(seed)
    layer = PackedLinear(inputs, outputs, format, bias=bias, gated=gated)
    layer.threads = threads
    rows = layer.rows_of_weights
    weights, added = torch.randn(rows, inputs, generator=generator) * 0.1, torch.zeros(rows)
    cut = rows // 3
    layer.fill(cut, weights[cut:])
    if cut:
        layer.fill(0, weights[:cut])
    if bias:
        added = torch.randn(rows, generator=generator)
        layer.fill_bias(cut, added[cut:])
        layer.fill_bias(0, added[:cut])
    return layer, weights, added


def held(layer: PackedLinear) -> Tensor:
    """W as the kernels see it."""
    return layer.rows(torch.arange(layer.rows_of_weights))


def as_integers(x: Tensor, format: str) -> Tensor:
    """Rows of x rounded to 127 steps either way (w8a8), or each 32 inputs of a row to 63 (w4a8), float64."""
    group, steps = (x.shape[1], 127) if format == "w8a8" else (32, 63)
    parts = x.split(group, 1)
    tops = [part.abs().amax(1, keepdim=True) for part in parts]
    rounded = [torch.round(part * (steps / top)).double() * (top / steps).double() for part, top in zip(parts, tops)]
    return torch.cat(rounded, 1)


def exact(layer: PackedLinear, added: Tensor, x: Tensor, isa: str) -> tuple[Tensor, Tensor]:
    """The result in float64, and how far from it the kernel may be.

    A sum of K products, each step rounded, is off by at most (K + 2) eps times the sum of the products' sizes; the
    scale and the bias round once more each. With AMX x, and the weights of groups, are rounded to bf16 besides. Of w8a8
    and w4a8 it is the rounded x that counts, on all of them.
    """
    w, wide = held(layer).double(), x.double()
    if layer.format in INTEGERS:
        wide = as_integers(x, layer.format)
    sums, sizes = wide @ w.T + added.double(), wide.abs() @ w.abs().T + added.double().abs()
    share = (layer.inputs + 4) * EPS32
    if isa == "amx" and layer.format not in ("float32", "float16", *INTEGERS):
        share += EPS_BF16 * 1.01 * (2 if layer.format == "int8-g32" else 1)
    bound = sizes * share + 1e-30
    if not layer.gated:
        return sums, bound
    (gate, up), (gate_bound, up_bound) = sums.chunk(2, 1), bound.chunk(2, 1)
    silu = F.silu(gate)  # its slope is at most 1.1; exp, the quotient and the product round a few times
    return silu * up, 1.1 * gate_bound * (up.abs() + up_bound) + silu.abs() * up_bound + 16 * EPS32 * (silu * up).abs()


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=10, deadline=None)
@given(
    inputs=st.integers(1, 130) | st.sampled_from([256, 512, 800, 1056]),
    outputs=st.integers(1, 100),
    rows=st.integers(1, 40),
    bias=st.booleans(),
    gated=st.booleans(),
    threads=st.integers(1, 2),
    seed=st.integers(0, 9),
)
def test_results_are_right(format, inputs, outputs, rows, bias, gated, threads, seed):
    """Any shape, any format: as float64 says, within the rounding of the arithmetic; added to y likewise."""
    try:
        for isa in PRESENT:
            select(library, isa)
            layer, _, added = make(inputs, outputs, format, bias=bias, gated=gated, seed=seed, threads=threads)
            x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed))
            want, bound = exact(layer, added, x, isa)
            y = layer(x)
            assert ((y - want).abs() <= bound).all()
            twice = y.clone()
            layer.add(x, twice)
            assert torch.equal(twice, y + y)
    finally:
        select(library, "auto")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("gated", [False, True])
def test_bits_do_not_depend_on_the_batch(isa, format, gated):
    """A row alone, in batches of 2 to 70, at their front or end, whole or cut, on 1 to 4 threads: the same bits."""
    layer, _, _ = make(288, 104, format, bias=gated, gated=gated)
    x = torch.randn(260, 288, generator=torch.Generator().manual_seed(1))
    x[::3] *= 1e-37  # results among the subnormal numbers
    whole = layer(x)
    for threads, sizes in ((2, (*range(1, 18), 28, 31, 32, 33, 48, 70, 257)), (1, (1, 16, 70)), (4, (3, 33))):
        layer.threads = threads
        assert torch.equal(layer(x), whole)
        for rows in sizes:
            assert torch.equal(layer(x[:rows]), whole[:rows])
            assert torch.equal(layer(x[-rows:]), whole[-rows:])


@pytest.mark.parametrize("format", FORMATS)
def test_rows_beyond_what_is_packed_at_once(isa, format):
    """More rows than one packing of x takes: the same bits as a few at a time."""
    layer, _, _ = make(40, 24, format)
    x = torch.randn(2500, 40, generator=torch.Generator().manual_seed(1))
    assert torch.equal(layer(x), torch.cat([layer(part) for part in x.split(113)]))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [1, 3, 16, 40])
def test_strides_and_neighbours(isa, format, rows):
    """x and y may be columns of wider tensors at any offset; nothing beside y's columns is written."""
    layer, _, _ = make(96, 37, format)
    wide = torch.randn(rows, 131, generator=torch.Generator().manual_seed(2))
    x = wide[:, 3:99]
    y = torch.full((rows, 51), 7.0)
    layer.into(x, y[:, 5:42])
    assert torch.equal(y[:, 5:42], layer(x.contiguous()))
    assert (y[:, :5] == 7).all()
    assert (y[:, 42:] == 7).all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("inputs", [64, 75])
def test_rows_do_not_mix(isa, format, inputs):
    """NaN and infinities in a row, or behind the rows, reach no other row."""
    layer, _, _ = make(inputs, 50, format)
    memory = torch.full((40, inputs + 9), float("nan"))
    for rows in (2, 4, 15, 33):
        x = memory[:rows, :inputs]
        x.copy_(torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows)))
        clean = layer(x)
        x[1] = torch.tensor([float("nan"), float("inf"), float("-inf")]).repeat(inputs)[:inputs]
        dirty = layer(x)
        others = torch.arange(rows) != 1
        assert torch.equal(dirty[others], clean[others])
        assert clean.isfinite().all()
        assert not dirty[1].isfinite().any()


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", ["float32", "bfloat16", "float16"])
def test_float_formats_round_as_torch_does(isa, format, source):
    """What is packed is what `Tensor.to` makes of it, also from a tensor with gaps between its rows."""
    weights = torch.randn(90, 77, generator=torch.Generator().manual_seed(3)).to(source)
    weights[:4, :4] = torch.tensor([float("inf"), -0.0, 6e-8, 7e4]).to(source)
    layer = PackedLinear(60, 45, format, gated=True)
    layer.fill(0, weights[:, 9:69])
    want = weights[:, 9:69].to(getattr(torch, format)).float()
    assert torch.equal(held(layer), want)
    assert torch.equal(layer.rows(torch.tensor([89, 0, 44])), want[[89, 0, 44]])


def test_int8_rounds_to_the_nearest_step(isa):
    """Each output has 127 steps up to its largest weight, or each 32 of its inputs have; zeros stay zeros."""
    for format, group in (("int8", 70), ("w8a8", 70), ("int8-g32", 32)):
        layer, weights, _ = make(70, 50, format)
        layer = PackedLinear(70, 50, format)
        weights[7] = 0
        layer.fill(0, weights)
        for first in range(0, 70, group):
            part = weights[:, first : first + group]
            step = part.abs().amax(1, keepdim=True) / 127 * (1 + 2**-7 if format == "int8-g32" else 1)
            off = (held(layer)[:, first : first + group] - part).abs()
            assert (off <= step * 0.5001).all()


def test_int4_has_little_error(isa):
    """Weights are what a scale added to the table gives, zeros all but zero, and little of their size is lost."""
    weights = torch.randn(64, 2048, generator=torch.Generator().manual_seed(4))
    weights[3, 32:64] = 0
    layer = PackedLinear(2048, 64, "int4-g32")
    layer.fill(0, weights)
    groups = held(layer).view(-1, 32)
    assert torch.equal(groups, groups.bfloat16().float())
    assert groups[3 * 64 + 1].abs().max() < 1e-35
    bits = groups.bfloat16().view(torch.int16).int()  # of every weight: a group's scale plus an entry of the table
    table = (CODES / 128 * 2.0**-120).bfloat16().view(torch.int16).int()
    for group in bits[::17]:
        scales = (group[0] - table) % 2**16
        fits = [bool(torch.isin((group - scale) % 2**16, table % 2**16).all()) for scale in scales]
        assert any(fits)
    assert (held(layer) - weights).norm() / weights.norm() < 0.0765


def test_levels_have_little_error(isa):
    """Weights of w4a8 are a bf16 scale times an entry of the table, zeros zero, and little of their size is lost."""
    weights = torch.randn(64, 2048, generator=torch.Generator().manual_seed(4))
    weights[3, 32:64] = 0
    layer = PackedLinear(2048, 64, "w4a8")
    layer.fill(0, weights)
    groups = held(layer).view(-1, 32)
    assert (groups[3 * 64 + 1] == 0).all()
    for group in groups[::17]:
        scales = (group[0] / LEVELS).bfloat16().float()
        assert any(bool(torch.isin(group, scale * LEVELS).all()) for scale in scales)
    assert (held(layer) - weights).norm() / weights.norm() < 0.0765


def test_packing_is_the_same_on_all_instruction_sets():
    """What a checkpoint becomes does not depend on the machine that packs it."""
    weights = torch.randn(40, 320, generator=torch.Generator().manual_seed(5))
    for format in FORMATS:
        made = []
        for isa in PRESENT:
            select(library, isa)
            layer = PackedLinear(320, 40, format)
            layer.fill(0, weights)
            made.append(held(layer))
        select(library, "auto")
        assert all(torch.equal(made[0], other) for other in made)


@pytest.mark.parametrize("format", INTEGERS)
def test_integers_give_the_same_on_all_instruction_sets(format):
    """Sums of products of int8 are exact: a model says the same on every machine, as far as this layer goes."""
    made = []
    for isa in PRESENT:
        select(library, isa)
        layer, _, _ = make(300, 75, format, bias=True)
        made.append(layer(torch.randn(40, 300, generator=torch.Generator().manual_seed(1))))
    select(library, "auto")
    assert all(torch.equal(made[0], other) for other in made)


def test_integers_at_their_ends(isa):
    """Products of the largest integers, of one sign, do not overflow on their way."""
    for format in INTEGERS:
        for sign in (1, -1):
            weights = torch.full((32, 4096), 1.0)
            layer = PackedLinear(4096, 32, format)
            layer.fill(0, weights)
            x = torch.full((7, 4096), 3.0 * sign)
            assert torch.allclose(layer(x), torch.full((7, 32), 3.0 * sign * 4096), rtol=2e-3)


def test_layers_share_a_workspace(isa):
    """Layers of different sizes take turns in one workspace that grows; results are those of their own."""
    shared = Workspace()
    small, large = (
        PackedLinear(33, 20, "bfloat16", workspace=shared),
        PackedLinear(900, 20, "bfloat16", workspace=shared),
    )
    for layer, inputs in ((small, 33), (large, 900)):
        layer.fill(0, torch.randn(20, inputs, generator=torch.Generator().manual_seed(6)))
    x, wide = torch.randn(20, 33), torch.randn(50, 900)
    before = small(x)
    large(wide)
    assert torch.equal(small(x), before)


def test_bytes_held():
    """4, 2, 2, 1, 1.06, 0.56, 1 and 0.56 bytes a weight, and a scale for each output of int8 and w8a8."""
    held = {format: PackedLinear(1024, 512, format).nbytes / (1024 * 512) for format in FORMATS}
    assert held == {
        "float32": 4,
        "bfloat16": 2,
        "float16": 2,
        "int8": 1 + 4 / 1024,
        "int8-g32": 1.0625,
        "int4-g32": 0.5625,
        "w8a8": 1 + 4 / 1024,
        "w4a8": 0.5625,
    }
