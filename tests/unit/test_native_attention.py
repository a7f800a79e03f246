"""Native paged attention: exact in every format and instruction set, the same bits however a step is put together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from server.kernels import int8
from server.kernels.attention import AttentionBatch
from server.kernels.native import load
from server.kernels.native.attention import NativeAttention
from server.kernels.reference import ReferenceAttention
from server.types import ModelGeometry
from tests.numeric.oracle import geometry
from tests.unit.native import instruction_sets, selected

pytestmark = pytest.mark.skipif(load() is None, reason="the native kernels were not built")

TOLERANCE = 4e-6
"""Absolute, for outputs of order one: both sides sum in fp32, and a sum of products of 128 channels or of weights over
some hundred keys is off by a few of its 2^-24 steps. The reference reads the same rounded arena."""
TOLERANCE_AMX = 4e-5
"""With AMX a power of e has 18 bits. Queries are rounded to bf16, which the reference is told."""
ROUNDED_AMX = 2.0**-8
"""And weights are: a result is off by as much of what it would be if all values had one sign."""
TOLERANCE_INT8 = 2e-4
"""Without AMX an int8 cache is multiplied in integers: queries are rounded to `QUERY_STEPS`, which the reference is
told, and weights times the values' scales to 32,767 steps of the largest of a tile."""
QUERY_STEPS = 16383
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


@pytest.fixture(params=instruction_sets())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with selected(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@dataclass
class Sequences:
    """Sequences of queries, keys and values; each has frames of its own in a shuffled arena of poison."""

    shape: ModelGeometry
    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]
    tables: list[np.ndarray]
    arena: Tensor

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        shape: ModelGeometry,
        dtype: torch.dtype = torch.float32,
        block_tokens: int = 16,
        seed: int = 0,
    ) -> Sequences:
        generator = torch.Generator().manual_seed(seed)

        def vectors(heads: int) -> list[Tensor]:
            return [torch.randn(n, heads, shape.head_dim, generator=generator) for n in lengths]

        counts = [-(-n // block_tokens) for n in lengths]
        frames = np.random.default_rng(seed).permutation(sum(counts) + 3).astype(np.int32)
        size = (len(frames), shape.layers, 2, shape.kv_heads, block_tokens)
        if dtype == torch.int8:
            arena = torch.zeros(*size, shape.head_dim + int8.SCALE_BYTES, dtype=dtype)
            int8.planes(arena)[0].fill_(77)
            int8.planes(arena)[1].fill_(float("nan"))
        else:
            arena = torch.full((*size, shape.head_dim), float("nan"), dtype=dtype)
        tables = np.split(frames, np.cumsum(counts))[: len(counts)]
        q, k, v = vectors(shape.heads), vectors(shape.kv_heads), vectors(shape.kv_heads)
        return cls(shape, q, k, v, tables, arena)

    def step(self, backend: NativeAttention | ReferenceAttention, rows: Sequence[tuple[int, int, int]]) -> list[Tensor]:
        """Rows of (sequence, start, end); layer 0's result of each, [tokens, heads * head_dim]."""
        lengths = np.array([end - start for _, start, end in rows], np.int32)
        starts = np.array([start for _, start, _ in rows], np.int32)
        bounds = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
        batch = AttentionBatch(bounds, starts, starts + lengths, [self.tables[s] for s, _, _ in rows])
        backend.plan(batch)
        fed = (torch.cat([x[s][start:end] for s, start, end in rows]) for x in (self.q, self.k, self.v))
        return list(backend.run(0, *fed).split(lengths.tolist()))


def rounded(queries: Tensor, by_tiles: bool, dtype: torch.dtype) -> Tensor:
    """As the kernels do before they multiply."""
    if by_tiles:
        return queries.bfloat16().float()
    if dtype != torch.int8:
        return queries
    step = queries.abs().amax(-1, keepdim=True).double() / QUERY_STEPS
    return ((queries / step).round() * step).float()


def agree(
    isa: str, lengths: Sequence[tuple[int, int]], shape: ModelGeometry, dtype: torch.dtype, block_tokens: int
) -> None:
    """Rows of (cached, fed): the cached tokens stored first, then the step, by reference and native."""
    by_tiles = isa == "amx" and dtype in (torch.bfloat16, torch.int8)
    results, arenas = [], []
    for backend, positive in ((ReferenceAttention, True), (ReferenceAttention, False), (NativeAttention, False)):
        it = Sequences.of([start + fed for start, fed in lengths], shape, dtype, block_tokens)
        if positive:
            it.v = [v.abs() for v in it.v]
        if backend is ReferenceAttention:
            it.q = [rounded(q * shape.scale, by_tiles, dtype) / shape.scale for q in it.q]
        attention = backend(it.arena, shape)
        cached = [(i, 0, start) for i, (start, _) in enumerate(lengths) if start]
        if cached:
            it.step(attention, cached)
        results.append(torch.cat(it.step(attention, [(i, s, s + n) for i, (s, n) in enumerate(lengths)])))
        arenas.append(it.arena.view(torch.uint8))
    assert torch.equal(*arenas[1:]), "both store the same bytes"
    together, exact, ours = results
    tolerance = TOLERANCE_INT8 if dtype == torch.int8 else TOLERANCE
    if by_tiles:
        tolerance = TOLERANCE_AMX + ROUNDED_AMX * together
    assert ((exact - ours).abs() <= tolerance).all()  # also false for NaN


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 20, 64, 80, 96, 128])
def test_formats_and_head_sizes(isa: str, dtype: torch.dtype, head_dim: int) -> None:
    """Every format and head size, in and out of step with the vectors' width, gives the reference's attention."""
    shape = geometry(layers=1, heads=6, kv_heads=2, head_dim=head_dim)
    agree(isa, [(5, 1), (0, 70), (300, 9), (63, 1), (255, 2)], shape, dtype, block_tokens=16)


