"""One answer's text, taken apart: thoughts first, then content and calls of tools."""

from __future__ import annotations

import secrets
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from server.api.dialects.calls import ToolParser
from server.api.dialects.parts import Arguments, CallStart, Content, Part, Thought, merged
from server.api.dialects.thinking import ThoughtParser, ThoughtTags


@dataclass(frozen=True, slots=True)
class Outline:
    """How the answers to one request are to be read; `parser` makes one per choice."""

    tools: type[ToolParser] | None = None
    names: frozenset[str] = frozenset()
    several_calls: bool = True
    thoughts: ThoughtTags | None = None
    inside: bool = False
    """The prompt ends within a thought."""
    show_thoughts: bool = True
    special: Mapping[str, int] = field(default_factory=dict)
    """Control tokens that parsers must see, by text."""
    hide_special: bool = True

    @property
    def shown_ids(self) -> frozenset[int]:
        """Control tokens to be decoded like any other."""
        return frozenset(self.special.values())

    def parser(self) -> AnswerParser:
        return AnswerParser(self)


class AnswerParser:
    """Text in, parts out, as a `Reader`. Calls get their index and id here.

    `over` when the answer has all the calls that the client wants: what the model says after them is nobody's.
    """

    def __init__(self, outline: Outline) -> None:
        hidden = tuple(outline.special) if outline.hide_special else ()
        tags = outline.thoughts
        self._outline = outline
        left = outline.tools.markers if outline.tools is not None else ()
        self._thoughts = None if tags is None else ThoughtParser(tags, inside=outline.inside, hidden=hidden, left=left)
        self._tools = None if outline.tools is None else outline.tools(outline.names, hidden)
        self.calls = 0
        self.over = False
        self._offsets = array("q")
        self._thinking = self._thoughts is not None
        self._thought_tokens = 0

    def push(self, text: str) -> list[Part]:
        """What `text` adds."""
        parts: Sequence[Part] = self._thoughts.push(text) if self._thoughts else [Content(text)]
        found = [found for part in parts for found in self._look_for_calls(part)]
        self._settle_thoughts()
        return self._finished(found)

    def finish(self) -> list[Part]:
        """What was still held, at the end of the text."""
        parts = self._thoughts.finish() if self._thoughts else []
        found = [found for part in parts for found in self._look_for_calls(part)]
        self._settle_thoughts()
        return self._finished(found + (self._tools.finish() if self._tools else []))

    def count(self, offsets: Iterable[int]) -> None:
        """Notes tokens, by where in the text each begins; to be called before their text is pushed."""
        if self._thinking:
            self._offsets.extend(offsets)

    @property
    def thought_tokens(self) -> int:
        """Tokens of the thoughts, tags included; while they go on, all that there are."""
        return len(self._offsets) if self._thinking else self._thought_tokens

    def _settle_thoughts(self) -> None:
        end = self._thoughts.thought_chars if self._thoughts else 0
        if self._thinking and end is not None:
            self._thinking, self._thought_tokens = False, bisect_left(self._offsets, end)

    def _look_for_calls(self, part: Part) -> list[Part]:
        return self._tools.push(part.text) if self._tools and isinstance(part, Content) else [part]

    def _finished(self, parts: Iterable[Part]) -> list[Part]:
        """`parts` with what the client does not want left out."""
        found: list[Part] = []
        for part in parts:
            if isinstance(part, CallStart):
                self.over = self.over or (self.calls > 0 and not self._outline.several_calls)
                if not self.over:
                    part = replace(part, index=self.calls, id=f"call_{secrets.token_hex(12)}")
                    self.calls += 1
            elif isinstance(part, Arguments):
                part = replace(part, index=self.calls - 1)
            if not self.over and (self._outline.show_thoughts or not isinstance(part, Thought)):
                found.append(part)
        return merged(found)


@dataclass(slots=True)
class Call:
    id: str
    name: str
    arguments: str


@dataclass(slots=True)
class Message:
    """A whole answer, put together from its parts; None where there is nothing of a kind."""

    content: str | None
    thoughts: str | None
    calls: list[Call]


def assemble(parts: Iterable[Part]) -> Message:
    """The message that `parts` add up to. Content of "" stays if there is nothing else either."""
    texts: dict[type, list[str]] = {Content: [], Thought: []}
    calls: list[Call] = []
    for part in parts:
        match part:
            case CallStart(name, _, id):
                calls.append(Call(id, name, ""))
            case Arguments(text):
                calls[-1].arguments += text
            case _:
                texts[type(part)].append(part.text)
    content, thoughts = ("".join(texts[kind]) for kind in (Content, Thought))
    only_text = not calls and not thoughts
    return Message(content if content or only_text else None, thoughts or None, calls)
