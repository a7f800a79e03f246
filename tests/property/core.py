"""Small drivers of the synchronous core for tests: a KV manager whose requests compute, a scheduler whose steps run."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from server.kvcache import audit
from server.kvcache.block import Lease
from server.kvcache.hashing import extend_hashes
from server.kvcache.manager import KVManager
from server.kvcache.step_cost import StepWork
from server.scheduler.audit import check_scheduler
from server.scheduler.limits import Limits
from server.scheduler.policy import EVEN, make_policy
from server.scheduler.request import Request, request_from
from server.scheduler.scheduler import Scheduler
from server.types import (
    BlockHash,
    SamplingParams,
    ServiceClass,
    StepPlan,
    StepResult,
    TierFault,
    TokenEvent,
)
from tests.property.making import made_up, make_kv


def hashes_of(kv: KVManager, tokens: Sequence[int], salt: str = "") -> list[BlockHash]:
    hashes: list[BlockHash] = []
    extend_hashes(hashes, kv.root(salt), array("i", tokens), kv.layout.block_tokens)
    return hashes


def come(kv: KVManager, tokens: Sequence[int], *, salt: str = "", now: float = 0.0) -> Lease:
    """A request that computes all its tokens at once; what is cached comes from the cache, from below at once."""
    hashes = hashes_of(kv, tokens, salt)
    lease = kv.admit(hashes[: (len(tokens) - 1) // kv.layout.block_tokens], now)
    if lease.loading:
        land(kv, now=now)
        kv.join(lease)
    assert kv.grow(lease, len(tokens)), "no room"
    kv.seal(lease, hashes, len(tokens) // kv.layout.block_tokens)
    return lease


def visit(kv: KVManager, tokens: Sequence[int], *, salt: str = "", now: float = 0.0) -> None:
    """Come and go: afterwards the full blocks of `tokens` are cached."""
    kv.release(come(kv, tokens, salt=salt, now=now))


def land(kv: KVManager, fault: TierFault | None = None, now: float = 0.0, *, into: str | None = None) -> int:
    """Carry out everything that waits to move, or fail what moves `into` that tier; how many transfers that were."""
    count = 0
    while transfers := kv.plan_transfers(now):
        for transfer in transfers:
            kv.complete(transfer.id, fault if into in (None, transfer.target[0]) else None, now)
        count += len(transfers)
    return count


def kv_with_on_ssd_only(tokens: Sequence[int], device: int = 4) -> KVManager:
    """A cache of three tiers in which the blocks of `tokens` are nowhere but on SSD."""
    kv = make_kv(device, 8, 64)
    visit(kv, tokens)
    land(kv)
    for start in range(10, 90, 8):
        visit(kv, list(range(start, start + 8)))
        land(kv)
    return kv


def cached_blocks(kv: KVManager, tokens: Sequence[int], salt: str = "") -> int:
    """How many blocks of `tokens` a request would find."""
    count = 0
    for value in hashes_of(kv, tokens, salt):
        if not kv.knows(value):
            break
        count += 1
    return count


LIMITS = {
    "max_running": 4, "max_step_tokens": 16, "max_chunk_tokens": 16, "max_queued_requests": 100,
    "max_queued_tokens": 1000, "max_model_len": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Device:
    """How long steps take: `base_s` and `token_s` each with a part of a prompt, `floor_s` and `row_s` each without."""

    base_s: float = 0.01
    token_s: float = 0.001
    floor_s: float = 0.01
    row_s: float = 0.0001

    def __call__(self, work: StepWork) -> float:
        if work.decodes:
            return self.floor_s + self.row_s * work.tokens
        return self.base_s + self.token_s * work.tokens

    def teach(self, kv: KVManager) -> None:
        """What the daemon knows after a while."""
        for _ in range(50):
            for tokens in (1, 4, 32, 128, 512):
                for work in (StepWork(tokens, decodes=True), StepWork(tokens, tokens * tokens // 2)):
                    kv.planner.step.observe(work, self(work))


class Bench:
    """A scheduler over one KV manager, stepped by hand; both audited around every step.

    Every call takes a second, unless there is a `device`: then a step takes what that says, and all else no time.
    """

    def __init__(
        self,
        frames: int = 32,
        *,
        lower: tuple[int, ...] = (),
        policy: str = "fcfs",
        weights: Mapping[str, float] = EVEN,
        device: Callable[[StepWork], float] | None = None,
        block_tokens: int = 2,
        **limits: float,
    ) -> None:
        self.kv = make_kv(frames, *lower, block_tokens=block_tokens)
        self.scheduler = Scheduler(self.kv, make_policy(policy, weights), Limits(**(LIMITS | limits)))  # type: ignore[arg-type]
        self.device = device
        if isinstance(device, Device):
            device.teach(self.kv)
        self.now = 0.0
        self.steps_s: list[float] = []
        """How long each step took."""
        self.computed: dict[int, int] = {}
        """Tokens fed for each request so far."""
        self.events: dict[int, list[TokenEvent]] = {}

    def submit(
        self,
        prompt: Sequence[int],
        max_tokens: int = 1,
        *,
        priority: int = 0,
        salt: str = "",
        service: ServiceClass | None = None,
        **params: object,
    ) -> Request:
        self.now += self.device is None
        request = request_from(
            len(self.events) + 1,
            prompt,
            SamplingParams(max_tokens, **params),  # type: ignore[arg-type]
            self.kv.root(salt),
            now=self.now,
            service=service or ServiceClass(priority=priority),
        )
        self.events[request.id] = []
        self.scheduler.submit(request)
        return request

    def plan(self) -> StepPlan | None:
        self.now += self.device is None
        plan = self.scheduler.plan(self.now)
        audit.check(self.kv)
        check_scheduler(self.scheduler)
        return plan

    def commit(self, plan: StepPlan, result: StepResult | None = None) -> list[TokenEvent]:
        for row in plan.rows:
            self.computed[row.request_id] = self.computed.get(row.request_id, 0) + len(row.tokens)
        if self.device is not None:
            work = StepWork.of(plan.rows)
            self.steps_s.append(self.device(work))
            self.now += self.steps_s[-1]
            self.kv.planner.step.observe(work, self.steps_s[-1])
        events = self.scheduler.commit(plan, result or made_up(plan), self.now)
        for event in events:
            self.events[event.request_id].append(event)
        audit.check(self.kv)
        check_scheduler(self.scheduler)
        return events

    def step(self) -> dict[int, int]:
        """One whole step; tokens fed per request."""
        plan = self.plan()
        assert plan is not None, "nothing to run"
        self.commit(plan)
        return {row.request_id: len(row.tokens) for row in plan.rows}

    def finish(self, limit: int = 1000) -> int:
        """Step until nobody is left; the number of steps."""
        for steps in range(limit):
            if self.scheduler.idle:
                return steps
            plan = self.plan()
            land(self.kv)
            if plan is not None:
                self.commit(plan)
        raise AssertionError(f"requests are left after {limit} steps")

    def answer(self, request: Request) -> list[int]:
        return [event.token for event in self.events[request.id] if event.token is not None]
