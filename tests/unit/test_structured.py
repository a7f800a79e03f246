"""Constrained texts: what was asked for is what comes, or it was refused; and rows without a grammar notice nothing."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import server.demo
from server.errors import InvalidRequest, Overloaded
from server.runner import grammar as grammars
from server.runner.grammar import Grammars, Matchers, Vocabulary, compile_grammar
from server.runner.json_schema import enforceable
from server.runner.refusal import Refused
from server.runner.regexes import literal, translate
from server.runner.sampling import Sampler
from server.text import Tokenizer
from server.types import (
    Choice,
    Constraint,
    FinishReason,
    FreeGrammar,
    Grammar,
    JsonSchema,
    Regex,
    SampleSpec,
    SamplingParams,
    Tag,
    TaggedJson,
)
from tests.unit.drawing import sample
from tests.unit.random_schemas import PATTERNS, PROMPT, Writer, complaint, try_schemas

DEMO = Path(server.demo.__file__).parent / "model"
USABLE = ("byte_level", "metaspace", "sentencepiece", "two_stage_bytes")


@pytest.fixture(scope="session")
def writers(tokenizers: dict[str, Tokenizer]) -> dict[str, Writer]:
    return {"demo": Writer(Tokenizer.load(DEMO))} | {kind: Writer(tokenizers[kind]) for kind in USABLE}


@pytest.fixture(scope="session")
def writer(writers: dict[str, Writer]) -> Writer:
    return writers["demo"]


def reads(writer: Writer, constraint: Constraint) -> Callable[[str], bool]:
    """Whether a text, written in single bytes, is a whole text of the constraint."""
    matcher = writer.compile(constraint).start()
    tokens = writer.tokenizer.vocabulary(writer.tokenizer.vocab_size)
    byte = {data[0]: token for token, data in enumerate(tokens) if len(data) == 1}

    def read(text: str) -> bool:
        fresh = matcher.deep_copy()
        ids = [byte[value] for value in text.encode()]
        return bool(fresh.try_consume_tokens(ids) == len(ids) and fresh.is_accepting())

    return read


# --- JSON schemas ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "seeds"), [("demo", range(30)), ("byte_level", range(30, 46)), ("metaspace", range(46, 60))]
)
def test_every_finished_answer_validates(writers: dict[str, Writer], kind: str, seeds: range) -> None:
    """Random schemas, random logits: whatever ends with `stop` is valid by another implementation of JSON Schema."""
    tally = try_schemas(writers[kind], seeds)
    assert tally.wrong == []
    assert tally.finished >= len(seeds) // 2
    assert tally.stuck == 0


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["demo", *USABLE])
def test_every_finished_answer_of_a_thousand_validates(writers: dict[str, Writer], kind: str) -> None:
    """The same with 1,000 schemas for each kind of tokenizer."""
    tally = try_schemas(writers[kind], range(1_000, 2_000))
    assert tally.wrong == []
    assert tally.finished > 700
    assert tally.stuck == 0 or kind == "two_stage_bytes"  # which cannot write every character


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"not": {}}, "'not'"),
        ({"if": {}, "then": {}}, "'if'"),
        ({"type": "array", "uniqueItems": True}, "'uniqueItems'"),
        ({"type": "array", "contains": {}}, "'contains'"),
        ({"type": "object", "propertyNames": {"pattern": "a"}}, "'propertyNames'"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "'dependentRequired'"),
        ({"type": "object", "unevaluatedProperties": False}, "'unevaluatedProperties'"),
        ({"$dynamicRef": "#x"}, "'$dynamicRef'"),
        ({"minLenght": 3}, "'minLenght'"),
        ({"nullable": True}, "'nullable'"),
        ({"properties": {"a": {"not": {}}}}, "#/properties/a: "),
        ({"$defs": {"unused/x": {"not": {}}}}, "#/$defs/unused~1x: "),
        ({"x-guidance": {"lenient": True}, "not": {}}, "'not'"),
        ({"properties": {"a": {"$id": "x"}}}, "'$id'"),
        ({"type": "array", "items": [{}]}, "prefixItems"),
        ({"$ref": "https://example.com/x"}, "inside this one"),
        ({"$ref": "#/$defs/missing"}, "inside this one"),
        ({"$ref": "#/title", "title": "x"}, "inside this one"),
        ({"type": "string", "format": "iri"}, "'iri'"),
        ({"type": "string", "format": "unknown"}, "'unknown'"),
        ({"type": "string", "pattern": "(?=a)b"}, "#/pattern: "),
        ({"patternProperties": {"(?!a)b": {}}}, "#/patternProperties: "),
        ({"patternProperties": {"^a": {"type": "null"}, "b$": {"type": "integer"}}}, "disjoint"),
        ({"minimum": 2**53 + 1}, "2^53"),
        ({"const": 12345678901234567890}, "2^53"),
        ({"enum": [1e300]}, "2^53"),
        ({"enum": []}, "at least one"),
        ({"const": "\x01"}, "control"),
        ({"exclusiveMinimum": True}, "must be a number"),
        ({"minLength": 1.5}, "whole number"),
        ({"minItems": -1}, "whole number"),
        ({"required": "a"}, "#/required"),
        ({"type": "object", "minProperties": 2}, "#/minProperties"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "'oneOf'"),
        ({"type": "object", "required": ["a"], "additionalProperties": False}, "nsatisfiable"),
        ({"enum": ["a"], "pattern": "^b"}, "nsatisfiable"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "nsatisfiable"),
        ({"type": "text"}, "type"),
        ({"anyOf": []}, "#/anyOf"),
        ({"anyOf": [1]}, "#/anyOf/0"),
        ({"$ref": "#"}, "no text"),
        ([1], "object or a boolean"),
        ({"type": "object", "properties": {f"p{i}": {} for i in range(201)}}, "200 optional"),
        (json.loads('{"items":' * 40 + "{}" + "}" * 40), "32 deep"),
        ({"enum": list(range(25_000))}, "20000 parts"),
        (False, "nsatisfiable"),
    ],
)  # fmt: skip
def test_what_cannot_be_enforced_is_refused(writer: Writer, schema: Any, said: str) -> None:
    """No rule is dropped silently: a schema with one that would be is refused, and the refusal names it."""
    with pytest.raises(Refused) as refused:
        writer.compile(JsonSchema(json.dumps(schema)))
    assert said in str(refused.value)
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("text", ["", "{", "nul", '{"a":' * 5_000 + "1" + "}" * 5_000])
def test_what_is_no_json_is_no_schema(text: str) -> None:
    """Text that is no JSON, or nested beyond what a parser takes, is refused as that."""
    with pytest.raises(Refused, match="valid JSON"):
        enforceable(text)


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        # A name in another spelling would pass for a property without a rule.
        ({"type": "object", "properties": {"a": {"type": "integer"}}}, ['{"a":1}', '{"b":"x"}'], ['{"\\u0061":"x"}']),
        ({"type": "object", "patternProperties": {"^a": {"type": "null"}}}, ['{"ab":null}'], ['{"\\u0061":1}']),
        ({"type": "object"}, ["{}", '{ "a" : 1 }', '{\n    "a": 1\n}'], [" {}", "{} ", '{\n\n"a":1}', '{  "a":1}']),
        ({"minLength": 3}, ["1", '"éé🙂"'], ['"éé"']),
        ({"type": "integer", "minimum": 1.5, "maximum": 3.5}, ["2", "3"], ["1", "4", "2.0"]),
        ({"type": "number", "multipleOf": 0.01}, ["0.07", "1"], ["0.075"]),
        ({"const": {"x": [1, "a/b"]}}, ['{"x":[1,"a/b"]}'], ['{"x":[1]}', '{"x":[1,"a\\/b"]}']),
        ({"type": "string", "format": "date"}, ['"2024-02-29"', '"2000-02-29"'], ['"2023-02-29"', '"1900-02-29"']),
        ({"type": "string", "format": "date"}, ['"0001-01-01"', '"9999-12-31"'], ['"0000-01-01"', '"2023-04-31"']),
        ({"format": "date-time"}, ['"2024-02-29T23:59:59.5+01:00"'], ['"2023-02-29T00:00:00Z"', '"2024-02-29"']),
        ({"type": ["string", "null"], "format": "time"}, ["null", '"23:59:59Z"'], ['"24:00:00Z"', '"23:59:60Z"']),
        ({"type": "string", "format": "hostname"}, ['"a-b.c"'], ['"-a"', '"' + ".".join(["a" * 60] * 5) + '"']),
        ({"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"type": "null"}}}, ["null"], ["1"]),
        ({"$ref": "#/properties/a", "properties": {"a": {"type": "null"}}}, ["null"], ["1"]),
        ({"type": "array", "prefixItems": [{"type": "null"}], "items": False}, ["[]", "[null]"], ["[null,null]"]),
        ({"oneOf": [{"type": "null"}, {"type": "array", "maxItems": 0}]}, ["null", "[]"], ["1"]),
        ({"$schema": "http://json-schema.org/schema#", "prefixItems": [{"type": "null"}]}, ["[null]"], ["[1]"]),
        ({"type": "array", "maxItems": 10**9, "items": {"const": 1}}, ["[1,1]"], ["[2]"]),
        (True, ["null", "[1]"], [""]),
    ],
)  # fmt: skip
def test_schemas_hold_to_the_letter(writer: Writer, schema: Any, right: list[str], wrong: list[str]) -> None:
    """Texts at the edges of what schemas allow, on both sides."""
    read = reads(writer, JsonSchema(json.dumps(schema)))
    assert [text for text in right if not read(text)] == []
    assert [text for text in wrong if read(text)] == []


def test_properties_come_in_the_order_of_the_schema(writer: Writer) -> None:
    """The order is fixed, so that a model may be made to think before it answers."""
    read = reads(writer, JsonSchema('{"type":"object","properties":{"z":{},"a":{}},"required":["a","z"]}'))
    assert read('{"z":1,"a":2}')
    assert not read('{"a":2,"z":1}')


# --- regular expressions ---------------------------------------------------------------------------------------------

SUBJECTS = [
    "", "a", "b", "ab", "aab", "xb", "x,a", "5", "12-ab", "12-ab ", "é", "ébé", "a.", "b1.", "${ab}", "$", "a\n", "\n",
    "-", "]", "^", "a-c", "\\", "A", "dd", "acdd", "a.b", " ", "ä", "{", "abba", "x" * 30,
]  # fmt: skip
AGREED = [
    *PATTERNS, "a", "^a$", "^(a|b$)", "x(a|b$)", "(^a|b)b", "a||b", r"^[\w.-]+$", r"^[^\W\d]+$", r"^[\]\-\\^]$",
    "^[a-]$", "^[-a]$", r"\x61", r"\u0061\.", "^a{1,2}b", "^a{2}", "^(?:a(?:b)?)+$", "^(?P<n>a)b$", "^[^a]$", r"^[\n]$",
    r"\$", "b*?$", "^a??b", "^]$", "^}|a$",
]  # fmt: skip


@pytest.mark.parametrize("pattern", AGREED)
def test_patterns_mean_what_another_engine_says(writer: Writer, pattern: str) -> None:
    """Searched for, as in a schema: the library's verdict on rewritten patterns is that of Python's engine."""
    read = reads(writer, JsonSchema(json.dumps({"type": "string", "pattern": pattern})))
    theirs = re.sub(r"(?<![\\\[])\$", r"\\Z", pattern)  # Python's $ also stands before a last line feed
    expected = {text for text in SUBJECTS if re.search(theirs, text, re.ASCII)}
    assert {text for text in SUBJECTS if read(json.dumps(text, ensure_ascii=False))} == expected


@pytest.mark.parametrize("pattern", ["a|b", "^a$|^b+$", r"\d{2}-\w+", ".", "a?", "[ab]{2,}"])
def test_a_regex_matches_the_whole_text(writer: Writer, pattern: str) -> None:
    """As a constraint of its own the expression matches from end to end; ^ and $ change nothing."""
    read = reads(writer, Regex(pattern))
    assert {text for text in SUBJECTS if read(text)} == {
        text for text in SUBJECTS if re.fullmatch(pattern, text, re.ASCII)
    }


def test_the_dialect_is_ecmas(writer: Writer) -> None:
    """What dialects disagree on silently is read as ECMA-262 does."""
    read = reads(writer, Regex(r"[a&&b]\s.\d[[:x]"))
    assert read("&\ufeffx5[")
    assert read("a\u2003x5:")
    assert not read("a \rx5")  # . is no line end
    assert not read("a xx\u0663")  # \d is ASCII


@pytest.mark.parametrize(
    "pattern",
    [
        "(?=a)", "(?!a)", "(?<=a)", "(?i)a", "(?i:a)", "(?>a)", "(a)\\1", "\\bab", "\\B", "\\k<n>", "\\cA", "\\z",
        "\\Z", "\\A", "\\e", "\\p{Greek}", "\\01", "\\x4", "\\u{110000}", "\\ud800", "a{", "{", "a{,2}", "a{3,2}",
        "*a", "a**",
        "a*+", "(a", "a)", "[a", "[]", "[z-a]", "[\\d-a]", "a{10001}", "(a{101}){100}", "((a{0,100}){0,100}){0,100}",
        "(" * 40 + "a" + ")" * 40, "a\\", "(?", "(?<n", "x^a", "a$b",
    ],
)  # fmt: skip
def test_what_no_dialect_agrees_on_is_refused(pattern: str) -> None:
    """Syntax that would be read otherwise than it was meant, or that costs without bound, is refused."""
    with pytest.raises(Refused, match="regular expression"):
        translate(pattern, whole=True)


def test_a_literal_is_itself(writer: Writer) -> None:
    """Every character can stand in a choice."""
    texts = ("", "a/b", '"q"\\', "é\n", "[a-z]*", "日本🙂", "a b")
    read = reads(writer, Choice(texts[1:]))
    assert [text for text in (*texts, "a", "aaa") if read(text)] == list(texts[1:])
    assert re.fullmatch(literal("a"), "a")


# --- grammars and tags -----------------------------------------------------------------------------------------------


def test_grammars_in_both_notations(writer: Writer) -> None:
    """Lark and GBNF."""
    sums = 'start: term ("+" term)*\nterm: NUMBER | "(" start ")"\nNUMBER: /[0-9]+/\n# temperature=1'
    read = reads(writer, FreeGrammar(sums))
    assert read("1+(23+4)")
    assert not read("1+")
    read = reads(writer, FreeGrammar('root ::= "a" ["\\]x]+ b\nb ::= [0-9] | "temperature="'))
    assert read('a"]1')
    assert read("axtemperature=")
    assert not read("a1")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no start rule"),
        ("start: missing", "missing"),
        ("root ::= missing", "missing"),
        ('start: %json {"x-guidance":{"lenient":true},"not":{}}', "%json"),
        ('%llguidance {"no_forcing": false}\nstart: "a"', "%llguidance"),
        ('start[temperature=0.5]: "a"', "temperature"),
        ("start[max_tokens=3]: /a*/", "max_tokens"),
        ('start[stop=""]: /a*/', "stop"),
        ("start: start", "no text"),
        ('start: ""', "empty text"),
        ("root ::= " + "(" * 3_000 + '"a"' + ")" * 3_000, "deep"),
        ("start: " + "(" * 3_000 + '"a"' + ")" * 3_000, "deep"),
    ],
)
def test_bad_grammars_are_refused(writer: Writer, text: str, said: str) -> None:
    """What cannot be read, or asks for more than matching, is refused with the reason."""
    with pytest.raises(Refused) as refused:
        writer.compile(FreeGrammar(text))
    assert said in str(refused.value)


def _tag(name: str, schema: str) -> Tag:
    return Tag(f'<tool_call>\n{{"name": "{name}", "arguments": ', schema, "}\n</tool_call>")


TAGS = (_tag("f", '{"type":"object","properties":{"n":{"type":"integer"}},"required":["n"]}'), _tag("g", "true"))
F = '<tool_call>\n{"name": "f", "arguments": {"n": 1}}\n</tool_call>'
G = '<tool_call>\n{"name": "g", "arguments": [null]}\n</tool_call>'
BAD = F.replace("1", '"x"')


@pytest.mark.parametrize(
    ("constraint", "right", "wrong"),
    [
        (TaggedJson(TAGS), [F, G], ["", "hello", BAD, F + F, F + "\n" + G]),
        (TaggedJson(TAGS, several=True, separator="\n"), [F, F + "\n" + G], ["", F + G, F + "\n", BAD]),
        (
            TaggedJson(TAGS, several=True, trigger="<tool_call>"),
            ["hi", F, "hi " + F, F + "\n" + G + " bye", "a <tool_cal b"],
            ["<tool_call>", "hi <tool_call> x", BAD, F + BAD],
        ),
        (TaggedJson(TAGS, trigger="<tool_call>"), ["hi", "hi " + F + " bye"], [F + F, "<tool_call>x"]),
    ],
)
def test_tagged_calls(writer: Writer, constraint: TaggedJson, right: list[str], wrong: list[str]) -> None:
    """Calls of tools: one or several, alone or in free text, where the trigger cannot be written without a call."""
    read = reads(writer, constraint)
    assert [text for text in right if not read(text)] == []
    assert [text for text in wrong if read(text)] == []


def test_control_tokens_in_tags_are_these_tokens(writer: Writer) -> None:
    """A control token's name in a tag is the token; the same letters in free text are not."""
    matcher = writer.compile(
        TaggedJson((Tag("<|im_start|>f:", "true", "<|im_start|>"),), trigger="<|im_start|>")
    ).start()
    whole = writer.tokenizer.encode("hello <|im_start|>f:12<|im_start|>", add_special_tokens=False)
    assert whole.count(1) == 2
    assert matcher.deep_copy().try_consume_tokens(whole) == len(whole)
    assert matcher.deep_copy().try_consume_tokens([1, 1]) == 1


