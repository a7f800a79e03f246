"""What `server.kernels.fp8` says that it does, in torch, for machines without Triton and a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

CODE = torch.float8_e4m3fn


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    assert x.dtype == torch.bfloat16
    scales = x.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 448
    return (x.float() / scales).clamp(-448, 448).to(CODE), scales


def product(
    codes: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    onto: Tensor | None = None,
) -> Tensor:
    assert weight.dtype == CODE
    assert scales.shape == (len(codes), 1)
    assert weight_scales.shape == (1, len(weight))
    assert weight.is_contiguous()
    out = (codes.float() @ weight.float().t()) * scales * weight_scales
    out = out if bias is None else out + bias.float()
    return out.to(torch.bfloat16) if onto is None else onto.copy_(onto.float() + out)
