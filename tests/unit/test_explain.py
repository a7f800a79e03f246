"""Why a request took as long as it did: what is kept of it, what an admin may ask, and the trace that is made of it."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from server.errors import ConfigError
from server.explain import Explanation, Explanations
from server.tracing import Tracer, otlp_exporter
from server.types import SpanReport
from tests.unit.api_fake import FakeEngine, make_app

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def one(request_id: str = "req", sequence: int = 1, *, first_s: float | None = 102.0, **more: Any) -> Explanation:
    """A request that waited 0.5 s, prefilled 1.5 s, of which it waited 0.4 s for loads, and decoded 2 s."""
    values: dict[str, Any] = {
        "request_id": request_id, "trace_parent": "", "sequence": sequence, "tenant": "t1", "arrival_s": 100.0,
        "admitted_s": 100.5, "first_s": first_s, "ended_s": 104.0, "finish": "stop", "error": False,
        "background": False, "preemptions": 0, "prompt_tokens": 100, "generated_tokens": 7, "block_tokens": 16,
        "served": {"device": 16, "dram": 32}, "missed": {"slower_than_recompute": 16},
        "decisions": [
            SpanReport("dram", 2, "load", "", 0.1, 0.5),
            SpanReport("ssd", 1, "compute", "slower_than_recompute", 2.0, 0.3),
        ],
        "landed_s": {"dram": 100.9}, "phases_s": {"queue": 0.5, "kv_restore": 0.4, "prefill": 1.1, "decode": 2.0},
        "predicted_ttft_s": 1.9, "first_block": "ab" * 8, "last_block": "cd" * 8,
    }  # fmt: skip
    return Explanation(**(values | more))


def test_the_last_few_hundred_are_kept() -> None:
    """Newest first, or slowest to the first token first; a request's sequences together; beyond the limit the oldest
    goes."""
    kept = Explanations(3, 0.0)
    for number in range(4):
        kept.add(one(f"r{number % 3}", number, first_s=101.0 + number / 2 if number != 2 else None))
    assert [found.sequence for found in kept.latest(2)] == [3, 2]
    assert [found.sequence for found in kept.slowest(9)] == [2, 3, 1]
    assert [found.sequence for found in kept.find("r0")] == [3]
    assert kept.find("r9") == []


def test_nothing_is_kept_or_made_where_nobody_wants_it() -> None:
    """With a limit of 0 and no trace the engine is told not to make any; a trace alone is reason enough."""
    assert not Explanations(0, 0.0).wanted
    told: list[Explanation] = []
    traced = Explanations(0, 0.0, told.append)
    assert traced.wanted
    traced.add(one())
    assert (len(told), traced.latest(9)) == (1, [])


def test_what_is_said_adds_up() -> None:
    """Tokens by source are the prompt, phases the whole time, and the moment of arrival is Unix time."""
    said = one().report(wall_offset_s=1_000.0)
    assert said["arrived_at"] == 1_100.0
    assert said["prompt_tokens_by_source"] == {"computed": 52, "device": 16, "dram": 32}
    assert sum(said["prompt_tokens_by_source"].values()) == said["prompt_tokens"]
    assert sum(said["phases_s"].values()) == said["total_s"] == 4.0
    assert said["ttft_s"] == 2.0
    assert said["decisions"][1] == {
        "tier": "ssd", "tokens": 16, "decision": "compute", "reason": "slower_than_recompute", "load_s": 2.0,
        "compute_s": 0.3,
    }  # fmt: skip
    json.dumps(said)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (
            {},
            [("queue", 100.0, 100.5), ("prefill", 100.5, 102.0), ("decode", 102.0, 104.0), ("load dram", 100.5, 100.9)],
        ),
        ({"first_s": None, "landed_s": {}}, [("queue", 100.0, 100.5), ("prefill", 100.5, 104.0)]),
        ({"first_s": None, "admitted_s": None, "landed_s": {}}, [("queue", 100.0, 104.0)]),
    ],
)
def test_stretches_cover_the_request(more: dict[str, Any], expected: list[tuple[str, float, float]]) -> None:
    """Queue, prefill and decode follow each other to the end, wherever it came; loads lie beside them."""
    assert list(one(**more).stretches()) == expected


async def test_an_admin_may_ask_why() -> None:
    """By id, the latest, the slowest; another key is refused, an unknown id is 404, a bad limit 400."""
    engine = FakeEngine()
    for number in range(3):
        engine.explanations.add(one(f"r{number}", number, first_s=103.0 - number))
    transport = httpx.ASGITransport(make_app(engine, keys=["user"], admin_keys=["admin"]))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:

        async def ask(path: str, key: str = "admin") -> httpx.Response:
            return await http.get(f"/v1/cache/explain{path}", headers={"authorization": f"Bearer {key}"})

        assert (await ask("/r1", "user")).status_code == (await ask("", "user")).status_code == 401
        assert [found["sequence"] for found in (await ask("/r1")).json()["requests"]] == [1]
        assert [found["sequence"] for found in (await ask("?limit=2")).json()["requests"]] == [2, 1]
        assert [found["sequence"] for found in (await ask("?slowest=true")).json()["requests"]] == [0, 1, 2]
        assert (await ask("/nobody")).status_code == 404
        assert (await ask("?limit=0")).status_code == 400


# --- the trace -------------------------------------------------------------------------------------------------------


def traced(*ended: Explanation) -> list[Any]:
    """The spans of some requests, as an exporter gets them."""
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter").InMemorySpanExporter()
    tracer = Tracer(memory, "tiny", "1.2", wall_offset_s=1_000.0, batched=False)
    for explanation in ended:
        tracer(explanation)
    spans = list(memory.get_finished_spans())
    tracer.close()
    return spans


def test_a_request_is_a_tree_of_spans() -> None:
    """The request, and in it queue, prefill, decode and each tier's load, with the moments of the engine in Unix time,
    and every decision as an event."""
    *inner, root = traced(one())
    assert (root.name, root.parent) == ("generate tiny", None)
    assert (root.start_time, root.end_time) == (1_100 * 10**9, 1_104 * 10**9)
    assert {span.name for span in inner} == {"queue", "prefill", "decode", "load dram"}
    assert {span.parent.span_id for span in inner} == {root.context.span_id}
    queue = next(span for span in inner if span.name == "queue")
    assert queue.end_time - queue.start_time == 5 * 10**8
    assert [event.attributes["decision"] for event in root.events] == ["load", "compute"]
    assert root.attributes["gen_ai.usage.input_tokens"] == 100
    assert root.attributes["terrace.request_id"] == "req"
    assert root.attributes["terrace.prompt_tokens.dram"] == 32
    assert root.attributes["terrace.cached_but_computed.slower_than_recompute"] == 16
    assert root.resource.attributes["service.name"] == "terrace"


def test_a_trace_goes_on_where_the_caller_began_it() -> None:
    """`traceparent` makes the request part of the caller's trace; one that is nonsense does no harm."""
    *_, root = traced(one(trace_parent=PARENT, error=True))
    assert f"{root.context.trace_id:032x}" == PARENT.split("-")[1]
    assert f"{root.parent.span_id:016x}" == PARENT.split("-")[2]
    assert root.status.status_code.name == "ERROR"
    *_, lost = traced(one(trace_parent="nonsense"))
    assert lost.parent is None


async def test_the_header_reaches_the_engine() -> None:
    """`traceparent` and the request's id are there when the engine is asked."""
    from server.logs import REQUEST_ID, TRACE_PARENT

    seen = []

    class Noting(FakeEngine):
        def submit(self, spec: Any) -> Any:
            seen.append((REQUEST_ID.get(), TRACE_PARENT.get()))
            return super().submit(spec)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(make_app(Noting())), base_url="http://test") as http:
        body = {"model": "fake", "prompt": "hi", "max_tokens": 1}
        await http.post("/v1/completions", json=body, headers={"X-Request-Id": "a", "traceparent": PARENT})
        await http.post("/v1/completions", json=body, headers={"X-Request-Id": "b"})
    assert seen == [("a", PARENT), ("b", "")]


def test_without_the_extra_the_setting_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that names the setting and the command."""
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"otlp_endpoint needs OpenTelemetry: pip install 'terrace\[otel\]'"):
        otlp_exporter("http://collector:4318")
