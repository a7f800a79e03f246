"""Tools and thoughts through the `openai` package: scripted replies of four families and their templates."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import openai
import pytest

from server.api.dialects.dialect import dialect_of
from server.errors import ConfigError
from tests.unit.api_fake import make_app
from tests.unit.tool_fake import (
    FAMILIES,
    HERMES,
    HERMES_CALL,
    HERMES_NOW,
    HI,
    LLAMA,
    MISTRAL,
    NOW,
    PYTHONIC,
    REPLIES,
    STRICT,
    TOKENIZERS,
    TOOLS,
    WEATHER,
    WRONG,
    World,
    byte_tokenizer,
    world_with_grammars,
)


def calls_in(message: Any) -> list[tuple[str, Any]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or []]


def joined(chunks: Sequence[Any]) -> dict[str, Any]:
    """The message that the deltas of one choice add up to, put together as OpenAI's documentation says."""
    message: dict[str, Any] = {"content": None, "reasoning": None, "calls": []}
    for chunk in chunks:
        for choice in chunk.choices:
            delta = choice.delta
            for key, text in (("content", delta.content), ("reasoning", getattr(delta, "reasoning_content", None))):
                if text is not None:
                    message[key] = (message[key] or "") + text
            for call in delta.tool_calls or []:
                if call.index == len(message["calls"]):
                    assert call.type == "function"
                    assert call.function.arguments == ""
                    message["calls"].append([call.id, call.function.name, ""])
                else:
                    assert call.index == len(message["calls"]) - 1
                    assert call.id is call.type is call.function.name is None
                    message["calls"][-1][2] += call.function.arguments
    return message


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("burst", [1, 5, 1000])
async def test_calls_arrive_whole_and_streamed(family: str, burst: int) -> None:
    """The same calls by either way, with ids, after the content; finish reason `tool_calls`."""
    world = World(family, REPLIES[family], burst)
    choice = (await world.ask(tools=TOOLS)).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look."
    assert calls_in(choice.message) == [("weather", {"city": "Tromsø"}), ("now", {})]
    assert len({call.id for call in choice.message.tool_calls}) == 2
    assert all(call.id.startswith("call_") and call.type == "function" for call in choice.message.tool_calls)
    chunks = await world.stream(tools=TOOLS)
    message = joined(chunks)
    assert message["content"] == "I look."
    assert [(name, json.loads(arguments)) for _, name, arguments in message["calls"]] == calls_in(choice.message)
    assert [c.finish_reason for chunk in chunks for c in chunk.choices][-1] == "tool_calls"
    assert chunks[-1].choices[0].delta.model_dump(exclude_unset=True) == {}


async def test_the_packages_own_accumulator_agrees() -> None:
    """The client's stream helper puts the deltas together to the unstreamed message, parsed arguments included."""
    world = world_with_grammars("hermes", REPLIES["hermes"])
    async with (
        world.client() as client,
        client.chat.completions.stream(model="fake", messages=HI, tools=[STRICT, NOW]) as stream,
    ):
        final = (await stream.get_final_completion()).choices[0].message
    assert calls_in(final) == [("weather", {"city": "Tromsø"}), ("now", {})]


async def test_without_content_there_is_none() -> None:
    """An answer that only calls has null for content, and no empty delta."""
    world = World("hermes", '<tool_call>{"name": "now", "arguments": {}}</tool_call>')
    message = (await world.ask(tools=TOOLS)).choices[0].message
    assert message.content is None
    assert joined(await world.stream(tools=TOOLS))["content"] is None


@pytest.mark.parametrize("family", FAMILIES)
async def test_text_stays_text(family: str) -> None:
    """A reply that calls nothing is plain content, streamed in pieces; so is a malformed call."""
    for reply in ("Just words. [x] {y}\n", '{"name": "nobody", "parameters": {}} [nobody(1)]'):
        world = World(family, reply)
        choice = (await world.ask(tools=TOOLS)).choices[0]
        assert (choice.message.content, choice.finish_reason) == (reply, "stop")
        assert choice.message.tool_calls is None
        assert joined(await world.stream(tools=TOOLS))["content"] == reply