# --- in the sampler --------------------------------------------------------------------------------------------------


def params(**more: Any) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 50} | more))


def spec(grammar: Grammar | None, output: list[int], **more: Any) -> SampleSpec:
    history = [*PROMPT, *output]
    return SampleSpec(params(grammar=grammar, **more), len(history), len(PROMPT), history)


def test_every_kind_of_constraint_holds_in_a_batch(writers: dict[str, Writer]) -> None:
    """One batch of all kinds, drawn, for every tokenizer that texts can be constrained for."""
    expected: list[tuple[Constraint, str]] = [
        (Regex(r"[a-c]{3}\d"), r"[a-c]{3}[0-9]"),
        (Choice(("yes", "no", "naïve 日本")), "yes|no|naïve 日本"),
        (FreeGrammar('start: "<" /[a-z]{1,5}/ ">"'), "<[a-z]{1,5}>"),
        (TaggedJson((Tag("[", '{"type":"boolean"}', "]"),), several=True, separator=";"), r"(\[(true|false)\];?)+"),
    ]
    for kind, writer in writers.items():
        compiled = [writer.compile(constraint) for constraint, _ in expected]
        for more in ({}, {"temperature": 0.0}, {"top_p": 0.5}, {"top_k": 3, "repetition_penalty": 1.3}):
            for (_, pattern), written in zip(expected, writer.write(compiled, **more), strict=True):
                if written.finish is FinishReason.STOP:
                    assert re.fullmatch(pattern, written.text), (kind, pattern, written.text)
                # Half a character is no text to a tokenizer whose bytes are not known: it cannot write every choice.
                assert written.finish is not FinishReason.ERROR or (kind, pattern[:3]) == ("two_stage_bytes", "yes")


