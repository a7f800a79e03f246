"""Paged attention by the native kernels: one call a layer, which stores K and V and reads the frames where they lie.

A result's bits depend on the query, its position and the tokens before it alone: not on the rest of the batch, on how a
prompt was cut into chunks, or on the number of threads. See attention.inc.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor

from server.errors import ConfigError
from server.kernels.attention import AttentionBatch
from server.kernels.native import FORMATS, load
from server.types import ModelGeometry

NO_WINDOW = 2**31 - 1


class _Step(ctypes.Structure):
    """`struct attention` of kernels.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("arena", "query_starts", "starts", "frames", "tables")),
        ("rows", ctypes.c_int64),
        *(
            (name, ctypes.c_int32)
            for name in ("format", "layers", "heads", "kv_heads", "head_dim", "block_tokens", "threads")
        ),
        ("scale", ctypes.c_float),
        ("desk_floats", ctypes.c_int64),
        ("partial_floats", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("desks", "partials", "units", "partials_at")),
    )


class _Plan:
    """What the kernels know of a step, and their memory for it."""

    def __init__(self, step: _Step) -> None:
        self.address = ctypes.addressof(step)
        self.step = step
        self._memory = torch.empty(0)
        self._tables: tuple[np.ndarray, ...] = ()
        self._units = np.empty((2, 0), np.int64)

    def make(self, library: ctypes.CDLL, batch: AttentionBatch) -> None:
        step = self.step
        arrays, (step.frames, step.tables, step.query_starts, step.starts) = batch.shared
        step.rows = batch.rows
        if self._units.shape[1] <= batch.rows:
            self._units = np.empty((2, 2 * batch.rows + 1), np.int64)
            step.units, step.partials_at = self._units.ctypes.data, self._units[1].ctypes.data
        self._tables = arrays  # alive as long as the kernels may look at them
        step.threads = torch.get_num_threads()
        library.terrace_attention_plan(self.address)
        needed = step.threads * step.desk_floats + step.partial_floats
        if self._memory.numel() < needed:
            self._memory = torch.empty(needed)
        step.desks = self._memory.data_ptr()
        step.partials = step.desks + 4 * step.threads * step.desk_floats


class NativeAttention:
    """See `AttentionBackend`. The arena is on the CPU, and may be int8 too (`server.kernels.int8`); `threads` are
    torch's. Arithmetic is fp32 whatever the arena's dtype. A step may be planned while the one before it is
    computed. Raises ConfigError where the library was not built."""

    def __init__(self, arena: Tensor, geometry: ModelGeometry) -> None:
        library = load()
        if library is None:
            raise ConfigError(
                "attention 'native' needs the native kernels, which were not built: install a C compiler and "
                "reinstall, or use --attention cpu",
                param="model.attention",
            )
        _, layers, _, kv_heads, block_tokens, vector = arena.shape
        assert arena.device.type == "cpu", f"the native backend cannot read an arena on {arena.device}"
        assert arena.is_contiguous(), "the arena must be one contiguous, block-major tensor"
        head_dim = vector - 4 if arena.dtype == torch.int8 else vector
        assert (layers, kv_heads, head_dim) == (geometry.layers, geometry.kv_heads, geometry.head_dim), "other model"
        assert arena.dtype != torch.int8 or head_dim <= 1024, "sums of products of an int8 cache would not fit int32"
        self._library = library
        self._arena = arena
        self._windows = [NO_WINDOW if window is None else window for window in geometry.windows]
        step = _Step(
            arena=arena.data_ptr(),
            format=FORMATS[arena.dtype],
            layers=layers,
            heads=geometry.heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            block_tokens=block_tokens,
            scale=geometry.scale,
        )
        self._plan, self._before = (_Plan(_Step.from_buffer_copy(step)) for _ in range(2))

    @property
    def address(self) -> int:
        """Of the planned step's `struct attention`: it lasts until the next but one is planned."""
        return self._plan.address

    def plan(self, batch: AttentionBatch) -> None:
        self._plan, self._before = self._before, self._plan
        self._plan.make(self._library, batch)

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries, keys, values = (x if x.dtype == torch.float32 else x.float() for x in (q, k, v))
        out = torch.empty(queries.shape[0], queries.shape[1] * queries.shape[2])
        self._library.terrace_attend(
            self.address,
            layer,
            self._windows[layer],
            queries.data_ptr(), queries.stride(0), queries.stride(1),
            keys.data_ptr(), keys.stride(0), keys.stride(1),
            values.data_ptr(), values.stride(0), values.stride(1),
            out.data_ptr(),
        )  # fmt: skip
        return out if q.dtype == torch.float32 else out.to(q.dtype)
