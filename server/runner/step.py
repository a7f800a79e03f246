"""What every step runner does to a plan, wherever it computes: flatten its rows, and read out what the pass left.

Knows rows, tensors and the sampler; refuses to know threads, devices, graphs and time. Device thread only, but for
`Outputs.read`, which any one thread may call once the tensors have reached the host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from server.errors import StepFailed
from server.kernels.attention import AttentionBatch
from server.kernels.native.rows import Choice, Telling
from server.models.base import Model
from server.runner.device import Download
from server.runner.sampling import Described, Put, Sampler, logprob_entries
from server.types import FinishReason, RequestId, SampleSpec, StepPlan, StepResult, StepRow, TokenLogprobs, Vector

Indices = npt.NDArray[np.int64]
Ends = Mapping[int, tuple[FinishReason, bool]]
"""By row: how its grammar ends the request, and whether the sampled token belongs to the text."""


@dataclass(frozen=True, slots=True)
class Flat:
    """The rows of a plan as one flat batch of n tokens.

    `wanted`: batch indices whose states are needed. First the last token of each sampled row, in row order; then, row
    by row, every fed token that has a target; from `scored` on, those of pooled rows, which need no logits.
    `spans`: (row, first, end in `wanted`) of rows that score their prompt; `pools`: likewise of pooled rows.
    """

    batch: AttentionBatch
    tokens: Indices  # [n]; 0 in rows that follow another step
    positions: Indices  # [n]
    wanted: Indices  # [m]
    sampled: Sequence[int]
    """The rows that sample a token; `ids` and `specs` are theirs."""
    ids: Sequence[RequestId]
    specs: Sequence[SampleSpec]
    scored: int
    spans: Sequence[tuple[int, int, int]]
    pools: Sequence[tuple[int, int, int]]

    @property
    def decodes(self) -> bool:
        """Every row feeds one token and samples the next, and nothing else is wanted."""
        return len(self.tokens) == len(self.sampled) == len(self.wanted) == self.batch.rows

    @property
    def asking(self) -> dict[int, int]:
        """Which of the tokens sampled want log-probabilities, with how many alternatives."""
        wanted = enumerate(spec.params.logprobs for spec in self.specs)
        return {index: top for index, top in wanted if top is not None}


def flatten(rows: Sequence[StepRow]) -> Flat:
    """The rows in their order, and what is wanted of them."""
    counts = [len(row.tokens) for row in rows]
    starts = np.array([row.start for row in rows], np.int32)
    if max(counts) == 1:  # the usual step: less to be done while a fast device waits
        bounds = list(range(len(rows) + 1))
        query_starts = np.arange(len(rows) + 1, dtype=np.int32)
        tokens = np.array([row.tokens[0] for row in rows], np.int64)
        positions, contexts = starts.astype(np.int64), starts + np.int32(1)
    else:
        bounds = list(accumulate(counts, initial=0))
        query_starts, lengths = np.array(bounds, np.int32), np.array(counts, np.int32)
        contexts = starts + lengths
        tokens = np.fromiter(chain.from_iterable([row.tokens for row in rows]), np.int64, bounds[-1])
        positions = np.arange(bounds[-1]) + np.repeat(starts - query_starts[:-1], lengths)
    batch = AttentionBatch(query_starts, starts, contexts, [row.frames for row in rows])
    sampled = [i for i, row in enumerate(rows) if row.sample is not None]
    ids = [rows[i].request_id for i in sampled]
    specs = [row.sample for row in rows if row.sample is not None]
    wanted = [bounds[i + 1] - 1 for i in sampled]
    spans = []
    for i, targets in [(i, row.targets) for i, row in enumerate(rows) if row.targets is not None]:
        spans.append((i, len(wanted), len(wanted) + len(targets)))
        wanted.extend(range(bounds[i], bounds[i] + len(targets)))
    scored, pools = len(wanted), []
    for i, pool in [(i, row.pool) for i, row in enumerate(rows) if row.pool is not None]:
        if pool.ends or pool.pooling == "mean":
            first, end = bounds[i] if pool.pooling == "mean" else bounds[i + 1] - 1, bounds[i + 1]
            pools.append((i, len(wanted), len(wanted) + end - first))
            wanted.extend(range(first, end))
    return Flat(batch, tokens, positions, np.array(wanted, np.int64), sampled, ids, specs, scored, spans, pools)


def fed(rows: Sequence[StepRow], flat: Flat, before: Mapping[RequestId, int | None]) -> list[tuple[int, int]]:
    """(batch index, what `before` says of the request) of the rows that follow the step before. Raises StepFailed where
    it says nothing: that step failed, or left no token to go on with."""
    found = []
    for first, row in zip(flat.batch.query_starts.tolist(), rows, strict=False):
        if row.follows:
            known = before.get(row.request_id)
            if known is None:
                raise StepFailed("the step before it failed")
            found.append((first, known))
    return found


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a step left where it was computed, to be read on the host.

    `described`: of the sampled rows that want log-probabilities, `asking`, if there are any, then of each row of
    `scoring`; with `tops` alternatives for each of their tokens. `pooled`: vectors fp32 [hidden] by row.
    """

    plan: StepPlan
    flat: Flat
    chosen: Tensor  # int64 [sampled rows]
    asking: Sequence[int]
    scoring: Sequence[int]
    described: Sequence[Described]
    tops: Sequence[Sequence[int]]
    pooled: Mapping[int, Tensor]

    def tensors(self) -> list[Tensor]:
        """All that has to reach the host, in the order in which `read` takes it."""
        return [self.chosen, *(column for found in self.described for column in found), *self.pooled.values()]

    def read(self, arrays: Sequence[npt.NDArray[Any]], ends: Ends, started_s: float, finished_s: float) -> StepResult:
        """The step's result. `arrays`: `tensors()` on the host."""
        rows, source = self.plan.rows, iter(arrays)
        tokens: list[int | None] = [None] * len(rows)
        for place, token in zip(self.flat.sampled, next(source).tolist(), strict=True):
            tokens[place] = token
        groups = [logprob_entries(list(islice(source, len(Described._fields))), tops) for tops in self.tops]
        logprobs: list[TokenLogprobs | None] = [None] * len(rows)
        if self.asking:
            for place, entry in zip(self.asking, groups.pop(0), strict=True):
                logprobs[place] = entry
        scores: list[Sequence[TokenLogprobs] | None] = [None if row.targets is None else [] for row in rows]
        for place, entries in zip(self.scoring, groups, strict=True):
            scores[place] = entries
        pooled: dict[int, Vector] = {place: next(source).copy() for place in self.pooled}
        finishes = {place: finish for place, (finish, _) in ends.items()}
        for place, (_, counts) in ends.items():
            if not counts:
                tokens[place] = logprobs[place] = None
        return StepResult(self.plan.id, tokens, logprobs, scores, started_s, finished_s, pooled, finishes)


