"""The base of every parser: it reads one character at a time, so where an answer is cut into deltas cannot matter.

A parser is a generator that asks for characters and waits while there are none. What it has read and cannot judge yet
is held; in the end it is dropped as framing, or given back as text.
"""

from __future__ import annotations

from collections.abc import Collection, Generator
from typing import TypeVar

from server.api.dialects.parts import Content, Part, Thought, merged

T = TypeVar("T")
Reading = Generator[None, None, T]
"""Reads on until it has a T; yields while it waits for text."""


class Malformed(Exception):
    """The text is not what it seemed to be. The character at fault has not been read."""


class Reader:
    """Text in, parts out. One consumer; `push` any number of times, then `finish` once.

    Whitespace between a text and framing (a tag, a call) belongs to the framing: it is held until it is known what
    follows. Linear time: nothing is read twice.
    """

    def __init__(self, hidden: Collection[str] = ()) -> None:
        """`hidden`: texts of control tokens, which the parser sees and the client does not."""
        self._hidden = tuple(hidden)
        self._kind: type[Content | Thought] = Content
        self._parts: list[Part] = []
        self._held: list[str] = []
        self._gap = ""
        self._framed = False  # nothing but framing since the last tag or call
        self._text, self._at, self._before = "", 0, 0
        self._ended = False
        self._steps = self._parse()
        next(self._steps, None)

    def push(self, text: str) -> list[Part]:
        """What `text` adds."""
        self._before += self._at
        self._text, self._at = text, 0
        next(self._steps, None)
        return self._new()

    def finish(self) -> list[Part]:
        """What was still held, at the end of the text."""
        self._ended = True
        next(self._steps, None)
        self._give_back()
        if self._gap and not self._framed:
            self._parts.append(self._kind(self._gap))
        self._gap = ""
        return self._new()

    @property
    def position(self) -> int:
        """Characters read so far."""
        return self._before + self._at

    def _new(self) -> list[Part]:
        parts, self._parts = merged(self._parts), []
        return parts

    def _parse(self) -> Reading[None]:
        """Reads the whole text."""
        raise NotImplementedError

    # -- reading --------------------------------------------------------------------------------------------------

    def _peek(self) -> Reading[str]:
        """The next character, not read yet; "" at the end."""
        while self._at == len(self._text):
            if self._ended:
                return ""
            yield
        return self._text[self._at]

    def _take(self) -> str:
        """Reads and holds the character that was peeked at."""
        character = self._text[self._at]
        self._at += 1
        self._held.append(character)
        return character

    def _literal(self, text: str) -> Reading[None]:
        for character in text:
            if (yield from self._peek()) != character:
                raise Malformed
            self._take()

    def _space(self) -> Reading[None]:
        while (yield from self._peek()).isspace():
            self._take()

    def _while(self, allowed: Collection[str], limit: int) -> Reading[str]:
        """The longest run of `allowed` characters, perhaps none; more than `limit` are malformed."""
        found = ""
        while (character := (yield from self._peek())) and character in allowed:
            if len(found) == limit:
                raise Malformed
            found += self._take()
        return found

    def _until(self, *markers: str) -> Reading[str]:
        """Says everything up to the first of `markers`, and holds that one; "" at the end of the text."""
        known = (*markers, *self._hidden)
        firsts = {marker[0] for marker in known}
        maybe = ""
        while character := (yield from self._peek()):
            if not maybe and character not in firsts:
                self._say_run(firsts)
                continue
            self._at += 1
            maybe += character
            while maybe and not any(marker.startswith(maybe) for marker in known):
                self._say(maybe[0])
                maybe = maybe[1:]
            if maybe in markers:
                self._held.append(maybe)
                return maybe
            if maybe in self._hidden:
                maybe = ""
        self._say(maybe)
        return ""

    def _say_run(self, firsts: Collection[str]) -> None:
        """Says what there is up to a character that may begin a marker."""
        start = self._at
        while self._at < len(self._text) and self._text[self._at] not in firsts:
            self._at += 1
        self._say(self._text[start : self._at])

    # -- saying ---------------------------------------------------------------------------------------------------

    def _say(self, text: str) -> None:
        text = self._gap + text
        body = text.rstrip()
        self._gap = text[len(body) :]
        if not body:
            return
        self._parts.append(self._kind(body.lstrip() if self._framed else body))
        self._framed = False

    def _frame(self) -> None:
        """What is held was framing, and so is the whitespace around it."""
        self._held.clear()
        self._gap = ""
        self._framed = True

    def _drop(self) -> None:
        self._held.clear()

    def _give_back(self) -> None:
        """What is held was text after all."""
        text = "".join(self._held)
        self._held.clear()
        for marker in self._hidden:
            text = text.replace(marker, "")
        self._say(text)
