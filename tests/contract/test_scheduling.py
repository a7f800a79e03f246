"""What every scheduling policy must do, whoever wrote it: parametrised over the table it is listed in."""

from __future__ import annotations

from array import array
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.scheduler.policy import POLICIES, make_policy
from server.scheduler.request import Request
from server.types import SamplingParams, ServiceClass
from tests.property.core import Bench

every_policy = pytest.mark.parametrize("name", sorted(POLICIES))
requests = st.builds(
    lambda arrivals, priorities: [
        Request(
            number, array("i", [0]), SamplingParams(1), b"", ServiceClass("ab"[number % 2], priority), arrival_s=arrival
        )
        for number, (arrival, priority) in enumerate(zip(arrivals, priorities, strict=True))
    ],
    st.lists(st.integers(0, 3).map(float), min_size=6, max_size=6),
    st.lists(st.integers(-2, 2), min_size=6, max_size=6),
)


@every_policy
@given(requests=requests)
def test_rank_is_a_total_order(name: str, requests: list[Request]):
    """No two requests rank the same, even if they came at the same moment: queues have one order."""
    policy = make_policy(name)
    assert len({policy.rank(request) for request in requests}) == len(requests)
    backwards = requests[::-1]
    assert sorted(requests, key=policy.rank) == sorted(backwards, key=policy.rank)


@every_policy
def test_rank_does_not_change_while_a_request_lives(name: str):
    """Whatever happens to a request, its place stays: queues are kept in order by insertion alone."""
    bench = Bench(frames=4, policy=name)
    request = bench.submit([1, 2, 3], max_tokens=3, priority=1)
    rank = request.rank
    while not bench.scheduler.idle:
        bench.step()
        assert request.rank == rank


@every_policy
@given(requests=requests)
def test_outranks_agrees_with_rank(name: str, requests: list[Request]):
    """Nobody takes the place of a request that ranks before it, nor of itself."""
    policy = make_policy(name)
    for request in requests:
        request.rank = False, policy.rank(request)
        policy.queued(request)
    for waiting, running in product(requests, requests):
        if running.rank <= waiting.rank:
            assert not policy.outranks(waiting, running)


@every_policy
def test_equals_go_first_come_first_served(name: str):
    """Of requests that differ in nothing but their arrival, the first gets its first token first."""
    bench = Bench(policy=name, max_running=1)
    ids = [bench.submit([number, 1, 2]).id for number in range(5)]
    finished: list[int] = []
    while not bench.scheduler.idle:
        plan = bench.plan()
        assert plan is not None
        finished += [event.request_id for event in bench.commit(plan) if event.finish]
    assert finished == ids


@every_policy
@given(prompt=st.integers(1, 20), every=st.integers(1, 3), max_running=st.integers(1, 4))
def test_waiting_is_bounded_under_a_stream_of_newcomers(name: str, prompt: int, every: int, max_running: int):
    """However many come later, a request ends before those that arrived after everybody then present had ended."""
    bench = Bench(frames=16, policy=name, max_running=max_running)
    for number in range(6):
        bench.submit([number] * 10, max_tokens=4)
    waiting = bench.submit([9] * prompt, max_tokens=4)
    steps = 0
    while waiting.id in bench.scheduler.requests:
        if steps % every == 0:
            bench.submit([8, steps % 7], max_tokens=2)
        bench.step()
        steps += 1
        assert steps <= 7 * (20 + 4), "a newcomer overtook it for ever"


def test_priority_lets_the_better_go_first():
    """A request of better priority starts before those that came earlier with a worse one."""
    bench = Bench(policy="priority", max_running=1)
    bench.submit([1, 2, 3], max_tokens=3, priority=0)
    bench.step()
    worse = bench.submit([4, 5, 6], priority=2)
    better = bench.submit([7, 8, 9], priority=1)
    order = []
    while not bench.scheduler.idle:
        plan = bench.plan()
        assert plan is not None
        order += [event.request_id for event in bench.commit(plan) if event.finish]
    assert order.index(better.id) < order.index(worse.id)
