"""Paged attention on a GPU by FlashInfer, and its kernels for a decoder's small steps: the one file that imports it.

Knows FlashInfer's calls, and when memory that the GPU copies from may be written again; refuses to know requests,
blocks and models. FlashInfer is an optional extra and is imported when a backend is built, not before: `obstacle` says
beforehand why it cannot serve.

An arena is FlashInfer's layout "HND" but for the strides: K of layer l is `arena[:, l, 0]`, whose pages lie a whole
block apart. Decode rows (one query) take the decode kernel, prefill chunks the prefill kernel. There is a plan for each
window length, over a table that begins with the oldest visible block: attention depends on distances alone, and a block
that is not in the table cannot be read, whatever it holds.

GPU memory beside the arena: `workspace_bytes` (128 MiB for Llama-3-8B), 16 MiB for what is sent, 16 MiB for each window
length, and for decode graphs, all of them together, 5 MiB and `max_rows` block tables for each window length (8 MiB at
256 rows of 128k tokens). Pinned memory: 16 MiB, as much for each window length, and 1 MiB of each for each graph.

**Plans of decode graphs go ahead.** A plan is a dozen small arrays. They are copied together, in a stream of their own,
while the step before computes, and one kernel then puts them where the graph reads (`uploads.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from server.kernels.attention import AttentionBatch
from server.kernels.uploads import SLOTS, Uploads
from server.types import ModelGeometry

PrefillKernel = Literal["auto", "fa2", "fa3"]
DecodeKernel = Literal["auto", "tensor-cores", "cuda-cores"]

LAYOUT = "HND"
HEAD_DIMS = (64, 128, 256)
"""Those that its kernels for storing and for attending are both made for."""
KV_DTYPES = (torch.bfloat16, torch.float16, torch.float8_e4m3fn)
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
TENSOR_CORE_GROUP = 4
"""Query heads per KV head from which a decode row fills enough of a tensor core's tile to gain by it."""
MAX_ROWS = 256
MIN_WORKSPACE_BYTES = 128 * 2**20
GRAPH_SCRATCH_BYTES = 2**20
"""Of a decode graph's plan: ~13 bytes for each tile and 8 for each row. FlashInfer raises where it does not suffice."""
MOST_CTAS = 2 * 160
"""A split step starts at most two thread blocks on each multiprocessor, and no GPU has more of those."""
PREFILL_TILE = 128
"""Queries, times the query heads of a KV head, that one thread block takes at most."""

Window = int | None
Ints = npt.NDArray[np.int32]


def load() -> Any:
    """The flashinfer module. Raises ImportError where there is none; OSError or RuntimeError where it is broken."""
    import flashinfer

    return flashinfer