async def test_markers_are_hidden_from_the_client_only() -> None:
    """Control tokens reach the parser; of what is no call the client sees the text without them, or with them if it
    asks for special tokens."""
    world = World("mistral", "a[TOOL_CALLS]?b")
    assert (await world.ask(tools=TOOLS)).choices[0].message.content == "a?b"
    shown = await world.ask(tools=TOOLS, extra_body={"skip_special_tokens": False})
    assert shown.choices[0].message.content == "a[TOOL_CALLS]?b"
    assert (await world.ask()).choices[0].message.content == "a?b"


async def test_a_cut_call_says_length() -> None:
    """What max_tokens cuts off is passed on as far as it goes."""
    world = World("hermes", REPLIES["hermes"])
    choice = (await world.ask(tools=TOOLS, max_tokens=len("I look.\n") + 62 - len("<tool_call>") + 1)).choices[0]
    assert choice.finish_reason == "length"
    [call] = choice.message.tool_calls
    assert call.function.arguments.startswith('{"city": "T')
    with pytest.raises(ValueError):
        json.loads(call.function.arguments)


async def test_choices_call_on_their_own() -> None:
    """With n, each choice has its own calls, numbered from 0."""
    world = World("hermes", REPLIES["hermes"])
    answer = await world.ask(tools=TOOLS, n=2)
    assert [len(choice.message.tool_calls) for choice in answer.choices] == [2, 2]
    assert len({call.id for choice in answer.choices for call in choice.message.tool_calls}) == 4
    chunks = await world.stream(tools=TOOLS, n=2)
    for index in (0, 1):
        own = [chunk.model_copy(update={"choices": [c for c in chunk.choices if c.index == index]}) for chunk in chunks]
        assert [name for _, name, _ in joined(own)["calls"]] == ["weather", "now"]


async def test_logprobs_are_of_every_token() -> None:
    """Tokens of calls and thoughts have theirs too, streamed or not."""
    world = World("hermes", "<think>x</think>" + REPLIES["hermes"], 4)
    whole = (await world.ask(tools=TOOLS, logprobs=True)).choices[0].logprobs.content
    chunks = await world.stream(tools=TOOLS, logprobs=True)
    streamed = [entry for chunk in chunks for c in chunk.choices if c.logprobs for entry in c.logprobs.content]
    assert [entry.token for entry in streamed] == [entry.token for entry in whole]
    assert "".join(entry.token for entry in whole if len(entry.bytes) > 1).startswith("<think></think><tool_call>")


async def test_one_call_at_most_ends_the_answer() -> None:
    """parallel_tool_calls: false ends the choice when a second call begins, and gives the engine's work back."""
    world = World("hermes", REPLIES["hermes"])
    choice = (await world.ask(tools=TOOLS, parallel_tool_calls=False)).choices[0]
    assert calls_in(choice.message) == [("weather", {"city": "Tromsø"})]
    assert choice.finish_reason == "tool_calls"
    assert world.engine.aborted == 1
    assert world.engine.open == {}
    assert len(joined(await world.stream(tools=TOOLS, parallel_tool_calls=False))["calls"]) == 1


async def test_none_tells_the_model_of_no_tools() -> None:
    """With tool_choice none the prompt has no tools and the text is not searched for calls."""
    world = World("hermes", REPLIES["hermes"])
    choice = (await world.ask(tools=TOOLS, tool_choice="none")).choices[0]
    assert choice.message.content == REPLIES["hermes"]
    assert "tools:" not in world.prompt()
    await world.ask(tools=TOOLS, tool_choice="auto")
    assert "tools:" in world.prompt()