def test_the_same_seed_gives_the_same_token_alone_and_in_a_batch(writer: Writer) -> None:
    """A constrained row does not notice its neighbours, nor they it."""
    grammar = writer.compile(JsonSchema('{"type":"object"}'))
    rows = [grammar, None, writer.compile(Regex("[a-z ]*")), None]
    logits = torch.stack([writer.logits(7, row) for row in range(len(rows))])
    for more in ({}, {"temperature": 0.0}, {"top_p": 0.9}, {"min_tokens": 3, "stop_token_ids": frozenset({2})}):
        specs = [spec(g, [], seed=row, **more) for row, g in enumerate(rows)]
        together = sample(Sampler(2048), logits, range(4), specs)
        alone = [sample(Sampler(2048), logits[row : row + 1], [row], [specs[row]])[0] for row in range(4)]
        assert together == alone


def test_state_follows_the_history(writer: Writer) -> None:
    """Preempted and come again, rolled back, or under an id used before: masks are those of a fresh start."""
    grammar = writer.compile(JsonSchema('{"type":"object","properties":{"a":{"type":"integer"}},"required":["a"]}'))
    text = writer.tokenizer.encode('{"a": 12, "b', add_special_tokens=False)
    fresh = {n: Matchers(2048).barred([1], [spec(grammar, text[:n])])[0] for n in range(len(text) + 1)}
    matchers = Matchers(2048)
    for step in (0, 1, 2, 5, 5, 3, len(text), 0, 4):
        assert (matchers.barred([1], [spec(grammar, text[:step])])[0] == fresh[step]).all()
    other = writer.compile(Regex("x+"))
    assert (matchers.barred([1], [spec(other, [])])[0] == Matchers(2048).barred([1], [spec(other, [])])[0]).all()
    matchers.forget([1])
    assert (matchers.barred([1], [spec(grammar, text[:4])])[0] == fresh[4]).all()


