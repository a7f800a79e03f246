"""One seed, one scenario: a small random daemon, random clients and faults, and everything that must hold afterwards.

The engine, scheduler, KV manager and mover are the production ones; only the clock, the model and the media are
simulated. A scenario is drawn from its seed alone, so `python -m server.sim --seed N` replays it to the last callback.
"""

from __future__ import annotations

import asyncio
import logging
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from server.engine import Engine, GenerateSpec, Stream
from server.errors import NotReady, Overloaded
from server.kvcache import audit
from server.kvcache.eviction import POLICIES as EVICTION
from server.kvcache.hashing import extend_hashes
from server.kvcache.manager import KVManager, TierSpec
from server.kvcache.mover import Mover
from server.metrics import Metrics
from server.scheduler.audit import check_scheduler
from server.scheduler.limits import Limits
from server.scheduler.policy import POLICIES as SCHEDULING
from server.scheduler.policy import make_policy
from server.scheduler.scheduler import Scheduler
from server.sim.clock import SimFailure, VirtualLoop, run_virtual
from server.sim.numbers import contradictions
from server.sim.oracle import Arena, Expected, OracleRunner, Reference, StepCost
from server.sim.tiers import FaultPlan, Media, SimTier
from server.types import (
    DEVICE,
    DRAM,
    NO_TARGETS,
    SSD,
    BlockHash,
    BlockLayout,
    FinishReason,
    SamplingParams,
    ServiceClass,
    Targets,
)

CPU_LIMIT_S = 4.0
"""Of one scenario; a healthy one takes some hundredths of a second."""
END_S = 1e6
"""Virtual seconds by which every scenario must be over, stalled disks included."""
MAX_ROT = 40
"""Blocks damaged at rest in one scenario, so that a stalled disk does not leave all others rotten."""
FINGERPRINT = b"simulated model"


@dataclass(frozen=True, slots=True)
class Setup:
    """The daemon of one scenario: sizes so small that every limit is met."""

    layout: BlockLayout
    tiers: tuple[TierSpec, ...]
    limits: Limits
    policy: str
    vocab: int
    arrivals_s: float
    cost: StepCost
    faults: FaultPlan
    rot_every_s: float | None
    drain_at_s: float | None
    drain_timeout_s: float
    flush_s: float
    crashes_s: tuple[float, ...]
    """When each life but the last ends: by kill -9, or by a drain where the sign is negative."""
    write_bytes_per_day: float


def draw_setup(rng: Random) -> Setup:
    block_tokens = rng.choice((1, 2, 2, 3, 4))
    frames = rng.randint(4, 20)
    max_step_tokens = rng.randint(2, 24)
    sizes = {DEVICE: frames, DRAM: rng.randint(1, 24), SSD: rng.randint(1, 60)}
    names = rng.choice(((DEVICE,), (DEVICE, DRAM), (DEVICE, DRAM, SSD), (DEVICE, DRAM, SSD)))
    tiers = [TierSpec(name, sizes[name], rng.choice(sorted(EVICTION)), rng.choice((1, 2, 8))) for name in names]
    faulty = rng.random() < 0.7
    lives = rng.choice((0, 0, 1, 2)) if SSD in names else 0
    return Setup(
        BlockLayout(1, 1, 1, 8, block_tokens),
        tuple(tiers),
        limits=Limits(
            max_running=rng.randint(1, min(8, max_step_tokens)),
            max_step_tokens=max_step_tokens,
            max_chunk_tokens=rng.randint(1, max_step_tokens),
            max_queued_requests=rng.choice((2, 6, 1000)),
            max_queued_tokens=rng.choice((40, 100_000)),
            max_model_len=(frames - 1) * block_tokens,
        ),
        policy=rng.choice(sorted(SCHEDULING)),
        vocab=rng.randint(2, 60),
        arrivals_s=rng.choice((0.0, 0.2, 2.0)),
        cost=StepCost(0.01, 0.001, failure_every=rng.choice((0, 0, 15, 60))),
        faults=FaultPlan(rng.choice((2, 5, 20)) if faulty else 0, block_s=rng.choice((0.001, 0.02, 0.2))),
        rot_every_s=rng.choice((None, 0.1, 1.0)) if faulty else None,
        drain_at_s=rng.uniform(0, 3) if rng.random() < 0.3 else None,
        drain_timeout_s=rng.choice((0.0, 0.05, 1.0, 1000.0)),
        flush_s=rng.choice((0.0, 0.1, 1000.0)),
        crashes_s=tuple(rng.choice((-1, 1)) * rng.uniform(0.05, 4) for _ in range(lives)),
        write_bytes_per_day=rng.choice((0.0, 0.0, 1e7)),
    )


