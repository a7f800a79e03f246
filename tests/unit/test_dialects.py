"""Dialects: calls and thoughts are found wherever the text is cut, and what is neither stays text."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.dialects.answer import Outline, assemble
from server.api.dialects.calls import PARSERS, ToolParser
from server.api.dialects.parts import Arguments, CallStart, Content, Part, Thought, merged
from server.api.dialects.reader import Reader
from server.api.dialects.thinking import THOUGHTS, ThoughtParser
from server.registry import resolve

NAMES = ("weather", "now", "f")
FAMILIES = sorted(PARSERS)


def parser(family: str, hidden: Sequence[str] = ()) -> ToolParser:
    made: ToolParser = resolve("tool_call_parser", PARSERS, family)(NAMES, hidden)
    return made


def thoughts(inside: bool = False, hidden: Sequence[str] = ()) -> ThoughtParser:
    return ThoughtParser(THOUGHTS["qwen3"], inside=inside, hidden=hidden)


def read(reader: Reader, text: str, cuts: Sequence[int] = ()) -> list[Part]:
    """All parts of `text`, pushed in pieces that end at `cuts`."""
    parts: list[Part] = []
    at = 0
    for cut in [*cuts, len(text)]:
        parts += reader.push(text[at:cut])
        at = cut
    return merged(parts + reader.finish())


def said(parts: Sequence[Part]) -> list[str | tuple[str, str]]:
    """`parts` in short: contents as they are, calls as (name, arguments)."""
    found: list[str | tuple[str, str]] = []
    for part in parts:
        if isinstance(part, CallStart):
            found.append((part.name, ""))
        elif isinstance(part, Arguments):
            name, text = found.pop()
            found.append((name, text + part.text))
        else:
            found.append(part.text)
    return found


WEATHER = ("weather", '{"city": "Bergen, \\"NO\\" }", "days": [1, {"x": null}]}')
JSON_CALL = f'{{"name": "weather", "arguments": {WEATHER[1]}}}'
NOW = ("now", "{}")

EXAMPLES: list[tuple[str, str, list[str | tuple[str, str]]]] = [
    # -- hermes
    ("hermes", f"<tool_call>\n{JSON_CALL}\n</tool_call>", [WEATHER]),
    (
        "hermes",
        f'Let me see.\n\n<tool_call>{JSON_CALL}</tool_call>\n<tool_call>{{"arguments":{{}}, "name":"now"}}</tool_call>'
        "\n",
        ["Let me see.", WEATHER, NOW],
    ),
    ("hermes", '<tool_call>{"name": "now"}</tool_call> Done. ', [NOW, "Done. "]),
    ("hermes", '<tool_call>{"name": "other-tool", "arguments": {"a": 1}}', [("other-tool", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "now", "arguments": "{\\"a\\": 1}"}</tool_call>', [("now", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "now", "arguments": null, "id": 7}</tool_call>', [NOW]),
    ("hermes", '<tool_call>{"name": "now", "arguments": {}</tool_call><tool_call>{"name": "f"}', [NOW, ("f", "{}")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "cut o', [("f", '{"a": "cut o')]),
    ("hermes", "The tags are <tool_call> and </tool_call>.", ["The tags are <tool_call> and </tool_call>."]),
    ("hermes", '<tool_call>{"name": "bad name"}</tool_call>', ['<tool_call>{"name": "bad name"}</tool_call>']),
    ("hermes", '<tool_call>{"nom": "f"}</tool_call>', ['<tool_call>{"nom": "f"}</tool_call>']),
    ("hermes", '<tool_call>{"name": "f", "arguments": [1]}', ['<tool_call>{"name": "f", "arguments": [1]}']),
    ("hermes", '<tool_call>{"name": ', ['<tool_call>{"name": ']),
    ("hermes", JSON_CALL, [JSON_CALL]),
    ("hermes", " \n just text \n", [" \n just text \n"]),
    # -- llama3
    ("llama3", JSON_CALL.replace("arguments", "parameters"), [WEATHER]),
    ("llama3", f"<|python_tag|>{JSON_CALL}", [WEATHER]),
    ("llama3", f'{JSON_CALL}; {{"name": "now", "parameters": {{}}}}', [WEATHER, NOW]),
    ("llama3", '{"type": "function", "name": "now", "parameters": {}}\n', [NOW]),
    ("llama3", f"I call it:\n{JSON_CALL}", ["I call it:", WEATHER]),
    ("llama3", '{"name": "unknown", "parameters": {}}', ['{"name": "unknown", "parameters": {}}']),
    ("llama3", '{"name": "now", "age": 7}', ['{"name": "now", "age": 7}']),
    ("llama3", '{"name": "now"}', ['{"name": "now"}']),
    ("llama3", "def f() { return {}; }", ["def f() { return {}; }"]),
    ("llama3", f"{JSON_CALL}; and more", [WEATHER, "; and more"]),
    # -- mistral
    ("mistral", f"[TOOL_CALLS] [{JSON_CALL}]", [WEATHER]),
    ("mistral", f'[TOOL_CALLS][{JSON_CALL[:-1]}, "id": "abcdefghi"}}, {{"name": "now"}}]', [WEATHER, NOW]),
    ("mistral", f"Y [TOOL_CALLS]weather[ARGS]{WEATHER[1]}[TOOL_CALLS]now[CALL_ID]a1[ARGS]{{}}", ["Y", WEATHER, NOW]),
    ("mistral", f"[TOOL_CALLS]weather{WEATHER[1]}", [WEATHER]),
    ("mistral", f"[TOOL_CALLS]{JSON_CALL}", [WEATHER]),
    ("mistral", "[TOOL_CALLS]weather[OTHER]{}", ["[TOOL_CALLS]weather[OTHER]{}"]),
    ("mistral", "[TOOL_CALLS] none, [TOOL", ["[TOOL_CALLS] none, [TOOL"]),
    ("mistral", f"[TOOL_CALLS][{JSON_CALL}, oops]", [WEATHER, ", oops]"]),
    # -- pythonic
    (
        "pythonic",
        "[weather(city='Bergen, \"NO\" }', days=[1, {\"x\": None}])]",
        [WEATHER],
    ),
    ("pythonic", "<|python_start|>[now(), f(a=True, b=false, c=(1, 2.5),)]<|python_end|>",
     [NOW, ("f", '{"a": true, "b": false, "c": [1, 2.5]}')]),
    ("pythonic", "Sure: [ now( ) ]", ["Sure:", NOW]),
    ("pythonic", "[f(a=x + 1, b='it\\'s')]", [("f", '{"a": "x + 1", "b": "it\'s"}')]),
    ("pythonic", "see [now](http://x) and [f", ["see [now](http://x) and [f"]),
    ("pythonic", "[unknown(a=1)]", ["[unknown(a=1)]"]),
    ("pythonic", "[f(1)]", ["[f(1)]"]),
    ("pythonic", "[f(a=1, 2)]", [("f", '{"a": 1}'), ", 2)]"]),
    ("pythonic", "[f(a=1, b=", [("f", '{"a": 1')]),
]  # fmt: skip


@pytest.mark.parametrize(("family", "text", "expected"), EXAMPLES)
def test_calls_and_text_are_told_apart(family: str, text: str, expected: list[str | tuple[str, str]]) -> None:
    """Each family's calls, alone and among text; what is no call after all is text to the letter."""
    found = said(read(parser(family), text))
    if family == "pythonic" and text.endswith("b="):
        found = found[:1]
    assert found == expected


