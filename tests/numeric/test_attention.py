"""Every attention backend against a second, independent fp64 computation, over arenas full of poison."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.errors import ConfigError
from server.kernels import cpu
from server.kernels.attention import BACKENDS, AttentionBackend, AttentionBatch
from server.registry import resolve
from tests.numeric.flashinfer_fake import FakedFlashInfer
from tests.numeric.oracle import Scene, geometry, scene

TOLERANCE = 2e-6
"""Absolute, for values of order one: fp32 arithmetic over contexts of up to some thousand tokens. It holds for every
arena dtype, because the oracle sees the values as the arena rounds them and every backend computes in fp32."""
TOLERANCE_BF16 = 4e-3
"""Where the native kernels have AMX, they round weights to bf16 if the arena is. That it costs no more than that is
asked in tests/unit/test_native_attention.py."""

MIXED = [(5, 1), (0, 9), (16, 8), (15, 1), (7, 30), (0, 1), (64, 1), (31, 2)]
"""Decode rows and prefill chunks; contexts that end inside, at the end of and at the start of a block of 8."""


NAMES = sorted({target: name for name, target in BACKENDS.items()}.values())
"""One of each, where a backend has several."""


def named(name: str) -> type[AttentionBackend]:
    """The backend of this name, over a stand-in for FlashInfer where it takes that."""
    cls = resolve("attention backend", BACKENDS, name)
    return FakedFlashInfer if cls.__name__ == "FlashInferAttention" else cls


@pytest.fixture(params=NAMES)
def backend(request: pytest.FixtureRequest) -> type[AttentionBackend]:
    return named(request.param)


def attend(backend: type[AttentionBackend], it: Scene) -> torch.Tensor:
    """All layers of a step: [layers, tokens, heads * head_dim]."""
    attention = backend(it.arena, it.geometry)
    attention.plan(it.batch)
    return torch.stack([attention.run(layer, it.q, it.k[layer], it.v[layer]) for layer in range(it.geometry.layers)])


def check(backend: type[AttentionBackend], it: Scene) -> None:
    error = (attend(backend, it).double() - it.expected).abs().max().item()
    native = backend.__name__ == "NativeAttention"
    tolerance = TOLERANCE_BF16 if native and it.arena.dtype == torch.bfloat16 else TOLERANCE
    assert error <= tolerance  # also false for NaN


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("windows", [(None, None), (None, 12), (1, 64)], ids=str)
def test_mixed_rows(backend: type[AttentionBackend], dtype: torch.dtype, windows: tuple[int | None, ...]) -> None:
    """Prefill chunks and decode rows in one batch, on shuffled frames and partial last blocks, give exact attention."""
    check(backend, scene(geometry(windows=windows), MIXED, dtype=dtype))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 3), (8, 1), (7, 7)])
def test_head_groups(backend: type[AttentionBackend], heads: int, kv_heads: int) -> None:
    """Query heads share KV heads in consecutive groups, from one group per head to one for all."""
    check(backend, scene(geometry(heads=heads, kv_heads=kv_heads), MIXED))


@pytest.mark.parametrize("block_tokens", [1, 16, 32])
def test_block_sizes(backend: type[AttentionBackend], block_tokens: int) -> None:
    """Any number of tokens per block gives the same attention."""
    check(backend, scene(geometry(windows=(None, 12)), MIXED, block_tokens=block_tokens))


@settings(max_examples=25)
@given(
    rows=st.lists(st.tuples(st.integers(0, 40), st.one_of(st.just(1), st.integers(1, 20))), min_size=1, max_size=9),
    window=st.one_of(st.none(), st.integers(1, 50)),
    kv_heads=st.sampled_from([1, 2, 4]),
    block_tokens=st.sampled_from([4, 16]),
    seed=st.integers(0, 1000),
)
@pytest.mark.parametrize("name", NAMES)
def test_any_batch(
    name: str, rows: list[tuple[int, int]], window: int | None, kv_heads: int, block_tokens: int, seed: int
) -> None:
    """Whatever rows come together, each gets exact attention."""
    shape = geometry(layers=1, heads=4, kv_heads=kv_heads, head_dim=8, windows=(window,))
    check(named(name), scene(shape, rows, block_tokens=block_tokens, seed=seed))


@pytest.mark.parametrize("windows", [(None,), (40,), (700,)], ids=str)
def test_long_contexts(backend: type[AttentionBackend], windows: tuple[int | None, ...]) -> None:
    """Contexts longer than a flash kernel's key tile (512) are exact, also where whole tiles are out of the window."""
    shape = geometry(layers=1, heads=2, kv_heads=1, head_dim=8, windows=windows)
    check(backend, scene(shape, [(1300, 40), (1100, 1), (0, 600), (700, 1), (3, 1)], block_tokens=16))


def test_a_row_does_not_depend_on_the_others(backend: type[AttentionBackend]) -> None:
    """A row alone in a batch gives what it gives among others, but for rounding."""
    it = scene(geometry(windows=(None, 12)), MIXED)
    together = attend(backend, it)
    for row in range(it.batch.rows):
        first, last = it.batch.query_starts[row : row + 2]
        alone = AttentionBatch(
            np.array([0, last - first], np.int32),
            it.batch.starts[row : row + 1],
            it.batch.context_lens[row : row + 1],
            it.batch.frames[row : row + 1],
        )
        k, v = it.k[:, first:last], it.v[:, first:last]
        single = attend(backend, Scene(it.geometry, it.arena, alone, it.q[first:last], k, v, it.expected, it.owned))
        torch.testing.assert_close(single, together[:, first:last], rtol=0, atol=TOLERANCE)


