"""FlashInfer and CUDA as far as the backend uses them, in plain torch, from FlashInfer's documentation.

What goes wrong with the real ones goes wrong here: a plan's staging memory is in flight until an event was waited for,
plans that share memory overwrite each other, a graph re-runs kernels on the very tensors they were captured with, and
values that a mask hides are multiplied by a weight of 0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from server.kernels.flashinfer import FlashInferAttention, Window
from server.kernels.uploads import SLOTS
from server.types import ModelGeometry

Kernel = Callable[[], None]


class FakeHost:
    """Stands for `Host`. A second plan before the first one's copies were waited for is an error, and what was sent is
    spoilt when its slot is used again."""

    def __init__(self) -> None:
        self.open = self.is_ahead = False
        self.turns = self.slot = 0
        self.device = torch.device("cpu")
        self._sent: list[list[Tensor]] = [[] for _ in range(SLOTS)]

    def turn(self) -> None:
        self.slot = (self.slot + 1) % SLOTS
        for tensor in self._sent[self.slot]:
            tensor.fill_(10**6)
        self._sent[self.slot] = []

    def send(self, *arrays: np.ndarray) -> list[Tensor]:
        assert not self.is_ahead, "what is sent here is waited for by the stream of the plan"
        sent = [self.pinned(array).to(self.device) for array in arrays]
        self._sent[self.slot] += sent
        return sent

    def pinned(self, array: np.ndarray) -> Tensor:
        assert array.dtype == np.int32, f"an index array of {array.dtype}"
        return torch.from_numpy(array.copy())

    @contextmanager
    def planning(self) -> Iterator[None]:
        self.turns += 1
        self.open = True
        yield
        self.open = False

    @contextmanager
    def ahead(self) -> Iterator[None]:
        self.is_ahead = True
        with self.planning():
            yield
        self.is_ahead = False


class _Wrapper:
    """What the wrappers share. Subclasses say which queries a row has."""

    def __init__(self, library: FakeFlashInfer, workspace: Tensor, kv_layout: str) -> None:
        assert kv_layout == "HND"
        assert workspace.dtype == torch.uint8
        self.flashinfer = library
        self.workspace, self._int_workspace_buffer = workspace, torch.zeros(64, dtype=torch.uint8)
        self.fixed: tuple[Tensor, Tensor, Tensor] | None = None
        self._plan_info: list[int] = []

    def _keep(self, qo_indptr: Tensor, tables: tuple[Tensor, Tensor, Tensor], shape: dict[str, Any]) -> None:
        """As a real plan: what is kept is on the device, and its staging memory is written once a turn."""
        indptr, indices, last_page_len = tables
        host = self.flashinfer.host
        assert host.open, "a plan outside a turn: its staging memory may still be in flight"
        assert getattr(self, "turn", 0) < host.turns, "planned twice in a turn: the first is still in flight"
        self.turn = host.turns
        for tensor in (qo_indptr, indptr, last_page_len):
            assert tensor.device.type == "cpu", "sizes must be on the host, or planning waits for the device"
        assert indices.device == self.workspace.device, "indices must be on the device"
        assert len(indices) == indptr[-1]
        assert all(t.dtype == torch.int32 and t.is_contiguous() for t in (qo_indptr, *tables))
        assert ((last_page_len >= 1) & (last_page_len <= shape["page_size"])).all()
        if self.fixed is None:
            self.tables = tuple(t.to(self.workspace.device, copy=True) for t in tables)
        else:
            self.tables = self.fixed
        self.qo_indptr, self.shape = qo_indptr.clone(), shape
        self._int_workspace_buffer[:8].view(torch.int64)[0] = self.mark = self.flashinfer.next_mark()

    def _attend(self, q: Tensor, kv: tuple[Tensor, Tensor], out: Tensor, plan: Tensor, *, causal: bool) -> None:
        assert plan[:8].view(torch.int64) == self.mark, "the plan was overwritten by another one, or is elsewhere"
        shape = self.shape
        assert (q.dtype, kv[0].dtype) == (shape["q_data_type"], shape["kv_data_type"])
        assert q.shape[1:] == (shape["num_qo_heads"], shape["head_dim"])
        indptr, indices, last_page_len = self.tables
        for row in range(len(self.qo_indptr) - 1):
            first, last = self.qo_indptr[row : row + 2].tolist()
            pages = indices[indptr[row] : indptr[row + 1]].long()
            context = (len(pages) - 1) * shape["page_size"] + int(last_page_len[row])
            k, v = (_tokens(plane, pages, context) for plane in kv)
            out[first:last] = _attention(q[first:last].float(), k, v, shape["sm_scale"], shape["window_left"], causal)

    def _run(self, q: Tensor, kv: tuple[Tensor, Tensor], out: Tensor | None, *, causal: bool) -> Tensor:
        _check_pages(kv)
        assert q.stride(-1) == 1
        if out is None:
            out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        assert out.is_contiguous()
        assert (out.shape, out.dtype, out.device) == (q.shape, q.dtype, q.device)
        assert q.shape[0] == self.qo_indptr[-1]
        kernel = functools.partial(self._attend, q, kv, out, self._int_workspace_buffer, causal=causal)
        self.flashinfer.launch(kernel, q)
        return out


def _tokens(plane: Tensor, pages: Tensor, context: int) -> Tensor:
    """Of HND pages, fp32 [kv_heads, context, head_dim]; what lies behind the context is not loaded."""
    return plane[pages].float().transpose(0, 1).flatten(1, 2)[:, :context]


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float, window_left: int, causal: bool) -> Tensor:
    """q [queries, heads, d], k and v [kv_heads, keys, d]; queries stand at the end of the keys."""
    group = q.shape[1] // k.shape[0]
    k, v = (x.repeat_interleave(group, 0) for x in (k, v))
    at = torch.arange(k.shape[1] - q.shape[0], k.shape[1])[:, None]
    keys = torch.arange(k.shape[1])
    seen = torch.ones(q.shape[0], k.shape[1], dtype=torch.bool)
    if causal:
        seen &= keys <= at
    if window_left >= 0:
        seen &= keys >= at - window_left
    scores = torch.einsum("qhd,hkd->hqk", q, k) * scale
    return torch.einsum("hqk,hkd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


def _check_pages(kv: tuple[Tensor, Tensor]) -> None:
    k, v = kv
    assert k.dim() == 4
    assert k.shape == v.shape
    assert k.stride() == v.stride(), "k and v strides must be identical"
    assert k.stride(-1) == 1


class FakeFlashInfer:
    """Stands for the flashinfer module. `calls`: (function, arguments, keywords) of every call made of it."""

    def __init__(self) -> None:
        self.host = FakeHost()
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self._captured: list[Kernel] | None = None
        self._marks = 0
        self.BatchDecodeWithPagedKVCacheWrapper = self._class("BatchDecodeWithPagedKVCacheWrapper", _Decode)
        self.BatchPrefillWithPagedKVCacheWrapper = self._class("BatchPrefillWithPagedKVCacheWrapper", _Prefill)
        self.CUDAGraphBatchDecodeWithPagedKVCacheWrapper = self._class(
            "CUDAGraphBatchDecodeWithPagedKVCacheWrapper", _GraphDecode
        )

    def _class(self, name: str, cls: type[_Wrapper]) -> Callable[..., _Wrapper]:
        def make(*args: Any, **kwargs: Any) -> _Wrapper:
            self.calls.append((name, (None, *args), kwargs))
            return _Recorded(name, cls(self, *args, **kwargs), self)  # type: ignore[return-value]

        return make

    def next_mark(self) -> int:
        self._marks += 1
        return self._marks

    def launch(self, kernel: Kernel, operand: Tensor) -> None:
        """Runs it, or keeps it for a graph. On the meta device there is nothing to compute."""
        if self._captured is not None:
            self._captured.append(kernel)
        elif operand.device.type != "meta":
            kernel()

    @contextmanager
    def capture(self) -> Iterator[list[Kernel]]:
        """What is launched inside is not run, but kept to be run again and again."""
        self._captured = kernels = []
        yield kernels
        self._captured = None

    def append_paged_kv_cache(self, **kwargs: Any) -> None:
        self.calls.append(("append_paged_kv_cache", (), kwargs))
        assert kwargs["kv_layout"] == "HND"
        k, v, cache = kwargs["append_key"], kwargs["append_value"], kwargs["paged_kv_cache"]
        _check_pages(cache)
        assert k.dtype == v.dtype == cache[0].dtype, "the kernel copies bytes: it converts nothing"
        rows, positions, indices, indptr, lengths = (
            kwargs[name] for name in ("batch_indices", "positions", "kv_indices", "kv_indptr", "kv_last_page_len")
        )
        assert all(t.device == k.device and t.dtype == torch.int32 for t in (rows, positions, indices, indptr, lengths))
        assert len(rows) == len(positions) == len(k)
        assert len(indptr) == len(lengths) + 1

        def kernel() -> None:
            page_size = cache[0].shape[2]
            for token, row in enumerate(rows.tolist()):
                page, offset = divmod(int(indptr[row]) * page_size + int(positions[token]), page_size)
                for plane, new in zip(cache, (k, v), strict=True):
                    plane[int(indices[page]), :, offset] = new[token]

        self.launch(kernel, k)

    def fast_decode_plan(self, wrapper: Any, **kwargs: Any) -> None:
        self.calls.append(("fast_decode_plan", (wrapper,), kwargs))
        assert kwargs["indptr"] is kwargs.pop("global_override_indptr_cpu")
        assert wrapper._plan_info, "a fast plan needs the kernels that a real one loads"
        wrapper.replan(**kwargs)

    def rmsnorm(self, input: Tensor, weight: Tensor, eps: float = 1e-6, out: Tensor | None = None) -> Tensor:
        self.calls.append(("rmsnorm", (input, weight), {"eps": eps, "out": out}))
        out = torch.empty_like(input) if out is None else out
        x = input.float()
        return out.copy_(x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.float())

    def silu_and_mul(self, input: Tensor) -> Tensor:
        self.calls.append(("silu_and_mul", (input,), {}))
        gate, up = input.float().chunk(2, -1)
        return (torch.nn.functional.silu(gate) * up).to(input.dtype)

    def apply_rope_with_cos_sin_cache_inplace(
        self, positions: Tensor, query: Tensor, key: Tensor, head_size: int, cos_sin_cache: Tensor, is_neox: bool = True
    ) -> None:
        kwargs = {"positions": positions, "query": query, "key": key, "head_size": head_size,
                  "cos_sin_cache": cos_sin_cache, "is_neox": is_neox}  # fmt: skip
        self.calls.append(("apply_rope_with_cos_sin_cache_inplace", (), kwargs))
        assert cos_sin_cache.dtype == torch.float32
        assert cos_sin_cache.is_contiguous()
        assert is_neox
        cos, sin = cos_sin_cache[positions.long()][:, None].chunk(2, -1)
        for x in (query, key):
            heads = x.view(x.shape[0], -1, head_size)
            a, b = heads.float().chunk(2, -1)
            heads.copy_(torch.cat((a * cos - b * sin, b * cos + a * sin), -1))


class _Decode(_Wrapper):
    def __init__(
        self, library: FakeFlashInfer, float_workspace_buffer: Tensor, kv_layout: str, use_tensor_cores: bool
    ) -> None:
        super().__init__(library, float_workspace_buffer, kv_layout)
        self.use_tensor_cores = use_tensor_cores

    def plan(self, *, indptr: Tensor, indices: Tensor, last_page_len: Tensor, **shape: Any) -> None:
        queries = torch.arange(len(last_page_len) + 1, dtype=torch.int32)
        self._keep(queries, (indptr, indices, last_page_len), shape)
        self._plan_info = [len(last_page_len), shape["window_left"]]

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *, out: Tensor | None = None) -> Tensor:
        return self._run(q, paged_kv_cache, out, causal=False)


class _GraphDecode(_Decode):
    """Its tables are the buffers it was given; `plan` fills them, a fast plan leaves that to the caller."""

    def __init__(
        self, library: FakeFlashInfer, workspace_buffer: Tensor, indptr_buffer: Tensor, indices_buffer: Tensor,
        last_page_len_buffer: Tensor, kv_layout: str, use_tensor_cores: bool,
    ) -> None:  # fmt: skip
        super().__init__(library, workspace_buffer, kv_layout, use_tensor_cores)
        assert len(indptr_buffer) == len(last_page_len_buffer) + 1
        self.fixed = (indptr_buffer, indices_buffer, last_page_len_buffer)

    def reset_workspace_buffer(self, float_workspace_buffer: Tensor, int_workspace_buffer: Tensor) -> None:
        self.workspace, self._int_workspace_buffer = float_workspace_buffer, int_workspace_buffer

    def plan(self, *, indptr: Tensor, indices: Tensor, last_page_len: Tensor, **shape: Any) -> None:
        assert self.fixed is not None
        for buffer, new in zip(self.fixed, (indptr, indices, last_page_len), strict=True):
            buffer[: len(new)].copy_(new)
        self.replan(indptr=indptr, indices=indices, last_page_len=last_page_len, **shape)

    def replan(self, *, indptr: Tensor, indices: Tensor, last_page_len: Tensor, **shape: Any) -> None:
        assert self.fixed is not None
        assert len(last_page_len) == len(self.fixed[2]), "the batch size is fixed in a graph"
        assert len(indices) <= len(self.fixed[1])
        super().plan(indptr=indptr, indices=indices, last_page_len=last_page_len, **shape)


class _Prefill(_Wrapper):
    def __init__(self, library: FakeFlashInfer, float_workspace_buffer: Tensor, kv_layout: str, backend: str) -> None:
        super().__init__(library, float_workspace_buffer, kv_layout)
        assert backend in ("auto", "fa2", "fa3")

    def plan(
        self, *, qo_indptr: Tensor, paged_kv_indptr: Tensor, paged_kv_indices: Tensor, paged_kv_last_page_len: Tensor,
        head_dim_qk: int, causal: bool, **shape: Any,
    ) -> None:  # fmt: skip
        assert causal
        tables = (paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        self._keep(qo_indptr, tables, {"head_dim": head_dim_qk, **shape})

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *, out: Tensor | None = None) -> Tensor:
        return self._run(q, paged_kv_cache, out, causal=True)


class _Recorded:
    """Passes everything on to a wrapper and writes its method calls down."""

    def __init__(self, name: str, wrapper: _Wrapper, library: FakeFlashInfer) -> None:
        self.__dict__.update(_name=name, _wrapper=wrapper, _library=library)

    def __setattr__(self, attribute: str, value: Any) -> None:
        setattr(self._wrapper, attribute, value)

    def __getattr__(self, attribute: str) -> Any:
        found = getattr(self._wrapper, attribute)
        if not callable(found) or attribute == "replan":
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            self._library.calls.append((f"{self._name}.{attribute}", (None, *args), kwargs))
            return found(*args, **kwargs)

        return call


class FakedFlashInfer(FlashInferAttention):
    """Built as `BACKENDS` says, over the fakes. Queries are fp32 for the sake of exact comparisons."""

    def __init__(self, arena: Tensor, geometry: ModelGeometry, **options: Any) -> None:
        self.flashinfer = FakeFlashInfer()
        self.flashinfer.host.device = arena.device
        options = {"query_dtype": torch.float32, "max_rows": 8, **options}
        super().__init__(arena, geometry, library=self.flashinfer, host=self.flashinfer.host, **options)


def windows_planned(library: FakeFlashInfer) -> set[Window]:
    """Window lengths named by the plans made so far."""
    left = {call[2]["window_left"] for call in library.calls if call[0].endswith("plan")}
    return {None if value < 0 else value + 1 for value in left}
