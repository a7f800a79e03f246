"""The asyncio shell around the deterministic core: one step loop, one stream per request.

Loop thread only. It owns no policy: it asks the KV manager for transfers, the scheduler for a step, has both carried
out, and hands the tokens to the streams. It reads the time only from the clock that it is given, so that the simulator
runs this very code on virtual time.
"""

from __future__ import annotations

import asyncio
import logging
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from typing import Literal, Self

from server.errors import DeviceLost, InvalidRequest, NotReady, Overloaded, StepFailed
from server.explain import Explanations
from server.kvcache import audit
from server.kvcache.hashing import extend_hashes
from server.kvcache.manager import KVManager
from server.kvcache.mover import Mover
from server.kvcache.report import explain, kv_report
from server.kvcache.step_cost import StepWork
from server.logs import REQUEST_ID, TRACE_PARENT
from server.metrics import Ending, Metrics
from server.recorder import Ended, Recorder
from server.scheduler.request import Request, explained, request_from
from server.scheduler.scheduler import Scheduler
from server.types import (
    ONLINE,
    ORDINARY,
    BlockHash,
    FinishReason,
    KvReport,
    Retention,
    SamplingParams,
    ServiceClass,
    SpanReport,
    StepPlan,
    StepResult,
    StepRunner,
    TierFault,
    TierName,
    TokenEvent,
)

log = logging.getLogger("terrace.engine")

IDLE_AUDIT_S = 1.0
"""How long the daemon must be idle before it audits its books; once per idle period."""
IDLE_AUDIT_FRAMES = 4096
"""An audit costs 5 us per frame on the loop thread: larger caches (20 ms and more) are not audited in production."""

LEAD_S, LEAD_SHARE = 0.002, 0.25
"""How long before its end, as far as that can be foreseen, a step is followed by the next: planning takes less, and
steps vary by such a share."""

State = Literal["starting", "ready", "draining", "stopped", "failed"]


@dataclass(frozen=True, slots=True)
class GenerateSpec:
    """What a client wants: validated parameters and token ids."""

    prompt: Sequence[int]
    params: SamplingParams
    cache_salt: str = ""
    service: ServiceClass = ONLINE
    retention: Retention = ORDINARY


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """One moment. `loading` of the running requests can do nothing but wait for blocks from a tier below.
    `preemptions` since the start, by what became of what was computed: `spill` (it is below), `recompute`."""

    state: State
    running: int
    waiting: int
    loading: int
    kv: KvReport
    waiting_by_reason: Mapping[str, int]
    preemptions: Mapping[str, int]


@dataclass(slots=True)
class _Step:
    """A step that was handed to the device. `since_s`: when it was, or when the one before it was committed; `runs_s`:
    when it was, or when the one before it was over."""

    plan: StepPlan
    kind: str
    since_s: float
    runs_s: float
    work: asyncio.Future[StepResult]


class Stream:
    """The tokens of one request, in batches as steps deliver them; the last event carries `finish`.

    Loop thread, one consumer. What waits here is bounded by the request's own max_tokens. Always `close()` it.
    """

    def __init__(self, engine: Engine, request: Request) -> None:
        self._engine = engine
        self.request = request
        self._events: list[TokenEvent] = []
        self._waiter: asyncio.Future[None] | None = None
        self._finished = False
        self.last_token_s: float | None = None
        self.asked_as = (REQUEST_ID.get(), TRACE_PARENT.get())
        """What the API calls it, and the trace that it is part of."""

    @property
    def request_id(self) -> int:
        return self.request.id

    @property
    def generated(self) -> int:
        """Tokens generated so far, read or not."""
        return self.request.generated

    @property
    def phase(self) -> str:
        """How far it is, one of PHASES; `done` when it is over."""
        return self.request.phase

    @property
    def cached_tokens(self) -> int | None:
        """Prompt tokens that came from the cache; known from the first event on."""
        return self.request.cached_tokens

    @property
    def cached_by_tier(self) -> dict[TierName, int]:
        """The same by the tier that they were found in; sums to `cached_tokens`."""
        size = self._engine.kv.layout.block_tokens
        return {tier: blocks * size for tier, blocks in self.request.served.items()}

    def deliver(self, event: TokenEvent) -> None:
        """The engine's side: add an event and wake the consumer, at most once per step."""
        self._events.append(event)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Sequence[TokenEvent]:
        """Everything that arrived since the last call, waiting if nothing did."""
        while not self._events:
            if self._finished:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        batch, self._events = self._events, []
        self._finished = batch[-1].finish is not None
        return batch

    def close(self, reason: FinishReason = FinishReason.ABORT) -> None:
        """Nobody reads on: an unfinished request ends and its blocks are freed. Idempotent. `reason` is only counted:
        STOP when the reader saw a stop string, which the engine cannot see."""
        self._finished = True
        self._events = []
        self._engine.forget(self, reason)


