"""Attention worked out a second time: fp64, one query and head at a time, from histories instead of an arena."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from server.kernels.attention import AttentionBatch
from server.types import ModelGeometry


@dataclass
class Scene:
    """A step's inputs, an arena whose every byte that no row may read is poison, and what attention must give."""

    geometry: ModelGeometry
    arena: Tensor
    batch: AttentionBatch
    q: Tensor  # [tokens, heads, head_dim]
    k: Tensor  # [layers, tokens, kv_heads, head_dim]
    v: Tensor
    expected: Tensor  # fp64 [layers, tokens, heads * head_dim]
    owned: set[int]


def geometry(
    *, layers: int = 2, heads: int = 6, kv_heads: int = 2, head_dim: int = 16, windows: tuple[int | None, ...] = ()
) -> ModelGeometry:
    return ModelGeometry(
        layers=layers,
        hidden=heads * head_dim,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=100,
        max_positions=1 << 20,
        scale=head_dim**-0.5,
        windows=windows or (None,) * layers,
    )


def scene(
    shape: ModelGeometry,
    rows: list[tuple[int, int]],
    *,
    block_tokens: int = 8,
    dtype: torch.dtype = torch.float32,
    spare: int = 5,
    seed: int = 0,
) -> Scene:
    """Rows of (tokens already cached, tokens fed now) on shuffled frames. All else is NaN and infinities."""
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-(start + new) // block_tokens) for start, new in rows]
    order = rng.permutation(sum(counts) + spare).astype(np.int32)
    tables = np.split(order[: sum(counts)], np.cumsum(counts)[:-1])
    poison = torch.tensor([float("nan"), float("inf"), float("-inf")], dtype=dtype)
    size = (len(order), shape.layers, 2, shape.kv_heads, block_tokens, shape.head_dim)
    arena = poison[torch.randint(0, 3, size, generator=generator)]
    queries, news, expected = [], [], []
    for (start, new), table in zip(rows, tables, strict=True):
        cached = (shape.layers, 2, start + new, shape.kv_heads, shape.head_dim)
        history = torch.randn(cached, generator=generator)
        q = torch.randn(new, shape.heads, shape.head_dim, generator=generator)
        _store(arena, table, history[:, :, :start])
        queries.append(q)
        news.append(history[:, :, start:])
        expected.append(_attention(shape, q.double().numpy(), history.to(dtype).double().numpy(), start))
    fresh = torch.cat(news, dim=2)
    starts = np.array([start for start, _ in rows], dtype=np.int32)
    lengths = np.array([new for _, new in rows], dtype=np.int32)
    batch = AttentionBatch(np.concatenate(([0], np.cumsum(lengths))).astype(np.int32), starts, starts + lengths, tables)
    q = torch.cat(queries)
    return Scene(
        shape,
        arena,
        batch,
        q,
        fresh[:, 0],
        fresh[:, 1],
        torch.cat(expected, dim=1),
        {int(f) for f in order[: sum(counts)]},
    )


def _store(arena: Tensor, table: np.ndarray, history: Tensor) -> None:
    """Writes [layers, 2, tokens, kv_heads, head_dim] token by token."""
    block_tokens = arena.shape[4]
    for token in range(history.shape[2]):
        arena[int(table[token // block_tokens]), :, :, :, token % block_tokens] = history[:, :, token].to(arena.dtype)


def _attention(shape: ModelGeometry, q: np.ndarray, history: np.ndarray, start: int) -> Tensor:
    out = np.empty((shape.layers, len(q), shape.heads, shape.head_dim))
    for layer, window in enumerate(shape.windows):
        for index in range(len(q)):
            last = start + index
            first = 0 if window is None else max(0, last - window + 1)
            for head in range(shape.heads):
                kv_head = head // (shape.heads // shape.kv_heads)
                keys, values = history[layer, :, first : last + 1, kv_head]
                scores = keys @ q[index, head] * shape.scale
                weights = np.exp(scores - scores.max())
                out[layer, index, head] = weights / weights.sum() @ values
    return torch.from_numpy(out.reshape(shape.layers, len(q), -1))
