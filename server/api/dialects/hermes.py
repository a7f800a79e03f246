"""Hermes, Qwen2.5, Qwen3: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number of them."""

from __future__ import annotations

from collections.abc import Collection

from server.api.dialects.calls import ToolParser
from server.api.dialects.constraint import Frame, json_frame
from server.api.dialects.reader import Malformed, Reading

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class HermesParser(ToolParser):
    markers = (OPEN, CLOSE)

    @classmethod
    def frame(cls, special: Collection[str]) -> Frame | None:
        return json_frame(f"{OPEN}\n", "arguments", f"\n{CLOSE}", trigger=OPEN, separator="\n")

    def _parse(self) -> Reading[None]:
        while marker := (yield from self._until(OPEN, CLOSE)):
            if marker == CLOSE:
                if self._framed:
                    self._frame()
                else:
                    self._give_back()
                continue
            try:
                yield from self._space()
                yield from self._literal("{")
                yield from self._object()
            except Malformed:
                self._give_back()
