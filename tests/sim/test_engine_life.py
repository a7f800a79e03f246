"""The engine's life on virtual time: what starts, what ends, and that a bug inside ends it loudly."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from random import Random

import pytest

from server.engine import Engine, GenerateSpec
from server.errors import DeviceLost, NotReady
from server.kvcache.mover import Mover
from server.kvcache.tiers.base import Move, Recovered
from server.metrics import Metrics
from server.sim.clock import VirtualLoop, run_virtual
from server.sim.oracle import Arena, OracleRunner, Reference, StepCost
from server.types import DEVICE, DRAM, FinishReason, Note, SamplingParams, TierFault, TokenEvent
from tests.property.core import Bench

STEP_S = 0.1
SPEC = GenerateSpec([1, 2, 3, 4, 5, 6, 7, 8], SamplingParams(max_tokens=3))
OTHER = GenerateSpec([9] * 13, SamplingParams(max_tokens=1))


class World:
    """An engine over the oracle, and its device tier: moves take a moment and move nothing, or raise `raising`."""

    name = DEVICE
    capacity_blocks = 0

    def __init__(self, loop: VirtualLoop, frames: int = 32, lower: int = 0, token_s: float = 0.0) -> None:
        self.broken: list[str] = []
        self.raising: Exception | None = None
        self.landed_in: list[str] = []
        bench = Bench(frames, lower=(lower,))
        self.runner = OracleRunner(
            Arena(frames, 2, Random(0)), 50, StepCost(STEP_S, token_s, failure_every=0), Random(0), self.broken.append
        )
        self.metrics = Metrics("sim")
        self.engine = Engine(bench.scheduler, self.runner, Mover({DEVICE: self}), self.metrics, loop.time)

    async def open(self) -> Recovered:
        return Recovered()

    async def write(self, moves: Sequence[Move]) -> Sequence[TierFault | None]:
        return await self.carry(moves, DEVICE)

    async def read(self, moves: Sequence[Move]) -> Sequence[TierFault | None]:
        return await self.carry(moves, DRAM)

    async def carry(self, moves: Sequence[Move], target: str) -> Sequence[TierFault | None]:
        await asyncio.sleep(0.01)
        if self.raising is not None:
            raise self.raising
        self.landed_in += [target] * len(moves)
        return [None] * len(moves)

    def note(self, notes: Sequence[Note]) -> None:
        """Nothing is remembered."""

    async def aclose(self) -> None:
        """There is nothing to close."""

    async def ask(self, spec: GenerateSpec) -> list[TokenEvent]:
        stream = self.engine.submit(spec)
        self.runner.tenants[stream.request_id] = spec.cache_salt
        return [event async for batch in stream for event in batch]


def play(scene, **sizes: float) -> World:
    """Run `scene(world, engine task)` on a fresh world."""
    loop = VirtualLoop()
    world = World(loop, **sizes)

    async def main() -> None:
        await scene(world, asyncio.create_task(world.engine.run(), name="engine"))

    run_virtual(main(), loop, cpu_limit_s=2.0)
    assert world.broken == []
    return world


def test_an_answer_and_a_clean_end():
    """A request is answered as the model alone would; a drain with nothing left stops the engine."""

    async def scene(world: World, engine: asyncio.Task[None]) -> None:
        await asyncio.sleep(0)
        events = await world.ask(SPEC)
        assert [event.token for event in events] == Reference(50).generate("", SPEC.prompt, SPEC.params).tokens
        await world.engine.drain(1.0)
        await engine
        assert world.engine.state == "stopped"

    play(scene)


def test_a_drain_before_the_first_turn_is_kept():
    """SIGTERM may come before the engine's loop has run once: it ends all the same, and takes no work."""

    async def scene(world: World, engine: asyncio.Task[None]) -> None:
        await world.engine.drain(1.0)
        await engine
        assert world.engine.state == "stopped"
        with pytest.raises(NotReady):
            world.engine.submit(SPEC)

    play(scene)


def test_a_drain_out_of_patience_ends_the_streams():
    """What does not finish in time is told so, with what it has so far."""

    async def scene(world: World, engine: asyncio.Task[None]) -> None:
        await asyncio.sleep(0)
        asking = asyncio.create_task(world.ask(SPEC), name="client")
        await asyncio.sleep(0.15)
        await world.engine.drain(0.0)
        await engine
        events = await asking
        assert events[-1].finish is FinishReason.ABORT
        assert events[-1].error == "the server is shutting down"
        assert len(events) == 2

    play(scene)


def test_a_bug_in_a_transfer_fails_the_engine_and_hangs_nobody():
    """An exception that is not the world's ends the engine and every stream: waiters must not wait for ever."""

    async def scene(world: World, engine: asyncio.Task[None]) -> None:
        world.raising = ValueError("a bug")
        await asyncio.sleep(0)
        events = await world.ask(GenerateSpec(SPEC.prompt, SamplingParams(max_tokens=40)))
        assert events[-1].finish is FinishReason.ERROR
        with pytest.raises(ValueError, match="a bug"):
            await engine
        assert world.engine.state == "failed"

    play(scene, lower=8)


