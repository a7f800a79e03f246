"""Scheduler and KV manager under any order of submits, aborts, steps, failed steps and transfers.

The step result is made up on the spot: which token comes next is arithmetic on its position, so that prompts and
answers of different requests collide and share blocks.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from server.errors import InvalidRequest, Overloaded
from server.kvcache import audit
from server.kvcache.eviction import POLICIES
from server.kvcache.step_cost import StepWork
from server.scheduler.audit import check_scheduler
from server.scheduler.limits import Limits
from server.scheduler.policy import POLICIES as SCHEDULING
from server.scheduler.policy import make_policy
from server.scheduler.request import Request, RequestState, request_from
from server.scheduler.scheduler import Scheduler
from server.types import (
    NO_TARGETS,
    ONLINE,
    FinishReason,
    SamplingParams,
    ServiceClass,
    Targets,
    TierFault,
    TokenEvent,
    TokenLogprobs,
    Transfer,
)
from tests.property.making import made_up, make_kv, sampled

STOP = 3
ALL_DONE_STEPS = 3000
"""Far more than any of these little workloads takes; still needed by a scheduler that goes in circles."""


services = st.builds(
    ServiceClass,
    tenant=st.sampled_from(["", "a"]),
    priority=st.integers(0, 2),
    background=st.sampled_from([False, False, True]),
    targets=st.sampled_from([NO_TARGETS, Targets(0.1, 0.001), Targets(100.0, 1.0)]),
)


@dataclass
class Client:
    """What one client has received."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    finish: FinishReason | None = None
    scores: Sequence[TokenLogprobs] | None = None
    aborted: bool = False

    @property
    def listens(self) -> bool:
        return not self.aborted and self.finish is None


def waits(request: Request) -> bool:
    """Its next block is on its way from a tier below."""
    return request.lease is not None and request.lease.loading and len(request.lease.table) in request.lease.loads


