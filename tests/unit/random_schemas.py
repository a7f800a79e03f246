"""Random JSON schemas, and a sampler that writes texts under them from random logits: no model, real tokenizers."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any

import jsonschema
import torch

from server.runner.grammar import Vocabulary, compile_grammar
from server.runner.refusal import Refused
from server.runner.sampling import Sampler
from server.text import Detokenizer, Tokenizer
from server.types import Constraint, FinishReason, Grammar, JsonSchema, SampleSpec, SamplingParams
from tests.unit.drawing import sample

Schema = dict[str, Any]
PROMPT = [3, 5, 4]
NAMES = ("a", "b", "id", "a/b", "é", 'q"', "~x", "n\n", "$ref", "ab")
PATTERNS = (
    "^[a-c]{1,4}$", "x", "^a|b$", "(^|,)a", r"^\d{2}-\w+$", r"^[^\s\d]+\.$", "^.{2,3}$", r"^(?:é|[\u0041-F])+?$",
    r"^\$\{[a-z]*\}$", "^(ab?c|d{2,})*$", r"^\S\D\W$", "[$]$",
)  # fmt: skip
FORMATS = ("date", "time", "date-time", "ipv4", "ipv6", "uuid", "email", "hostname", "duration", "uri")
CONSTANTS: tuple[Any, ...] = (
    0, 1, -7, 2.5, 0.1, -0.001, 2**53, True, False, None, "", "a", "a b", 'q"\\', "é\n", "日本", [], [1, "x"], {},
    {"k": [None]}, {"a": 1},
)  # fmt: skip


class SchemaMaker:
    """One random schema per seed. Every keyword that can be enforced comes up, alone and beside others."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def schema(self) -> Schema:
        rng = self._rng
        found = self._any(rng.choice((1, 2, 2, 3)))
        while not found.keys() - {"title"}:
            found = self._any(2)
        found["$defs"] = {"leaf": self._any(0), "node": self._node()}
        return found

    def _node(self) -> Schema:
        return {
            "type": "object",
            "properties": {"value": self._any(0), "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}},
            "required": ["next"],
            "additionalProperties": False,
        }

    def _any(self, depth: int) -> Schema:
        makers: list[Callable[[int], Schema]] = [
            self._integer, self._number, self._string, self._plain, self._constant, self._untyped,
        ]  # fmt: skip
        if depth > 0:
            makers += [self._object, self._object, self._object, self._array, self._array, self._choice, self._both]
            makers += [self._reference]
        found = self._rng.choice(makers)(depth)
        if self._rng.random() < 0.1:
            found["title"] = "not a rule"
        return found

    def _maybe(self, chance: float = 0.5) -> bool:
        return self._rng.random() < chance

    def _bounds(self, low: float, high: float, *, whole: bool) -> Schema:
        rng = self._rng
        first, second = sorted(rng.randint(int(low), int(high)) for _ in range(2))
        shift = 0 if whole else rng.choice((0, 0.5, 0.25, 0.001))
        found: Schema = {}
        if self._maybe():
            found[rng.choice(("minimum", "exclusiveMinimum"))] = first + shift
        if self._maybe():
            found[rng.choice(("maximum", "exclusiveMaximum"))] = second + 2 + shift
        return found

    def _integer(self, depth: int) -> Schema:
        found = {"type": "integer", **self._bounds(-200, 3000, whole=self._maybe(0.8))}
        return found | ({"multipleOf": self._rng.choice((1, 2, 3, 5, 7))} if self._maybe(0.2) else {})

    def _number(self, depth: int) -> Schema:
        found = {"type": "number", **self._bounds(-20, 30, whole=False)}
        return found | ({"multipleOf": self._rng.choice((1, 0.5, 0.01, 3))} if self._maybe(0.2) else {})

    def _string(self, depth: int) -> Schema:
        rng = self._rng
        kind = rng.random()
        if kind < 0.35:
            return {"type": "string", "pattern": rng.choice(PATTERNS)} | ({"maxLength": 40} if self._maybe(0.3) else {})
        if kind < 0.6:
            return {"type": rng.choice(("string", ["string", "null"])), "format": rng.choice(FORMATS)}
        least = rng.choice((0, 0, 1, 3))
        return {"type": "string", "minLength": least, "maxLength": least + rng.choice((0, 1, 5, 60))}

    def _plain(self, depth: int) -> Schema:
        return {"type": self._rng.choice(("boolean", "null", ["boolean", "null"], ["integer", "boolean"]))}

    def _constant(self, depth: int) -> Schema:
        rng = self._rng
        if self._maybe():
            return {"const": rng.choice(CONSTANTS)}
        return {"enum": rng.sample(CONSTANTS, rng.randint(1, 5))}

    def _untyped(self, depth: int) -> Schema:
        return {"minLength": 2, "maximum": 9, "maxItems": 2, "enum": ["x", "xx", 8, 10, [1], [1, 2, 3]]}

    def _array(self, depth: int) -> Schema:
        rng = self._rng
        found: Schema = {"type": "array"}
        if self._maybe(0.3):
            found["prefixItems"] = [self._any(depth - 1) for _ in range(rng.randint(1, 3))]
        if "prefixItems" not in found or self._maybe():
            found["items"] = self._any(depth - 1) if self._maybe(0.8) or "prefixItems" not in found else False
        least = rng.choice((0, 0, 1, 2))
        if self._maybe():
            found["minItems"] = least
        found["maxItems"] = least + rng.choice((0, 1, 2))
        return found | ({"uniqueItems": False} if self._maybe(0.1) else {})

    def _object(self, depth: int) -> Schema:
        rng = self._rng
        names = rng.sample(NAMES, rng.randint(0, 4))
        found: Schema = {"type": "object", "properties": {name: self._any(depth - 1) for name in names}}
        found["required"] = [name for name in names if self._maybe(0.6)]
        if self._maybe(0.1):
            found["required"].append("unnamed")
        kind = rng.random()
        if kind < 0.6:
            found["additionalProperties"] = "unnamed" in found["required"]
        elif kind < 0.8:
            found["additionalProperties"] = self._any(0)
        if self._maybe(0.15):
            found["patternProperties"] = {rng.choice(("^a", "^x-", "^[a-f]")): self._any(0)}
        if self._maybe(0.1):
            found["minProperties"] = len(found["required"]) + 1
        if self._maybe(0.1):
            found["maxProperties"] = len(found["required"]) + rng.choice((0, 1))
        items = list(found.items())
        rng.shuffle(items)  # the order of keywords must not matter
        return dict(items)

    def _choice(self, depth: int) -> Schema:
        rng = self._rng
        if self._maybe(0.7):
            return {"anyOf": [self._any(depth - 1) for _ in range(rng.randint(1, 3))]}
        tags = ("cat", "dog")
        options = [self._object(depth - 1) for _ in tags]
        for option, tag in zip(options, tags, strict=True):
            option["properties"] = {"kind": {"const": tag}} | option["properties"]
            option["required"] = ["kind", *option["required"]]
        return {"oneOf": options}

    def _both(self, depth: int) -> Schema:
        first, second = self._any(depth - 1), self._any(depth - 1)
        return {"allOf": [first, second]} if self._maybe() else first | {"allOf": [second]}

    def _reference(self, depth: int) -> Schema:
        return {"$ref": self._rng.choice(("#/$defs/leaf", "#/$defs/node"))}


# --- writing ---------------------------------------------------------------------------------------------------------


def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    return Vocabulary(tokenizer.vocabulary(tokenizer.vocab_size), tokenizer.special_tokens)


@dataclass
class Written:
    tokens: list[int]
    finish: FinishReason
    text: str


class Writer:
    """Draws tokens from random logits, in a batch of all texts at once, as the runner and the scheduler would."""

    def __init__(self, tokenizer: Tokenizer, *, max_tokens: int = 120) -> None:
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary(tokenizer)
        self.stops = frozenset(tokenizer.eos_token_ids or {0})
        self._max_tokens = max_tokens
        # Random texts would seldom end: what closes something is likelier.
        closing = [any(end in data for end in b'"}]') for data in tokenizer.vocabulary(tokenizer.vocab_size)]
        self._bias = torch.tensor(closing) * 3.0
        self._bias[list(self.stops)] += 5.0

    def compile(self, constraint: Constraint) -> Grammar:
        return compile_grammar(self.vocabulary, constraint)

    def logits(self, seed: int, position: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed * 100_003 + position)
        return torch.randn(self.tokenizer.vocab_size, generator=generator) * 2 + self._bias

    def write(self, grammars: Sequence[Grammar], **more: Any) -> list[Written]:
        """One text under each grammar. `more`: sampling parameters of all."""
        params = {"max_tokens": self._max_tokens, "stop_token_ids": self.stops} | more
        sampler = Sampler(self.tokenizer.vocab_size)
        histories = [list(PROMPT) for _ in grammars]
        finishes: dict[int, FinishReason] = {}
        while live := [row for row in range(len(grammars)) if row not in finishes]:
            specs = [
                SampleSpec(
                    SamplingParams(**params, seed=row, grammar=grammars[row]),
                    len(histories[row]),
                    len(PROMPT),
                    histories[row],
                )
                for row in live
            ]
            logits = torch.stack([self.logits(row, spec.position) for row, spec in zip(live, specs, strict=True)])
            tokens = [token for token, _ in sample(sampler, logits, live, specs)]
            ends = sampler.advance(live, specs, tokens)
            for index, (row, token) in enumerate(zip(live, tokens, strict=True)):
                finish, counts = ends.get(index, (None, True))
                if counts:
                    histories[row].append(token)
                if finish is None and token in params["stop_token_ids"]:
                    finish = FinishReason.STOP
                if finish is None and len(histories[row]) - len(PROMPT) >= params["max_tokens"]:
                    finish = FinishReason.LENGTH
                if finish is not None:
                    finishes[row] = finish
        return [self._written(histories[row], finishes[row]) for row in range(len(grammars))]

    def _written(self, history: list[int], finish: FinishReason) -> Written:
        tokens = history[len(PROMPT) :]
        shown = tokens[:-1] if tokens and tokens[-1] in self.stops else tokens
        detokenizer = Detokenizer(self.tokenizer, PROMPT)
        return Written(tokens, finish, detokenizer.push(shown) + detokenizer.finish())


# --- checking --------------------------------------------------------------------------------------------------------

_FORMAT_CHECKER = jsonschema.FormatChecker()


def _matches(validator: Any, pattern: str, value: Any, schema: Any) -> Any:
    """ECMA's classes are ASCII, unlike Python's."""
    if isinstance(value, str) and not re.search(pattern, value, re.ASCII):
        yield jsonschema.ValidationError(f"{value!r} does not match {pattern!r}")


_Validator = jsonschema.validators.extend(jsonschema.Draft202012Validator, {"pattern": _matches})


@_FORMAT_CHECKER.checks("date", raises=ValueError)
def _is_date(value: object) -> bool:
    return not isinstance(value, str) or bool(date.fromisoformat(value))


@_FORMAT_CHECKER.checks("date-time", raises=ValueError)
def _is_date_time(value: object) -> bool:
    return not isinstance(value, str) or ("T" in value and bool(datetime.fromisoformat(value).isoformat()))


@_FORMAT_CHECKER.checks("time", raises=ValueError)
def _is_time(value: object) -> bool:
    return not isinstance(value, str) or bool(time.fromisoformat(value).isoformat())


def complaint(schema: Schema, text: str) -> str | None:
    """Why `text` is no instance of `schema`, by another implementation than ours; None if it is one.

    Numbers are decimals on both sides: as floats 0.07 would be no multiple of 0.01. Where a key comes twice it must not
    matter which one a reader takes.
    """
    rules = json.loads(json.dumps(schema), parse_float=Decimal)
    validator = _Validator(rules, format_checker=_FORMAT_CHECKER)
    for pairs_to_object in (dict, lambda pairs: dict(reversed(pairs))):
        try:
            value = json.loads(text, parse_float=Decimal, object_pairs_hook=pairs_to_object)
        except ValueError as error:
            return f"no JSON: {error}"
        for error in validator.iter_errors(value):
            return f"{error.json_path}: {error.message}"
    return None


@dataclass
class Tally:
    """What became of many schemas: by outcome, and every answer that was wrong."""

    refused: int = 0
    finished: int = 0
    unfinished: int = 0
    stuck: int = 0
    wrong: list[tuple[int, Schema, str, str]] = field(default_factory=list)


def try_schemas(writer: Writer, seeds: range) -> Tally:
    """One random text under each random schema of `seeds`."""
    tally = Tally()
    schemas: list[tuple[int, Schema, Grammar]] = []
    for seed in seeds:
        schema = SchemaMaker(seed).schema()
        try:
            schemas.append((seed, schema, writer.compile(JsonSchema(json.dumps(schema)))))
        except Refused:
            tally.refused += 1
    for (seed, schema, _), written in zip(schemas, writer.write([s[2] for s in schemas]), strict=True):
        if written.finish is FinishReason.STOP:
            tally.finished += 1
            why = complaint(schema, written.text)
            if why is not None:
                tally.wrong.append((seed, schema, written.text, why))
        elif written.finish is FinishReason.LENGTH:
            tally.unfinished += 1
        else:
            tally.stuck += 1
    return tally
