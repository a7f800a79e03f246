"""From token events to text: one `Choice` per sequence, one `Generation` per HTTP request.

Detokenizing happens here, in the task of the client that reads, so that it costs the engine's loop nothing while nobody
reads. Every engine stream is closed exactly once, by `Generation.close`, however the request ends.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from server.api.dialects.answer import AnswerParser
from server.api.dialects.parts import Content, Part
from server.api.requests import Plan, Prompt
from server.api.service import Service
from server.engine import GenerateSpec, Stream
from server.errors import GRAMMAR_STUCK, GrammarStuck, NotReady, StepFailed, TerraceError
from server.scheduler.request import PHASES
from server.text import TextStream
from server.types import DEVICE, DRAM, SSD, FinishReason, TokenEvent, TokenLogprobs, Vector

MERGE_QUEUE = 64
"""Pieces that wait for a slow client of a many-choice stream; more stay, joined, in the engine's streams."""


class Shown(NamedTuple):
    """One token with its log-probabilities and where its text begins, in characters of the choice's text."""

    logprobs: TokenLogprobs | None
    token: int
    offset: int


@dataclass(slots=True)
class Piece:
    """What one delivery adds to a choice. `finish` is set on the last one.

    `parts`: where the plan has an outline, `text` and all that is more than text, in order.
    """

    text: str
    tokens: list[Shown] = field(default_factory=list)
    finish: FinishReason | None = None
    ids: list[int] = field(default_factory=list)
    """Every token counted, where the client asked for them; text and log-probabilities may come later."""
    parts: list[Part] = field(default_factory=list)


class Aborted(TerraceError):
    """The engine gave the request up, and not because the client asked it to."""

    code = "aborted"