@dataclass(slots=True)
class Outcome:
    """What happened in one scenario: enough to see that the seeds reach what they are meant to reach."""

    seed: int
    counts: Counter[str] = field(default_factory=Counter)
    virtual_s: float = 0.0

    def __str__(self) -> str:
        shown = " ".join(f"{name}={count}" for name, count in sorted(self.counts.items()) if count)
        return f"seed {self.seed}: {self.virtual_s:.2f} s virtual {shown}"


class Scenario:
    """A daemon and its clients on one virtual loop. `findings` is empty after a good run."""

    def __init__(self, seed: int, loop: VirtualLoop, setup: Setup | None = None) -> None:
        """`setup` is drawn from the seed unless given."""
        self.rng = Random(seed)
        self.outcome = Outcome(seed)
        self.findings: list[str] = []
        self.setup = setup = setup or draw_setup(self.rng)
        self.reference = Reference(setup.vocab)
        self._loop = loop
        self._contents: dict[bytes, list[int]] = {}
        block_tokens = setup.layout.block_tokens
        arenas = {tier.name: Arena(tier.frames, block_tokens, self._stream("noise")) for tier in setup.tiers}
        self.media = Media(arenas, self.report)
        self.tiers = {
            name: SimTier(name, self.media, setup.faults, self._stream(f"faults of {name}"))
            for name in arenas
            if name != DRAM
        }
        self.prefix_caching = self._stream("caching").random() < 0.9
        self._prefixes = [self._tokens(self.rng.randint(1, 3 * block_tokens + 2)) for _ in range(3)]
        self._start(life=0)

    def _start(self, life: int) -> None:
        """A fresh process over the same media."""
        setup, loop = self.setup, self._loop
        self.kv = KVManager(
            setup.layout, setup.tiers, FINGERPRINT, write_bytes_per_day=setup.write_bytes_per_day, pin_ratio=0.5
        )
        self.scheduler = Scheduler(self.kv, make_policy(setup.policy), setup.limits)
        self.runner = OracleRunner(
            self.media.arenas[DEVICE],
            setup.vocab,
            setup.cost,
            self._stream(f"steps {life}"),
            self.report,
            before_step=self._before_step,
        )
        self.metrics, self.targeted = Metrics("sim"), 0
        self.mover = Mover(self.tiers, run_blocks=self._stream("runs").choice((1, 2, 8)))
        self.engine = Engine(
            self.scheduler,
            self.runner,
            self.mover,
            self.metrics,
            loop.time,
            prefix_caching=self.prefix_caching,
            prefetch=self._stream("prefetch").random() < 0.7,
            flush_s=setup.flush_s,
            lead_s=self._stream("lead").choice((0.002, 1.0)),
            nonce=str(life),
        )

    def _stream(self, name: str) -> Random:
        """Random numbers of one part, so that a change in one does not shift those of all others."""
        return Random(f"{self.outcome.seed} {name}")

    def report(self, what: str) -> None:
        if not self.findings:
            self.findings.append(f"at {self._loop.time():.4f} s: {what}")

    def audit(self) -> None:
        """The books must add up at any moment; a breach ends the run here, where it is fresh."""
        try:
            audit.check(self.kv)
            check_scheduler(self.scheduler)
        except AssertionError as error:
            self.report(f"{type(error).__name__}: {error}")
            raise

    def _before_step(self) -> None:
        self.audit()
        if not self.runner.kept <= self.scheduler.requests.keys():
            self.report("the device keeps what it knows of requests that are gone")

    # --- the run -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        decay = asyncio.create_task(self._decay(), name="decay")
        try:
            for life, end_s in enumerate(self.setup.crashes_s):
                await self._live(life, end_s)
                self.media.lose_memory()
                self.tiers[SSD].crash()
                self._start(life + 1)
                self.kv.recover(await self.tiers[SSD].open())
                self.outcome.counts["recovered"] += self.kv.recovered_blocks
                self.audit()
            await self._live(len(self.setup.crashes_s), None)
        finally:
            decay.cancel()
        self._check_quiet()

    async def _live(self, life: int, end_s: float | None) -> None:
        """One process: until all clients are done, or until `end_s`, by a kill or, when negative, by a drain."""
        engine = asyncio.create_task(self.engine.run(), name="engine")
        clients = [
            asyncio.create_task(self._conversation(self._stream(f"client {life} {number}")), name=f"client {number}")
            for number in range(self.rng.randint(3, 14))
        ]
        await asyncio.sleep(0)
        if end_s is None:
            await self._serve(engine, clients)
        else:
            await asyncio.sleep(abs(end_s))
            if end_s < 0:
                await self.engine.drain(0.0)
                await engine
            self.outcome.counts["kills" if end_s > 0 else "restarts"] += 1
            self._count()
            mine = asyncio.current_task()
            others = {task for task in asyncio.all_tasks() if task is not mine and task.get_name() != "decay"}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, engine: asyncio.Task[None], clients: list[asyncio.Task[None]]) -> None:
        everyone = asyncio.gather(*clients)
        if self.setup.drain_at_s is not None:
            await asyncio.sleep(self.setup.drain_at_s)
            await self.engine.drain(self.setup.drain_timeout_s)
        over: set[asyncio.Future[Any]] = {everyone, engine}
        await asyncio.wait(over, return_when=asyncio.FIRST_COMPLETED)
        if not engine.done():
            await everyone
            await self.engine.drain(END_S)
        await engine
        await everyone
        await self.mover.settled()  # the flush had no more time; what was under way lands all the same

    async def _decay(self) -> None:
        if self.setup.rot_every_s is not None:
            for _ in range(MAX_ROT):
                await asyncio.sleep(self.setup.rot_every_s)
                self.media.rot(self._stream(f"rot {self._loop.time()}"))

    def _check_quiet(self) -> None:
        """Nobody is left: no leases, no transfers, no queues, and every ready copy holds what its hash says."""
        kv, scheduler, outcome = self.kv, self.scheduler, self.outcome
        self.audit()
        facts = {
            "the engine stopped": self.engine.state == "stopped",
            "no request is left": not scheduler.requests and not scheduler.queued_tokens,
            "no lease is left": not kv.leases,
            "no transfer is left": not kv.moving,
            "every block in use is evictable": self.engine.snapshot().kv.tiers[0].referenced_blocks == 0,
            "the scenario ended in time": self._loop.time() < END_S,
        }
        for fact, holds in facts.items():
            if not holds:
                self.report(f"not true in the end: {fact}")
        for what in contradictions(self.metrics.page(), self.targeted):
            self.report(f"metrics: {what}")
        self._check_contents()
        self._count()
        outcome.virtual_s = self._loop.time()
        outcome.counts.update({f"{a}_to_{b}": count for (a, b), count in self.media.moved.items()})
        outcome.counts.update({f"fault_{kind}": count for kind, count in self.media.injected.items()})

    def _count(self) -> None:
        """What happened in one life."""
        kv, counts = self.kv, self.outcome.counts
        counts.update(steps=self.runner.steps, step_failures=self.runner.failures, rows_ahead=self.runner.followed)
        counts.update(preemptions=self.scheduler.preemptions)
        for books in kv.levels:
            counts[f"evicted_{books.name}"] += books.evicted["capacity"]
        for hop in (*kv.planner.up, *kv.planner.down):
            counts.update({f"reported_{reason}": count for reason, count in hop.failed.items()})
        counts.update({f"declined_{reason}": count for (_, reason), count in kv.declined.items()})

    def _check_contents(self) -> None:
        for books in self.kv.levels:
            for value, frame in books.find.items():
                place = (books.name, frame)
                readable = books.ready[frame] and place not in self.media.damaged
                if readable and self.media.read(place) != self._contents.get(value):
                    self.report(f"frame {frame} of {books.name} is not what was sealed under its hash")

    # --- clients -----------------------------------------------------------------------------------------------------

    def _tokens(self, count: int, rng: Random | None = None) -> list[int]:
        rng = rng or self.rng
        return [rng.randrange(self.setup.vocab) for _ in range(count)]

    async def _conversation(self, rng: Random) -> None:
        """One user: some turns, each on top of the last; some turns ask for several choices at once."""
        await asyncio.sleep(rng.uniform(0, self.setup.arrivals_s))
        salt = rng.choice(("", "", "tenant"))
        prompt = list(rng.choice(self._prefixes)) + self._tokens(rng.randint(0, 4), rng)
        service = ServiceClass(salt, rng.randint(0, 2), background=rng.random() < 0.2,
                               targets=rng.choice((NO_TARGETS, Targets(1.0, 0.1))))  # fmt: skip
        for _ in range(rng.randint(1, 4)):
            prompt = prompt[: self.setup.limits.max_model_len]
            params = self._params(rng, len(prompt))
            siblings = [
                self._request(GenerateSpec(prompt, _seeded(params, rng), salt, service), Random(rng.random()))
                for _ in range(rng.choice((1, 1, 1, 2, 4)))
            ]
            answers = await asyncio.gather(*siblings)
            prompt = prompt + answers[0] + self._tokens(rng.randint(1, 4), rng)
            await asyncio.sleep(rng.choice((0.0, rng.uniform(0, 1))))

    def _params(self, rng: Random, prompt_tokens: int) -> SamplingParams:
        room = self.setup.limits.max_model_len - prompt_tokens
        return SamplingParams(
            max_tokens=rng.randint(0 if rng.random() < 0.1 else min(1, room), min(room, rng.choice((2, 8, 40)))),
            stop_token_ids=frozenset(self._tokens(rng.choice((0, 0, 1)), rng)),
            min_tokens=rng.choice((0, 0, 3)),
            prompt_logprobs=0 if rng.random() < 0.1 else None,
        )

    async def _request(self, spec: GenerateSpec, rng: Random) -> list[int]:
        stream = await self._submit(spec, rng)
        if stream is None:
            return []
        self.runner.tenants[stream.request_id] = spec.cache_salt
        expected = self.reference.generate(spec.cache_salt, spec.prompt, spec.params)
        self._remember(spec, expected, self.scheduler.requests[stream.request_id].root)
        answer = _Answer(stream, spec, expected, self.report)
        patience_s = rng.choice((0.0, rng.uniform(0, 0.2), rng.uniform(0, 2))) if rng.random() < 0.2 else None
        enough = rng.randint(0, 10) if rng.random() < 0.1 else None
        slow_s = rng.choice((0.0, 0.0, 0.3))
        try:
            async with asyncio.timeout(patience_s):
                await answer.read(enough, slow_s)
        except TimeoutError:
            self.outcome.counts["impatient"] += 1
        finally:
            stream.close()
        answer.check(may_fail=self.runner.failures > 0, may_abort=self.engine.state != "ready")
        self.outcome.counts[f"ended_{answer.finish or 'closed'}"] += 1
        self.outcome.counts["hit_tokens"] += stream.cached_tokens or 0
        if stream.cached_tokens and not self.prefix_caching:
            self.report(f"request {stream.request_id}: a cache hit with caching switched off")
        return answer.tokens

    async def _submit(self, spec: GenerateSpec, rng: Random) -> Stream | None:
        for _ in range(3):
            try:
                stream = self.engine.submit(spec)
            except Overloaded as error:
                self.outcome.counts["overloaded"] += 1
                await asyncio.sleep(error.retry_after_s * rng.uniform(0.1, 1))
            except NotReady:
                self.outcome.counts["not_ready"] += 1
                return None
            else:
                self.targeted += spec.service.targets != NO_TARGETS and not spec.service.background
                return stream
        return None

    def _remember(self, spec: GenerateSpec, expected: Expected, root: BlockHash) -> None:
        """What the blocks of this request hold, by hash: the truth that ready copies are compared with at the end."""
        tokens, size = array("i", [*spec.prompt, *expected.tokens]), self.setup.layout.block_tokens
        hashes: list[bytes] = []
        extend_hashes(hashes, root, tokens, size)
        numbers = self.reference.kv(spec.cache_salt, tokens)
        for position, value in enumerate(hashes):
            self._contents[value] = numbers[position * size : (position + 1) * size]


