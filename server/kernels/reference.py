"""The oracle: paged attention in the plainest torch, one row at a time, fp32 arithmetic, on any device.

Written to be checked by eye, not to be fast: it gathers each row's whole context in each layer and forms the whole
score matrix. Every other backend is tested against it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from server.kernels import int8
from server.kernels.attention import AttentionBatch
from server.types import ModelGeometry


class ReferenceAttention:
    """See `AttentionBackend`. Memory per row: heads * query tokens * context tokens fp32 scores."""

    def __init__(self, arena: Tensor, geometry: ModelGeometry) -> None:
        self.arena = arena
        self.geometry = geometry
        self.block_tokens = arena.shape[4]
        self.values: Tensor = arena
        self.scales: Tensor | None = None
        if arena.dtype == torch.int8:
            self.values, self.scales = int8.planes(arena)
        self.batch: AttentionBatch | None = None

    def plan(self, batch: AttentionBatch) -> None:
        self.batch = batch

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert self.batch is not None, "run() before plan()"
        out = torch.empty_like(q)  # [tokens, heads, head_dim]
        for row in range(self.batch.rows):
            first, last = int(self.batch.query_starts[row]), int(self.batch.query_starts[row + 1])
            start, context = int(self.batch.starts[row]), int(self.batch.context_lens[row])
            frames = torch.from_numpy(np.asarray(self.batch.frames[row], dtype=np.int64)).to(self.arena.device)
            self._write(layer, frames, start, k[first:last], v[first:last])
            keys, values = self._gather(layer, frames, context)
            out[first:last] = self._attend(q[first:last], keys, values, start, self.geometry.windows[layer]).to(q.dtype)
        return out.flatten(1)

    def _write(self, layer: int, frames: Tensor, start: int, k: Tensor, v: Tensor) -> None:
        positions = torch.arange(start, start + k.shape[0], device=k.device)
        frame, offset = frames[positions // self.block_tokens], positions % self.block_tokens
        for plane, x in enumerate((k, v)):
            if self.scales is None:
                self.values[frame, layer, plane, :, offset] = x.to(self.values.dtype)
            else:
                values, scales = int8.quantise(x)
                self.values[frame, layer, plane, :, offset] = values
                self.scales[frame, layer, plane, :, offset] = scales

    def _gather(self, layer: int, frames: Tensor, context: int) -> tuple[Tensor, Tensor]:
        """Keys and values of positions 0..context-1, fp32 [context, kv_heads, head_dim] each."""
        positions = torch.arange(context, device=frames.device)
        frame, offset = frames[positions // self.block_tokens], positions % self.block_tokens
        keys, values = (self.values[frame, layer, plane, :, offset].float() for plane in range(2))
        if self.scales is not None:
            keys *= self.scales[frame, layer, 0, :, offset, None]
            values *= self.scales[frame, layer, 1, :, offset, None]
        return keys, values

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, start: int, window: int | None) -> Tensor:
        group = self.geometry.heads // self.geometry.kv_heads
        query_position = torch.arange(start, start + q.shape[0], device=q.device)[:, None]
        key_position = torch.arange(keys.shape[0], device=q.device)[None, :]
        visible = key_position <= query_position
        if window is not None:
            visible &= key_position > query_position - window
            oldest = max(0, start - window + 1)  # what no query of the row sees may hold anything, NaN too
            keys, values, visible = keys[oldest:], values[oldest:], visible[:, oldest:]
        keys = keys.repeat_interleave(group, dim=1)  # [context, heads, head_dim]
        values = values.repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q.float(), keys) * self.geometry.scale
        weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
        return torch.einsum("hqk,khd->qhd", weights, values)
