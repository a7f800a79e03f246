"""A step of a whole decoder in one call of the library, which gives up the interpreter's lock all the while.

What the parts do one by one (`PackedLinear`, `rms_norm`, `qk_rope`, `NativeAttention`), with the same bits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from server.kernels.native import load
from server.kernels.native.attention import NO_WINDOW, NativeAttention
from server.kernels.native.linear import PackedLinear, Workspace
from server.kernels.native.rows import Choice, Telling

Ints = npt.NDArray[np.int64]


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
        *((name, ctypes.c_void_p) for name in ("logits", "chosen", "how", "edits", "told")),
    )


class _WholeStep(ctypes.Structure):
    """`struct whole_step` of kernels.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("d", "a", "fed", "states", "scratch", "before", "places", "sources")),
        ("follows", ctypes.c_int64),
        ("busy_s", ctypes.c_void_p),
        ("wakes", ctypes.c_int64),
    )


class Follow(NamedTuple):
    """Tokens that a step takes from one before it: at `places` of its own those at `sources` of the other's."""

    chosen: Ints  # of the other; there when that has ended
    places: Ints  # [k]
    sources: Ints  # [k]


class Begun:
    """A step that the library computes, or has computed."""

    def __init__(
        self, chosen: Ints, told: Telling | None, busy_s: ctypes.c_double, wait: Callable[[], None], alive: object
    ) -> None:
        self.chosen = chosen
        """[m]: there once `wait` has returned; a step that follows may be told where they will be."""
        self._told, self._busy_s, self._wait, self._alive = told, busy_s, wait, alive

    def wait(self) -> list[npt.NDArray[Any]]:
        """`chosen`, then what is told of them, when the step has ended. Any thread, more than once, without the
        interpreter's lock."""
        self._wait()
        return [self.chosen, *(self._told.columns(self.chosen) if self._told is not None else ())]

    def busy_s(self) -> float:
        """After `wait`: seconds that it took."""
        return self._busy_s.value


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
        self._begun: Begun | None = None
        """The last of its kind."""
        self._states, self._logits = torch.empty(0, len(gain)), torch.empty(0, head.outputs)
        """Memory for such a step, as much as the largest so far had."""
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

    def scores(self, tokens: Tensor, positions: Tensor, attention: NativeAttention, wanted: Tensor) -> Tensor:
        """The same, then the head: logits fp32 [m, vocab]."""
        count = len(wanted)
        states, logits = torch.empty(count, self._decoder.hidden), torch.empty(count, self._vocab)
        self._run(tokens, positions, attention, wanted, states, logits)
        return logits

    def launch(
        self, tokens: Ints, positions: Ints, attention: NativeAttention, wanted: Ints, choice: Choice,
        follow: Follow | None, wakes: int,
    ) -> Begun:  # fmt: skip
        """The same, of arrays, then the next token of each and what is told of it, as `choice` says and `rows.choose`
        and `rows.describe` have it; without waiting for it, or for the step before. `attention` plans no more than one
        step further meanwhile. The file `wakes` gets a byte when the step has ended, unless it is -1."""
        count, step = len(wanted), attention.address
        needed = self._library.terrace_decode_scratch(self._address, step, count)
        if needed > self._workspace.size or count > len(self._logits):
            self._settle()  # who is under way has the memory
            most = max(count, len(self._logits))
            self._states, self._logits = torch.empty(most, self._decoder.hidden), torch.empty(most, self._vocab)
        chosen, busy_s = np.empty(count, np.int64), ctypes.c_double()
        fed = _Fed(
            tokens.ctypes.data, positions.ctypes.data, wanted.ctypes.data, count,
            self._logits.data_ptr(), chosen.ctypes.data, choice.how.ctypes.data,
            *(None if part is None else part.address for part in (choice.edits, choice.told)),
        )  # fmt: skip
        whole = _WholeStep(
            self._address, step, ctypes.addressof(fed), self._states.data_ptr(), self._workspace.reserve(needed),
            busy_s=ctypes.addressof(busy_s), wakes=wakes,
        )  # fmt: skip
        if follow is not None:
            whole.before, whole.follows = follow.chosen.ctypes.data, len(follow.places)
            whole.places, whole.sources = follow.places.ctypes.data, follow.sources.ctypes.data
        number = self._library.terrace_begin(ctypes.addressof(whole))
        alive = tokens, positions, wanted, choice, follow, fed
        self._begun = Begun(chosen, choice.told, busy_s, partial(self._library.terrace_wait, number), alive)
        return self._begun

    def _settle(self) -> None:
        if self._begun is not None:
            self._begun.wait()

    def _run(
        self, tokens: Tensor, positions: Tensor, attention: NativeAttention, wanted: Tensor, states: Tensor,
        logits: Tensor | None = None,
    ) -> None:  # fmt: skip
        self._settle()
        step, count = attention.address, len(wanted)
        fed = _Fed(
            tokens.data_ptr(), positions.data_ptr(), wanted.data_ptr(), count,
            None if logits is None else logits.data_ptr(),
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
