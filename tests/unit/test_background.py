"""Background requests: they get what others leave, give it back at once, and lose nothing by it but time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from server.scheduler.draft import MIN_CHUNK_TOKENS
from server.scheduler.request import Request, RequestState
from server.types import ServiceClass
from tests.property.core import Bench, Device, cached_blocks

PACE = Device(base_s=0.002, token_s=0.0001, floor_s=0.002, row_s=0.00001)
"""180 tokens of a prompt take 20 ms."""
SIZES = {"max_running": 8, "max_step_tokens": 2048, "max_chunk_tokens": 2048, "max_model_len": 8192,
         "max_queued_tokens": 10**6}  # fmt: skip
BACKGROUND = ServiceClass(background=True)


def bench_of(frames: int = 1200, **more) -> Bench:
    return Bench(frames, **({"device": PACE, "block_tokens": 4} | SIZES | more))


def prompt(number: int, length: int) -> list[int]:
    return [10_000 * number + position for position in range(length)]


def blocks_held(bench: Bench) -> int:
    """By background requests."""
    running = [request for request in bench.scheduler.running if request.service.background]
    return sum(len(request.lease.table) for request in running if request.lease is not None)


def alone(request: Request) -> list[int]:
    """What `request` says when nobody else is there."""
    bench = bench_of()
    same = bench.submit(request.tokens[: request.prompt_tokens], request.params.max_tokens)
    bench.finish()
    return bench.answer(same)


# --- behind all others -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["deadline", "fair", "fcfs", "prefix", "priority", "spf"])
def test_background_starts_after_all_others(policy: str):
    """Whatever the policy, and however early it came, short it is or urgent it calls itself."""
    bench = bench_of(policy=policy, max_running=1)
    behind = bench.submit([1, 2], service=replace(BACKGROUND, priority=-9))
    others = [bench.submit(prompt(number, 500), service=ServiceClass(priority=9)) for number in range(1, 4)]
    for _ in others:
        assert behind.id not in bench.step()
    assert all(request.state is RequestState.FINISHED for request in others)
    assert bench.step() == {behind.id: 2}


def test_background_goes_by_the_policy_among_itself():
    """Of two background requests the one that the policy prefers goes first."""
    bench = bench_of(policy="priority", max_running=1)
    worse = bench.submit([1, 2], service=replace(BACKGROUND, priority=2))
    better = bench.submit([3, 4], service=replace(BACKGROUND, priority=1))
    assert [bench.step().keys() for _ in range(2)] == [{better.id}, {worse.id}]


# --- steps of its own ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step_s", [0.01, 0.02, 0.05])
def test_a_step_of_background_alone_is_short(step_s: float):
    """As long as background_step_s and no longer, so that who comes then does not wait for more than that."""
    bench = bench_of(background_step_s=step_s)
    bench.submit(prompt(1, 1500), max_tokens=4, service=BACKGROUND)
    bench.submit(prompt(2, 100), max_tokens=4, service=BACKGROUND)
    bench.finish()
    assert max(bench.steps_s) <= 1.02 * step_s
    assert bench.steps_s[0] >= 0.95 * step_s


def test_a_background_prompt_gets_on_however_short_the_steps():
    """Where not even MIN_CHUNK_TOKENS fit, so many are computed all the same."""
    bench = bench_of(background_step_s=0.001)
    request = bench.submit(prompt(1, 300), service=BACKGROUND)
    assert [bench.step() for _ in range(4)] == [{request.id: MIN_CHUNK_TOKENS}] * 4
    bench.finish()


def test_background_decodes_are_bounded_too():
    """More of them than fit into background_step_s take turns; all end."""
    slow = Device(base_s=0.002, token_s=0.0001, floor_s=0.002, row_s=0.005)
    bench = bench_of(device=slow, background_kv_share=1.0)
    requests = [bench.submit([number, 1], max_tokens=6, service=BACKGROUND) for number in range(8)]
    bench.finish()
    assert max(bench.steps_s) <= 1.02 * 0.02
    assert all(len(bench.answer(request)) == 6 for request in requests)


# --- giving way ------------------------------------------------------------------------------------------------------


def test_who_comes_is_in_the_next_step():
    """With places and frames left, a newcomer needs nobody's, and the step that it is in is its own."""
    bench = bench_of()
    behind = bench.submit(prompt(1, 1000), max_tokens=20, service=BACKGROUND)
    bench.step()
    newcomer = bench.submit(prompt(2, 100), max_tokens=3)
    assert bench.step()[newcomer.id] == 100
    bench.finish()
    assert behind.preemptions == 0
    assert bench.answer(behind) == alone(behind)


def test_background_gives_its_place_up():
    """With all places taken by background, the next step is the newcomer's; what was sealed is not computed again."""
    bench = bench_of(max_running=2, background_kv_share=1.0)
    behind = [bench.submit(prompt(number, 90), max_tokens=9, service=BACKGROUND) for number in range(2)]
    for _ in range(3):
        bench.step()
    assert [request.state for request in behind] == [RequestState.RUNNING] * 2
    newcomers = [bench.submit(prompt(10 + number, 50), max_tokens=3) for number in range(2)]
    assert bench.step() == {newcomer.id: 50 for newcomer in newcomers}
    for request in behind:
        assert cached_blocks(bench.kv, request.tokens) == (len(request.tokens) - 1) // 4, "its blocks are still there"
    bench.finish()
    for request in behind:
        assert request.preemptions == 1
        assert bench.answer(request) == alone(request)
        assert bench.computed[request.id] <= 90 + 9 - 1 + 4, "at most the unsealed block again"


