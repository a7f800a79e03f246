"""A step of a whole decoder in one call of the library, which gives up the interpreter's lock all the while.

What the parts do one by one (`PackedLinear`, `rms_norm`, `qk_rope`, `NativeAttention`), with the same bits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from server.kernels.native import load
from server.kernels.native.attention import NO_WINDOW, NativeAttention
from server.kernels.native.linear import PackedLinear, Workspace


class _Layer(ctypes.Structure):
    """`struct decoder_layer` of kernels.h."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("attention_gain", "mlp_gain", "q_gain", "k_gain", "qkv", "output", "gate_up", "down")
        ),
        ("window", ctypes.c_int64),
    )


class _Decoder(ctypes.Structure):
    """`struct decoder` of kernels.h."""

    _fields_ = (
        ("embedding", ctypes.c_void_p),
        ("layers", ctypes.c_void_p),
        ("gain", ctypes.c_void_p),
        ("hidden", ctypes.c_int64),
        *((name, ctypes.c_float) for name in ("eps", "amplitude")),
        *((name, ctypes.c_void_p) for name in ("frequencies", "head")),
    )


class _Fed(ctypes.Structure):
    """`struct fed` of kernels.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("tokens", "positions", "wanted")),
        ("count", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("logits", "chosen", "how")),
    )


@dataclass(frozen=True, slots=True)
class LayerParts:
    """One layer: gains fp32 [hidden] and, where queries and keys are normed, [2, head_dim]."""

    attention_gain: Tensor
    qkv: PackedLinear
    head_gains: Tensor | None
    output: PackedLinear
    mlp_gain: Tensor
    gate_up: PackedLinear
    down: PackedLinear
    window: int | None


class NativeDecoder:
    """`layers` between the table `embedding` and the last norm's `gain` [hidden]; the `head`. Angles are
    `frequencies` [head_dim / 2] times positions, their cosines and sines times `amplitude`. Device thread only."""

    def __init__(
        self, embedding: PackedLinear, layers: Sequence[LayerParts], gain: Tensor, eps: float, head: PackedLinear,
        frequencies: Tensor, amplitude: float, workspace: Workspace,
    ) -> None:  # fmt: skip
        library = load()
        assert library is not None, "packed parts without the library"
        self._library, self._workspace = library, workspace
        self._alive = embedding, tuple(layers), gain, head, frequencies
        self._vocab = head.outputs
        self._states, self._logits = torch.empty(0, len(gain)), torch.empty(0, head.outputs)
        """Memory for a step, as much as the largest so far had."""
        self._layers = (_Layer * len(layers))(*map(_layer, layers))
        self._decoder = _Decoder(
            embedding.address, ctypes.addressof(self._layers), gain.data_ptr(), len(gain), eps, amplitude,
            frequencies.data_ptr(), head.address,
        )  # fmt: skip
        self._address = ctypes.addressof(self._decoder)

    def takes(self, attention: object) -> bool:
        """Whether it can attend: the native backend alone, the others are Python."""
        return isinstance(attention, NativeAttention)

    def __call__(self, tokens: Tensor, positions: Tensor, attention: NativeAttention, wanted: Tensor) -> Tensor:
        """int64 `tokens` [n] at `positions` [n], in a step that `attention` has planned -> states of the `wanted` ones,
        int64 [m], after the last norm: fp32 [m, hidden]."""
        states = torch.empty(len(wanted), self._decoder.hidden)
        self._run(tokens, positions, attention, wanted, states)
        return states

    def scores(
        self,
        tokens: Tensor,
        positions: Tensor,
        attention: NativeAttention,
        wanted: Tensor,
        how: npt.NDArray[Any] | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The same, then the head: logits fp32 [m, vocab]. With `how` (`rows.DRAWING` [m]) also the next token of each,
        int64 [m], as `rows.choose` has it; the logits are then overwritten by the next call."""
        count = len(wanted)
        if len(self._states) < count:
            self._states = torch.empty(count, self._decoder.hidden)
        if how is None:
            logits = torch.empty(count, self._vocab)
            self._run(tokens, positions, attention, wanted, self._states, logits)
            return logits, None
        if len(self._logits) < count:
            self._logits = torch.empty(count, self._vocab)
        chosen = torch.empty(count, dtype=torch.int64)
        self._run(tokens, positions, attention, wanted, self._states, self._logits, chosen, how)
        return self._logits[:count], chosen

    def _run(
        self, tokens: Tensor, positions: Tensor, attention: NativeAttention, wanted: Tensor, states: Tensor,
        logits: Tensor | None = None, chosen: Tensor | None = None, how: npt.NDArray[Any] | None = None,
    ) -> None:  # fmt: skip
        step, count = attention.address, len(wanted)
        fed = _Fed(
            tokens.data_ptr(), positions.data_ptr(), wanted.data_ptr(), count,
            None if logits is None else logits.data_ptr(), None if chosen is None else chosen.data_ptr(),
            None if how is None else how.ctypes.data,
        )  # fmt: skip
        scratch = self._workspace.reserve(self._library.terrace_decode_scratch(self._address, step, count))
        self._library.terrace_decode(self._address, step, ctypes.addressof(fed), states.data_ptr(), scratch)


def _layer(parts: LayerParts) -> _Layer:
    gains = parts.head_gains
    return _Layer(
        parts.attention_gain.data_ptr(),
        parts.mlp_gain.data_ptr(),
        None if gains is None else gains[0].data_ptr(),
        None if gains is None else gains[1].data_ptr(),
        parts.qkv.address,
        parts.output.address,
        parts.gate_up.address,
        parts.down.address,
        NO_WINDOW if parts.window is None else parts.window,
    )
