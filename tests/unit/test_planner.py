"""Load, compute or both; whom to wait for and how long; when a tier is off."""

from __future__ import annotations

import pytest

from server.kvcache.planner import BREAKER_FAILURES, Breaker, Hop, Planner, WriteBudget
from server.kvcache.step_cost import StepCost, StepWork, pairs_of


def planner(block_s: float, latency_s: float = 0.0, *, base_s: float = 0.01, token_s: float = 0.001) -> Planner:
    """Blocks of 10 tokens: computing one takes 10 ms beside a base of 10 ms, loading one `block_s`."""
    made = Planner(["device", "dram"], 10, [(block_s, latency_s)])
    for tokens in (1, 101):
        made.step.observe(StepWork(tokens), base_s + tokens * token_s)
    return made


def test_a_step_is_a_line() -> None:
    """Base and slope come out of steps of different sizes; steps of one size give a slope alone."""
    cost = StepCost()
    assert not cost.known
    for tokens in (10, 50, 200, 10, 50):
        cost.observe(StepWork(tokens), 0.02 + 0.001 * tokens)
    assert cost.base_s == pytest.approx(0.02, rel=0.01)
    assert cost.tokens_s(0, 100) == pytest.approx(0.1, rel=0.01)
    same = StepCost()
    for _ in range(3):
        same.observe(StepWork(100), 0.1)
    assert same.base_s == pytest.approx(0.0, abs=1e-3)
    assert same.tokens_s(0, 100) == pytest.approx(0.1, rel=0.01)


def test_attention_over_what_came_before_is_learned() -> None:
    """The same tokens cost more behind a long prompt, for a prompt's chunk as for an answer."""
    cost = StepCost()
    for number in range(40):
        start, count, rows, context = 500 * (number % 7), 100 + 50 * (number % 5), 1 + number % 4, 1000 * (number % 3)
        pairs = pairs_of(start, count)
        seconds = 0.001 + 1e-5 * count + 1e-8 * pairs + 1e-7 * context
        cost.observe(StepWork(rows, context=context, decodes=True), 0.005 + 1e-5 * rows + 1e-7 * context)
        cost.observe(StepWork(count, pairs, context), seconds)
    assert cost.tokens_s(10_000, 100) == pytest.approx(1e-3 + 1e-8 * pairs_of(10_000, 100), rel=0.05)
    assert cost.decode_s(10_000) == pytest.approx(1e-5 + 1e-3, rel=0.05)
    assert cost.base_s == pytest.approx(0.001, rel=0.1)
    assert cost.floor_s == pytest.approx(0.005, rel=0.05)


def test_answers_do_not_teach_that_prompts_are_free() -> None:
    """However many steps only decode, what a prompt costs stays known."""
    cost = StepCost()
    cost.observe(StepWork(100), 0.11)
    cost.observe(StepWork(500), 0.51)
    for _ in range(1000):
        cost.observe(StepWork(4, context=100, decodes=True), 0.02)
    assert cost.tokens_s(0, 300) == pytest.approx(0.3, rel=0.01)
    assert cost.floor_s == pytest.approx(0.02, rel=0.01)


@pytest.mark.parametrize("seconds", [0.0, 0.003, 0.05, 0.5])
def test_what_is_affordable_is_the_most_that_fits(seconds: float) -> None:
    """One token more would take longer than there is time."""
    cost = StepCost()
    for start, count in ((0, 100), (1000, 100), (0, 500), (3000, 50)):
        cost.observe(StepWork(count, pairs_of(start, count)), 0.01 + 1e-4 * count + 1e-7 * pairs_of(start, count))
    tokens = cost.affordable(700, seconds, 1000)
    assert cost.tokens_s(700, tokens) <= seconds or tokens == 0
    assert tokens == 1000 or cost.tokens_s(700, tokens + 1) > seconds


@pytest.mark.parametrize(
    ("block_s", "floor_s", "front"),
    [
        (0.0001, 0.0, 0),  # far faster than computing: wait
        (0.01, 0.0, 49),  # about as fast: both at once, until they meet
        (1.0, 0.0, 100),  # far slower: compute everything
        (0.0001, 2.0, 100),  # others hold the device for longer than computing would take
    ],
)
def test_the_shortest_of_three_ways(block_s: float, floor_s: float, front: int) -> None:
    """Waiting, computing, or computing the front while the rest is loaded: whichever ends first."""
    assert planner(block_s).front(1, 0, 100, [0], floor_s) == front


