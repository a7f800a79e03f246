"""The load generator's client and driver against a server whose every byte is scripted, in virtual time."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import numpy as np
import pytest

from loadgen.arrivals import constant
from loadgen.client import Target
from loadgen.driver import Driver, Load, Run
from loadgen.measure import Objectives, latencies_ms, summarize
from loadgen.prompts import IdPrompter
from loadgen.records import Outcome, Session, Turn
from loadgen.scripted import CHUNK, HEAD, due_times, framed, last, stalled
from tests.unit.loadgen_fake import Answer, client_of, prompts, run_virtual, spoken

NO_LIMITS = Objectives({})


async def _drive(load: Load, answers: Any, target: Target | None = None) -> Run:
    client, _ = client_of(answers, target) if target else client_of(answers)
    clock = asyncio.get_running_loop().time
    return await Driver(client, load, clock, lambda: 0.0).run()


def _number(body: dict[str, Any]) -> int:
    return int(body["prompt"].split()[-1])


def _one(answer: Answer) -> Outcome:
    async def go() -> Outcome:
        client, _ = client_of(lambda body, now: answer)
        outcome = Outcome(0, 0, 0.0, 3)
        await client.complete([("user", "x")], outcome)
        return outcome

    return run_virtual(go())


def test_percentiles_are_those_of_the_script():
    """With log-normal delays scripted per request, every reported percentile is the one of the script."""
    scripts = [{"seed": n, "ttft": 0.05, "itl": 0.01, "tokens": 20, "sigma": 0.6} for n in range(400)]
    load = Load(prompts(400), 400, constant(25.0))
    run = run_virtual(_drive(load, lambda body, now: spoken(*due_times(scripts[_number(body)]))))
    shown = summarize(run, NO_LIMITS)
    due = [due_times(script) for script in scripts]
    for q, key in ((50, "median"), (90, "p90"), (99, "p99"), (99.9, "p99.9")):
        assert shown[f"{key}_ttft_ms"] == pytest.approx(np.percentile([d[0] for d in due], q) * 1e3, rel=1e-6)
        gaps = [b - a for d in due for a, b in itertools.pairwise(d)]
        assert shown[f"{key}_itl_ms"] == pytest.approx(np.percentile(gaps, q) * 1e3, rel=1e-6)
        tpots = [(d[-1] - d[0]) / 19 for d in due]
        assert shown[f"{key}_tpot_ms"] == pytest.approx(np.percentile(tpots, q) * 1e3, rel=1e-6)
    assert shown["completed"] == 400
    assert run.invalid == []


def test_a_stall_of_the_server_is_seen_by_all_whom_it_delays():
    """An open loop goes on sending while the server stalls: each request shows its whole wait, not only the first."""
    stall = (1.0, 3.0)

    def answers(body: dict[str, Any], now: float) -> Answer:
        return spoken(*(stalled(now + at, stall) - now for at in (0.02, 0.03, 0.04)))

    run = run_virtual(_drive(Load(prompts(50), 50, constant(10.0)), answers))
    seen = sorted(latencies_ms(run.outcomes)["ttft"])
    expected = sorted((stalled(n / 10 + 0.02, stall) - n / 10) * 1e3 for n in range(50))
    assert seen == pytest.approx(expected)
    assert sum(ms > 1000 for ms in seen) == 10


def test_waiting_for_a_slot_counts_as_latency():
    """With at most one request at once and two due together, the second's TTFT holds its wait, its sending does not."""
    load = Load(prompts(2), 2, iter([0.0, 0.0]), max_concurrency=1)
    run = run_virtual(_drive(load, lambda body, now: spoken(0.5, 1.0)))
    first, second = run.outcomes
    assert (first.first_s - first.scheduled_s, second.first_s - second.scheduled_s) == pytest.approx((0.5, 1.5))
    assert second.first_s - second.sent_s == pytest.approx(0.5)
    assert run.invalid == []


