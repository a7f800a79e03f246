"""What the parsers of calls share: names, calls as JSON objects, and the table of all parsers."""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Collection
from typing import Any, ClassVar

from server.api.dialects.constraint import Frame
from server.api.dialects.parts import Arguments, CallStart
from server.api.dialects.reader import Malformed, Reader, Reading

PARSERS: dict[str, str] = {
    "hermes": "server.api.dialects.hermes:HermesParser",
    "llama3": "server.api.dialects.llama3:Llama3Parser",
    "mistral": "server.api.dialects.mistral:MistralParser",
    "pythonic": "server.api.dialects.pythonic:PythonicParser",
}
NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
"""What a tool may be called, here and at OpenAI."""
MAX_SHORT_CHARS = 256
"""Longest key, id or parameter name; a longer one is no call, and nobody waits for its end."""
_ARGUMENTS = ("arguments", "parameters")
_ASIDE = ("type", "id")


class ToolParser(Reader):
    """Finds calls of tools in an answer's text.

    A call has begun when its name and the beginning of its arguments have been read; from then on the arguments are
    passed on as they come, as they are. What fails before that is content.
    """

    markers: ClassVar[tuple[str, ...]] = ()
    """Texts that frame calls. Some vocabularies have control tokens for them, which must then not be left out."""
    marked: ClassVar[bool] = True
    """Calls are marked as such. Where they are not, only names of the request's own tools make a call."""

    def __init__(self, names: Collection[str], hidden: Collection[str] = ()) -> None:
        """`names`: the tools that may be called. `hidden`: those of the markers that the client must not see."""
        self._names = frozenset(names)
        super().__init__(hidden)

    @abstractmethod
    def _parse(self) -> Reading[None]: ...

    @classmethod
    def frame(cls, special: Collection[str]) -> Frame | None:
        """How the model is made to write a call; None where it cannot be. `special`: its control tokens."""
        return None

    @staticmethod
    def template_id(call_id: str) -> str:
        """A call's id as this family's chat templates accept it."""
        return call_id

    # -- what calls are made of -----------------------------------------------------------------------------------

    def _begin(self, name: str) -> None:
        self._frame()
        self._parts.append(CallStart(name))

    def _argue(self, text: str) -> None:
        self._parts.append(Arguments(text))

    def _checked(self, name: object) -> str:
        """`name`, if a tool may be called that."""
        if not isinstance(name, str) or not NAME.fullmatch(name) or not (self.marked or name in self._names):
            raise Malformed
        return name

    def _object(self) -> Reading[None]:
        """A call as a JSON object, `{"name": ..., "arguments": {...}}` with the two in any order; its `{` is read."""
        name: str | None = None
        early: str | None = None
        begun = False
        while True:
            yield from self._space()
            key = _value((yield from self._string(MAX_SHORT_CHARS)))
            yield from self._space()
            yield from self._literal(":")
            yield from self._space()
            if key == "name" and name is None:
                name = self._checked(_value((yield from self._string(MAX_SHORT_CHARS))))
            elif key in _ARGUMENTS and early is None and not begun:
                if name is None:
                    early = _as_object((yield from self._json()))
                else:
                    yield from self._arguments(name)
                    begun = True
            elif key in _ASIDE or begun:
                yield from self._json(None if begun else MAX_SHORT_CHARS)
            else:
                raise Malformed
            if name is not None and early is not None and not begun:
                self._begin(name)
                self._argue(early)
                begun = True
            yield from self._space()
            if (yield from self._peek()) == "}":
                break
            yield from self._literal(",")
        if name is None or not (begun or self.marked):
            raise Malformed
        self._take()
        if not begun:
            self._begin(name)
            self._argue("{}")
        self._drop()

    def _arguments(self, name: str) -> Reading[None]:
        """Begins the call of `name` and passes its arguments on as they come."""
        if (yield from self._peek()) != "{":
            whole = _as_object((yield from self._json()))
            self._begin(name)
            self._argue(whole)
            return
        self._begin(name)
        span = _Span()
        while not span.done and (character := (yield from self._peek())):
            self._at += 1
            self._argue(character)
            span.add(character)

    def _json(self, limit: int | None = None) -> Reading[str]:
        """The text of a JSON value, held; of a bad one up to where it must end. Longer than `limit` is malformed."""
        first = yield from self._peek()
        if first == '"':
            return (yield from self._string(limit))
        characters: list[str] = []
        span = _Span()
        nested = first in ("{", "[")
        while (character := (yield from self._peek())) and not span.done:
            if not nested and (character in ",}]" or character.isspace()):
                break
            if len(characters) == limit:
                raise Malformed
            characters.append(self._take())
            if nested:
                span.add(character)
        return "".join(characters)

    def _string(self, limit: int | None = None) -> Reading[str]:
        """The text of a JSON string, quotes included, held. More than `limit` characters are malformed."""
        yield from self._literal('"')
        characters = ['"']
        span = _Span()
        span.add('"')
        while not span.done:
            character = yield from self._peek()
            if not character or len(characters) == limit:
                raise Malformed
            characters.append(self._take())
            span.add(character)
        return "".join(characters)


class _Span:
    """Where a JSON object, list or string ends, one character at a time."""

    __slots__ = ("_depth", "_escaped", "_quoted", "done")

    def __init__(self) -> None:
        self._depth = 0
        self._quoted = self._escaped = False
        self.done = False

    def add(self, character: str) -> None:
        if self._escaped:
            self._escaped = False
        elif self._quoted:
            self._escaped = character == "\\"
            self._quoted = character != '"'
        elif character == '"':
            self._quoted = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
        self.done = not self._quoted and self._depth <= 0


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise Malformed from None


def is_unicode(text: str) -> bool:
    """Whether `text` can be sent: escapes may spell half a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _as_object(text: str) -> str:
    """The arguments in `text`: an object as it is, also out of a string; none at all for null."""
    if text.startswith("{"):
        return text
    found = _value(text)
    if isinstance(found, str) and found.lstrip().startswith("{") and is_unicode(found):
        return found.strip()
    if found is None or found == "":
        return "{}"
    raise Malformed
