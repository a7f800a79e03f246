"""Attention on a GPU against the independent fp64 computation, over arenas full of poison."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from server.kernels.attention import BACKENDS, AttentionBatch
from server.registry import resolve
from server.runner.device import CudaDevice
from tests.gpu.variants import DEVICE, MIXED, VARIANTS, Variant, able
from tests.numeric.oracle import Scene, geometry, scene

pytestmark = pytest.mark.gpu

SDPA_BOUND = 1e-5
"""fp32 arithmetic throughout, summed in another order than on a CPU."""
DECODE = [(5, 1), (0, 1), (16, 1), (15, 1), (64, 1), (33, 1), (7, 1), (300, 1)]


@pytest.fixture(params=VARIANTS, ids=lambda variant: variant.name)
def variant(request: pytest.FixtureRequest) -> Variant:
    if not able(request.param):
        pytest.skip("needs a device of compute capability 9")
    return request.param


def worst(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest error; NaN where there is one."""
    return (found - expected).abs().max().item()


@pytest.mark.parametrize("windows", [(None, None), (None, 12), (1, 64)], ids=str)
def test_mixed_rows(variant: Variant, windows: tuple[int | None, ...]) -> None:
    """Prefill chunks and decode rows in one batch, on shuffled frames and partial last blocks, give exact attention
    within the bound of their precision."""
    it = variant.scene(MIXED, windows=windows)
    assert worst(variant.attend(it), it.expected) <= variant.bound


def test_larger_blocks_and_long_contexts(variant: Variant) -> None:
    """Blocks of 64 tokens, and contexts so long that they are split between thread blocks, change nothing."""
    it = variant.scene([(3000, 1), (1500, 40), (700, 1), (0, 200)], windows=(None,), block_tokens=64)
    assert worst(variant.attend(it), it.expected) <= variant.bound


def test_blocks_outside_the_window_are_not_read(variant: Variant) -> None:
    """Frames of blocks that lie wholly before a sliding window may hold anything, NaN too."""
    it = variant.scene([(64, 1), (80, 5), (40, 1)], windows=(12, 12))
    for row in range(it.batch.rows):
        outside = max(0, int(it.batch.starts[row]) - 12 + 1) // 16
        for frame in it.batch.frames[row][:outside].tolist():
            it.arena[frame].copy_(torch.full(it.arena[frame].shape, float("nan"), device=DEVICE))
    assert worst(variant.attend(it), it.expected) <= variant.bound


def test_only_the_new_tokens_are_written(variant: Variant) -> None:
    """A step changes the bytes of its own tokens' K and V, and no others."""
    it = variant.scene(MIXED)
    before = it.arena.view(torch.uint8).clone()
    variant.attend(it)
    after = it.arena.view(torch.uint8)
    for row in range(it.batch.rows):
        for index in range(int(it.batch.starts[row]), int(it.batch.context_lens[row])):
            frame, offset = int(it.batch.frames[row][index // 16]), index % 16
            before[frame, :, :, :, offset] = after[frame, :, :, :, offset]
    assert torch.equal(before, after)


def rows_of(it: Scene, rows: Sequence[int]) -> AttentionBatch:
    """Some decode rows of a scene, in any order."""
    starts = it.batch.starts[list(rows)]
    tables = [it.batch.frames[row] for row in rows]
    return AttentionBatch(np.arange(len(rows) + 1, dtype=np.int32), starts, starts + 1, tables)


class Captured:
    """A decode graph of `rows` rows, captured by the daemon's own device over inputs that do not move."""

    def __init__(self, device: CudaDevice, variant: Variant, it: Scene, rows: int) -> None:
        g = it.geometry
        self.it, self.graph = it, variant.backend(it).graph(rows)
        self.q = torch.zeros(rows, g.heads, g.head_dim, device=DEVICE)
        self.k, self.v = (torch.zeros(g.layers, rows, g.kv_heads, g.head_dim, device=DEVICE) for _ in range(2))
        self.out = torch.zeros(g.layers, rows, g.heads * g.head_dim, device=DEVICE)
        self.graph.plan(rows_of(it, [0]))
        self.replay = device.capture(self._work)

    def _work(self) -> None:
        for layer in range(self.it.geometry.layers):
            self.out[layer].copy_(self.graph.run(layer, self.q, self.k[layer], self.v[layer]))

    def step(self, rows: Sequence[int]) -> torch.Tensor:
        count, chosen = len(rows), torch.tensor(rows, device=DEVICE)
        self.q[:count] = self.it.q[chosen]
        self.k[:, :count], self.v[:, :count] = self.it.k[:, chosen], self.it.v[:, chosen]
        self.graph.plan(rows_of(self.it, rows))
        self.replay()
        return self.out[:, :count].double().cpu()


@pytest.mark.parametrize("windows", [(None, None), (None, 12)], ids=str)
def test_graphs_attend_as_planned(variant: Variant, windows: tuple[int | None, ...]) -> None:
    """Captured once, a decode step of 8 rows gives exact attention for any 1 to 8 rows, longer and shorter contexts in
    turn, and its padding touches the last frame alone."""
    device = CudaDevice()
    device.adopt()
    it = variant.scene(DECODE, windows=windows)
    captured = Captured(device, variant, it, 8)
    for rows in ([0, 1, 2, 3, 4, 5, 6, 7], [7], [3, 1], [6, 4, 7, 0, 2], [1]):
        assert worst(captured.step(rows), it.expected[:, rows]) <= variant.bound
    before = it.arena.view(torch.uint8).clone()
    captured.step([3])
    assert torch.equal(it.arena.view(torch.uint8)[:-1], before[:-1])


@pytest.mark.parametrize("name", ["sdpa", "reference"])
@pytest.mark.parametrize("windows", [(None, None), (None, 12)], ids=str)
def test_torchs_own_attention(name: str, windows: tuple[int | None, ...]) -> None:
    """Where FlashInfer cannot serve, torch's attention gives exact results on the device, in fp32."""
    it = scene(geometry(windows=windows), MIXED)
    arena, q, k, v = (tensor.to(DEVICE) for tensor in (it.arena, it.q, it.k, it.v))
    attention = resolve("attention", BACKENDS, name)(arena, it.geometry)
    attention.plan(it.batch)
    found = torch.stack([attention.run(layer, q, k[layer], v[layer]) for layer in range(2)])
    assert worst(found.double().cpu(), it.expected) <= SDPA_BOUND