@dataclass(frozen=True, slots=True)
class Launched:
    """A step that has been handed to what computes it."""

    outputs: Outputs
    download: Download
    """Of `outputs.tensors()`."""
    ends: Ends
    follows: bool

    def places(self) -> dict[RequestId, int | None]:
        """Where in the tensor of sampled tokens a request's is that goes on with it."""
        over = {place for place, (_, counts) in self.ends.items() if not counts}
        flat = self.outputs.flat
        pairs = enumerate(zip(flat.ids, flat.sampled, strict=True))
        return {id: index for index, (id, place) in pairs if place not in over}

    def result(self, arrays: Sequence[npt.NDArray[Any]], finished_s: float) -> StepResult:
        """Of what the download brought, at `finished_s`; any thread."""
        return self.outputs.read(arrays, self.ends, finished_s - self.download.busy_s(), finished_s)


class Readout:
    """From the states of a step to its outputs. Keeps what the sampler keeps, and the sums of states of prompts that
    are being pooled (float64)."""

    def __init__(self, model: Model, sampler: Sampler, put: Put) -> None:
        self._model = model
        self._sampler = sampler
        self._put = put
        self._sums: dict[RequestId, Tensor] = {}

    def forget(self, request_ids: Sequence[RequestId]) -> None:
        """Drop what is kept for these requests."""
        self._sampler.forget(request_ids)
        for id in request_ids:
            self._sums.pop(id, None)

    def choice(self, flat: Flat) -> Choice:
        """What the kernels need to know to do what `of_logits` does, of a step that can be left to them."""
        how, edits = self._sampler.ways(flat.ids, flat.specs)
        if not flat.asking:
            return Choice(how, edits)
        most = min(max(flat.asking.values()), self._model.geometry.vocab)
        return Choice(how, edits, Telling(np.array(list(flat.asking), np.int64), most))

    def of_states(self, plan: StepPlan, flat: Flat, states: Tensor) -> Outputs:
        """states [m, hidden]: the wanted ones."""
        logits = self._model.logits(states[: flat.scored] if flat.pools else states)
        return self.of_logits(plan, flat, logits, self._pool(plan, states, flat.pools))

    def of_logits(self, plan: StepPlan, flat: Flat, logits: Tensor, pooled: Mapping[int, Tensor]) -> Outputs:
        """logits fp32 [scored, vocab]: of the wanted states but those of pooled rows; not kept."""
        sampled = logits[: len(flat.ids)]
        chosen = self._sampler.choose(sampled, flat.ids, flat.specs)
        described: list[Described] = []
        tops: list[Sequence[int]] = []
        asking = flat.asking
        if asking:
            places = self._put(np.array(list(asking), np.int64))
            tops.append(list(asking.values()))
            wanted, tokens = sampled.index_select(0, places), chosen.index_select(0, places)
            described.append(self._sampler.describe(wanted, tokens, max(tops[0])))
        scoring = []
        for place, first, end in flat.spans:
            row = plan.rows[place]
            if row.targets and row.prompt_logprobs is not None:
                targets = self._put(np.array(row.targets, np.int64))
                scoring.append(place)
                tops.append([row.prompt_logprobs] * len(row.targets))
                described.append(self._sampler.describe(logits[first:end], targets, row.prompt_logprobs))
        return Outputs(plan, flat, chosen, [flat.sampled[i] for i in asking], scoring, described, tops, pooled)

    def advance(self, flat: Flat, tokens: Sequence[int]) -> Ends:
        """After the draw, with the tokens that it gave the sampled rows: the rows that their grammar ends."""
        ends = self._sampler.advance(flat.ids, flat.specs, tokens)
        return {flat.sampled[index]: end for index, end in ends.items()}

    def _pool(self, plan: StepPlan, states: Tensor, pools: Sequence[tuple[int, int, int]]) -> Mapping[int, Tensor]:
        """The vectors of the prompts that end in this step; what others add is kept until their prompts end."""
        found: dict[int, Tensor] = {}
        for place, first, end in pools:
            row = plan.rows[place]
            assert row.pool is not None
            vector = states[first:end].sum(0, dtype=torch.float64)  # of one row where only the last counts
            if row.start and row.pool.pooling == "mean":
                vector = vector + self._sums.pop(row.request_id)
            if not row.pool.ends:
                self._sums[row.request_id] = vector
                continue
            tokens = row.start + len(row.tokens) if row.pool.pooling == "mean" else 1
            found[place] = (vector / tokens).float()
        return found