async def test_the_template_gets_tools_calls_and_results() -> None:
    """Definitions as they were sent (without `strict`), arguments as objects, results by name, null content as text."""
    world = World("hermes", "ok")
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    conversation = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
        {"role": "assistant", "content": "It rains.", "tool_calls": []},
    ]
    await world.ask(conversation, tools=TOOLS)
    described = json.dumps(WEATHER)
    nothing = json.dumps({**NOW, "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}})
    assert world.prompt() == (
        f"tools:\n{described}\n{nothing}\n"
        'Calls look like <tool_call>{"name": ..., "arguments": ...}</tool_call>.\n'
        '[user]hi\n[assistant]<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>\n'
        "[tool weather]rain\n[assistant]It rains.\n[assistant]"
    )
    broken = {**call, "function": {"name": "weather", "arguments": '{"city": '}}
    await world.ask([*HI, {"role": "assistant", "tool_calls": [broken]}])
    assert '"arguments": "{\\"city\\": "}' in world.prompt()


async def test_an_answer_can_be_sent_back() -> None:
    """The message of an answer, thoughts, calls and all, is a message of the next request."""
    world = World("hermes", "<think>hm</think>" + REPLIES["hermes"])
    message = (await world.ask(tools=TOOLS)).choices[0].message.model_dump(exclude_none=True)
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "x"} for call in message["tool_calls"]]
    await world.ask([*HI, message, *results], tools=TOOLS)
    assert "<think>hm</think>I look.<tool_call>" in world.prompt()
    assert world.prompt().endswith("[tool weather]x\n[tool now]x\n[assistant]")


async def test_mistral_templates_get_the_ids_that_they_want() -> None:
    """Nine letters and digits, the same for a call and its result; an id of that form stays as it is."""
    world = World("mistral", "ok")
    for call_id, shown in (("call_0123456789abcdef", None), ("abcDEF123", "abcDEF123")):
        call = {"id": call_id, "type": "function", "function": {"name": "now", "arguments": ""}}
        result = {"role": "tool", "tool_call_id": call_id, "content": "noon"}
        await world.ask([*HI, {"role": "assistant", "tool_calls": [call]}, result], tools=TOOLS)
        end = world.prompt().partition("[TOOL_CALLS]now[ARGS]{}[TOOL_RESULTS]")[2]
        used = end.partition("=")[0]
        assert len(used) == 9
        assert used == (shown or used)


# -- held to it -------------------------------------------------------------------------------------------------------


def named(name: str) -> Any:
    return {"type": "function", "function": {"name": name}}


def allowed(mode: str, *names: str) -> Any:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [named(name) for name in names]}}


@pytest.mark.parametrize(
    ("request_", "good", "bad"),
    [
        (
            {"tool_choice": "required"},
            [HERMES_CALL, HERMES_NOW, f"{HERMES_NOW}\n{HERMES_CALL}"],
            ["no", "", WRONG, HERMES_CALL + "x", HERMES_CALL.replace("weather", "other")],
        ),
        ({"tool_choice": "required", "parallel_tool_calls": False}, [HERMES_NOW], [f"{HERMES_NOW}\n{HERMES_NOW}"]),
        ({"tool_choice": named("now")}, [HERMES_NOW], [HERMES_CALL, "no", f"{HERMES_NOW}\n{HERMES_NOW}"]),
        ({"tool_choice": allowed("required", "now")}, [HERMES_NOW, f"{HERMES_NOW}\n{HERMES_NOW}"], [HERMES_CALL, "no"]),
        ({"tool_choice": allowed("auto", "now")}, [HERMES_NOW, "no", f"well {HERMES_NOW} so"], [HERMES_CALL]),
        ({"tools": [STRICT, NOW]}, ["no", HERMES_CALL, f"a {HERMES_CALL} b {HERMES_NOW}"], [WRONG, f"a {WRONG}"]),
        (
            {"response_format": {"type": "json_object"}},
            ['{"a": 1}', HERMES_CALL, f"{HERMES_CALL}\n{HERMES_NOW}"],
            ["no", WRONG, f'{HERMES_NOW}{{"a": 1}}'],
        ),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("thinks", [False, True])
async def test_the_model_is_held_to_calls(
    request_: dict[str, Any], good: list[str], bad: list[str], thinks: bool
) -> None:
    """required, a named function, allowed tools, strict schemas, a format beside tools: what may be written is that and
    nothing else, behind the thoughts if there are any."""
    world = world_with_grammars("hermes")
    begin = {"extra_body": {"chat_template_kwargs": {"begin_thinking": True}}} if thinks else {}
    await world.ask(**{"tools": TOOLS, **request_, **begin})
    for before in ["hm </think>", "hm\n</think>\n\n"] if thinks else ["", "<think>hm</think>\n"]:
        assert [text for text in good if not world.holds(before + text)] == []
        assert [text for text in bad if world.holds(before + text)] == []
    assert not thinks or not world.holds(good[0])


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("mistral", '[TOOL_CALLS]weather[ARGS]{"city": "Oslo"}[TOOL_CALLS]now[ARGS]{}'),
        ("llama3", '{"name": "weather", "parameters": {"city": "Oslo"}}; {"name": "now", "parameters": {}}'),
        ("hermes", f"{HERMES_CALL}\n{HERMES_NOW}"),
    ],
)
async def test_what_a_family_is_held_to_is_what_its_parser_reads(family: str, text: str) -> None:
    """The enforced form of calls is read back as those calls."""
    world = world_with_grammars(family, text)
    choice = (await world.ask(tools=TOOLS, tool_choice="required")).choices[0]
    assert world.holds(text)
    assert not world.holds("no")
    assert calls_in(choice.message) == [("weather", {"city": "Oslo"}), ("now", {})]


