"""The JSON of answers: log-probabilities in OpenAI's two shapes, whole answers, and stream chunks built without models.

A chunk costs one `json.dumps` of its text and one concatenation; what does not change within a stream is encoded once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Protocol

from server.api.dialects.answer import assemble
from server.api.dialects.parts import Arguments, CallStart, Content, Part, Thought
from server.api.generate import Generation, Piece, Shown, Whole
from server.text import Tokenizer
from server.types import TokenLogprobs

LOWEST_LOGPROB = -9999.0
"""OpenAI's stand-in for minus infinity, which JSON cannot say."""


class TokenNames(Protocol):
    """What log-probabilities call tokens: a `Tokenizer`, or a `NumberedTokens`."""

    def token_text(self, id: int) -> str: ...
    def token_bytes(self, id: int) -> bytes: ...


class NumberedTokens:
    """Calls tokens by their numbers, so that two with the same text can be told apart."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.token_bytes = tokenizer.token_bytes

    def token_text(self, id: int) -> str:
        return f"token_id:{id}"


def _finite(logprob: float) -> float:
    # Written so that NaN fails the comparison too.
    return logprob if logprob > LOWEST_LOGPROB else LOWEST_LOGPROB


def completion_logprobs(tokenizer: TokenNames, tokens: Sequence[Shown], count: int) -> dict[str, Any]:
    """The `logprobs` object of /v1/completions: parallel lists. The first prompt token of an echo has none."""
    return {
        "text_offset": [shown.offset for shown in tokens],
        "token_logprobs": [_finite(shown.logprobs.logprob) if shown.logprobs else None for shown in tokens],
        "tokens": [tokenizer.token_text(shown.token) for shown in tokens],
        "top_logprobs": [_top(tokenizer, shown.logprobs, count) if shown.logprobs else None for shown in tokens],
    }


def _top(tokenizer: TokenNames, logprobs: TokenLogprobs, count: int) -> dict[str, float]:
    """Alternatives by text, likeliest first, the chosen one among them; of two tokens with one text the likelier."""
    shown: dict[str, float] = {}
    for token, logprob in (*logprobs.top[:count], (logprobs.token, logprobs.logprob)):
        shown.setdefault(tokenizer.token_text(token), _finite(logprob))
    return shown


def chat_logprobs(tokenizer: TokenNames, tokens: Sequence[Shown]) -> dict[str, Any]:
    """The `logprobs` object of chat: one entry per token with its bytes and alternatives."""
    content = []
    for shown in tokens:
        known = shown.logprobs
        assert known is not None, "a chat shows generated tokens only, each with its log-probabilities"
        top = [_chat_token(tokenizer, token, logprob) for token, logprob in known.top]
        content.append(_chat_token(tokenizer, known.token, known.logprob) | {"top_logprobs": top})
    return {"content": content, "refusal": None}


def _chat_token(tokenizer: TokenNames, token: int, logprob: float) -> dict[str, Any]:
    return {
        "token": tokenizer.token_text(token),
        "logprob": _finite(logprob),
        "bytes": list(tokenizer.token_bytes(token)),
    }


def prompt_logprobs(tokenizer: Tokenizer, known: Sequence[TokenLogprobs], count: int) -> list[dict[str, Any] | None]:
    """One entry per prompt token, keyed by token id; None for the first, which nothing precedes."""
    entries: list[dict[str, Any] | None] = [None]
    for logprobs in known:
        ranked = {logprobs.token: (logprobs.logprob, logprobs.rank)}
        for rank, (token, logprob) in enumerate(logprobs.top[:count], start=1):
            ranked.setdefault(token, (logprob, rank))
        entries.append(
            {
                str(token): {"logprob": _finite(logprob), "rank": rank, "decoded_token": tokenizer.token_text(token)}
                for token, (logprob, rank) in ranked.items()
            }
        )
    return entries


class Format:
    """How one endpoint's answers look. `head` holds what every chunk of one answer repeats."""

    kind: str
    chunk_kind: str
    id_prefix: str
    prompt_ids_above = False
    """Whether the prompt's ids stand beside the choices, of which all have the same prompt, or in each of them."""

    def __init__(self, tokenizer: Tokenizer, answer_id: str, created: int, model: str, generation: Generation) -> None:
        self._tokenizer = tokenizer
        self._generation = generation
        self._plan = generation.plan
        self._names: TokenNames = NumberedTokens(tokenizer) if self._plan.tokens_as_ids else tokenizer
        self._begun: set[int] = set()
        self._fields = {"id": f"{self.id_prefix}-{answer_id}", "created": created, "model": model}
        fixed = json.dumps({**self._fields, "object": self.chunk_kind}, separators=(",", ":"))
        self._head = f'data: {fixed[:-1]},"choices":['

    def whole(self, wholes: Sequence[Whole]) -> bytes:
        """The answer of a request that does not stream."""
        choices = [self._choice(whole, index) for index, whole in enumerate(wholes)]
        body = {**self._fields, "object": self.kind, "choices": choices, "usage": self._generation.usage()}
        body |= self._prompt_ids(0) if self.prompt_ids_above else {}
        return json.dumps(body, separators=(",", ":")).encode()

    def usage_tail(self) -> str:
        """The end of a chunk that carries the usage so far."""
        return f',"usage":{json.dumps(self._generation.usage(), separators=(",", ":"))}}}\n\n'

    def usage_chunk(self) -> bytes:
        return f"{self._head}]{self.usage_tail()}".encode()

    def _choice(self, whole: Whole, index: int) -> dict[str, Any]:
        prompt_known = None
        if self._plan.prompt_logprobs is not None:
            first = whole.choice.index - whole.choice.index % len(self._plan.specs[0])
            known = self._generation.choices[first].prompt_logprobs
            prompt_known = prompt_logprobs(self._tokenizer, known, self._plan.prompt_logprobs)
        return {
            "index": index,
            **self._content(whole),
            "finish_reason": whole.choice.finish_reason,
            "stop_reason": whole.choice.stop_reason,
            "prompt_logprobs": prompt_known,
            **({"token_ids": whole.ids} if self._plan.token_ids else {}),
            **({} if self.prompt_ids_above else self._prompt_ids(whole.choice.index)),
        }

    def _prompt_ids(self, index: int) -> dict[str, list[int]]:
        """The prompt of choice `index`, if the client wants to see it."""
        prompt = self._plan.prompts[index // len(self._plan.specs[0])]
        return {"prompt_token_ids": list(prompt.ids)} if self._plan.token_ids else {}

    def _ids_of(self, piece: Piece) -> str:
        return f'"token_ids":{json.dumps(piece.ids)},' if self._plan.token_ids else ""

    def _content(self, whole: Whole) -> dict[str, Any]:
        raise NotImplementedError

    def openings(self, tail: str) -> list[bytes]:
        """Chunks that go out before any token."""
        raise NotImplementedError

    def chunk(self, index: int, piece: Piece, stop_reason: str | int | None, tail: str) -> bytes:
        """One event (or two in one) for what `piece` adds to choice `index`."""
        raise NotImplementedError


class CompletionFormat(Format):
    kind = chunk_kind = "text_completion"
    id_prefix = "cmpl"

    def _content(self, whole: Whole) -> dict[str, Any]:
        return {"text": whole.text, "logprobs": self._logprobs(whole.tokens)}

    def _logprobs(self, tokens: Sequence[Shown]) -> dict[str, Any] | None:
        count = self._plan.logprobs
        return None if count is None else completion_logprobs(self._names, tokens, count)

    def openings(self, tail: str) -> list[bytes]:
        return []

    def chunk(self, index: int, piece: Piece, stop_reason: str | int | None, tail: str) -> bytes:
        logprobs = json.dumps(self._logprobs(piece.tokens)) if piece.tokens else "null"
        finish = "null" if piece.finish is None else f'"{piece.finish}","stop_reason":{json.dumps(stop_reason)}'
        ids = self._ids_of(piece)
        if ids and index not in self._begun:
            self._begun.add(index)
            ids = f"{json.dumps(self._prompt_ids(index))[1:-1]},{ids}"
        return (
            f'{self._head}{{"index":{index},"text":{json.dumps(piece.text)},"logprobs":{logprobs},{ids}'
            f'"finish_reason":{finish}}}]{tail}'
        ).encode()


class ChatFormat(Format):
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    id_prefix = "chatcmpl"
    prompt_ids_above = True

    def _content(self, whole: Whole) -> dict[str, Any]:
        logprobs = None if self._plan.logprobs is None else chat_logprobs(self._names, whole.tokens)
        return {"message": self._message(whole), "logprobs": logprobs}

    def _message(self, whole: Whole) -> dict[str, Any]:
        if self._plan.outline is None:
            return {"role": "assistant", "content": whole.text, "refusal": None}
        said = assemble(whole.parts)
        message: dict[str, Any] = {"role": "assistant", "content": said.content, "refusal": None}
        if said.thoughts is not None:
            message |= _thought(said.thoughts)
        if said.calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in said.calls
            ]
        return message

    def openings(self, tail: str) -> list[bytes]:
        # Whether there will be content is not known yet where there may be calls or thoughts.
        content = '""' if self._plan.outline is None else "null"
        delta = f'{{"role":"assistant","content":{content}}}'
        if self._plan.token_ids:
            tail = f",{json.dumps(self._prompt_ids(0))[1:-1]}{tail}"
        return [self._event(index, delta, "null", "null", tail) for index in range(len(self._generation.choices))]

    def chunk(self, index: int, piece: Piece, stop_reason: str | int | None, tail: str) -> bytes:
        if self._plan.outline is None:
            deltas = [{"content": piece.text}] if piece.text or piece.tokens or piece.ids else []
        else:
            deltas = [_delta(part) for part in piece.parts] or [{}] * bool(piece.tokens or piece.ids)
        event = b""
        for number, delta in enumerate(deltas):
            # Log-probabilities and ids are of tokens, whatever their text says: they go with the first of the deltas.
            shown = piece.tokens and not number
            logprobs = json.dumps(chat_logprobs(self._names, piece.tokens)) if shown else "null"
            ids = "" if number else self._ids_of(piece)
            event += self._event(index, json.dumps(delta, separators=(",", ":")), logprobs, "null", tail, ids)
        if piece.finish is not None:
            reason = self._generation.choices[index].finish_reason
            finish = f'"{reason}","stop_reason":{json.dumps(stop_reason)}'
            event += self._event(index, "{}", "null", finish, tail)
        return event

    def _event(self, index: int, delta: str, logprobs: str, finish: str, tail: str, ids: str = "") -> bytes:
        return (
            f'{self._head}{{"index":{index},"delta":{delta},"logprobs":{logprobs},{ids}"finish_reason":{finish}}}]{tail}'
        ).encode()


def _thought(text: str) -> dict[str, str]:
    """Thoughts have no name at OpenAI; clients read one of these two."""
    return {"reasoning_content": text, "reasoning": text}


def _delta(part: Part) -> dict[str, Any]:
    """What one part of an answer adds to the message, as clients of streams put it together."""
    match part:
        case Content(text):
            return {"content": text}
        case Thought(text):
            return _thought(text)
        case CallStart(name, index, id):
            call = {"index": index, "id": id, "type": "function", "function": {"name": name, "arguments": ""}}
        case Arguments(text, index):
            call = {"index": index, "function": {"arguments": text}}
    return {"tool_calls": [call]}
