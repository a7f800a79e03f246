"""The CUDA runner beside the CPU's: the same plans, the same tokens, two steps deep and in captured steps."""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import server.demo
from server.kernels.attention import BACKENDS
from server.kernels.flashinfer import FlashInferAttention
from server.kvcache.arena import allocate_arena
from server.models.weights import load_model
from server.registry import resolve
from server.runner.cuda import CudaRunner
from server.runner.device import CudaDevice
from server.runner.runner import TorchRunner
from server.types import BlockLayout, SampleSpec, SamplingParams, StepPlan, StepRow, StepRunner
from tests.gpu.scoring import BOUND, margin

pytestmark = pytest.mark.gpu

FOLDER = Path(server.demo.__file__).parent / "model"
BLOCK_TOKENS, FRAMES, STEPS, GRAPH_ROWS = 16, 160, 12, 8


def arena_of(model: Any, device: str) -> torch.Tensor:
    """Poisoned, with a last frame that is nobody's."""
    g = model.geometry
    layout = BlockLayout(g.layers, g.kv_heads, g.head_dim, model.dtype.itemsize, BLOCK_TOKENS)
    return allocate_arena(FRAMES + 1, layout, model.dtype, device).fill_(float("nan"))


def on_cpu() -> TorchRunner:
    model = load_model(FOLDER, dtype="float32")
    attention = resolve("attention", BACKENDS, "reference")(arena_of(model, "cpu"), model.geometry)
    return TorchRunner(model, attention, time.monotonic)


def on_gpu(dtype: Any) -> CudaRunner:
    model = load_model(FOLDER, dtype=dtype, device="cuda")
    arena = arena_of(model, "cuda")
    if dtype == "float32":
        attention: Any = resolve("attention", BACKENDS, "sdpa")(arena, model.geometry)
    else:
        attention = FlashInferAttention(arena, model.geometry, max_rows=GRAPH_ROWS)
    return CudaRunner(model, attention, CudaDevice(), time.monotonic, graph_rows=GRAPH_ROWS)


async def answers(
    runner: StepRunner, prompts: Sequence[Sequence[int]], params: SamplingParams, *, deep: bool
) -> list[list[Any]]:
    """(token, log-probabilities) of each prompt's answer: prompts in one step, then decodes of all. `deep`: each is
    handed over before the one before it is over, and takes its token from there."""
    frames = np.random.default_rng(0).permutation(FRAMES).astype(np.int32)
    tables = np.array_split(frames, len(prompts))
    found: list[list[Any]] = [[] for _ in prompts]

    def plan(step: int) -> StepPlan:
        rows = []
        for row, prompt in enumerate(prompts):
            start = 0 if step == 0 else len(prompt) + step - 1
            fed = array("i", prompt if step == 0 else [0] if deep else [found[row][-1][0]])
            sample = SampleSpec(params, len(prompt) + step, len(prompt), range(0))
            rows.append(StepRow(row, fed, start, tables[row], sample, follows=deep and step > 0))
        return StepPlan(step, rows)

    async def take(work: Any) -> None:
        result = await work
        for row, pair in enumerate(zip(result.tokens, result.logprobs, strict=True)):
            found[row].append(pair)

    before = asyncio.ensure_future(runner.run(plan(0)))
    for step in range(1, STEPS):
        if not deep:
            await take(before)
        following = asyncio.ensure_future(runner.run(plan(step)))
        if deep:
            await take(before)
        before = following
    await take(before)
    return found


async def test_fp32_is_that_of_the_cpu(prompts: list[list[int]]) -> None:
    """Greedy and drawn with a seed, two steps deep, in float32: the tokens of the CPU's runner."""
    cpu, gpu = on_cpu(), on_gpu("float32")
    for params in (SamplingParams(99, temperature=0.0), SamplingParams(99, temperature=0.2, seed=5)):
        expected = await answers(cpu, prompts, params, deep=False)
        found = await answers(gpu, prompts, params, deep=True)
        assert [[token for token, _ in row] for row in found] == [[token for token, _ in row] for row in expected]
    await cpu.aclose()
    await gpu.aclose()


async def test_captured_steps_are_those_launched_one_by_one(prompts: list[list[int]]) -> None:
    """Of 6 rows in a graph of 8: the log-probabilities stay within bfloat16's bound, and every token that is sure is
    the same."""
    params = SamplingParams(99, temperature=0.0, logprobs=2)
    plain, captured = on_gpu("bfloat16"), on_gpu("bfloat16")
    await captured.warm_up(lambda done, of: None, 64)
    expected = await answers(plain, prompts, params, deep=True)
    found = await answers(captured, prompts, params, deep=True)
    assert (plain.host_work.graph_steps, captured.host_work.graph_steps) == (0, STEPS - 1)
    for one, other in zip(expected, found, strict=True):
        for (token, entry), (same, again) in zip(one, other, strict=True):
            assert token == same or margin(entry) <= BOUND
            if token != same:
                break  # from here on they tell different stories
            assert abs(entry.logprob - again.logprob) <= BOUND
    await plain.aclose()
    await captured.aclose()
