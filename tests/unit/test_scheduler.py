"""The scheduler by example: one behaviour each. What holds in any order of calls is in tests/property."""

from __future__ import annotations

from array import array

import pytest

from server.errors import InvalidRequest, Overloaded
from server.scheduler.request import RequestState
from server.types import FinishReason, ServiceClass, StepPlan, StepResult
from tests.property.core import Bench, land
from tests.property.making import made_up, sampled

PROMPT = [1, 2, 3, 4, 5, 6, 7, 8]  # four blocks of two


# --- one budget ------------------------------------------------------------------------------------------------------


def test_a_request_chases_its_tokens():
    """First the prompt is computed, then one token a step, and at max_tokens it is over and holds nothing."""
    bench = Bench()
    request = bench.submit(PROMPT, max_tokens=3)
    assert [bench.step() for _ in range(3)] == [{1: 8}, {1: 1}, {1: 1}]
    assert [event.finish for event in bench.events[1]] == [None, None, FinishReason.LENGTH]
    assert request.tokens == array("i", PROMPT + bench.answer(request))
    assert bench.scheduler.idle
    assert not bench.kv.leases


def test_decodes_come_before_prompts():
    """A request that decodes has its token in every step, whatever prompts wait; those share what is left."""
    bench = Bench(max_step_tokens=4, max_chunk_tokens=4)
    decoding = bench.submit([1, 2], max_tokens=9)
    bench.step()
    prefilling = bench.submit(list(range(10, 18)))
    assert bench.step() == {decoding.id: 1, prefilling.id: 3}
    assert bench.step() == {decoding.id: 1, prefilling.id: 3}
    assert bench.step() == {decoding.id: 1, prefilling.id: 2}


def test_a_chunk_is_bounded():
    """No row feeds more than max_chunk_tokens, even where the budget would allow it."""
    bench = Bench(max_step_tokens=16, max_chunk_tokens=3)
    bench.submit(PROMPT)
    bench.submit([9, 9, 9, 9])
    assert bench.step() == {1: 3, 2: 3}
    assert bench.step() == {1: 3, 2: 1}
    assert bench.step() == {1: 2}


def test_only_the_last_row_of_a_prompt_samples():
    """Chunks in the middle of a prompt ask for no token."""
    bench = Bench(max_chunk_tokens=4)
    bench.submit(PROMPT)
    first = bench.plan()
    assert first is not None
    assert first.rows[0].sample is None
    assert bench.commit(first) == []
    second = bench.plan()
    assert second is not None
    assert second.rows[0].sample is not None
    assert second.rows[0].sample.position == 8
    assert second.rows[0].sample.generated == 0


# --- the cache -------------------------------------------------------------------------------------------------------


def test_a_prefix_hit_leaves_one_token():
    """A prompt that is cached in full is computed again from its last block on: a token must be left to sample from."""
    bench = Bench()
    first = bench.submit(PROMPT)
    bench.finish()
    second = bench.submit(PROMPT)
    assert bench.step() == {second.id: 2}
    assert (first.cached_tokens, second.cached_tokens) == (0, 6)


def test_answers_are_cached_like_prompts():
    """The next turn of a conversation finds the blocks of the answer too."""
    bench = Bench()
    request = bench.submit([1, 2, 3], max_tokens=6)
    bench.finish()
    turn = bench.submit([*request.tokens, 9])
    bench.step()
    assert turn.cached_tokens == 8


def test_choices_of_one_prompt_share_its_blocks():
    """Four choices: the prompt is computed once, the other three wait for it and compute their last block only."""
    bench = Bench(max_running=4, max_chunk_tokens=4)
    choices = [bench.submit(PROMPT, max_tokens=3, seed=seed) for seed in range(4)]
    assert bench.step() == {choices[0].id: 4}, "the others do not compute what is being computed"
    bench.finish()
    assert [bench.computed[choice.id] for choice in choices] == [8 + 2, 2 + 2, 2 + 2, 2 + 2]
    assert [choice.cached_tokens for choice in choices] == [0, 6, 6, 6]


