"""Models to compare servers with: random weights of a fixed seed, written as a checkpoint that every server loads.

The tokenizer is made up too: single bytes, then pairs and triples of letters and digits, so that any vocabulary size
can be had and nearly every token is text of its own. Needs numpy and safetensors, no torch.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

SEED = 20
STD = 0.02
BYTES = 256
SPECIALS = ("<|bos|>", "<|eos|>")
"""The last ids of the vocabulary."""
CONTEXT = 4096
LETTERS = string.ascii_letters + string.digits


@dataclass(frozen=True)
class Shape:
    """A dense decoder of one of two families."""

    name: str
    family: str
    """`llama` or `qwen3`."""
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocabulary: int
    tied: bool

    @property
    def token_ids(self) -> tuple[int, int]:
        """Ids that prompts are made of: no single bytes, no specials."""
        return BYTES, self.vocabulary - len(SPECIALS)

    @property
    def kv_values_per_token(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim

    def config(self) -> dict[str, Any]:
        """As in config.json."""
        name = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[self.family]
        return {
            "architectures": [name], "model_type": self.family, "hidden_size": self.hidden,
            "intermediate_size": self.inner, "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim, "vocab_size": self.vocabulary,
            "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu",
            "tie_word_embeddings": self.tied, "attention_bias": False, "mlp_bias": False, "torch_dtype": "float32",
            "bos_token_id": self.vocabulary - 2, "eos_token_id": self.vocabulary - 1,
        }  # fmt: skip

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and size of each, as Hugging Face names them."""
        wide, narrow = self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            yield prefix + "input_layernorm.weight", (self.hidden,)
            yield prefix + "self_attn.q_proj.weight", (wide, self.hidden)
            yield prefix + "self_attn.k_proj.weight", (narrow, self.hidden)
            yield prefix + "self_attn.v_proj.weight", (narrow, self.hidden)
            yield prefix + "self_attn.o_proj.weight", (self.hidden, wide)
            if self.family == "qwen3":
                yield prefix + "self_attn.q_norm.weight", (self.head_dim,)
                yield prefix + "self_attn.k_norm.weight", (self.head_dim,)
            yield prefix + "post_attention_layernorm.weight", (self.hidden,)
            yield prefix + "mlp.gate_proj.weight", (self.inner, self.hidden)
            yield prefix + "mlp.up_proj.weight", (self.inner, self.hidden)
            yield prefix + "mlp.down_proj.weight", (self.hidden, self.inner)
        yield "model.norm.weight", (self.hidden,)
        if not self.tied:
            yield "lm_head.weight", (self.vocabulary, self.hidden)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", "llama", 2, 128, 2, 1, 64, 256, 2048, tied=False),
        Shape("125m", "llama", 12, 768, 12, 4, 64, 2048, 32_000, tied=False),
        Shape("0.6b", "qwen3", 28, 1024, 16, 8, 128, 3072, 151_936, tied=True),
        Shape("0.6b-small", "qwen3", 28, 1024, 16, 8, 128, 3072, 32_000, tied=True),
    )
}
"""`tiny` only proves that everything runs; `0.6b-small` is Qwen3-0.6B with the vocabulary of a Llama."""


def write(shape: Shape, folder: Path) -> Path:
    """The checkpoint in float32, once: a folder that holds one is left as it is."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(shape.vocabulary, folder)
    save_file(dict(weights(shape)), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": shape.vocabulary - 1}), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(shape.config()), encoding="utf-8")
    return folder


def weights(shape: Shape) -> Iterator[tuple[str, np.ndarray]]:
    """The same ones every time."""
    rng = np.random.default_rng(SEED)
    for name, size in shape.tensors():
        values = rng.standard_normal(size, np.float32) * np.float32(STD)
        yield name, values + np.float32(1) if name.endswith("norm.weight") else values


INT8 = {
    "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {"group_0": {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
        "input_activations": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
    }},
}  # fmt: skip
"""vLLM computes int8 weights on a CPU with int8 activations only."""


def write_int8(shape: Shape, checkpoint: Path, folder: Path) -> Path:
    """The same weights in eight bits with a scale per row, in the form that vLLM reads; embedding and head stay."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, value in weights(shape):
        if "_proj." in name:
            scale = np.abs(value).max(1, keepdims=True) / np.float32(127)
            tensors[name.replace(".weight", ".weight_scale")] = scale
            value = np.rint(value / scale).astype(np.int8)
        tensors[name] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for path in checkpoint.glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "config.json").write_text(json.dumps(shape.config() | {"quantization_config": INT8}), encoding="utf-8")
    return folder


def write_tokenizer(vocabulary: int, folder: Path) -> None:
    """A byte-level BPE with `vocabulary` tokens."""
    names = byte_names()
    room = vocabulary - BYTES - len(SPECIALS)
    longer = list(islice(((left, right) for left, right in _longer()), room))
    assert len(longer) == room, f"{vocabulary} tokens are more than there are pairs and triples"
    vocab = {name: number for number, name in enumerate([*names, *(left + right for left, right in longer)])}
    specials = [{"id": len(vocab) + number, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
                 "normalized": False, "special": True} for number, name in enumerate(SPECIALS)]  # fmt: skip
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": specials, "normalizer": None,
        "pre_tokenizer": level, "post_processor": None, "decoder": level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": vocab,
                  "merges": [f"{left} {right}" for left, right in longer]},
    }  # fmt: skip
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIALS[0], "eos_token": SPECIALS[1],
                "model_max_length": CONTEXT}  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def _longer() -> Iterator[tuple[str, str]]:
    """Merges: a letter to a letter, then a pair to a letter."""
    yield from product(LETTERS, LETTERS)
    for first, second, third in product(LETTERS, repeat=3):
        yield first + second, third


def byte_names() -> list[str]:
    """How byte-level tokenizers write each byte: printable ones as themselves, the others from U+0100 on."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(BYTES)]