def test_the_end_may_come_where_the_text_may_end_and_only_there(writer: Writer) -> None:
    """The request's own stop tokens are allowed exactly where the grammar accepts; without any nothing is."""
    grammar = writer.compile(Regex("a+"))
    a = writer.tokenizer.encode("a", add_special_tokens=False)
    for output, stops, allowed in (
        ([], {0, 2}, set()),
        (a, {0, 2}, {0, 2}),
        (a, {2}, {2}),
        (a, set(), set()),
    ):
        barred, only_end = Matchers(2048).barred([1], [spec(grammar, output, stop_token_ids=frozenset(stops))])
        assert {0, 1, 2} - set(barred[0].nonzero()[0].tolist()) == allowed
        assert only_end == [False]


@pytest.mark.parametrize("more", [{}, {"stop_token_ids": frozenset()}, {"min_tokens": 40}])
def test_a_complete_text_ends_by_itself(writer: Writer, more: dict[str, Any]) -> None:
    """When nothing can follow the request stops: with an end token, without any (ignore_eos), and before min_tokens."""
    for constraint, pattern in ((Regex("ab?c"), "ab?c"), (JsonSchema('{"type":"null"}'), "null")):
        [written] = writer.write([writer.compile(constraint)], **more)
        assert written.finish is FinishReason.STOP
        assert re.fullmatch(pattern, written.text)


