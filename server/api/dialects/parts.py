"""What a piece of an answer is: content, thought, the beginning of a call, a piece of its arguments."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import groupby


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class Thought:
    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call of the tool `name` begins: the answer's `index`-th, from 0. Its arguments follow."""

    name: str
    index: int = 0
    id: str = ""


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of the JSON text of the arguments of the call that began last."""

    text: str
    index: int = 0


Part = Content | Thought | CallStart | Arguments


def merged(parts: Iterable[Part]) -> list[Part]:
    """`parts` with neighbours of one kind joined and empty ones left out."""
    found: list[Part] = []
    for _, group in groupby(parts, type):
        first, *others = group
        if isinstance(first, CallStart):
            found += [first, *others]
            continue
        text = first.text + "".join(part.text for part in others if not isinstance(part, CallStart))
        if text:
            found.append(replace(first, text=text))
    return found
