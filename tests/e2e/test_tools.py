"""Tools as clients use them: the `openai` package over a real socket, a random model that is held to calls."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest

from tests.e2e.daemon import HERMES_TEMPLATE, NAME, Served, ServerThread, Wait, tiny_config, write_model

MESSAGES: Any = [{"role": "user", "content": "Will it rain?"}]
CLOSING = {str(ord(character)): 6 for character in '"}]'}
"""The model is random: without a push its strings would seldom end."""


def tool(name: str, **properties: Any) -> Any:
    schema = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "parameters": schema, "strict": True}}


TOOLS = [
    tool("weather", city={"enum": ["Oslo", "Rome"]}, days={"type": "integer", "minimum": 1, "maximum": 7}),
    tool("note", text={"type": "string", "maxLength": 8}),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A daemon whose template is hermes', found out from it."""
    folder = write_model(tmp_path_factory.mktemp("tools") / "tiny", 1024, HERMES_TEMPLATE)
    with ServerThread(tiny_config(Path(folder))) as running:
        yield running
        Wait().until(lambda: running.snapshot().running == running.snapshot().waiting == 0, "the engine is idle")
        assert running.snapshot().kv.tiers[0].referenced_blocks == 0


@pytest.fixture
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def check(call: Any) -> None:
    arguments = json.loads(call.function.arguments)
    if call.function.name == "weather":
        assert arguments["city"] in ("Oslo", "Rome")
        assert 1 <= arguments["days"] <= 7
    else:
        assert call.function.name == "note"
        assert len(arguments["text"]) <= 8


def test_required_calls_fit_their_schemas(client: openai.OpenAI) -> None:
    """Whatever the seed: at least one call, of these tools, with arguments by the letter, also as a conversation goes
    on."""
    messages = list(MESSAGES)
    for seed in range(3):
        choice = client.chat.completions.create(
            model=NAME, messages=messages, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, seed=seed,
            logit_bias=CLOSING,
        ).choices[0]  # fmt: skip
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        [call] = choice.message.tool_calls or []
        check(call)
        messages += [choice.message.model_dump(exclude_none=True)]
        messages += [{"role": "tool", "tool_call_id": call.id, "content": "yes"}]


def test_a_named_function_is_called(client: openai.OpenAI) -> None:
    """That one, streamed as it is unstreamed."""
    asked: dict[str, Any] = {
        "model": NAME,
        "messages": MESSAGES,
        "tools": TOOLS,
        "tool_choice": {"type": "function", "function": {"name": "note"}},
        "logit_bias": CLOSING,
        "seed": 4,
    }
    [call] = client.chat.completions.create(**asked).choices[0].message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "note"
    check(call)
    with client.chat.completions.stream(**asked) as stream:
        final = stream.get_final_completion().choices[0]
    [streamed] = final.message.tool_calls or []
    assert streamed.function.arguments == call.function.arguments
    assert final.finish_reason == "tool_calls"


def test_responses_call_and_go_on(client: openai.OpenAI) -> None:
    """The same through responses: what the model is held to are items, streamed as unstreamed, and its output and the
    results are the next input."""
    asked: dict[str, Any] = {
        "model": NAME,
        "input": [{"role": "user", "content": "Will it rain?"}],
        "tools": [{"type": "function", **tool["function"]} for tool in TOOLS],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "extra_body": {"logit_bias": CLOSING, "seed": 4},
    }
    for _ in range(2):
        answer = client.responses.create(**asked)
        with client.responses.stream(**asked) as stream:
            final = stream.get_final_response()
        [call], [streamed] = answer.output, final.output
        assert call.type == streamed.type == "function_call"
        assert (call.name, call.arguments) == (streamed.name, streamed.arguments)
        check(SimpleNamespace(function=call))
        result = {"type": "function_call_output", "call_id": streamed.call_id, "output": "yes"}
        asked["input"] = [*asked["input"], *final.output, result]
    with client.responses.create(**asked | {"tool_choice": "auto", "max_output_tokens": 5}, stream=True) as events:
        kinds = [event.type for event in events]
    assert kinds[-1] == "response.incomplete"
    assert "response.output_text.delta" in kinds


def test_auto_may_answer_with_text(client: openai.OpenAI) -> None:
    """A random model that is free to answer writes text, which comes as such."""
    choice = client.chat.completions.create(
        model=NAME, messages=MESSAGES, tools=TOOLS, max_tokens=20, logit_bias={"97": 100}
    ).choices[0]
    assert choice.message.content == "a" * 20
    assert choice.message.tool_calls is None
    assert choice.finish_reason == "length"
