"""KV as int8: how a block's bytes hold it, and the rounding, in plain torch. The native kernels do the same in C.

A vector of head_dim values becomes int8 values and one fp32 scale, its largest magnitude / 127. Of each K and V plane
of a block (one layer, one KV head) come first the values `[block_tokens, head_dim]`, then the scales `[block_tokens]`,
so that both are aligned. The arena has room for them by 4 more int8 a vector: `[..., block_tokens, head_dim + 4]`.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE_BYTES = 4
SMALLEST = 1e-30
"""Vectors with nothing larger than this are zero."""


def planes(arena: Tensor) -> tuple[Tensor, Tensor]:
    """Views of an int8 arena: values `[frames, layers, 2, kv_heads, block_tokens, head_dim]`, scales fp32 without the
    last axis."""
    block_tokens, vector = arena.shape[-2:]
    size = block_tokens * (vector - SCALE_BYTES)
    assert size % SCALE_BYTES == 0, f"{block_tokens} vectors of {vector - SCALE_BYTES} bytes leave the scales unaligned"
    flat = arena.flatten(4)
    values = flat[..., :size].unflatten(-1, (block_tokens, vector - SCALE_BYTES))
    return values, flat.view(torch.float32)[..., size // SCALE_BYTES :]


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 of the shape of `x` and scales fp32 `[...]` without its last axis; x = values * scales nearly.

    A vector that is not finite gets a scale of NaN and values of 0, so that it is not lost.
    """
    top = x.float().abs().amax(-1)
    finite, empty = top.isfinite(), top < SMALLEST
    most = torch.tensor(127.0)  # a tensor: torch divides a plain number by means of a rounded reciprocal
    inverse = torch.where(finite & ~empty, most / top, 0.0)
    values = (x.float() * inverse[..., None]).nan_to_num_(0.0).round_().to(torch.int8)
    return values, torch.where(finite, torch.where(empty, 0.0, top / most), torch.nan)