async def test_a_format_waits_for_the_end_of_thoughts() -> None:
    """A structured answer of a model that thinks: thoughts are free, the rest is held to the schema."""
    world = world_with_grammars("hermes", '<think>hm</think>{"a": 1}')
    message = (await world.ask(response_format={"type": "json_object"})).choices[0].message
    assert (message.content, message.reasoning_content) == ('{"a": 1}', "hm")
    assert world.holds('<think>{"</think>{}')
    assert world.holds("{}")
    assert not world.holds("<think>hm</think>no")


async def test_schemas_that_cannot_be_held_to() -> None:
    """Of a strict tool that is a 400 naming the schema; of another one any object will do. Also of too many."""
    odd = {"name": "odd", "parameters": {"type": "object", "properties": {"x": {"not": {}}}}}
    world = world_with_grammars("hermes")
    with pytest.raises(openai.BadRequestError) as refusal:
        await world.ask(tools=[NOW, {"type": "function", "function": {**odd, "strict": True}}])
    assert refusal.value.param == "tools[1].function.parameters"
    await world.ask(tools=[{"type": "function", "function": odd}], tool_choice="required")
    assert world.holds('<tool_call>\n{"name": "odd", "arguments": {"x": 1}}\n</tool_call>')
    long = {"type": "object", "description": "x" * 1200, "additionalProperties": False}
    many = [
        {"type": "function", "function": {"name": name, "parameters": long, "strict": name == "c"}} for name in "abc"
    ]
    world = world_with_grammars("hermes", max_constraint_bytes=2000)
    await world.ask(tools=many[:2], tool_choice="required")
    assert not world.holds('<tool_call>\n{"name": "a", "arguments": {"x": 1}}\n</tool_call>')
    assert world.holds('<tool_call>\n{"name": "b", "arguments": {"x": 1}}\n</tool_call>')
    with pytest.raises(openai.BadRequestError, match="max_constraint_bytes") as refusal:
        await world.ask(tools=many)
    assert refusal.value.param == "tools[2].function.parameters"


@pytest.mark.parametrize(
    ("family", "more", "param"),
    [
        ("pythonic", {"tool_choice": "required"}, "tool_choice"),
        ("pythonic", {"tools": [STRICT]}, "tools[0].function.strict"),
        ("hermes", {"tool_choice": named("other")}, "tool_choice.function.name"),
        ("hermes", {"tool_choice": allowed("auto", "other")}, "tool_choice.allowed_tools.tools"),
        ("hermes", {"tools": [NOW, NOW]}, "tools[1].function.name"),
    ],
)
async def test_what_cannot_be_done_is_refused(family: str, more: dict[str, Any], param: str) -> None:
    """A 400 that names the field, before anything runs."""
    world = world_with_grammars(family)
    with pytest.raises(openai.BadRequestError) as refusal:
        await world.ask(**{"tools": TOOLS, **more})
    assert refusal.value.param == param
    assert world.engine.submitted == []


