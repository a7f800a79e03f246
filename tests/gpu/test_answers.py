"""What the demo model says on a GPU, beside what it says on a CPU in float32."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from server.runner.cuda import CudaRunner
from server.types import TokenLogprobs
from tests.gpu.scoring import (
    BF16,
    BOUND,
    FP32,
    GREEDY,
    TOKENS,
    disagreement,
    margin,
    scored,
    sure_tokens,
    written,
)  # fmt: skip
from tests.system.harness import complete_all, running

pytestmark = pytest.mark.gpu

LEAST_MARGIN = 0.05
"""In the answers that are compared, the likeliest token is always likelier by this (natural log): rounding of fp32,
1e-5, cannot turn two of them round."""
FP32_BOUND = 1e-3
"""Of a log-probability in float32."""
MEAN_BOUND = 0.03
"""Of the error in bfloat16, on average over a text; on a CPU it is 0.01."""
CPU: dict[str, Any] = {"model__dtype": "float32", "kv__device_gib": "24MiB", "model__kernels": "torch"}

Scored = tuple[list[list[TokenLogprobs]], list[list[int]], list[list[TokenLogprobs]]]


@pytest.fixture(scope="module")
def reference(prompts: list[list[int]]) -> Scored:
    """On a CPU in float32: answers, the texts of prompt and answer, and the scores of these."""

    async def ask() -> Scored:
        async with running(**CPU, kv__prefix_caching=False) as daemon:
            answers = [await written(daemon, prompt, TOKENS) for prompt in prompts]
            texts = [[*prompt, *(entry.token for entry in answer)] for prompt, answer in zip(prompts, answers)]
            return answers, texts, [await scored(daemon, text) for text in texts]

    return asyncio.run(ask())


def tokens(answers: list[list[TokenLogprobs]]) -> list[list[int]]:
    return [[entry.token for entry in answer] for answer in answers]


async def test_fp32_writes_the_same_tokens(prompts: list[list[int]], reference: Scored) -> None:
    """In float32 with torch's attention every answer is that of the CPU, token for token, alone and all at once."""
    answers, texts, scores = reference
    assert min(margin(entry) for answer in answers for entry in answer) >= LEAST_MARGIN
    async with running(**FP32) as daemon:
        assert tokens([await written(daemon, prompt, TOKENS) for prompt in prompts]) == tokens(answers)
        assert await complete_all(daemon, prompts, GREEDY) == tokens(answers)
        for text, expected in zip(texts, scores, strict=True):
            assert disagreement(await scored(daemon, text), expected) <= FP32_BOUND


async def test_bf16_agrees_within_its_bound(reference: Scored) -> None:
    """In bfloat16 with FlashInfer the log-probabilities of whole texts stay within the bound, and on average far
    within it; where the likeliest token is sure, it is the same."""
    _, texts, scores = reference
    async with running(**BF16) as daemon:
        for text, expected in zip(texts, scores, strict=True):
            found = await scored(daemon, text)
            assert disagreement(found, expected) <= BOUND
            errors = [abs(a.logprob - b.logprob) for a, b in zip(found, expected, strict=True)]
            assert sum(errors) / len(errors) <= MEAN_BOUND
            sure = [(a, b) for a, b in zip(found, expected, strict=True) if margin(b) > 2 * BOUND]
            assert len(sure) > len(text) // 4
            assert all(a.top[0][0] == b.top[0][0] for a, b in sure)


async def test_bf16_writes_what_is_sure(prompts: list[list[int]], reference: Scored) -> None:
    """Captured decode steps, alone and in a batch, write the reference's tokens as long as these are sure."""
    answers, _, _ = reference
    async with running(**BF16) as daemon:
        alone = tokens([await written(daemon, prompt, TOKENS) for prompt in prompts])
        together = await complete_all(daemon, prompts, GREEDY)
        for answer, one, another in zip(answers, alone, together, strict=True):
            sure = sure_tokens(answer, BOUND)
            assert len(sure) >= 6
            assert one[: len(sure)] == another[: len(sure)] == sure
        assert isinstance(daemon.runner, CudaRunner)
        assert daemon.runner.host_work.graph_steps > 0


async def test_prompts_in_pieces(prompts: list[list[int]], reference: Scored) -> None:
    """Prompts that take several steps, of which only the last one samples, write what is sure, too."""
    answers, _, _ = reference
    async with running(**BF16, scheduler__max_num_batched_tokens=64, scheduler__max_num_seqs=8) as daemon:
        found = await complete_all(daemon, prompts, GREEDY)
    for answer, one in zip(answers, found, strict=True):
        sure = sure_tokens(answer, BOUND)
        assert one[: len(sure)] == sure


async def test_fp8_weights_still_recall(prompts: list[list[int]], reference: Scored) -> None:
    """With weights and their inputs in fp8 likewise."""
    answers, _, _ = reference
    async with running(**BF16, model__quantization="fp8") as daemon:
        found = await complete_all(daemon, prompts, GREEDY)
    assert [answer[:4] for answer in found] == [answer[:4] for answer in tokens(answers)]


async def test_fp8_still_recalls(prompts: list[list[int]], reference: Scored) -> None:
    """With a cache of fp8 the first tokens of every answer, the fact that is asked for, are still right."""
    answers, _, _ = reference
    async with running(**BF16, kv__kv_dtype="fp8") as daemon:
        found = await complete_all(daemon, prompts, GREEDY)
    assert [answer[:4] for answer in found] == [answer[:4] for answer in tokens(answers)]