def obstacle(geometry: ModelGeometry, kv_dtype: torch.dtype) -> str | None:
    """Why FlashInfer cannot attend over an arena of this model, for the operator to read; None where it can."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if kv_dtype not in KV_DTYPES:
        return f"it has no kernel for KV of {str(kv_dtype).removeprefix('torch.')}"
    if geometry.head_dim not in HEAD_DIMS:
        return f"it has no kernel for head_dim {geometry.head_dim}"
    try:
        load()
    except (ImportError, OSError, RuntimeError) as error:
        return f"flashinfer cannot be imported: {error}"
    return None


def workspace_bytes(geometry: ModelGeometry, max_rows: int) -> int:
    """Room for the partial results of contexts that are split between thread blocks: a vector and its weight, fp32, for
    each query of a tile. Prefill splits only what then still runs at once; a decode graph has tiles for every row."""
    group = geometry.heads // geometry.kv_heads
    prefill = group * MOST_CTAS * PREFILL_TILE
    decode = geometry.heads * max_rows * (group + (16 if group <= 16 else 64))
    return max(MIN_WORKSPACE_BYTES, max(prefill, decode) * (geometry.head_dim + 1) * 4)


class Host:
    """What goes up for a plan, and when it has. Device thread; the current stream computes.

    FlashInfer copies plans from pinned memory of its own, which the next plan overwrites, so that one waits for it.
    """

    def __init__(self, device: torch.device) -> None:
        self._uploads = Uploads(device)
        self._copied = torch.cuda.Event()

    @property
    def slot(self) -> int:
        """Which of SLOTS copies of a memory this plan may write to: a plan is written while two others are read."""
        return self._uploads.slot

    def turn(self) -> None:
        """Another plan begins, see `Uploads`."""
        self._uploads.turn()

    def send(self, *arrays: Ints) -> list[Tensor]:
        """On the GPU, until SLOTS more plans have begun."""
        return self._uploads.send(arrays)

    def pinned(self, array: Ints) -> Tensor:
        """A copy that goes to the GPU without a wait. Torch gives the memory to nobody before the GPU has read it."""
        return torch.from_numpy(array).pin_memory()

    @contextmanager
    def planning(self) -> Iterator[None]:
        """Plans within are copied in the current stream, to memory that the step before may read: they lie behind it,
        and what the next plan waits for is at most that step."""
        self._copied.synchronize()
        try:
            yield
        finally:
            self._copied.record()

    @contextmanager
    def ahead(self) -> Iterator[None]:
        """Plans within are copied while the step before computes, to memory that nobody reads. The current stream finds
        them there afterwards."""
        self._copied.synchronize()
        try:
            with self._uploads.ahead:
                yield
        finally:
            self._copied.record(self._uploads.stream)
            self._uploads.arrive()


@dataclass(frozen=True, slots=True)
class _Table:
    """Blocks of some rows as one kind of layer sees them; all int32."""

    indptr: Ints  # [rows + 1]: row r has indices[indptr[r] : indptr[r + 1]]
    last_page_len: Ints  # [rows]: tokens in a row's last block
    indices: Ints

    @classmethod
    def of(cls, batch: AttentionBatch, rows: npt.NDArray[np.intp], window: Window, block_tokens: int) -> _Table:
        contexts = batch.context_lens[rows]
        blocks = -(-contexts // block_tokens)
        frames, ends = [batch.frames[row] for row in rows.tolist()], blocks.tolist()
        if window is None:
            skipped, seen = np.zeros_like(blocks), [table[:end] for table, end in zip(frames, ends, strict=True)]
        else:
            skipped = np.maximum(batch.starts[rows] - window + 1, 0) // block_tokens
            bounds = zip(frames, skipped.tolist(), ends, strict=True)
            seen = [table[first:end] for table, first, end in bounds]
        indices = np.concatenate(seen)
        return cls(_indptr(blocks - skipped), contexts - (blocks - 1) * block_tokens, indices)

    def padded(self, rows: int, frame: int) -> _Table:
        """With `rows` more rows of one token each, in `frame`."""
        return _Table(
            np.concatenate((self.indptr, self.indptr[-1] + np.arange(1, rows + 1, dtype=np.int32))),
            np.concatenate((self.last_page_len, np.ones(rows, np.int32))),
            np.concatenate((self.indices, np.full(rows, frame, np.int32))),
        )


@dataclass(frozen=True, slots=True)
class _Places:
    """Where a step's tokens are stored, on the device, int32. To FlashInfer each token is a row of its own that has one
    page: that serves rows in any order, and all layers."""

    frames: Tensor  # [tokens]
    offsets: Tensor  # [tokens]
    lengths: Tensor  # [tokens], offsets + 1: tokens in that page
    counting: Tensor  # [tokens + 1]: 0, 1, 2, ...


@dataclass(frozen=True, slots=True)
class _Fixed:
    """What decode graphs read for the layers of one window length: memory that never moves, int32. Plans are written to
    `staging`, and copied from there by the GPU when the step before is over."""

    indptr: Tensor  # [max_rows + 1]
    last_page_len: Tensor  # [max_rows]
    indices: Tensor  # [max_rows * most blocks of a row]
    scratch: Tensor  # [GRAPH_SCRATCH_BYTES / 4]
    staging: Tensor  # [SLOTS, GRAPH_SCRATCH_BYTES / 4]


class _Paged:
    """The arena as FlashInfer takes it, and what all plans over it share."""

    def __init__(
        self, arena: Tensor, geometry: ModelGeometry, query_dtype: torch.dtype | None, max_rows: int, library: Any,
        host: Host,
    ) -> None:  # fmt: skip
        frames, layers, _, kv_heads, self.block_tokens, head_dim = arena.shape
        assert arena.is_contiguous(), "the arena must be one contiguous, block-major tensor"
        assert (layers, kv_heads, head_dim) == (geometry.layers, geometry.kv_heads, geometry.head_dim), "other model"
        self.geometry, self.flashinfer, self.host, self.device = geometry, library, host, arena.device
        self.max_rows, self.spare_frame = max_rows, frames - 1
        self.most_blocks = min(-(-geometry.max_positions // self.block_tokens), frames)
        self.kv_dtype, self.fp8 = arena.dtype, arena.dtype == torch.float8_e4m3fn
        self.query_dtype = query_dtype or (torch.bfloat16 if self.fp8 else arena.dtype)
        self.layers = [(arena[:, layer, 0], arena[:, layer, 1]) for layer in range(layers)]
        self.windows = tuple(dict.fromkeys(geometry.windows))
        # FlashInfer asks that it be zero at first. All runs share it: they follow each other in one stream.
        self.workspace = self.zeros(workspace_bytes(geometry, max_rows), torch.uint8)
        self._stored = self._to_fp8 if self.fp8 else self._to_kv_dtype

    @cached_property
    def fixed(self) -> dict[Window, _Fixed]:
        """Shared by all decode graphs: steps are planned and replayed one after the other, in one stream."""
        return {
            window: _Fixed(
                indptr=self.zeros(self.max_rows + 1),
                last_page_len=self.zeros(self.max_rows),
                indices=self.zeros(self.max_rows * self.most_blocks),
                scratch=self.zeros(GRAPH_SCRATCH_BYTES // 4),
                staging=self.zeros(SLOTS * GRAPH_SCRATCH_BYTES // 4).view(SLOTS, -1),
            )
            for window in self.windows
        }

    def places(self, batch: AttentionBatch) -> _Places:
        frames, offsets = batch.places(self.block_tokens)
        sent_frames, sent_offsets, lengths = self.host.send(frames, offsets, offsets + 1)
        return _Places(sent_frames, sent_offsets, lengths, self.count(batch.tokens + 1))

    def count(self, size: int) -> Tensor:
        return torch.arange(size, dtype=torch.int32, device=self.device)

    def zeros(self, size: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=self.device)

    def shape(self, window: Window) -> dict[str, Any]:
        """What the plans of both kernels name."""
        return {
            "num_qo_heads": self.geometry.heads,
            "num_kv_heads": self.geometry.kv_heads,
            "page_size": self.block_tokens,
            "window_left": -1 if window is None else window - 1,  # how many keys before the query's own are seen
            "q_data_type": self.query_dtype,
            "kv_data_type": self.kv_dtype,
            "sm_scale": self.geometry.scale,
        }

    def store(self, layer: int, k: Tensor, v: Tensor, places: _Places) -> None:
        self.flashinfer.append_paged_kv_cache(
            append_key=self._stored(k),
            append_value=self._stored(v),
            batch_indices=places.counting[:-1],
            positions=places.offsets,
            paged_kv_cache=self.layers[layer],
            kv_indices=places.frames,
            kv_indptr=places.counting,
            kv_last_page_len=places.lengths,
            kv_layout=LAYOUT,
        )

    def _to_kv_dtype(self, x: Tensor) -> Tensor:
        return x.to(self.kv_dtype)

    def _to_fp8(self, x: Tensor) -> Tensor:
        """Scale 1. Larger values become the largest one; not every torch's conversion does that by itself."""
        return x.clamp(-FP8_MAX, FP8_MAX).to(self.kv_dtype)


