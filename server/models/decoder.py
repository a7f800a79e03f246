"""The decoder that the Llama-like families share: pre-norm blocks of grouped-query attention and a gated MLP.

A family differs only in its `DecoderSpec` (biases, norms on queries and keys, windows); it lives in its own file that
turns a transformers config into one. Projections that share an input are stored as one matrix: q, k, v and gate, up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from server.errors import ConfigError
from server.models.base import Attend
from server.models.layers import Linear, RMSNorm, Rotary, rotate, silu_gate
from server.types import ModelGeometry


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """What distinguishes one family, or one checkpoint of it, from another."""

    geometry: ModelGeometry
    inner: int
    """Width of the MLP's hidden layer."""
    norm_eps: float
    tied_embeddings: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False


def decoder_spec(config: Any, windows: tuple[int | None, ...], **differences: bool) -> DecoderSpec:
    """The spec of a Llama-like transformers config. Raises ConfigError if its activation is not SwiGLU's."""
    activation = getattr(config, "hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ConfigError(f"hidden_act {activation!r} is not supported (only silu)")
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    geometry = ModelGeometry(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=head_dim,
        vocab=config.vocab_size,
        max_positions=config.max_position_embeddings,
        scale=head_dim**-0.5,
        windows=windows,
    )
    if geometry.heads % geometry.kv_heads:
        raise ConfigError(f"{geometry.heads} attention heads cannot share {geometry.kv_heads} key/value heads evenly")
    return DecoderSpec(
        geometry, config.intermediate_size, config.rms_norm_eps, config.tie_word_embeddings, **differences
    )


def layer_windows(config: Any) -> tuple[int | None, ...]:
    """Sliding window of each layer, from a config's `layer_types` and `sliding_window`."""
    windows: list[int | None] = []
    for kind in config.layer_types:
        if kind not in ("full_attention", "sliding_attention"):
            raise ConfigError(f"layer type {kind!r} is not supported (there are: full_attention, sliding_attention)")
        if kind == "sliding_attention" and config.sliding_window is None:
            raise ConfigError("config.json has sliding_attention layers but no sliding_window")
        windows.append(config.sliding_window if kind == "sliding_attention" else None)
    return tuple(windows)


class Layer:
    """Parameters of one decoder layer."""

    __slots__ = ("attention_norm", "down", "gate_up", "mlp_norm", "output", "qk_gain", "qkv")

    def __init__(self, spec: DecoderSpec, dtype: torch.dtype, device: torch.device | str) -> None:
        g = spec.geometry
        self.attention_norm = RMSNorm(g.hidden, spec.norm_eps, dtype, device)
        self.qkv = Linear(g.hidden, (g.heads + 2 * g.kv_heads) * g.head_dim, spec.qkv_bias, dtype, device)
        self.output = Linear(g.heads * g.head_dim, g.hidden, spec.output_bias, dtype, device)
        self.mlp_norm = RMSNorm(g.hidden, spec.norm_eps, dtype, device)
        self.gate_up = Linear(g.hidden, 2 * spec.inner, spec.mlp_bias, dtype, device)
        self.down = Linear(spec.inner, g.hidden, spec.mlp_bias, dtype, device)
        # One gain per channel for queries and one for keys, expanded over heads so that both are normed at once.
        self.qk_gain = torch.empty(2, g.head_dim, dtype=dtype, device=device) if spec.qk_norm else None


class Decoder:
    """A `Model`. A family is a subclass that says how a config becomes a spec."""

    def __init__(self, spec: DecoderSpec, rotary: Rotary, dtype: torch.dtype, device: torch.device | str) -> None:
        g = spec.geometry
        self.spec, self.geometry, self.dtype, self.rotary = spec, g, dtype, rotary
        self.embedding = torch.empty(g.vocab, g.hidden, dtype=dtype, device=device)
        self.layers = [Layer(spec, dtype, device) for _ in range(g.layers)]
        self.norm = RMSNorm(g.hidden, spec.norm_eps, dtype, device)
        self.head = Linear(g.hidden, g.vocab, False, dtype, "meta" if spec.tied_embeddings else device)
        if spec.tied_embeddings:
            self.head.weight = self.embedding

    @staticmethod
    def read_config(config: Any) -> DecoderSpec:
        raise NotImplementedError

    @classmethod
    def build(cls, config: Any, dtype: torch.dtype, device: torch.device | str) -> Self:
        spec = cls.read_config(config)
        return cls(spec, Rotary(config, spec.geometry.head_dim, device), dtype, device)

    def parameters(self) -> Mapping[str, Tensor]:
        named = {"model.embed_tokens.weight": self.embedding, "model.norm.weight": self.norm.weight}
        if not self.spec.tied_embeddings:
            named["lm_head.weight"] = self.head.weight
        for index, layer in enumerate(self.layers):
            named.update(self._layer_parameters(f"model.layers.{index}.", layer))
        return named

    def fused(self) -> Mapping[str, Sequence[str]]:
        stacks = {}
        for index in range(self.geometry.layers):
            for whole, parts in (("self_attn.qkv", ("q", "k", "v")), ("mlp.gate_up", ("gate", "up"))):
                block = f"model.layers.{index}.{whole.split('.')[0]}."
                for kind in ("weight", "bias"):
                    stacks[f"model.layers.{index}.{whole}_proj.{kind}"] = [f"{block}{p}_proj.{kind}" for p in parts]
        return stacks

    def _layer_parameters(self, prefix: str, layer: Layer) -> Iterator[tuple[str, Tensor]]:
        g = self.geometry
        widths = {"q": g.heads * g.head_dim, "k": g.kv_heads * g.head_dim, "v": g.kv_heads * g.head_dim}
        inner = {"gate": self.spec.inner, "up": self.spec.inner}
        yield prefix + "input_layernorm.weight", layer.attention_norm.weight
        yield prefix + "post_attention_layernorm.weight", layer.mlp_norm.weight
        yield from _stacked(prefix + "self_attn.", layer.qkv, widths)
        yield from _stacked(prefix + "self_attn.", layer.output, {"o": g.hidden})
        yield from _stacked(prefix + "mlp.", layer.gate_up, inner)
        yield from _stacked(prefix + "mlp.", layer.down, {"down": g.hidden})
        if layer.qk_gain is not None:
            yield prefix + "self_attn.q_norm.weight", layer.qk_gain[0]
            yield prefix + "self_attn.k_norm.weight", layer.qk_gain[1]

    @torch.inference_mode()
    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend, wanted: Tensor) -> Tensor:
        x = F.embedding(tokens, self.embedding)  # [tokens, hidden]
        cos, sin = self.rotary.angles(positions, self.dtype)
        last = self.geometry.layers - 1
        for index, layer in enumerate(self.layers):
            attended = self._attention(index, layer, x, cos, sin, attend)
            if (
                index == last
            ):  # past the last cache write only the wanted rows matter: a prefill chunk saves most of a layer
                x, attended = x.index_select(0, wanted), attended.index_select(0, wanted)
            x = x + layer.output(attended)
            x = x + layer.down(silu_gate(layer.gate_up(layer.mlp_norm(x))))
        return self.norm(x)

    @torch.inference_mode()
    def logits(self, states: Tensor) -> Tensor:
        return self.head(states).float()

    def _attention(self, index: int, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        g = self.geometry
        qkv = layer.qkv(layer.attention_norm(x)).view(-1, g.heads + 2 * g.kv_heads, g.head_dim)
        qk, v = qkv[:, : g.heads + g.kv_heads], qkv[:, g.heads + g.kv_heads :]
        if layer.qk_gain is not None:
            qk = self._qk_norm(qk, layer.qk_gain)
        qk = rotate(qk, cos, sin)
        return attend(index, qk[:, : g.heads], qk[:, g.heads :], v)

    def _qk_norm(self, qk: Tensor, gain: Tensor) -> Tensor:
        g = self.geometry
        normed = F.rms_norm(qk, (g.head_dim,), None, self.spec.norm_eps)
        normed[:, : g.heads].mul_(gain[0])
        normed[:, g.heads :].mul_(gain[1])
        return normed


def _stacked(prefix: str, linear: Linear, widths: Mapping[str, int]) -> Iterator[tuple[str, Tensor]]:
    """Views of a fused linear's rows, under the names of the projections they hold."""
    start = 0
    for name, width in widths.items():
        yield f"{prefix}{name}_proj.weight", linear.weight[start : start + width]
        if linear.bias is not None:
            yield f"{prefix}{name}_proj.bias", linear.bias[start : start + width]
        start += width