def test_min_tokens_keeps_a_text_going_that_can_go_on(writer: Writer) -> None:
    """The end is barred until then, as without a grammar."""
    [written] = writer.write([writer.compile(Regex("[a-z ]*"))], min_tokens=30)
    assert written.finish is FinishReason.STOP
    assert len(written.tokens) >= 30


def test_a_text_that_is_cut_off_ends_with_length(writer: Writer) -> None:
    """At max_tokens it is `length`, as anywhere; a text complete with its last token is `stop`."""
    [cut] = writer.write([writer.compile(Regex("[a-z]{200}"))], max_tokens=5)
    assert (cut.finish, len(cut.tokens)) == (FinishReason.LENGTH, 5)
    one = writer.tokenizer.encode("a", add_special_tokens=False)
    [whole] = writer.write([writer.compile(Choice(("a",)))], max_tokens=1)
    assert (whole.finish, whole.tokens) == (FinishReason.STOP, one)


def test_what_the_model_rules_out_can_be_forced(writer: Writer) -> None:
    """Where the grammar leaves only tokens with logits of -inf or NaN, or biased away, one of them is taken."""
    grammar = writer.compile(Choice(("ab",)))
    [b] = writer.tokenizer.encode("b", add_special_tokens=False)
    a = writer.tokenizer.encode("a", add_special_tokens=False)
    for value in (-torch.inf, torch.nan):
        for more in (
            {},
            {"temperature": 0.0},
            {"logit_bias": {b: -100.0}, "repetition_penalty": 100.0},
            {"top_p": 0.1},
        ):
            logits = torch.full((1, 2048), value)
            logits[0, 7] = 3.0
            assert sample(Sampler(2048), logits, [1], [spec(grammar, a, **more)])[0][0] == b