class FlashInferAttention:
    """See `AttentionBackend`. The arena is bfloat16, float16 or float8_e4m3fn (scale 1), on a GPU.

    Plans, runs and replays belong to one stream. `query_dtype`: of q, by default the arena's, of an fp8 one bfloat16.
    `max_rows`: of decode graphs. `prefill`, `decode`: kernels, to be compared; "auto" is FlashInfer's choice for
    prefill (FA3 on Hopper, else FA2), and for decode tensor cores where a KV head has 4 query heads or is fp8.
    `library` and `host` stand for FlashInfer and CUDA.
    """

    def __init__(
        self,
        arena: Tensor,
        geometry: ModelGeometry,
        *,
        query_dtype: torch.dtype | None = None,
        max_rows: int = MAX_ROWS,
        prefill: PrefillKernel = "auto",
        decode: DecodeKernel = "auto",
        library: Any = None,
        host: Host | None = None,
    ) -> None:
        library = library or load()
        host = host or Host(arena.device)
        self._paged = paged = _Paged(arena, geometry, query_dtype, max_rows, library, host)
        group = geometry.heads // geometry.kv_heads
        by_rule = paged.fp8 or group >= TENSOR_CORE_GROUP
        self._tensor_cores = by_rule if decode == "auto" else decode == "tensor-cores"
        self._decode = {
            window: library.BatchDecodeWithPagedKVCacheWrapper(
                paged.workspace, kv_layout=LAYOUT, use_tensor_cores=self._tensor_cores
            )
            for window in paged.windows
        }
        self._prefill = {
            window: library.BatchPrefillWithPagedKVCacheWrapper(paged.workspace, kv_layout=LAYOUT, backend=prefill)
            for window in paged.windows
        }
        self._places: _Places | None = None
        self._parts: list[tuple[slice, dict[Window, Any]]] = []
        self._order: tuple[Tensor, Tensor] | None = None

    def graph(self, rows: int) -> GraphAttention:
        """A backend for decode steps of `rows` rows, to be captured and replayed. The arena must have one frame more
        than there are to be had: nobody's last one, into which padding is written. Run something before capturing:
        what FlashInfer compiles or allocates when it is first called must not be part of a graph."""
        return GraphAttention(self._paged, rows, tensor_cores=self._tensor_cores)

    def plan(self, batch: AttentionBatch) -> None:
        lengths = np.diff(batch.query_starts)
        order = np.argsort(lengths != 1, kind="stable")  # decode rows first
        singles = int(np.count_nonzero(lengths == 1))
        self._parts = []
        self._paged.host.turn()
        with self._paged.host.planning():
            self._places = self._paged.places(batch)
            self._order = self._permutation(batch, order)
            if singles:
                self._plan_decode(batch, order[:singles])
                self._parts.append((slice(0, singles), self._decode))
            if singles < batch.rows:
                self._plan_prefill(batch, order[singles:])
                self._parts.append((slice(singles, batch.tokens), self._prefill))

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        paged = self._paged
        assert self._places is not None, "run() before plan()"
        paged.store(layer, k, v, self._places)
        queries = q.to(paged.query_dtype)
        if self._order is not None:
            queries = queries.index_select(0, self._order[0])
        out = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
        for tokens, wrappers in self._parts:
            wrapper = wrappers[paged.geometry.windows[layer]]
            wrapper.run(queries[tokens], paged.layers[layer], out=out[tokens])
        if self._order is not None:
            out = out.index_select(0, self._order[1])
        return out.flatten(1).to(q.dtype)

    def _permutation(self, batch: AttentionBatch, order: npt.NDArray[np.intp]) -> tuple[Tensor, Tensor] | None:
        """Which tokens come in which place when rows are in `order`, int32 [tokens], and the way back. None where they
        are so already."""
        if (np.diff(order) == 1).all():
            return None
        bounds = batch.query_starts.tolist()
        tokens = np.concatenate([np.arange(bounds[row], bounds[row + 1], dtype=np.int32) for row in order.tolist()])
        back = np.empty_like(tokens)
        back[tokens] = np.arange(len(tokens), dtype=np.int32)
        there, again = self._paged.host.send(tokens, back)
        return there, again

    def _plan_decode(self, batch: AttentionBatch, rows: npt.NDArray[np.intp]) -> None:
        paged = self._paged
        for window, wrapper in self._decode.items():
            table = _Table.of(batch, rows, window, paged.block_tokens)
            wrapper.plan(
                indptr=paged.host.pinned(table.indptr),
                indices=paged.host.send(table.indices)[0],
                last_page_len=paged.host.pinned(table.last_page_len),
                head_dim=paged.geometry.head_dim,
                **paged.shape(window),
            )

    def _plan_prefill(self, batch: AttentionBatch, rows: npt.NDArray[np.intp]) -> None:
        paged = self._paged
        queries = paged.host.pinned(_indptr(np.diff(batch.query_starts)[rows]))
        for window, wrapper in self._prefill.items():
            table = _Table.of(batch, rows, window, paged.block_tokens)
            wrapper.plan(
                qo_indptr=queries,
                paged_kv_indptr=paged.host.pinned(table.indptr),
                paged_kv_indices=paged.host.send(table.indices)[0],
                paged_kv_last_page_len=paged.host.pinned(table.last_page_len),
                head_dim_qk=paged.geometry.head_dim,
                causal=True,
                **paged.shape(window),
            )


