"""Replays a trace through the production engine on virtual time: only the device, the links and the clock are modelled.

Blocks of the trace are blocks of the cache: a prompt is made of its block ids, each repeated, so hashing, matching,
eviction, spilling, loading and scheduling run as they do in the daemon, and only tokens are not computed.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from server.engine import Engine, GenerateSpec, Stream
from server.errors import InvalidRequest, Overloaded
from server.kvcache.books import TierBooks
from server.kvcache.hashing import chain_root, extend_hashes
from server.kvcache.manager import KVManager, TierSpec
from server.kvcache.mover import Broke, Done, Mover
from server.kvcache.report import kv_report
from server.kvcache.reuse import ReuseModel
from server.kvcache.step_cost import StepCost, StepWork
from server.kvcache.tiers.base import Move, Recovered, Tier
from server.metrics import Metrics
from server.scheduler.limits import Limits
from server.scheduler.policy import make_policy
from server.scheduler.scheduler import Scheduler
from server.sim.clock import VirtualLoop, run_virtual
from server.sim.profile import Link, Profile
from server.sim.stalls import CAUSES, Stalls
from server.types import (
    DEVICE,
    DRAM,
    ONLINE,
    SSD,
    BlockHash,
    BlockLayout,
    FrameId,
    KvReport,
    Note,
    SamplingParams,
    ServiceClass,
    StepPlan,
    StepResult,
    TierFault,
    TierName,
    TokenEvent,
    Transfer,
)

IN_FLIGHT_BYTES = 512 * 2**20
RUN_BYTES = 64 * 2**20
FINGERPRINT = b"replay"
TOO_LONG = "longer than the device tier"


@dataclass(frozen=True, slots=True)
class Asked:
    """One request of a trace. `blocks` are ids of 31 bits, one per block of the prompt, the last maybe in part."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: Sequence[int]
    service: ServiceClass = ONLINE


@dataclass(frozen=True, slots=True)
class Tiers:
    """Frames per tier, 0 for none, and what each evicts by."""

    device: int
    dram: int = 0
    ssd: int = 0
    eviction: str = "lru"
    write_share: float = 1.0

    def specs(self, in_flight: int) -> list[TierSpec]:
        sizes = ((DEVICE, self.device), (DRAM, self.dram), (SSD, self.ssd))
        return [TierSpec(name, frames, self.eviction, in_flight) for name, frames in sizes if frames]


@dataclass(frozen=True, slots=True)
class Setup:
    """One daemon to replay on."""

    profile: Profile
    tiers: Tiers
    block_tokens: int
    policy: str = "fcfs"
    max_running: int = 256
    step_tokens: int = 8192
    refuse_late: bool = False
    reuse: ReuseModel | None = None
    """What the tiers know of when blocks are used again, if not just what they learn. For one replay only."""
    step_cost: StepCost | None = None
    """What the planner thinks that steps cost, if not what it measures."""
    moved: list[tuple[float, Transfer]] | None = None
    """If a list, every transfer is put there, with the time at which it starts."""
    left: list[tuple[float, BlockHash]] | None = None
    """If a list, every block that DRAM evicts for want of room is put there, with the time."""


@dataclass(slots=True)
class Served:
    """What became of one request. Seconds after its arrival; None: it did not get so far."""

    asked: Asked
    ttft_s: float | None = None
    e2e_s: float | None = None
    stalls_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CAUSES, 0.0))
    """`ttft_s` by cause; see `stalls.py`."""
    cached_tokens: int = 0
    by_tier: dict[TierName, int] = field(default_factory=dict)
    refused: str | None = None
    """Why, in words that do not differ from request to request."""

    @property
    def tpot_s(self) -> float | None:
        if self.e2e_s is None or self.ttft_s is None or self.asked.output_tokens < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (self.asked.output_tokens - 1)


@dataclass(slots=True)
class Replay:
    """The outcome of a replay."""

    served: list[Served]
    kv: KvReport
    seconds: float
    """Virtual time from the first arrival to the last token."""
    busy_s: float
    """Of the device."""
    idle_loading_s: float
    """How long the device rested while admitted requests waited for their blocks."""
    steps: int
    preemptions: int
    background_tokens: int
    """Computed for background requests while there were others to come or in work."""
    reuse: ReuseModel = field(compare=False)
    """What the tiers know in the end of when blocks are used again."""


def replay(setup: Setup, asked: Sequence[Asked]) -> Replay:
    """Run the whole trace, in order of arrival. When the last online request is over, background ones are left."""
    loop = VirtualLoop(max_iterations=1 << 62)
    return run_virtual(_Replayer(setup, loop).run(asked), loop, cpu_limit_s=1e9)


