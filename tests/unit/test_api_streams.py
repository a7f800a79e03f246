"""Clients that leave, clients that are slow, streams that are silent: at the ASGI seam, without sockets or waits."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from server.api.sse import KEEP_ALIVE, EventStream
from tests.unit.api_fake import FakeEngine, make_app
from tests.unit.asgi_call import Call, settle

COMPLETION = {"prompt": "abc", "max_tokens": 50}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("extra", [{}, {"n": 3}, {"prompt": ["a", "b"]}], ids=str)
async def test_a_client_that_leaves_frees_its_blocks_at_once(stream: bool, extra: dict[str, Any]) -> None:
    """Streaming or not, one choice or many: after the disconnect the engine holds nothing of it, mid-generation."""
    engine = FakeEngine()
    engine.gate.clear()
    call = Call(make_app(engine), COMPLETION | extra | {"stream": stream})
    await settle(lambda: bool(engine.open))
    held = len(engine.open)
    await settle()
    call.leave.set()
    await call.task
    assert held == engine.aborted > 0
    assert engine.open == {}
    assert len(asyncio.all_tasks()) == 1, "no task is left behind"


async def test_a_client_that_leaves_in_the_middle_of_a_stream_frees_its_blocks() -> None:
    """Also after tokens have gone out."""
    engine = FakeEngine()
    call = Call(make_app(engine), COMPLETION | {"stream": True})
    await settle(lambda: len(call.received) > 3)
    call.leave.set()
    await call.task
    assert engine.open == {}
    assert engine.aborted == 1


async def test_a_choice_that_stops_early_frees_its_blocks_before_the_others_end() -> None:
    """A stop string ends one choice of two: the engine is told at once, not when the whole answer is done."""
    engine = FakeEngine()
    engine.reply = lambda spec: itertools.cycle(b"stop" if spec.params.seed == 0 else b"go on ")
    call = Call(make_app(engine), {"prompt": "a", "n": 2, "seed": 0, "max_tokens": 400, "stop": "op", "stream": True})
    await settle(lambda: any(b'"finish_reason":"stop"' in chunk for chunk in call.received))
    assert [stream.spec.params.seed for stream in engine.open.values()] == [1]
    await call.task
    assert engine.open == {}


async def test_cancelling_the_server_task_frees_the_blocks() -> None:
    """When the server itself cancels a request (shutdown), its blocks go back as well."""
    for stream in (False, True):
        engine = FakeEngine()
        engine.gate.clear()
        call = Call(make_app(engine), COMPLETION | {"stream": stream})
        await settle()
        await settle()
        call.task.cancel()
        await asyncio.gather(call.task, return_exceptions=True)
        assert engine.open == {}
        assert len(asyncio.all_tasks()) == 1


async def test_a_slow_client_holds_up_nobody_else() -> None:
    """While one client does not read, another one's stream runs to its end; the slow one then gets everything."""
    engine = FakeEngine()
    app = make_app(engine)
    slow, fast = (Call(app, COMPLETION | {"stream": True, "n": 2}) for _ in range(2))
    slow.reading.clear()
    await fast.task
    assert fast.ended
    assert slow.received == []
    slow.reading.set()
    await slow.task
    assert slow.received[-2:] == [b"data: [DONE]\n\n", b""]
    assert len(slow.received) == len(fast.received)
    assert engine.open == {}


async def test_what_waits_for_a_slow_client_is_bounded() -> None:
    """A client that stops reading stops its own pumps: only the merge queue and a piece per choice are decoded."""
    engine = FakeEngine(max_model_len=4096)
    taken = 0
    reply = engine.reply

    def counted(spec: Any) -> Any:
        nonlocal taken
        for token in reply(spec):
            taken += 1
            yield token

    engine.reply = counted
    call = Call(make_app(engine), {"prompt": "abc", "max_tokens": 2000, "n": 2, "stream": True})
    await settle(lambda: bool(call.received))
    call.reading.clear()
    before = taken
    await settle(rounds=2000)
    assert taken - before < 100
    call.leave.set()
    await call.task
    assert engine.open == {}


async def never() -> AsyncGenerator[bytes, None]:
    await asyncio.Event().wait()
    yield b""


async def run_stream(response: EventStream, sent: list[bytes], leave_after: int) -> None:
    left = asyncio.Event()

    async def receive() -> dict[str, Any]:
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))
        if len(sent) > leave_after:
            left.set()

    await response({"type": "http"}, receive, send)


async def test_silence_is_filled_with_comments() -> None:
    """A stream that has nothing to say for a while sends comment lines, which clients ignore; then ends once."""
    sent: list[bytes] = []
    closed: list[bool] = []
    await run_stream(EventStream(never(), lambda: closed.append(True), keepalive_s=0.001), sent, leave_after=3)
    assert sent[1:4] == [KEEP_ALIVE] * 3
    assert KEEP_ALIVE.startswith(b":")
    assert closed == [True]


async def test_keepalive_can_be_off() -> None:
    """With 0 no comment is ever sent."""
    sent: list[bytes] = []
    task = asyncio.ensure_future(run_stream(EventStream(never(), lambda: None, keepalive_s=0), sent, leave_after=9))
    await settle()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert sent == [b""]


async def test_the_generator_is_closed_even_if_it_never_ran() -> None:
    """A request that is cancelled before its first event still gives its blocks back."""
    closed: list[bool] = []
    task = asyncio.ensure_future(run_stream(EventStream(never(), lambda: closed.append(True), 15), [], 9))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert closed == [True]
