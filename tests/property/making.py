"""What the machines and the unit tests of the core are made of: small KV managers and made-up step results."""

from __future__ import annotations

from typing import Any

from server.kvcache.manager import KVManager, TierSpec
from server.types import DEVICE, DRAM, SSD, BlockLayout, StepPlan, StepResult, TokenLogprobs


def make_kv(
    frames: int, *lower: int, block_tokens: int = 2, eviction: str = "lru", in_flight_max: int = 8, **settings: Any
) -> KVManager:
    """`lower`: frames of DRAM and SSD, as far as there are such tiers (0: there is none)."""
    sizes = zip((DEVICE, DRAM, SSD), (frames, *lower), strict=False)
    tiers = [TierSpec(name, size, eviction, in_flight_max) for name, size in sizes if size]
    return KVManager(BlockLayout(1, 1, 1, 8, block_tokens), tiers, b"model", **({"spill_pace_s": 0.0} | settings))


def sampled(position: int, prompt_tokens: int) -> int:
    """The token at `position`: repetitive, so that answers of siblings make the same blocks."""
    return (position * 5 + prompt_tokens) % 4


def made_up(plan: StepPlan) -> StepResult:
    """A result with one token for each row that samples and one score for each target."""
    tokens = [sampled(row.sample.position, row.sample.prompt_tokens) if row.sample else None for row in plan.rows]
    scores = [
        None if row.prompt_logprobs is None else [TokenLogprobs(t, -1.0, 1) for t in row.targets or ()]
        for row in plan.rows
    ]
    return StepResult(plan.id, tokens, [None] * len(tokens), scores, 0.0, 0.0)
