"""Linear layers in 8-bit floats, for a GPU: weights are half the size of bf16, and multiplied at twice the rate.

Knows how codes are made of weights, or taken over from a checkpoint; refuses to know where models come from and how
they are computed otherwise: the other parts are those of whoever asks. The head stays in bf16, as what it gives is
compared with one another, and as it does in checkpoints in fp8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from server.errors import ConfigError
from server.kernels.flashinfer import FP8_MAX
from server.models.layers import Gated, Linear, Rotary, TorchParts
from server.types import ModelGeometry

if TYPE_CHECKING:
    from server.models.quantized import RowCodes

CODE = torch.float8_e4m3fn
TILE = 16
"""Tensor cores take inputs and outputs by as many."""


class Fp8Linear:
    """`y = x W^T + b` with W in codes, e4m3 [out, in], and a scale for each output, fp32 [1, out]; `x` bf16 is rounded
    to codes row by row. See `kernels.fp8`."""

    __slots__ = ("bias", "codes", "scales")

    def __init__(self, inputs: int, outputs: int, bias: bool, device: torch.device | str) -> None:
        if inputs % TILE or outputs % TILE:
            message = f"quantization 'fp8' needs layers of a multiple of {TILE} inputs and outputs"
            raise ConfigError(f"{message}, not {inputs} and {outputs}", param="model.quantization")
        self.codes = torch.empty(outputs, inputs, dtype=CODE, device=device)
        self.scales = torch.empty(1, outputs, dtype=torch.float32, device=device)
        self.bias = torch.empty(outputs, dtype=torch.bfloat16, device=device) if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        """x: [tokens, in] -> [tokens, out]."""
        return self._product(x, None)

    def add_to(self, x: Tensor, onto: Tensor) -> Tensor:
        """`onto` + the layer's result, in place."""
        return self._product(x, onto)

    def _product(self, x: Tensor, onto: Tensor | None) -> Tensor:
        from server.kernels import fp8  # needs Triton, which only builds of torch for a GPU have

        return fp8.product(*fp8.quantise_rows(x), self.codes, self.scales, self.bias, onto)

    def part(self, first: int, outputs: int) -> Fp8Rows:
        return Fp8Rows(self, first, outputs)

    def bias_part(self, first: int, outputs: int) -> Tensor | None:
        return None if self.bias is None else self.bias[first : first + outputs]


@dataclass(frozen=True, slots=True)
class Fp8Rows:
    """A `Parameter`: the weights of some outputs."""

    linear: Fp8Linear
    first: int
    count: int

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.count, self.linear.codes.shape[1]))

    @property
    def nbytes(self) -> int:
        return self.numel() + 4 * self.count

    def numel(self) -> int:
        return self.shape.numel()

    def copy_(self, values: Tensor) -> None:
        values = values.to(self.linear.codes.device, torch.float32)
        scales = values.abs().amax(dim=1).clamp_(min=torch.finfo(torch.float32).tiny) / FP8_MAX
        self._store((values / scales[:, None]).clamp_(-FP8_MAX, FP8_MAX).to(CODE), scales)

    def take(self, values: RowCodes) -> None:
        """Likewise, bit for bit."""
        self._store(values.codes, values.scales)

    def _store(self, codes: Tensor, scales: Tensor) -> None:
        rows = slice(self.first, self.first + self.count)
        self.linear.codes[rows].copy_(codes)
        self.linear.scales[0, rows].copy_(scales)


@dataclass(frozen=True, slots=True)
class Fp8Parts:
    """`others`: the parts that are not linear layers. Raises ConfigError unless they are in bfloat16."""

    others: TorchParts

    def __post_init__(self) -> None:
        if self.dtype != torch.bfloat16:
            kind = str(self.dtype).removeprefix("torch.")
            message = f"quantization 'fp8' computes in bfloat16, not in {kind}; use --dtype bfloat16"
            raise ConfigError(message, param="model.quantization")

    @property
    def dtype(self) -> torch.dtype:
        return self.others.dtype

    @property
    def device(self) -> torch.device | str:
        return self.others.device

    def linear(self, inputs: int, outputs: int, bias: bool = False) -> Fp8Linear:
        return Fp8Linear(inputs, outputs, bias, self.device)

    def head(self, inputs: int, vocab: int) -> Linear:
        return self.others.head(inputs, vocab)

    def gated(self, inputs: int, inner: int, bias: bool = False) -> Gated:
        return Gated(self.linear(inputs, 2 * inner, bias), self.others.silu_mul)

    def table(self, entries: int, size: int) -> Linear:
        return self.others.table(entries, size)

    def norm(self, size: int, eps: float) -> Any:
        return self.others.norm(size, eps)

    def heads(self, geometry: ModelGeometry, eps: float, *, norm: bool) -> Any:
        return self.others.heads(geometry, eps, norm=norm)

    def angles(self, rotary: Rotary, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self.others.angles(rotary, positions)

    def whole(self, decoder: Any) -> None:
        """Nothing computes a step at once."""