def test_a_request_that_waits_for_a_prefix_is_passed():
    """Waiting for somebody else's prefix holds up nobody who wants something else."""
    bench = Bench(max_chunk_tokens=4)
    bench.submit(PROMPT)
    bench.step()
    bench.submit(PROMPT)
    other = bench.submit([9, 9])
    assert other.id in bench.step()


def test_the_end_of_the_computing_one_ends_the_waiting():
    """When the request that computes a prefix is aborted, the next one computes it."""
    bench = Bench(max_chunk_tokens=4)
    first, second = bench.submit(PROMPT), bench.submit(PROMPT)
    bench.step()
    bench.scheduler.abort(first.id, 0.0)
    assert bench.step() == {second.id: 4}
    assert second.cached_tokens == 4


def test_duplicated_content_is_held_once():
    """Requests whose answers come to the same tokens share those blocks too."""
    bench = Bench()
    one = bench.submit(PROMPT, max_tokens=6)
    bench.step()
    two = bench.submit(PROMPT, max_tokens=6)
    bench.finish()
    assert bench.answer(one) == bench.answer(two)
    assert bench.kv.device.pool.capacity - bench.kv.device.pool.free == (8 + 5) // 2


# --- preemption ------------------------------------------------------------------------------------------------------


def test_the_last_in_rank_gives_way_and_resumes_from_the_cache():
    """When the device is full the request that ranks last is preempted, later finds most of its blocks, and its answer
    goes on where it stood."""
    bench = Bench(frames=8)
    first = bench.submit([1, 2, 3, 4], max_tokens=10)
    second = bench.submit([5, 6, 7, 8], max_tokens=8)
    alone = Bench()
    expected = [alone.submit([1, 2, 3, 4], max_tokens=10), alone.submit([5, 6, 7, 8], max_tokens=8)]
    alone.finish()
    bench.finish()
    assert (first.preemptions, bench.scheduler.preemptions) == (0, second.preemptions)
    assert second.preemptions > 0
    assert bench.computed[second.id] < 2 * (4 + 7), "it did not start all over"
    assert [bench.answer(request) for request in (first, second)] == [alone.answer(request) for request in expected]


def test_cached_tokens_are_those_of_the_first_admission():
    """What a preempted request finds of its own work is no cache hit of the client's."""
    bench = Bench(frames=8)
    bench.submit([1, 2, 3, 4], max_tokens=10)
    second = bench.submit([5, 6, 7, 8], max_tokens=8)
    bench.finish()
    assert second.preemptions > 0
    assert second.cached_tokens == 0


def test_a_better_priority_takes_a_worse_ones_place():
    """With every place taken, a request of better priority displaces the worst of those that run."""
    bench = Bench(policy="priority", max_running=2)
    kept = bench.submit([1, 2], max_tokens=9, priority=1)
    displaced = bench.submit([3, 4], max_tokens=9, priority=2)
    bench.step()
    urgent = bench.submit([5, 6], max_tokens=2, priority=0)
    bench.step()
    assert displaced.state is RequestState.WAITING
    assert bench.step().keys() == {kept.id, urgent.id}
    bench.finish()
    assert len(bench.answer(displaced)) == 9


def test_first_come_first_served_displaces_nobody():
    """Under FCFS priorities mean nothing: the newcomer waits."""
    bench = Bench(policy="fcfs", max_running=1)
    running = bench.submit([1, 2], max_tokens=5, priority=2)
    bench.step()
    bench.submit([5, 6], priority=0)
    assert bench.step() == {running.id: 1}


# --- ends ------------------------------------------------------------------------------------------------------------


def test_max_tokens_zero_computes_the_prompt_alone():
    """Nothing is sampled; the event says LENGTH and has no token."""
    bench = Bench()
    request = bench.submit(PROMPT, max_tokens=0, prompt_logprobs=0)
    plan = bench.plan()
    assert plan is not None
    assert plan.rows[0].sample is None
    (event,) = bench.commit(plan)
    assert (event.token, event.finish) == (None, FinishReason.LENGTH)
    assert event.prompt_logprobs is not None
    assert [entry.token for entry in event.prompt_logprobs] == PROMPT[1:]
    assert len(request.tokens) == 8