async def test_without_the_means_to_enforce_it_is_refused() -> None:
    """No grammars: `auto` works, what must be enforced is a 400."""
    world = World("hermes", "ok")
    await world.ask(tools=TOOLS)
    with pytest.raises(openai.BadRequestError) as refusal:
        await world.ask(tools=TOOLS, tool_choice="required")
    assert refusal.value.param == "tool_choice"


async def test_a_model_without_tools_refuses_them() -> None:
    """No parser, or a template that does not know tools: `tools` is a 400."""
    for parsers in ({"tools": "none"}, {}):
        world = World("hermes", "ok", parsers=parsers)
        if not parsers:
            world = World("hermes", "ok")
            world.tokenizer = byte_tokenizer("{{ messages[0].content }}", ())
            world.app = make_app(world.engine, tokenizer=world.tokenizer, dialect=dialect_of(world.tokenizer, "hermes"))
        with pytest.raises(openai.BadRequestError) as refusal:
            await world.ask(tools=TOOLS)
        assert refusal.value.param == "tools"
        assert (await world.ask()).choices[0].message.content == "ok"


# -- thoughts ---------------------------------------------------------------------------------------------------------

THINKING = "<think>\nLet me\n</think>\n\nYes."


def details(usage: Any) -> int:
    return int(usage.completion_tokens_details.reasoning_tokens)


@pytest.mark.parametrize("burst", [1, 7, 1000])
async def test_thoughts_are_told_apart(burst: int) -> None:
    """Under both names that clients know, streamed and whole, counted in usage; the content begins behind them."""
    world = World("hermes", THINKING, burst)
    answer = await world.ask()
    message = answer.choices[0].message
    assert (message.content, message.reasoning_content, message.reasoning) == ("Yes.", "Let me", "Let me")
    assert answer.choices[0].finish_reason == "stop"
    assert details(answer.usage) == len("<\nLet me\n>")
    chunks = await world.stream(stream_options={"include_usage": True})
    assert joined(chunks) == {"content": "Yes.", "reasoning": "Let me", "calls": []}
    assert details(chunks[-1].usage) == len("<\nLet me\n>")


async def test_a_template_may_open_the_thoughts() -> None:
    """The prompt ends with the tag: the answer begins within them."""
    world = World("hermes", "Let me</think>Yes.")
    answer = await world.ask(extra_body={"chat_template_kwargs": {"begin_thinking": True}})
    assert world.prompt().endswith("[assistant]<think>")
    message = answer.choices[0].message
    assert (message.content, message.reasoning_content) == ("Yes.", "Let me")
    assert details(answer.usage) == len("Let me>")


async def test_thoughts_may_be_left_out() -> None:
    """include_reasoning: false sends none of them; they are counted all the same."""
    world = World("hermes", THINKING)
    answer = await world.ask(extra_body={"include_reasoning": False})
    assert not hasattr(answer.choices[0].message, "reasoning_content")
    assert answer.choices[0].message.content == "Yes."
    assert details(answer.usage) == 10
    assert joined(await world.stream(extra_body={"include_reasoning": False}))["reasoning"] is None


async def test_unfinished_thoughts_have_no_content() -> None:
    """Cut off while it thinks: content is null."""
    answer = await World("hermes", THINKING).ask(max_tokens=4)
    message = answer.choices[0].message
    assert (message.content, message.reasoning_content) == (None, "Le")
    assert details(answer.usage) == 4


async def test_the_parser_can_be_off() -> None:
    """reasoning_parser none: thoughts stay in the text, usage does not tell them apart."""
    world = World("hermes", THINKING, parsers={"thoughts": "none"})
    answer = await world.ask()
    assert answer.choices[0].message.content == THINKING
    assert answer.usage.completion_tokens_details is None