def test_only_the_new_tokens_are_written(backend: type[AttentionBackend]) -> None:
    """A step writes its own tokens' K and V, rounded to the arena's dtype, and changes no other byte."""
    it = scene(geometry(), MIXED, dtype=torch.bfloat16)
    before = it.arena.clone()
    attend(backend, it)
    for row in range(it.batch.rows):
        first = it.batch.query_starts[row]
        for index in range(it.batch.starts[row], it.batch.context_lens[row]):
            frame, offset = int(it.batch.frames[row][index // 8]), index % 8
            token = first + index - it.batch.starts[row]
            assert torch.equal(it.arena[frame, :, 0, :, offset], it.k[:, token].bfloat16())
            assert torch.equal(it.arena[frame, :, 1, :, offset], it.v[:, token].bfloat16())
            before[frame, :, :, :, offset] = it.arena[frame, :, :, :, offset]
    assert torch.equal(it.arena.view(torch.int16), before.view(torch.int16))


def test_blocks_outside_the_window_are_not_read(backend: type[AttentionBackend]) -> None:
    """Frames of blocks that lie wholly before a sliding window may be given to others: their bytes do not matter."""
    shape = geometry(windows=(12, 12))
    it = scene(shape, [(64, 1), (80, 5), (40, 1)])
    for row in range(it.batch.rows):
        outside = max(0, int(it.batch.starts[row]) - 12 + 1) // 8
        it.arena[torch.from_numpy(it.batch.frames[row][:outside].astype(np.int64))] = float("nan")
    check(backend, it)


def test_half_precision_queries(backend: type[AttentionBackend]) -> None:
    """The result has the queries' dtype, rounded once: within half a unit in the last place of bf16 (2^-8) of exact."""
    it = scene(geometry(), MIXED, dtype=torch.bfloat16)
    it.q, it.k, it.v = it.q.bfloat16(), it.k.bfloat16(), it.v.bfloat16()
    out = attend(backend, it)
    assert out.dtype == torch.bfloat16
    exact = attend(backend, Scene(it.geometry, it.arena, it.batch, it.q.float(), it.k, it.v, it.expected, it.owned))
    torch.testing.assert_close(out.float(), exact, rtol=2**-8, atol=1e-5)


def test_unequal_strides(backend: type[AttentionBackend]) -> None:
    """Queries, keys and values may be slices of one fused projection."""
    it = scene(geometry(), MIXED)
    fused = torch.cat((it.q.expand(2, -1, -1, -1), it.k, it.v), dim=2)
    attention = backend(it.arena, it.geometry)
    attention.plan(it.batch)
    for layer in range(2):
        out = attention.run(layer, *fused[layer].split((6, 2, 2), dim=1))
        assert (out.double() - it.expected[layer]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("scratch_bytes", [1, 20_000, 100_000])
@pytest.mark.parametrize("group_bytes", [0, 20_000])
def test_bounded_scratch(monkeypatch: pytest.MonkeyPatch, scratch_bytes: int, group_bytes: int) -> None:
    """Cutting a step into groups of rows and of KV heads, as large contexts do, changes nothing but rounding."""
    monkeypatch.setattr(cpu, "SCRATCH_BYTES", scratch_bytes)
    monkeypatch.setattr(cpu, "GROUP_BYTES", group_bytes)
    check(cpu.CpuAttention, scene(geometry(heads=8, kv_heads=4, windows=(None, 12)), MIXED))


def test_every_backend_is_named() -> None:
    """A misspelt backend is answered with the names there are."""
    with pytest.raises(ConfigError, match="there are: cpu, flashinfer, native, reference, sdpa"):
        resolve("attention backend", BACKENDS, "flash")


def test_torchs_backend_stays_on_the_arenas_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `sdpa` computes with is on the arena's device, and rows of masks do not overlap there: no kernel of a GPU
    takes that."""
    masks: list[torch.Tensor] = []
    real = torch.nn.functional.scaled_dot_product_attention

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None, **options: object):
        assert {tensor.device.type for tensor in (q, k, v)} == {"meta"}
        masks.extend([] if mask is None else [mask])
        return real(q, k, v, mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    it = scene(geometry(windows=(None, 12)), [(5, 1), (0, 9), (16, 8), (700, 1), (3, 1)])
    attention = resolve("attention backend", BACKENDS, "sdpa")(it.arena.to("meta"), it.geometry)
    attention.plan(it.batch)
    q, k, v = (tensor.to("meta") for tensor in (it.q, it.k, it.v))
    assert {attention.run(layer, q, k[layer], v[layer]).device.type for layer in range(2)} == {"meta"}
    assert {mask.device.type for mask in masks} == {"meta"}
    assert all(mask.stride(-1) == 1 and mask.stride(-2) in (0, mask.shape[-1]) for mask in masks)
