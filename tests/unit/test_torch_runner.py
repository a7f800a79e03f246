"""The CPU's runner: steps handed over ahead, steps that fail, and those that go on from them. See test_cuda_runner for
what it computes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from time import perf_counter
from typing import Any

import pytest
import torch

from server.errors import StepFailed
from server.kernels.attention import AttentionBackend, AttentionBatch
from server.kernels.native import load
from server.kernels.native.attention import NativeAttention
from server.kernels.reference import ReferenceAttention
from server.models.llama import Llama
from server.models.native import NativeParts
from server.runner.runner import TorchRunner
from server.runner.step import Launched
from server.types import SamplingParams, StepPlan, StepResult
from tests.unit.test_cuda_runner import MODEL, Eager, Line, arena, decode, facts, tiny_model

GREEDY = SamplingParams(50, temperature=0.0)


@pytest.fixture
async def runner() -> AsyncIterator[TorchRunner]:
    it = TorchRunner(MODEL, Eager(ReferenceAttention), lambda: 0.0)
    yield it
    await it.aclose()


@pytest.mark.parametrize("fails", ["flattening", "computing"])
async def test_a_failed_step_fails_what_follows(runner: TorchRunner, fails: str) -> None:
    """All are handed over before the first has ended: the one that goes on from a failed one has no token to feed, and
    the one that goes on from none works."""
    broken = StepPlan(2, [] if fails == "flattening" else [decode(0, 6, GREEDY, follows=True), decode(0, -9, GREEDY)])
    plans = [
        StepPlan(1, [decode(0, 5, GREEDY)]), broken, StepPlan(3, [decode(0, 7, GREEDY, follows=True)]),
        StepPlan(4, [decode(1, 6, GREEDY)]),
    ]  # fmt: skip
    first, second, third, fourth = await asyncio.gather(*map(runner.run, plans), return_exceptions=True)
    assert isinstance(second, Exception)
    assert isinstance(third, StepFailed), "it must not go on from the step before the one that failed"
    assert not isinstance(first, BaseException)
    assert not isinstance(fourth, BaseException)
    assert first.tokens[0] is not None
    assert fourth.tokens[0] is not None


async def test_a_step_goes_on_from_the_one_before(runner: TorchRunner) -> None:
    """Handed over ahead of it, a step gives what it gives when the token is fed by hand."""
    ahead = [StepPlan(1, [decode(0, 5, GREEDY)]), StepPlan(2, [decode(0, 6, GREEDY, follows=True)])]
    first, second = await asyncio.gather(*map(runner.run, ahead))
    row = decode(0, 6, GREEDY)
    assert first.tokens[0] is not None
    row.tokens[0] = first.tokens[0]
    alone = await runner.run(StepPlan(3, [row]))
    assert second.tokens == alone.tokens


# --- ahead -----------------------------------------------------------------------------------------------------------

native = pytest.mark.skipif(load() is None, reason="the native kernels were not built: no C compiler")


@pytest.fixture(scope="module")
def packed() -> Llama:
    return tiny_model(NativeParts(torch.float32))


def facts_of(results: Sequence[StepResult]) -> list[tuple[Any, ...]]:
    return [facts(result) for result in results]


async def run_line(
    model: Llama, seed: int, *, ahead: bool, attention: AttentionBackend | None = None
) -> tuple[list[StepResult], int]:
    """Every step of a line of requests of all kinds, each handed over before or after the one before it has ended; and
    how many were handed to the kernels."""
    runner = TorchRunner(model, attention or NativeAttention(arena(), MODEL.geometry), perf_counter)
    line, found, begun, begin = Line(seed, 14), [], 0, runner._begin

    def counted(plan: StepPlan, inputs: Any, wakes: int) -> Launched:
        nonlocal begun
        begun += wakes >= 0
        return begin(plan, inputs, wakes)

    runner._begin = counted  # type: ignore[method-assign]
    while not line.over:
        line.submit()
        plan = line.scheduler.plan(0.0)
        going = None if plan is None else runner.run(plan)
        while plan is not None and going is not None:
            following = line.scheduler.plan_ahead()
            then = runner.run(following) if ahead and following is not None else None
            found.append(await going)
            line.scheduler.commit(plan, found[-1], 0.0)
            if then is None and following is not None:
                then = runner.run(following)
            plan, going = following, then
    await runner.aclose()
    return found, begun


@native
async def test_steps_handed_over_ahead_are_those_one_by_one(packed: Llama) -> None:
    """Greedy, drawn and filtered tokens, beside rows for which the device thread is needed."""
    handed = steps = 0
    for seed in range(20):
        alone, _ = await run_line(packed, seed, ahead=False)
        deep, begun = await run_line(packed, seed, ahead=True)
        assert facts_of(deep) == facts_of(alone)
        assert all(result.started_s <= result.finished_s for result in deep)
        handed, steps = handed + begun, steps + len(deep)
    assert steps / 2 < handed < steps


@native
async def test_steps_handed_over_are_those_of_the_device_thread(packed: Llama) -> None:
    """Edited rows and log-probabilities, too: with a backend that the kernels do not know nothing is handed to them."""
    for seed in range(8):
        deep, _ = await run_line(packed, seed, ahead=True)
        apart, begun = await run_line(packed, seed, ahead=True, attention=Eager(NativeAttention))
        assert begun == 0
        assert facts_of(deep) == facts_of(apart)


@native
async def test_what_is_under_way_is_waited_for(packed: Llama) -> None:
    """A runner closes when its steps have ended, and a closed one has left no file open."""
    runner = TorchRunner(packed, NativeAttention(arena(), MODEL.geometry), perf_counter)
    files = len(os.listdir("/proc/self/fd"))
    steps = [
        runner.run(StepPlan(1, [decode(0, 5, GREEDY)])),
        runner.run(StepPlan(2, [decode(0, 6, GREEDY, follows=True)])),
    ]
    await runner.aclose()
    first, second = await asyncio.gather(*steps)
    assert None not in (first.tokens[0], second.tokens[0])
    assert len(os.listdir("/proc/self/fd")) == files


@native
async def test_the_kernels_fail_as_the_device_thread_does(packed: Llama) -> None:
    """A step that cannot be planned fails, with the one that goes on from it; not the one under way, nor the next."""
    attention = NativeAttention(arena(), MODEL.geometry)
    runner, plan, calls = TorchRunner(packed, attention, perf_counter), attention.plan, 0

    def second_fails(batch: AttentionBatch) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise ValueError("planted")
        plan(batch)

    attention.plan = second_fails  # type: ignore[method-assign]
    rows = [decode(0, 5, GREEDY), *(decode(0, 6 + n, GREEDY, follows=True) for n in range(2)), decode(1, 6, GREEDY)]
    steps = [runner.run(StepPlan(number, [row])) for number, row in enumerate(rows)]
    first, second, third, fourth = await asyncio.gather(*steps, return_exceptions=True)
    await runner.aclose()
    assert isinstance(first, StepResult)
    assert isinstance(second, ValueError)
    assert isinstance(third, StepFailed)
    assert isinstance(fourth, StepResult)