def test_a_grammar_that_gets_stuck_ends_its_request_alone(writer: Writer) -> None:
    """One that explodes while it runs is an error of that request; the others in the batch go on."""
    exploding = "start: /((a{0,100}){0,100}){0,100}/"
    rows = [writer.compile(FreeGrammar(exploding)), writer.compile(Regex("[ab]{3}"))]
    stuck, fine = writer.write(rows, stop_token_ids=frozenset(), max_tokens=400)
    assert stuck.finish is FinishReason.ERROR
    assert set(stuck.text) == {"a"}
    assert fine.finish is FinishReason.STOP


def test_where_nothing_can_follow_is_no_end(writers: dict[str, Writer]) -> None:
    """A text that this model's tokens cannot complete ends with an error, not as if it were complete."""
    writer = writers["two_stage_bytes"]
    [written] = writer.write([writer.compile(Choice(("no 日本",)))])
    assert written.finish is FinishReason.ERROR


def test_a_history_that_does_not_follow_the_grammar_is_an_error(writer: Writer) -> None:
    """It cannot happen; if it does, the request ends rather than the daemon."""
    matchers = Matchers(2048)
    specs = [spec(writer.compile(Regex("a+")), [5])]
    matchers.barred([1], specs)
    assert matchers.advance([1], specs, [9]) == {0: (FinishReason.ERROR, False)}


