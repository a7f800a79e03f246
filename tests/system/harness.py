"""A whole daemon but for its sockets: the production engine over a real model, driven from a test."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from server.build import Daemon, build
from server.config import Config, load_config
from server.engine import GenerateSpec
from server.kvcache import audit
from server.place import Place, place_of
from server.types import SamplingParams

GREEDY = SamplingParams(max_tokens=16, temperature=0)


@asynccontextmanager
async def running(place: Callable[[Config], Place] = place_of, **settings: Any) -> AsyncIterator[Daemon]:
    """A ready daemon; `settings` are `section__field=value`. Its books are audited at the end."""
    config = load_config({name.replace("__", "."): value for name, value in settings.items()}, environ={})
    daemon = build(config, place=place(config))
    await daemon.open()
    loop = asyncio.create_task(daemon.engine.run())
    await asyncio.sleep(0)
    try:
        yield daemon
        audit.check(daemon.engine.kv)
    finally:
        await daemon.engine.drain(0)
        await loop
        await daemon.aclose()


async def complete(
    daemon: Daemon, prompt: Sequence[int], params: SamplingParams, *, served: Counter[str] | None = None
) -> list[int]:
    """All tokens of one request. `served` gets the blocks of its prompt that came from the cache, by tier."""
    stream = daemon.engine.submit(GenerateSpec(prompt, params))
    try:
        tokens = [event.token async for events in stream for event in events if event.token is not None]
        if served is not None:
            served.update(stream.request.served)
        return tokens
    finally:
        stream.close()


async def complete_all(
    daemon: Daemon, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
) -> list[list[int]]:
    """All tokens of all requests, submitted at once."""
    each = params if not isinstance(params, SamplingParams) else [params] * len(prompts)
    return await asyncio.gather(*(complete(daemon, p, s) for p, s in zip(prompts, each, strict=True)))


async def settled(daemon: Daemon) -> None:
    """Until every spill that has room has landed: what is in the device tier is below it, too."""
    for _ in range(10_000):
        if not daemon.engine.kv.busy:
            return
        await asyncio.sleep(0.002)
    raise AssertionError(f"blocks still move: {daemon.engine.snapshot().kv.hops}")


async def ask(daemon: Daemon, prompts: Sequence[Sequence[int]]) -> tuple[list[list[int]], Counter[str]]:
    """Greedy answers one after the other, all spilled; and the blocks that were served, by tier."""
    served: Counter[str] = Counter()
    answers = []
    for prompt in prompts:
        answers.append(await complete(daemon, prompt, GREEDY, served=served))
        await settled(daemon)
    return answers, +served
