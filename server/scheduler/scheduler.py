"""Scheduler: which tokens of which requests go into the next step. Pure, synchronous, loop thread only.

One token budget per step: first one token for every request that decodes, then prompt chunks of those that are behind,
then admissions while budget and memory last. Chunks are cut so that whoever decodes gets the time per token that was
promised. When the device is full, a request gives its blocks back and starts to chase again later; its sealed blocks
stay cached, so it usually finds most of them.

Background requests get what is left: a little beside others, or steps that are short, so that whoever comes waits for
no more than one of those.

Between `plan` and `commit` the plan's requests keep their frames, whatever happens to them meanwhile. Where the step
after the planned one is clear before that has ended (all decode, nobody waits), `plan_ahead` gives it, to be ready when
the device is.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from math import ceil, inf
from operator import attrgetter

from server.errors import GRAMMAR_STUCK, InvalidRequest, Overloaded
from server.kvcache.block import Lease, Over
from server.kvcache.hashing import extend_hashes
from server.kvcache.manager import KVManager
from server.scheduler import displacing, feeding, forecast
from server.scheduler.draft import Draft
from server.scheduler.limits import Limits
from server.scheduler.policy import SchedulingPolicy
from server.scheduler.request import Request, RequestState
from server.types import (
    BlockHash,
    FinishReason,
    RequestId,
    StepPlan,
    StepResult,
    StepRow,
    TokenEvent,
)

ADMIT_RESERVE_RATIO = 0.01
"""Share of the device's frames that an admission leaves for running requests to grow into."""
CUT_LEAST = 4
"""A step is not cut for those that may come to less than so many times what it takes without prompts."""
DEFER_LOOK_AHEAD = 64
"""How many waiting requests are looked at behind ones that wait for a prefix which a running request computes."""

_by_rank = attrgetter("rank")