# --- vocabularies ----------------------------------------------------------------------------------------------------


def test_which_tokenizers_texts_can_be_constrained_for(tokenizers: dict[str, Tokenizer]) -> None:
    """Those whose texts are their tokens' texts in a row; not one whose words are joined by spaces."""
    assert {kind for kind, tokenizer in tokenizers.items() if tokenizer.writes_pieces()} >= set(USABLE)
    assert not tokenizers["word_level"].writes_pieces()


@pytest.mark.parametrize("kind", USABLE)
def test_a_vocabulary_writes_what_the_detokenizer_reads(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    """Texts of tokens side by side are the text; ids beyond the vocabulary and parts of unknown bytes are nothing."""
    tokenizer = tokenizers[kind]
    texts = tokenizer.vocabulary(1000)
    assert len(texts) == 1000
    assert set(texts[tokenizer.vocab_size :]) == {b""}
    ids = tokenizer.encode("The quick fox, she said: 3.50!", add_special_tokens=False)
    assert b"".join(texts[id] for id in ids).decode().strip() == tokenizer.decode(ids).strip()
    assert all("\ufffd" not in text.decode("utf-8", "ignore") for text in texts)


# --- compiling -------------------------------------------------------------------------------------------------------


async def test_compiled_grammars_are_kept_per_tenant(writer: Writer) -> None:
    """The same constraint of the same tenant is compiled once; another tenant's is its own."""
    compiler = Grammars(writer.vocabulary)
    first = await compiler.compile(Regex("a+"), "x", "regex")
    assert await compiler.compile(Regex("a+"), "x", "regex") is first
    assert await compiler.compile(Regex("a+"), "y", "regex") is not first
    both = await asyncio.gather(*(compiler.compile(Regex("b+"), "x", "regex") for _ in range(2)))
    assert both[0] is both[1]
    compiler.close()


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Constraint]:
    """Every constraint that was really compiled, in order."""
    seen: list[Constraint] = []

    def compiling(vocabulary: Vocabulary, constraint: Constraint) -> Grammar:
        seen.append(constraint)
        return compile_grammar(vocabulary, constraint)

    monkeypatch.setattr(grammars, "compile_grammar", compiling)
    return seen


async def test_a_refusal_names_the_field_and_is_not_kept(writer: Writer, compiled: list[Constraint]) -> None:
    """InvalidRequest with the request's field; compiled again the next time."""
    compiler = Grammars(writer.vocabulary)
    for param in ("structured_outputs.regex", "guided_regex"):
        with pytest.raises(InvalidRequest, match=param) as refused:
            await compiler.compile(Regex("(?=a)"), "", param)
        assert refused.value.param == param
    assert len(compiled) == 2
    compiler.close()


