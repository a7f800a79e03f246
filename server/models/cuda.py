"""The parts of decoders on a GPU, in bfloat16 or float16: torch's matrix products, FlashInfer's kernels between them.

They stand in for `layers.TorchParts`; what each does is said there. They know how a part is computed on a GPU, not who
asks. What is fused is what saves passes over memory:
- the residual is added by the matrix product that makes what is added to it, in fp32 before the one rounding, so that
  no kernel but a norm reads it (FlashInfer's norm that adds first would read and write it once more);
- silu(gate) * up is one kernel instead of two and a copy less;
- queries and keys are normed and rotated where they lie in the projection, with fp32 angles; torch copies them twice.

A decode step is replayed as a CUDA graph, so that the number of calls matters to prefill only.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from server.kernels.flashinfer import Operations
from server.models.layers import Heads, Linear, RMSNorm, Rotary, TorchParts
from server.types import ModelGeometry


class CudaLinear(Linear):
    __slots__ = ()

    def add_to(self, x: Tensor, onto: Tensor) -> Tensor:
        """`onto` + the layer's result, in place."""
        onto.addmm_(x, self.weight.t())
        return onto if self.bias is None else onto.add_(self.bias)


class CudaNorm(RMSNorm):
    __slots__ = ("_operations",)

    def __init__(self, size: int, eps: float, dtype: torch.dtype, device: torch.device | str,
                 operations: Operations) -> None:  # fmt: skip
        super().__init__(size, eps, dtype, device)
        self._operations = operations

    def __call__(self, x: Tensor) -> Tensor:
        return self._operations.rms_norm(x, self.weight, self.eps)


class CudaHeads(Heads):
    """In place: queries, keys and values are views of the projection."""

    __slots__ = ("_operations",)

    def __init__(self, geometry: ModelGeometry, eps: float, dtype: torch.dtype, device: torch.device | str,
                 operations: Operations, *, norm: bool) -> None:  # fmt: skip
        super().__init__(geometry, eps, dtype, device, norm=norm)
        self._operations = operations

    def __call__(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`cos`, `sin`: what `CudaParts.angles` gives."""
        split = qkv.view(-1, self.heads + 2 * self.kv_heads, self.head_dim)
        q, k, v = split.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        if self.gain is not None:
            self._operations.rms_norm_heads_(q, self.gain[0], self.eps)
            self._operations.rms_norm_heads_(k, self.gain[1], self.eps)
        self._operations.rotate_(q, k, cos, sin)
        return q, k, v


@dataclass(frozen=True, slots=True)
class CudaParts(TorchParts):
    """Parts for a device with CUDA that `operations` run on. `dtype`: bfloat16 or float16; what is float32 takes
    `TorchParts`."""

    operations: Operations = field(default_factory=Operations)

    def linear(self, inputs: int, outputs: int, bias: bool = False) -> CudaLinear:
        return CudaLinear(inputs, outputs, bias, self.dtype, self.device)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return self.operations.silu_mul(gate_up)

    def norm(self, size: int, eps: float) -> CudaNorm:
        return CudaNorm(size, eps, self.dtype, self.device, self.operations)

    def heads(self, geometry: ModelGeometry, eps: float, *, norm: bool) -> CudaHeads:
        return CudaHeads(geometry, eps, self.dtype, self.device, self.operations, norm=norm)

    def angles(self, rotary: Rotary, positions: Tensor) -> tuple[Tensor, Tensor]:
        """A table of the step's angles, fp32 [tokens, head_dim]: cos, then sin; and which row of it each token has,
        int32 [tokens]. The rotation kernel looks angles up: a table of the step spares one of `max_positions`."""
        cos, sin = rotary.angles(positions)
        rows = torch.arange(len(positions), dtype=torch.int32, device=positions.device)
        return torch.cat((cos, sin), dim=-1), rows


def cuda_parts(dtype: torch.dtype, device: torch.device | str) -> TorchParts:
    """The parts for a GPU: torch's where FlashInfer cannot be imported, or has no kernels for `dtype`."""
    if dtype == torch.float32:
        return TorchParts(dtype, device)
    try:
        return CudaParts(dtype, device)
    except (ImportError, OSError, RuntimeError):  # what attends is chosen with the same question, and says so
        return TorchParts(dtype, device)
