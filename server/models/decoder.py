"""The decoder that the Llama-like families share: pre-norm blocks of grouped-query attention and a gated MLP.

A family differs only in its `DecoderSpec` (biases, norms on queries and keys, windows); it lives in its own file that
turns a transformers config into one. Projections that share an input are stored as one matrix: q, k, v and gate, up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from server.errors import ConfigError
from server.kernels.native.decoder import Begun, Follow, Ints
from server.kernels.native.rows import Choice
from server.models.base import Attention, Parameter, Parts
from server.models.layers import Rotary
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

    __slots__ = ("attention_norm", "down", "gate_up", "heads", "mlp_norm", "output", "qkv")

    def __init__(self, spec: DecoderSpec, parts: Parts) -> None:
        g = spec.geometry
        self.attention_norm = parts.norm(g.hidden, spec.norm_eps)
        self.qkv = parts.linear(g.hidden, (g.heads + 2 * g.kv_heads) * g.head_dim, spec.qkv_bias)
        self.heads = parts.heads(g, spec.norm_eps, norm=spec.qk_norm)
        self.output = parts.linear(g.heads * g.head_dim, g.hidden, spec.output_bias)
        self.mlp_norm = parts.norm(g.hidden, spec.norm_eps)
        self.gate_up = parts.gated(g.hidden, spec.inner, spec.mlp_bias)
        self.down = parts.linear(spec.inner, g.hidden, spec.mlp_bias)


class Decoder:
    """A `Model`. A family is a subclass that says how a config becomes a spec."""

    def __init__(self, spec: DecoderSpec, rotary: Rotary, parts: Parts) -> None:
        g = spec.geometry
        self.spec, self.geometry, self.dtype, self.rotary, self._parts = spec, g, parts.dtype, rotary, parts
        self.head = parts.head(g.hidden, g.vocab)
        self.embedding = self.head if spec.tied_embeddings else parts.table(g.vocab, g.hidden)
        self.layers = [Layer(spec, parts) for _ in range(g.layers)]
        self.norm = parts.norm(g.hidden, spec.norm_eps)
        self._whole = parts.whole(self)

    @staticmethod
    def read_config(config: Any) -> DecoderSpec:
        raise NotImplementedError

    @classmethod
    def build(cls, config: Any, parts: Parts) -> Self:
        spec = cls.read_config(config)
        return cls(spec, Rotary(config, spec.geometry.head_dim, parts.device), parts)

    def parameters(self) -> Mapping[str, Parameter]:
        vocab = self.geometry.vocab
        named: dict[str, Parameter] = {
            "model.embed_tokens.weight": self.embedding.part(0, vocab),
            "model.norm.weight": self.norm.weight,
        }
        if not self.spec.tied_embeddings:
            named["lm_head.weight"] = self.head.part(0, vocab)
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

    def _layer_parameters(self, prefix: str, layer: Layer) -> Iterator[tuple[str, Parameter]]:
        g = self.geometry
        widths = {"q": g.heads * g.head_dim, "k": g.kv_heads * g.head_dim, "v": g.kv_heads * g.head_dim}
        inner = {"gate": self.spec.inner, "up": self.spec.inner}
        yield prefix + "input_layernorm.weight", layer.attention_norm.weight
        yield prefix + "post_attention_layernorm.weight", layer.mlp_norm.weight
        yield from _stacked(prefix + "self_attn.", layer.qkv, widths)
        yield from _stacked(prefix + "self_attn.", layer.output, {"o": g.hidden})
        yield from _stacked(prefix + "mlp.", layer.gate_up, inner)
        yield from _stacked(prefix + "mlp.", layer.down, {"down": g.hidden})
        if layer.heads.gain is not None:
            yield prefix + "self_attn.q_norm.weight", layer.heads.gain[0]
            yield prefix + "self_attn.k_norm.weight", layer.heads.gain[1]

    def forward(self, tokens: Tensor, positions: Tensor, attention: Attention, wanted: Tensor) -> Tensor:
        if self._whole is not None and self._whole.takes(attention):
            return self._whole(tokens, positions, attention, wanted)
        cos, sin = self._parts.angles(self.rotary, positions)
        x = self.embedding.rows(tokens)  # [tokens, hidden]
        last = self.geometry.layers - 1
        for index, layer in enumerate(self.layers):
            attended = attention.run(index, *layer.heads(layer.qkv(layer.attention_norm(x)), cos, sin))
            # Past the last cache write only the wanted rows matter: a prefill chunk saves most of a layer.
            if index == last:
                if not len(wanted):  # of a prompt that goes on in the next step: kernels refuse to do nothing
                    return x[:0]
                x, attended = x.index_select(0, wanted), attended.index_select(0, wanted)
            x = layer.output.add_to(attended, x)
            x = layer.down.add_to(layer.gate_up(layer.mlp_norm(x)), x)
        return self.norm(x)

    def logits(self, states: Tensor) -> Tensor:
        return self.head(states).float()

    def scores(self, tokens: Tensor, positions: Tensor, attention: Attention, wanted: Tensor) -> Tensor:
        if self._whole is None or not self._whole.takes(attention):
            return self.logits(self.forward(tokens, positions, attention, wanted))
        return self._whole.scores(tokens, positions, attention, wanted)

    def launches(self, attention: Attention) -> bool:
        return self._whole is not None and self._whole.takes(attention)

    def launch(
        self, tokens: Ints, positions: Ints, attention: Attention, wanted: Ints, choice: Choice,
        follow: Follow | None, wakes: int,
    ) -> Begun:  # fmt: skip
        assert self._whole is not None, "nothing computes steps by themselves"
        return self._whole.launch(tokens, positions, attention, wanted, choice, follow, wakes)


def _stacked(prefix: str, linear: Any, widths: Mapping[str, int]) -> Iterator[tuple[str, Parameter]]:
    """Places of a fused linear's rows, under the names of the projections they hold."""
    start = 0
    for name, width in widths.items():
        yield f"{prefix}{name}_proj.weight", linear.part(start, width)
        bias = linear.bias_part(start, width)
        if bias is not None:
            yield f"{prefix}{name}_proj.bias", bias
        start += width
