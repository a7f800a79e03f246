"""Llama 4, ToolACE and others: `[weather(city="Oslo", days=2), now()]`, perhaps between tags.

Values are Python literals and become JSON, each when it is complete.
"""

from __future__ import annotations

import ast
import json
import string
import warnings
from contextlib import suppress
from typing import Any

from server.api.dialects.calls import MAX_SHORT_CHARS, ToolParser, is_unicode
from server.api.dialects.reader import Malformed, Reading

START, END = "<|python_start|>", "<|python_end|>"
_WORD = string.ascii_letters + string.digits + "_"
_PAIRS = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}


class PythonicParser(ToolParser):
    markers = (START, END)
    marked = False

    def _parse(self) -> Reading[None]:
        while marker := (yield from self._until(START, END, "[")):
            try:
                if marker == END:
                    self._frame() if self._framed else self._give_back()
                    continue
                if marker == START:
                    yield from self._space()
                    yield from self._literal("[")
                yield from self._list()
            except Malformed:
                self._give_back()

    def _list(self) -> Reading[None]:
        while True:
            yield from self._space()
            name = self._checked((yield from self._while(_WORD + "-", MAX_SHORT_CHARS)))
            yield from self._literal("(")
            yield from self._call(name)
            yield from self._space()
            if (yield from self._peek()) != ",":
                break
            self._take()
        yield from self._literal("]")
        self._drop()

    def _call(self, name: str) -> Reading[None]:
        """The arguments of `name` and the bracket behind them; what has begun is closed as JSON even if malformed."""
        begun = False
        try:
            while True:
                yield from self._space()
                if (yield from self._peek()) == ")":
                    break
                key = yield from self._while(_WORD, MAX_SHORT_CHARS)
                yield from self._space()
                yield from self._literal("=")
                value = yield from self._value()
                if not key or not value:
                    raise Malformed
                if not begun:
                    self._begin(name)
                self._argue(f"{', ' if begun else '{'}{json.dumps(key)}: {as_json(value)}")
                begun = True
                self._drop()
                if (yield from self._peek()) == ",":
                    self._take()
        except Malformed:
            if begun and (yield from self._peek()):
                self._argue("}")
            raise
        self._take()
        if not begun:
            self._begin(name)
        self._argue("}" if begun else "{}")
        self._drop()

    def _value(self) -> Reading[str]:
        """A value's source, up to the comma or bracket that ends it."""
        characters: list[str] = []
        depth, quote, escaped = 0, "", False
        while True:
            character = yield from self._peek()
            if not character:
                raise Malformed
            if not quote and not depth and character in ",)":
                return "".join(characters).strip()
            characters.append(self._take())
            if escaped:
                escaped = False
            elif quote:
                escaped = character == "\\"
                quote = "" if character == quote else quote
            elif character in "'\"":
                quote = character
            else:
                depth += _PAIRS.get(character, 0)


def as_json(source: str) -> str:
    """The JSON of a JSON or Python literal; of anything else, its source as a string."""
    try:
        return _dumps(_literal(source))
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return _dumps(source)


def _literal(source: str) -> Any:
    with suppress(ValueError):
        return json.loads(source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an odd escape would be quoted in the log
        return ast.literal_eval(source)


def _dumps(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return text if is_unicode(text) else json.dumps(value)
