"""/v1/responses over a scripted engine: what is understood, what is refused, and every answer as the `openai` package
defines it."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI
from openai.types.responses import Response as ResponseType
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from server.api.response_schema import ResponseRequest
from server.types import FinishReason
from tests.unit.api_fake import FakeEngine, byte_grammars, client, make_app, text_reply

EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
PATH = "/v1/responses"
CALL: dict[str, Any] = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
RESULT: dict[str, Any] = {"type": "function_call_output", "call_id": "c", "output": "x"}
ORDER = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
]


def sdk(app: FastAPI) -> openai.AsyncOpenAI:
    """The asynchronous client of the `openai` package over `app`."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=True)
    return openai.AsyncOpenAI(
        api_key="none",
        base_url="http://terrace/v1",
        max_retries=0,
        http_client=httpx.AsyncClient(transport=transport),
    )


def prompts(engine: FakeEngine) -> list[str]:
    return [bytes(spec.prompt).decode() for spec in engine.submitted]


async def events_of(engine: FakeEngine, **body: Any) -> list[dict[str, Any]]:
    """The events of one streamed answer, each one checked against the client's types."""
    async with client(make_app(engine)) as http:
        answer = await http.post(PATH, json={"input": "hi", "stream": True} | body)
    assert answer.status_code == 200, answer.text
    found = []
    for block in answer.text.strip().split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        EVENTS.validate_python(event)
        found.append(event)
    return found


async def test_an_answer_is_what_the_client_defines() -> None:
    """One message item, its text in `output_text`, usage by tier, and the request's own fields repeated."""
    engine = FakeEngine(text_reply("Tom plays chess."))
    engine.cached_tokens = 4
    asked: dict[str, Any] = {
        "model": "fake",
        "input": "What does Tom play?",
        "instructions": "Be brief.",
        "max_output_tokens": 40,
        "temperature": 0.5,
        "top_p": 0.9,
        "metadata": {"a": "b"},
        "user": "u",
        "store": True,
        "service_tier": "flex",
        "prompt_cache_key": "k",
        "prompt_cache_retention": "24h",
        "safety_identifier": "s",
        "truncation": "disabled",
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
    }
    async with sdk(make_app(engine)) as api:
        answer = await api.responses.create(**asked)
    assert answer.output_text == "Tom plays chess."
    assert (answer.status, answer.error, answer.incomplete_details) == ("completed", None, None)
    assert answer.usage is not None
    assert answer.usage.input_tokens_details.cached_tokens == 4
    assert answer.usage.input_tokens_details.model_extra == {
        "cached_tokens_by_tier": {"device": 4, "dram": 0, "ssd": 0}
    }
    assert (answer.usage.output_tokens, answer.usage.output_tokens_details.reasoning_tokens) == (17, 0)
    said = answer.model_dump()
    assert said["store"] is False
    for name in asked.keys() - {"input", "store", "model"}:
        assert said[name] == asked[name] or name == "text", name
    assert prompts(engine) == ["<system>Be brief.\n<user>What does Tom play?\n<assistant>"]
    [spec] = engine.submitted
    assert (spec.params.max_tokens, spec.params.temperature, spec.params.top_p) == (40, 0.5, 0.9)
    assert spec.service.background
    assert (spec.retention.session, spec.retention.keep_s) == (True, 86_400)


async def test_a_schema_holds_the_text_and_comes_back_as_it_was_sent() -> None:
    """`text.format` is a chat's `response_format`; what cannot be enforced is refused by its name here."""
    wanted: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    shape: Any = {"format": {"type": "json_schema", "name": "x", "schema": wanted, "strict": True}}
    engine = FakeEngine(text_reply('{"a": 1}'))
    async with sdk(make_app(engine, grammars=byte_grammars())) as api:
        answer = await api.responses.create(input="hi", model="fake", text=shape)
        await api.responses.create(input="hi", model="fake", text={"format": {"type": "json_object"}})
        shape["format"]["schema"] = {"type": "object", "unevaluatedProperties": False}
        with pytest.raises(openai.BadRequestError) as refused:
            await api.responses.create(input="hi", model="fake", text=shape)
    assert refused.value.param == "text.format.schema"
    assert answer.text is not None
    assert answer.text.format is not None
    assert answer.text.format.model_dump(by_alias=True)["schema"] == wanted
    assert all(spec.params.grammar is not None for spec in engine.submitted)
    assert len(engine.submitted) == 2