class Choice:
    """One generated sequence. `pieces` may be consumed once."""

    def __init__(
        self, service: Service, plan: Plan, prompt: Prompt, spec: GenerateSpec, stream: Stream, index: int
    ) -> None:
        self.index = index
        self.stream = stream
        self.generated = 0
        self.logprob_sum = 0.0
        self.finish: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.pooled: Vector | None = None
        self._service = service
        self._plan = plan
        self._prompt = prompt
        self._stop_ids = spec.params.stop_token_ids
        self._text = TextStream(
            service.tokenizer,
            prompt.ids,
            stops=plan.stops,
            include_stop=plan.include_stop,
            min_tokens=spec.params.min_tokens,
            skip_special_tokens=plan.skip_special_tokens,
            shown_ids=plan.outline.shown_ids if plan.outline else frozenset(),
        )
        self._parser: AnswerParser | None = plan.outline.parser() if plan.outline else None
        self._echo = plan.echo
        self._base = len(prompt.text) if plan.echo else 0
        self._waiting: deque[Shown] = deque()

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """What is new, per delivery of the engine; empty deliveries are swallowed. Raises what ended it early."""
        async for events in self.stream:
            piece = self._take(events)
            if piece.text or piece.parts or piece.tokens or piece.ids or piece.finish is not None:
                yield piece
            if piece.finish is not None:
                # A stop string or a call too many ends the choice before the engine knows: give its frames back now.
                self.stream.close(piece.finish)
                return
        raise self._aborted(None)

    def _take(self, events: Sequence[TokenEvent]) -> Piece:
        for event in events:
            if event.prompt_logprobs is not None:
                self.prompt_logprobs.extend(event.prompt_logprobs)
        last = events[-1]
        self.pooled = last.pooled
        if last.finish in (FinishReason.ABORT, FinishReason.ERROR):
            raise self._aborted(last)
        piece = Piece("")
        if self._echo and (last.token is not None or last.finish is not None):
            self._echo = False
            piece.text = self._prompt.text
            piece.tokens.extend(self._prompt_tokens())
        if self._plan.score_only:
            piece.finish = self.finish = None if last.finish is None else FinishReason.LENGTH
        else:
            self._decode([event for event in events if event.token is not None], last, piece)
        return piece

    def _decode(self, events: Sequence[TokenEvent], last: TokenEvent, piece: Piece) -> None:
        """Adds the text of `events` to `piece`, counts their tokens and notes how the choice ends, if it does."""
        # The token that ended the choice is counted, but it is text only if the client asked for it.
        hidden = last.finish is FinishReason.STOP and last.token in self._stop_ids and not self._plan.include_stop
        delta = self._text.push([event.token for event in events[: len(events) - hidden] if event.token is not None])
        text = delta.text
        counted = delta.kept + (hidden and delta.stopped is None)
        self.generated += counted
        if self._plan.token_ids:
            piece.ids = [event.token for event in events[:counted] if event.token is not None]
        for event, offset in zip(events, delta.offsets, strict=False):
            if event.logprobs is not None:
                self.logprob_sum += event.logprobs.logprob
                if self._plan.logprobs is not None:
                    self._waiting.append(Shown(event.logprobs, event.logprobs.token, self._base + offset))
        if delta.stopped is None and last.finish is not None:
            self.finish = last.finish
            if last.finish is FinishReason.STOP and last.token in self._plan.client_stop_ids:
                self.stop_reason = last.token
            text += self._text.finish().text
        if self._text.stopped is not None:
            self.finish, self.stop_reason = FinishReason.STOP, self._text.stopped
        if self._parser is not None:
            piece.parts = self._parse(self._parser, delta.offsets, text)
            text = "".join(part.text for part in piece.parts if isinstance(part, Content))
        piece.text += text
        piece.finish = self.finish
        self._release(piece)

    def _parse(self, parser: AnswerParser, offsets: Sequence[int], text: str) -> list[Part]:
        """What `text` says; ends the choice when nothing more is wanted."""
        parser.count(offsets)
        parts = parser.push(text)
        if parser.over:
            self.finish = FinishReason.STOP
        return parts if self.finish is None else parts + parser.finish()

    @property
    def finish_reason(self) -> str | None:
        """How it ended, in OpenAI's words."""
        if self.finish is FinishReason.STOP and self._parser is not None and self._parser.calls:
            return "tool_calls"
        return self.finish

    @property
    def thought_tokens(self) -> int:
        return self._parser.thought_tokens if self._parser is not None else 0

    def _release(self, piece: Piece) -> None:
        """Moves to `piece` the tokens whose text has begun to go out; at the end all that no stop string cut off."""
        everything = piece.finish is not None and self._text.stopped is None
        sent = self._base + self._text.length
        while self._waiting and (everything or self._waiting[0].offset < sent):
            piece.tokens.append(self._waiting.popleft())

    def _prompt_tokens(self) -> Iterable[Shown]:
        if self._plan.logprobs is None:
            return
        offset = 0
        for position, token in enumerate(self._prompt.ids):
            known = self.prompt_logprobs[position - 1] if 0 < position <= len(self.prompt_logprobs) else None
            yield Shown(known, token, offset)
            offset = min(offset + self._prompt_width(token, offset), len(self._prompt.text))

    def _prompt_width(self, token: int, offset: int) -> int:
        """Characters of the prompt whose first byte is in `token`; none for a special token that the text lacks."""
        data = self._service.tokenizer.token_bytes(token)
        if self._service.tokenizer.is_special(token) and not self._prompt.text.startswith(data.decode(), offset):
            return 0
        return sum(byte & 0xC0 != 0x80 for byte in data)

    def _aborted(self, event: TokenEvent | None) -> TerraceError:
        if event is not None and event.finish is FinishReason.ERROR:
            if event.error == GRAMMAR_STUCK:
                return GrammarStuck(GRAMMAR_STUCK)
            return StepFailed(event.error or "the model failed on this request; it may succeed when sent again")
        if self._service.engine.state in ("draining", "stopped"):
            return NotReady("the server is shutting down and gave this request up; send it again")
        return Aborted("the server gave this request up before it was finished")


