"""A model whose every output depends on every byte of KV that it read, and the same model without any cache.

The KV of a token is one number, a digest over the token, its position and *the numbers read from the frames* of all
positions before it, as in a real decoder. The next token is a digest of all of them. So one stale, swapped, torn or
foreign block changes everything after it. The tenant is part of the digest, so that a block of another tenant is as
wrong as one of another prompt. Tuples of ints hash to the same value in every process.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

from server.errors import DeviceLost, StepFailed
from server.types import FinishReason, FrameId, SamplingParams, StepPlan, StepResult, StepRow, TokenLogprobs

Report = Callable[[str], None]
"""Tells the scenario that something is wrong; the run then ends and fails."""


class Arena:
    """The memory of one simulated tier: `block_tokens` numbers per frame. Fresh and torn frames hold noise."""

    def __init__(self, frames: int, block_tokens: int, rng: Random) -> None:
        self.block_tokens = block_tokens
        self._rng = rng
        self.frames: list[list[int]] = [self.noise() for _ in range(frames)]

    def noise(self) -> list[int]:
        return [self._rng.getrandbits(62) for _ in range(self.block_tokens)]

    def tear(self, frame: FrameId) -> None:
        """From now on, and until it is filled, reading this frame gives nonsense."""
        self.frames[frame] = self.noise()


def start_of(tenant: str) -> int:
    """The digest before the first token: over the bytes, as `hash` of a str differs from process to process."""
    return hash(tuple(tenant.encode()))


def kv_of(digest: int, token: int, position: int) -> int:
    """The KV that a token leaves behind, given the digest over all KV before it."""
    return hash((digest, token, position))


def absorb(digest: int, kv: int) -> int:
    """The digest over one position more."""
    return hash((digest, kv))


def next_token(digest: int, params: SamplingParams, position: int, vocab: int) -> int:
    return hash((digest, params.seed, position)) % vocab


def score(digest: int, token: int) -> float:
    """A stand-in for the log-probability of `token` after the positions in `digest`."""
    return -(hash((digest, token, 1)) % 100_000) / 1000


@dataclass(frozen=True, slots=True)
class Expected:
    """What a request must give: its tokens, why it ends, and the scores of its prompt tokens but the first."""

    tokens: list[int]
    finish: FinishReason
    prompt_scores: list[float]


class Reference:
    """The model run alone, without blocks, frames, batches or a cache."""

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab

    def kv(self, tenant: str, tokens: Sequence[int]) -> list[int]:
        """KV of each token of a sequence."""
        digest, numbers = start_of(tenant), []
        for position, token in enumerate(tokens):
            numbers.append(kv_of(digest, token, position))
            digest = absorb(digest, numbers[-1])
        return numbers

    def generate(self, tenant: str, prompt: Sequence[int], params: SamplingParams) -> Expected:
        digest, scores = start_of(tenant), []
        for position, token in enumerate(prompt):
            if position:
                scores.append(score(digest, token))
            digest = absorb(digest, kv_of(digest, token, position))
        tokens: list[int] = []
        while len(tokens) < params.max_tokens:
            position = len(prompt) + len(tokens)
            token = next_token(digest, params, position, self.vocab)
            tokens.append(token)
            if token in params.stop_token_ids and len(tokens) > params.min_tokens:
                return Expected(tokens, FinishReason.STOP, scores)
            digest = absorb(digest, kv_of(digest, token, position))
        return Expected(tokens, FinishReason.LENGTH, scores)


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds of one step: a base and a part per token; one step in `failure_every` fails (0: none does)."""

    base_s: float
    token_s: float
    failure_every: int


@dataclass(slots=True)
class _Row:
    """One row between the start and the end of its step: the digest before it, what it writes, what it answers."""

    row: StepRow
    before: int
    kv: list[int]
    after: int
    scores: list[TokenLogprobs] | None


