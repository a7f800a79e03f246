"""How large everything is that is measured, and what it must cost: the shape of Llama-3-8B, and a tiny one to dry-run.

Knows shapes, bytes and operations; refuses to know devices and clocks.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import server.demo
from server.kvcache.step_cost import pairs_of
from server.types import BlockLayout, ModelGeometry

TOKENIZER = Path(server.demo.__file__).parent / "model"
GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """A Llama without biases, its embedding not tied to its head."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    positions: int

    @property
    def matrix_values(self) -> int:
        """Weights that every token is multiplied with, the head left out."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.inner)

    @property
    def head_values(self) -> int:
        return self.vocab * self.hidden

    def geometry(self, layers: int) -> ModelGeometry:
        """Of the first so many layers, as attention sees them."""
        return ModelGeometry(
            layers, self.hidden, self.heads, self.kv_heads, self.head_dim, self.vocab, self.positions,
            self.head_dim**-0.5, (None,) * layers,
        )  # fmt: skip

    def layout(self, layers: int, block_tokens: int, itemsize: int) -> BlockLayout:
        return BlockLayout(layers, self.kv_heads, self.head_dim, itemsize, block_tokens)

    def decode_bytes(self, rows: int, context: int, itemsize: int, code_bytes: int | None = None) -> int:
        """What a decode step must read: all weights but the embedding, and the cache of all rows. `code_bytes`: of
        those of quantised weights; the head has none."""
        kv = rows * context * 2 * self.layers * self.kv_heads * self.head_dim
        return self.matrix_values * (code_bytes or itemsize) + (self.head_values + kv) * itemsize

    def attention_flops(self, layers: int, start: int, tokens: int) -> float:
        """Causal attention of `tokens` queries behind `start` others: QK and PV, a multiplication and an addition."""
        return 4.0 * self.head_dim * self.heads * layers * pairs_of(start, tokens)

    def prefill_flops(self, tokens: int) -> float:
        """A whole prompt of which one token is sampled."""
        matrices = 2.0 * (self.matrix_values * tokens + self.head_values)
        return matrices + self.attention_flops(self.layers, 0, tokens)

    def write(self, folder: Path, dtype: str) -> None:
        """config.json for `load_format=dummy`, and the demo model's tokenizer, whose tokens are its first ones."""
        config = {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": self.hidden,
            "intermediate_size": self.inner, "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim, "vocab_size": self.vocab,
            "max_position_embeddings": self.positions, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
            "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": dtype, "bos_token_id": 0,
            "eos_token_id": 2,
        }  # fmt: skip
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            shutil.copy(TOKENIZER / name, folder / name)
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


@dataclass(frozen=True)
class Sizes:
    """All lengths in tokens, all `_gib` in GiB."""

    shape: Shape
    times: int
    """Of one measurement, of which the median counts."""
    memory_gib: float
    """Copied within the device, for its bandwidth."""
    matrix: int
    """Rows and columns of the square matrices whose product is timed."""
    link_gib: float
    pinned_gib: float
    disk_gib: float
    pool_gib: float
    """Cache that attention reads at most; tables of larger batches name its blocks several times."""
    block_tokens: tuple[int, int]
    """As the daemon has it, and larger ones beside it."""
    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    prefixes: tuple[int, ...]
    """Before a chunk of a prompt."""
    chunks: tuple[int, ...]
    """Of prompts: as the daemon has it, and others."""
    prompts: tuple[int, ...]
    steps: int
    """Of decode, in one measurement."""
    moving_gib: float
    """Blocks that come and go while others decode."""
    device_gib: float
    dram_gib: float
    ssd_gib: float
    prefix: int
    """Found in DRAM."""
    ssd_prefix: int
    slow_bytes_per_s: float
    """A disk at which computing is faster."""
    lengths: tuple[int, ...]
    """Among which loading begins to pay."""
    streams: int
    output: int
    """Of a stream."""
    peer_requests: int
    peer_prompt: int
    peer_output: int

    def decode_cases(self) -> Iterator[tuple[int, int]]:
        """(rows, context) of attention."""
        for rows in self.rows:
            for context in self.contexts:
                yield rows, context


LLAMA_8B = Shape(
    layers=32, hidden=4096, inner=14336, heads=32, kv_heads=8, head_dim=128, vocab=128_256, positions=65_536
)  # fmt: skip
FULL = Sizes(
    shape=LLAMA_8B, times=20, memory_gib=4, matrix=8192, link_gib=4, pinned_gib=4, disk_gib=1, pool_gib=24,
    block_tokens=(16, 64), rows=(1, 32, 128), contexts=(2048, 8192), prefixes=(0, 8192, 32_768), chunks=(2048, 8192),
    prompts=(2048, 8192, 32_768), steps=300, moving_gib=1, device_gib=24, dram_gib=12, ssd_gib=12, prefix=32_768,
    ssd_prefix=4096, slow_bytes_per_s=0.5e9, lengths=(32, 64, 128, 256, 512, 1024, 2048), streams=256, output=200,
    peer_requests=32, peer_prompt=512, peer_output=64,
)  # fmt: skip
DRY = Sizes(
    shape=Shape(layers=2, hidden=128, inner=128, heads=2, kv_heads=1, head_dim=64, vocab=3000, positions=1024),
    times=2, memory_gib=2**-10, matrix=64, link_gib=2**-8, pinned_gib=2**-7, disk_gib=2**-8, pool_gib=2**-8,
    block_tokens=(16, 32), rows=(1, 3), contexts=(40,), prefixes=(0, 48), chunks=(32, 64), prompts=(48, 96), steps=12,
    moving_gib=2**-8, device_gib=2**-6, dram_gib=2**-6, ssd_gib=2**-4, prefix=256, ssd_prefix=128,
    slow_bytes_per_s=1e7, lengths=(32, 64), streams=4, output=8, peer_requests=2, peer_prompt=16, peer_output=4,
)  # fmt: skip
