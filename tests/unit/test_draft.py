"""A step being put together: what fits into the time that others were promised."""

from __future__ import annotations

from array import array
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.kvcache.step_cost import StepCost
from server.scheduler.draft import MIN_CHUNK_TOKENS, Draft
from server.types import ServiceClass, StepRow, Targets
from tests.property.core import Bench, Device
from tests.property.making import make_kv

FAST = Device(base_s=0.005, token_s=0.0001, floor_s=0.005, row_s=0.0001)
"""A step with 200 tokens of prompts takes 25 ms."""
LARGE = {"max_running": 64, "max_step_tokens": 1024, "max_chunk_tokens": 1024, "max_model_len": 4096,
         "max_queued_tokens": 10**6}  # fmt: skip


def bench_of(device: Device = FAST, **limits) -> Bench:
    return Bench(4000, device=device, block_tokens=4, **(LARGE | limits))


def prompt(number: int, length: int) -> list[int]:
    return [10_000 * number + position for position in range(length)]


def paced(tpot_s: float) -> ServiceClass:
    return ServiceClass(targets=Targets(tpot_s=tpot_s))


def row(id: int, start: int, count: int) -> StepRow:
    return StepRow(id, array("i", range(count)), start, memoryview(array("i")))  # type: ignore[arg-type]


def cost() -> StepCost:
    kv = make_kv(8)
    FAST.teach(kv)
    return kv.planner.step


COST = cost()


# --- through the scheduler -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tpot_s", [0.02, 0.03, 0.06])
def test_chunks_are_cut_to_hold_the_target(tpot_s: float):
    """While a request with a target decodes, a long prompt is computed in steps that keep to it, and that use it up."""
    bench = bench_of()
    bench.submit([1, 2, 3], max_tokens=60, service=paced(tpot_s))
    bench.step()
    bench.submit(prompt(1, 4000))
    before = len(bench.steps_s)
    bench.finish()
    mixed = [seconds for seconds in bench.steps_s[before:] if seconds > 0.011]
    assert max(mixed) <= 1.02 * tpot_s
    assert max(mixed) >= 0.95 * tpot_s


def test_the_strictest_target_counts():
    """With several requests decoding, the step is as short as the one wants that wants it shortest."""
    bench = bench_of()
    for tpot_s in (0.06, 0.03, 0.09):
        bench.submit([int(1e4 * tpot_s)], max_tokens=50, service=paced(tpot_s))
    bench.step()
    bench.submit(prompt(1, 1000))
    bench.step()
    assert 0.95 * 0.03 <= bench.steps_s[-1] <= 1.02 * 0.03


def test_without_a_target_a_step_uses_its_budget():
    """Nobody who decodes wants a pace: the prompt gets all the tokens of the step that are left."""
    bench = bench_of()
    decoding = bench.submit([1, 2, 3], max_tokens=20)
    bench.step()
    long = bench.submit(prompt(1, 4000))
    assert bench.step() == {decoding.id: 1, long.id: 1023}


def test_a_target_of_one_that_does_not_decode_cuts_nothing():
    """Time per token is promised to those that have their first one; a prompt alone is computed at full speed."""
    bench = bench_of()
    first = bench.submit(prompt(1, 2000), max_tokens=5, service=paced(0.02))
    assert bench.step() == {first.id: 1024}
    second = bench.submit(prompt(2, 2000), max_tokens=5, service=paced(0.02))
    assert bench.step() == {first.id: 976, second.id: 48}


def test_a_prompt_gets_on_though_no_time_is_left():
    """A target below what any step takes costs prompts their speed, not their progress: MIN_CHUNK_TOKENS a step."""
    bench = bench_of()
    decoding = bench.submit([1, 2, 3], max_tokens=60, service=paced(0.001))
    bench.step()
    long = bench.submit(prompt(1, 1000))
    fed = [bench.step() for _ in range(15)]
    assert fed == [{decoding.id: 1, long.id: MIN_CHUNK_TOKENS}] * 15
    assert bench.step() == {decoding.id: 1, long.id: 1000 - 15 * MIN_CHUNK_TOKENS}


def test_before_anything_was_measured_nothing_is_cut():
    """A cost model that knows nothing says that all fits."""
    bench = Bench(4000, block_tokens=4, **LARGE)
    decoding = bench.submit([1, 2, 3], max_tokens=20, service=paced(0.001))
    bench.step()
    long = bench.submit(prompt(1, 4000))
    assert bench.step() == {decoding.id: 1, long.id: 1023}


# --- by itself -------------------------------------------------------------------------------------------------------


@given(
    until_s=st.floats(0.0, 0.2), decodes=st.integers(0, 20), prompts=st.integers(0, 3), start=st.integers(0, 5000),
    count=st.integers(1, 2000),
)  # fmt: skip
def test_what_fits_fits_and_one_more_would_not(until_s: float, decodes: int, prompts: int, start: int, count: int):
    """A draft with the tokens that it says fit is no longer than allowed, and with one more it is."""
    draft = Draft(10_000, COST)
    for id in range(decodes):
        draft.add(row(id, 50, 1))
    for id in range(prompts):
        draft.add(row(100 + id, 0, 300))
    draft.until_s = until_s
    fitting = draft.fitting(start, count)
    assert 0 <= fitting <= count
    if fitting > 1:  # a row of one token counts as one that decodes
        draft.add(row(200, start, fitting))
        assert draft.seconds <= until_s + 1e-9
        draft.drop(200)
    if 1 < fitting + 1 <= count:
        draft.add(row(200, start, fitting + 1))
        assert draft.seconds > until_s - 1e-9


def test_a_dropped_row_leaves_nothing_behind():
    """After rows were added and dropped in any order, a step of decodes costs what it did before, to the last bit."""
    for first, second in product((3, 100, 77), (2, 301, 900)):
        draft = Draft(10_000, COST)
        draft.add(row(1, 40, 1))
        before_s, budget = draft.seconds, draft.budget
        draft.add(row(2, 10, first))
        draft.add(row(3, 1, second))
        draft.drop(2)
        draft.drop(3)
        draft.drop(4)
        assert (draft.seconds, draft.budget) == (before_s, budget)
        assert draft.rows.keys() == {1}


def test_many_prompts_do_not_break_a_target():
    """However many prompts wait, a step holds the target: only the first of them gets on where no time is left."""
    bench = bench_of()
    bench.submit([1, 2, 3], max_tokens=100, service=paced(0.02))
    bench.step()
    for number in range(30):
        bench.submit(prompt(1 + number, 300))
    for _ in range(20):
        bench.step()
        assert bench.steps_s[-1] <= 1.02 * 0.02
    bench.finish()