def test_a_queue_in_front_counts() -> None:
    """What others wait for already comes first."""
    fast = planner(0.0001)
    assert fast.worth(1, 0, 10, [0], 0.0)
    assert not fast.worth(1, 0, 10, [10_000], 0.0)


def test_latency_is_waited_for_once() -> None:
    """Of blocks that are landing already, only the pace counts: nobody stops to wait shortly before the end."""
    made = planner(block_s=0.005, latency_s=0.1)
    assert made.front(1, 0, 10, [0], 0.0) == 10
    for _ in range(11):
        made.up[0].started(0.0)
    assert made.front(1, 0, 10, [0], 0.0) == 10, "nothing has landed yet"
    made.up[0].landed(0.1, good=True)
    assert made.front(1, 0, 10, [0], 0.0) == 0


def test_near_break_even_nothing_is_loaded() -> None:
    """A hit must spare a quarter of the computing to be worth the trouble."""
    assert planner(0.004).worth(1, 0, 1, [0], 0.0)
    assert not planner(0.009).worth(1, 0, 1, [0], 0.0)


def test_pace_is_measured_over_bursts() -> None:
    """Blocks that are read in one go land together: their pace is the mean, not the last gap; the first is latency."""
    hop = Hop(1.0, 1.0)
    now = 0.0
    for _ in range(40):
        for _ in range(16):
            hop.started(now)
        for wait_s in (0.08, 0.04):
            now += wait_s
            for _ in range(8):
                hop.landed(now, good=True)
        now += 1.0
    assert hop.latency_s == pytest.approx(0.08, rel=0.1)
    assert hop.block_s == pytest.approx(0.04 / 15, rel=0.2)
    assert hop.in_flight == 0
    assert hop.moved_blocks == 640


def test_blocks_of_one_read_say_nothing_about_the_pace() -> None:
    """Two blocks that come together after 20 ms do not mean that a hundred would come as soon; but that a block takes
    no more than 10 ms."""
    hop = Hop(0.005, 0.02)
    now = 0.0
    for block_s in (0.005, 0.02):
        hop.late(block_s, 1)
        for _ in range(20):
            hop.started(now)
            hop.started(now)
            now += 0.02
            hop.landed(now, good=True)
            hop.landed(now + 1e-5, good=True)
            now += 1.0
        assert hop.block_s == pytest.approx(min(block_s, 0.01), rel=0.01)


def test_a_late_load_says_how_slow_its_tier_is() -> None:
    """What has not come in a second does not take a millisecond; the estimate never falls because of it."""
    hop = Hop(0.001, 0.0)
    hop.late(1.0, 10)
    assert hop.block_s == pytest.approx(0.1)
    hop.late(0.001, 10)
    assert hop.block_s == pytest.approx(0.1)


def test_a_slow_tier_is_measured_again_now_and_then() -> None:
    """Once a second some blocks of a declined hit are loaded all the same."""
    slow = planner(1.0)
    assert slow.probe(1, 80, 0.0) == 10
    assert slow.probe(1, 80, 0.5) == 0
    assert slow.probe(1, 80, 1.5) == 10


def test_patience_grows_with_what_is_at_stake() -> None:
    """A short wait may be given up early; giving up a long prompt costs more than waiting a little."""
    one = planner(0.0001)
    assert one.patience_s(0.001, 0, 1) == pytest.approx(0.0035)
    assert one.patience_s(0.001, 0, 1000) == pytest.approx(0.3, rel=1e-3)


def test_a_breaker_opens_tries_and_closes() -> None:
    """Failures in a row open it; then one trial per pause, which doubles; one success closes it."""
    breaker = Breaker()
    for _ in range(BREAKER_FAILURES):
        assert breaker.allows(0.0)
        breaker.failed(0.0)
    assert not breaker.allows(0.5)
    assert breaker.allows(1.0)
    assert not breaker.allows(1.1), "one trial at a time"
    breaker.failed(1.1)
    assert not breaker.allows(3.0)
    assert breaker.allows(3.2)
    breaker.worked()
    assert breaker.closed
    assert breaker.opened == 1


def test_a_budget_fills_over_the_day() -> None:
    """A minute's worth to begin with, an hour's at most; a day never exceeds the day's share by more than that."""
    budget = WriteBudget(86_400.0)
    assert budget.spend(60, 0.0)
    assert not budget.spend(1, 0.0)
    written = sum(budget.spend(100, float(second)) for second in range(0, 86_400, 10)) * 100
    assert written <= 86_400
    assert written >= 0.99 * 86_400
    assert WriteBudget(0.0).spend(10**18, 0.0), "0 is no limit"