class _Answer:
    """What one client received, and whether it may look like that."""

    def __init__(self, stream: Stream, spec: GenerateSpec, expected: Expected, report: Callable[[str], None]) -> None:
        self.tokens: list[int] = []
        self.finish: FinishReason | None = None
        self._scores: list[float] | None = None
        self._stream = stream
        self._spec = spec
        self._expected = expected
        self._report = report

    async def read(self, enough: int | None, slow_s: float) -> None:
        """Read until the end or, when given, until `enough` tokens; `slow_s` is slept before each batch."""
        async for batch in self._stream:
            for event in batch:
                if event.token is not None:
                    self.tokens.append(event.token)
                if event.prompt_logprobs is not None:
                    self._scores = [entry.logprob for entry in event.prompt_logprobs]
                self.finish = event.finish
            if enough is not None and len(self.tokens) >= enough:
                return
            await asyncio.sleep(slow_s)

    def check(self, *, may_fail: bool, may_abort: bool) -> None:
        expected, name = self._expected, f"request {self._stream.request_id}"
        if self.tokens != expected.tokens[: len(self.tokens)]:
            self._report(f"{name}: got {self.tokens}, alone it gives {expected.tokens}")
        if self.finish in (FinishReason.STOP, FinishReason.LENGTH):
            if self.tokens != expected.tokens or self.finish != expected.finish:
                self._report(f"{name}: ended with {self.finish} after {self.tokens}, not {expected}")
            if self._spec.params.prompt_logprobs is not None and self._scores != expected.prompt_scores:
                self._report(f"{name}: prompt scores {self._scores}, alone {expected.prompt_scores}")
        if self.finish is FinishReason.ERROR and not may_fail:
            self._report(f"{name}: ended with an error that nobody injected")
        if self.finish is FinishReason.ABORT and not may_abort:
            self._report(f"{name}: was aborted by nobody")
        cached = self._stream.cached_tokens
        if cached is not None and cached >= len(self._spec.prompt):
            self._report(
                f"{name}: {cached} of {len(self._spec.prompt)} prompt tokens from the cache leave none to sample"
            )


def _seeded(params: SamplingParams, rng: Random) -> SamplingParams:
    return replace(params, seed=rng.randrange(4))


def run_seed(seed: int, *, cpu_limit_s: float = CPU_LIMIT_S) -> Outcome:
    """Run one scenario. Raises SimFailure with everything needed to understand it."""
    loop = VirtualLoop()
    scenario = Scenario(seed, loop)
    logging.disable(logging.CRITICAL)  # injected faults would be logged by the thousand
    try:
        run_virtual(scenario.run(), loop, cpu_limit_s=cpu_limit_s)
    except Exception as error:
        found = f"; {scenario.findings[0]}" if scenario.findings else ""
        raise SimFailure(f"seed {seed}: {type(error).__name__}: {error}{found}") from error
    finally:
        logging.disable(logging.NOTSET)
    if scenario.findings:
        raise SimFailure(f"seed {seed}: {scenario.findings[0]}")
    return scenario.outcome
