"""The row kernels as functions of tensors: norms, angles, rotation of queries and keys, the next token.

All take and give fp32 on the CPU, contiguous, and use torch's number of threads. A row's bits depend on that row alone.
Each needs the library (`load`), but for `argmax`, which asks torch where there is none.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

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


EDIT = np.dtype(
    [
        *((name, "i8") for name in ("first", "allows", "moves", "sees")),
        *((name, "f4") for name in ("repetition", "presence", "frequency")),
    ],
    align=True,
)
"""`struct edit` of kernels.h: what is done to a row's logits before that."""


class _Edits(ctypes.Structure):
    """`struct edits` of kernels.h."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("rows", "ids", "values"))


class _Telling(ctypes.Structure):
    """`struct telling` of kernels.h."""

    _fields_ = (
        ("rows", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("count", "most")),
        *((name, ctypes.c_void_p) for name in ("logprobs", "best_logprobs", "ranks", "best")),
    )


class Edits:
    """What is done to logits before tokens are chosen: `rows` (EDIT [m]), and the ids and values that they name."""

    def __init__(self, rows: npt.NDArray[Any], ids: npt.NDArray[np.int64], values: npt.NDArray[np.float32]) -> None:
        assert rows.dtype == EDIT, f"edits are {rows.dtype}"
        assert len(ids) == len(values), f"{len(ids)} ids with {len(values)} values"
        self._alive = rows, ids, values
        self._edits = _Edits(*(array.ctypes.data for array in self._alive))
        self.address = ctypes.addressof(self._edits)


class Telling:
    """What is wanted of the tokens of `rows` [n], and where it will be: their log-probabilities and ranks, and the
    `most` likeliest tokens of each."""

    def __init__(self, rows: npt.NDArray[np.int64], most: int) -> None:
        count = len(rows)
        self._rows = rows
        self._logprobs, self._ranks = np.empty(count, np.float32), np.empty(count, np.int64)
        self._best, self._best_logprobs = np.empty((count, most), np.int64), np.empty((count, most), np.float32)
        places = self._logprobs, self._best_logprobs, self._ranks, self._best
        self._telling = _Telling(rows.ctypes.data, count, most, *(array.ctypes.data for array in places))
        self.address = ctypes.addressof(self._telling)

    def columns(self, tokens: npt.NDArray[np.int64]) -> list[npt.NDArray[Any]]:
        """Once it was told of these: tokens, log-probabilities and ranks [n], likeliest tokens and theirs [n, most]."""
        return [tokens[self._rows], self._logprobs, self._ranks, self._best, self._best_logprobs]


class Choice(NamedTuple):
    """How the next tokens of some rows are chosen, and what is told of them."""

    how: npt.NDArray[Any]  # DRAWING [m]
    edits: Edits | None = None
    told: Telling | None = None


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


def choose(x: Tensor, how: npt.NDArray[Any], edits: Edits | None = None) -> Tensor:
    """int64 [rows]: the next token of each row of x [rows, size], as `how` (DRAWING [rows]) says, behind the edits. NaN
    counts as -inf; 0 where nothing is left. What is drawn is found as `server.runner.sampling` says, without sorting a
    row."""
    library, (rows, size), threads = _library(), x.shape, torch.get_num_threads()
    assert x.is_contiguous(), "logits must be one contiguous tensor"
    assert how.dtype == DRAWING, f"ways to choose are {how.dtype}"
    assert len(how) == rows, f"{len(how)} ways for {rows} rows"
    tokens = torch.empty(rows, dtype=torch.int64)
    scratch = torch.empty(library.terrace_choose_scratch(size, threads), dtype=torch.uint8)
    library.terrace_choose(
        x.data_ptr(), how.ctypes.data, None if edits is None else edits.address,
        tokens.data_ptr(), rows, size, scratch.data_ptr(), threads,
    )  # fmt: skip
    return tokens


def describe(x: Tensor, tokens: Tensor, most: int) -> list[Tensor]:
    """What `Telling` says of int64 `tokens` [rows] by x [rows, size], as `columns`; `most` of `size` at most. NaN
    counts as -inf. The log-probability of what cannot be is -inf, or NaN where nothing is left."""
    assert x.is_contiguous(), "logits must be one contiguous tensor"
    assert most <= x.shape[1], f"{most} tokens of {x.shape[1]}"
    chosen, told = tokens.contiguous().numpy(), Telling(np.arange(len(x)), most)
    _library().terrace_describe(x.data_ptr(), chosen.ctypes.data, x.shape[1], told.address, torch.get_num_threads())
    return [torch.from_numpy(column) for column in told.columns(chosen)]


def _library() -> ctypes.CDLL:
    library = load()
    assert library is not None, "the native kernels were not built"
    return library