@pytest.mark.parametrize("concurrency", [None, 3])
def test_an_interrupted_run_reports_what_was_over(concurrency: int | None):
    """Cancelled after a second, open or closed loop: the finished requests are the result, which says so, and what was
    in flight is neither an error nor a latency."""

    async def go() -> Run:
        load = Load(prompts(100), 100, None if concurrency else constant(10.0), max_concurrency=concurrency)
        client, _ = client_of(lambda body, now: spoken(0.1, 0.25))
        task = asyncio.create_task(Driver(client, load, asyncio.get_running_loop().time, lambda: 0.0).run())
        await asyncio.sleep(1.01)
        task.cancel()
        return await task

    run = run_virtual(go())
    shown = summarize(run, NO_LIMITS)
    assert run.interrupted
    assert "interrupted after 1 s" in run.invalid[0]
    assert (shown["completed"], shown["failed"]) == (8 if concurrency is None else 12, 0)
    assert latencies_ms(run.outcomes)["ttft"] == pytest.approx([100.0] * shown["completed"])


def test_a_closed_loop_keeps_so_many_sessions_and_loses_none():
    """Twenty sessions, four at once: all are sent, never more than four together, each when one before it ended."""
    run = run_virtual(_drive(Load(prompts(20), 20, max_concurrency=4), lambda body, now: spoken(0.1, 0.2)))
    shown = summarize(run, NO_LIMITS)
    assert shown["completed"] == 20
    assert shown["max_concurrent_requests"] == 4
    assert run.seconds == pytest.approx(1.0)


def test_turns_send_what_was_said_and_think_in_between():
    """A second turn starts its pause after the first ended, and its prompt is the first, the answer, and the new."""
    asked: list[str] = []

    def answers(body: dict[str, Any], now: float) -> Answer:
        asked.append(body["prompt"])
        return spoken(0.1, 0.2)

    session = Session((Turn("one", 2), Turn("two", 2, pause_s=5.0)))
    run = run_virtual(_drive(Load(iter([session]), None, iter([0.0])), answers))
    assert asked == ["one", "one word word two"]
    assert run.outcomes[1].scheduled_s == pytest.approx(5.2)


def test_token_ids_are_followed_by_as_many_ids_as_were_generated():
    """A conversation of token ids grows by the answer's length, since a stream carries text only."""
    asked: list[list[int]] = []

    def answers(body: dict[str, Any], now: float) -> Answer:
        asked.append(body["prompt"])
        return spoken(0.1, 0.2)

    make = IdPrompter(100, 200)
    session = Session((Turn(make.make("a", 5), 2), Turn(make.make("b", 4), 2)))
    run_virtual(_drive(Load(iter([session]), None, iter([0.0])), answers))
    assert [len(prompt) for prompt in asked] == [5, 5 + 2 + 4]
    assert asked[1][:5] == asked[0]


def test_a_failed_turn_ends_its_session():
    """What follows a failed turn would be a different conversation: it is not sent."""
    session = Session((Turn("one", 2), Turn("two", 2)))
    answer = [(0.1, b"HTTP/1.1 500 X\r\nContent-Length: 2\r\n\r\n{}")]
    run = run_virtual(_drive(Load(iter([session]), None, iter([0.0])), lambda body, now: answer))
    assert [o.error for o in run.outcomes] == ["http_5xx"]


REFUSED = b'HTTP/1.1 429 X\r\nContent-Length: 37\r\n\r\n{"error": {"message": "queue is full"}}'


