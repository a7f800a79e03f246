"""The CPU's runner: steps that fail, and those that go on from them. See test_cuda_runner for what it computes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from server.errors import StepFailed
from server.kernels.reference import ReferenceAttention
from server.runner.runner import TorchRunner
from server.types import SamplingParams, StepPlan
from tests.unit.test_cuda_runner import MODEL, Eager, decode

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