async def test_the_cache_is_bounded(
    writer: Writer, compiled: list[Constraint], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By number and by bytes of sources: what was used longest ago goes."""
    monkeypatch.setattr(grammars, "MAX_CACHED", 3)
    compiler = Grammars(writer.vocabulary)

    async def ask(*texts: str) -> list[str]:
        """Which of these had to be compiled."""
        compiled.clear()
        for text in texts:
            await compiler.compile(Regex(text), "", "r")
        return [constraint.text for constraint in compiled if isinstance(constraint, Regex)]

    assert await ask("a", "b", "a", "c", "a") == ["a", "b", "c"]
    assert await ask("d", "a", "c", "d") == ["d"]
    assert await ask("b", "c", "d") == ["b"], "a had been used longest ago"
    monkeypatch.setattr(grammars, "MAX_CACHED_BYTES", 220)
    assert await ask("e" * 200, "d", "c") == ["e" * 200, "d", "c"]
    compiler.close()


async def test_only_so_many_wait_to_be_compiled(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond that it is 429, and who leaves takes nothing from the others that wait for the same."""
    hold = threading.Event()

    def slow(vocabulary: Any, constraint: Constraint) -> Any:
        hold.wait(30)
        return compile_grammar(vocabulary, constraint)

    monkeypatch.setattr(grammars, "compile_grammar", slow)
    monkeypatch.setattr(grammars, "MAX_QUEUED_COMPILES", 2)
    compiler = Grammars(writer.vocabulary)
    leaving, staying = (asyncio.ensure_future(compiler.compile(Regex("a"), "", "r")) for _ in range(2))
    other = asyncio.ensure_future(compiler.compile(Regex("(?=b)"), "", "r"))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded) as full:
        await compiler.compile(Regex("c"), "", "r")
    assert full.value.code == "compile_queue_full"
    leaving.cancel()
    await asyncio.sleep(0)
    hold.set()
    assert (await staying).start().is_accepting() is False
    with pytest.raises(InvalidRequest):
        await other
    assert (await compiler.compile(Regex("c"), "", "r")) is not None
    compiler.close()


@pytest.mark.parametrize(
    "constraint",
    [
        Regex("(a|b)*a(a|b){1000}"),
        Regex("(((.*a){10}.*b){10}.*c){10}"),
        Regex(r"[\s\S]*" + "|".join(f"(.*{i}.*)" for i in range(200))),
        Choice(tuple(f"choice {i}" for i in range(4096))),
        JsonSchema(json.dumps({"allOf": [{"anyOf": [{"required": [f"{i}{j}"]} for j in range(4)]} for i in range(8)]})),
        JsonSchema(json.dumps({"type": "object", "properties": {f"p{i}": {} for i in range(200)}})),
        JsonSchema(json.dumps({"enum": [f"value {i}" for i in range(4000)]})),
        FreeGrammar("start: a0\n" + "".join(f"a{i}: a{i + 1} a{i + 1}\n" for i in range(40)) + 'a40: "x"\n'),
        FreeGrammar("start: A0\n" + "".join(f"A{i}: A{i + 1} A{i + 1}\n" for i in range(30)) + 'A30: "x"\n'),
        FreeGrammar("start: A\nA: ~/(?s:.*)(ab|c.*d){50}(?s:.*)/ & ~/x.*y.{100}/\n"),
    ],
    ids=lambda constraint: str(constraint)[:40],
)  # fmt: skip
def test_what_explodes_is_refused_or_ends(writer: Writer, constraint: Constraint) -> None:
    """Hostile constraints compile, are refused, or end their request: never a crash, never without end."""
    try:
        grammar = writer.compile(constraint)
    except Refused:
        return
    [written] = writer.write([grammar], max_tokens=40)
    assert written.finish in (FinishReason.STOP, FinishReason.LENGTH, FinishReason.ERROR)


def test_the_check_would_notice(writer: Writer) -> None:
    """The other implementation does complain: of a type, of a format, and of either of two equal keys."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}, "d": {"format": "date"}}}
    assert complaint(schema, '{"a":1}') is None
    assert complaint(schema, '{"a":"x","a":1}')
    assert complaint(schema, '{"a":1,"a":"x"}')
    assert complaint(schema, '{"d":"2023-02-29"}')
    assert complaint(schema, "[")
