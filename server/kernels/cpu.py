"""Paged attention for a CPU in plain torch: one gather into a reused scratch buffer, then torch's flash kernel.

What decides the speed at the sizes of a CPU server is dispatch (a torch call costs 3-10 us, a step makes hundreds) and
the bytes of KV moved. So `plan` works out, once for all layers, which rows are computed together and where their blocks
lie; `run` makes about six torch calls per group of rows. Decode rows of like length share a group, the query heads of
one KV head are treated as a query of that length (so KV heads are never repeated), and each prefill chunk is a group of
its own. Sliding-window layers gather the blocks inside the window only. README.md has the measurements and the roads
not taken.

Arithmetic is fp32 whatever the arena's dtype: half-precision matrix products are many times slower than fp32 on CPUs
without hardware for them, and the conversion rides on a copy that is made anyway.

All that holds on a GPU, too, where this stands in for FlashInfer: right, but not fast. Masks are laid out anew on their
way there, because torch's kernels for GPUs take none whose rows overlap.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from server.kernels.attention import AttentionBatch
from server.types import ModelGeometry

GROUP_BYTES = 512 * 1024
"""What one more group of decode rows costs, in bytes of KV that could be read meanwhile: ~40 us at ~12 GB/s. Rows are
padded to the longest of their group until the padding costs more than that."""
SCRATCH_BYTES = 64 * 1024 * 1024
"""Scratch aimed at; a group above it is cut by rows, then by KV heads. One head of one row may still be larger."""

Index = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Row:
    """One row as one kind of layer sees it: the blocks to gather and the visible keys among their tokens."""

    first: int
    last: int  # tokens first:last of the batch
    frames: Index  # [blocks]
    start: int  # position of the first query token, counted from the first gathered token
    context: int  # tokens up to the end of the row, counted likewise; what lies behind is garbage
    oldest: int  # first token that the row's first query sees, counted likewise


@dataclass(frozen=True, slots=True)
class _Decode:
    """Rows of one query token each, and the KV heads `heads` of them. K and V are [rows, heads, keys, head_dim]."""

    tokens: slice | Tensor
    heads: slice
    gather: Tensor  # int64 [2 * rows * heads * blocks]: (block, head) places of K, then of V
    shape: tuple[int, ...]  # (2, rows, heads, blocks * block_tokens, head_dim)
    keys: slice
    bias: Tensor | None  # fp32 [rows, 1, 1, keys], 0 or -inf; None where all rows see all of `keys`
    stale: Tensor | None  # int64: places in the gathered tokens that are garbage and might be NaN


@dataclass(frozen=True, slots=True)
class _Chunk:
    """One row of many query tokens, and the KV heads `heads` of it. K and V are [heads, keys, head_dim]."""

    tokens: slice
    heads: slice
    gather: Tensor
    shape: tuple[int, ...]  # (2, heads, blocks * block_tokens, head_dim)
    keys: slice
    bias: Tensor | None
    """fp32 [queries, keys] for the queries in *reverse* order, as a strided view of a short vector; None: plain causal.

    Which keys a query sees depends on key - query only. With the queries reversed that is a sum, and a matrix whose
    entries depend on the sum of its indices is a vector seen with strides (1, 1): no [queries, keys] memory at all.
    """


class CpuAttention:
    """See `AttentionBackend`. On the arena's device; results are those of fp32 arithmetic on the arena's values."""

    def __init__(self, arena: Tensor, geometry: ModelGeometry) -> None:
        _, layers, _, kv_heads, block_tokens, head_dim = arena.shape
        assert arena.is_contiguous(), "the arena must be one contiguous, block-major tensor"
        assert arena.dtype.is_floating_point, f"the cpu backend cannot read {arena.dtype}"
        assert (layers, kv_heads, head_dim) == (geometry.layers, geometry.kv_heads, geometry.head_dim), "other model"
        self._geometry, self._device = geometry, arena.device
        self._group = geometry.heads // kv_heads
        self._block_tokens = block_tokens
        self._plane_rows = 2 * kv_heads  # (block, head) places of one layer in one frame
        # The layer's places start at an offset, so that the same indices serve all layers.
        places = arena.view(-1, block_tokens * head_dim)
        self._places = [places[layer * self._plane_rows :] for layer in range(layers)]
        vectors = arena.view(-1, head_dim)
        self._vectors = [vectors[layer * self._plane_rows * block_tokens :] for layer in range(layers)]
        self._scratch = torch.empty(0, dtype=arena.dtype, device=arena.device)
        self._scratch_fp32 = torch.empty(0, device=arena.device)
        self._kv_bytes = 2 * block_tokens * head_dim * 4  # of one block and KV head
        self._store = torch.empty(0, dtype=torch.int64, device=arena.device)
        self._parts: dict[int | None, list[_Decode | _Chunk]] = {}

    def plan(self, batch: AttentionBatch) -> None:
        self._store = self._store_index(batch)
        self._parts = {window: list(self._divide(batch, window)) for window in set(self._geometry.windows)}

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        g = self._geometry
        vectors = self._vectors[layer]
        new = torch.cat((k, v), dim=1).view(-1, g.head_dim)  # [tokens * 2 * kv_heads, head_dim]
        vectors.index_copy_(0, self._store, new if new.dtype == vectors.dtype else new.to(vectors.dtype))
        queries = q.to(torch.float32).unflatten(1, (g.kv_heads, self._group))
        out = torch.empty(queries.shape, dtype=q.dtype, device=q.device)  # [tokens, kv_heads, group, head_dim]
        for part in self._parts[g.windows[layer]]:
            kv = self._gather(layer, part)
            if isinstance(part, _Decode):
                self._decode(part, queries, kv, out)
            else:
                self._chunk(part, queries, kv, out)
        return out.view(-1, g.heads * g.head_dim)

    # -- once a layer ------------------------------------------------------------------------------------------------

    def _gather(self, layer: int, part: _Decode | _Chunk) -> Tensor:
        """K and V of a part, fp32 `part.shape`, in scratch memory that the next gather overwrites."""
        places = self._places[layer]
        size = len(part.gather) * places.shape[1]
        if self._scratch.numel() < size:
            self._scratch = torch.empty(size, dtype=places.dtype, device=self._device)
        gathered = self._scratch[:size]
        torch.index_select(places, 0, part.gather, out=gathered.view(-1, places.shape[1]))
        if places.dtype != torch.float32:
            if self._scratch_fp32.numel() < size:
                self._scratch_fp32 = torch.empty(size, device=self._device)
            gathered = self._scratch_fp32[:size].copy_(gathered)
        return gathered.view(part.shape)

    def _decode(self, part: _Decode, queries: Tensor, kv: Tensor, out: Tensor) -> None:
        if part.stale is not None:
            kv.view(-1, kv.shape[-1]).index_fill_(0, part.stale, 0.0)
        keys, values = kv[:, :, :, part.keys]
        q = queries[part.tokens][:, part.heads]
        attended = F.scaled_dot_product_attention(q, keys, values, part.bias, scale=self._geometry.scale)
        out[part.tokens, part.heads] = attended.to(out.dtype)

    def _chunk(self, part: _Chunk, queries: Tensor, kv: Tensor, out: Tensor) -> None:
        q = queries[part.tokens, part.heads].permute(1, 2, 0, 3)  # [heads, group, queries, head_dim]
        keys, values = kv[:, :, None, part.keys].expand(-1, -1, self._group, -1, -1)
        scale = self._geometry.scale
        if part.bias is None:
            attended = F.scaled_dot_product_attention(q, keys, values, is_causal=True, scale=scale)
        else:
            bias = part.bias.expand(*q.shape[:2], -1, -1)
            attended = F.scaled_dot_product_attention(q.flip(2), keys, values, bias, scale=scale).flip(2)
        out[part.tokens, part.heads] = attended.permute(2, 0, 1, 3).to(out.dtype)

    # -- once a step -------------------------------------------------------------------------------------------------

    def _store_index(self, batch: AttentionBatch) -> Tensor:
        """Places of the step's K and V vectors in layer 0, int64 [tokens * 2 * kv_heads], K heads before V heads."""
        frames, offsets = batch.places(self._block_tokens)
        first = frames.astype(np.int64) * (self._geometry.layers * self._plane_rows)
        places = first[:, None] + np.arange(self._plane_rows)
        return self._sent((places * self._block_tokens + offsets[:, None]).ravel())

    def _divide(self, batch: AttentionBatch, window: int | None) -> Iterator[_Decode | _Chunk]:
        rows = [self._row(batch, row, window) for row in range(batch.rows)]
        for row in rows:
            if row.last - row.first > 1:
                yield from self._chunk_parts(row, window)
        for group in self._groups([row for row in rows if row.last - row.first == 1]):
            yield from self._decode_parts(group)

    def _row(self, batch: AttentionBatch, row: int, window: int | None) -> _Row:
        start, context = int(batch.starts[row]), int(batch.context_lens[row])
        oldest = 0 if window is None else max(0, start - window + 1)
        skipped = oldest // self._block_tokens
        origin = skipped * self._block_tokens
        return _Row(
            first=int(batch.query_starts[row]),
            last=int(batch.query_starts[row + 1]),
            frames=batch.frames[row][skipped : -(-context // self._block_tokens)].astype(np.int64),
            start=start - origin,
            context=context - origin,
            oldest=oldest - origin,
        )

    def _groups(self, rows: Sequence[_Row]) -> Iterator[Sequence[_Row]]:
        """Decode rows that are computed together: of like length, and within the scratch memory."""
        row_bytes = self._kv_bytes * self._geometry.kv_heads
        longest = max((len(row.frames) for row in rows), default=0)
        alike = sum(longest - len(row.frames) for row in rows) * row_bytes <= GROUP_BYTES
        if not alike:  # else the order of the batch is kept, so that its queries need not be permuted
            rows = sorted(rows, key=lambda row: -len(row.frames))
        group: list[_Row] = []
        padding = 0
        for row in rows:
            padding += (longest - len(row.frames)) * row_bytes
            if group and (padding > GROUP_BYTES or (len(group) + 1) * longest * row_bytes > SCRATCH_BYTES):
                yield group
                group, padding = [], 0
            if not group and not alike:
                longest = len(row.frames)
            group.append(row)
        if group:
            yield group

    def _head_slices(self, rows: int, blocks: int) -> Iterator[slice]:
        heads = self._geometry.kv_heads
        step = min(heads, max(1, SCRATCH_BYTES // (rows * blocks * self._kv_bytes)))
        for first in range(0, heads, step):
            yield slice(first, min(first + step, heads))

    def _gather_index(self, table: Index, heads: slice) -> Tensor:
        """Places of the blocks `table` [rows, blocks] in layer 0, int64, ordered [K|V, row, head, block]."""
        first = table * (self._geometry.layers * self._plane_rows)
        head = np.arange(heads.start, heads.stop)[:, None]
        keys = first[:, None, :] + head
        return self._sent(np.stack((keys, keys + self._geometry.kv_heads)).ravel())

    def _sent(self, index: Index) -> Tensor:
        return torch.from_numpy(index).to(self._device)

    def _mask(self, bias: Tensor) -> Tensor:
        """As it is on a CPU; dense elsewhere."""
        return bias.to(self._device, memory_format=torch.contiguous_format)

    def _chunk_parts(self, row: _Row, window: int | None) -> Iterator[_Chunk]:
        table = row.frames[None, :]
        blocks, queries = table.shape[1], row.last - row.first
        whole = row.start == 0 and (window is None or window >= row.context)  # nothing before it, nothing out of sight
        bias = None if whole else self._mask(_reversed_bias(queries, row.context, window))
        for heads in self._head_slices(1, blocks):
            shape = (2, heads.stop - heads.start, blocks * self._block_tokens, self._geometry.head_dim)
            index = self._gather_index(table, heads)
            yield _Chunk(slice(row.first, row.last), heads, index, shape, slice(0, row.context), bias)

    def _decode_parts(self, rows: Sequence[_Row]) -> Iterator[_Decode]:
        blocks = max(len(row.frames) for row in rows)
        table = np.empty((len(rows), blocks), dtype=np.int64)
        for place, row in enumerate(rows):
            table[place, : len(row.frames)] = row.frames
            table[place, len(row.frames) :] = row.frames[0]  # any block: masked below
        oldest = np.array([row.oldest for row in rows])
        context = np.array([row.context for row in rows])
        keys = slice(int(oldest.min()), int(context.max()))
        bias = stale = None
        alike = (oldest == oldest[0]).all() and (context == context[0]).all()
        if not alike:
            token = np.arange(blocks * self._block_tokens)
            hidden = (token < oldest[:, None]) | (token >= context[:, None])
            bias = torch.from_numpy(np.where(hidden, np.float32("-inf"), np.float32(0)))
            bias = self._mask(bias[:, None, None, keys])
        for heads in self._head_slices(len(rows), blocks):
            width = heads.stop - heads.start
            shape = (2, len(rows), width, blocks * self._block_tokens, self._geometry.head_dim)
            if not alike:
                garbage = np.broadcast_to((token >= context[:, None])[None, :, None, :], shape[:-1])
                stale = self._sent(np.flatnonzero(garbage))
            yield _Decode(self._tokens(rows), heads, self._gather_index(table, heads), shape, keys, bias, stale)

    def _tokens(self, rows: Sequence[_Row]) -> slice | Tensor:
        first = rows[0].first
        if all(row.first == first + place for place, row in enumerate(rows)):
            return slice(first, first + len(rows))
        return self._sent(np.array([row.first for row in rows]))


def _reversed_bias(queries: int, keys: int, window: int | None) -> Tensor:
    """See `_Chunk.bias`: the last query (entry 0) sees keys up to the last one, and `window` of them."""
    by_sum = torch.zeros(queries + keys - 1)
    by_sum[keys:] = float("-inf")
    if window is not None and window < keys:
        by_sum[: keys - window] = float("-inf")
    return by_sum.as_strided((queries, keys), (1, 1))