async def test_a_conversation_goes_on_with_the_items_of_the_answer() -> None:
    """Every form of a message is understood, and the output of one answer is good input for the next."""
    engine = FakeEngine(text_reply("hello"))
    async with sdk(make_app(engine)) as api:
        first = await api.responses.create(input=[{"role": "user", "content": "hi"}], model="fake")
        items: list[Any] = [
            {"role": "developer", "content": "Be kind."},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
            *[item.model_dump() for item in first.output],
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}], "phase": "final_answer"},
            {"role": "user", "content": [{"type": "input_text", "text": t} for t in ("a", "b")]},
        ]
        await api.responses.create(input=items, model="fake")
        counted = await api.responses.input_tokens.count(input=items, model="fake")
    expected = "<system>Be kind.\n<user>hi\n<assistant>hello\n<assistant>no\n<user>a\nb\n<assistant>"
    assert prompts(engine)[1] == expected
    assert counted.input_tokens == len(expected)


async def test_events_come_in_order_and_add_up() -> None:
    """The events of a stream, numbered from 0, each of the client's types; the last one carries the whole answer."""
    engine = FakeEngine(text_reply("grüße"))
    events = await events_of(engine, include=["message.output_text.logprobs"], top_logprobs=2)
    kinds = [event["type"] for event in events]
    assert list(dict.fromkeys(kinds)) == [*ORDER, "response.completed"]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert "".join(event["delta"] for event in deltas) == "grüße"
    whole = events[-1]["response"]
    [item] = whole["output"]
    [part] = item["content"]
    assert part["text"] == "grüße"
    assert part["logprobs"] == [entry for event in deltas for entry in event["logprobs"]]
    assert [len(entry["top_logprobs"]) for entry in part["logprobs"]] == [2] * 7
    assert {event["item_id"] for event in events if "item_id" in event} == {item["id"]}
    assert {event["response"]["id"] for event in events if "response" in event} == {whole["id"]}
    assert [e["response"]["status"] for e in events if "response" in e] == ["in_progress", "in_progress", "completed"]
    assert engine.open == {}


async def test_an_answer_cut_by_its_limit_is_incomplete() -> None:
    """`max_output_tokens` reached: status, reason and last event say so, streamed or not."""
    engine = FakeEngine(text_reply("a long story"))
    async with sdk(make_app(engine)) as api:
        answer = await api.responses.create(input="hi", model="fake", max_output_tokens=4)
    assert (answer.status, answer.output_text) == ("incomplete", "a lo")
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    last = (await events_of(engine, max_output_tokens=4))[-1]
    assert (last["type"], last["response"]["status"]) == ("response.incomplete", "incomplete")
    assert last["response"]["output"][0]["status"] == "incomplete"


async def test_the_stream_helper_of_the_client() -> None:
    """`responses.stream` accumulates our events to the final answer."""
    app = make_app(FakeEngine(text_reply("Tom plays chess.")))
    async with sdk(app) as api, api.responses.stream(input="hi", model="fake") as stream:
        snapshots = [event.snapshot async for event in stream if event.type == "response.output_text.delta"]
        final = await stream.get_final_response()
    assert snapshots[-1] == final.output_text == "Tom plays chess."


