"""Prompts of a wanted length in tokens, seeded, for any server: text of common words, or token ids where exact lengths
count."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Protocol

from loadgen.records import Prompt

WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city community name president team minute idea body information "
    "back parent face others level office door health person art war history party result change morning reason "
    "research girl guy moment air teacher force education foot boy age policy music market sense nation plan college "
    "interest death experience effect use class control field development role effort rate heart drug show leader "
    "light voice wife police mind price report decision son view relationship town road arm difference value building "
    "action season society tax director position player record paper space ground form event official matter center "
    "couple site project activity star table need court oil situation cost industry figure street image phone data "
    "picture practice piece land product doctor wall patient worker news test movie north love step support technology"
).split()


class Prompter(Protocol):
    """Makes prompts; the same key and length give the same prompt. `vary` keeps apart what runs must not share."""

    def make(self, key: object, tokens: int) -> Prompt: ...


@dataclass(frozen=True)
class TextPrompter:
    """Common words; `tokens_per_word` is the server's own measure of them."""

    vary: object = 0
    tokens_per_word: float = 1.0

    def make(self, key: object, tokens: int) -> str:
        return _text(f"{self.vary} {key}", max(1, round(tokens / self.tokens_per_word)))


@dataclass(frozen=True)
class IdPrompter:
    """Token ids from `low` up to and without `high`: exactly as long as asked for."""

    low: int
    high: int
    vary: object = 0

    def make(self, key: object, tokens: int) -> list[int]:
        return _ids(f"{self.vary} {key}", tokens, self.low, self.high)


def joined(parts: list[Prompt]) -> Prompt:
    """One prompt of several: token ids one after the other, text with a space between where there is none."""
    if parts and not isinstance(parts[0], str):
        return [token for part in parts for token in part]  # type: ignore[misc]
    text: list[str] = []
    for part in parts:
        assert isinstance(part, str), "text or token ids, not both"
        if text and not text[-1][-1:].isspace() and not part[:1].isspace():
            text.append(" ")
        text.append(part)
    return "".join(text)


# Shared prefixes are asked for again and again.
@lru_cache(maxsize=4096)
def _text(key: str, words: int) -> str:
    return " ".join(Random(key).choices(WORDS, k=words))


@lru_cache(maxsize=4096)
def _ids(key: str, tokens: int, low: int, high: int) -> list[int]:
    return Random(key).choices(range(low, high), k=tokens)
