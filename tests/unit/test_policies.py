"""Scheduling policies by example: who goes first. What every policy must do is in tests/contract."""

from __future__ import annotations

from collections import Counter
from itertools import groupby

import pytest

from server.scheduler.policies.deadline import PATIENCE_S
from server.scheduler.policies.fair import CREDIT_S, STEP_S
from server.scheduler.policies.prefix import WINDOW_S
from server.scheduler.policies.spf import AGEING
from server.scheduler.request import Request
from server.types import ServiceClass, Targets
from tests.property.core import Bench, Device

SECOND = Device(base_s=0.01, token_s=0.01, floor_s=0.01, row_s=0.0)
"""A prompt of 100 tokens takes a second."""
QUICK = Device(base_s=0.0005, token_s=0.0005, floor_s=0.0005, row_s=0.0)
"""One of 200 takes a tenth."""


def bench_of(policy: str, *, device: Device = SECOND, **more) -> Bench:
    """One request at a time, prompts in one step each: nothing but the policy decides who is next."""
    sizes = {"max_running": 1, "max_step_tokens": 4096, "max_chunk_tokens": 4096, "max_model_len": 4096}
    queue = {"max_queued_requests": 10_000, "max_queued_tokens": 10**9}
    return Bench(2000, policy=policy, device=device, block_tokens=4, **(sizes | queue | more))


def prompt(number: int, length: int) -> list[int]:
    """Tokens that no other number's prompt begins with."""
    return [1000 * number + position for position in range(length)]


def within(ttft_s: float, tenant: str = "") -> ServiceClass:
    return ServiceClass(tenant, targets=Targets(ttft_s=ttft_s))


def order(bench: Bench) -> list[int]:
    """The requests in the order in which they end, from now to when all have."""
    ended: list[int] = []
    while not bench.scheduler.idle:
        plan = bench.plan()
        assert plan is not None
        ended += [event.request_id for event in bench.commit(plan) if event.finish]
    return ended


def ids(requests: list[Request]) -> list[int]:
    return [request.id for request in requests]


# --- deadline --------------------------------------------------------------------------------------------------------


def test_the_earliest_deadline_goes_first():
    """Of two with one deadline the shorter goes first, and later comers may pass."""
    bench = bench_of("deadline")
    late = bench.submit(prompt(1, 100), service=within(50.0))
    short = bench.submit(prompt(2, 10), service=within(20.0))
    long = bench.submit(prompt(3, 300), service=within(20.0))
    soon = bench.submit(prompt(4, 10), service=within(4.0))
    assert order(bench) == ids([soon, short, long, late])


def test_without_a_target_the_deadline_is_far_away():
    """Who wants nothing in particular goes behind those that do, but before newcomers once it has waited PATIENCE_S."""
    bench = bench_of("deadline")
    patient = bench.submit(prompt(1, 10))
    first = bench.submit(prompt(2, 10), service=within(5.0))
    assert bench.step().keys() == {first.id}
    bench.now += PATIENCE_S
    second = bench.submit(prompt(3, 10), service=within(5.0))
    assert order(bench) == ids([patient, second])


def test_who_cannot_make_it_is_put_back_and_the_others_meet_their_targets():
    """A second of overload costs one request its target, not everybody behind it."""
    bench = bench_of("deadline")
    hopeless = bench.submit(prompt(1, 300), service=within(2.0))
    others = [bench.submit(prompt(2 + n, 100), service=within(1.2 + 1.1 * n)) for n in range(5)]
    assert order(bench) == ids([*others, hopeless])
    for request in others:
        assert request.first_token_s is not None
        assert request.first_token_s <= request.service.targets.ttft_s

    collapse = bench_of("fcfs")
    collapse.submit(prompt(1, 300))
    others = [collapse.submit(prompt(2 + n, 100), service=within(1.2 + 1.1 * n)) for n in range(5)]
    order(collapse)
    assert all(request.first_token_s > request.service.targets.ttft_s for request in others)  # type: ignore[operator]


def test_nobody_is_put_back_twice():
    """The second place is final: among those that are late the first to come goes first, and is served."""
    bench = bench_of("deadline")
    late = [bench.submit(prompt(n, 300), service=within(1.0)) for n in range(3)]
    bench.step()
    ranks = [request.rank for request in late]
    assert all(rank[1][0] == PATIENCE_S + 1.0 for rank in ranks)
    assert order(bench) == ids(late[1:])
    assert [request.rank for request in late] == ranks


def test_a_place_behind_is_no_better_than_the_one_before():
    """A target beyond PATIENCE_S that cannot be met does not bring its request forward."""
    bench = bench_of("deadline")
    target_s = 2 * PATIENCE_S
    request = bench.submit(prompt(1, 10), service=within(target_s))
    before = request.rank
    bench.now += target_s
    bench.step()
    assert request.rank > before


