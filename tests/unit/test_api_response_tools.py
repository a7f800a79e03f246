"""Function tools and thoughts through /v1/responses: the `openai` package over scripted replies of four families."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai.types.responses import Response as ResponseType
from openai.types.responses import ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from server.api.dialects.dialect import dialect_of
from tests.unit.api_fake import client, make_app
from tests.unit.tool_fake import (
    FAMILIES,
    HERMES_CALL,
    HERMES_NOW,
    NOW,
    REPLIES,
    STRICT,
    TOOLS,
    WEATHER,
    WRONG,
    World,
    byte_tokenizer,
    world_with_grammars,
)

PATH = "/v1/responses"
EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
THINKING = "<think>\nLet me\n</think>\n\n"


def flat(tool: dict[str, Any]) -> Any:
    """A chat's tool as a response's."""
    return {"type": "function", **tool["function"]}


FLAT = [flat(tool) for tool in TOOLS]


async def ask(world: World, **body: Any) -> dict[str, Any]:
    """The answer as JSON, checked against the client's type."""
    async with client(world.app) as http:
        answer = await http.post(PATH, json={"input": "hi"} | body)
    assert answer.status_code == 200, answer.text
    ResponseType.model_validate(answer.json())
    found: dict[str, Any] = answer.json()
    return found


async def stream(world: World, **body: Any) -> list[dict[str, Any]]:
    """The events of the same, each checked against the client's types, numbered from 0."""
    async with client(world.app) as http:
        answer = await http.post(PATH, json={"input": "hi", "stream": True} | body)
    assert answer.status_code == 200, answer.text
    events = [json.loads(block.partition("data: ")[2]) for block in answer.text.strip().split("\n\n")]
    for number, event in enumerate(events):
        EVENTS.validate_python(event)
        assert event["sequence_number"] == number
    return events


