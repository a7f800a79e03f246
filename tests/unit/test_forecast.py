"""The time to the first token, foretold when a request comes, and the refusal of who would get it too late."""

from __future__ import annotations

from contextlib import suppress
from itertools import pairwise
from math import inf

import pytest

from server.errors import Overloaded
from server.kvcache import audit
from server.kvcache.step_cost import StepWork
from server.scheduler.audit import check_scheduler
from server.scheduler.request import Request
from server.types import ServiceClass, Targets
from tests.property.core import Bench, Device

PACE = Device(base_s=0.01, token_s=0.001, floor_s=0.01, row_s=0.0001)
SIZES = {"max_running": 64, "max_step_tokens": 256, "max_chunk_tokens": 256, "max_model_len": 4096,
         "max_queued_requests": 1000, "max_queued_tokens": 10**6}  # fmt: skip


def bench_of(frames: int = 4000, **more) -> Bench:
    return Bench(frames, **({"device": PACE, "block_tokens": 4} | SIZES | more))


def prompt(number: int, length: int) -> list[int]:
    return [10_000 * number + position for position in range(length)]


def took(request: Request) -> float:
    assert request.first_token_s is not None
    return request.first_token_s - request.arrival_s


def within(ttft_s: float, **more) -> ServiceClass:
    return ServiceClass(targets=Targets(ttft_s=ttft_s), **more)


# --- what is foretold ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [20, 200, 256, 2000])
def test_alone_it_is_the_prompts_own_time(length: int):
    """On an idle device a prompt takes its steps and its tokens."""
    bench = bench_of()
    request = bench.submit(prompt(1, length))
    bench.finish()
    assert request.predicted_ttft_s == pytest.approx(took(request), rel=0.05)


@pytest.mark.parametrize("length", [300, 600, 1500])
def test_it_is_what_a_queue_takes(length: int):
    """First come, first served: each of ten that came one step after the other is foretold to within one step, which
    those behind it fill up, or 3 %, and the end of the queue to within 10 %."""
    bench = bench_of()
    requests = []
    for number in range(10):
        requests.append(bench.submit(prompt(number, length), max_tokens=8))
        bench.step()
    bench.finish()
    step_s = PACE(StepWork(256, 1))
    assert [r.predicted_ttft_s for r in requests] == [pytest.approx(took(r), rel=0.03, abs=step_s) for r in requests]
    assert requests[-1].predicted_ttft_s == pytest.approx(took(requests[-1]), rel=0.1)


def test_short_prompts_share_steps():
    """Twenty short prompts take one step, and are foretold so: the base of a step is not counted for each."""
    bench = bench_of()
    requests = [bench.submit(prompt(number, 10)) for number in range(20)]
    bench.finish()
    assert requests[-1].predicted_ttft_s == pytest.approx(took(requests[-1]), rel=0.1)


def test_it_grows_with_the_queue_in_front():
    """Every request that waits in front adds its work."""
    bench = bench_of()
    foretold = [bench.submit(prompt(number, 300)).predicted_ttft_s for number in range(10)]
    steps = [later - earlier for earlier, later in pairwise(foretold)]
    assert all(step == pytest.approx(0.3, rel=0.1) for step in steps)


def test_who_decodes_slows_it_down():
    """Requests that decode take their part of every step."""
    alone = bench_of().submit(prompt(1, 1000)).predicted_ttft_s
    bench = bench_of(device=Device(row_s=0.002))
    for number in range(10):
        bench.submit([number, 1, 2], max_tokens=50)
    bench.step()
    beside = bench.submit(prompt(1, 1000)).predicted_ttft_s
    assert beside > alone + 3 * 10 * 0.002


def test_only_what_ranks_before_counts():
    """What waits behind does not delay it: worse priorities, and the background, whose work is not even seen."""
    bench = bench_of(policy="priority")
    free = bench.submit(prompt(0, 100), priority=0).predicted_ttft_s
    bench.finish()
    for number in range(1, 6):
        bench.submit(prompt(number, 1000), priority=5)
        bench.submit(prompt(10 + number, 1000), service=ServiceClass(background=True, priority=-5))
    urgent = bench.submit(prompt(20, 100), priority=0)
    last = bench.submit(prompt(21, 100), priority=9)
    behind = bench.submit(prompt(22, 100), service=ServiceClass(background=True, priority=-9))
    assert urgent.predicted_ttft_s == pytest.approx(free, rel=0.01)
    assert last.predicted_ttft_s > 5
    assert behind.predicted_ttft_s == pytest.approx(last.predicted_ttft_s + 0.1, rel=0.05)


def test_what_is_cached_costs_nothing():
    """Of a prompt that is on the device but for its end, only the end is counted, its own and in front of others."""
    bench = bench_of()
    bench.submit(prompt(1, 2000))
    bench.finish()
    known = bench.submit([*prompt(1, 2000), 5])
    other = bench.submit([6])
    assert known.predicted_ttft_s < 0.02
    assert other.predicted_ttft_s < 0.03


def test_nothing_is_foretold_before_the_first_step():
    """A device that was never measured promises everything, and so nobody is refused."""
    bench = Bench(4000, block_tokens=4, refuse_late=True, **SIZES)
    request = bench.submit(prompt(1, 3000), service=within(0.001))
    assert request.predicted_ttft_s == 0


# --- refusal ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["fcfs", "deadline", "fair", "prefix", "priority", "spf"])
def test_who_would_be_too_late_is_refused_and_leaves_no_trace(policy: str):
    """The refusal says how late, and when to come back; queue, cache and policy are as if nobody had come."""
    bench = bench_of(policy=policy, refuse_late=True)
    for number in range(5):
        bench.submit(prompt(number, 1000))
    scheduler, kv = bench.scheduler, bench.kv
    before = (list(scheduler.waiting), scheduler.queued_tokens, set(scheduler.requests), kv.available_blocks)
    with pytest.raises(Overloaded) as caught:
        bench.submit(prompt(9, 1000), service=within(0.5))
    error = caught.value
    assert (error.status, error.code) == (429, "too_late")
    assert 1 <= error.retry_after_s <= 6
    assert "0.5 s" in error.message
    assert (list(scheduler.waiting), scheduler.queued_tokens, set(scheduler.requests), kv.available_blocks) == before
    audit.check(kv)
    check_scheduler(scheduler)
    bench.finish()
    assert not kv.leases


def test_who_asks_for_nothing_is_never_refused():
    """Without a target any time is good."""
    bench = bench_of(refuse_late=True)
    for number in range(20):
        bench.submit(prompt(number, 2000))
    assert bench.submit(prompt(50, 2000), service=within(inf)).predicted_ttft_s > 30


def test_refusing_is_off_unless_asked_for():
    """By default who comes too late is served, late."""
    bench = bench_of()
    request = bench.submit(prompt(1, 1000), service=within(0.001))
    bench.finish()
    assert len(bench.answer(request)) == 1


def test_who_is_taken_is_in_time():
    """In a burst of three times what can be served in time, those that are taken get their first token by 1.1 x the
    target, and about as many are taken as fit."""
    bench = bench_of(refuse_late=True)
    taken = []
    for number in range(30):
        with suppress(Overloaded):
            taken.append(bench.submit(prompt(number, 300), service=within(3.0)))
    bench.finish()
    assert max(took(request) for request in taken) <= 3.3
    assert len(taken) >= 8
