"""What a model is held to when it must call a tool, or must keep to a tool's schema: the seam to structured output."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from server.types import Tag, TaggedJson

NAME = "NAME"
"""Stands for the tool's in `Frame.begin`."""


@dataclass(frozen=True, slots=True)
class Frame:
    """How a dialect writes one call around the arguments' JSON.

    `trigger`, with which `begin` begins, is what no other text of such a model holds.
    """

    begin: str
    end: str
    trigger: str
    separator: str = ""

    def constraint(self, tools: Iterable[tuple[str, str]], *, free: bool, several: bool) -> TaggedJson:
        """Calls of `tools` (name, JSON Schema of the arguments). `free`: text may stand around them or in their place.
        `several`: more than one."""
        return TaggedJson(
            tags=tuple(Tag(self.begin.replace(NAME, name), schema, self.end) for name, schema in tools),
            several=several,
            separator=self.separator,
            trigger=self.trigger if free else "",
        )


def json_frame(before: str, arguments: str, after: str, *, trigger: str, separator: str = "") -> Frame:
    """A call as a JSON object of name and `arguments`, between two texts."""
    return Frame(f'{before}{{"name": "{NAME}", {json.dumps(arguments)}: ', f"}}{after}", trigger, separator)