def replayed(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The output items that the events add up to. Each opens, grows by its deltas and closes before the next one."""
    items: list[dict[str, Any]] = []
    open_, grown = None, ""
    for event in events:
        kind = event["type"].removeprefix("response.")
        if "output_index" not in event:
            assert open_ is None
            continue
        assert event["output_index"] == len(items)
        if kind == "output_item.added":
            assert open_ is None
            open_, grown = event["item"], ""
            assert open_["status"] == "in_progress"
            continue
        assert open_ is not None
        assert event.get("item_id", open_["id"]) == open_["id"]
        assert event.get("content_index", 0) == 0
        if kind.endswith(".delta"):
            grown += event["delta"]
        elif kind in ("output_text.done", "reasoning_text.done"):
            assert event["text"] == grown
        elif kind == "function_call_arguments.done":
            assert (event["arguments"], event["name"]) == (grown, open_["name"])
        elif kind == "content_part.done":
            assert event["part"]["text"] == grown
        elif kind == "output_item.done":
            assert event["item"]["id"] == open_["id"]
            items.append(event["item"])
            open_ = None
    assert open_ is None
    return items


def nameless(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the ids, which are new in every answer."""
    return [{key: value for key, value in item.items() if key not in ("id", "call_id")} for item in items]


def said(items: list[dict[str, Any]]) -> list[Any]:
    """What each item is and holds."""
    return [
        (item["name"], json.loads(item["arguments"]))
        if item["type"] == "function_call"
        else (item["type"], "".join(part["text"] for part in item["content"]))
        for item in items
    ]


CALLED = [("message", "I look."), ("weather", {"city": "Tromsø"}), ("now", {})]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("burst", [1, 5, 1000])
async def test_calls_are_items_whole_and_streamed(family: str, burst: int) -> None:
    """Text, then one item per call, the same by either way; ids of their own kinds, each of them once."""
    world = World(family, REPLIES[family], burst)
    answer = await ask(world, tools=FLAT)
    assert said(answer["output"]) == CALLED
    assert answer["status"] == "completed"
    assert {item["status"] for item in answer["output"]} == {"completed"}
    calls = answer["output"][1:]
    assert all(call["id"].startswith("fc_") and call["call_id"].startswith("call_") for call in calls)
    assert len({call["id"] for call in calls} | {call["call_id"] for call in calls}) == 4
    events = await stream(world, tools=FLAT)
    items = replayed(events)
    assert nameless(items) == nameless(answer["output"])
    assert events[-1]["type"] == "response.completed"
    assert events[-1]["response"]["output"] == items


async def test_the_order_of_events() -> None:
    """Every kind of item with all of its events, none of them before its first part comes."""
    events = await stream(World("hermes", THINKING + REPLIES["hermes"], 7), tools=FLAT)
    kinds = [event["type"].removeprefix("response.") for event in events]
    runs = [kind for kind, before in zip(kinds, ["", *kinds], strict=False) if kind != before]
    text = ["output_item.added", "content_part.added", "{}.delta", "{}.done", "content_part.done", "output_item.done"]
    call = ["output_item.added", *(f"function_call_arguments.{end}" for end in ("delta", "done")), "output_item.done"]
    assert runs == [
        "created",
        "in_progress",
        *(kind.format("reasoning_text") for kind in text),
        *(kind.format("output_text") for kind in text),
        *call,
        *call,
        "completed",
    ]
    assert said(replayed(events)) == [("reasoning", "Let me"), *CALLED]


@pytest.mark.parametrize("burst", [1, 1000])
async def test_thoughts_are_an_item_and_are_counted(burst: int) -> None:
    """`reasoning` in front of the message, its tokens in usage; with include_reasoning: false it is only counted."""
    world = World("hermes", f"{THINKING}Yes.", burst)
    answer = await ask(world)
    assert said(answer["output"]) == [("reasoning", "Let me"), ("message", "Yes.")]
    assert answer["output"][0]["summary"] == []
    assert answer["output"][0]["id"].startswith("rs_")
    assert answer["usage"]["output_tokens_details"] == {"reasoning_tokens": len("<\nLet me\n>")}
    events = await stream(world)
    assert nameless(replayed(events)) == nameless(answer["output"])
    assert events[-1]["response"]["usage"] == answer["usage"]
    hidden = await ask(world, include_reasoning=False)
    assert said(hidden["output"]) == said(replayed(await stream(world, include_reasoning=False)))
    assert said(hidden["output"]) == [("message", "Yes.")]
    assert hidden["usage"] == answer["usage"]


@pytest.mark.parametrize(
    ("reply", "limit", "expected"),
    [
        ("", None, [("message", "", "completed")]),
        (THINKING, None, [("reasoning", "Let me", "completed"), ("message", "", "completed")]),
        (THINKING, 4, [("reasoning", "Le", "incomplete"), ("message", "", "incomplete")]),
        (f"{THINKING}Yes.", 14, [("reasoning", "Let me", "completed"), ("message", "Ye", "incomplete")]),
        (HERMES_NOW, None, [("function_call", "{}", "completed")]),
        (f"Well.{HERMES_CALL}", 42, [("message", "Well.", "completed"), ("function_call", '{"', "incomplete")]),
        (f"{HERMES_NOW}\nDone.", None, [("function_call", "{}", "completed"), ("message", "Done.", "completed")]),
    ],
    ids=["empty", "thoughts only", "cut in thoughts", "cut in text", "call only", "cut in a call", "text behind"],
)
async def test_there_is_always_an_item_to_read(
    reply: str, limit: int | None, expected: list[tuple[str, str, str]]
) -> None:
    """No text and no call: one empty message. What is cut off is incomplete, what was whole before is not."""
    world = World("hermes", reply)
    answer = await ask(world, tools=FLAT, max_output_tokens=limit)
    events = await stream(world, tools=FLAT, max_output_tokens=limit)
    assert nameless(replayed(events)) == nameless(answer["output"])
    found = []
    for item in answer["output"]:
        text = item.get("arguments") or "".join(part["text"] for part in item.get("content", ()))
        found.append((item["type"], text, item["status"]))
    assert found == expected
    cut = expected[-1][2] == "incomplete"
    assert answer["status"] == ("incomplete" if cut else "completed")
    assert answer["incomplete_details"] == ({"reason": "max_output_tokens"} if cut else None)
    assert events[-1]["type"] == f"response.{answer['status']}"


async def test_the_clients_own_ways_of_reading() -> None:
    """`create`, its stream and the `stream` helper of the package agree, parsed arguments included."""
    world = world_with_grammars("hermes", THINKING + REPLIES["hermes"])

    class Weather(BaseModel):
        city: str

    async with world.client() as api:
        asked: dict[str, Any] = {"model": "fake", "input": "hi"}
        whole = await api.responses.create(**asked, tools=FLAT)
        kinds = [event.type async for event in await api.responses.create(**asked, tools=FLAT, stream=True)]
        typed = [openai.pydantic_function_tool(Weather, name="weather"), FLAT[1]]
        tools: Any = [typed[0] if "name" in typed[0] else flat(typed[0]), FLAT[1]]
        async with api.responses.stream(**asked, tools=tools) as events:
            grown = [event.snapshot async for event in events if event.type == "response.function_call_arguments.delta"]
            final = await events.get_final_response()
    assert kinds[-1] == "response.completed"
    for answer in (whole, final):
        assert [item.type for item in answer.output] == ["reasoning", "message", "function_call", "function_call"]
        assert answer.output_text == "I look."
    assert whole.output[0].content[0].text == "Let me"
    assert grown[-1] == final.output[3].arguments == "{}"
    assert json.loads(final.output[2].arguments) == {"city": "Tromsø"}


async def test_an_answer_is_sent_back_as_it_was() -> None:
    """As JSON, as the client's objects and as their dumps: the next prompt is that of the chat which says the same."""
    world = World("hermes", THINKING + REPLIES["hermes"])
    raw = (await ask(world, tools=FLAT))["output"]
    async with world.client() as api:
        answer = await api.responses.create(model="fake", input="hi", tools=FLAT)
        objects = list(answer.output)
        prompts = []
        for items in (raw, objects, [item.model_dump() for item in objects], [item.to_dict() for item in objects]):
            ids = [item["call_id"] if isinstance(item, dict) else item.call_id for item in items[2:]]
            results = [
                {"type": "function_call_output", "call_id": ids[0], "output": "rain"},
                {
                    "type": "function_call_output",
                    "call_id": ids[1],
                    "output": [{"type": "input_text", "text": "noon"}] * 2,
                },
            ]
            turns: Any = [{"role": "user", "content": "hi"}, *items, *results]
            await api.responses.create(model="fake", input=turns, tools=FLAT)
            prompts.append(world.prompt())
            counted = await api.responses.input_tokens.count(model="fake", input=turns, tools=FLAT)
            assert counted.input_tokens == len(world.engine.submitted[-1].prompt)
    assert len(set(prompts)) == 1
    message = (await world.ask(tools=TOOLS)).choices[0].message.model_dump(exclude_none=True)
    results = [
        {"role": "tool", "tool_call_id": call["id"], "content": content}
        for call, content in zip(message["tool_calls"], ("rain", "noon\nnoon"), strict=True)
    ]
    await world.ask([{"role": "user", "content": "hi"}, message, *results], tools=TOOLS)
    assert world.prompt() == prompts[0]
    assert "<think>Let me</think>I look.<tool_call>" in prompts[0]


def thought(text: str) -> dict[str, Any]:
    return {"type": "reasoning", "content": [{"type": "reasoning_text", "text": text}]}


def call(name: str, call_id: str) -> dict[str, Any]:
    return {"type": "function_call", "call_id": call_id, "name": name, "arguments": "{}"}


def result(call_id: str, output: Any, **more: Any) -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": call_id, "output": output, **more}


def turn(text: str = "", *calls: str) -> str:
    written = (f'<tool_call>{{"name": "{name}", "arguments": {{}}}}</tool_call>' for name in calls)
    return f"[assistant]{text}{''.join(written)}\n"


@pytest.mark.parametrize(
    ("items", "prompt"),
    [
        ([call("f", "1"), call("g", "2")], turn("", "f", "g")),
        ([{"role": "assistant", "content": "a"}, call("f", "1")], turn("a", "f")),
        ([call("f", "1"), {"role": "assistant", "content": "b"}], turn("b", "f")),
        ([{"role": "assistant", "content": t} for t in "ab"], turn("a") + turn("b")),
        (
            [call("f", "1"), result("1", "x"), call("g", "2"), result("2", [])],
            f"{turn('', 'f')}[tool f]x\n{turn('', 'g')}[tool g]\n",
        ),
        ([call("f", "1"), result("1", "x", name="other", id="o")], f"{turn('', 'f')}[tool other]x\n"),
        ([{"type": "reasoning", "summary": []}], turn()),
        (
            [{"type": "reasoning", "summary": [{"type": "summary_text", "text": t} for t in "st"]}, call("f", "1")],
            turn("<think>s\nt</think>", "f"),
        ),
        (
            [thought("t"), {"role": "user", "content": "u"}],
            f"{turn('<think>t</think>')}[user]u\n",
        ),
        (
            [call("f", "1"), thought("t"), call("g", "2")],
            turn("", "f") + turn("<think>t</think>", "g"),
        ),
    ],
    ids=[
        "calls of one turn", "text and call", "call and text", "two messages", "step by step", "named result",
        "nothing thought", "a summary", "thoughts alone", "thoughts begin an answer",
    ],
)  # fmt: skip
async def test_items_become_turns(items: list[dict[str, Any]], prompt: str) -> None:
    """What one answer held is one turn of the assistant; a result or somebody else's turn ends it."""
    world = World("hermes", "ok")
    await ask(world, input=items)
    assert world.prompt() == f"{prompt}[assistant]"


CHOSEN: dict[str, Any] = {"type": "function", "name": "now"}


def allowed(mode: str, *tools: Any) -> Any:
    return {"type": "allowed_tools", "mode": mode, "tools": [*tools]}


@pytest.mark.parametrize(
    ("more", "good", "bad"),
    [
        ({"tool_choice": "required"}, [HERMES_CALL, f"{HERMES_NOW}\n{HERMES_CALL}"], ["no", WRONG]),
        ({"tool_choice": "required", "parallel_tool_calls": False}, [HERMES_NOW], [f"{HERMES_NOW}\n{HERMES_NOW}"]),
        ({"tool_choice": CHOSEN}, [HERMES_NOW], [HERMES_CALL, "no"]),
        ({"tool_choice": allowed("required", CHOSEN)}, [HERMES_NOW], [HERMES_CALL, "no"]),
        ({"tool_choice": allowed("auto", CHOSEN)}, [HERMES_NOW, "no"], [HERMES_CALL]),
        ({"tools": [flat(STRICT), flat(NOW)]}, ["no", HERMES_CALL], [WRONG]),
        ({"text": {"format": {"type": "json_object"}}}, ['{"a": 1}', HERMES_CALL], ["no", WRONG]),
    ],
    ids=str,
)
async def test_the_model_is_held_to_calls(more: dict[str, Any], good: list[str], bad: list[str]) -> None:
    """Every choice and strict schemas, in the words of this route; the answer repeats them."""
    world = world_with_grammars("hermes")
    asked = {"tools": FLAT} | more
    answer = await ask(world, **asked)
    assert [text for text in good if not world.holds(text)] == []
    assert [text for text in bad if world.holds(text)] == []
    assert answer["tool_choice"] == asked.get("tool_choice", "auto")
    assert answer["parallel_tool_calls"] is asked.get("parallel_tool_calls", True)
    strict = bool(asked["tools"][0].get("strict"))
    assert answer["tools"][0] == flat(WEATHER) | {"strict": strict}
    assert answer["tools"][1] == flat(NOW) | {"description": None, "parameters": None, "strict": False}


async def test_choices_that_hold_nothing_back() -> None:
    """none: the model is not told of tools; parallel_tool_calls false: a second call ends the answer."""
    world = World("hermes", REPLIES["hermes"])
    assert said((await ask(world, tools=FLAT, tool_choice="none"))["output"]) == [("message", REPLIES["hermes"])]
    assert "tools:" not in world.prompt()
    one = await ask(world, tools=FLAT, parallel_tool_calls=False, max_tool_calls=1)
    assert said(one["output"]) == CALLED[:2]
    assert one["max_tool_calls"] == 1
    assert said(replayed(await stream(world, tools=FLAT, parallel_tool_calls=False))) == CALLED[:2]
    assert world.engine.open == {}


@pytest.mark.parametrize(
    ("family", "more", "param"),
    [
        ("pythonic", {"tool_choice": "required"}, "tool_choice"),
        ("pythonic", {"tools": [flat(STRICT)]}, "tools[0].strict"),
        ("hermes", {"tool_choice": CHOSEN | {"name": "other"}}, "tool_choice.name"),
        ("hermes", {"tool_choice": allowed("auto", CHOSEN | {"name": "other"})}, "tool_choice.tools"),
        ("hermes", {"tools": [flat(NOW), flat(NOW)]}, "tools[1].name"),
        (
            "hermes",
            {"tools": [{"type": "function", "name": "f", "strict": True, "parameters": {"unevaluatedItems": False}}]},
            "tools[0].parameters",
        ),
        ("hermes", {"include": ["message.output_text.logprobs"]}, "include"),
        ("hermes", {"reasoning": {"effort": "low"}}, "reasoning.effort"),
        (
            "hermes",
            {"reasoning": {"effort": "none"}, "chat_template_kwargs": {"enable_thinking": True}},
            "reasoning.effort",
        ),
        ("mistral", {"instructions": "I", "input": [call("f", "1"), result("2", "x")]}, "input[1].call_id"),
    ],
)
async def test_what_cannot_be_done_is_refused(family: str, more: dict[str, Any], param: str) -> None:
    """A 400 that names the field as this route calls it, in the message too, before anything runs."""
    world = world_with_grammars(family)
    async with client(world.app) as http:
        answer = await http.post(PATH, json={"input": "hi", "tools": FLAT} | more)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert f"'{param}'" in error["message"]
    assert world.engine.submitted == []


async def test_a_template_without_calls_names_the_item() -> None:
    """Calls cannot be told to a model whose template knows none: the first item that holds some is at fault."""
    world = World("hermes", "ok")
    tokenizer = byte_tokenizer("{{ messages[0].content }}", ())
    app = make_app(world.engine, tokenizer=tokenizer, dialect=dialect_of(tokenizer))
    items = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a"}, call("f", "1")]
    async with client(app) as http:
        answer = await http.post(PATH, json={"instructions": "I", "input": items, "truncation": "auto"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input[1]")


async def test_effort_is_what_a_chat_makes_of_it() -> None:
    """`none` switches thoughts off where the template can, levels reach templates that know them."""
    world = World("hermes", "ok")
    answer = await ask(world, reasoning={"effort": "none"})
    assert world.prompt().endswith("[assistant]<think></think>")
    assert answer["reasoning"] == {"effort": "none", "summary": None}
    world.tokenizer = byte_tokenizer("{{ reasoning_effort }}: {{ messages[0].content }}", ())
    world.app = make_app(world.engine, tokenizer=world.tokenizer, dialect=dialect_of(world.tokenizer))
    await ask(world, reasoning={"effort": "high", "summary": "auto"})
    assert world.prompt() == "high: hi"


@pytest.mark.parametrize("burst", [1, 4, 1000])
async def test_logprobs_are_of_the_text_behind_the_thoughts(burst: int) -> None:
    """Of every token of the message and of none before it, the same whole and streamed, however they come."""
    world = World("hermes", f"{THINKING}Ja, süß.", burst)
    include = ["message.output_text.logprobs"]
    answer = await ask(world, include=include, seed=1)
    [part] = answer["output"][1]["content"]
    # Whitespace behind the thoughts is no text, but its tokens are none of theirs either.
    assert b"".join(bytes(entry["bytes"]) for entry in part["logprobs"]).decode() == "\n\nJa, süß."
    events = await stream(world, include=include, seed=1)
    assert nameless(replayed(events)) == nameless(answer["output"])
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert [entry for event in deltas for entry in event["logprobs"]] == part["logprobs"]