def test_a_stop_token_ends_after_min_tokens():
    """A stop token within the first min_tokens is a token like any other."""
    bench = Bench()
    request = bench.submit([1, 2], max_tokens=9, stop_token_ids=frozenset(range(4)), min_tokens=3)
    bench.finish()
    assert len(bench.answer(request)) == 4
    assert bench.events[request.id][-1].finish is FinishReason.STOP


def test_prompt_scores_skip_the_cache_and_come_once():
    """A prompt to be scored is computed in full though it is cached; its scores come with the first token only."""
    bench = Bench(max_chunk_tokens=3)
    bench.submit(PROMPT)
    bench.finish()
    scored = bench.submit(PROMPT, max_tokens=3, prompt_logprobs=0)
    bench.finish()
    assert scored.cached_tokens == 0
    got = [event.prompt_logprobs for event in bench.events[scored.id]]
    assert got[0] is not None
    assert [entry.token for entry in got[0]] == PROMPT[1:]
    assert got[1:] == [None, None]


def test_prompt_scores_are_whole_after_a_preemption():
    """A prompt whose scoring was cut short is scored from its beginning again, and each token once."""
    bench = Bench(frames=8, policy="priority", max_chunk_tokens=3, max_running=1)
    scored = bench.submit(PROMPT, prompt_logprobs=0, priority=1)
    bench.step()
    bench.submit([9, 9], priority=0)
    bench.finish()
    assert scored.preemptions == 1
    (event,) = bench.events[scored.id]
    assert event.prompt_logprobs is not None
    assert [entry.token for entry in event.prompt_logprobs] == PROMPT[1:]


def test_an_abort_between_steps_frees_at_once():
    """A request that is in no step gives its blocks back in the same call, and is idempotently gone."""
    bench = Bench(max_chunk_tokens=4)
    request = bench.submit(PROMPT)
    bench.step()
    bench.scheduler.abort(request.id, 0.0)
    bench.scheduler.abort(request.id, 0.0)
    assert not bench.kv.leases
    assert bench.scheduler.idle


def test_an_abort_in_flight_frees_at_commit():
    """A request in a running step keeps its frames until the step is over, and its client hears nothing more."""
    bench = Bench()
    request = bench.submit(PROMPT, max_tokens=5)
    plan = bench.plan()
    assert plan is not None
    bench.scheduler.abort(request.id, 0.0)
    assert len(bench.kv.leases) == 1
    assert bench.commit(plan) == []
    assert not bench.kv.leases
    assert bench.submit(PROMPT)
    bench.step()
    assert bench.scheduler.requests == {}


def test_a_failed_step_ends_its_requests_only():
    """Those in the step end with the error; others go on; what earlier steps sealed stays cached."""
    bench = Bench(max_chunk_tokens=8, max_step_tokens=8)
    failed, left = bench.submit(PROMPT, max_tokens=3), bench.submit([9, 9, 9])
    plan = bench.plan()
    assert plan is not None
    assert [row.request_id for row in plan.rows] == [failed.id]
    (event,) = bench.scheduler.fail(plan, "out of memory", 0.0)
    assert (event.request_id, event.finish, event.error) == (failed.id, FinishReason.ERROR, "out of memory")
    assert not bench.kv.device.find
    assert left.id in bench.step()


def test_a_result_of_another_step_is_refused():
    """A plan is committed with its own result or not at all."""
    bench = Bench()
    bench.submit(PROMPT)
    plan = bench.plan()
    assert plan is not None
    with pytest.raises(AssertionError, match="step 99 committed, 1 planned"):
        bench.commit(plan, StepResult(99, [], [], [], 0.0, 0.0))