@settings(max_examples=20)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 90), st.one_of(st.just(1), st.integers(1, 80))), min_size=1, max_size=5),
    window=st.one_of(st.none(), st.integers(1, 100)),
    heads=st.sampled_from([(1, 1), (4, 4), (6, 3), (4, 1), (7, 1), (16, 8)]),
    head_dim=st.sampled_from([8, 24, 64]),
    block_tokens=st.sampled_from([1, 4, 16, 128]),
    dtype=st.sampled_from(DTYPES),
)
@pytest.mark.parametrize("name", instruction_sets())
def test_any_step(
    name: str,
    lengths: list[tuple[int, int]],
    window: int | None,
    heads: tuple[int, int],
    head_dim: int,
    block_tokens: int,
    dtype: torch.dtype,
) -> None:
    """Whatever rows come together, partial blocks, windows and shared heads included, each gets exact attention."""
    shape = geometry(layers=1, heads=heads[0], kv_heads=heads[1], head_dim=head_dim, windows=(window,))
    with selected(name):
        agree(name, lengths, shape, dtype, block_tokens)


def cut(length: int, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """0..length in pieces of these sizes, in turn."""
    pieces, start = [], 0
    while start < length:
        end = min(length, start + sizes[len(pieces) % len(sizes)])
        pieces.append((start, end))
        start = end
    return pieces


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "window"), [(6, 2, None), (4, 4, 100), (8, 1, None)])
def test_a_prompt_in_pieces_has_the_same_bits(
    isa: str, dtype: torch.dtype, heads: int, kv_heads: int, window: int | None
) -> None:
    """A prompt at once, in chunks of several sizes and token by token gives the same bits, on one thread and on two."""
    shape = geometry(layers=1, heads=heads, kv_heads=kv_heads, head_dim=64, windows=(window,))
    found = []
    one_by_one = (500, *(1,) * 30)
    for threads, sizes in [(1, (600,)), (2, (600,)), (2, one_by_one), (1, (7, 64, 250)), (2, (33, 1, 1, 256))]:
        torch.set_num_threads(threads)
        it = Sequences.of([600], shape, dtype)
        attention = NativeAttention(it.arena, shape)
        found.append(torch.cat([it.step(attention, [(0, *piece)])[0] for piece in cut(600, sizes)]))
    assert not found[0].isnan().any()
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_in_any_batch(isa: str, dtype: torch.dtype) -> None:
    """A decode row and a prefill chunk, alone or among 2 to 70 others, have the same bits, on one thread and on two."""
    shape = geometry(layers=1, heads=6, kv_heads=2, head_dim=64)
    lengths = [700, 300, *(5 + i % 60 for i in range(68))]
    whole = Sequences.of(lengths, shape, dtype)
    attention = NativeAttention(whole.arena, shape)
    whole.step(attention, [(i, 0, n) for i, n in enumerate(lengths)])
    watched = [(0, 699, 700), (1, 280, 300)]
    torch.set_num_threads(1)
    alone = [whole.step(attention, [row])[0] for row in watched]
    others = [(i, n - 1 - i % 3, n) for i, n in enumerate(lengths)][2:]
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for row, expected in zip(watched, alone, strict=True):
            assert torch.equal(whole.step(attention, [row])[0], expected)
        for count in (0, 1, 5, 68):
            rows = whole.step(attention, [*others[:count], *watched])
            assert torch.equal(rows[-2], alone[0])
            assert torch.equal(rows[-1], alone[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "window", "fed"),
    [(6, 2, None, 1), (4, 4, 300, 1), (8, 4, 130, 1), (8, 2, None, 1), (12, 4, None, 2), (8, 1, 40, 1)],
)
def test_steps_of_few_queries_have_the_bits_of_prompts(
    isa: str, dtype: torch.dtype, heads: int, kv_heads: int, window: int | None, fed: int
) -> None:
    """Steps of rows of one or two tokens alone, however many and however their work is dealt out, give the bits
    that these tokens had within a prompt."""
    shape = geometry(layers=1, heads=heads, kv_heads=kv_heads, head_dim=64, windows=(window,))
    lengths = [1100, 300, 700, 515, 40, 3, *(200 + 13 * i for i in range(10))]
    whole = Sequences.of(lengths, shape, dtype)
    attention = NativeAttention(whole.arena, shape)
    expected = [result[-fed:] for result in whole.step(attention, [(i, 0, n) for i, n in enumerate(lengths)])]
    rows = [(i, n - fed, n) for i, n in enumerate(lengths)]
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for count in (1, 2, 5, len(rows)):
            for result, same in zip(whole.step(attention, rows[:count]), expected, strict=False):
                assert torch.equal(result, same)


