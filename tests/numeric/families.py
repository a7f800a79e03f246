"""Tiny random checkpoints of every supported family, from transformers, and a driver of our models over paged KV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from server.kernels.attention import BACKENDS, AttentionBackend, AttentionBatch
from server.kvcache.arena import allocate_arena
from server.models.base import Model
from server.registry import resolve
from server.types import BlockLayout

VOCAB = 256
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}

FAMILIES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama2": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 4}),
    "llama3.1": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3_ROPE, "head_dim": 32}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 24}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen2.5": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}),
}
"""The families named as supported; greedy decoding is compared on each."""

VARIANTS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama biases": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "llama linear rope": (
        LlamaConfig,
        LlamaForCausalLM,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "llama dynamic rope": (
        LlamaConfig,
        LlamaForCausalLM,
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "mistral without window": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen2.5 yarn": (Qwen2Config, Qwen2ForCausalLM, {"rope_parameters": YARN}),
    "qwen2 layer types": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {
            "use_sliding_window": True,
            "sliding_window": 10,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen3 tied, windows, biases": (
        Qwen3Config,
        Qwen3ForCausalLM,
        {
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 16,
            "max_window_layers": 2,
            "attention_bias": True,
        },
    ),
}
"""Further settings that checkpoints of these families use; logits are compared on each."""


def make_reference(name: str) -> PreTrainedModel:
    """A transformers model (eager attention, fp32) with seeded weights; gains and biases are random too."""
    config_class, model_class, differences = (FAMILIES | VARIANTS)[name]
    config = config_class(**{**BASE, **differences}, attn_implementation="eager")
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                parameter.copy_(values * 1.5 / parameter.shape[1] ** 0.5)
            else:  # a gain, which starts as one, or a bias, which starts as zero
                parameter.add_(values * 0.3)
    return model


def save(model: PreTrainedModel, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


@dataclass
class Paged:
    """Runs a model over a paged arena with shuffled frames, as the runner will: rows packed into flat batches."""

    model: Model
    backend: str = "cpu"
    block_tokens: int = 8
    kv_dtype: torch.dtype = torch.float32
    frames: int = 400
    tables: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        g = self.model.geometry
        layout = BlockLayout(g.layers, g.kv_heads, g.head_dim, self.kv_dtype.itemsize, self.block_tokens)
        arena = allocate_arena(self.frames, layout, self.kv_dtype)
        arena.fill_(float("nan"))
        self.free = np.random.default_rng(0).permutation(self.frames).tolist()
        self.attention: AttentionBackend = resolve("attention backend", BACKENDS, self.backend)(arena, g)

    def step(
        self, rows: Sequence[tuple[int, int, Sequence[int]]], *, everywhere: bool = False, wanted: Tensor | None = None
    ) -> Tensor:
        """Feeds rows of (sequence, start, tokens). Logits after each row's last token, after every token, or after
        those that are wanted."""
        lengths = [len(tokens) for _, _, tokens in rows]
        bounds = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
        starts = np.array([start for _, start, _ in rows], np.int32)
        contexts = starts + np.array(lengths, np.int32)
        tables = [self._table(sequence, int(n)) for (sequence, _, _), n in zip(rows, contexts, strict=True)]
        self.attention.plan(AttentionBatch(bounds, starts, contexts, tables))
        tokens = torch.tensor([token for row in rows for token in row[2]])
        positions = torch.cat([torch.arange(start, start + len(row)) for _, start, row in rows])
        if wanted is None:
            wanted = torch.arange(len(tokens)) if everywhere else torch.from_numpy(bounds[1:].astype(np.int64) - 1)
        return self.model.logits(self.model.forward(tokens, positions, self.attention, wanted))

    def logits(self, tokens: Sequence[int], chunk: int) -> Tensor:
        """Logits after every token of one new sequence, fed in chunks."""
        sequence = len(self.tables)
        pieces = range(0, len(tokens), chunk)
        return torch.cat([self.step([(sequence, i, tokens[i : i + chunk])], everywhere=True) for i in pieces])

    def greedy(self, prompts: Sequence[Sequence[int]], new_tokens: int, chunk: int) -> list[list[int]]:
        """Greedy continuations of prompts decoded together, prompts in chunks beside rows that already decode.

        Prompt i joins at step i, so that batches mix prefill chunks with decode rows of many lengths.
        """
        base = len(self.tables)
        texts = [list(prompt) for prompt in prompts]
        computed = [0] * len(prompts)
        clock = 0
        while any(len(text) < len(prompt) + new_tokens for text, prompt in zip(texts, prompts, strict=True)):
            clock += 1
            active = [i for i in range(min(clock, len(texts))) if len(texts[i]) < len(prompts[i]) + new_tokens]
            rows = [(base + i, computed[i], texts[i][computed[i] : computed[i] + chunk]) for i in active]
            best = self.step(rows).argmax(-1).tolist()
            for i, row, token in zip(active, rows, best, strict=True):
                computed[i] += len(row[2])
                if computed[i] == len(texts[i]):
                    texts[i].append(token)
        return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]

    def _table(self, sequence: int, tokens: int) -> np.ndarray:
        table = self.tables.setdefault(sequence, [])
        while len(table) * self.block_tokens < tokens:
            table.append(self.free.pop())
        return np.array(table, np.int32)
