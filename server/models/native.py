"""The parts of decoders on the native CPU kernels: packed weights, hidden states in fp32.

They stand in for `layers.TorchParts`; what each does is said there. Every call is one call of the library, which gives up
the interpreter's lock. With these parts and the native attention the bits of a token's hidden state do not depend on what
else is in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from server.kernels.native import library
from server.kernels.native.linear import PackedLinear
from server.models.layers import Rotary
from server.types import ModelGeometry

FORMATS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class NativeNorm:
    __slots__ = ("_eps", "_run", "_size", "weight")

    def __init__(self, size: int, eps: float) -> None:
        self.weight = torch.empty(size)
        self._size, self._eps, self._run = size, eps, library().terrace_rmsnorm

    def __call__(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        self._run(x.data_ptr(), self.weight.data_ptr(), self._eps, out.data_ptr(), x.shape[0], self._size,
                  torch.get_num_threads())  # fmt: skip
        return out


class NativeHeads:
    """In place: queries, keys and values are views of the projection."""

    __slots__ = ("_eps", "_gains", "_geometry", "_run", "gain")

    def __init__(self, geometry: ModelGeometry, eps: float, *, norm: bool) -> None:
        self._geometry, self._eps, self._run = geometry, eps, library().terrace_qk_rope
        self.gain = torch.empty(2, geometry.head_dim) if norm else None
        self._gains = (None, None) if self.gain is None else (self.gain[0].data_ptr(), self.gain[1].data_ptr())

    def __call__(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        g = self._geometry
        self._run(qkv.data_ptr(), *self._gains, self._eps, cos.data_ptr(), sin.data_ptr(), qkv.shape[0], g.heads,
                  g.kv_heads, g.head_dim, torch.get_num_threads())  # fmt: skip
        split = qkv.view(-1, g.heads + 2 * g.kv_heads, g.head_dim)
        return split[:, : g.heads], split[:, g.heads : g.heads + g.kv_heads], split[:, g.heads + g.kv_heads :]


@dataclass(frozen=True, slots=True)
class NativeParts:
    """`dtype`: of weights that are not quantised, and of the cache unless another is asked for. `quantization`: of the
    linear layers' weights, or "none". What is only looked up stays in `dtype`. Raises ConfigError without the library."""

    dtype: torch.dtype
    quantization: str = "none"

    @property
    def device(self) -> str:
        return "cpu"

    def linear(self, inputs: int, outputs: int, bias: bool = False) -> PackedLinear:
        return PackedLinear(inputs, outputs, self._format, bias=bias)

    def gated(self, inputs: int, inner: int, bias: bool = False) -> PackedLinear:
        return PackedLinear(inputs, inner, self._format, bias=bias, gated=True)

    def table(self, entries: int, size: int) -> PackedLinear:
        return PackedLinear(size, entries, FORMATS[self.dtype])

    def norm(self, size: int, eps: float) -> NativeNorm:
        return NativeNorm(size, eps)

    def heads(self, geometry: ModelGeometry, eps: float, *, norm: bool) -> NativeHeads:
        return NativeHeads(geometry, eps, norm=norm)

    def angles(self, rotary: Rotary, positions: Tensor) -> tuple[Tensor, Tensor]:
        return rotary.angles(positions)

    @property
    def _format(self) -> str:
        return FORMATS[self.dtype] if self.quantization == "none" else self.quantization