def test_int8_keeps_what_is_not_finite() -> None:
    """A key or value that overflowed does not become a number when it is rounded to int8."""
    shape = geometry(layers=1, heads=2, kv_heads=2, head_dim=8)
    for poison in (float("inf"), float("-inf"), float("nan")):
        results = []
        for backend in (ReferenceAttention, NativeAttention):
            it = Sequences.of([3], shape, torch.int8)
            it.v[0][1, 0, 3] = poison
            results.append(it.step(backend(it.arena, shape), [(0, 0, 3)])[0])
        for result in results:
            assert result[1:, :8].isnan().all()
            assert result[:, 8:].isfinite().all()
        assert torch.equal(results[0].isnan(), results[1].isnan())


@given(st.integers(0, 10_000), st.sampled_from([0.0, 1e-38, 1e-20, 1.0, 1e30]))
def test_int8_rounds_within_half_a_step(seed: int, scale: float) -> None:
    """Values come back within half a step, a step being 1/127 of the vector's largest magnitude."""
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(seed)) * scale
    values, scales = int8.quantise(x)
    error = (values.double() * scales.double()[:, None] - x.double()).abs()
    bound = x.double().abs().amax(-1, keepdim=True) / 254 * (1 + 1e-5)
    assert (error <= bound.clamp(min=int8.SMALLEST)).all()


def test_sizes_of_working_memory_are_bounded() -> None:
    """A long context of one row is split for the threads; the partial results stay far smaller than the KV read."""
    shape = geometry(layers=1, heads=12, kv_heads=4, head_dim=64)
    torch.set_num_threads(2)
    attention = NativeAttention(torch.zeros(1, 1, 2, 4, 16, 64), shape)
    table = np.zeros(131072 // 16, np.int32)
    one = np.array([131071], np.int32)
    attention.plan(AttentionBatch(np.array([0, 1], np.int32), one, one + 1, [table]))
    assert 0 < attention._plan.step.partial_floats * 4 < 131072 * 2 * 4 * 64 * 4 / 100