class _Replayer:
    def __init__(self, setup: Setup, loop: VirtualLoop) -> None:
        self._setup, self._loop = setup, loop
        profile = setup.profile
        # One layer, one head of one byte: whatever makes up the bytes of a token.
        layout = BlockLayout(1, 1, 1, profile.kv_bytes_per_token // 2, setup.block_tokens)
        in_flight = min(256, max(4, IN_FLIGHT_BYTES // layout.block_bytes))
        guesses = [(layout.block_bytes / link.bytes_per_s, link.latency_s) for link in (profile.dram, profile.ssd_read)]
        specs = setup.tiers.specs(in_flight)
        self.kv = KVManager(layout, specs, FINGERPRINT, guesses=guesses[: len(specs) - 1],
                            write_share=setup.tiers.write_share, reuse=setup.reuse)  # fmt: skip
        if setup.left is not None:
            note_evictions(self.kv.levels[1], setup.left, loop)
        limits = Limits(setup.max_running, max(setup.step_tokens, setup.max_running), setup.step_tokens, 1 << 30,
                        1 << 60, (setup.tiers.device - 1) * setup.block_tokens, setup.refuse_late)  # fmt: skip
        self.scheduler = Scheduler(self.kv, make_policy(setup.policy), limits)
        self.stalls = Stalls(self.scheduler)
        self.runner = CostRunner(profile, loop, self.scheduler, self.stalls)
        self._online = 0
        self._online_over = asyncio.Event()
        tiers = {
            DEVICE: RateTier(DEVICE, setup.tiers.device, layout.block_bytes, profile.dram, profile.dram, loop),
            SSD: RateTier(SSD, setup.tiers.ssd, layout.block_bytes, profile.ssd_read, profile.ssd_write, loop),
        }
        run_blocks = max(1, RUN_BYTES // layout.block_bytes)
        mover = Mover(tiers, run_blocks=run_blocks)
        if setup.moved is not None:
            mover = Noting(tiers, run_blocks, setup.moved, loop)
        self.engine = Engine(self.scheduler, self.runner, mover, Metrics("replay"), loop.time)
        if setup.step_cost is not None:
            self.kv.planner.step = setup.step_cost
        for tokens in (64, setup.step_tokens):  # as the daemon measures itself when it starts
            alone = profile.prefill(0, tokens)
            self.kv.planner.step.observe(alone, profile.step_s(alone))

    async def run(self, asked: Sequence[Asked]) -> Replay:
        engine = asyncio.create_task(self.engine.run(), name="engine")
        await asyncio.sleep(0)
        streams: list[tuple[Served, Stream | None]] = []
        for one in asked:
            if one.at_s > self._loop.time():
                await asyncio.sleep(one.at_s - self._loop.time())
            streams.append(self._submit(one))
        if self._online:
            self._online_over.clear()
            await self._online_over.wait()
            for served, stream in streams:
                if stream is not None and served.asked.service.background:
                    stream.close()
        await self.engine.drain(1e9)
        await engine
        seconds = max((self._over(served, stream) for served, stream in streams), default=0.0)
        everyone = [served for served, _ in streams]
        runner = self.runner
        return Replay(everyone, kv_report(self.kv), seconds, runner.busy_s, self.stalls.idle_s, runner.steps,
                      self.scheduler.preemptions, runner.background_tokens, self.kv.reuse)  # fmt: skip

    def _submit(self, asked: Asked) -> tuple[Served, Stream | None]:
        served = Served(asked)
        spec = GenerateSpec(
            prompt_of(asked, self._setup.block_tokens), SamplingParams(asked.output_tokens, temperature=0.0),
            service=asked.service,
        )  # fmt: skip
        try:
            stream = self.engine.submit(spec)
        except InvalidRequest:
            served.refused = TOO_LONG
            return served, None
        except Overloaded as error:
            served.refused = str(error.code)
            return served, None
        self._online += not asked.service.background
        stream.deliver = partial(self._told, asked)  # type: ignore[method-assign] # nobody reads the tokens
        return served, stream

    def _told(self, asked: Asked, event: TokenEvent) -> None:
        if event.finish is not None and not asked.service.background:
            self._online -= 1
            if not self._online:
                self._online_over.set()

    def _over(self, served: Served, stream: Stream | None) -> float:
        if stream is None:
            return 0.0
        request = stream.request
        served.by_tier = dict(stream.cached_by_tier)
        if request.first_token_s is None or request.last_token_s is None:
            return 0.0
        outside_s = self._setup.profile.request_s
        served.ttft_s = request.first_token_s - request.arrival_s + outside_s
        if request.generated == request.params.max_tokens:
            served.e2e_s = request.last_token_s - request.arrival_s + outside_s
        served.stalls_s = dict(self.stalls.of(request))
        served.stalls_s["queue"] += outside_s
        served.cached_tokens = request.cached_tokens or 0
        return request.last_token_s


def prompt_of(asked: Asked, block_tokens: int) -> array[int]:
    """Token ids that make the blocks of a request what the trace says they are."""
    tokens = array("i")
    for block in asked.blocks:
        tokens.extend(array("i", [block]) * block_tokens)
    del tokens[asked.prompt_tokens :]
    return tokens


def hash_chains(asked: Sequence[Asked], block_tokens: int) -> list[list[BlockHash]]:
    """By what names a replay knows the blocks that each request may find."""
    root = chain_root(FINGERPRINT, "")
    chains = []
    for one in asked:
        hashes: list[BlockHash] = []
        extend_hashes(hashes, root, prompt_of(one, block_tokens), block_tokens)
        chains.append(hashes[: (one.prompt_tokens - 1) // block_tokens])
    return chains


class CostRunner:
    """A StepRunner that only takes the time that a step would. Answers are below zero and nobody's but a request's own:
    in a trace no prompt holds what was answered before."""

    def __init__(self, profile: Profile, loop: VirtualLoop, scheduler: Scheduler, stalls: Stalls) -> None:
        self.busy_s = 0.0
        self.steps = 0
        self.background_tokens = 0
        self._requests = scheduler.requests
        self._profile, self._loop, self._stalls = profile, loop, stalls
        self._device = asyncio.Lock()

    async def run(self, plan: StepPlan) -> StepResult:
        async with self._device:
            return await self._step(plan)

    async def _step(self, plan: StepPlan) -> StepResult:
        started_s = self._loop.now_s
        seconds = self._profile.step_s(StepWork.of(plan.rows))
        self.busy_s += seconds
        self.steps += 1
        self.background_tokens += sum(
            len(row.tokens) for row in plan.rows if self._requests[row.request_id].service.background
        )
        self._stalls.start(plan, started_s)
        await asyncio.sleep(seconds)
        self._stalls.end(self._loop.now_s)
        nothing = [None] * len(plan.rows)
        tokens = [None if row.sample is None else -1 - row.request_id for row in plan.rows]
        return StepResult(plan.id, tokens, nothing, nothing, started_s, self._loop.now_s)

    async def aclose(self) -> None:
        """There is nothing to close."""


class Noting(Mover):
    """Also notes in `moved` what it starts."""

    def __init__(
        self, tiers: Mapping[TierName, Tier], run_blocks: int, moved: list[tuple[float, Transfer]], loop: VirtualLoop
    ) -> None:
        super().__init__(tiers, run_blocks=run_blocks)
        self._moved, self._loop = moved, loop

    def start(self, transfers: Sequence[Transfer], done: Done, broke: Broke) -> None:
        self._moved.extend((self._loop.now_s, transfer) for transfer in transfers)
        super().start(transfers, done, broke)


def note_evictions(books: TierBooks, left: list[tuple[float, BlockHash]], loop: VirtualLoop) -> None:
    """From now on `left` gets the blocks that this tier evicts for want of room."""
    evict = books.policy.on_evict

    def on_evict(frame: FrameId) -> None:
        value = books.hashes[frame]
        assert value is not None, "what is evicted is filed"
        left.append((loop.now_s, value))
        evict(frame)

    books.policy.on_evict = on_evict  # type: ignore[method-assign]


class RateTier:
    """A tier whose blocks arrive one after the other at a link's rate; both directions at the same time."""

    def __init__(
        self, name: TierName, frames: int, block_bytes: int, read: Link, write: Link, loop: VirtualLoop
    ) -> None:
        self.name = name
        self.capacity_blocks = frames
        self._loop = loop
        self._block_bytes = block_bytes
        self._links = {"read": read, "write": write}
        self._free_s = {"read": 0.0, "write": 0.0}

    async def open(self) -> Recovered:
        return Recovered()

    async def write(self, moves: Sequence[Move]) -> Sequence[TierFault | None]:
        """Host to tier."""
        return await self._carry("write", len(moves))

    async def read(self, moves: Sequence[Move]) -> Sequence[TierFault | None]:
        """Tier to host."""
        return await self._carry("read", len(moves))

    def note(self, notes: Sequence[Note]) -> None:
        """Nothing outlives a replay."""

    async def aclose(self) -> None:
        """There is nothing to close."""

    async def _carry(self, way: str, blocks: int) -> list[TierFault | None]:
        link, now = self._links[way], self._loop.now_s
        self._free_s[way] = max(now, self._free_s[way]) + blocks * self._block_bytes / link.bytes_per_s
        await asyncio.sleep(self._free_s[way] + link.latency_s - now)
        return [None] * blocks