class GraphAttention:
    """An `AttentionBackend` for decode steps of at most `rows` rows, padded to `rows`, over memory that never moves.

    `run` takes `rows` tokens and may be captured; a replay then attends as the last `plan` says. Each replay follows a
    plan of its own, since graphs share their memory. Padding rows write to the arena's last frame, which is nobody's,
    and see that token alone.
    """

    def __init__(self, paged: _Paged, rows: int, *, tensor_cores: bool) -> None:
        assert 1 <= rows <= paged.max_rows, f"a decode graph of {rows} rows, planned for at most {paged.max_rows}"
        self._paged, self._rows = paged, rows
        self._places = _Places(paged.zeros(rows), paged.zeros(rows), paged.zeros(rows), paged.count(rows + 1))
        self._wrappers = {window: self._wrapper(paged.fixed[window], tensor_cores) for window in paged.windows}
        self._layouts: dict[Window, list[int]] = {}
        none = _Table(np.zeros(1, np.int32), np.empty(0, np.int32), np.empty(0, np.int32))
        table = none.padded(rows, paged.spare_frame)
        paged.host.turn()
        with paged.host.planning():
            for window, wrapper in self._wrappers.items():
                # The first plan loads the kernels. It takes 2 us for each row to find the longest, later ones do not.
                wrapper.plan(
                    indptr=paged.host.pinned(table.indptr),
                    indices=paged.host.send(table.indices)[0],
                    last_page_len=paged.host.pinned(table.last_page_len),
                    **self._shape(window),
                )
                self._layouts[window] = list(wrapper._plan_info)

    def plan(self, batch: AttentionBatch) -> None:
        paged, spare = self._paged, self._rows - batch.rows
        assert 0 <= spare < self._rows, f"{batch.rows} rows in a decode graph of {self._rows}"
        assert batch.tokens == batch.rows, "a decode graph takes rows of one token"
        paged.host.turn()
        frames, offsets = batch.places(paged.block_tokens)
        frames = np.concatenate((frames, np.full(spare, paged.spare_frame, np.int32)))
        offsets = np.concatenate((offsets, np.zeros(spare, np.int32)))
        arrays, rows = [frames, offsets, offsets + 1], np.arange(batch.rows)
        places = self._places
        targets, staged = [places.frames, places.offsets, places.lengths], []
        with paged.host.ahead():
            for window, wrapper in self._wrappers.items():
                table, fixed = _Table.of(batch, rows, window, paged.block_tokens), paged.fixed[window]
                table = table.padded(spare, paged.spare_frame)
                staged.append(self._replan(window, wrapper, table))
                arrays += [table.indptr, table.last_page_len, table.indices]
                targets += [fixed.indptr[: self._rows + 1], fixed.last_page_len[: self._rows],
                            fixed.indices[: len(table.indices)]]  # fmt: skip
        # One kernel for all, when the step before is over and nobody reads the memory of graphs.
        torch._foreach_copy_(
            targets + [paged.fixed[window].scratch for window in self._wrappers], paged.host.send(*arrays) + staged
        )

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        paged = self._paged
        paged.store(layer, k, v, self._places)
        wrapper = self._wrappers[paged.geometry.windows[layer]]
        return wrapper.run(q.to(paged.query_dtype), paged.layers[layer]).flatten(1).to(q.dtype)

    def _wrapper(self, fixed: _Fixed, tensor_cores: bool) -> Any:
        wrapper = self._paged.flashinfer.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(
            self._paged.workspace,
            indptr_buffer=fixed.indptr[: self._rows + 1],
            indices_buffer=fixed.indices,
            last_page_len_buffer=fixed.last_page_len[: self._rows],
            kv_layout=LAYOUT,
            use_tensor_cores=tensor_cores,
        )
        wrapper.reset_workspace_buffer(self._paged.workspace, _bytes(fixed.scratch))  # instead of 8 MiB for each graph
        return wrapper

    def _replan(self, window: Window, wrapper: Any, table: _Table) -> Tensor:
        """Have a step planned. Returns where on the GPU its plan is copied to."""
        paged, fixed = self._paged, self._paged.fixed[window]
        staging = fixed.staging[paged.host.slot]
        indptr = torch.from_numpy(table.indptr)
        wrapper._int_workspace_buffer = _bytes(staging)  # a plan is copied there
        paged.flashinfer.fast_decode_plan(
            wrapper,
            indptr=indptr,
            indices=fixed.indices[: len(table.indices)],
            last_page_len=torch.from_numpy(table.last_page_len),
            global_override_indptr_cpu=indptr,
            **self._shape(window),
        )
        wrapper._int_workspace_buffer = _bytes(fixed.scratch)  # what is captured reads this
        same = list(wrapper._plan_info) == self._layouts[window]
        assert same, "FlashInfer laid out this step otherwise than the captured one: a replay would read amiss"
        return staging

    def _shape(self, window: Window) -> dict[str, Any]:
        return {"head_dim": self._paged.geometry.head_dim, **self._paged.shape(window)}