class OracleRunner:
    """StepRunner on virtual time, the worst that is legal: what a step will write is torn from its start on, and what
    it reads must be the same at its start and at its end, as a device may read at any moment between."""

    def __init__(
        self,
        arena: Arena,
        vocab: int,
        cost: StepCost,
        rng: Random,
        report: Report,
        *,
        before_step: Callable[[], None] = lambda: None,
    ) -> None:
        """`before_step` is called with the step planned and not begun: the moment to audit."""
        self.tenants: dict[int, str] = {}
        self.kept: set[int] = set()
        """Requests that a device would keep state for: seen in a step and not retired since."""
        self.steps = 0
        self.followed = 0
        """Rows that were planned before their token was known."""
        self.failures = 0
        self.lost: DeviceLost | None = None
        """What the next step ends with, if the device is to be lost."""
        self._arena = arena
        self._vocab = vocab
        self._cost = cost
        self._rng = rng
        self._report = report
        self._before_step = before_step
        self._device = asyncio.Lock()
        self._handed = 0
        self._sampled: dict[int, int | None] = {}
        """What the step before sampled, by request; nothing if it failed."""

    def run(self, plan: StepPlan) -> Awaitable[StepResult]:
        """One that comes while another runs waits for that one's end, as on a device."""
        self._handed += 1
        if self._handed > 2:
            self._report("three steps are under way")
        self.kept.difference_update(plan.retired)
        self._before_step()
        self.kept.update(row.request_id for row in plan.rows)
        return self._in_turn(plan)

    async def _in_turn(self, plan: StepPlan) -> StepResult:
        try:
            async with self._device:
                return await self._step(plan)
        finally:
            self._handed -= 1

    async def _step(self, plan: StepPlan) -> StepResult:
        loop = asyncio.get_running_loop()
        self.steps += 1
        started_s = loop.time()
        before, self._sampled = self._sampled, {}
        rows = [self._forward(self._fed(row, before)) for row in plan.rows]
        self._tear_targets(plan)
        await asyncio.sleep(self._cost.base_s + self._cost.token_s * plan.tokens * self._rng.uniform(0.5, 2))
        if self.lost is not None:
            raise self.lost
        if self._cost.failure_every and self._rng.randrange(self._cost.failure_every) == 0:
            self.failures += 1
            raise self._rng.choice((StepFailed("injected"), RuntimeError("injected: out of memory")))
        for row in rows:
            if self._read(row.row) != row.before:
                self._report(f"request {row.row.request_id}: KV changed while step {plan.id} read it")
        for row in rows:
            self._write(row)
        tokens = [self._sample(row) for row in rows]
        self._sampled = {row.request_id: token for row, token in zip(plan.rows, tokens, strict=True)}
        return StepResult(plan.id, tokens, [None] * len(rows), [row.scores for row in rows], started_s, loop.time())

    def _fed(self, row: StepRow, before: dict[int, int | None]) -> StepRow:
        """The row with the token that it feeds, where that comes from the step before."""
        if not row.follows:
            return row
        self.followed += 1
        token = before.get(row.request_id)
        if token is None:
            raise StepFailed("the step before it failed")
        return replace(row, tokens=array("i", (token,)))

    async def aclose(self) -> None:
        """There is no thread to end."""

    def _read(self, row: StepRow) -> int:
        """The digest over all KV before the row, read through its frames."""
        digest, size, frames = start_of(self.tenants[row.request_id]), self._arena.block_tokens, self._arena.frames
        table = row.frames.tolist()
        for position in range(row.start):
            digest = absorb(digest, frames[table[position // size]][position % size])
        return digest

    def _forward(self, row: StepRow) -> _Row:
        if len(row.frames) * self._arena.block_tokens < row.start + len(row.tokens):
            self._report(f"request {row.request_id}: the block table does not cover its tokens")
        before = digest = self._read(row)
        scores: list[TokenLogprobs] | None = None if row.prompt_logprobs is None else []
        numbers = []
        for offset, token in enumerate(row.tokens):
            numbers.append(kv_of(digest, token, row.start + offset))
            digest = absorb(digest, numbers[-1])
            if scores is not None and row.targets is not None and offset < len(row.targets):
                target = row.targets[offset]
                scores.append(TokenLogprobs(target, score(digest, target), rank=1))
        return _Row(row, before, numbers, digest, scores)

    def _places(self, row: StepRow) -> list[tuple[FrameId, int]]:
        size, table = self._arena.block_tokens, row.frames.tolist()
        end = row.start + len(row.tokens)
        return [(table[position // size], position % size) for position in range(row.start, end)]

    def _tear_targets(self, plan: StepPlan) -> None:
        written: set[tuple[FrameId, int]] = set()
        for row in plan.rows:
            for frame, offset in self._places(row):
                if (frame, offset) in written:
                    self._report(f"request {row.request_id}: another row of step {plan.id} writes the same place")
                written.add((frame, offset))
                self._arena.frames[frame][offset] = self._rng.getrandbits(62)

    def _write(self, row: _Row) -> None:
        for (frame, offset), number in zip(self._places(row.row), row.kv, strict=True):
            self._arena.frames[frame][offset] = number

    def _sample(self, row: _Row) -> int | None:
        spec = row.row.sample
        if spec is None:
            return None
        fed = array("i", spec.history[row.row.start :])
        unknown = row.row.follows and not fed  # who was aborted before the token came was not told
        if spec.position != row.row.start + len(row.row.tokens) or (fed != row.row.tokens and not unknown):
            self._report(f"request {row.row.request_id}: what it samples from is not what was fed")
        return next_token(row.after, spec.params, spec.position, self._vocab)
