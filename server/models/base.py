"""The model seam: what the runner and the loader need from a model family.

Knows tensors in, states and logits out; refuses to know requests, blocks, frames or sampling. Attention over the cache
comes in as a backend that has planned the step, so that a model never sees where keys and values live.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from server.kernels.native.decoder import Begun, Follow, Ints
from server.kernels.native.rows import Choice
from server.types import ModelGeometry


class Attention(Protocol):
    """What a model sees of an `AttentionBackend`."""

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor, /) -> Tensor:
        """q [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim], rotated; stores k and v and returns
        [tokens, heads * head_dim]. Called once for each layer, in order."""
        ...


class Parameter(Protocol):
    """Where the values of a checkpoint's tensor go: a view into a torch tensor, or rows of a packed matrix."""

    @property
    def shape(self) -> torch.Size: ...
    @property
    def nbytes(self) -> int: ...
    def numel(self) -> int: ...
    def copy_(self, values: Tensor, /) -> Any:
        """Takes the values, of the same shape and any float dtype."""
        ...


class Parts(Protocol):
    """What a decoder is made of; `layers.TorchParts` says what each does. `dtype`: of the cache, unless another is
    asked for."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device | str: ...
    def linear(self, inputs: int, outputs: int, bias: bool = False) -> Any: ...
    def head(self, inputs: int, vocab: int) -> Any: ...
    def gated(self, inputs: int, inner: int, bias: bool = False) -> Any: ...
    def table(self, entries: int, size: int) -> Any: ...
    def norm(self, size: int, eps: float) -> Any: ...
    def heads(self, geometry: ModelGeometry, eps: float, *, norm: bool) -> Any: ...
    def angles(self, rotary: Any, positions: Tensor) -> tuple[Tensor, Tensor]: ...
    def whole(self, decoder: Any) -> Whole | None:
        """What computes a whole step of the decoder at once, made of its parts, where there is something that does."""
        ...


class Whole(Protocol):
    """`forward`, `scores` and `launch`, in one call each."""

    def takes(self, attention: Attention, /) -> bool: ...
    def __call__(self, tokens: Tensor, positions: Tensor, attention: Any, wanted: Tensor, /) -> Tensor: ...
    def scores(self, tokens: Tensor, positions: Tensor, attention: Any, wanted: Tensor, /) -> Tensor: ...
    def launch(
        self, tokens: Ints, positions: Ints, attention: Any, wanted: Ints, choice: Choice,
        follow: Follow | None, wakes: int, /,
    ) -> Begun: ...  # fmt: skip


class Model(Protocol):
    """A decoder-only language model. Device thread only, once loaded."""

    geometry: ModelGeometry
    dtype: torch.dtype

    @classmethod
    def build(cls, config: Any, parts: Parts) -> Self:
        """A model with uninitialised parameters from a transformers config. ConfigError for what it cannot do."""
        ...

    def parameters(self) -> Mapping[str, Parameter]:
        """Checkpoint tensor name -> where its values go. Together they cover all."""
        ...

    def fused(self) -> Mapping[str, Sequence[str]]:
        """Names under which a checkpoint may carry several of `parameters()` stacked along the first axis, in order."""
        ...

    def forward(self, tokens: Tensor, positions: Tensor, attention: Attention, wanted: Tensor) -> Tensor:
        """One step over the flat batch `tokens` int64 [n] at absolute `positions` int64 [n].

        `attention` has planned it. `wanted` int64 [m]: the rows of the batch whose final states the caller needs, in
        any order.
        Returns their hidden states after the final norm, [m, hidden] of `dtype`.
        """
        ...

    def logits(self, states: Tensor) -> Tensor:
        """What comes next after `states` [m, hidden] of `forward`: float32 [m, vocab]."""
        ...

    def scores(self, tokens: Tensor, positions: Tensor, attention: Attention, wanted: Tensor) -> Tensor:
        """The `logits` of `forward`."""
        ...

    def launches(self, attention: Attention) -> bool:
        """Whether it can `launch` steps that attend by this."""
        ...

    def launch(
        self, tokens: Ints, positions: Ints, attention: Attention, wanted: Ints, choice: Choice,
        follow: Follow | None, wakes: int,
    ) -> Begun:  # fmt: skip
        """The tokens chosen by these, as `choice` says, and what it wants to be told of them, of a step that is
        computed behind the ones launched before; `attention` may plan one more meanwhile. Any other call waits for what
        was launched. The file `wakes` gets a byte when it has ended, unless it is -1."""
        ...
