"""The frame around every route: error bodies, limits, keys, request ids, probes. Over a scripted engine."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api import body as bodies
from server.errors import NotReady, Overloaded
from tests.unit.api_fake import FakeEngine, client, make_app, text_reply

BODY = {"prompt": "abc", "max_tokens": 2}
BODILESS = ("/v1/cache/clear", "/v1/batches/{batch_id}/cancel", "/v1/responses/{response_id}/cancel")


def refused(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error of `response`, which must have `status` and the one body that every error has."""
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    assert error["code"] is None or isinstance(error["code"], str)
    assert response.headers["x-request-id"]
    return error


async def chunks(data: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


async def test_unknown_route_and_method_have_error_bodies() -> None:
    """404 of the router and 405 look like every other error."""
    async with client(make_app(FakeEngine())) as http:
        assert refused(await http.get("/v1/nothing"), 404)["code"] == "not_found"
        assert refused(await http.post("/v1/completions/", json=BODY), 404)["code"] == "not_found"
        answer = await http.get("/v1/completions")
        assert refused(answer, 405)["code"] == "method_not_allowed"
        assert answer.headers["allow"] == "POST"


async def test_malformed_json_is_a_400_that_says_where() -> None:
    """A syntax error names the line and column, not a field."""
    async with client(make_app(FakeEngine())) as http:
        for body in (b"", b"{", b'{"prompt": }', b"[1, 2]", b'"x"', b"null", b"\xff\xfe", b"[" * 10_000):
            answer = await http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
            error = refused(answer, 400)
            assert error["param"] is None
            assert error["code"] == "invalid_json"
            assert "JSON" in error["message"]


async def test_body_must_be_declared_as_json() -> None:
    """Other media types and compressed bodies are a 415: a web page cannot post to a local daemon unasked."""
    async with client(make_app(FakeEngine())) as http:
        for kind in ("text/plain", "application/x-www-form-urlencoded", "application/jsonx"):
            answer = await http.post("/v1/completions", content=b"{}", headers={"content-type": kind})
            assert refused(answer, 415)["code"] == "unsupported_media_type"
        answer = await http.post("/v1/completions", content=b"{}")
        assert refused(answer, 415)["param"] == "content-type"
        answer = await http.post("/v1/completions", json=BODY, headers={"content-encoding": "gzip"})
        assert refused(answer, 415)["param"] == "content-encoding"
        answer = await http.post(
            "/v1/completions", content=json.dumps(BODY), headers={"content-type": "Application/JSON; charset=utf-8"}
        )
        assert answer.status_code == 200


async def test_body_over_the_limit_is_413_with_and_without_content_length() -> None:
    """The limit holds while the body is read: a client need not say how long it is."""
    app = make_app(FakeEngine(max_model_len=5000), max_body_bytes=2048)
    body = json.dumps(BODY | {"prompt": "x" * 4000}).encode()
    headers = {"content-type": "application/json"}
    async with client(app) as http:
        answer = await http.post("/v1/completions", content=body, headers=headers)
        assert refused(answer, 413)["code"] == "body_too_large"
        assert "2048 bytes" in answer.text
        assert answer.headers["connection"] == "close"
        answer = await http.post("/v1/completions", content=chunks(body, 100), headers=headers)
        refused(answer, 413)
        fits = json.dumps(BODY | {"prompt": "x" * 1500}).encode()
        answer = await http.post("/v1/completions", content=chunks(fits, 100), headers=headers)
        assert answer.status_code == 200


async def test_no_more_than_the_limit_is_ever_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an endless body only a bounded part is read, and less than the limit is kept."""
    monkeypatch.setattr(bodies, "DISCARD_BYTES", 100_000)
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1000
            yield b" " * 1000

    async with client(make_app(FakeEngine(), max_body_bytes=2048)) as http:
        refused(await http.post("/tokenize", content=endless(), headers={"content-type": "application/json"}), 413)
    assert sent <= 101_000


async def test_a_body_that_never_ends_is_408(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that stops sending in the middle of its body is answered, not waited for."""
    monkeypatch.setattr(bodies, "BODY_TIMEOUT_S", 0.01)

    async def stuck() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    async with client(make_app(FakeEngine())) as http:
        answer = await http.post("/tokenize", content=stuck(), headers={"content-type": "application/json"})
        assert refused(answer, 408)["code"] == "body_timeout"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
async def test_keys_guard_every_route_that_serves(path: str) -> None:
    """Without a known bearer key nothing is served, whatever the body; with any of several keys everything is."""
    async with client(make_app(FakeEngine(), keys=["one", "twö"])) as http:
        for header in (None, "Bearer", "Bearer  ", "Bearer three", "Basic one", "one", "Bearer one two"):
            headers = {} if header is None else {"authorization": header}
            answer = await http.post(path, content=b"{", headers=headers)
            assert refused(answer, 401)["type"] == "invalid_request_error"
            assert answer.headers["www-authenticate"] == "Bearer"
        for key in ("one", "twö"):
            known = {b"authorization": f"bearer {key}".encode(), b"content-type": b"application/json"}
            refused(await http.post(path, content=b"{", headers=known), 400)


async def test_probes_and_metrics_need_no_key() -> None:
    """What a kubelet and a scraper ask is open; the model list is not."""
    async with client(make_app(FakeEngine(), keys=["one"])) as http:
        for path in ("/livez", "/readyz", "/health", "/metrics", "/metrics/vllm", "/version", "/openapi.json"):
            assert (await http.get(path)).status_code == 200, path
        refused(await http.get("/v1/models"), 401)
        assert (await http.get("/v1/models", headers={"authorization": "Bearer one"})).status_code == 200


async def test_each_key_is_a_tenant_of_its_own() -> None:
    """Cached prefixes are shared by key and salt: nobody can name another key's."""
    engine = FakeEngine()
    async with client(make_app(engine, keys=["one", "two"])) as http:
        for key, salt in (("one", None), ("two", None), ("one", "s"), ("one", None)):
            headers = {"authorization": f"Bearer {key}"}
            await http.post("/v1/completions", json=BODY | {"cache_salt": salt}, headers=headers)
    salts = [spec.cache_salt for spec in engine.submitted]
    assert len(set(salts)) == 3
    assert salts[0] == salts[3]
    tenants = [spec.service.tenant for spec in engine.submitted]
    assert tenants[0] == tenants[2] == tenants[3] != tenants[1], "whoever shares by tenant goes by the key alone"
    assert "" not in tenants


async def test_a_body_may_name_its_request() -> None:
    """`request_id` is the answer's X-Request-Id, of refusals too, unless a well-formed header gave one."""
    async with client(make_app(FakeEngine())) as http:
        for path, body in (
            ("/v1/completions", {"prompt": "a"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
            ("/v1/responses", {"input": "a"}),
        ):
            for extra, status in (({}, 200), ({"stream": True}, 200), ({"model": "other"}, 404)):
                answer = await http.post(path, json=body | extra | {"request_id": "mine-1"})
                assert (answer.status_code, answer.headers["x-request-id"]) == (status, "mine-1")
            headers = {"x-request-id": "theirs"}
            answer = await http.post(path, json=body | {"request_id": "mine-1"}, headers=headers)
            assert answer.headers["x-request-id"] == "theirs"


async def test_request_ids_are_accepted_if_sane_and_always_sent_back() -> None:
    """A well-formed X-Request-Id comes back; anything else is replaced, never echoed."""
    async with client(make_app(FakeEngine())) as http:
        answer = await http.post("/v1/completions", json=BODY, headers={"x-request-id": "trace-1/a.b:c"})
        assert answer.headers["x-request-id"] == "trace-1/a.b:c"
        for bad in (b"", b"a b", b"x" * 129, b"\xe9", b'"><script>'):
            answer = await http.get("/livez", headers={b"x-request-id": bad})
            assert len(answer.headers["x-request-id"]) == 32


async def test_probes_follow_the_state_of_the_engine() -> None:
    """Ready means that work is taken; alive means that a restart would not help."""
    engine = FakeEngine()
    async with client(make_app(engine)) as http:
        for state, ready, alive in (
            ("starting", 503, 200),
            ("ready", 200, 200),
            ("draining", 503, 200),
            ("stopped", 503, 200),
            ("failed", 503, 503),
        ):
            engine.state = state
            for path, status in (("/readyz", ready), ("/health", ready), ("/livez", alive)):
                answer = await http.get(path)
                assert answer.status_code == status, (state, path)
                if status == 503:
                    assert answer.json()["error"]["type"] == "server_error"
            if ready == 503:
                assert int((await http.get("/readyz")).headers["retry-after"]) >= 1


async def test_not_ready_says_what_is_left() -> None:
    """A probe that is refused carries the state and what a drain still waits for, as JSON beside the error."""
    engine = FakeEngine()
    engine.state = "draining"
    async with client(make_app(engine)) as http:
        body = (await http.get("/readyz")).json()
    assert body["error"]["code"] == "not_ready"
    assert (body["status"], body["progress"]) == ("draining", {"running": 0, "waiting": 0})


async def test_an_engine_that_makes_no_progress_is_neither_alive_nor_ready() -> None:
    """Liveness is judged by steps that end, not by a flag: at the limit it fails, and with the next step it is back."""
    engine = FakeEngine()
    async with client(make_app(engine, stuck_after_s=30)) as http:
        for state in ("ready", "draining"):
            engine.state = state
            engine.stuck_for_s = 29.9
            assert (await http.get("/livez")).status_code == 200
            engine.stuck_for_s = 30.0
            assert refused(await http.get("/livez"), 503)["code"] == "engine_stuck"
            answer = await http.get("/readyz")
            assert (answer.status_code, answer.json()["status"]) == (503, "stuck")
            engine.stuck_for_s = 0.0
            assert (await http.get("/livez")).status_code == 200


async def test_overload_and_drain_say_when_to_come_back() -> None:
    """429 and 503 carry Retry-After in whole seconds, at least one."""
    engine = FakeEngine()
    async with client(make_app(engine)) as http:
        engine.refuse = Overloaded("the queue is full", retry_after_s=7)
        for extra in ({}, {"stream": True}):
            answer = await http.post("/v1/completions", json=BODY | extra)
            assert refused(answer, 429)["type"] == "rate_limit_error"
            assert answer.headers["retry-after"] == "7"
        engine.refuse = Overloaded("the first token would come late", retry_after_s=3, code="too_late")
        for extra in ({}, {"stream": True}):
            answer = await http.post("/v1/completions", json=BODY | extra)
            error = refused(answer, 429)
            assert (error["type"], error["code"], error["param"]) == ("rate_limit_error", "too_late", None)
            assert answer.headers["retry-after"] == "3"
        engine.refuse = NotReady("the server is draining", retry_after_s=0)
        answer = await http.post("/v1/completions", json=BODY)
        assert refused(answer, 503)["code"] == "not_ready"
        assert answer.headers["retry-after"] == "1"


async def test_all_choices_are_queued_or_none() -> None:
    """When the queue fills up halfway through n choices, those already queued are given back."""
    engine = FakeEngine()
    engine.refuse, engine.refuse_after = Overloaded("full", retry_after_s=1), 2
    async with client(make_app(engine)) as http:
        refused(await http.post("/v1/completions", json=BODY | {"n": 4}), 429)
    assert engine.open == {}
    assert engine.aborted == 2


async def test_a_bug_is_a_500_that_keeps_the_prompt_out_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """An unexpected error is logged by type and place; its message, which may quote the prompt, goes nowhere."""
    engine = FakeEngine(lambda spec: iter(()))
    app = make_app(engine)

    def explode(*_: object) -> None:
        raise RuntimeError("tell nobody: my secret prompt")

    engine.submit = explode  # type: ignore[method-assign, assignment]
    with caplog.at_level(logging.DEBUG):
        async with client(app) as http:
            answer = await http.post("/v1/completions", json={"prompt": "my secret prompt"})
            assert refused(answer, 500)["code"] == "internal_error"
            assert (await http.get("/livez")).status_code == 200
    assert "RuntimeError" in caplog.text
    assert "secret" not in caplog.text + answer.text


async def test_no_prompt_and_no_answer_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Even at debug level the log has neither what was asked nor what was said."""
    with caplog.at_level(logging.DEBUG, logger="terrace"):
        async with client(make_app(FakeEngine(text_reply("answer")))) as http:
            for extra in ({}, {"stream": True}, {"temperature": "hot"}):
                await http.post("/v1/completions", json={"prompt": "sesame"} | extra)
    assert "/v1/completions" in caplog.text
    assert "sesame" not in caplog.text
    assert "answer" not in caplog.text


async def test_models_are_listed_and_found_by_name() -> None:
    """The one model served is in the list; any other name is a 404 with OpenAI's code."""
    async with client(make_app(FakeEngine())) as http:
        card = (await http.get("/v1/models")).json()["data"][0]
        assert card["id"] == "fake"
        assert card["max_model_len"] == 512
        assert (await http.get("/v1/models/fake")).json() == card
        assert refused(await http.get("/v1/models/meta/other"), 404)["code"] == "model_not_found"
        assert refused(await http.post("/v1/completions", json=BODY | {"model": "x"}), 404)["param"] == "model"


async def test_tokenize_and_detokenize_are_inverse() -> None:
    """Text -> ids -> text; messages go through the chat template; token texts on request."""
    async with client(make_app(FakeEngine())) as http:
        answer = (await http.post("/tokenize", json={"prompt": "añb", "add_special_tokens": False})).json()
        assert answer == {"count": 4, "max_model_len": 512, "tokens": [97, 195, 177, 98], "token_strs": None}
        assert (await http.post("/detokenize", json={"tokens": answer["tokens"]})).json() == {"prompt": "añb"}
        answer = (await http.post("/tokenize", json={"prompt": "a", "return_token_strs": True})).json()
        assert answer["token_strs"] == ["<s>", "a"]
        body = {"messages": [{"role": "user", "content": "hi"}]}
        with_cue = (await http.post("/tokenize", json=body)).json()["count"]
        assert with_cue - (await http.post("/tokenize", json=body | {"add_generation_prompt": False})).json()[
            "count"
        ] == len("<assistant>")
        assert (await http.post("/tokenize", json={"prompt": "", "add_special_tokens": False})).json()["tokens"] == []
        for bad in ({}, {"prompt": "a", **body}, {"prompt": "a", "add_generation_prompt": True}):
            refused(await http.post("/tokenize", json=bad), 400)
        error = refused(await http.post("/detokenize", json={"tokens": [97, 258]}), 400)
        assert "tokens[1]" in error["message"]


async def test_metrics_count_answers_by_route_template() -> None:
    """Labels are templates of the router and a closed set of methods, so that no client can add series."""
    async with client(make_app(FakeEngine())) as http:
        await http.post("/v1/completions", json=BODY)
        await http.get("/v1/models/some-name")
        await http.get("/made/up/path")
        await http.request("BREW", "/made/up/path")
        text = (await http.get("/metrics")).text
    assert 'terrace_http_requests_total{code="200",method="POST",route="/v1/completions"} 1.0' in text
    assert 'code="404",method="GET",route="/v1/models/{model:path}"} 1.0' in text
    assert 'code="404",method="GET",route="unmatched"} 1.0' in text
    assert 'code="404",method="OTHER",route="unmatched"} 1.0' in text
    assert "made" not in text


async def test_openapi_document_describes_bodies_and_errors() -> None:
    """Every POST has a body schema that resolves, and every route under /v1 documents its 401 in the error shape."""
    async with client(make_app(FakeEngine(), keys=["k"])) as http:
        document = (await http.get("/openapi.json")).json()
    text = json.dumps(document)
    schemas = document["components"]["schemas"]
    for name in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in schemas
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            takes_body = method == "post" and path not in BODILESS
            assert takes_body == ("requestBody" in operation), path
            if path.startswith("/v1"):
                error = operation["responses"]["401"]["content"]["application/json"]["schema"]
                assert error == {"$ref": "#/components/schemas/ErrorResponse"}
    assert "text/event-stream" in document["paths"]["/v1/completions"]["post"]["responses"]["200"]["content"]
    assert schemas["CompletionRequest"]["additionalProperties"] is False


async def test_a_body_of_too_many_values_is_refused_before_it_is_parsed() -> None:
    """Parsing holds up the loop by what there is to build; a long prompt full of the same bytes is one value."""
    app = make_app(FakeEngine(reply=text_reply("ok")))
    async with client(app) as http:
        prose = "if (a[0], b[1]) { return [x, y, z] } " * 4000
        assert (await http.post("/v1/completions", json={"prompt": prose})).status_code in (200, 400)
        for body in ({"prompt": [1] * 40_000}, {"messages": [{"role": "user", "content": '"[,{'}] * 30_000}):
            answer = await http.post("/v1/completions", json=body)
            assert refused(answer, 413)["code"] == "too_many_values"


async def test_a_large_body_leaves_turns_of_the_loop_to_others() -> None:
    """Between pieces of a body beyond the first others run, however fast it comes; a short body is read at once."""

    async def turns(pieces: int) -> int:
        counted, over = 0, False

        async def count() -> None:
            nonlocal counted
            while not over:
                counted += 1
                await asyncio.sleep(0)

        async def receive() -> dict[str, Any]:
            nonlocal pieces
            pieces -= 1
            return {"type": "http.request", "body": b"x" * 2**16, "more_body": pieces > 0}

        other = asyncio.create_task(count())
        scope = {"type": "http", "headers": [(b"content-type", b"application/json")]}
        await bodies.read_json_body(scope, receive, bodies.BodyLimits(2**24, 100))
        over = True
        await other
        return counted

    assert await turns(2) <= 1
    assert await turns(12) > 10


@given(
    st.recursive(
        st.text('a"\\\\,[]{}\n', max_size=6), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_what_is_in_strings_is_told_apart_wherever_a_piece_ends(value: Any) -> None:
    """The counting of values reads bodies in pieces; quotes and escapes may lie on any border."""
    body = json.dumps(value).encode()
    plain = re.sub(rb'"(?:[^"\\]|\\.)*"', b"", body)
    for size in (1, 2, 3, 7):
        count = bodies.ValueCount()
        for start in range(0, len(body), size):
            count.add(body[start : start + size])
        assert count.values == sum(plain.count(mark) for mark in b",{[")


def test_counting_ends_when_there_are_too_many() -> None:
    """All of a piece is counted up to the limit, and little of it beyond."""
    for values, pieces in ((1000, 1), (100_000, 1), (100_000, 3)):
        count = bodies.ValueCount()
        body = b"[" * values
        for start in range(0, len(body), -(-len(body) // pieces)):
            count.add_until(40_000, body[start : start + -(-len(body) // pieces)])
        assert count.values == values if values <= 40_000 else 40_000 < count.values <= 40_000 + bodies.SLICE_BYTES