class SchedulerMachine(RuleBasedStateMachine):
    scheduler_class: type[Scheduler] = Scheduler

    @initialize(
        device=st.integers(3, 8),
        lower=st.tuples(st.integers(0, 4), st.integers(0, 6)),
        block_tokens=st.integers(1, 2),
        eviction=st.sampled_from(sorted(POLICIES)),
        policy=st.sampled_from(sorted(SCHEDULING)),
        refuse_late=st.booleans(),
        limits=st.tuples(
            st.integers(1, 4), st.integers(0, 4), st.integers(1, 6), st.integers(1, 6), st.integers(4, 60)
        ),
        step_s=st.sampled_from([None, 1e-4, 1e-2, 10.0]),
    )
    def start(
        self,
        device: int,
        lower: tuple[int, int],
        block_tokens: int,
        eviction: str,
        policy: str,
        refuse_late: bool,
        limits: tuple[int, ...],
        step_s: float | None,
    ) -> None:
        running, more, chunk, queued, queued_tokens = limits
        self.kv = make_kv(device, *(lower if lower[0] else ()), block_tokens=block_tokens, eviction=eviction)
        if step_s is not None:
            self.kv.planner.step.observe(StepWork(1), step_s)
        self.limits = Limits(running, running + more, chunk, queued, queued_tokens, (device - 1) * block_tokens,
                             refuse_late=refuse_late)  # fmt: skip
        self.scheduler = self.scheduler_class(self.kv, make_policy(policy), self.limits)
        self.clients: dict[int, Client] = {}
        self.moving: list[Transfer] = []
        self.now = 0.0
        self.next_id = 0

    def later(self) -> float:
        self.now += 1e-5
        return self.now

    def live(self) -> list[int]:
        return sorted(self.scheduler.requests)

    # --- clients -----------------------------------------------------------------------------------------------------

    @rule(
        sequence=st.sampled_from([(0,), (0, 0, 0, 1), (0, 1)]),
        length=st.integers(1, 12),
        max_tokens=st.integers(0, 9),
        min_tokens=st.integers(0, 2),
        stops=st.booleans(),
        scored=st.sampled_from([None, None, 0]),
        service=services,
    )
    def send(
        self, sequence: tuple[int, ...], length: int, max_tokens: int, min_tokens: int, stops: bool,
        scored: int | None, service: ServiceClass,
    ) -> None:  # fmt: skip
        """Somebody sends a request that fits, mostly sharing its beginning with others'; one in twelve is too long."""
        room = self.limits.max_model_len - (length < 12)
        length = min(length, max(1, room))
        prompt = [sequence[position % len(sequence)] for position in range(length)]
        self.submit(prompt, min(max_tokens, room - length + 1), min_tokens, stops, scored, service)

    def submit(
        self,
        prompt: list[int],
        max_tokens: int,
        min_tokens: int,
        stops: bool,
        scored: int | None,
        service: ServiceClass,
    ) -> None:
        """A request is taken unless it can never fit or a queue limit is reached, and then it is refused."""
        params = SamplingParams(
            max_tokens,
            min_tokens=min_tokens,
            stop_token_ids=frozenset([STOP] if stops else []),
            prompt_logprobs=scored,
        )
        self.next_id += 1
        request = request_from(
            self.next_id, prompt, params, self.kv.root(""), now=self.later() // 3e-5, service=service
        )
        waiting, limits = self.scheduler.waiting, self.limits
        fits = len(prompt) + max_tokens <= limits.max_model_len
        queued_tokens = sum(len(other.tokens) for other in waiting)
        full = len(waiting) >= limits.max_queued_requests or (
            bool(waiting) and queued_tokens + len(prompt) > limits.max_queued_tokens
        )
        try:
            self.scheduler.submit(request)
        except InvalidRequest:
            assert not fits, "a request that fits was refused"
        except Overloaded as error:
            if error.code == "too_late":
                assert self.limits.refuse_late, "refused as late, and nobody asked for that"
                return
            assert full, "a request was refused with room in the queue"
        else:
            assert fits, "a request that can never fit was taken"
            assert not full, "a request over the queue's limit was taken"
            self.clients[request.id] = Client(request)

    @rule(length=st.integers(2, 12), times=st.integers(1, 3), floods=st.integers(1, 3))
    def come_back(self, length: int, times: int, floods: int) -> None:
        """All are served; a prompt is served, others take its blocks' frames on the device, then it is sent again."""
        length = min(length, self.limits.max_model_len - 1)
        self.serve_all()
        self.submit([0] * length, 1, 0, False, None, ONLINE)
        for number in range(floods):
            self.serve_all()
            self.submit([9 + number] * (self.limits.max_model_len - 1), 1, 0, False, None, ONLINE)
        self.serve_all()
        for _ in range(times):
            self.submit([0] * length, 1, 0, False, None, ONLINE)

    def serve_all(self) -> None:
        """Turn until nobody is left."""
        for _ in range(ALL_DONE_STEPS):
            if self.scheduler.idle:
                return
            self.now += 0.01
            self.turn()
        raise AssertionError("requests never end")

    @precondition(lambda self: self.scheduler.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        """A client leaves: its request is gone at once unless it is in a step that runs, or is to follow it."""
        id = data.draw(st.sampled_from(self.live()))
        self.clients[id].aborted = True
        self.scheduler.abort(id, self.later())
        self.scheduler.abort(id, self.later())
        steps = [step for step in (self.scheduler.planned, self.scheduler.ahead) if step is not None]
        in_step = any(row.request_id == id for step in steps for row in step.rows)
        assert (id in self.scheduler.requests) == in_step

    # --- steps -------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.scheduler.planned is None)
    @rule()
    def plan(self) -> None:
        """A step has rows, or nothing can run until something lands; whoever ranks first is never left out."""
        plan = self.scheduler.plan(self.later())
        if plan is None:
            assert all(waits(request) for request in self.scheduler.running), "running requests and no step"
            assert not self.scheduler.running or self.kv.wake_s < self.now + 100, "nobody looks again in time"
            return
        assert plan.rows, "a step without rows"
        first = min(self.scheduler.running, key=lambda request: request.rank)
        taken = any(row.request_id == first.id for row in plan.rows)
        assert taken or waits(first), "the first in rank is left out of a step"

    @precondition(lambda self: self.scheduler.planned is not None and self.scheduler.ahead is None)
    @rule()
    def plan_ahead(self) -> None:
        """The step that follows feeds what the planned one samples, of all that have not come to their end."""
        planned = self.scheduler.planned
        assert planned is not None
        ahead = self.scheduler.plan_ahead()
        if ahead is None:
            return
        assert not self.scheduler.waiting, "somebody waits for a step of its own"
        before = {row.request_id: row for row in planned.rows}
        for row in ahead.rows:
            sample, client = before[row.request_id].sample, self.clients[row.request_id]
            assert row.follows
            assert sample is not None
            assert row.start == sample.position
            assert not client.aborted
            assert sample.generated + 1 < client.request.params.max_tokens, "nothing is left to sample"

    @rule(seconds=st.sampled_from([0.002, 0.3, 100.0]))
    def wait(self, seconds: float) -> None:
        """Time passes: loads are late or past their deadline."""
        self.now += seconds

    @rule(turns=st.integers(1, 4), deep=st.booleans())
    def turns(self, turns: int, deep: bool) -> None:
        """The daemon goes on for a while; `deep`: it follows steps wherever it can, and is stopped with one planned."""
        for _ in range(turns):
            self.turn(deep=deep)

    @precondition(lambda self: self.scheduler.planned is not None)
    @rule()
    def commit(self) -> None:
        plan = self.scheduler.planned
        assert plan is not None
        self.deliver(self.scheduler.commit(plan, made_up(plan), self.later()))

    @precondition(lambda self: self.scheduler.planned is not None)
    @rule(leaves=st.booleans())
    def fail(self, leaves: bool) -> None:
        """A failed step ends exactly its own requests, also who left meanwhile, and tells those that still listen."""
        plan = self.scheduler.planned
        assert plan is not None
        ids = {row.request_id for row in plan.rows}
        if leaves:
            self.clients[plan.rows[0].request_id].aborted = True
            self.scheduler.abort(plan.rows[0].request_id, self.later())
        others = set(self.scheduler.requests) - ids
        told = {id for id in ids if self.clients[id].listens}
        events = self.scheduler.fail(plan, "the device is gone", self.later())
        ahead = self.scheduler.planned
        if ahead is not None:
            assert self.scheduler.fail(ahead, "so is its follower", self.later()) == [], "told twice"
        assert {event.request_id for event in events} == told
        assert all(event.finish is FinishReason.ERROR for event in events)
        assert set(self.scheduler.requests) == others
        self.deliver(events)

    # --- transfers ---------------------------------------------------------------------------------------------------

    @rule()
    def plan_transfers(self) -> None:
        self.moving += self.kv.plan_transfers(self.later())

    @precondition(lambda self: self.moving)
    @rule(data=st.data(), reason=st.sampled_from([None, None, "io", "corrupt"]))
    def complete(self, data: st.DataObject, reason: str | None) -> None:
        transfer = data.draw(st.sampled_from(self.moving))
        self.moving.remove(transfer)
        self.kv.complete(transfer.id, TierFault(reason) if reason else None, self.later())

    # --- what must hold ----------------------------------------------------------------------------------------------

    def deliver(self, events: Sequence[TokenEvent]) -> None:
        for event in events:
            client = self.clients[event.request_id]
            assert client.finish is None, "an event after the last"
            assert not client.aborted, "an event for a client that left"
            if event.prompt_logprobs is not None:
                assert client.scores is None, "prompt scores came twice"
                client.scores = event.prompt_logprobs
            if event.token is not None:
                client.tokens.append(event.token)
            client.finish = event.finish
            if event.finish in (FinishReason.STOP, FinishReason.LENGTH):
                self.check_answer(client)

    def check_answer(self, client: Client) -> None:
        """The answer is that of the request alone: as long as it may be, its prompt scored once and in full."""
        params, prompt = client.request.params, client.request.tokens[: client.request.prompt_tokens]
        expected: list[int] = []
        while len(expected) < params.max_tokens:
            expected.append(sampled(len(prompt) + len(expected), len(prompt)))
            if expected[-1] in params.stop_token_ids and len(expected) > params.min_tokens:
                break
        assert client.tokens == expected
        assert client.request.tokens == prompt + array("i", expected)
        if params.prompt_logprobs is None:
            assert client.scores is None
        else:
            assert client.scores is not None, "no prompt scores"
            assert [entry.token for entry in client.scores] == list(prompt[1:])

    @invariant()
    def books(self) -> None:
        if hasattr(self, "scheduler"):
            audit.check(self.kv)
            check_scheduler(self.scheduler)

    def turn(self, *, deep: bool = False) -> None:
        """One turn of the engine's loop, with transfers that land at once."""
        if self.scheduler.planned is None:
            self.plan()
        self.plan_transfers()
        if deep and self.scheduler.planned is not None and self.scheduler.ahead is None:
            self.plan_ahead()
        if self.scheduler.planned is not None:
            self.commit()
        for transfer in self.moving:
            self.kv.complete(transfer.id, None, self.later())
        self.moving.clear()
        self.books()

    def teardown(self) -> None:
        """Those who wait are served although newcomers never stop; then all end, and nothing is held."""
        if not hasattr(self, "scheduler"):
            return
        waiting = {id for id, request in self.scheduler.requests.items() if not request.service.background}
        steps = 0
        while waiting & set(self.scheduler.requests):
            steps += 1
            assert steps < ALL_DONE_STEPS, "requests starve"
            self.now += 100.0
            self.submit([0, 1] if self.limits.max_model_len > 2 else [0], 1, 0, False, None, ServiceClass(priority=9))
            self.turn()
        while not self.scheduler.idle:
            steps += 1
            assert steps < ALL_DONE_STEPS, "requests never end"
            self.turn()
        assert all(client.finish or client.aborted for client in self.clients.values())
        assert all(client.request.state is RequestState.FINISHED for client in self.clients.values())
        assert not self.kv.leases
        assert not self.scheduler.queued_tokens
        while self.kv.moving or self.moving:
            self.turn()
        for books in self.kv.levels:
            assert books.available == books.pool.capacity, f"{books.name}: frames are lost"