async def test_reasoning_effort_reaches_templates_that_know_it() -> None:
    """`none` switches thinking off where the template can; levels are handed over where it knows the name; else 400."""
    world = World("hermes", "ok")
    await world.ask(reasoning_effort="none")
    assert world.prompt().endswith("<think></think>")
    for more in (
        {"reasoning_effort": "low"},
        {"reasoning_effort": "none", "extra_body": {"chat_template_kwargs": {"enable_thinking": True}}},
    ):
        with pytest.raises(openai.BadRequestError) as refusal:
            await world.ask(**more)
        assert refusal.value.param == "reasoning_effort"
    world.tokenizer = byte_tokenizer("{{ reasoning_effort }}: {{ messages[0].content }}", ())
    world.app = make_app(world.engine, tokenizer=world.tokenizer, dialect=dialect_of(world.tokenizer))
    await world.ask(reasoning_effort="high")
    assert world.prompt() == "high: hi"


# -- the template's other variables -----------------------------------------------------------------------------------


async def test_messages_may_be_continued() -> None:
    """The last message stays open; its unfinished thoughts go on as thoughts."""
    world = World("hermes", " more</think>Yes.")
    last = {"role": "assistant", "content": "<think>some"}
    answer = await world.ask([*HI, last], extra_body={"continue_final_message": True})
    assert world.prompt() == "[user]hi\n[assistant]<think>some"
    assert (answer.choices[0].message.content, answer.choices[0].message.reasoning_content) == ("Yes.", "more")
    await world.ask(extra_body={"add_generation_prompt": False})
    assert world.prompt() == "[user]hi\n"


async def test_documents_reach_templates_that_take_them() -> None:
    """As they are."""
    world = World("hermes", "ok")
    await world.ask(extra_body={"documents": [{"title": "one"}, {"title": "two"}]})
    assert "(one)(two)" in world.prompt()


async def test_tokenize_sees_what_a_chat_sees() -> None:
    """/tokenize with messages and tools gives the prompt of the chat with them."""
    world = World("hermes", "ok")
    await world.ask(tools=TOOLS)
    async with world.client() as client:
        answer = await client.post("http://t/tokenize", body={"messages": HI, "tools": TOOLS}, cast_to=object)
    assert isinstance(answer, Mapping)
    assert answer["tokens"] == list(world.engine.submitted[0].prompt)


# -- which dialect ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "summary"),
    [
        (HERMES, "tool calls: hermes, by the chat template; reasoning: qwen3, by the chat template"),
        (MISTRAL, "tool calls: mistral, by the chat template; reasoning: none, by the chat template"),
        (LLAMA, "tool calls: llama3, by the chat template; reasoning: none, by the chat template"),
        (PYTHONIC, "tool calls: pythonic, by the chat template; reasoning: none, by the chat template"),
        (
            "{{ tools }}<tool_call><function=f></function>",
            "tool calls: none, by the chat template; reasoning: none, by the chat template",
        ),
        (
            "<｜Assistant｜>{{ c.split('</think>') }}",
            "tool calls: none, by the chat template; reasoning: deepseek_r1, by the chat template",
        ),
        ("[THINK]{{ tools }}", "tool calls: none, by the chat template; reasoning: mistral, by the chat template"),
        ("no tools <tool_call>", "tool calls: none, by the chat template; reasoning: none, by the chat template"),
    ],
)
def test_the_template_tells_the_dialect(template: str, summary: str) -> None:
    """What a chat template says of calls and thoughts names the parsers; the start log says which."""
    assert dialect_of(byte_tokenizer(template, ())).summary == summary


def test_a_dialect_can_be_named() -> None:
    """By flag; names there are none of are an error that lists them."""
    tokenizer = TOKENIZERS["hermes"]
    assert dialect_of(tokenizer, "llama3", "none").summary == "tool calls: llama3; reasoning: none"
    for names in (("hermse", "auto"), ("auto", "r1")):
        with pytest.raises(ConfigError, match="there are: "):
            dialect_of(tokenizer, *names)
