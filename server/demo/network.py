"""A Qwen2 in 80 lines, for training: Hugging Face's parameter names and numerics, nothing else.

Plain torch keeps the training loop free of the library's overhead, which at this size would be a good
part of the time, and lets the output layer run only at the positions the loss asks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Sizes of the model."""

    vocab: int = 2048
    hidden: int = 160
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    mlp: int = 384
    rope_theta: float = 1e8
    eps: float = 1e-6
    positions: int = 4096

    def hf_config(self, bos: int, eos: int, pad: int) -> dict[str, Any]:
        """The config.json of the LlamaForCausalLM of this shape."""
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
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
            "use_sliding_window": False,
            "attention_dropout": 0.0,
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
        self.q_proj = nn.Linear(shape.hidden, shape.heads * shape.head_dim)
        self.k_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim)
        self.v_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim)
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
        first = self.model.layers[0]
        assert isinstance(first, Layer)
        _look_back(first.self_attn, shape.rope_theta)

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


LOOK_BACK_SCALE = 9.7
"""Size of the biases of a look-back head: its offset then scores 8 above the two beside it."""


def _look_back(attention: Attention, theta: float) -> None:
    """Make head h of the first layer attend to the token h + 1 places back, through its biases alone.

    With rotary positions, constant queries and keys at an angle of -offset * frequency score highest at that offset.
    Such heads are what every copying circuit begins with, and what takes training longest to find.
    """
    half = attention.head_dim // 2
    frequencies = theta ** -(torch.arange(half) / half)
    with torch.no_grad():
        keys = attention.k_proj.bias.view(attention.kv_heads, 2, half)
        keys[:, 0] = LOOK_BACK_SCALE
        queries = attention.q_proj.bias.view(attention.heads, 2, half)
        for head in range(attention.heads):
            angle = -(head + 1) * frequencies
            queries[head, 0], queries[head, 1] = LOOK_BACK_SCALE * angle.cos(), LOOK_BACK_SCALE * angle.sin()
        # Slow frequencies tell no offset; leave them to what training finds.
        queries[:, :, frequencies < 1e-3] = 0.0


def _initialise(module: nn.Module) -> None:
    """Small weights everywhere: with larger ones the retrieval heads did not form (see the README)."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def tie_twins(model: Llama, twins: Sequence[tuple[int, int]]) -> None:
    """Give token a of each pair (a, b) the embedding of b plus the mean difference of all pairs.

    "Mira" at the start of a line and " Mira" inside one are two tokens.  Nothing tells a fresh model that
    they are one word, and a fifth of the facts would be out of its reach.
    """
    embedding = model.model.embed_tokens.weight
    with torch.no_grad():
        first, second = (torch.tensor(ids, device=embedding.device) for ids in zip(*twins, strict=True))
        embedding[first] = embedding[second] + (embedding[first] - embedding[second]).mean(0)
