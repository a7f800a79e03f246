"""The device thread: turns a StepPlan into tokens. Sees plans, tensors and frames; never requests or blocks.

One thread owns model, attention backend and sampler, so that none of them needs a lock. `run` may be awaited from the
loop thread only, one plan at a time.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from server.kernels.attention import AttentionBackend, AttentionBatch
from server.models.base import Model
from server.runner.sampling import Sampler
from server.types import FinishReason, RequestId, StepPlan, StepResult, StepRow, TokenLogprobs, Vector


class TorchRunner:
    """A StepRunner over a torch model. `clock` is monotonic seconds; `threads` torch's arithmetic threads, or None."""

    def __init__(
        self, model: Model, attention: AttentionBackend, clock: Callable[[], float], *, threads: int | None = None
    ) -> None:
        self._model = model
        self._attention = attention
        self._sampler = Sampler(model.geometry.vocab)
        self._sums: dict[RequestId, Tensor] = {}
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, "terrace-device", initializer=_set_threads, initargs=(threads,))

    async def run(self, plan: StepPlan) -> StepResult:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.step, plan)

    async def aclose(self) -> None:
        await asyncio.to_thread(self._thread.shutdown)

    @torch.inference_mode()
    def step(self, plan: StepPlan) -> StepResult:
        """One forward pass and the sampling after it. Device thread."""
        started_s = self._clock()
        self._sampler.forget(plan.retired)
        batch, tokens, positions = _flatten(plan.rows)
        self._attention.plan(batch)
        wanted, spans, pools = _wanted(plan.rows, batch)
        states = self._model.forward(tokens, positions, self._attention, wanted)
        logits = self._model.logits(states[: pools[0][1]] if pools else states)
        sampled, logprobs, ends = self._sample(plan.rows, logits)
        scored = [
            None if span is None else self._score(row, logits[span[0] : span[1]])
            for row, span in zip(plan.rows, spans, strict=True)
        ]
        pooled = self._pool(plan, states, pools)
        return StepResult(plan.id, sampled, logprobs, scored, started_s, self._clock(), pooled, ends)

    def _sample(
        self, rows: Sequence[StepRow], logits: Tensor
    ) -> tuple[list[int | None], list[TokenLogprobs | None], dict[int, FinishReason]]:
        """Tokens, log-probabilities and the ends that grammars set. The sampled rows' logits are the first of `logits`,
        in row order."""
        tokens: list[int | None] = [None] * len(rows)
        logprobs: list[TokenLogprobs | None] = [None] * len(rows)
        ends: dict[int, FinishReason] = {}
        sampling = [(i, row.request_id, row.sample) for i, row in enumerate(rows) if row.sample is not None]
        if sampling:
            places, ids, specs = zip(*sampling, strict=True)
            drawn = self._sampler.sample(logits[: len(places)], ids, specs)
            for place, (token, entry) in zip(places, drawn, strict=True):
                tokens[place], logprobs[place] = token, entry
            for index, (end, counts) in self._sampler.advance(ids, specs, [token for token, _ in drawn]).items():
                ends[places[index]] = end
                if not counts:
                    tokens[places[index]] = logprobs[places[index]] = None
        return tokens, logprobs, ends

    def _pool(self, plan: StepPlan, states: Tensor, pools: Sequence[tuple[int, int, int]]) -> Mapping[int, Vector]:
        """The vectors of the prompts that end in this step; what others add is kept until their prompts end."""
        for id in plan.retired:
            self._sums.pop(id, None)
        found: dict[int, Vector] = {}
        for place, start, end in pools:
            row = plan.rows[place]
            assert row.pool is not None
            vector = states[start:end].sum(0, dtype=torch.float64)  # of one row where only the last counts
            if row.start and row.pool.pooling == "mean":
                vector = vector + self._sums.pop(row.request_id)
            if not row.pool.ends:
                self._sums[row.request_id] = vector
                continue
            tokens = row.start + len(row.tokens) if row.pool.pooling == "mean" else 1
            found[place] = (vector / tokens).float().cpu().numpy()
        return found

    def _score(self, row: StepRow, logits: Tensor) -> list[TokenLogprobs]:
        assert row.targets is not None
        assert row.prompt_logprobs is not None
        return self._sampler.prompt_logprobs(logits, row.targets, row.prompt_logprobs)


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


def _flatten(rows: Sequence[StepRow]) -> tuple[AttentionBatch, Tensor, Tensor]:
    """The rows as one flat batch: attention's view of it, tokens int64 [n] and positions int64 [n]."""
    flat = array("i")
    for row in rows:
        flat.extend(row.tokens)
    lengths = np.fromiter((len(row.tokens) for row in rows), np.int32, len(rows))
    starts = np.fromiter((row.start for row in rows), np.int32, len(rows))
    query_starts = np.zeros(len(rows) + 1, np.int32)
    np.cumsum(lengths, out=query_starts[1:])
    positions = np.arange(len(flat), dtype=np.int64) + np.repeat(starts - query_starts[:-1], lengths)
    batch = AttentionBatch(query_starts, starts, starts + lengths, [row.frames for row in rows])
    return batch, torch.from_numpy(np.array(flat, dtype=np.int64)), torch.from_numpy(positions)


def _wanted(
    rows: Sequence[StepRow], batch: AttentionBatch
) -> tuple[Tensor, list[tuple[int, int] | None], list[tuple[int, int, int]]]:
    """Batch indices whose states are needed, int64 [m]: the last token of each sampled row, then, for each row that
    scores its prompt, every fed token with a target; and where in [m] the latter lie, per row. Behind all that give
    logits come those of pooled rows: (row, first, end in [m])."""
    ends = batch.query_starts[1:]
    wanted = [int(ends[i]) - 1 for i, row in enumerate(rows) if row.sample is not None]
    spans: list[tuple[int, int] | None] = [None] * len(rows)
    for i, row in enumerate(rows):
        if row.targets is not None:
            first = int(batch.query_starts[i])
            spans[i] = (len(wanted), len(wanted) + len(row.targets))
            wanted.extend(range(first, first + len(row.targets)))
    pools: list[tuple[int, int, int]] = []
    for i, row in enumerate(rows):
        if row.pool is not None and (row.pool.ends or row.pool.pooling == "mean"):
            last = int(ends[i])
            first = int(batch.query_starts[i]) if row.pool.pooling == "mean" else last - 1
            pools.append((i, len(wanted), len(wanted) + last - first))
            wanted.extend(range(first, last))
    return torch.tensor(wanted, dtype=torch.int64), spans, pools