def test_retired_requests_are_named_to_the_runner():
    """The next plan says which requests have left, so that the device forgets what it kept for them."""
    bench = Bench()
    gone = bench.submit([1, 2])
    bench.step()
    bench.submit([3, 4])
    plan = bench.plan()
    assert plan is not None
    assert list(plan.retired) == [gone.id]


# --- limits ----------------------------------------------------------------------------------------------------------


def test_a_request_that_can_never_fit_is_refused_for_good():
    """Prompt and answer beyond the context, or an empty prompt, are the client's error and name the field."""
    bench = Bench(max_model_len=10)
    with pytest.raises(InvalidRequest, match="exceed the model's context of 10 tokens") as too_long:
        bench.submit(PROMPT, max_tokens=3)
    assert (too_long.value.param, too_long.value.code) == ("prompt", "context_length_exceeded")
    with pytest.raises(InvalidRequest, match="no tokens"):
        bench.submit([])
    assert bench.scheduler.idle


def test_a_full_queue_is_refused_with_a_time():
    """Over the number of waiting requests or of waiting tokens the answer is 429 with a time to come back."""
    bench = Bench(max_queued_requests=2)
    bench.submit([1])
    bench.submit([2])
    with pytest.raises(Overloaded, match="2 requests are waiting") as full:
        bench.submit([3])
    assert full.value.retry_after_s > 0
    bench = Bench(max_queued_tokens=10)
    bench.submit(PROMPT)
    with pytest.raises(Overloaded, match="8 prompt tokens are waiting"):
        bench.submit([1, 2, 3])
    bench.submit([1, 2])


def test_one_request_larger_than_the_queue_is_taken_when_alone():
    """The token limit of the queue does not shut out a prompt that would fit the context."""
    bench = Bench(max_queued_tokens=4)
    bench.submit(PROMPT)
    bench.finish()


def test_no_more_run_than_allowed():
    """The others wait, in order."""
    bench = Bench(max_running=2)
    for number in range(5):
        bench.submit([number, number], max_tokens=3)
    assert bench.step().keys() == {1, 2}
    assert [request.id for request in bench.scheduler.waiting] == [3, 4, 5]


def test_a_large_request_is_not_overtaken_for_ever():
    """A request that lacks room waits, and smaller ones behind it wait with it."""
    bench = Bench(frames=6)
    bench.submit([1, 2, 3, 4, 5, 6], max_tokens=4)
    bench.step()
    large = bench.submit([7] * 8)
    small = bench.submit([8])
    bench.step()
    assert [request.id for request in bench.scheduler.waiting] == [large.id, small.id]
    bench.finish()


# --- a tier below ----------------------------------------------------------------------------------------------------


def test_a_request_waits_for_its_blocks_to_come_up():
    """While its prefix is loaded a request is in no step; it computes the rest when the blocks have landed."""
    bench = Bench(frames=5, lower=(8,))
    bench.submit(PROMPT)
    bench.finish()
    land(bench.kv)
    bench.submit([9] * 9)
    bench.finish()
    land(bench.kv)
    again = bench.submit(PROMPT)
    assert bench.plan() is None
    assert again.state is RequestState.RUNNING
    land(bench.kv)
    assert bench.step() == {again.id: 2}
    assert again.cached_tokens == 6


def test_the_cheapest_gives_way():
    """Of those that rank behind, the one that gives the most room for what it would take to get it back."""
    bench = Bench(20, max_running=3, max_step_tokens=64, max_chunk_tokens=64)
    needy = bench.submit([1, 2], 30)
    long = bench.submit(list(range(100, 112)), 20)
    short = bench.submit(list(range(200, 204)), 20)
    while not bench.scheduler.preemptions:
        bench.step()
    assert needy.preemptions == 0
    assert (long.preemptions, short.preemptions) in ((1, 0), (0, 1))
    bench.finish()
    assert needy.preemptions == 0, "the first in rank never gives way"
    assert all(bench.answer(request) for request in (needy, long, short))