class Scheduler:
    def __init__(self, kv: KVManager, policy: SchedulingPolicy, limits: Limits) -> None:
        assert limits.max_running <= limits.max_step_tokens, "every running request may decode in one step"
        self.kv = kv
        self.policy = policy
        self.limits = limits
        self.requests: dict[RequestId, Request] = {}
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.planned: StepPlan | None = None
        self.ahead: StepPlan | None = None
        """The step after the planned one, if that is planned, too."""
        self.queued_tokens = 0
        self.preemptions = 0
        self.spilled = 0
        """Preemptions of requests that had a copy of all they shared in a tier below."""
        self._background = 0
        self._block_tokens = kv.layout.block_tokens
        self._broken: StepPlan | None = None
        """A planned step that follows one that failed."""
        self._computing: dict[BlockHash, int] = {}
        self._came: list[Request] = []
        self._planned_ids: Mapping[RequestId, StepRow] = {}
        self._ahead_ids: Mapping[RequestId, StepRow] = {}
        self._retired: list[RequestId] = []
        self._next_plan = 0

    # --- requests come and go ----------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Queue a request. Raises InvalidRequest when it can never fit, Overloaded when a queue limit is reached."""
        limits, prompt = self.limits, request.prompt_tokens
        if prompt == 0:
            raise InvalidRequest("the prompt has no tokens; send at least one", param="prompt")
        if prompt + request.params.max_tokens > limits.max_model_len:
            raise InvalidRequest(
                f"prompt ({prompt} tokens) plus max_tokens ({request.params.max_tokens}) exceed the model's context of "
                f"{limits.max_model_len} tokens; shorten the prompt or lower max_tokens",
                param="prompt",
                code="context_length_exceeded",
            )
        if len(self.waiting) >= limits.max_queued_requests:
            raise Overloaded(f"{len(self.waiting)} requests are waiting already; try again later", retry_after_s=1)
        if self.waiting and self.queued_tokens + prompt > limits.max_queued_tokens:
            raise Overloaded(f"{self.queued_tokens} prompt tokens are waiting; try again later", retry_after_s=1)
        extend_hashes(request.hashes, request.root, request.tokens, self._block_tokens)
        self._foresee(request)
        self.requests[request.id] = request
        self._background += request.service.background
        self.kv.asked(self.reusable(request), request.arrival_s)
        self.policy.queued(request)
        self._enqueue(request)

    def _foresee(self, request: Request) -> None:
        """Its place in the queue and its time to the first token. Raises Overloaded if that is too long and matters."""
        reusable = self.reusable(request)
        request.work_s = forecast.prompt_work_s(self.kv, request.prompt_tokens, reusable)
        request.rank = request.service.background, self.policy.rank(request)
        request.predicted_ttft_s = forecast.ttft_s(
            self.kv, request, reusable, self.waiting, self.running, self.limits.max_step_tokens
        )
        late_s = request.predicted_ttft_s - request.service.targets.ttft_s
        if self.limits.refuse_late and late_s > 0:
            raise Overloaded(
                f"the first token would come after {request.predicted_ttft_s:.1f} s, but was wanted after "
                f"{request.service.targets.ttft_s:g} s; try again later, or elsewhere",
                retry_after_s=max(1, ceil(late_s)),
                code="too_late",
            )

    def abort(self, id: RequestId, now: float) -> None:
        """Forget a request and free its blocks: now, or at the end of the last step that it is in. Idempotent."""
        request = self.requests.get(id)
        if request is None or request.aborted:
            return
        request.aborted = True
        if id not in self._planned_ids and id not in self._ahead_ids:
            self._finish(request, now)

    @property
    def idle(self) -> bool:
        return not self.requests

    def waiting_by_reason(self) -> dict[str, int]:
        """Who is in the queue, by what for: O(queue)."""
        background = sum(request.service.background for request in self.waiting)
        shared = sum(r.awaits in self._computing and not r.service.background for r in self.waiting)
        alone = len(self.waiting) - background - shared
        return {"capacity": alone, "shared_prefix": shared, "background": background}

    # --- plan --------------------------------------------------------------------------------------------------------

    def plan(self, now: float) -> StepPlan | None:
        """The next step, or None when nothing can run before a request or a transfer arrives."""
        assert self.planned is None, "one step at a time"
        self.kv.wake_s = float("inf")
        rows: dict[RequestId, StepRow] = {}
        preempted = True
        while preempted and not rows:  # places were given up and nobody took them yet: look again
            before = self.preemptions
            rows = self._draft(now)
            preempted = self.preemptions > before
        if not rows:
            assert not self.requests or self.kv.moving, "requests wait and nothing can ever run"
            return None
        self._planned_ids = rows
        self.planned = self._numbered(rows)
        return self.planned

    def plan_ahead(self) -> StepPlan | None:
        """The step after the planned one, if nothing has to be decided for it: all that run decode in it, and nobody
        waits. Its rows follow those of the planned step, whose tokens are not known yet."""
        assert self.planned is not None, "there is no step to follow"
        assert self.ahead is None, "two steps at a time"
        if self.waiting or self._background or len(self.running) != len(self._planned_ids):
            return None
        rows = feeding.rows_ahead(self.kv, self.running, self._planned_ids)
        if not rows:
            return None
        self._ahead_ids = rows
        self.ahead = self._numbered(rows)
        return self.ahead

    def _numbered(self, rows: Mapping[RequestId, StepRow]) -> StepPlan:
        self._next_plan += 1
        retired, self._retired = self._retired, []
        return StepPlan(self._next_plan, list(rows.values()), retired)

    def _draft(self, now: float) -> dict[RequestId, StepRow]:
        draft = Draft(self.limits.max_step_tokens, self.kv.planner.step)
        preemptions = self.preemptions
        online = bisect_left(self.running, (True,), key=_by_rank)
        self._serve(self.running[:online], draft, now)
        if self.preemptions == preemptions:
            self._admit(False, draft, now)
        if draft.budget and self._background:
            self._fill(draft, now, admits=self.preemptions == preemptions)
        self._expect_those_that_wait()
        return draft.rows

    def _serve(self, requests: Sequence[Request], draft: Draft, now: float) -> None:
        """Those that run, in order of rank: who decodes first, and then prompts for as long as that allows. A prompt
        pauses, and keeps its blocks, while there is work for those that overtake it."""
        until_s, preemptions = draft.until_s, self.preemptions
        for decoding in (True, False):
            for request in [r for r in requests if (len(r.tokens) - r.computed_tokens == 1) == decoding]:
                if not decoding and self.preemptions == preemptions:
                    self._admit_before(request, draft, now)
                if draft.budget == 0:
                    break
                if request.state is RequestState.RUNNING:
                    self._advance(request, draft, now)
                    until_s = min(until_s, request.service.targets.tpot_s) if decoding else until_s
            draft.until_s = until_s

    def _fill(self, draft: Draft, now: float, *, admits: bool) -> None:
        """Background work: beside those that decode, or in a short step of its own. Not beside a prompt: somebody waits
        for its first token."""
        limits, alone = self.limits, not draft.rows
        if draft.has_prompts or not (alone or limits.background_slack):
            return
        draft.until_s = limits.background_step_s if alone else draft.seconds * (1 + limits.background_slack)
        online = bisect_left(self.running, (True,), key=_by_rank)
        self._shrink(online, draft)
        self._serve(self.running[online:], draft, now)
        if admits:
            self._admit(True, draft, now)

    def _shrink(self, online: int, draft: Draft) -> None:
        """Background requests that grew beyond their share of the device give way, but for the first of them."""
        held = self.kv.layout.blocks_for(sum(len(other.tokens) for other in self.running[online:]))
        while held > self.limits.background_kv_share * self.kv.device.pool.capacity and len(self.running) > online + 1:
            held -= self.kv.layout.blocks_for(len(self.running[-1].tokens))
            draft.drop(self.running[-1].id)
            self._preempt(self.running[-1])

    def _expect_those_that_wait(self) -> None:
        """Who came since the last step and could not start: what it will use should still be there then."""
        for request in self._came:
            if request.state is RequestState.WAITING and request.expected is None:
                values = self.reusable(request)
                request.expected = values, self.kv.expect(values)
        self._came.clear()

    def _advance(self, request: Request, draft: Draft, now: float) -> None:
        """Give `request` its row, preempting others for room; it may be itself that has to go."""
        lease = request.lease
        assert lease is not None
        limit = self._meet(request, lease, now) if lease.loading else len(request.tokens)
        if lease.loading or request.held_since_s is not None:
            self.kv.accounts.held_up(lease, request.hold_up(lease, now, waits=limit <= request.computed_tokens))
        count = self._granted(request, min(limit - request.computed_tokens, draft.budget), draft)
        if count <= 0:
            return  # waits for its blocks, or for time
        end = request.computed_tokens + count
        if end > len(lease.table) * self._block_tokens:
            while not self.kv.grow(lease, end):
                victim = self._victim(request)
                draft.drop(victim.id)
                self._preempt(victim)
                if victim is request:
                    return
        draft.add(feeding.row_of(request, end))

    def _granted(self, request: Request, count: int, draft: Draft) -> int:
        """Of `count` tokens that are due, how many fit into the step's time. Who is online always gets on."""
        count = min(count, self.limits.max_chunk_tokens)
        if request.lacking > 1:
            draft.until_s = min(draft.until_s, max(self.policy.step_s(request), CUT_LEAST * draft.decode_s))
        if draft.until_s == inf or count <= 0 or (request.lacking == 1 and not request.service.background):
            return count
        fitting = draft.fitting(request.computed_tokens, count)
        if not request.service.background or not draft.rows:
            return max(fitting, draft.least(count))
        return fitting

    def _victim(self, needy: Request) -> Request:
        """Who gives way for `needy` to grow: one that ranks behind it, else itself. So the first in rank gets on."""
        return displacing.cheapest(self.kv, [other for other in self._last() if other.rank > needy.rank]) or needy

    def _meet(self, request: Request, lease: Lease, now: float) -> int:
        """Part of the prefix is on its way: take what came, and say up to which token to compute meanwhile."""
        granted = len(lease.table) * self._block_tokens
        if request.computed_tokens < granted:
            return granted
        self._seal(request)
        if lease.sealed == len(lease.table) and self.kv.join(lease):
            self._joined(request, lease)
        if not lease.loading:
            self.kv.accounts.restored(lease, now)
            return len(request.tokens)
        floor_s = self._step_s(len(self.running) - 1)
        return min(self.kv.compute_until(lease, now, floor_s=floor_s) * self._block_tokens, len(request.tokens))

    def _step_s(self, others: int) -> float:
        """How long the others hold the device up, at least, while a request waits."""
        return self.kv.planner.step.floor_s if others else 0.0

    def _joined(self, request: Request, lease: Lease) -> None:
        """The table grew by blocks that need no computing."""
        request.computed_tokens = len(lease.table) * self._block_tokens
        self.kv.accounts.credit(lease)
        if request.preemptions == 0:
            request.served, request.missed, request.decided = lease.served, lease.missed, lease.decided
            request.landed_by_tier_s = lease.landed_by_tier_s
            request.cached_tokens = lease.served.total() * self._block_tokens

    def _preempt(self, request: Request) -> None:
        """Take a running request's blocks back and queue it again, at its rank."""
        self.running.remove(request)
        self._retire(request, None)
        request.computed_tokens, request.held_since_s = 0, None
        if request.scores_prompt:
            request.prompt_logprobs = []
        request.preemptions += 1
        self.preemptions += 1
        self._enqueue(request)

    # --- admission ---------------------------------------------------------------------------------------------------

    def _admit_before(self, running: Request, draft: Draft, now: float) -> None:
        """Start waiting requests that overtake `running`, which computes its prompt: they get their part of the step
        first. A prompt of 130,000 tokens takes 15 s."""
        if self.waiting and self.policy.overtakes(self.waiting[0], running):
            self._admit(running.service.background, draft, now, running)

    def _admit(self, background: bool, draft: Draft, now: float, before: Request | None = None) -> None:
        """Start waiting requests in rank order. The first that lacks room stops the rest: no one overtakes it for ever.

        A request whose next block is being computed by a running one waits for that block instead of computing it too
        (n choices of one prompt, or a thousand users of one new system prompt); those behind it may pass.

        `before`: only those that overtake it.
        """
        promised = self._promised_blocks()
        for request in self._candidates(background, now):
            if before is not None and not self.policy.overtakes(request, before):
                return
            if draft.full and not self.kv.would_load(self.reusable(request)):
                return  # a request whose blocks are to be loaded may start that before its turn to compute
            while not self._place(request, promised, now):
                lower = [other for other in self._last() if self._may_displace(request, other)]
                displaced = displacing.cheapest(self.kv, lower)
                if displaced is None or displacing.room_without(self.kv, lower) - promised < request.needed_blocks:
                    return
                draft.drop(displaced.id)
                self._preempt(displaced)
                promised = self._promised_blocks()
            if draft.budget:
                self._advance(request, draft, now)
            if request.lease is not None:
                promised += self._missing_blocks(request)

    def _may_displace(self, waiting: Request, running: Request) -> bool:
        """May `waiting` have the place of `running`?"""
        if waiting.service.background != running.service.background:
            return running.service.background
        return self.policy.outranks(waiting, running)

    def _last(self) -> list[Request]:
        """Those of the running ones that nobody has to give way to: the last in rank, and who may not displace it."""
        return [other for other in self.running if not self._may_displace(other, self.running[-1])]

    def _put_back(self, request: Request, done_s: float) -> bool:
        """Has the policy a later place for a request that would be done at `done_s`?"""
        later = self.policy.late(request, done_s)
        if later is None:
            return False
        assert later > request.rank[1], "who is put back goes behind"
        self._leave_queue(request)
        request.rank = request.rank[0], later
        insort(self.waiting, request, key=_by_rank)
        return True

    def _candidates(self, background: bool, now: float) -> Iterator[Request]:
        """Who is to be admitted, in rank order. Whoever asks for the next one has admitted the one before."""
        place = bisect_left(self.waiting, (background,), key=_by_rank)
        prompts_s = sum(forecast.left_s(self.kv, other) for other in self.running if other.rank[0] == background)
        deferred = 0
        while place < len(self.waiting) and (request := self.waiting[place]).rank[0] == background:
            if self._put_back(request, now + prompts_s + request.work_s):
                continue
            if not self._next_block_is_coming(request):
                yield request
                prompts_s += request.work_s
                place += request.state is RequestState.WAITING  # it had to give its place back at once
                continue
            place += 1
            deferred += 1
            if deferred >= DEFER_LOOK_AHEAD:
                return

    def _next_block_is_coming(self, request: Request) -> bool:
        if not self._computing:
            return False
        if request.awaits in self._computing:
            return True
        usable = self._usable_hashes(request)
        request.awaits = next((h for h in islice(request.hashes, usable) if not self.kv.knows(h)), None)
        return request.awaits in self._computing

    def reusable(self, request: Request) -> list[BlockHash]:
        """The blocks of `request` that may come from the cache."""
        return request.hashes[: self._usable_hashes(request)]

    def _usable_hashes(self, request: Request) -> int:
        """How many leading blocks may come from the cache: at least one token is left to sample from."""
        most = 0 if request.needs_all_states else (len(request.tokens) - 1) // self._block_tokens
        return min(len(request.hashes), most)

    def _place(self, request: Request, promised: int, now: float) -> bool:
        """Lease what is cached and start `request` if the rest of its tokens fits as well; else leave all as it was."""
        busy = len(self.running)
        room = self.kv.available_blocks - promised
        if busy >= self.limits.max_running or (busy and room < request.needed_blocks):
            return False
        if busy and request.service.background and not self._background_may_hold(request):
            return False
        request.lease = self.kv.admit(
            self.reusable(request), now, floor_s=self._step_s(busy), tenant=request.service.tenant
        )
        reserve = int(ADMIT_RESERVE_RATIO * self.kv.device.pool.capacity) if busy else 0
        wanted = self._missing_blocks(request) + reserve
        if self.kv.available_blocks - promised < wanted:
            request.needed_blocks = wanted + room - (self.kv.available_blocks - promised)
            self.kv.release(request.lease, over=None)
            request.lease = None
            return False
        request.lease.retention = request.retention
        self._dequeue(request)
        if request.admitted_s is None:
            request.admitted_s = now
        self._run(request, request.lease)
        return True

    def _background_may_hold(self, request: Request) -> bool:
        """Their share of the device has room for one more; the first of them may hold more than that."""
        held = [len(other.tokens) for other in self.running if other.service.background]
        wanted = self.kv.layout.blocks_for(sum(held) + len(request.tokens))
        return not held or wanted <= self.limits.background_kv_share * self.kv.device.pool.capacity

    def _run(self, request: Request, lease: Lease) -> None:
        """Compute from the end of the table on; what was matched beyond it is on its way."""
        self._joined(request, lease)
        request.state = RequestState.RUNNING
        matched = len(lease.hashes)
        request.claimed = range(matched, len(request.hashes))
        for value in request.hashes[matched:]:
            self._computing[value] = self._computing.get(value, 0) + 1
        insort(self.running, request, key=_by_rank)
        self.policy.started(request)

    def _promised_blocks(self) -> int:
        """Device frames that admitted requests were granted and have not taken yet."""
        return sum(self._missing_blocks(r) for r in self.running if len(r.tokens) - r.computed_tokens > 1)

    def _missing_blocks(self, request: Request) -> int:
        lease = request.lease
        assert lease is not None
        needed = self.kv.layout.blocks_for(len(request.tokens) + 1)
        return max(0, needed - len(lease.table) - len(lease.tail))

    # --- commit ------------------------------------------------------------------------------------------------------

    def commit(self, plan: StepPlan, result: StepResult, now: float) -> list[TokenEvent]:
        """Apply a finished step: seal full blocks, append sampled tokens, end what is over. One event per new token."""
        assert self.planned is plan, "only the planned step is committed"
        assert plan is not self._broken, "what a failed step sampled is not known"
        assert result.id == plan.id, f"step {result.id} committed, {plan.id} planned"
        self._next_step()
        events: list[TokenEvent] = []
        for position, row in enumerate(plan.rows):
            request = self.requests[row.request_id]
            # Of who was aborted before the token that was fed came, it is not known.
            request.computed_tokens = min(row.start + len(row.tokens), len(request.tokens))
            self._seal(request)
            scored = result.prompt_logprobs[position]
            if scored is not None and request.prompt_logprobs is not None:
                request.prompt_logprobs.extend(scored)
            if request.aborted:
                self._end(request, now)
            elif request.computed_tokens == len(request.tokens):
                events.append(self._emit(request, result, position, now))
        return events

    def _next_step(self) -> None:
        """The planned step is over."""
        self.planned, self.ahead = self.ahead, None
        self._planned_ids, self._ahead_ids = self._ahead_ids, {}

    def fail(self, plan: StepPlan, message: str, now: float) -> list[TokenEvent]:
        """The step produced nothing: end its requests with an error. What earlier steps sealed stays cached. A step
        that follows it has to fail, too."""
        assert self.planned is plan, "only the planned step can fail"
        self._next_step()
        self._broken = self.planned
        events = []
        for row in plan.rows:
            request = self.requests[row.request_id]
            if not request.aborted:
                events.append(TokenEvent(request.id, None, finish=FinishReason.ERROR, error=message))
            self._end(request, now)
        return events

    def _seal(self, request: Request) -> None:
        lease = request.lease
        assert lease is not None
        full = request.computed_tokens // self._block_tokens
        if full <= lease.sealed:
            return
        extend_hashes(request.hashes, request.root, request.tokens, self._block_tokens)
        before = lease.sealed
        self.kv.seal(lease, request.hashes, full, in_step=request.id in self._planned_ids)
        self._unclaim(request, range(before, lease.sealed))

    def _emit(self, request: Request, result: StepResult, position: int, now: float) -> TokenEvent:
        token = result.tokens[position]
        finish = result.ends.get(position)
        if token is not None:
            request.tokens.append(token)
            finish = finish or request.finish_reason(token)
        elif finish is None:
            finish = FinishReason.LENGTH  # max_tokens == 0: the prompt alone was wanted
        if request.first_token_s is None:
            request.first_token_s = now
            self.policy.served(request)
            prompt_logprobs = request.prompt_logprobs
        else:
            prompt_logprobs = None
        request.last_token_s = now
        if finish is not None:
            self._end(request, now)
        error = GRAMMAR_STUCK if finish is FinishReason.ERROR else None
        pooled = result.pooled.get(position)
        return TokenEvent(request.id, token, result.logprobs[position], prompt_logprobs, finish, error, pooled)

    # --- bookkeeping -------------------------------------------------------------------------------------------------

    def _end(self, request: Request, now: float) -> None:
        """It is over: now, or once the step that follows, which it is in already, has ended."""
        request.aborted = True
        if request.id not in self._planned_ids:
            self._finish(request, now)

    def _finish(self, request: Request, now: float) -> None:
        del self.requests[request.id]
        self._background -= request.service.background
        self.policy.ended(request, self._decode_s(request))
        if request.state is RequestState.WAITING:
            self._dequeue(request)
        else:
            self.running.remove(request)
        if request.lease is not None:
            if request.retention.keep_s:
                kept = request.hashes[: request.lease.sealed]
                self.kv.pin(kept, now + request.retention.keep_s, now)
            self._retire(request, Over(request.prompt_tokens, request.generated, request.service.background))
        request.state = RequestState.FINISHED

    def _retire(self, request: Request, over: Over | None) -> None:
        assert request.lease is not None
        self.spilled += over is None and self.kv.level_below(request.lease) is not None
        self.kv.release(request.lease, over=over)
        request.lease = None
        self._unclaim(request, request.claimed)
        self._retired.append(request.id)

    def _unclaim(self, request: Request, positions: Sequence[int]) -> None:
        """Blocks that `request` sealed, or will not seal after all, are no longer worth waiting for."""
        for position in positions:
            if position in request.claimed:
                value = request.hashes[position]
                left = self._computing[value] - 1
                if left:
                    self._computing[value] = left
                else:
                    del self._computing[value]
        if positions:
            request.claimed = range(max(request.claimed.start, positions[-1] + 1), request.claimed.stop)

    def _decode_s(self, request: Request) -> float:
        """About what its answer cost: its own part of the steps that it was in, and not of their floor."""
        return request.generated * self.kv.planner.step.decode_s(request.prompt_tokens + request.generated // 2)

    def _enqueue(self, request: Request) -> None:
        request.state = RequestState.WAITING
        self.queued_tokens += len(request.tokens)
        insort(self.waiting, request, key=_by_rank)
        if not request.service.background:
            self._came.append(request)

    def _dequeue(self, request: Request) -> None:
        self._leave_queue(request)
        self.queued_tokens -= len(request.tokens)
        if request.expected is not None:
            self.kv.expected_no_more(*request.expected)
            request.expected = None

    def _leave_queue(self, request: Request) -> None:
        position = bisect_left(self.waiting, request.rank, key=_by_rank)
        assert self.waiting[position] is request, "the waiting queue is in rank order"
        del self.waiting[position]
