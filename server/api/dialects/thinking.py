"""Thoughts between two tags, in front of the answer."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from server.api.dialects.parts import Content, Thought
from server.api.dialects.reader import Malformed, Reader, Reading


@dataclass(frozen=True, slots=True)
class ThoughtTags:
    """How a family marks its thoughts. `implied`: an answer begins with them though no tag says so."""

    open: str
    close: str
    implied: bool = False

    def inside(self, prompt: str, said: str | None) -> bool:
        """Whether what follows `prompt` is a thought from its first character on. `said`: the beginning of the answer
        that the prompt ends with, when it is to be continued."""
        if said is not None:
            return said.rfind(self.open) > said.rfind(self.close)
        end = prompt.rstrip()
        return end.endswith(self.open) or (self.implied and not end.endswith(self.close))


THOUGHTS: dict[str, ThoughtTags] = {
    "qwen3": ThoughtTags("<think>", "</think>"),
    "deepseek_r1": ThoughtTags("<think>", "</think>", implied=True),
    "mistral": ThoughtTags("[THINK]", "[/THINK]"),
}


class ThoughtParser(Reader):
    """Thoughts first, everything behind them content. `thinking` while they go on."""

    def __init__(
        self, tags: ThoughtTags, *, inside: bool, hidden: Collection[str] = (), left: Collection[str] = ()
    ) -> None:
        """`inside`: the text begins as a thought; an opening tag at its very beginning says so too. `left`: those of
        the hidden texts that content keeps, for who reads it next."""
        self._tags = tags
        self._inside = inside
        self._left = frozenset(left)
        self.thought_chars: int | None = None
        """Where the thoughts end, closing tag included; 0 if there were none, None while that is not known."""
        super().__init__(hidden)

    def _parse(self) -> Reading[None]:
        if self._inside or (yield from self._opened()):
            yield from self._thoughts()
        else:
            self.thought_chars = 0
        if self.thought_chars is not None:
            self._kind = Content
            self._hidden = tuple(text for text in self._hidden if text not in self._left)
            self._give_back()
            yield from self._until()

    def _opened(self) -> Reading[bool]:
        try:
            yield from self._space()
            yield from self._literal(self._tags.open)
        except Malformed:
            return False
        self._drop()
        return True

    def _thoughts(self) -> Reading[None]:
        self._kind = Thought
        self._frame()
        while marker := (yield from self._until(self._tags.close, self._tags.open)):
            if marker == self._tags.close:
                self.thought_chars = self.position
                self._frame()
                return
            if self._framed:
                self._frame()  # the prompt had opened them, and so does the model
            else:
                self._give_back()