def test_who_has_its_first_token_is_not_late():
    """A request that is preempted while it decodes keeps its place, however long ago its target was."""
    bench = Bench(12, policy="deadline", device=SECOND, max_running=2)
    bench.submit(prompt(1, 4), max_tokens=16, service=within(1.0))
    last = bench.submit(prompt(2, 4), max_tokens=16, service=within(2.0))
    rank = last.rank
    while not last.preemptions:
        bench.step()
    bench.now += 100
    newcomer = bench.submit(prompt(3, 4), max_tokens=16, service=within(50.0))
    assert last.first_token_s is not None
    assert order(bench)[1:] == ids([last, newcomer])
    assert last.rank == rank


# --- priority --------------------------------------------------------------------------------------------------------


def test_a_long_prompt_pauses_for_a_better_priority():
    """Who is more urgent goes first from the next step on; the prompt in work keeps its blocks and goes on after it."""
    bench = bench_of("priority", max_running=4, max_chunk_tokens=100, max_step_tokens=100)
    long = bench.submit(prompt(1, 1000), priority=5)
    assert bench.step() == {long.id: 100}
    urgent = bench.submit(prompt(2, 150), priority=1)
    assert bench.step() == {urgent.id: 100}
    assert bench.step() == {urgent.id: 50, long.id: 50}
    assert not bench.scheduler.preemptions


# --- fair ------------------------------------------------------------------------------------------------------------


def of(tenant: str) -> ServiceClass:
    return ServiceClass(tenant)


def test_a_modest_tenant_goes_before_a_flood():
    """Whatever one tenant has queued, the next request of another that asks for little is the next to start."""
    bench = bench_of("fair", device=QUICK)
    for number in range(100):
        bench.submit(prompt(number, 100), service=of("flood"))
    for number in range(5):
        bench.step()
        modest = bench.submit(prompt(200 + number, 50), service=of("modest"))
        bench.step()
        assert modest.first_token_s == bench.now


@pytest.mark.parametrize("lengths", [(100, 100), (50, 200), (200, 50)])
def test_a_backlog_is_shared_by_weight(lengths: tuple[int, int]):
    """While both have work queued, a tenant of weight 3 gets three times the prompt work of one of weight 1, from the
    start, however long their prompts are, to within one request of each."""
    bench = bench_of("fair", device=QUICK, weights={"heavy": 3.0})
    requests: dict[int, Request] = {}
    for _ in range(300):
        for tenant, length in zip(("heavy", "light"), lengths, strict=True):
            request = bench.submit(prompt(len(requests), length), service=of(tenant))
            requests[request.id] = request
    bound = requests[1].work_s / 3 + requests[2].work_s
    done: Counter[str] = Counter()
    for _ in range(160):
        for id in bench.step():
            done[requests[id].service.tenant] += requests[id].work_s  # type: ignore[assignment]
        assert abs(done["heavy"] / 3 - done["light"]) <= 1.001 * bound


def test_credit_is_bounded():
    """A tenant that was away for an hour of others' work comes first for CREDIT_S of work, not for an hour."""
    bench = bench_of("fair", device=Device(base_s=0.01, token_s=0.1))
    busy = [bench.submit(prompt(number, 100), service=of("busy")) for number in range(360)]
    for _ in range(300):
        bench.step()
    back = [bench.submit(prompt(1000 + number, 100), service=of("back")) for number in range(20)]
    next_ones = order(bench)[:20]
    assert next_ones.index(busy[300].id) == pytest.approx(CREDIT_S / 10, abs=1)
    assert set(next_ones[:5]) < set(ids(back))


def test_what_an_answer_cost_is_on_the_account():
    """Of two tenants with equal prompts, the one whose last answer was long waits for the other, while others wait."""
    bench = bench_of("fair", device=Device(row_s=0.1))
    bench.submit(prompt(1, 10), max_tokens=200, service=of("talker"))
    first = bench.submit(prompt(2, 10), max_tokens=1, service=of("listener"))
    others = [bench.submit(prompt(3 + n, 10), service=of("other")) for n in range(20)]
    while first.first_token_s is None:
        bench.step()
    talker = bench.submit(prompt(30, 10), service=of("talker"))
    listener = bench.submit(prompt(31, 10), service=of("listener"))
    ended = order(bench)
    assert ended.index(listener.id) < ended.index(others[-1].id) < ended.index(talker.id)


