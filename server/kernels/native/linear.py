"""Linear layers over packed weights: fp32 in and out, weights in one of the formats of `FORMATS`.

A `PackedLinear` is made empty and filled by rows as they come from a checkpoint, so that projections that share an
input (q, k, v; gate, up) become one matrix without ever being joined in memory. README.md says how the weights lie, and
how exact each format is.
"""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

from server.kernels import native
from server.kernels.native import load

FORMATS = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 3, "int8-g32": 4, "int4-g32": 5, "w8a8": 6, "w4a8": 7}
"""Name -> `enum format` of kernels.h. int8: a scale for each output; -g32: a bf16 scale for each 32 inputs of it; w8a8:
as int8, and each row of x is rounded to int8, too; w4a8: four bits with a bf16 scale for each 32 inputs, and x in int8
likewise."""
SOURCES = {dtype: number for dtype, number in native.FORMATS.items() if dtype.is_floating_point}
"""What weights may come in."""
PANEL = 16
HUGE_BYTES = 2 * 2**20


class _Matrix(ctypes.Structure):
    """`struct matrix` of kernels.h."""

    _fields_ = (
        ("panels", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("inputs", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("format", ctypes.c_int32),
        ("gated", ctypes.c_int32),
    )


class Workspace:
    """Scratch memory that layers share: those of one workspace must not be called from two threads at a time."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    @property
    def size(self) -> int:
        """Bytes that can be reserved without moving."""
        return self._memory.numel()

    def reserve(self, count: int) -> int:
        """The address of at least `count` bytes. What was given out before is void."""
        if self._memory.numel() < count:
            self._memory = torch.empty(count, dtype=torch.uint8)
        return self._memory.data_ptr()


class PackedLinear:
    """`y = x W^T (+ bias)`, W [outputs, inputs]; gated: W [2 * outputs, inputs] and `y = silu(gate) * up`.

    x: fp32 [rows, inputs], y: fp32 [rows, outputs]; any stride between rows, unit stride within. The bits of a row of y
    depend on that row of x alone: not on the other rows, how many there are, or the number of threads. Weights are zero
    until `fill`ed. One thread at a time (see `Workspace`). RuntimeError where the library was not built.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        format: str,
        *,
        bias: bool = False,
        gated: bool = False,
        workspace: Workspace | None = None,
    ) -> None:
        library = load()
        if library is None:
            raise RuntimeError("the native kernels are not there: see the log for why")
        self.inputs, self.outputs, self.format, self.gated = inputs, outputs, format, gated
        self._library, self._linear = library, library.terrace_linear
        self.workspace = workspace or Workspace()
        lanes = -(-outputs // PANEL) * PANEL * (2 if gated else 1)
        self._matrix = _Matrix(inputs=inputs, outputs=outputs, format=FORMATS[format], gated=gated)
        self.address = ctypes.addressof(self._matrix)
        """Of its `struct matrix`."""
        self._panels = _zeros(library.terrace_matrix_bytes(self.address))
        self._scales = _zeros(lanes * 4) if format in ("int8", "w8a8") else None
        self.bias = _zeros(lanes * 4).view(torch.float32) if bias else None
        self._matrix.panels = self._panels.data_ptr()
        self._matrix.scales = None if self._scales is None else self._scales.data_ptr()
        self._matrix.bias = None if self.bias is None else self.bias.data_ptr()

    @property
    def rows_of_weights(self) -> int:
        """Rows of W."""
        return self.outputs * 2 if self.gated else self.outputs

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(part.nbytes for part in (self._panels, self._scales, self.bias) if part is not None)

    @property
    def span(self) -> tuple[int, int]:
        """Address and bytes of the panels."""
        return self._panels.data_ptr(), self._panels.nbytes

    def copy(self, other: PackedLinear) -> None:
        """Takes over the weights, and the bias, of a layer of the same shape and format."""
        for mine, its in zip((self._panels, self._scales, self.bias), (other._panels, other._scales, other.bias)):
            if mine is not None and its is not None:
                mine.copy_(its)

    def fill(self, first: int, weights: Tensor) -> None:
        """Rows `first`, `first` + 1, ... of W from `weights` [rows, inputs] of a dtype in `SOURCES`, each row once."""
        rows, inputs = weights.shape
        assert inputs == self.inputs, f"{inputs} inputs for a layer of {self.inputs}"
        assert 0 <= first <= self.rows_of_weights - rows, "rows beyond the layer's"
        if weights.stride(1) != 1:
            weights = weights.contiguous()
        source, stride = SOURCES[weights.dtype], weights.stride(0)
        address = weights.data_ptr()
        self._library.terrace_pack(self.address, address, source, stride, first, rows, torch.get_num_threads())

    def fill_bias(self, first: int, bias: Tensor) -> None:
        """Entries `first`, `first` + 1, ... of the bias, in the order of W's rows."""
        assert self.bias is not None, "a layer without bias"
        row = torch.arange(first, first + len(bias))
        if self.gated:  # gates and ups alternate by panel
            up, output = row // self.outputs, row % self.outputs
            row = (output // PANEL * 2 + up) * PANEL + output % PANEL
        self.bias[row] = bias.float()

    def __call__(self, x: Tensor) -> Tensor:
        """x [rows, inputs] -> y [rows, outputs]."""
        y = torch.empty(x.shape[0], self.outputs)
        self._run(x, y, 0)
        return y

    def into(self, x: Tensor, y: Tensor) -> None:
        """Writes y, which must not overlap x."""
        self._run(x, y, 0)

    def add(self, x: Tensor, y: Tensor) -> None:
        """y += the layer's result: a residual. y must not overlap x."""
        self._run(x, y, 1)

    def _run(self, x: Tensor, y: Tensor, add: int) -> None:
        rows, threads, matrix = x.shape[0], torch.get_num_threads(), self.address
        scratch = self.workspace.reserve(self._library.terrace_linear_scratch(matrix, rows, threads))
        self._linear(matrix, x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0), rows, add, scratch, threads)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows `ids` (int64 [count]) of W as the kernels see them, fp32 [count, inputs]: embeddings."""
        y = torch.empty(len(ids), self.inputs)
        ids = ids.contiguous()
        self._library.terrace_rows(
            self.address, ids.data_ptr(), len(ids), y.data_ptr(), self.inputs, torch.get_num_threads()
        )
        return y


def _zeros(count: int) -> Tensor:
    """Zero bytes at an address that is a multiple of 64; on huge pages where they fill some and the kernel has them."""
    memory = mmap.mmap(-1, max(count, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if count >= HUGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