@pytest.mark.parametrize(("family", "text"), [(family, text) for family, text, _ in EXAMPLES])
def test_every_cut_gives_the_same(family: str, text: str) -> None:
    """In two at any place, or character by character: the parts are those of the whole."""
    whole = read(parser(family), text)
    assert read(parser(family), text, range(1, len(text))) == whole
    for cut in range(1, len(text)):
        assert read(parser(family), text, [cut]) == whole


FRAGMENTS = [
    "<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "<|python_start|>", "<think>",
    "</think>", '"name": ', '"weather"', '"arguments": ', "weather", "now(", "a=", "1", ", ", ";", '"', "'", "\\", " ",
    "\n", "text", "[", "]", "{", "}", "(", ")", "é", JSON_CALL, f"<tool_call>{JSON_CALL}</tool_call>", "[now()]",
    "[TOOL_CALLS]now[ARGS]{}",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=14).map("".join)
HIDDEN = st.sampled_from([(), ("<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "<tool_call>", "<think>")])


@given(st.sampled_from([*FAMILIES, "thoughts", "inside"]), TEXTS, HIDDEN, st.data())
def test_any_text_however_cut(family: str, text: str, hidden: tuple[str, ...], data: st.DataObject) -> None:
    """No text is too odd: nothing raises, cuts do not matter, and without calls and thoughts every character stays."""

    def made() -> Reader:
        return thoughts(family == "inside", hidden) if family in ("thoughts", "inside") else parser(family, hidden)

    whole = read(made(), text)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=6)))
    assert read(made(), text, cuts) == whole
    contents = [part for part in whole if isinstance(part, Content)]
    if whole == contents and not hidden:
        assert "".join(part.text for part in contents) == text or family == "inside"
    rest = iter(text)
    assert all(character in rest for part in contents for character in part.text), (
        "content is made of the text, in order"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_arguments_come_as_they_are_written(family: str) -> None:
    """A long argument does not wait for its end: each delta of it is passed on at once, but for Python's literals."""
    start = {
        "hermes": '<tool_call>{"name": "f", "arguments": {"a": "',
        "llama3": '{"name": "f", "parameters": {"a": "',
        "mistral": '[TOOL_CALLS]f[ARGS]{"a": "',
        "pythonic": "[f(z=1, a='",
    }[family]
    reader = parser(family)
    begun = reader.push(start)
    assert begun[0] == CallStart("f")
    news = [reader.push(word) for word in ("one ", "two ", "three")]
    assert news == [[Arguments("one ")], [Arguments("two ")], [Arguments("three")]] or family == "pythonic"


@pytest.mark.parametrize(
    ("family", "text", "expected"),
    [
        ("llama3", f"<|python_tag|>{JSON_CALL}", [WEATHER]),
        ("llama3", "<|python_tag|>print(1) <|python_tag|>", ["print(1) "]),
        ("mistral", "a[TOOL_CALLS]now[ARGS]{} b[ARGS]c", ["a", NOW, "bc"]),
        ("mistral", "[TOOL_CALLS]no call", ["no call"]),
    ],
)
def test_control_tokens_are_for_the_parser_only(family: str, text: str, expected: list[str | tuple[str, str]]) -> None:
    """Where a marker is a control token the client never sees it, call or not."""
    hidden = ("<|python_tag|>", "[TOOL_CALLS]", "[ARGS]")
    for cuts in ((), range(1, len(text))):
        assert said(read(parser(family, hidden), text, cuts)) == expected


@pytest.mark.parametrize(
    ("inside", "text", "expected", "end"),
    [
        (False, "<think>\nhm\n</think>\n\nYes.", [Thought("hm"), Content("Yes.")], 19),
        (False, "\n<think></think>Yes.", [Content("Yes.")], 16),
        (False, "Yes <think> no </think>", [Content("Yes <think> no </think>")], 0),
        (False, "<thing>", [Content("<thing>")], 0),
        (True, "hm </think> Yes.\n", [Thought("hm"), Content("Yes.\n")], 11),
        (True, "<think>hm", [Thought("hm")], None),
        (True, "</think>Yes", [Content("Yes")], 8),
        (True, "a <think> b</think>c", [Thought("a <think> b"), Content("c")], 19),
        (True, "hm </thi", [Thought("hm </thi")], None),
    ],
)  # fmt: skip
def test_thoughts_come_first(inside: bool, text: str, expected: list[Part], end: int | None) -> None:
    """Thoughts are what stands between the tags at the beginning; the opening one may stand in the prompt."""
    for cuts in ((), range(1, len(text))):
        reader = thoughts(inside)
        assert read(reader, text, cuts) == expected
        assert reader.thought_chars == end


@pytest.mark.parametrize(
    ("name", "prompt", "continued", "inside"),
    [
        ("qwen3", "<assistant>\n<think>\n", None, True),
        ("qwen3", "<assistant>\n<think>\n\n</think>\n\n", None, False),
        ("qwen3", "what is <think> for?<assistant>", None, False),
        ("deepseek_r1", "<assistant>", None, True),
        ("deepseek_r1", "<assistant></think>", None, False),
        ("deepseek_r1", "", "<think>so far", True),
        ("qwen3", "", "<think>so far</think> and", False),
        ("mistral", "[/INST][THINK]", None, True),
    ],
)
def test_the_prompt_says_whether_it_ends_in_a_thought(
    name: str, prompt: str, continued: str | None, inside: bool
) -> None:
    """Templates open the tag or close it; some models think without being told; a continued message goes on as it
    was."""
    assert THOUGHTS[name].inside(prompt, continued) is inside


def outline(**more: object) -> Outline:
    kind = resolve("tool_call_parser", PARSERS, "hermes")
    return Outline(tools=kind, names=frozenset(NAMES), thoughts=THOUGHTS["qwen3"], **more)  # type: ignore[arg-type]


def test_thoughts_are_not_searched_for_calls() -> None:
    """A model that thinks about calling does not call."""
    call = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    answer = outline().parser()
    message = assemble(answer.push(f"<think>{call}?</think>\n{call}") + answer.finish())
    assert message.thoughts == f"{call}?"
    assert [(found.name, found.arguments) for found in message.calls] == [NOW]
    assert message.content is None


@pytest.mark.parametrize("hide", [True, False])
def test_control_tokens_of_calls_behind_thoughts(hide: bool) -> None:
    """A model with control tokens for both: each parser sees its own, the client none of them unless it asks."""
    special = {marker: index for index, marker in enumerate(("[THINK]", "[/THINK]", "[TOOL_CALLS]", "[ARGS]"))}
    kind = resolve("tool_call_parser", PARSERS, "mistral")
    shape = Outline(kind, frozenset(NAMES), thoughts=THOUGHTS["mistral"], special=special, hide_special=hide)
    text = "[THINK]a[TOOL_CALLS]b[/THINK]c[TOOL_CALLS]now[ARGS]{} d[ARGS]"
    for pieces in ([text], list(text)):
        answer = shape.parser()
        message = assemble([part for piece in pieces for part in answer.push(piece)] + answer.finish())
        assert message.thoughts == ("ab" if hide else "a[TOOL_CALLS]b")
        assert message.content == ("cd" if hide else "cd[ARGS]")
        assert [(call.name, call.arguments) for call in message.calls] == [NOW]


def test_calls_are_numbered_and_named() -> None:
    """Index and id: distinct, in order, and on the arguments too."""
    answer = outline().parser()
    call = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>\n'
    parts = answer.push(call * 3) + answer.finish()
    starts = [part for part in parts if isinstance(part, CallStart)]
    assert [start.index for start in starts] == [0, 1, 2]
    assert [part.index for part in parts if isinstance(part, Arguments)] == [0, 1, 2]
    assert len({start.id for start in starts}) == 3
    assert all(start.id.startswith("call_") for start in starts)


def test_one_call_may_be_enough() -> None:
    """With `several_calls` off the answer is over at the second call, which nobody sees."""
    answer = outline(several_calls=False).parser()
    call = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>\n'
    parts = answer.push(call) + answer.push(call)
    assert answer.over
    assert [(found.name, found.arguments) for found in assemble(parts).calls] == [("f", '{"a": 1}')]


def test_thought_tokens_are_those_that_begin_before_the_end() -> None:
    """Tokens are counted by where they begin, whether they come one by one or all at once."""
    text = "<think>hm hm</think>Yes, yes"
    offsets = [0, 7, 9, 12, 20, 24]
    for pieces in (
        [(offsets, text)],
        [(offsets[i : i + 1], text[a:b]) for i, (a, b) in enumerate(zip(offsets, [*offsets[1:], 28]))],
    ):
        answer = outline().parser()
        for starts, piece in pieces:
            answer.count(starts)
            answer.push(piece)
        assert answer.thought_tokens == 4
    unfinished = outline().parser()
    unfinished.count([0, 7])
    unfinished.push("<think>hm")
    unfinished.finish()
    assert unfinished.thought_tokens == 2


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    ),
    st.sampled_from([repr, json.dumps]),
)
def test_python_literals_become_json(value: object, write: Callable[[object], str]) -> None:
    """Whatever JSON can say arrives as it was meant, written as Python or as JSON."""
    [(_, arguments)] = said(read(parser("pythonic"), f"[f(a={write(value)})]"))
    assert json.loads(arguments) == {"a": value}