def test_nobody_gives_way_again_and_again():
    """What a request has given up makes it dearer: two that are alike take turns."""
    bench = Bench(14, max_running=3, max_step_tokens=64, max_chunk_tokens=64, max_model_len=28)
    bench.submit([1, 2], 25)
    others = [bench.submit([100 * n, 1], 25) for n in (1, 2)]
    bench.finish()
    first, second = (request.preemptions for request in others)
    assert first + second >= 1
    assert abs(first - second) <= 1


# --- a step ahead ----------------------------------------------------------------------------------------------------


def decoding(**limits: float) -> tuple[Bench, StepPlan]:
    """Two requests that decode, 9 tokens and 2, and the step that gives both their second one."""
    bench = Bench(**limits)
    for prompt, max_tokens in ((PROMPT, 9), ([9, 9], 2)):
        bench.submit(prompt, max_tokens)
    bench.step()
    plan = bench.plan()
    assert plan is not None
    return bench, plan


def test_a_step_of_decodes_is_followed_before_it_ends():
    """The rows that follow stand one token behind those they follow; who has its last token then is not among them."""
    bench, plan = decoding()
    ahead = bench.scheduler.plan_ahead()
    assert ahead is not None
    assert [(row.request_id, row.start, row.follows) for row in ahead.rows] == [(1, 9, True)]
    bench.commit(plan)
    assert bench.scheduler.planned is ahead
    bench.commit(ahead)
    assert len(bench.answer(bench.scheduler.requests[1])) == 3
    bench.finish()


@pytest.mark.parametrize(
    ("wants", "params"), [("waits for a step", {}), ("needs its history", {"presence_penalty": 1.0})]
)
def test_no_step_is_followed_where_something_is_to_be_decided(wants: str, params: dict[str, float]):
    """Somebody waits, or the choice of a token needs those before it: the next is planned when this one is over."""
    bench = Bench()
    bench.submit(PROMPT, 9, **params)
    bench.step()
    plan = bench.plan()
    assert plan is not None
    if not params:
        bench.submit([7, 7])
    assert bench.scheduler.plan_ahead() is None, wants
    bench.commit(plan)
    bench.finish()


def test_who_stops_leaves_when_the_step_that_follows_is_over():
    """A token that ends a request ends it for its client; its blocks stay until nothing writes them any more."""
    bench = Bench()
    request = bench.submit(PROMPT, 9, stop_token_ids=frozenset({sampled(9, 8)}))
    bench.step()
    plan = bench.plan()
    ahead = bench.scheduler.plan_ahead()
    assert plan is not None
    assert ahead is not None
    (event,) = bench.commit(plan)
    assert event.finish is FinishReason.STOP
    assert request.lease is not None
    assert bench.commit(ahead) == []
    assert request.lease is None
    assert bench.scheduler.idle


def test_what_follows_a_failed_step_is_not_committed():
    """Its rows fed what nobody sampled: it has to fail, and tells nobody again."""
    bench, plan = decoding()
    ahead = bench.scheduler.plan_ahead()
    assert ahead is not None
    assert len(bench.scheduler.fail(plan, "out of memory", 0.0)) == 2
    with pytest.raises(AssertionError, match="not known"):
        bench.commit(ahead)
    assert bench.scheduler.fail(ahead, "out of memory", 0.0) == []
    assert bench.scheduler.idle
    assert not bench.kv.leases


def test_nobody_is_displaced_in_vain():
    """A request that there is no room for, whoever gives way, takes no one's place."""
    bench = Bench(12, lower=(4,), max_step_tokens=64, max_chunk_tokens=64)
    background = bench.submit([1, 2], 9, service=ServiceClass(background=True))
    bench.step()
    held = bench.kv.device.take(7)  # as by transfers on a disk that hangs
    assert held is not None
    bench.submit(list(range(20, 34)))
    for _ in range(5):
        bench.scheduler.commit(plan := bench.scheduler.plan(0.0), made_up(plan), 0.0)
    assert bench.scheduler.preemptions <= 1
    assert background.generated == 6
    bench.kv.device.give_back(held)
    bench.finish()
