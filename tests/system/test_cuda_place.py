"""The whole daemon as it is put together for a GPU, without one: FlashInfer's plans, captured steps, two steps under
way, a read-back thread, blocks that leave by copy streams. Only what CUDA itself does is played, at its worst.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from server.bench.placing import prefer_loading
from server.build import Daemon
from server.config import Config
from server.errors import ConfigError
from server.kernels.attention import AttentionBackend
from server.kvcache.arena import allocate_arena
from server.kvcache.host import HostArena
from server.kvcache.tiers.base import Tier
from server.models.base import Model
from server.place import Cpu, place_of
from server.runner.cuda import CudaRunner
from server.types import DEVICE, DRAM, SSD, BlockLayout, SamplingParams, StepRunner
from tests.fake_device import FakeDevice
from tests.numeric.flashinfer_fake import FakedFlashInfer
from tests.system.harness import GREEDY, ask, complete, complete_all, running
from tests.unit.late_device import LateDevice

BLOCK_TOKENS = 16
ROWS = 8
SETTINGS: dict[str, Any] = {"model__dtype": "float32", "kv__device_gib": "24MiB", "model__kernels": "torch"}


class FakeCuda(Cpu):
    """`place.Cuda` with the fakes of its parts' own tests where CUDA would be."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.device_memory: FakeDevice | None = None

    def backend(self, geometry: Any, kv_dtype: Any) -> str:
        return "flashinfer"

    def arena(self, frames: int, layout: BlockLayout, kv_dtype: Any) -> Tensor:
        return allocate_arena(frames + 1, layout, kv_dtype).fill_(torch.nan)

    def attention(self, backend: str, arena: Tensor, model: Model) -> AttentionBackend:
        return FakedFlashInfer(arena, model.geometry, query_dtype=model.dtype, max_rows=ROWS)

    def device_tier(self, arena: Tensor, host: HostArena) -> Tier:
        memory = arena.view(torch.uint8).view(len(arena), -1)
        self.device_memory = FakeDevice(len(arena), host, free=True, arena=memory)
        return self.device_memory.tier()

    def runner(self, model: Model, attention: AttentionBackend) -> StepRunner:
        return CudaRunner(model, attention, LateDevice(busy_s=0.0), time.monotonic, graph_rows=ROWS)

    async def warm_up(self, runner: Any, moved: Callable[[int, int], None]) -> None:
        await runner.warm_up(moved, self._config.scheduler.max_num_batched_tokens)


@pytest.fixture(scope="module")
def alone(prompts: list[list[int]]) -> list[list[int]]:
    """What each prompt gives on a CPU, computed from nothing."""

    async def generate() -> list[list[int]]:
        async with running(**SETTINGS, kv__prefix_caching=False) as daemon:
            return [await complete(daemon, prompt, GREEDY) for prompt in prompts]

    return asyncio.run(generate())


@pytest.fixture(scope="module")
def blocks(prompts: list[list[int]]) -> int:
    return sum((len(prompt) - 1) // BLOCK_TOKENS for prompt in prompts)


def runner_of(daemon: Daemon) -> CudaRunner:
    assert isinstance(daemon.runner, CudaRunner)
    return daemon.runner


async def test_answers_are_those_of_a_cpu(prompts: list[list[int]], alone: list[list[int]]) -> None:
    """One after the other and all at once, in captured steps: the tokens that the CPU gives for each alone."""
    async with running(FakeCuda, **SETTINGS) as daemon:
        assert [await complete(daemon, prompt, GREEDY) for prompt in prompts] == alone
        assert await complete_all(daemon, prompts, GREEDY) == alone
        work = runner_of(daemon).host_work
        assert work.graph_steps > work.eager_steps > 0


async def test_steps_are_two_deep(prompts: list[list[int]]) -> None:
    """Decodes feed what the step before left on the device."""
    async with running(FakeCuda, **SETTINGS) as daemon:
        followed = 0
        launch = runner_of(daemon).launch

        def counting(plan: Any) -> Any:
            nonlocal followed
            followed += sum(row.follows for row in plan.rows)
            return launch(plan)

        runner_of(daemon).launch = counting  # type: ignore[method-assign]
        await complete(daemon, prompts[0], SamplingParams(max_tokens=64, temperature=0))
        assert followed > 0


async def test_every_tier_gives_the_same(
    tmp_path: Path, prompts: list[list[int]], alone: list[list[int]], blocks: int
) -> None:
    """From the device, from pinned DRAM, and from SSD after a restart: the answers of a CPU without a cache."""
    below = {"kv__dram_gib": "24MiB", "kv__ssd_gib": "200MiB", "kv__ssd_path": tmp_path, "kv__ssd_min_free_gib": 0}
    async with running(FakeCuda, **SETTINGS | below) as daemon:
        assert await ask(prefer_loading(daemon), prompts) == (alone, Counter())
        assert await ask(daemon, prompts) == (alone, Counter({DEVICE: blocks}))
    async with running(FakeCuda, **SETTINGS | below) as daemon:
        assert await ask(prefer_loading(daemon), prompts) == (alone, Counter({SSD: blocks}))
    async with running(FakeCuda, **SETTINGS | below | {"kv__device_gib": "3MiB"}) as daemon:
        await ask(prefer_loading(daemon), prompts)
        answers, served = await ask(prefer_loading(daemon), prompts)
        assert answers == alone
        assert served[DRAM] > 0


def test_without_a_gpu_it_says_so() -> None:
    """`--device cuda` where torch sees none is one line that says why, and what to do."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    config = Config.model_validate({"model": {"device": "cuda"}})
    with pytest.raises(ConfigError, match=r"device 'cuda': .*; use --device cpu"):
        place_of(config)
