"""A Llama in 80 lines, for training: Hugging Face's parameter names and numerics, nothing else.

Plain torch keeps the training loop free of the library's overhead, which at this size would be a good
part of the time, and lets the output layer run only at the positions the loss asks for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Sizes of the model."""

    vocab: int = 2048
    hidden: int = 128
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    mlp: int = 384
    rope_theta: float = 100000.0
    eps: float = 1e-6
    positions: int = 4096

    def hf_config(self, bos: int, eos: int, pad: int) -> dict[str, Any]:
        """The config.json of the LlamaForCausalLM of this shape."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.positions,
            "rms_norm_eps": self.eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": None,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "initializer_range": 0.02,
            "use_cache": True,
            "bos_token_id": bos,
            "eos_token_id": eos,
            "pad_token_id": pad,
            "torch_dtype": "float32",
        }


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = shape.heads, shape.kv_heads, shape.head_dim
        self.q_proj = nn.Linear(shape.hidden, shape.heads * shape.head_dim, bias=False)
        self.k_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.v_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.o_proj = nn.Linear(shape.heads * shape.head_dim, shape.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        group = self.heads // self.kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


class MLP(nn.Module):
    """The gated feed-forward layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.mlp, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.mlp, bias=False)
        self.down_proj = nn.Linear(shape.mlp, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """A transformer layer: normalise, attend, add; normalise, feed forward, add."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = MLP(shape)
        self.input_layernorm = nn.RMSNorm(shape.hidden, shape.eps)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden, shape.eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class _Body(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, shape.eps)


class Llama(nn.Module):
    """The language model; its output layer is its embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = _Body(shape)
        self.apply(_initialise)

    def hidden(self, tokens: Tensor) -> Tensor:
        """Final hidden states, batch x length x hidden."""
        x = self.model.embed_tokens(tokens)
        cos, sin = self._rope(tokens.shape[1], tokens.device)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token for any number of hidden states."""
        return F.linear(hidden, self.model.embed_tokens.weight)

    def _rope(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        exponents = torch.arange(0, self.shape.head_dim, 2, device=device).float() / self.shape.head_dim
        angles = torch.outer(torch.arange(length, device=device).float(), self.shape.rope_theta**-exponents)
        return angles.cos(), angles.sin()


def widened(model: Llama) -> Llama:
    """The same function with heads twice as wide, the new half free of position.

    Twice the width and the square of the RoPE base leave the old rotations as they are and add dimensions
    that turn so slowly that they hardly know a position: what a head needs to match words across
    thousands of tokens.  The new output columns start at zero, so nothing changes until training goes on.
    """
    old = model.shape
    shape = replace(old, head_dim=2 * old.head_dim, rope_theta=old.rope_theta**2)
    wide = Llama(shape).to(model.model.embed_tokens.weight.device)
    source = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in wide.named_parameters():
            parameter.copy_(_widen(name, parameter, source[name], old.head_dim))
    return wide


def _widen(name: str, new: Tensor, old: Tensor, width: int) -> Tensor:
    """The old weight inside the new shape; ``width`` is the old head's."""
    if new.shape == old.shape:
        return old
    if name.endswith("o_proj.weight"):
        grown = torch.zeros_like(new).view(new.shape[0], -1, 2 * width)
        grown[..., :width] = old.view(old.shape[0], -1, width)
        return grown.view(new.shape)
    grown = new.clone().view(-1, 2 * width, new.shape[1])
    was = old.view(-1, width, old.shape[1])
    if name.endswith("v_proj.weight"):
        grown[:, :width] = was
    else:  # queries and keys: a rotation pairs dimension i with i + half the width
        scale = 2**0.5 if name.endswith("q_proj.weight") else 1.0  # attention divides by the root of the width
        grown[:, : width // 2] = was[:, : width // 2] * scale
        grown[:, width : width + width // 2] = was[:, width // 2 :] * scale
    return grown.view(new.shape)


def _initialise(module: nn.Module) -> None:
    """Small weights everywhere: with larger ones the retrieval heads did not form (see the README)."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