@pytest.mark.parametrize("decoding", [False, True])
def test_background_gives_its_frames_up(decoding: bool):
    """With the device full of background, the next step is the newcomer's; background computes again what was not
    sealed, or what the newcomer needed the room of, and says the same."""
    bench = bench_of(frames=100, background_kv_share=1.0)
    behind = [bench.submit(prompt(number, 190), max_tokens=5, service=BACKGROUND) for number in range(2)]
    for _ in range(4 if decoding else 2):
        bench.step()
    assert bench.kv.available_blocks < 50
    newcomer = bench.submit(prompt(10, 200), max_tokens=3)
    assert bench.step()[newcomer.id] == 200
    assert sum(request.preemptions for request in behind) >= 1
    kept = sum(cached_blocks(bench.kv, request.tokens) for request in behind)
    assert kept >= 100 - 52 - 2, "all that there was room for"
    bench.finish()
    for request in behind:
        assert bench.answer(request) == alone(request)
    again = sum(bench.computed[request.id] - (190 + 5 - 1) for request in behind)
    assert 0 <= again <= 4 * (52 + 2)


def test_only_as_many_give_way_as_needed():
    """A newcomer that needs one place takes one, from the background request that ranks last."""
    bench = bench_of(max_running=3, background_kv_share=1.0)
    behind = [bench.submit([number, 1, 2], max_tokens=30, service=BACKGROUND) for number in range(3)]
    bench.step()
    bench.submit([9, 9], max_tokens=2)
    bench.step()
    assert [request.preemptions for request in behind] == [0, 0, 1]


def test_background_never_takes_an_online_ones_place():
    """Not even with a better priority and nothing else to run on."""
    bench = bench_of(policy="priority", max_running=1)
    online = bench.submit([1, 2], max_tokens=20, service=ServiceClass(priority=5))
    bench.step()
    bench.submit([3, 4], service=replace(BACKGROUND, priority=-5))
    for _ in range(10):
        assert bench.step() == {online.id: 1}
    assert online.preemptions == 0


# --- beside others ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slack", [0.1, 0.3, 1.0])
def test_slack_bounds_what_background_adds(slack: float):
    """Beside online work a step takes at most that share longer than it would, and background gets something done."""
    device = Device(base_s=0.02, token_s=0.0001, floor_s=0.02, row_s=0.0001)

    def steps(*, busy: bool) -> Bench:
        bench = bench_of(device=device, background_slack=slack)
        for number in range(3):
            bench.submit([number, 1, 2], max_tokens=15)
        bench.step()
        if busy:
            bench.submit(prompt(7, 4000), service=BACKGROUND)
        for number in range(10):
            if number == 5:
                bench.submit(prompt(8, 500), max_tokens=3)
            bench.step()
        return bench

    with_it, without = steps(busy=True), steps(busy=False)
    assert len(with_it.steps_s) == len(without.steps_s)
    for longer_s, plain_s in zip(with_it.steps_s, without.steps_s, strict=True):
        assert longer_s <= (1 + 1.1 * slack) * plain_s
    assert with_it.computed[4] > 10 * 0.5 * slack * 0.02 / 0.0001 * 0.5


def test_without_slack_background_waits():
    """A slack of 0 means that nothing of it is computed beside others, and everything after them."""
    bench = bench_of(background_slack=0.0)
    online = bench.submit([1, 2, 3], max_tokens=10)
    behind = bench.submit(prompt(1, 50), service=BACKGROUND)
    while online.state is not RequestState.FINISHED:
        bench.step()
    assert bench.computed.get(behind.id, 0) == 0
    bench.finish()
    assert len(bench.answer(behind)) == 1


def test_background_is_not_starved():
    """When the others are done, all that waited in the background runs, with all the device to itself."""
    bench = bench_of(600, background_slack=0.0, max_running=4)
    behind = [bench.submit(prompt(number, 100), max_tokens=5, service=BACKGROUND) for number in range(6)]
    online = [bench.submit([100 + number, 1], max_tokens=10) for number in range(8)]
    while any(request.state is not RequestState.FINISHED for request in online):
        bench.step()
    bench.finish()
    assert all(bench.answer(request) == alone(request) for request in behind)


# --- its share of the device -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_the_share_of_frames_holds(share: float):
    """Prompts are started in the background as long as they fit into their share of the frames, and no further."""
    bench = bench_of(frames=200, background_kv_share=share, max_running=32, background_step_s=1.0)
    for number in range(30):
        bench.submit(prompt(number, 32), max_tokens=1, service=BACKGROUND)
    most = 0
    while not bench.scheduler.idle:
        plan = bench.plan()
        assert plan is not None
        most = max(most, blocks_held(bench))
        bench.commit(plan)
    assert share * 200 - 9 <= most <= share * 200


def test_one_may_be_larger_than_the_share():
    """A background request that is larger than the share runs alone, rather than never."""
    bench = bench_of(frames=200, background_kv_share=0.1)
    large = [bench.submit(prompt(number, 400), max_tokens=2, service=BACKGROUND) for number in range(2)]
    while not bench.scheduler.idle:
        assert len(bench.step()) == 1
    assert all(len(bench.answer(request)) == 2 for request in large)


def test_the_share_holds_while_answers_grow():
    """Requests that outgrow the share together give way, but for the first: it is never more than the share and one."""
    bench = bench_of(frames=400, background_kv_share=0.25, max_running=32)
    behind = [bench.submit(prompt(number, 15), max_tokens=100, service=BACKGROUND) for number in range(12)]
    while not bench.scheduler.idle:
        bench.step()
        assert blocks_held(bench) <= 100 + 8  # each may begin one block more in the step that crosses it
    assert all(bench.answer(request) == alone(request) for request in behind)