def test_a_request_that_waits_for_a_block_alone_gets_it():
    """With nothing else to wake the loop, the onboard that a plan asked for starts all the same."""

    async def scene(world: World, engine: asyncio.Task[None]) -> None:
        await asyncio.sleep(0)
        await world.ask(SPEC)
        await asyncio.sleep(1)
        await world.ask(OTHER)
        await asyncio.sleep(1)
        assert DEVICE not in world.landed_in
        assert len(await world.ask(SPEC)) == 3
        assert DEVICE in world.landed_in

    play(scene, frames=8, lower=16, token_s=0.1)


def test_progress_is_counted_in_steps_that_end():
    """Without work nothing is stuck, however long; with work the time since the last step that ended counts, and from
    the arrival on where there was no work before."""

    async def scene(world: World, engine: asyncio.Task[None]) -> None:
        await asyncio.sleep(500)
        assert world.engine.stuck_s() == 0.0
        hanging = asyncio.Event()
        run = world.runner.run

        async def hang(plan):
            await hanging.wait()
            return await run(plan)

        world.runner.run = hang  # type: ignore[method-assign]
        asked = asyncio.create_task(world.ask(SPEC))
        await asyncio.sleep(7)
        assert world.engine.stuck_s() == pytest.approx(7)
        hanging.set()
        await asyncio.sleep(0.15)
        while not asked.done():
            assert world.engine.stuck_s() < 0.2
            await asyncio.sleep(0.05)
        assert world.engine.stuck_s() == 0.0
        await world.engine.drain(1)
        await engine

    play(scene)


def test_a_drain_can_be_hurried():
    """Asked again, a drain ends what runs at once, tells its reader so, and does not wait for the time it had."""
    reasons: list[object] = []

    async def scene(world: World, engine: asyncio.Task[None]) -> None:
        asked = asyncio.create_task(world.ask(GenerateSpec([1] * 8, SamplingParams(max_tokens=50))))
        await asyncio.sleep(0.5)
        draining = asyncio.create_task(world.engine.drain(1000))
        await asyncio.sleep(0.5)
        assert not draining.done()
        before = asyncio.get_running_loop().time()
        world.engine.hurry()
        await draining
        assert asyncio.get_running_loop().time() - before < 1
        reasons.append((await asked)[-1].finish)
        await engine

    assert play(scene).engine.state == "stopped"
    assert reasons == [FinishReason.ABORT]


def test_a_stall_shows_while_it_lasts():
    """A request that can do nothing but wait for its block: the time counts as lost to that, before it is over."""

    async def scene(world: World, engine: asyncio.Task[None]) -> None:
        await asyncio.sleep(0)
        await world.ask(SPEC)
        await asyncio.sleep(2)
        for start in range(10, 40, 10):
            await world.ask(GenerateSpec(list(range(start, start + 8)), SamplingParams(max_tokens=1)))
        await asyncio.sleep(2)  # spills would hold frames
        assert world.engine.kv.device.find.keys().isdisjoint(world.engine.chain(SPEC.prompt, "")[:1])
        asked = asyncio.create_task(world.ask(SPEC))
        await asyncio.sleep(0.004)
        page = world.metrics.page()
        assert page.value("engine_stall_seconds_total", "kv_restore") == pytest.approx(0.004), (
            "one block was on its way"
        )
        assert page.value("requests_waiting", "kv_restore") == 1
        assert page.value("requests_running") == 0
        await asked
        page = world.metrics.page()
        assert page.value("engine_stall_seconds_total", "kv_restore") == pytest.approx(0.01)
        assert page.value("kv_restore_cost_seconds_total", DRAM) == pytest.approx(0.01)
        held = page.value("request_phase_seconds", "kv_restore")
        assert held.total == pytest.approx(0.01)
        await world.engine.drain(10)
        await engine

    play(scene, frames=8, lower=32, token_s=1.0)


def test_the_device_does_not_wait_for_the_commit_between_decodes():
    """A step of decodes is handed over before the one before it has ended, but not before it is about to: who comes
    meanwhile waits for no step more."""

    async def scene(world: World, task: asyncio.Task[None]) -> None:
        loop = asyncio.get_running_loop()
        long = asyncio.create_task(world.ask(GenerateSpec([1, 2, 3, 4], SamplingParams(max_tokens=8))))
        await asyncio.sleep(0.45)
        assert world.runner.followed > 0
        assert world.engine.scheduler.ahead is None, "a step was followed long before its end"
        came_s = loop.time()
        await world.ask(GenerateSpec([9, 9], SamplingParams(max_tokens=1)))
        assert loop.time() - came_s < 3 * STEP_S, "what is left of a step, and one of its own"
        assert len([event for event in await long if event.token is not None]) == 8
        await world.engine.drain(10.0)
        await task

    play(scene)


def test_a_lost_device_ends_the_engine():
    """An error of the device that only a new process mends is not one of a step: all are told, and the engine ends."""

    async def scene(world: World, task: asyncio.Task[None]) -> None:
        asking = asyncio.create_task(world.ask(SPEC))
        await asyncio.sleep(0.05)
        world.runner.lost = DeviceLost("an illegal memory access was encountered")
        last = (await asking)[-1]
        assert last.finish is FinishReason.ERROR
        assert last.error == "the server failed: DeviceLost"
        with pytest.raises(DeviceLost):
            await task
        assert world.engine.state == "failed"

    play(scene)
