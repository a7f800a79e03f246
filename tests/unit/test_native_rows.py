"""Row kernels against fp64: norms, rotation, the gate, the most likely token, in every instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from server.kernels.native import load, rows
from tests.unit.native import instruction_sets, selected

pytestmark = pytest.mark.skipif(load() is None, reason="the native kernels were not built")

EPSILON = 2.0**-24
"""Half a unit in the last place of fp32, relative."""
SIZES = st.one_of(st.integers(1, 70), st.sampled_from([128, 768, 1030]))


@pytest.fixture(params=instruction_sets())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with selected(request.param):
        yield request.param


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", instruction_sets())
@settings(max_examples=15)
@given(count=st.integers(1, 9), size=SIZES, seed=st.integers(0, 99))
def test_norms(name: str, count: int, size: int, seed: int) -> None:
    """A sum of `size` squares is off by at most that many roundings, the root by half of it; a few follow."""
    x, gain = randn(count, size, seed=seed), randn(size, seed=seed + 1)
    with selected(name):
        ours = rows.rms_norm(x, gain, 1e-5)
    exact = x.double() * (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * gain.double()
    assert ((ours - exact).abs() <= exact.abs() * (size / 2 + 6) * EPSILON).all()


@settings(max_examples=15)
@given(
    positions=st.lists(st.integers(0, 2**20), min_size=1, max_size=9),
    half=st.sampled_from([1, 10, 64]),
    amplitude=st.sampled_from([1.0, 1.37]),
)
def test_angles(positions: list[int], half: int, amplitude: float) -> None:
    """cos and sin of the rounded product, to a unit in the last place of 1, at the end of a long context too."""
    frequencies = 1e4 ** -(torch.arange(half) / half)
    cos, sin = rows.angles(torch.tensor(positions), frequencies, amplitude)
    angle = (torch.tensor(positions).float()[:, None] * frequencies).double()
    assert ((cos - angle.cos() * amplitude).abs() <= 4 * EPSILON).all()
    assert ((sin - angle.sin() * amplitude).abs() <= 4 * EPSILON).all()


def turned(x: Tensor, angle: Tensor, amplitude: float) -> Tensor:
    """x [tokens, heads, head_dim], angle [tokens, head_dim / 2]; fp64, as complex numbers."""
    half = x.shape[-1] // 2
    spun = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.full_like(angle, amplitude), angle)[:, None]
    return torch.cat((spun.real, spun.imag), dim=-1)


@pytest.mark.parametrize("name", instruction_sets())
@settings(max_examples=15)
@given(
    tokens=st.integers(1, 9),
    heads=st.sampled_from([(1, 1), (6, 2), (8, 8)]),
    head_dim=st.sampled_from([2, 8, 20, 64, 80, 128]),
    normed=st.booleans(),
    amplitude=st.sampled_from([1.0, 1.37]),
    seed=st.integers(0, 99),
)
def test_queries_and_keys_turn(
    name: str, tokens: int, heads: tuple[int, int], head_dim: int, normed: bool, amplitude: float, seed: int
) -> None:
    """Queries and keys are normed by their own gains, then turned, the amplitude with them; values keep their bits."""
    both, kv_heads = sum(heads), heads[1]
    qkv, gains = randn(tokens, (both + kv_heads) * head_dim, seed=seed), randn(2, head_dim, seed=seed + 1)
    angle = torch.rand(tokens, head_dim // 2, generator=torch.Generator().manual_seed(seed)).double() * 100
    before = qkv.view(tokens, -1, head_dim).clone()
    exact = before[:, :both].double()
    if normed:
        exact = exact * (exact.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
        exact[:, : heads[0]] *= gains[0]
        exact[:, heads[0] :] *= gains[1]
    cos, sin = (angle.cos() * amplitude).float(), (angle.sin() * amplitude).float()
    with selected(name):
        rows.qk_rope(qkv, cos, sin, *heads, (gains[0], gains[1]) if normed else None, 1e-6)
    after = qkv.view(tokens, -1, head_dim)
    # The turn mixes two channels of the head, so errors are relative to its largest one.
    bound = exact.abs().amax(-1, keepdim=True) * 1.5 * amplitude * (head_dim / 2 + 10) * EPSILON
    assert ((after[:, :both] - turned(exact, angle, amplitude)).abs() <= bound).all()
    assert torch.equal(after[:, both:], before[:, both:])


@pytest.mark.parametrize("name", instruction_sets())
@settings(max_examples=30)
@given(data=st.data(), size=st.integers(1, 300))
def test_argmax(name: str, data: st.DataObject, size: int) -> None:
    """The lowest index among equals; NaN is nothing, and a row of nothing gives 0."""
    values = st.sampled_from([-1.0, 0.0, -0.0, 2.0, 3.0, float("nan"), float("-inf"), float("inf")])
    row = data.draw(st.lists(values, min_size=size, max_size=size))
    numbers = [-float("inf") if value != value else value for value in row]
    with selected(name):
        assert rows.argmax(torch.tensor([row, row])).tolist() == [numbers.index(max(numbers))] * 2


def test_a_row_has_the_same_bits_in_any_batch(isa: str) -> None:
    """Rows alone and among others, on one thread and on two, have the same bits."""
    x, gain, angle = randn(17, 1030), randn(1030), randn(17, 32)
    qkv = randn(17, 10 * 64)

    def all_of(part: slice) -> list[Tensor]:
        turned = qkv[part].clone()
        rows.qk_rope(turned, angle[part].cos(), angle[part].sin(), 6, 2, (gain[:64], gain[64:128]), 1e-6)
        return [rows.rms_norm(x[part], gain, 1e-5), rows.argmax(x[part]), turned]

    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            together = all_of(slice(0, 17))
            for row in range(17):
                for whole, alone in zip(together, all_of(slice(row, row + 1)), strict=True):
                    assert torch.equal(whole[row : row + 1], alone)
    finally:
        torch.set_num_threads(before)