class Generation:
    """All choices of one HTTP request, submitted together or not at all. Loop thread."""

    def __init__(self, service: Service, plan: Plan, id: str) -> None:
        """Submits. Raises what the engine raises (Overloaded, NotReady, InvalidRequest), and Overloaded where the
        tenant has used up what it may, holding nothing. `id`: by which its client and the log know it."""
        self.id = id
        self.plan = plan
        self.choices: list[Choice] = []
        self.tenant = plan.specs[0][0].service.tenant
        self.background = plan.specs[0][0].service.background
        self.prompt_tokens = sum(len(prompt.ids) for prompt in plan.prompts)
        self.started_s = service.wall_clock()
        self._live = service.live
        self._permit = service.tenants.enter(self.tenant, self.prompt_tokens)
        try:
            for prompt, specs in zip(plan.prompts, plan.specs, strict=True):
                for spec in specs:
                    stream = service.engine.submit(spec)
                    self.choices.append(Choice(service, plan, prompt, spec, stream, len(self.choices)))
        except BaseException:
            self._permit.cancel()
            self.close()
            raise
        self._live.add(self)

    def close(self) -> None:
        """Aborts what is unfinished; its frames are free when this returns. Idempotent."""
        self._live.discard(self)
        for choice in self.choices:
            choice.stream.close()
        self._permit.leave(
            cached_tokens=self.cached_by_tier.total(),
            generated_tokens=self.generated_tokens,
            served=all(choice.finish is not None for choice in self.choices),
        )

    @property
    def phase(self) -> str:
        """Of the choice that is least far; `sending` when all are generated."""
        phases = {choice.stream.phase for choice in self.choices}
        return next((phase for phase in PHASES if phase in phases), "sending")

    @property
    def generated_tokens(self) -> int:
        """Of all choices, read or not."""
        return sum(choice.stream.generated for choice in self.choices)

    async def pieces(self) -> AsyncGenerator[tuple[Choice, Piece], None]:
        """Pieces of all choices as they come, until each has finished. Raises the first error of any."""
        if len(self.choices) == 1:
            choice = self.choices[0]
            async with aclosing(choice.pieces()) as pieces:
                async for piece in pieces:
                    yield choice, piece
            return
        queue: asyncio.Queue[tuple[Choice, Piece] | Exception] = asyncio.Queue(MERGE_QUEUE)
        pumps = [asyncio.ensure_future(_pump(choice, queue)) for choice in self.choices]
        try:
            open_choices = len(pumps)
            while open_choices:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                open_choices -= item[1].finish is not None
                yield item
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    def usage(self) -> dict[str, Any]:
        """The usage object. Prompts count once however many choices they have; every generated token counts."""
        completion_tokens = sum(choice.generated for choice in self.choices)
        cached = self.cached_by_tier
        usage = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self.prompt_tokens + completion_tokens,
            "prompt_tokens_details": {
                "cached_tokens": cached.total(),
                "cached_tokens_by_tier": {tier: cached[tier] for tier in (DEVICE, DRAM, SSD)},
            },
        }
        if self.plan.outline is not None and self.plan.outline.thoughts is not None:
            thought_tokens = sum(choice.thought_tokens for choice in self.choices)
            usage["completion_tokens_details"] = {"reasoning_tokens": thought_tokens}
        return usage

    @property
    def cached_by_tier(self) -> Counter[str]:
        """Prompt tokens that came from the cache, by tier, once for each prompt."""
        cached: Counter[str] = Counter()
        for choice in self.choices[:: len(self.plan.specs[0])]:
            cached.update(choice.stream.cached_by_tier)
        return cached


async def _pump(choice: Choice, queue: asyncio.Queue[tuple[Choice, Piece] | Exception]) -> None:
    try:
        async with aclosing(choice.pieces()) as pieces:
            async for piece in pieces:
                await queue.put((choice, piece))
    except Exception as error:  # noqa: BLE001 - raised again by whoever reads the queue
        await queue.put(error)


@dataclass(slots=True)
class Whole:
    """A finished choice: its text, tokens, their ids and its parts from first to last."""

    choice: Choice
    text: str
    tokens: list[Shown]
    ids: list[int]
    parts: list[Part]


async def collect(generation: Generation) -> list[Whole]:
    """Runs every choice to its end; per prompt the `keep` likeliest, in order of their index, or best first."""
    pieces: dict[int, list[Piece]] = {choice.index: [] for choice in generation.choices}
    async with aclosing(generation.pieces()) as found:
        async for choice, piece in found:
            pieces[choice.index].append(piece)
    wholes = [_whole(choice, pieces[choice.index]) for choice in generation.choices]
    per_prompt, keep = len(generation.plan.specs[0]), generation.plan.keep
    kept: list[Whole] = []
    for start in range(0, len(wholes), per_prompt):
        group = wholes[start : start + per_prompt]
        if keep < per_prompt:
            group = sorted(group, key=lambda whole: -whole.choice.logprob_sum / max(1, whole.choice.generated))
        kept.extend(group[:keep])
    return kept


def _whole(choice: Choice, pieces: Sequence[Piece]) -> Whole:
    return Whole(
        choice,
        "".join(piece.text for piece in pieces),
        [token for piece in pieces for token in piece.tokens],
        [id for piece in pieces for id in piece.ids],
        [part for piece in pieces for part in piece.parts],
    )