@pytest.mark.parametrize(
    ("answer", "error", "detail"),
    [
        ([(0.1, REFUSED.replace(b"37", b"39"))], "http_429", "queue is full"),
        ([(0.1, b"HTTP/1.1 404 X\r\nContent-Length: 4\r\n\r\nnope")], "http_4xx", "404: nope"),
        ([(0.0, HEAD), (0.1, framed(b'{"error": {"message": "engine died"}}') + b"0\r\n\r\n")], "stream_error", "died"),
        ([(0.0, HEAD), (0.1, CHUNK + b"0\r\n\r\n")], "broken_stream", "without [DONE]"),
        ([(0.0, HEAD), (0.1, CHUNK), (0.2, b"")], "broken_stream", "closed in the middle"),
        ([(0.0, HEAD), (0.1, last(1, 0))], "empty", "without any output"),
        ([(0.0, b"SSH-2.0-OpenSSH\r\n")], "broken_stream", "not HTTP"),
        ([(0.0, HEAD), (0.1, framed(b'{"choices": 3}') + last(1, 1))], "stream_error", "not an event"),
        ([(0.0, HEAD), (0.1, CHUNK)], "timeout", "no end after 100 s"),
    ],
)
def test_every_way_to_fail_has_its_name(answer: Answer, error: str, detail: str):
    """Refusals, broken and empty streams, errors in a stream and silence are told apart, with the server's words."""
    outcome = _one(answer)
    assert outcome.error == error
    assert detail in outcome.detail


def test_bytes_may_be_cut_anywhere():
    """A stream that comes byte by byte gives the same chunks, answer and usage as one that comes whole."""
    whole = HEAD + CHUNK + CHUNK + last(7, 2)
    outcome = _one([(0.001 * at, whole[at : at + 1]) for at in range(len(whole))])
    assert (outcome.error, len(outcome.chunk_s), outcome.prompt_tokens, outcome.output_tokens) == (None, 2, 7, 2)


def test_a_connection_is_used_again_and_a_dead_one_replaced():
    """Requests one after the other share a connection; one that the server closed while idle costs nothing."""
    dead_at = [3]

    async def go() -> tuple[list[str | None], int]:
        count = 0

        def answers(body: dict[str, Any], now: float) -> Answer:
            nonlocal count
            count += 1
            return [(0.0, b"")] if count == dead_at[0] else spoken(0.1)

        client, opened = client_of(answers)
        outcomes = [Outcome(0, 0, 0.0, 1) for _ in range(4)]
        for outcome in outcomes:
            await client.complete([("user", "x")], outcome)
        return [o.error for o in outcomes], len(opened)

    assert run_virtual(go()) == ([None] * 4, 2)


def test_a_client_that_is_late_says_so():
    """When the loop was held up, the run is marked invalid and names how late it was."""
    client_lag = [0.2]

    async def go() -> Run:
        loop: Any = asyncio.get_running_loop()

        def answers(body: dict[str, Any], now: float) -> Answer:
            loop.now_s += client_lag[0]  # as if working on it had taken that long
            return spoken(0.5, 0.6)

        client, _ = client_of(answers)
        return await Driver(client, Load(prompts(20), 20, constant(20.0)), loop.time, lambda: 0.0).run()

    run = run_virtual(go())
    assert any("late at p99" in reason for reason in run.invalid)
    assert any("event loop lagged" in reason for reason in run.invalid)


def test_goodput_counts_only_what_meets_every_objective():
    """Requests above one of the limits, and those that failed, are not good."""
    firsts = [0.1, 0.3, 0.1, 0.1]

    def answers(body: dict[str, Any], now: float) -> Answer:
        number = _number(body)
        if number == 3:
            return [(0.0, b"HTTP/1.1 500 X\r\nContent-Length: 0\r\n\r\n")]
        gap = 0.2 if number == 2 else 0.01
        return spoken(firsts[number], firsts[number] + gap)

    run = run_virtual(_drive(Load(prompts(4), 4, constant(1.0)), answers))
    shown = summarize(run, Objectives.parse(["ttft:200", "tpot:50"]))
    assert shown["request_goodput"] == pytest.approx(1 / run.seconds)
    assert (shown["completed"], shown["failed"]) == (3, 1)
