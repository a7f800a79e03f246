"""Sampling in one go, for tests that ask what comes out and not when it is read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from server.runner.sampling import Sampler, logprob_entries
from server.types import RequestId, SampleSpec, TokenLogprobs


def sample(
    sampler: Sampler, logits: torch.Tensor, request_ids: Sequence[RequestId], specs: Sequence[SampleSpec]
) -> list[tuple[int, TokenLogprobs | None]]:
    """One token per row, with its log-probabilities where the spec asks. logits: [rows, vocab]."""
    chosen = sampler.choose(logits, request_ids, specs)
    found: list[TokenLogprobs | None] = [None] * len(specs)
    asking = [row for row, spec in enumerate(specs) if spec.params.logprobs is not None]
    if asking:
        tops = [specs[row].params.logprobs or 0 for row in asking]
        described = sampler.describe(logits[asking], chosen[asking], max(tops))
        for row, entry in zip(asking, logprob_entries([c.numpy() for c in described], tops), strict=True):
            found[row] = entry
    return list(zip(chosen.tolist(), found, strict=True))


def prompt_logprobs(sampler: Sampler, logits: torch.Tensor, targets: Sequence[int], top: int) -> list[TokenLogprobs]:
    """Of `targets[i]` under row i, with `top` alternatives."""
    described = sampler.describe(logits, torch.from_numpy(np.array(targets)), top)
    return logprob_entries([column.numpy() for column in described], [top] * len(targets))
