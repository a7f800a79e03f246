"""Rows of a step: what a request feeds, and what it samples after that. Pure, loop thread only."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence

from server.kvcache.manager import KVManager
from server.scheduler.request import Request
from server.types import Pool, RequestId, SampleSpec, StepRow

_UNKNOWN = array("i", (0,))
"""What a row feeds that follows another one."""


def row_of(request: Request, end: int) -> StepRow:
    """Feed the tokens of `request` that lack, up to `end`."""
    start, tokens, params = request.computed_tokens, request.tokens, request.params
    assert request.lease is not None
    row = StepRow(request.id, tokens[start:end], start, request.lease.table.view())
    if params.pooling is not None:
        row.pool = Pool(params.pooling, end == len(tokens))
        return row
    if end == len(tokens) and request.generated < params.max_tokens:
        row.sample = SampleSpec(params, end, request.prompt_tokens, tokens)
    if request.scores_prompt:
        row.prompt_logprobs = params.prompt_logprobs
        row.targets = tokens[start + 1 : min(end + 1, request.prompt_tokens)]
    return row


def rows_ahead(
    kv: KVManager, running: Sequence[Request], planned: Mapping[RequestId, StepRow]
) -> dict[RequestId, StepRow] | None:
    """What follows a `planned` step of all that run: each feeds the token that it samples there, unless that is its
    last. None where that is not all there is to it: a prompt goes on, the choice of a token needs those before it, or
    the device has no room."""
    rows: dict[RequestId, StepRow] = {}
    for request in running:
        before, lease = planned[request.id].sample, request.lease
        assert lease is not None
        if before is None or request.params.needs_history:
            return None
        if request.generated + 1 >= request.params.max_tokens or request.aborted:
            continue
        start = before.position
        if not kv.grow(lease, start + 1):
            return None
        sample = SampleSpec(request.params, start + 1, request.prompt_tokens, request.tokens)
        rows[request.id] = StepRow(request.id, _UNKNOWN, start, lease.table.view(), sample, follows=True)
    return rows
