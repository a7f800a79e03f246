"""Promise 1, never wrong: how a request is scheduled never shows in what it says.

The demo model in float32. Its answers copy facts from far back in the prompt, so that one wrong KV block changes them.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

import server.demo
from server.demo.corpus import example
from server.engine import GenerateSpec
from server.text import Tokenizer
from server.types import FinishReason, SamplingParams
from tests.system.harness import complete, complete_all, running

FOLDER = Path(server.demo.__file__).parent / "model"
GREEDY = SamplingParams(max_tokens=32, temperature=0)
FEW = {"model__dtype": "float32", "kv__device_gib": "64MiB"}


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """16 documents of 100 to 700 tokens, each ending in a question."""
    tokenizer = Tokenizer.load(FOLDER)
    texts = [example(seed=i, target_tokens=100 + 40 * i, kind="completion").prompt for i in range(16)]
    return [tokenizer.encode(text) for text in texts]


@pytest.fixture(scope="module")
def alone(prompts: list[list[int]]) -> list[list[int]]:
    """What each prompt gives alone, computed from nothing in one piece."""

    async def generate() -> list[list[int]]:
        async with running(**FEW, kv__prefix_caching=False) as daemon:
            return [await complete(daemon, prompt, GREEDY) for prompt in prompts]

    return asyncio.run(generate())


async def test_a_batch_of_16_says_what_each_says_alone(prompts: list[list[int]], alone: list[list[int]]) -> None:
    """Continuous batching does not show."""
    async with running(**FEW) as daemon:
        assert await complete_all(daemon, prompts, GREEDY) == alone


async def test_a_prefix_hit_says_the_same(prompts: list[list[int]], alone: list[list[int]]) -> None:
    """The second time nearly every prompt token comes from the cache, and the output is the same."""
    async with running(**FEW) as daemon:
        assert [await complete(daemon, prompt, GREEDY) for prompt in prompts] == alone
        before = daemon.engine.scheduler.kv.device.pool.free
        assert [await complete(daemon, prompt, GREEDY) for prompt in prompts] == alone
        assert daemon.engine.scheduler.kv.device.pool.free == before, "the second time stores nothing new"


@pytest.mark.parametrize("chunk", [16, 64, 512])
async def test_chunked_prefill_says_the_same(prompts: list[list[int]], alone: list[list[int]], chunk: int) -> None:
    """Prefill cut into chunks, mixed with the decoding of others, does not show."""
    settings = {**FEW, "scheduler__max_num_batched_tokens": chunk, "scheduler__max_num_seqs": 16}
    async with running(**settings) as daemon:
        assert await complete_all(daemon, prompts, GREEDY) == alone


async def test_preemption_says_the_same(prompts: list[list[int]], alone: list[list[int]]) -> None:
    """With a device tier far too small for the batch, requests lose their blocks and start again: unseen."""
    async with running(**FEW) as daemon:
        token_bytes = daemon.engine.kv.layout.token_bytes
    tight = {**FEW, "kv__device_gib": 1100 * token_bytes / 2**30, "model__max_model_len": 1000}
    long = replace(GREEDY, max_tokens=200)
    short = prompts[:4]
    async with running(**FEW, kv__prefix_caching=False) as daemon:
        expected = [await complete(daemon, prompt, long) for prompt in short * 2]
    async with running(**tight) as daemon:
        found = await complete_all(daemon, short * 2, [replace(long, seed=i) for i in range(8)])
        assert daemon.engine.scheduler.preemptions > 0
    assert found == expected
    async with running(**tight) as daemon:
        assert await complete_all(daemon, prompts, GREEDY) == alone


async def test_seeded_sampling_says_the_same(prompts: list[list[int]]) -> None:
    """Same seed, same output, whatever else is in the batch and however prefill was cut."""
    drawn = [SamplingParams(max_tokens=24, temperature=0.8, top_p=0.95, seed=i) for i in range(16)]
    async with running(**FEW, kv__prefix_caching=False) as daemon:
        expected = [await complete(daemon, prompt, p) for prompt, p in zip(prompts, drawn, strict=True)]
    async with running(**FEW, scheduler__max_num_batched_tokens=64, scheduler__max_num_seqs=16) as daemon:
        assert await complete_all(daemon, prompts, drawn) == expected


async def test_both_attention_backends_agree(prompts: list[list[int]], alone: list[list[int]]) -> None:
    """The reference backend, the oracle, generates what the fast one does."""
    async with running(**FEW, model__attention="reference") as daemon:
        assert await complete_all(daemon, prompts[:4], GREEDY) == alone[:4]


async def test_a_stream_closed_at_a_stop_string_counts_as_stopped(prompts: list[list[int]]) -> None:
    """The reader sees stop strings, not the engine: what it says of the end is what the metrics show."""
    async with running(**FEW) as daemon:
        stream = daemon.engine.submit(GenerateSpec(prompts[0], GREEDY))
        await anext(stream)
        stream.close(FinishReason.STOP)
        text = daemon.metrics.render().decode()
    assert 'terrace_requests_finished_total{finish_reason="stop",model_name="demo"} 1.0' in text
    assert 'terrace_requests_finished_total{finish_reason="abort",model_name="demo"} 0.0' in text
