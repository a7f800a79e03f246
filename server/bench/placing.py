"""Requests to a daemon in this process whose prefix lies where a measurement wants it.

Knows the books of the tiers and how to force which way the planner takes; no model, no clock but for what it measures.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from server.build import Daemon
from server.engine import GenerateSpec
from server.kvcache.books import TierBooks
from server.sim.forced import Dear
from server.types import BlockHash, SamplingParams, TierName

WAIT_S = 0.005
WAITS_MAX = 20_000


def prefer_loading(daemon: Daemon) -> Daemon:
    """Computing looks dear and loading slow, so that all that is cached is loaded and waited for, however fast or busy
    the machine is. What is measured of the tiers wears this off: call it again before each request that matters."""
    planner = daemon.engine.kv.planner
    if not isinstance(planner.step, Dear):
        planner.step = Dear()
    for hop in planner.up:
        hop.latency_s = 10.0
    return daemon


@asynccontextmanager
async def serving(daemons: Sequence[Daemon]) -> AsyncIterator[None]:
    """The daemons serve until the end of the block."""
    for daemon in daemons:
        await daemon.open()
    running = [asyncio.create_task(daemon.engine.run()) for daemon in daemons]
    await asyncio.sleep(0)
    try:
        yield
    finally:
        for daemon in daemons:
            await daemon.engine.drain(5)
        await asyncio.gather(*running)
        for daemon in daemons:
            await daemon.aclose()


async def first_token_s(daemon: Daemon, prompt: Sequence[int]) -> tuple[float, int]:
    """Seconds to the first token, and how many tokens of the prompt came from a tier."""
    started = time.perf_counter()
    stream = daemon.engine.submit(GenerateSpec(prompt, SamplingParams(1, temperature=0.0)))
    try:
        async for events in stream:
            if all(event.token is None for event in events):
                break
            return time.perf_counter() - started, stream.cached_tokens or 0
    finally:
        stream.close()
    raise AssertionError("a stream without a token")


async def place(daemon: Daemon, prefix: Sequence[int], tier: TierName) -> None:
    """Leave the full blocks of `prefix` in `tier` and below only; they are computed if they are not there. Nobody uses
    them, and no block hangs on them."""
    kv, hashes = daemon.engine.kv, daemon.engine.chain(prefix, "")
    names = [books.name for books in kv.levels]
    target = kv.levels[names.index(tier)]
    if not all(map(target.has, hashes)):
        await first_token_s(daemon, [*prefix, 0])
        await _until_there(daemon, target, hashes)
    await quiet(daemon)
    for books in kv.levels[: names.index(tier)]:
        drop(books, hashes)


async def _until_there(daemon: Daemon, target: TierBooks, hashes: Sequence[BlockHash]) -> None:
    for _ in range(WAITS_MAX):
        if all(map(target.has, hashes)):
            return
        await _a_while(daemon)
    raise AssertionError(f"blocks do not get to {target.name}: {daemon.engine.snapshot().kv.hops}")


async def quiet(daemon: Daemon) -> None:
    """Until no block moves."""
    for _ in range(WAITS_MAX):
        if not daemon.engine.kv.moving:
            return
        await _a_while(daemon)
    raise AssertionError(f"blocks still move: {daemon.engine.snapshot().kv.hops}")


async def _a_while(daemon: Daemon) -> None:
    assert daemon.engine.state != "failed", "the engine failed: see its log"
    await asyncio.sleep(WAIT_S)


def drop(books: TierBooks, hashes: Sequence[BlockHash]) -> None:
    """Forget these blocks of one tier where nobody holds them, the last of the chain first."""
    for value in reversed(hashes):
        frame = books.find.get(value)
        if frame is not None and books.may_go(frame):
            books.drop(frame, "admin")
