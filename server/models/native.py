"""The parts of decoders on the native CPU kernels: packed weights, hidden states in fp32.

They stand in for `layers.TorchParts`; what each does is said there. Every call is one call of the library, which gives
up the interpreter's lock. With these parts and the native attention the bits of a token's hidden state depend on the
tokens before it alone: not on what else is in the batch, or on how the prompt was cut.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from server.kernels.native.decoder import LayerParts, NativeDecoder
from server.kernels.native.linear import SOURCES, PackedLinear, Workspace
from server.kernels.native.rows import angles, qk_rope, rms_norm
from server.models.layers import Rotary
from server.types import ModelGeometry

if TYPE_CHECKING:
    from server.models.decoder import Decoder


@dataclass(frozen=True, slots=True)
class PackedRows:
    """A `Parameter`: some rows of a packed matrix."""

    linear: PackedLinear
    first: int
    count: int

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.count, self.linear.inputs))

    @property
    def nbytes(self) -> int:
        return self.linear.nbytes * self.count // self.linear.rows_of_weights

    def numel(self) -> int:
        return self.shape.numel()

    def copy_(self, values: Tensor) -> None:
        self.linear.fill(self.first, values if values.dtype in SOURCES else values.float())


@dataclass(frozen=True, slots=True)
class PackedBias:
    """A `Parameter`: some entries of a packed matrix' bias."""

    linear: PackedLinear
    first: int
    count: int

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.count,))

    @property
    def nbytes(self) -> int:
        return 4 * self.count

    def numel(self) -> int:
        return self.count

    def copy_(self, values: Tensor) -> None:
        self.linear.fill_bias(self.first, values)


class NativeLinear(PackedLinear):
    """With the places of its weights under the names that `layers.Linear` has for them."""

    def add_to(self, x: Tensor, onto: Tensor) -> Tensor:
        """`onto` + the layer's result, in place."""
        self.add(x, onto)
        return onto

    def part(self, first: int, outputs: int) -> PackedRows:
        return PackedRows(self, first, outputs)

    def bias_part(self, first: int, outputs: int) -> PackedBias | None:
        return PackedBias(self, first, outputs) if self.bias is not None else None


class NativeNorm:
    __slots__ = ("_eps", "weight")

    def __init__(self, size: int, eps: float) -> None:
        self.weight = torch.empty(size)
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self._eps)


class NativeHeads:
    """In place: queries, keys and values are views of the projection."""

    __slots__ = ("_eps", "_geometry", "gain")

    def __init__(self, geometry: ModelGeometry, eps: float, *, norm: bool) -> None:
        self._geometry, self._eps = geometry, eps
        self.gain = torch.empty(2, geometry.head_dim) if norm else None

    def __call__(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        g = self._geometry
        gains = None if self.gain is None else (self.gain[0], self.gain[1])
        qk_rope(qkv, cos, sin, g.heads, g.kv_heads, gains, self._eps)
        split = qkv.view(-1, g.heads + 2 * g.kv_heads, g.head_dim)
        return split[:, : g.heads], split[:, g.heads : g.heads + g.kv_heads], split[:, g.heads + g.kv_heads :]


@dataclass(frozen=True, slots=True)
class NativeParts:
    """`dtype`: of weights that are not quantised, and of the cache unless another is asked for. `quantization`: of the
    linear layers' weights, or "none". What is only looked up stays in `dtype`. The parts need the
    library."""

    dtype: torch.dtype
    quantization: str = "none"
    workspace: Workspace = field(default_factory=Workspace)

    @property
    def device(self) -> str:
        return "cpu"

    def linear(self, inputs: int, outputs: int, bias: bool = False) -> NativeLinear:
        return NativeLinear(inputs, outputs, self._format, bias=bias, workspace=self.workspace)

    def head(self, inputs: int, vocab: int) -> NativeLinear:
        return self.linear(inputs, vocab)

    def gated(self, inputs: int, inner: int, bias: bool = False) -> NativeLinear:
        return NativeLinear(inputs, inner, self._format, bias=bias, gated=True, workspace=self.workspace)

    def table(self, entries: int, size: int) -> NativeLinear:
        return NativeLinear(size, entries, self._plain, workspace=self.workspace)

    def norm(self, size: int, eps: float) -> NativeNorm:
        return NativeNorm(size, eps)

    def heads(self, geometry: ModelGeometry, eps: float, *, norm: bool) -> NativeHeads:
        return NativeHeads(geometry, eps, norm=norm)

    def angles(self, rotary: Rotary, positions: Tensor) -> tuple[Tensor, Tensor]:
        return angles(positions, rotary.frequencies, rotary.amplitude)

    def whole(self, decoder: Decoder) -> NativeDecoder:
        layers = [
            LayerParts(
                attention_gain=layer.attention_norm.weight,
                qkv=layer.qkv,
                head_gains=layer.heads.gain,
                output=layer.output,
                mlp_gain=layer.mlp_norm.weight,
                gate_up=layer.gate_up,
                down=layer.down,
                window=window,
            )
            for layer, window in zip(decoder.layers, decoder.geometry.windows, strict=True)
        ]
        gain, eps, rotary = decoder.norm.weight, decoder.spec.norm_eps, decoder.rotary
        return NativeDecoder(
            decoder.embedding, layers, gain, eps, decoder.head, rotary.frequencies, rotary.amplitude, self.workspace
        )

    @property
    def _format(self) -> str:
        return self._plain if self.quantization == "none" else self.quantization

    @property
    def _plain(self) -> str:
        return str(self.dtype).removeprefix("torch.")
