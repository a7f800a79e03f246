"""The parts decoders are made of: linear maps, norms, rotary positions and the gated MLP.

At batch sizes of a CPU server most operations are small and dispatch (~3-5 us each) is a good part of a step, so each
part is written for few operations: projections that share an input are one matrix, queries and keys rotate together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from server.errors import ConfigError
from server.types import ModelGeometry


class Linear:
    """`y = x W^T + b`, W [out, in]. Parameters are uninitialised until a loader fills them."""

    __slots__ = ("bias", "weight")

    def __init__(self, inputs: int, outputs: int, bias: bool, dtype: torch.dtype, device: torch.device | str) -> None:
        self.weight = torch.empty(outputs, inputs, dtype=dtype, device=device)
        self.bias = torch.empty(outputs, dtype=dtype, device=device) if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        """x: [tokens, in] -> [tokens, out]."""
        return F.linear(x, self.weight, self.bias)

    def add_to(self, x: Tensor, onto: Tensor) -> Tensor:
        """`onto + self(x)`, [tokens, out]; `onto` may be written to."""
        return onto + self(x)

    def rows(self, ids: Tensor) -> Tensor:
        """W as a table: [n] -> [n, in]."""
        return F.embedding(ids, self.weight)

    def part(self, first: int, outputs: int) -> Tensor:
        """Where the weights of some outputs go, [outputs, in]."""
        return self.weight[first : first + outputs]

    def bias_part(self, first: int, outputs: int) -> Tensor | None:
        """Likewise their biases, [outputs]; None where there are none."""
        return None if self.bias is None else self.bias[first : first + outputs]


class Gated:
    """silu(gate) * up of one matrix [gate | up]: x [tokens, in] -> [tokens, inner]. `linear` is that matrix;
    `silu_mul`: see `TorchParts.silu_mul`."""

    __slots__ = ("_silu_mul", "linear")

    def __init__(self, linear: Any, silu_mul: Callable[[Tensor], Tensor]) -> None:
        self.linear, self._silu_mul = linear, silu_mul

    def __call__(self, x: Tensor) -> Tensor:
        return self._silu_mul(self.linear(x))

    def part(self, first: int, outputs: int) -> Any:
        return self.linear.part(first, outputs)

    def bias_part(self, first: int, outputs: int) -> Any:
        return self.linear.bias_part(first, outputs)


class RMSNorm:
    """Root-mean-square norm over the last axis with one gain per channel."""

    __slots__ = ("eps", "shape", "weight")

    def __init__(self, size: int, eps: float, dtype: torch.dtype, device: torch.device | str) -> None:
        self.weight = torch.empty(size, dtype=dtype, device=device)
        self.shape = (size,)
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.shape, self.weight, self.eps)


class Heads:
    """From a fused projection to queries, keys and values: the norms on queries and keys, where there are any, and the
    rotation by position. `gain` [2, head_dim]: of queries and of keys."""

    __slots__ = ("eps", "gain", "head_dim", "heads", "kv_heads")

    def __init__(self, geometry: ModelGeometry, eps: float, dtype: torch.dtype, device: torch.device | str,
                 *, norm: bool) -> None:  # fmt: skip
        self.heads, self.kv_heads, self.head_dim = geometry.heads, geometry.kv_heads, geometry.head_dim
        self.eps = eps
        self.gain = torch.empty(2, self.head_dim, dtype=dtype, device=device) if norm else None

    def __call__(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """qkv [tokens, (heads + 2 kv_heads) * head_dim], which may be written to, and the parts' `angles` of the tokens
        -> q [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim]."""
        rotated = self.heads + self.kv_heads
        split = qkv.view(-1, rotated + self.kv_heads, self.head_dim)
        qk = split[:, :rotated]
        if self.gain is not None:  # both are normed at once
            qk = F.rms_norm(qk, (self.head_dim,), None, self.eps)
            qk[:, : self.heads].mul_(self.gain[0])
            qk[:, self.heads :].mul_(self.gain[1])
        qk = rotate(qk, cos, sin)
        return qk[:, : self.heads], qk[:, self.heads :], split[:, rotated:]


@dataclass(frozen=True, slots=True)
class TorchParts:
    """Parts whose parameters are torch tensors of one dtype, in which they compute, too."""

    dtype: torch.dtype
    device: torch.device | str

    def linear(self, inputs: int, outputs: int, bias: bool = False) -> Linear:
        return Linear(inputs, outputs, bias, self.dtype, self.device)

    def head(self, inputs: int, vocab: int) -> Linear:
        """From states to logits; its rows may be looked up, too."""
        return self.linear(inputs, vocab)

    def gated(self, inputs: int, inner: int, bias: bool = False) -> Gated:
        return Gated(self.linear(inputs, 2 * inner, bias), self.silu_mul)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """[rows, 2 * inner] -> silu(first half) * second half."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def table(self, entries: int, size: int) -> Linear:
        """Rows that are looked up and no more."""
        return self.linear(size, entries)

    def norm(self, size: int, eps: float) -> RMSNorm:
        return RMSNorm(size, eps, self.dtype, self.device)

    def heads(self, geometry: ModelGeometry, eps: float, *, norm: bool) -> Heads:
        return Heads(geometry, eps, self.dtype, self.device, norm=norm)

    def angles(self, rotary: Rotary, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and signed sin as `rotate` takes them, [tokens, 1, head_dim] each."""
        cos, sin = rotary.angles(positions)
        return (
            torch.cat((cos, cos), dim=-1)[:, None, :].to(self.dtype),
            torch.cat((-sin, sin), dim=-1)[:, None, :].to(self.dtype),
        )

    def whole(self, decoder: Any) -> None:
        """Nothing does: torch computes part by part."""


class Rotary:
    """Rotary position embedding, half-split form (channel i is paired with channel i + head_dim / 2).

    The angles of a step are computed once from its positions and shared by all layers. That is a handful of small
    operations, so no table of `max_positions` rows is kept (64 MB for a 128k-token model).
    """

    def __init__(self, config: Any, head_dim: int, device: torch.device | str) -> None:
        frequencies, self.amplitude = rope_frequencies(config, head_dim)
        self.frequencies = frequencies.to(device)  # fp32 [head_dim / 2], radians per token

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of every position, fp32 [tokens, head_dim / 2] each."""
        angle = positions.to(torch.float32)[:, None] * self.frequencies
        cos, sin = angle.cos(), angle.sin()
        return (cos, sin) if self.amplitude == 1.0 else (cos * self.amplitude, sin * self.amplitude)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates every head of x [tokens, heads, head_dim] by what `TorchParts.angles` gives for its token."""
    half = x.shape[-1] // 2
    swapped = torch.cat((x[..., half:], x[..., :half]), dim=-1)
    return swapped.mul_(sin).addcmul_(x, cos)


def rope_parameters(config: Any) -> dict[str, Any]:
    """The RoPE settings of a transformers config as one flat dict.

    New form: `rope_parameters = {rope_type, rope_theta, ...}`. Older: `rope_theta` beside `rope_scaling = {type, ...}`.
    """
    given = getattr(config, "rope_parameters", None)
    if not given:
        given = dict(getattr(config, "rope_scaling", None) or {})
    settings = dict(given)
    settings["rope_type"] = settings.get("rope_type") or settings.get("type") or "default"
    if settings.get("rope_theta") is None:
        settings["rope_theta"] = getattr(config, "rope_theta", None) or 10000.0
    return settings


def rope_frequencies(config: Any, head_dim: int) -> tuple[Tensor, float]:
    """(frequencies fp32 [head_dim / 2], factor on cos and sin). Raises ConfigError for a RoPE type not supported.

    `dynamic` NTK equals `default` up to max_position_embeddings, and a request never gets beyond those; past them keys
    already cached would have to be rotated anew, which a prefix cache rules out.
    """
    settings = rope_parameters(config)
    partial = settings.get("partial_rotary_factor")
    if partial is not None and partial != 1.0:
        raise ConfigError(f"partial rotary embedding (partial_rotary_factor={partial}) is not supported")
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / (float(settings["rope_theta"]) ** exponents)
    kind = settings["rope_type"]
    try:
        if kind in ("default", "dynamic"):
            return plain, 1.0
        if kind == "linear":
            return plain / float(settings["factor"]), 1.0
        if kind == "llama3":
            return _llama3(plain, settings, config), 1.0
        if kind == "yarn":
            return _yarn(plain, settings, config, head_dim)
    except KeyError as missing:
        raise ConfigError(f"config.json: RoPE type {kind!r} needs the setting {missing}") from None
    raise ConfigError(f"RoPE type {kind!r} is not supported (there are: default, linear, dynamic, llama3, yarn)")


def _original_positions(settings: Mapping[str, Any], config: Any) -> float:
    return float(settings.get("original_max_position_embeddings") or config.max_position_embeddings)


def _llama3(plain: Tensor, settings: Mapping[str, Any], config: Any) -> Tensor:
    """Llama 3.1: waves longer than the original context are stretched by `factor`, short ones kept, a ramp between."""
    factor, low, high = (float(settings[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = _original_positions(settings, config) * plain / (2 * math.pi)  # full turns within the original context
    keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return plain * (keep + (1.0 - keep) / factor)


def _yarn(plain: Tensor, settings: Mapping[str, Any], config: Any, head_dim: int) -> tuple[Tensor, float]:
    """YaRN: channels that turn often are kept, those that turn seldom stretched by `factor`, a linear ramp between."""
    original, theta = _original_positions(settings, config), float(settings["rope_theta"])
    factor = float(settings.get("factor") or config.max_position_embeddings / original)

    def channel(turns: float) -> float:
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = channel(float(settings.get("beta_fast") or 32)), channel(float(settings.get("beta_slow") or 1))
    if settings.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = (high - low) or 0.001
    stretch = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0.0, 1.0)
    return plain * (1.0 - stretch) + plain / factor * stretch, _yarn_amplitude(settings, factor)


def _yarn_amplitude(settings: Mapping[str, Any], factor: float) -> float:
    def amplitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if settings.get("attention_factor") is not None:
        return float(settings["attention_factor"])
    if settings.get("mscale") and settings.get("mscale_all_dim"):
        return amplitude(settings["mscale"]) / amplitude(settings["mscale_all_dim"])
    return amplitude(1.0)