def test_a_flood_after_silence_has_no_credit():
    """When nobody waited any more, what a tenant was served counts for nothing: another that comes then, for the first
    time or again, does not go before it."""
    bench = bench_of("fair", device=QUICK)
    for number in range(100):
        bench.submit(prompt(number, 100), service=of("steady"))
        order(bench)
    flood = [bench.submit(prompt(200 + number, 100), service=of("flood")) for number in range(20)]
    steady = [bench.submit(prompt(300 + number, 100), service=of("steady")) for number in range(3)]
    assert order(bench)[:6] == ids([request for pair in zip(flood, steady, strict=False) for request in pair])


def test_a_long_prompt_pauses_for_a_modest_tenant():
    """A flood's prompt that takes a minute lets the next request of another tenant pass after one short step, and keeps
    what it has computed."""
    bench = bench_of("fair", device=QUICK, max_running=4)
    bench.submit(prompt(1, 2), service=of("modest"))
    long = bench.submit(prompt(2, 4000), service=of("flood"))
    for number in range(3, 9):
        bench.submit(prompt(number, 4000), service=of("flood"))
    bench.step()
    assert 0 < long.computed_tokens < 4000
    came_s, computed = bench.now, long.computed_tokens
    modest = bench.submit(prompt(10, 300), service=of("modest"))
    bench.step()
    assert modest.first_token_s == bench.now
    assert bench.now - came_s < 0.5
    assert long.computed_tokens >= computed
    assert not bench.scheduler.preemptions


def test_steps_are_short_only_where_somebody_may_come_before():
    """A tenant alone computes its prompts in whole steps; beside one that has asked for less, in steps of STEP_S."""
    bench = bench_of("fair", device=QUICK)
    alone = bench.submit(prompt(1, 4000), service=of("flood"))
    assert bench.step() == {alone.id: 4000}
    bench.submit(prompt(2, 10), service=of("modest"))
    bench.submit(prompt(3, 4000), service=of("flood"))
    bench.submit(prompt(4, 4000), service=of("flood"))
    bench.step()
    before_s = bench.now
    bench.step()
    assert bench.now - before_s == pytest.approx(STEP_S, rel=0.1)


# --- shortest prefill first ------------------------------------------------------------------------------------------


def test_the_shorter_prompt_goes_first():
    """Prompts that came together are computed from the shortest to the longest."""
    bench = bench_of("spf")
    requests = [bench.submit(prompt(number, length)) for number, length in enumerate((300, 20, 100, 50))]
    assert order(bench) == ids([requests[place] for place in (1, 3, 2, 0)])


def test_what_is_cached_does_not_make_a_prompt_long():
    """A long prompt of which all but the end is cached goes before a shorter one that is not."""
    bench = bench_of("spf")
    bench.submit(prompt(1, 400))
    order(bench)
    short = bench.submit(prompt(2, 40))
    known = bench.submit([*prompt(1, 400), 7])
    assert order(bench) == ids([known, short])


def test_ageing_lets_a_long_prompt_pass():
    """One that has waited AGEING seconds for each second of work that it has more goes before a new short one."""
    bench = bench_of("spf")
    bench.submit(prompt(1, 4000))
    long = bench.submit(prompt(2, 300))
    bench.now += AGEING * 2
    still = bench.submit(prompt(3, 10))
    bench.now += AGEING
    new = bench.submit(prompt(4, 10))
    bench.submit(prompt(5, 4000))
    assert order(bench)[:3] == ids([still, long, new])


# --- shared prefixes together ----------------------------------------------------------------------------------------


def test_requests_with_one_prefix_go_together():
    """Of those that came mixed within a window, all with one beginning go one after the other, the oldest's first."""
    bench = bench_of("prefix")
    group = {bench.submit([*prompt(n % 3, 64), n, 1, 2, 3]).id: n % 3 for n in range(12)}
    assert [key for key, _ in groupby(order(bench), key=group.__getitem__)] == [0, 1, 2]


def test_prefixes_nest():
    """Within one beginning, those that share more go together too."""
    bench = bench_of("prefix")
    branches = {}
    for n in range(16):
        root, branch = n % 2, n // 2 % 2
        request = bench.submit([*prompt(root, 64), *prompt(10 + 2 * root + branch, 64), n])
        branches[request.id] = root, branch
    found = [key for key, _ in groupby(order(bench), key=branches.__getitem__)]
    assert found == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_windows_go_in_order_of_time():
    """Nobody of a later window passes, whatever prefix it shares with whom."""
    bench = bench_of("prefix")
    before = [bench.submit([*prompt(number, 64), 1]) for number in range(4)]
    bench.now += WINDOW_S
    after = [bench.submit([*prompt(number, 64), 2]) for number in range(4)]
    assert order(bench) == ids(before + after)
