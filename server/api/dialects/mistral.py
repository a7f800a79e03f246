"""Mistral: `[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`, and since 2025 `[TOOL_CALLS]name[ARGS]{...}`."""

from __future__ import annotations

import hashlib
import re
import string
from collections.abc import Collection

from server.api.dialects.calls import MAX_SHORT_CHARS, ToolParser
from server.api.dialects.constraint import NAME, Frame, json_frame
from server.api.dialects.reader import Malformed, Reading

CALLS, ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
ID_CHARS = 9
_LETTERS = string.ascii_letters + string.digits
_OWN_ID = re.compile(rf"[a-zA-Z0-9]{{{ID_CHARS}}}")


class MistralParser(ToolParser):
    markers = (CALLS, ID, ARGS)

    @staticmethod
    def template_id(call_id: str) -> str:
        """The templates refuse ids that are not nine letters and digits: others become their digest."""
        if _OWN_ID.fullmatch(call_id):
            return call_id
        return hashlib.sha256(call_id.encode("utf-8", "surrogatepass")).hexdigest()[:ID_CHARS]

    @classmethod
    def frame(cls, special: Collection[str]) -> Frame | None:
        if ARGS in special:
            return Frame(f"{CALLS}{NAME}{ARGS}", "", trigger=CALLS)
        return json_frame(f"{CALLS}[", "arguments", "]", trigger=CALLS)

    def _parse(self) -> Reading[None]:
        while (yield from self._until(CALLS)):
            try:
                yield from self._space()
                first = yield from self._peek()
                if first == "[":
                    yield from self._list()
                elif first == "{":
                    self._take()
                    yield from self._object()
                else:
                    yield from self._named()
            except Malformed:
                self._give_back()

    def _list(self) -> Reading[None]:
        self._take()
        while True:
            yield from self._space()
            yield from self._literal("{")
            yield from self._object()
            yield from self._space()
            if (yield from self._peek()) != ",":
                break
            self._take()
        yield from self._literal("]")
        self._drop()

    def _named(self) -> Reading[None]:
        name = self._checked((yield from self._while(_LETTERS + "_-", MAX_SHORT_CHARS)))
        if (yield from self._peek()) == "[":
            tag = yield from self._tag()
            if tag == ID:
                yield from self._while(_LETTERS, MAX_SHORT_CHARS)
                tag = yield from self._tag()
            if tag != ARGS:
                raise Malformed
        yield from self._space()
        if (yield from self._peek()) != "{":
            raise Malformed
        yield from self._arguments(name)

    def _tag(self) -> Reading[str]:
        yield from self._literal("[")
        name = yield from self._while(string.ascii_uppercase + "_", len(CALLS))
        yield from self._literal("]")
        return f"[{name}]"
