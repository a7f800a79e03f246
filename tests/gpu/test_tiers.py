"""Which tier a block came from never shows in what a request says, on a GPU: five ways to the same answers."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from server.bench.placing import place, prefer_loading
from server.build import Daemon
from server.types import DEVICE, DRAM, SSD
from tests.gpu.scoring import BF16, FP32, GREEDY, TOKENS
from tests.system.harness import ask, complete, complete_all, running

pytestmark = pytest.mark.gpu

BLOCK_TOKENS = 16


def tiers(path: Path) -> dict[str, Any]:
    """Below the device, all of them ample."""
    return {"kv__dram_gib": "24MiB", "kv__ssd_gib": "200MiB", "kv__ssd_path": path, "kv__ssd_min_free_gib": 0}


async def ask_from(daemon: Daemon, prompts: Sequence[list[int]], tier: str) -> tuple[list[list[int]], Counter[str]]:
    """As `ask`, with every prompt's blocks in this tier and below alone, and all of them loaded."""
    answers, served = [], Counter[str]()
    for prompt in prompts:
        await place(daemon, prompt[:-1], tier)
        (answer,), blocks = await ask(prefer_loading(daemon), [prompt])
        answers.append(answer)
        served += blocks
    return answers, served


async def ways(settings: dict[str, Any], path: Path, prompts: list[list[int]], blocks: int) -> dict[str, Any]:
    """Answers by where the prompts' blocks came from; each way is proven by the count of blocks that it served."""
    found: dict[str, list[list[int]]] = {}
    async with running(**settings, **tiers(path)) as daemon:
        found["computed"], served = await ask(prefer_loading(daemon), prompts)
        assert not served
        for tier in (DEVICE, DRAM, SSD):
            found[tier], served = await (ask(daemon, prompts) if tier == DEVICE else ask_from(daemon, prompts, tier))
            assert served == Counter({tier: blocks})
    async with running(**settings, **tiers(path)) as daemon:
        found["restarted"], served = await ask(prefer_loading(daemon), prompts)
        assert served == Counter({SSD: blocks})
    return {way: [answer[:TOKENS] for answer in answers] for way, answers in found.items()}


@pytest.fixture(scope="module")
def blocks(prompts: list[list[int]]) -> int:
    return sum((len(prompt) - 1) // BLOCK_TOKENS for prompt in prompts)


async def test_five_ways_in_fp32(tmp_path: Path, prompts: list[list[int]], blocks: int) -> None:
    """Computed, from the device, from DRAM, from SSD, and from SSD after a restart: the same tokens."""
    found = await ways(FP32, tmp_path, prompts, blocks)
    assert all(answers == found["computed"] for answers in found.values())


async def test_every_tier_says_the_same_in_bf16(tmp_path: Path, prompts: list[list[int]], blocks: int) -> None:
    """With FlashInfer in bfloat16, where computing a prompt in one piece rounds otherwise than computing its end: all
    ways that load compute the same end over the same bytes, and write the same tokens."""
    found = await ways(BF16, tmp_path, prompts, blocks)
    assert found[DRAM] == found[SSD] == found["restarted"] == found[DEVICE]


async def test_preempted_requests_come_back_by_loading(tmp_path: Path, prompts: list[list[int]]) -> None:
    """Requests that lose their blocks in the middle of an answer load them again, and their answers do not change."""
    long = replace(GREEDY, max_tokens=100)
    async with running(**FP32, kv__prefix_caching=False) as daemon:
        expected = [await complete(daemon, prompt, long) for prompt in prompts]
    tight = FP32 | {"kv__device_gib": "3MiB", "scheduler__max_num_batched_tokens": 128, "scheduler__max_num_seqs": 8}
    async with running(**tight, **tiers(tmp_path)) as daemon:
        found = await complete_all(prefer_loading(daemon), prompts, long)
        assert daemon.engine.scheduler.preemptions > 0
    assert [answer[:TOKENS] for answer in found] == [answer[:TOKENS] for answer in expected]


async def test_blocks_come_and_go_while_others_decode(tmp_path: Path, prompts: list[list[int]]) -> None:
    """A device tier too small for all prompts, all of them asked again and again at once: the answers stay."""
    small = FP32 | {"kv__device_gib": "3MiB"}
    async with running(**FP32, kv__prefix_caching=False) as daemon:
        expected = [await complete(daemon, prompt, GREEDY) for prompt in prompts]
    async with running(**small, **tiers(tmp_path)) as daemon:
        for _ in range(5):
            rounds = asyncio.gather(*(complete(prefer_loading(daemon), prompt, GREEDY) for prompt in prompts * 2))
            assert await rounds == expected * 2
