"""What a machine costs, for replays: seconds of a step, of a transfer, and bytes of KV per token.

A step reads all weights once, or computes for longer than that; attention over the context is computed in a prefill and
read in a decode:

    step = base + max(weights, token * tokens + pair * (query, key) pairs of prefills) + context * tokens of decodes
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.errors import ConfigError
from server.kvcache.step_cost import StepWork, pairs_of


@dataclass(frozen=True, slots=True)
class Link:
    """One direction between two tiers."""

    bytes_per_s: float
    latency_s: float


@dataclass(frozen=True, slots=True)
class Profile:
    """A model on a machine. Seconds and bytes."""

    name: str
    kv_bytes_per_token: int
    base_s: float
    weights_s: float
    token_s: float
    pair_s: float
    context_s: float
    """Per token of a decoding row's context."""
    dram: Link
    """Between device and DRAM, each way at the same time."""
    ssd_read: Link
    ssd_write: Link
    request_s: float = 0.0
    """Of a request outside of all steps: HTTP, tokenizer."""

    def step_s(self, work: StepWork) -> float:
        """Seconds of one step."""
        compute_s = self.token_s * work.tokens + self.pair_s * work.pairs
        return self.base_s + max(self.weights_s, compute_s) + self.context_s * work.context

    def prefill(self, cached: int, length: int) -> StepWork:
        """A prompt of `length` tokens alone in one step, of which `cached` are there."""
        return StepWork(length - cached, pairs_of(cached, length - cached))


PRESETS = {
    # 8B parameters, 32 layers, 8 KV heads of 128, bf16: 2 * 8e9 FLOP a token and 4 * 32 * 4096 a pair, at 55 % of the
    # 790 TFLOP/s that were measured; 16 GB of weights and 131,072 B of KV a token at 4 TB/s.
    "h200-8b": Profile(
        "h200-8b", 131_072, base_s=0.001, weights_s=0.004, token_s=36.8e-6, pair_s=1.2e-9, context_s=33e-9,
        dram=Link(50e9, 50e-6), ssd_read=Link(6e9, 200e-6), ssd_write=Link(3e9, 200e-6),
    ),
    # The packaged demo model on one core.
    "cpu-demo": Profile(
        "cpu-demo", 3_072, base_s=0.0006, weights_s=0.0, token_s=42e-6, pair_s=12e-9, context_s=60e-9,
        dram=Link(2e9, 300e-6), ssd_read=Link(1e9, 1e-3), ssd_write=Link(0.5e9, 1e-3),
    ),
}  # fmt: skip


def load_profile(name: str) -> Profile:
    """A preset by its name, or a JSON file with the fields of `Profile`. ConfigError names what is wrong."""
    if name in PRESETS:
        return PRESETS[name]
    try:
        values: dict[str, Any] = json.loads(Path(name).read_text(encoding="utf-8"))
        links: dict[str, Any] = {key: Link(**values.pop(key)) for key in ("dram", "ssd_read", "ssd_write")}
        return Profile(**values, **links)
    except OSError as error:
        raise ConfigError(
            f"profile {name}: there are {', '.join(PRESETS)}, or a JSON file: {error.strerror}", param="profile"
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        fields = ", ".join(field.name for field in dataclasses.fields(Profile))
        raise ConfigError(f"profile {name}: {error}; the fields are {fields}", param="profile") from error
