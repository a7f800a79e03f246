"""The fields that say what a text must be: which constraint they come to, and how one that cannot hold is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from server.api.schema import ChatRequest, CompletionRequest, parse
from server.config import ServerConfig
from server.types import Choice, Constraint, FreeGrammar, JsonSchema, Regex
from tests.unit.api_fake import FakeEngine, byte_grammars, client, make_app

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
TEXT: dict[str, Any] = {"prompt": "hi"}
ROUTES = [("/v1/completions", TEXT), ("/v1/chat/completions", CHAT)]
SCHEMA = {"type": "object", "properties": {"z": {"type": "null"}, "a": {"type": "null"}}, "required": ["a"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True, "description": "y"}}
COMPACT = JsonSchema(json.dumps(SCHEMA, separators=(",", ":")))
OBJECT = JsonSchema('{"type":"object"}')


@pytest.mark.parametrize(
    ("fields", "constraint", "param"),
    [
        ({"response_format": FORMAT}, COMPACT, "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_object"}}, OBJECT, "response_format"),
        ({"structured_outputs": {"json": SCHEMA}}, COMPACT, "structured_outputs.json"),
        ({"structured_outputs": {"json": '{"a": 1}'}}, JsonSchema('{"a": 1}'), "structured_outputs.json"),
        ({"structured_outputs": {"json": True}}, JsonSchema("true"), "structured_outputs.json"),
        ({"structured_outputs": {"regex": "a", "json": None}}, Regex("a"), "structured_outputs.regex"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, Choice(("a", "b")), "structured_outputs.choice"),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, FreeGrammar('start: "a"'), "structured_outputs.grammar"),
        ({"structured_outputs": {"json_object": True}}, OBJECT, "structured_outputs.json_object"),
        ({"guided_json": SCHEMA, "response_format": {"type": "text"}}, COMPACT, "guided_json"),
        ({"guided_regex": "a"}, Regex("a"), "guided_regex"),
        ({"guided_choice": ["a"]}, Choice(("a",)), "guided_choice"),
        ({"guided_grammar": "x"}, FreeGrammar("x"), "guided_grammar"),
    ],
)
async def test_fields_come_to_one_constraint(fields: dict[str, Any], constraint: Constraint, param: str) -> None:
    """Every way to say it, on both routes; the grammar reaches the engine with every choice."""
    for model, body in ((CompletionRequest, TEXT), (ChatRequest, CHAT)):
        request = parse(model, json.dumps(body | fields).encode())
        assert request.constraint(10_000) == (constraint, param)
    if fields != {"guided_grammar": "x"} and "1" not in str(constraint):
        engine = FakeEngine()
        async with client(make_app(engine, grammars=byte_grammars())) as http:
            for path, body in ROUTES:
                answer = await http.post(path, json=body | fields | {"n": 2, "max_tokens": 1})
                assert answer.status_code == 200, answer.text
        assert all(spec.params.grammar is not None for spec in engine.submitted)


@pytest.mark.parametrize("fields", [{}, {"response_format": {"type": "text"}}, {"response_format": None}])
async def test_free_text_stays_free(fields: dict[str, Any]) -> None:
    """Nothing asked for, nothing compiled: also where constraints are not available."""
    engine = FakeEngine()
    async with client(make_app(engine)) as http:
        for path, body in ROUTES:
            assert (await http.post(path, json=body | fields)).status_code == 200
    assert [spec.params.grammar for spec in engine.submitted] == [None, None]


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex", "only one"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice", "only one"),
        ({"structured_outputs": {"json_object": True}, "guided_json": {}}, "guided_json", "only one"),
        ({"structured_outputs": {}}, "structured_outputs", "one of"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs", "one of"),
        ({"structured_outputs": {"backend": "x"}}, "structured_outputs.backend", "not a parameter"),
        ({"structured_outputs": {"regex": 1}}, "structured_outputs.regex", "string"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex", "1 character"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "1 item"),
        ({"structured_outputs": {"choice": [""]}}, "structured_outputs.choice[0]", "1 character"),
        ({"structured_outputs": {"choice": ["x"] * 4097}}, "structured_outputs.choice", "4096"),
        ({"structured_outputs": {"json": 1}}, "structured_outputs.json", "JSON schema"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "valid JSON"),
        ({"structured_outputs": {"regex": "(?=a)"}}, "structured_outputs.regex", "(?:...)"),
        ({"structured_outputs": {"grammar": "start: x"}}, "structured_outputs.grammar", "unknown name"),
        ({"guided_json": {"not": {}}}, "guided_json", "'not'"),
        ({"guided_regex": "x" * 3000}, "guided_regex", "2048 bytes"),
        ({"guided_choice": ["é" * 1000, "é" * 100]}, "guided_choice", "2048 bytes"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "type json_schema"),
        (
            {"response_format": {"type": "text", "json_schema": FORMAT["json_schema"]}},
            "response_format.json_schema",
            "",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {}}},
            "response_format.json_schema.name",
            "required",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
            "required",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}},
            "response_format.json_schema.name",
            "pattern",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"contains": {}}}}},
            "response_format.json_schema.schema",
            "'contains'",
        ),
    ],
    ids=lambda value: json.dumps(value)[:50] if isinstance(value, dict) else None,
)
async def test_what_cannot_hold_is_refused_by_name(fields: dict[str, Any], param: str, said: str) -> None:
    """A 400 whose `param` is the field and whose message says what is wrong; nothing reaches the engine."""
    engine = FakeEngine()
    async with client(make_app(engine, grammars=byte_grammars(), max_constraint_bytes=2048)) as http:
        for path, body in ROUTES:
            answer = await http.post(path, json=body | fields)
            assert answer.status_code == 400, answer.text
            error = answer.json()["error"]
            assert error["param"] == param
            assert param.partition("[")[0] in error["message"]
            assert said in error["message"]
    assert engine.submitted == []


async def test_without_the_library_it_is_a_400_that_says_so() -> None:
    """A daemon that cannot constrain texts refuses to, with a code of its own."""
    engine = FakeEngine()
    async with client(make_app(engine)) as http:
        answer = await http.post("/v1/chat/completions", json=CHAT | {"response_format": {"type": "json_object"}})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "structured_output_unavailable"
    assert answer.json()["error"]["param"] == "response_format"
    assert engine.submitted == []


def test_the_limit_is_a_setting() -> None:
    """64 KiB unless the operator says otherwise."""
    assert ServerConfig().max_constraint_bytes == 64 * 1024