async def test_a_failure_in_the_middle_is_an_event() -> None:
    """The engine gives up after two tokens: the last event is `response.failed`, and nothing is held."""
    engine = FakeEngine(text_reply("a long story"))
    engine.failure = FinishReason.ERROR
    last = (await events_of(engine))[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["error"] == {"code": "server_error", "message": "it broke"}
    assert engine.open == {}
    async with client(make_app(engine)) as http:
        assert (await http.post(PATH, json={"input": "hi"})).status_code == 500


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "send the whole conversation"),
        ({"conversation": "conv_1"}, "conversation", "send the whole conversation"),
        ({"conversation": {"id": "c"}}, "conversation", "send the whole conversation"),
        ({"prompt": {"id": "p"}}, "prompt", "send the whole conversation"),
        ({"background": True}, "background", "send the whole conversation"),
        ({"tools": [{"type": "function", "name": "f"}]}, "tools", "not supported"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "must be 'function'"),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "is required"),
        ({"tools": [{"type": "function", "name": "f", "defer_loading": True}]}, "tools[0].defer_loading", "must be"),
        (
            {"tools": [{"type": "function", "name": "f", "output_schema": {}}]},
            "tools[0].output_schema",
            "not supported",
        ),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.name", "is required"),
        ({"tool_choice": {"type": "mcp", "server_label": "x"}}, "tool_choice.type", "must be 'function'"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice.tools", "at least 1"),
        ({"text": {"format": {"type": "json_object"}}}, "text.format", "cannot be enforced here"),
        ({"text": {"format": {"type": "xml"}}}, "text.format", "must be"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.json_schema.schema", "is required"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "must be 'medium'"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort", "does not know it"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort", "must be 'none', 'minimal'"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary", "must be 'auto'"),
        ({"moderation": {}}, "moderation", "not supported"),
        ({"n": 2}, "n", "not supported"),
        ({"max_tokens": 2}, "max_tokens", "not supported"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater"),
        ({"top_logprobs": 2}, "top_logprobs", "needs include"),
        ({"include": ["message.output_text.logprobs"], "top_logprobs": 21}, "top_logprobs", "at most 20"),
        ({"include": ["everything"]}, "include[0]", "must be"),
        ({"stream_options": {"include_usage": True}}, "stream_options.include_usage", "not supported"),
        ({"input": []}, "input", "at least 1"),
        ({"input": None}, "input", "must be"),
        ({"input": "x" * 600}, "input", "in the input"),
        ({"input": [{"type": "computer_call"}]}, "input[0].type", "must be one of 'message', 'function_call'"),
        ({"input": [{"type": "item_reference", "id": "m"}]}, "input[0].type", "send the whole conversation"),
        ({"input": [RESULT]}, "input[0].call_id", "of no function_call"),
        ({"input": [CALL, RESULT | {"call_id": None}]}, "input[1].call_id", "must be"),
        ({"input": [CALL, RESULT | {"output": [{"type": "input_image"}]}]}, "input[1].output[0].type", "'input_text'"),
        ({"input": [CALL | {"name": "x" * 300}]}, "input[0].name", "at most 256"),
        ({"input": [CALL | {"async": True}]}, "input[0].async", "not supported"),
        ({"instructions": "I", "input": [{"role": "user", "content": "hi"}, CALL]}, "input[1]", "knows no tool_calls"),
        ({"input": [{"type": "reasoning", "encrypted_content": "x"}]}, "input[0].encrypted_content", "not supported"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", "must be"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type", "must be"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0]", "must have 'text'"),
        ({"input": "x" * 600, "truncation": "auto"}, "input", "maximum context length"),
        ({"chat_template_kwargs": {"fail": True}}, "input", "refuses"),
        ({"inputs": "x"}, "inputs", "did you mean 'input'"),
        ({"temperature": 11}, "temperature", "less than or equal to 10"),
    ],
    ids=lambda value: json.dumps(value)[:50] if isinstance(value, dict) else None,
)
async def test_what_cannot_be_done_is_refused_by_name(body: dict[str, Any], param: str, words: str) -> None:
    """Each is a 400 whose `param` names the field and whose message says what would be right."""
    engine = FakeEngine()
    async with client(make_app(engine)) as http:
        answer = await http.post(PATH, json={"input": "hi"} | body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert words in error["message"]
    assert engine.submitted == []


async def test_what_changes_nothing_is_accepted() -> None:
    """Null is absent, everywhere, and values that ask for what happens anyway pass."""
    nulls = {name: None for name in ResponseRequest.model_fields if name != "input"}
    neutral = {
        "background": False,
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "max_tool_calls": 3,
        "include": ["reasoning.encrypted_content"],
        "reasoning": {"effort": "none", "summary": None},
        "stream_options": None,
        "truncation": "auto",
    }
    async with client(make_app(FakeEngine(text_reply("ok")))) as http:
        for body in (nulls, neutral):
            answer = await http.post(PATH, json={"input": "hi"} | body)
            assert answer.status_code == 200, answer.text
            ResponseType.model_validate(answer.json())


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/resp_1"),
        ("DELETE", "/resp_1"),
        ("POST", "/resp_1/cancel"),
        ("GET", "/resp_1/input_items"),
    ],
)
async def test_earlier_responses_are_not_found(method: str, path: str) -> None:
    """Nothing is stored, and whoever asks for it is told so."""
    async with client(make_app(FakeEngine())) as http:
        answer = await http.request(method, PATH + path)
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("not_found", "response_id")
    assert "not stored" in error["message"]


async def test_truncation_leaves_out_the_oldest_turns() -> None:
    """What is kept: the instructions, the system's voice, and as many of the newest turns as leave room, from a user's
    turn on."""
    engine = FakeEngine(text_reply("ok"), max_model_len=100)
    turns = [{"role": role, "content": f"{n}" * 8} for n in range(4) for role in ("user", "assistant")]
    body = {
        "instructions": "I",
        "input": [{"role": "system", "content": "S"}, *turns, {"role": "user", "content": "now"}],
        "max_output_tokens": 10,
        "truncation": "auto",
    }
    async with client(make_app(engine)) as http:
        assert (await http.post(PATH, json=body)).status_code == 200
        assert (await http.post(PATH, json=body | {"truncation": "disabled"})).status_code == 400
        assert (await http.post(PATH, json=body | {"input": body["input"][:3], "top_k": 5})).status_code == 200  # type: ignore[index]
    kept = f"<system>I\n<system>S\n<user>{'3' * 8}\n<assistant>{'3' * 8}\n<user>now\n<assistant>"
    assert prompts(engine)[0] == kept
    assert prompts(engine)[1].startswith(f"<system>I\n<system>S\n<user>{'0' * 8}")
    assert engine.submitted[1].params.top_k == 5
