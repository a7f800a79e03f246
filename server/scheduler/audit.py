"""The invariants of the scheduler, each one function that raises InvariantViolation. Reads all, changes nothing.

`check_scheduler` costs O(requests and their blocks): for the property machine, the simulation and an idle daemon.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from server.kvcache.audit import InvariantViolation
from server.scheduler.request import Request, RequestState
from server.scheduler.scheduler import Scheduler
from server.types import FrameId, StepPlan, StepRow


def _require(fact: bool, message: str) -> None:
    if not fact:
        raise InvariantViolation(message)


def one_queue_each(scheduler: Scheduler) -> None:
    """A live request is in exactly the queue that its state names; queues are in rank order."""
    queues = {
        RequestState.WAITING: scheduler.waiting,
        RequestState.RUNNING: scheduler.running,
    }
    for state, queue in queues.items():
        _require(all(request.state is state for request in queue), f"a request queued as {state.name} is not")
    queued = Counter(request.id for queue in queues.values() for request in queue)
    _require(queued == Counter(scheduler.requests.keys()), "a live request is in no queue or two, or a dead one in one")
    for queue in (scheduler.waiting, scheduler.running):
        _require(all(a.rank < b.rank for a, b in pairwise(queue)), "a queue is not in rank order")


def limits_hold(scheduler: Scheduler) -> None:
    """Running requests, queue lengths and lengths of requests are within their limits."""
    limits = scheduler.limits
    _require(len(scheduler.running) <= limits.max_running, "more requests run than allowed")
    fresh = [request for request in scheduler.waiting if not request.preemptions]
    _require(len(fresh) <= limits.max_queued_requests, "more requests wait than allowed")
    waiting_tokens = sum(len(request.tokens) for request in scheduler.waiting)
    _require(scheduler.queued_tokens == waiting_tokens, "the count of waiting tokens is off")
    for request in scheduler.requests.values():
        _require(len(request.tokens) <= limits.max_model_len, f"request {request.id} outgrew the context")
        _require(request.generated <= request.params.max_tokens, f"request {request.id} outgrew max_tokens")


def leases_fit(scheduler: Scheduler) -> None:
    """Exactly the admitted requests hold a lease, one each, that covers what is computed; waiting ones hold nothing."""
    held = {id(request.lease) for request in scheduler.running}
    _require(len(held) == len(scheduler.running), "two requests share a lease, or one has none")
    _require(held == {id(lease) for lease in scheduler.kv.leases}, "a lease without a request, or the reverse")
    for request in scheduler.waiting:
        _require(request.lease is None and request.computed_tokens == 0, f"waiting request {request.id} holds blocks")
    size = scheduler.kv.layout.block_tokens
    for request in scheduler.running:
        lease = request.lease
        assert lease is not None
        computed = request.computed_tokens
        _require(computed <= len(lease.table) * size, f"request {request.id} computed more than its blocks hold")
        _require(lease.sealed * size <= computed, f"request {request.id} sealed what is not computed")
        left = computed < len(request.tokens) or request.aborted
        _require(left, f"request {request.id} has no token left to feed")
        own = [scheduler.kv.device.hashes[frame] for frame in lease.table.view()[: lease.sealed].tolist()]
        _require(own == request.hashes[: lease.sealed], f"request {request.id} holds blocks of other tokens")


def promises_are_kept(scheduler: Scheduler) -> None:
    """Hashes that others wait for are exactly those that running requests have yet to seal."""
    claimed: Counter[bytes] = Counter()
    for request in scheduler.requests.values():
        if request.state is RequestState.RUNNING:
            claimed.update(request.hashes[position] for position in request.claimed)
    _require(claimed == Counter(scheduler._computing), "the hashes being computed differ from those claimed")


def plan_is_sound(scheduler: Scheduler) -> None:
    """A planned step keeps to its budget, has one row per live request, and writes only private frames, each once. So
    does the one that follows it."""
    for plan in (scheduler.planned, scheduler.ahead):
        if plan is not None:
            _plan_is_sound(scheduler, plan)
    if scheduler.planned is None:
        _require(scheduler.ahead is None, "a step is planned to follow none")
        return
    rows = {row.request_id for row in scheduler.planned.rows}
    for request in scheduler.running:
        due = request.lacking == 1 and not request.service.background
        _require(not due or request.id in rows, f"request {request.id} decodes and is left out of a step")


def _plan_is_sound(scheduler: Scheduler, plan: StepPlan) -> None:
    limits, size = scheduler.limits, scheduler.kv.layout.block_tokens
    _require(
        0 < plan.tokens <= limits.max_step_tokens, f"a step of {plan.tokens} tokens, {limits.max_step_tokens} allowed"
    )
    _require(len({row.request_id for row in plan.rows}) == len(plan.rows), "a request has two rows in one step")
    shared = set(scheduler.kv.device.find.values()) | scheduler.kv.device.pool.free_frames()
    written: set[FrameId] = set()
    for row in plan.rows:
        request = scheduler.requests.get(row.request_id)
        _require(request is not None and request.lease is not None, f"request {row.request_id} left a running step")
        assert request is not None
        if row.follows:
            _row_follows(request, row)
        else:
            _row_fits(request, row, limits.max_chunk_tokens)
        own = set(row.frames[row.start // size : -(-(row.start + len(row.tokens)) // size)].tolist())
        _require(not own & shared, f"request {request.id} writes a frame that is shared or free")
        _require(not own & written, f"request {request.id} writes a frame that another row writes")
        written |= own


def _row_follows(request: Request, row: StepRow) -> None:
    """It feeds the token behind those that are computed, or are being computed, and that are all but one known."""
    name = f"request {request.id}"
    _require(len(row.tokens) == 1, f"{name}: a row that follows feeds one token")
    _require(row.sample is not None and row.sample.position == row.start + 1, f"{name}: it samples something else")
    _require(len(request.tokens) - 1 <= row.start <= len(request.tokens), f"{name}: it follows something else")
    _require(not request.params.needs_history, f"{name}: it cannot be planned without the tokens before it")
    _own_frames(request, row)


def _row_fits(request: Request, row: StepRow, max_chunk_tokens: int) -> None:
    name, end = f"request {request.id}", row.start + len(row.tokens)
    _require(0 < len(row.tokens) <= max_chunk_tokens, f"{name}: a row of {len(row.tokens)} tokens")
    _require(row.start == request.computed_tokens, f"{name}: its row does not start where it stands")
    _require(row.tokens == request.tokens[row.start : end], f"{name}: its row feeds other tokens than its own")
    _own_frames(request, row)
    last = end == len(request.tokens) and request.generated < request.params.max_tokens
    _require((row.sample is not None) == last, f"{name}: it samples exactly after its last token")
    _require(row.sample is None or row.sample.position == end, f"{name}: it samples for the wrong position")


def _own_frames(request: Request, row: StepRow) -> None:
    assert request.lease is not None
    frames = request.lease.table.view().tolist()
    own = row.frames.tolist() == frames[: len(row.frames)]
    _require(own, f"request {request.id}: its row names frames of others")


INVARIANTS = (one_queue_each, limits_hold, leases_fit, promises_are_kept, plan_is_sound)


def check_scheduler(scheduler: Scheduler) -> None:
    """Raise InvariantViolation at the first invariant that does not hold. Costs O(requests and their blocks)."""
    for invariant in INVARIANTS:
        invariant(scheduler)
