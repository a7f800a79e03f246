"""The row kernels as functions of tensors: norms, angles, rotation of queries and keys, the next token.

All take and give fp32 on the CPU, contiguous, and use torch's number of threads. A row's bits depend on that row alone.
Each needs the library (`load`), but for `argmax`, which asks torch where there is none.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from server.kernels.native import load

DRAWING = np.dtype(
    [("top_p", "f8"), ("min_p", "f8"), ("draw", "f8"), ("top_k", "i8"), ("temperature", "f4")], align=True
)
"""`struct drawing` of kernels.h: how a row's next token is chosen. `draw` is of [0, 1); a `top_k` of 0 and a `top_p` of
1 are no limits; a `temperature` of 0 takes the most likely token."""


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x [rows, size], gain [size] -> [rows, size]."""
    out = torch.empty_like(x)
    _library().terrace_rmsnorm(
        x.data_ptr(), gain.data_ptr(), eps, out.data_ptr(), x.shape[0], x.shape[1], torch.get_num_threads()
    )
    return out


def qk_rope(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, gains: tuple[Tensor, Tensor] | None, eps: float
) -> None:
    """In place: norms (with `gains` for queries and for keys, [head_dim] each) and rotates the heads of queries and
    keys in `qkv` [tokens, (heads + 2 * kv_heads) * head_dim]; values stay. cos, sin: [tokens, head_dim / 2], the
    amplitude in them; channel i turns with channel i + head_dim / 2."""
    tokens, width = qkv.shape
    head_dim = width // (heads + 2 * kv_heads)
    assert cos.shape == sin.shape == (tokens, head_dim // 2), f"angles {tuple(cos.shape)} for {tokens} x {head_dim}"
    q_gain, k_gain = (gain.data_ptr() for gain in gains) if gains is not None else (None, None)
    _library().terrace_qk_rope(
        qkv.data_ptr(), q_gain, k_gain, eps, cos.data_ptr(), sin.data_ptr(),
        tokens, heads, kv_heads, head_dim, torch.get_num_threads(),
    )  # fmt: skip


def angles(positions: Tensor, frequencies: Tensor, amplitude: float) -> tuple[Tensor, Tensor]:
    """cos and sin of `positions` int64 [tokens] times `frequencies` [half], times `amplitude`: [tokens, half] each.

    torch has these too, but gives even 500 numbers to a team of threads, of which one then spins for a while: in a
    server that decodes, all the time.
    """
    tokens, half = len(positions), len(frequencies)
    cos, sin = torch.empty(tokens, half), torch.empty(tokens, half)
    _library().terrace_angles(
        positions.data_ptr(), frequencies.data_ptr(), amplitude, cos.data_ptr(), sin.data_ptr(),
        tokens, half, torch.get_num_threads(),
    )  # fmt: skip
    return cos, sin


def argmax(x: Tensor) -> Tensor:
    """int64 [rows]: the greatest of each row of x [rows, size], the lowest index among equals. NaN counts as -inf; 0
    where nothing is left."""
    library = load()
    if library is None or x.device.type != "cpu" or not x.is_contiguous():
        return x.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).argmax(-1)
    best = torch.empty(x.shape[0], dtype=torch.int64)
    library.terrace_argmax(x.data_ptr(), best.data_ptr(), x.shape[0], x.shape[1], torch.get_num_threads())
    return best


def choose(x: Tensor, how: npt.NDArray[Any]) -> Tensor:
    """int64 [rows]: the next token of each row of x [rows, size], as `how` (DRAWING [rows]) says. NaN counts as -inf; 0
    where nothing is left. What is drawn is found as `server.runner.sampling` says, without sorting a row."""
    library, (rows, size), threads = _library(), x.shape, torch.get_num_threads()
    assert x.is_contiguous(), "logits must be one contiguous tensor"
    assert how.dtype == DRAWING, f"ways to choose are {how.dtype}"
    assert len(how) == rows, f"{len(how)} ways for {rows} rows"
    tokens = torch.empty(rows, dtype=torch.int64)
    scratch = torch.empty(library.terrace_choose_scratch(size, threads), dtype=torch.uint8)
    library.terrace_choose(x.data_ptr(), how.ctypes.data, tokens.data_ptr(), rows, size, scratch.data_ptr(), threads)
    return tokens


def _library() -> ctypes.CDLL:
    library = load()
    assert library is not None, "the native kernels were not built"
    return library