class Engine:
    def __init__(
        self,
        scheduler: Scheduler,
        runner: StepRunner,
        mover: Mover,
        metrics: Metrics,
        clock: Callable[[], float],
        *,
        prefix_caching: bool = True,
        prefetch: bool = True,
        flush_s: float = 0.0,
        lead_s: float = LEAD_S,
        nonce: str = "",
        recorder: Recorder | None = None,
        explanations: Explanations | None = None,
    ) -> None:
        """`flush_s`: after a drain's last request, how long the cache may take to be written to the lowest tier.
        `nonce`: different in every process, so that without prefix caching a restart finds nothing either."""
        self.state: State = "starting"
        self.scheduler = scheduler
        self.kv: KVManager = scheduler.kv
        self._runner = runner
        self._mover = mover
        self._metrics = metrics
        self._clock = clock
        self._prefix_caching = prefix_caching
        self._prefetch = prefetch
        self._flush_s = flush_s
        self._lead_s = lead_s
        self._nonce = nonce
        self._recorder = recorder
        self.explanations = explanations or Explanations(0, 0.0)
        self._flush_until_s: float | None = None
        self._faults: Counter[str] = Counter()
        self._streams: dict[int, Stream] = {}
        self._wake = asyncio.Event()
        self._over = asyncio.Event()
        self._next_id = 0
        self._failure: BaseException | None = None
        self._audited = True
        self._step: _Step | None = None
        self._decode_s = inf
        """How long the last step took, if it only decoded."""
        self._move_due = self._prefilling = False
        self._progress_s = clock()
        self._stalled: tuple[str, float] | None = None
        """Why nothing can run although there is work, and since when that was counted."""
        metrics.bind(self.snapshot)

    @property
    def max_model_len(self) -> int:
        return self.scheduler.limits.max_model_len

    # --- what the API calls ------------------------------------------------------------------------------------------

    def submit(self, spec: GenerateSpec) -> Stream:
        """Queue a request. Raises NotReady, Overloaded or InvalidRequest; then nothing was queued."""
        if self.state != "ready":
            self._metrics.rejected("draining")
            raise NotReady(f"the server is {self.state}")
        self._next_id += 1
        salt, retention = spec.cache_salt, spec.retention
        if not self._prefix_caching:  # nobody will ever find these blocks, but a preempted request its own
            retention = Retention(transient=True)
            salt = f"{salt}\0only for request {self._next_id} of {self._nonce}"
        request = request_from(
            self._next_id,
            spec.prompt,
            spec.params,
            self.kv.root(salt),
            now=self._clock(),
            service=spec.service,
            retention=retention,
        )
        if self.scheduler.idle:
            self._progress_s = request.arrival_s
        try:
            self.scheduler.submit(request)
        except InvalidRequest:
            self._metrics.rejected("too_long")
            raise
        except Overloaded as error:
            self._metrics.rejected(error.code)
            raise
        if self._prefetch:
            first = len(self.scheduler.waiting) == 1
            soon = first and len(self.scheduler.running) < self.scheduler.limits.max_running
            self.kv.prefetch(self.scheduler.reusable(request), soon=soon)
            self._move_soon()
        stream = self._streams[request.id] = Stream(self, request)
        self._audited = False
        self._wake.set()
        return stream

    def forget(self, stream: Stream, reason: FinishReason) -> None:
        """A stream was closed: end its request if it still lives."""
        if self._streams.pop(stream.request_id, None) is not None:
            now = self._clock()
            self._count_finished(stream, reason, now)
            self.scheduler.abort(stream.request_id, now)
            self._wake.set()

    # --- what an operator asks ---------------------------------------------------------------------------------------

    def chain(self, tokens: Sequence[int], cache_salt: str) -> list[BlockHash]:
        """The hashes of the full blocks of `tokens`, as a request with this salt would have them."""
        hashes: list[BlockHash] = []
        extend_hashes(hashes, self.kv.root(cache_salt), array("i", tokens), self.kv.layout.block_tokens)
        return hashes

    def cache_lookup(self, hashes: Sequence[BlockHash]) -> list[SpanReport]:
        """What is cached of this chain, where, and what a request would do about it now."""
        return explain(self.kv, hashes, self._clock())

    def cache_pin(self, hashes: Sequence[BlockHash], ttl_s: float) -> int:
        """Keep what is known of the chain for `ttl_s`; how many blocks, 0 if pins hold their share already."""
        now = self._clock()
        pinned = self.kv.pin(hashes, now + ttl_s, now)
        self._wake.set()
        return pinned

    def cache_unpin(self, hashes: Sequence[BlockHash]) -> int:
        """End the pins on the chain; how many there were."""
        ended = self.kv.unpin(hashes)
        self._wake.set()
        return ended

    def cache_prefetch(self, hashes: Sequence[BlockHash]) -> int:
        """Start to bring what is on SSD up to DRAM; how many blocks are on their way now."""
        self.kv.prefetch(hashes)
        self._wake.set()
        return sum(value in self.kv.traffic.loads for value in hashes)

    def cache_evict(self, hashes: Sequence[BlockHash]) -> int:
        """Forget these blocks where nobody holds them; how many are gone."""
        gone = self.kv.evict(hashes)
        self._wake.set()
        return gone

    def cache_clear(self) -> int:
        """Forget all that nobody holds and no pin keeps; how many copies."""
        gone = self.kv.clear()
        self._wake.set()
        return gone

    def snapshot(self) -> EngineSnapshot:
        scheduler = self.scheduler
        self._count_stall()
        return EngineSnapshot(
            state=self.state,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            loading=sum(request.held_since_s is not None for request in scheduler.running),
            kv=kv_report(self.kv),
            waiting_by_reason=scheduler.waiting_by_reason(),
            preemptions={"spill": scheduler.spilled, "recompute": scheduler.preemptions - scheduler.spilled},
        )

    def stuck_s(self) -> float:
        """For how long there has been work and no step has ended; 0.0 where there is none, or none is due any more."""
        idle = self.scheduler.idle or self._over.is_set()
        return 0.0 if idle else self._clock() - self._progress_s

    # --- life --------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until drained. An error in the books or the code stops admission and propagates: never clamp."""
        if self.state == "starting":  # a drain may have come before the first turn of the loop
            self.state = "ready"
        try:
            while not self._drained():
                if self._failure is not None:
                    raise self._failure
                if self._step is None:
                    self._step = self._begin(self.scheduler.plan(self._clock()))
                    self._move()  # after the plan, which sends for blocks and may wait for them
                if self._step is not None:
                    self._step = await self._finish(self._step)
                elif self.scheduler.idle:
                    await self._rest()
                else:
                    await self._stall()
            if self.kv.frames_total <= IDLE_AUDIT_FRAMES:
                audit.check(self.kv)
            self.state = "stopped"
        except Exception as error:
            self.state = "failed"
            log.exception("the engine failed and takes no more work")
            self._end_all(FinishReason.ERROR, f"the server failed: {type(error).__name__}")
            raise
        finally:
            self._over.set()

    async def drain(self, timeout_s: float) -> None:
        """Take no new work, let running requests finish for `timeout_s` at most, then abort what is left."""
        if self.state in ("ready", "starting"):
            self.state = "draining"
        self._wake.set()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._over.wait(), timeout_s)
        if not self._over.is_set():
            self._end_all(FinishReason.ABORT, "the server is shutting down")
            self._wake.set()
            await self._over.wait()

    def hurry(self) -> None:
        """A drain has no time left: end what runs, and write nothing more down."""
        self._flush_s = 0.0
        if self._flush_until_s is not None:
            self._flush_until_s = self._clock()
        self._end_all(FinishReason.ABORT, "the server is shutting down")
        self._wake.set()

    def _drained(self) -> bool:
        """No more work, and what is hot was written down, as far as the time for that goes."""
        if self.state != "draining" or not self.scheduler.idle:
            return False
        if self._flush_until_s is None:
            self._flush_until_s = self._clock() + self._flush_s
            self.kv.flush()
        return not self.kv.busy or self._clock() >= self._flush_until_s

    async def _rest(self) -> None:
        """Nothing to run: sleep until something arrives or is late; audit the books once if that takes a while."""
        if self._drained():
            return
        now, wake_s = self._clock(), self.kv.wake_s
        audits = not self._audited and self.scheduler.idle and self.kv.frames_total <= IDLE_AUDIT_FRAMES
        if audits:
            wake_s = min(wake_s, now + IDLE_AUDIT_S)
        if self._flush_until_s is not None:
            wake_s = min(wake_s, self._flush_until_s)
        with suppress(TimeoutError):
            async with asyncio.timeout(None if wake_s == float("inf") else max(0.0, wake_s - now)):
                await self._wake.wait()
        if audits and not self._wake.is_set():
            audit.check(self.kv)
            self._audited = True
        self._wake.clear()

    async def _stall(self) -> None:
        """There is work, and none of it can run now: it waits for blocks, or for frames to put them in."""
        self._stalled = self.kv.stalled_by(), self._clock()
        await self._rest()
        self._count_stall()
        self._stalled = None

    def _count_stall(self) -> None:
        """Up to now: a disk that hangs shows while it hangs."""
        if self._stalled is not None:
            (cause, since_s), now = self._stalled, self._clock()
            self._metrics.stalled(cause, now - since_s)
            self._stalled = cause, now

    def _move(self) -> None:
        """Start the transfers that may start now."""
        transfers = self.kv.plan_transfers(self._clock(), prefilling=self._prefilling)
        self._mover.start(transfers, self._landed, self._broke)
        self._mover.note(self.kv.take_notes())
        if self.kv.more_to_plan:
            self._move_again()

    def _move_soon(self) -> None:
        """While a step runs, blocks move on all the same: what lands, or is asked for, makes others start."""
        if self._step is not None:
            self._move_again()

    def _move_again(self) -> None:
        if not self._move_due:
            self._move_due = True
            asyncio.get_running_loop().call_soon(self._move_meanwhile)

    def _move_meanwhile(self) -> None:
        self._move_due = False
        if not self._over.is_set():
            try:
                self._move()
            except Exception as error:  # noqa: BLE001 - nobody else would see it here
                self._broke(error)

    def _begin(self, plan: StepPlan | None) -> _Step | None:
        """Hand the plan, if there is one, to the device."""
        if plan is None:
            return None
        kind = _kind(plan)
        self._prefilling = kind != "decode"
        now = self._clock()
        return _Step(plan, kind, now, now, asyncio.ensure_future(self._runner.run(plan)))

    async def _finish(self, step: _Step) -> _Step | None:
        """Wait for the step and commit it. The step after it, if that was clear before: it runs by now."""
        following = await self._follow(step)
        try:
            result = await step.work
        except DeviceLost:
            raise
        except Exception as error:  # the device's error, whatever it is: those in the step fail, the daemon goes on
            log.exception("a step failed; its requests end with an error")
            message = error.message if isinstance(error, StepFailed) else f"the step failed: {type(error).__name__}"
            now = self._progress_s = self._clock()
            self._deliver(self.scheduler.fail(step.plan, message, now), now)
            return following
        now = self._progress_s = self._clock()
        self._deliver(self.scheduler.commit(step.plan, result, now), now)
        busy_s, work = result.finished_s - result.started_s, StepWork.of(step.plan.rows)
        self.kv.planner.step.observe(work, busy_s)
        ended_s = self._clock()
        self._metrics.step(step.kind, busy_s, work.tokens, ended_s - step.since_s - busy_s)
        self._decode_s = busy_s if step.kind == "decode" else inf
        if following is not None:
            following.since_s, following.runs_s = ended_s, max(following.runs_s, result.finished_s)
        return following

    async def _follow(self, step: _Step) -> _Step | None:
        """Shortly before a step of decodes ends, hand over the one after it, where that is clear already: the device
        need not wait for the commit between the two. Not earlier: who comes meanwhile would wait for both."""
        if step.kind != "decode":
            return None
        left_s = step.runs_s + self._decode_s * (1 - LEAD_SHARE) - self._lead_s - self._clock()
        if left_s > 0:
            await asyncio.wait((step.work,), timeout=left_s)
        return None if step.work.done() else self._begin(self.scheduler.plan_ahead())

    def _landed(self, transfer_id: int, fault: TierFault | None) -> None:
        if fault is not None:
            self._faults[fault.reason] += 1
            count = self._faults[fault.reason]
            if count & (count - 1) == 0:  # the 1st, 2nd, 4th, 8th ...: a sick disk must not fill the log as well
                log.warning("a transfer failed (%s, number %d): %s", fault.reason, count, fault.detail)
        self.kv.complete(transfer_id, fault, self._clock())
        self._wake.set()
        self._move_soon()

    def _broke(self, error: BaseException) -> None:
        """A transfer ended in an error that is not the world's: the step loop raises it, or its waiters would hang."""
        self._failure = error
        self._wake.set()

    # --- delivery ----------------------------------------------------------------------------------------------------

    def _deliver(self, events: Sequence[TokenEvent], now: float) -> None:
        gaps: dict[float, int] = {}
        tokens = 0
        for event in events:
            stream = self._streams.get(event.request_id)
            if stream is None:
                continue
            if stream.last_token_s is None:
                self._count_first(stream, event, now)
            elif event.token is not None:
                gaps[stream.last_token_s] = gaps.get(stream.last_token_s, 0) + 1
                stream.last_token_s = now
            tokens += event.token is not None
            if event.finish is not None:
                del self._streams[event.request_id]
                self._count_finished(stream, event.finish, now)
            stream.deliver(event)
        for last_s, count in gaps.items():
            self._metrics.inter_token(now - last_s, count)
        self._metrics.generated(tokens)

    def _end_all(self, reason: FinishReason, message: str) -> None:
        now = self._clock()
        for stream in list(self._streams.values()):
            stream.deliver(TokenEvent(stream.request_id, None, finish=reason, error=message))
            del self._streams[stream.request_id]
            self._count_finished(stream, reason, now, failed=True)
            if self.state != "failed":
                self.scheduler.abort(stream.request_id, now)

    def _count_first(self, stream: Stream, event: TokenEvent, now: float) -> None:
        """The first event of a request: its prompt is done, unless its step failed."""
        request, size = stream.request, self.kv.layout.block_tokens
        if request.first_token_s is None:
            return
        stream.last_token_s = now
        if event.token is not None:
            self._metrics.first_token(now - request.arrival_s, request.deepest)
        looks_up = self._prefix_caching and request.looks_up
        self._metrics.prompt_done(
            request.prompt_tokens,
            request.prompt_tokens if looks_up else 0,
            {tier: blocks * size for tier, blocks in request.served.items()},
            {reason: blocks * size for reason, blocks in request.missed.items()},
        )

    def _count_finished(self, stream: Stream, reason: FinishReason, now: float, *, failed: bool = False) -> None:
        """`failed`: it is our doing that it ended."""
        request = stream.request
        admitted_s = now if request.admitted_s is None else request.admitted_s
        first_s = now if request.first_token_s is None else request.first_token_s
        held_s = min(request.held_s, first_s - admitted_s)
        phases_s = {
            "queue": admitted_s - request.arrival_s,
            "kv_restore": held_s,
            "prefill": first_s - admitted_s - held_s,
            "decode": now - first_s,
        }
        tpot_s = None
        if request.generated > 1 and request.last_token_s is not None:
            tpot_s = (request.last_token_s - first_s) / (request.generated - 1)
        failed = failed or reason is FinishReason.ERROR
        self._metrics.finished(
            Ending(
                reason.value,
                now - request.arrival_s,
                phases_s,
                tpot_s,
                request.prompt_tokens,
                request.generated,
                request.service.met(first_s - request.arrival_s, tpot_s, failed=failed),
            )
        )
        if self.explanations.wanted:
            size = self.kv.layout.block_tokens
            self.explanations.add(explained(request, stream.asked_as, reason.value, failed, phases_s, size, now))
        if self._recorder is not None:
            prompt = request.tokens[: request.prompt_tokens]
            self._recorder.record(Ended(request.arrival_s, request.root, prompt, request.generated, request.service))


def _kind(plan: StepPlan) -> str:
    """`decode`: every row feeds one token; `prefill`: none does; else `mixed`."""
    single = sum(len(row.tokens) == 1 for row in plan.rows)
    return "decode" if single == len(plan.rows) else "mixed" if single else "prefill"
