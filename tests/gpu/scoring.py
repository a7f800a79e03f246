"""Daemons on a GPU, what they think of a text, token by token, and how far two of them may differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from server.build import Daemon
from server.engine import GenerateSpec
from server.types import SamplingParams, TokenLogprobs

TOKENS = 12
"""Of an answer that is compared."""
GREEDY = SamplingParams(max_tokens=TOKENS, temperature=0)
BOUND = 0.5
"""Of a log-probability in bfloat16. On a CPU, with attention in fp32, the largest error over these texts is 0.19."""
FP32: dict[str, Any] = {
    "model__device": "cuda", "model__dtype": "float32", "model__attention": "sdpa", "kv__device_gib": "24MiB",
}  # fmt: skip
BF16: dict[str, Any] = FP32 | {"model__dtype": "bfloat16", "model__attention": "flashinfer"}
"""The demo model, 512 blocks of float32 or 1,024 of bfloat16."""


async def scored(daemon: Daemon, text: Sequence[int]) -> list[TokenLogprobs]:
    """Of every token of `text` but the first: its log-probability, and the two likeliest in its place."""
    stream = daemon.engine.submit(GenerateSpec(text, SamplingParams(1, temperature=0, prompt_logprobs=2)))
    try:
        events = [event async for batch in stream for event in batch]
    finally:
        stream.close()
    found = [event.prompt_logprobs for event in events if event.prompt_logprobs is not None]
    assert len(found) == 1, "the scores of a prompt come once"
    return list(found[0])


async def written(daemon: Daemon, prompt: Sequence[int], tokens: int) -> list[TokenLogprobs]:
    """A greedy answer, with the two likeliest tokens at each place."""
    params = SamplingParams(tokens, temperature=0, logprobs=2)
    stream = daemon.engine.submit(GenerateSpec(prompt, params))
    try:
        return [event.logprobs async for batch in stream for event in batch if event.logprobs is not None]
    finally:
        stream.close()


def margin(entry: TokenLogprobs) -> float:
    """By how much the likeliest token is likelier than the next."""
    (_, first), (_, second) = entry.top[:2]
    return first - second


def disagreement(ours: Sequence[TokenLogprobs], theirs: Sequence[TokenLogprobs]) -> float:
    """The largest difference of what both give the same tokens."""
    assert [entry.token for entry in ours] == [entry.token for entry in theirs], "scores of different texts"
    return max(abs(a.logprob - b.logprob) for a, b in zip(ours, theirs, strict=True))


def sure_tokens(reference: Sequence[TokenLogprobs], bound: float) -> list[int]:
    """The tokens of a reference's answer up to the first that an error of `bound` in two log-probabilities could
    change: whoever is within the bound must write these."""
    tokens = []
    for entry in reference:
        if margin(entry) <= 2 * bound:
            break
        tokens.append(entry.token)
    return tokens