class Operations:
    """A decoder's small steps, one kernel each, on bfloat16 or float16. `library` stands for FlashInfer."""

    def __init__(self, library: Any = None) -> None:
        self._library = library or load()

    def rms_norm(self, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        """x [rows, size] -> the same, normed."""
        return self._library.rmsnorm(x, gain, eps=eps)

    def rms_norm_heads_(self, x: Tensor, gain: Tensor, eps: float) -> None:
        """In place over the last axis of x [tokens, heads, head_dim], of any strides but 1 in head_dim."""
        self._library.rmsnorm(x, gain, eps=eps, out=x)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """[rows, 2 * inner] -> silu(first half) * second half."""
        return self._library.silu_and_mul(gate_up)

    def rotate_(self, q: Tensor, k: Tensor, angles: Tensor, rows: Tensor) -> None:
        """Rotates q and k [tokens, their heads, head_dim] in place, in halves: channel i with channel i + head_dim / 2.
        `angles` fp32 [any, head_dim]: cos, then sin; token t has row `rows[t]` of it, int32 [tokens]."""
        self._library.apply_rope_with_cos_sin_cache_inplace(
            positions=rows, query=q, key=k, head_size=q.shape[-1], cos_sin_cache=angles, is_neox=True
        )


def _bytes(x: Tensor) -> Tensor:
    return x.view(torch.uint8)


def _indptr(lengths: npt.NDArray[np.integer]) -> Ints:
    """[n] -> where each begins and the last one ends, [n + 1]."""
    return np.concatenate((np.zeros(1, np.int32), np.cumsum(lengths, dtype=np.int32)))
