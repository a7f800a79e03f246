"""The attention seam: what a step looks like to a kernel, and the names of the kernels there are.

Knows positions and frames; refuses to know requests, blocks or models. Imports no torch, so that the control plane and
the configuration can name a backend without loading one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from server.types import ModelGeometry

if TYPE_CHECKING:
    from torch import Tensor

BACKENDS: dict[str, str] = {
    "reference": "server.kernels.reference:ReferenceAttention",
    "cpu": "server.kernels.cpu:CpuAttention",
    "native": "server.kernels.native.attention:NativeAttention",
    "flashinfer": "server.kernels.flashinfer:FlashInferAttention",
    "sdpa": "server.kernels.cpu:CpuAttention",
}
"""Name -> "module:Class" for `server.registry.resolve`. A class is built as `Class(arena, geometry)`. `sdpa` is what
`cpu` does, on the arena's device: for a GPU that FlashInfer cannot serve."""

INT8_BACKENDS = frozenset({"reference", "native"})
"""Those that take an int8 arena, see `server.kernels.int8`."""


@dataclass(frozen=True)
class AttentionBatch:
    """The rows of one step. Row r feeds the tokens `query_starts[r] : query_starts[r + 1]` of the flat batch.

    `starts[r]` is the absolute position of its first token, `context_lens[r]` = start + query length, and `frames[r]`
    its block table: an int32 view with at least ceil(context_len / block_tokens) entries. A row has at least one token;
    no two rows write the same frame.
    """

    query_starts: npt.NDArray[np.int32]  # [rows + 1]
    starts: npt.NDArray[np.int32]  # [rows]
    context_lens: npt.NDArray[np.int32]  # [rows]
    frames: Sequence[npt.NDArray[np.int32]]  # rows x [>= blocks of the row]

    @property
    def rows(self) -> int:
        return len(self.starts)

    @property
    def tokens(self) -> int:
        return int(self.query_starts[-1])

    @cached_property
    def shared(self) -> tuple[tuple[npt.NDArray[Any], ...], tuple[int, ...]]:
        """For who takes addresses: the block tables one behind the other, where each begins there (int64 [rows]),
        `query_starts` and `starts`, all contiguous; and the address of each."""
        tables = self.frames[0] if self.rows == 1 else np.concatenate(self.frames)
        begins = np.array(list(accumulate(map(len, self.frames[:-1]), initial=0)), np.int64)
        arrays = tables, begins, np.ascontiguousarray(self.query_starts), np.ascontiguousarray(self.starts)
        return arrays, tuple(array.ctypes.data for array in arrays)

    def places(self, block_tokens: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Where the fed tokens go: the frame of each and its offset there, int32 [tokens] each."""
        if self.tokens == self.rows:  # one token each
            blocks, offsets = np.divmod(self.starts, np.int32(block_tokens))
            frames = [table[block] for table, block in zip(self.frames, blocks.tolist(), strict=True)]
            return np.array(frames, np.int32), offsets
        lengths = np.diff(self.query_starts)
        positions = np.arange(self.tokens, dtype=np.int32) + np.repeat(self.starts - self.query_starts[:-1], lengths)
        blocks, offsets = np.divmod(positions, np.int32(block_tokens))
        bounds = self.query_starts.tolist()
        pieces = [table[blocks[a:b]] for table, a, b in zip(self.frames, bounds, bounds[1:], strict=False)]
        return np.concatenate(pieces), offsets


class AttentionBackend(Protocol):
    """Causal (optionally sliding-window) grouped-query attention over a paged arena. Device thread only.

    The caller guarantees: `plan` once a step, then `run` once for each layer in order, with the frames of the batch
    reserved and the arena written by nobody else until the last `run` returned. The backend guarantees: the result of a
    row depends on no other row of the batch (but for float rounding), and bytes of a frame beyond the row's context
    (stale, infinite, NaN) never reach it. Sliding-window layers read no block that lies wholly outside the window, so
    frames of such blocks may hold anything.

    One whose steps may be captured also has `graph(rows)`: see `server.kernels.flashinfer`.
    """

    def __init__(self, arena: Tensor, geometry: ModelGeometry) -> None:
        """`arena`: [frames, layers, 2, kv_heads, block_tokens, head_dim], float32, bfloat16, float16; of some int8.
        `flashinfer` takes no float32, but float8_e4m3fn."""

    def plan(self, batch: AttentionBatch) -> None:
        """Prepares what all layers of this step share."""

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Writes k and v (already rotated) into the arena, then attends.

        q: [tokens, heads, head_dim]; k, v: [tokens, kv_heads, head_dim]; any strides with unit stride in head_dim.
        Returns [tokens, heads * head_dim] in q's dtype.
        """
        ...
