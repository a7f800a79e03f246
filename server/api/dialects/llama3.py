"""Llama 3.1 to 3.3: `{"name": ..., "parameters": {...}}`, perhaps behind `<|python_tag|>`; `;` between calls."""

from __future__ import annotations

from collections.abc import Collection

from server.api.dialects.calls import ToolParser
from server.api.dialects.constraint import Frame, json_frame
from server.api.dialects.reader import Malformed, Reading

TAG = "<|python_tag|>"


class Llama3Parser(ToolParser):
    markers = (TAG,)
    marked = False

    @classmethod
    def frame(cls, special: Collection[str]) -> Frame | None:
        return json_frame("", "parameters", "", trigger='{"name": "', separator="; ")

    def _parse(self) -> Reading[None]:
        while marker := (yield from self._until(TAG, "{")):
            try:
                if marker == TAG:
                    yield from self._space()
                    yield from self._literal("{")
                yield from self._object()
                yield from self._more()
            except Malformed:
                self._give_back()

    def _more(self) -> Reading[None]:
        """The calls that follow behind a separator."""
        while True:
            yield from self._space()
            if (yield from self._peek()) not in (";", ","):
                return self._give_back()
            self._take()
            yield from self._space()
            yield from self._literal("{")
            yield from self._object()
