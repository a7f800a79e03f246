"""One request's control state: `computed_tokens` chasing `len(tokens)`. Plain data, loop thread only.

There is no prefill phase and no decode phase: a request that lacks more than one token is prefilling, one that lacks
exactly the newest is decoding, and a preempted one simply starts to chase again.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from server.explain import Explanation
from server.kvcache.block import Lease
from server.types import (
    DEVICE,
    DRAM,
    ONLINE,
    ORDINARY,
    SSD,
    BlockHash,
    FinishReason,
    RequestId,
    Retention,
    SamplingParams,
    ServiceClass,
    SpanReport,
    TierName,
    TokenLogprobs,
)

PHASES = ("queued", "loading", "prefill", "decode")
"""How far a request is: waiting for room, waiting for blocks from below, computing its prompt, answering."""


SHOWN_HASH_DIGITS = 16
"""Of block hashes in explanations: prompts that begin alike are known by them, and nothing else is."""


class RequestState(Enum):
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(eq=False, slots=True)
class Request:
    """`root` starts the hash chain (fingerprint and cache salt); `hashes` are extended and never recomputed.

    `cached_tokens` counts the prompt tokens that came from the cache before any preemption, and `served` their blocks
    by the tier that they were found in; `missed` counts those that are cached and were computed, by reason; `decided`
    and `landed_by_tier_s` are its first lease's. `rank` is
    its place in every queue: behind all online ones if background, then as the policy says. `work_s` is the device time
    that the prompt was thought to need when it came, and `predicted_ttft_s` all that it was thought to wait.
    `needed_blocks` is the room that the last failed admission wanted. `claimed` are the positions of `hashes` that this
    request will seal, and `awaits` a hash that another one will. `expected`: the blocks that the KV manager keeps for
    it while it waits, and the number under which it does. `prompt_logprobs` collects entries until the prompt is done;
    None when not wanted. `held_since_s`: since when it is admitted and can compute nothing because its next block is on
    its way; `held_s`: how long that was, all in all.
    """

    id: RequestId
    tokens: array[int]
    params: SamplingParams
    root: BlockHash
    service: ServiceClass = ONLINE
    retention: Retention = ORDINARY
    arrival_s: float = 0.0
    prompt_tokens: int = field(init=False)
    computed_tokens: int = 0
    hashes: list[BlockHash] = field(default_factory=list)
    lease: Lease | None = None
    state: RequestState = RequestState.WAITING
    aborted: bool = False
    cached_tokens: int | None = None
    served: Counter[TierName] = field(default_factory=Counter)
    missed: Mapping[str, int] = field(default_factory=dict)
    decided: Sequence[SpanReport] = ()
    landed_by_tier_s: Mapping[TierName, float] = field(default_factory=dict)
    rank: tuple[bool, tuple[Any, ...]] = (False, ())
    work_s: float = 0.0
    predicted_ttft_s: float = 0.0
    needed_blocks: int = 0
    claimed: range = range(0)
    awaits: BlockHash | None = None
    expected: tuple[list[BlockHash], int] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    admitted_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    preemptions: int = 0
    held_since_s: float | None = None
    held_s: float = 0.0

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.tokens)
        if self.params.prompt_logprobs is not None:
            self.prompt_logprobs = []

    @property
    def lacking(self) -> int:
        """Tokens whose KV is not computed yet; the last of them is what the next token is sampled from."""
        return len(self.tokens) - self.computed_tokens

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    @property
    def phase(self) -> str:
        """One of PHASES, or `done`."""
        if self.state is not RequestState.RUNNING:
            return "queued" if self.state is RequestState.WAITING else "done"
        if self.held_since_s is not None:
            return "loading"
        return "prefill" if self.first_token_s is None else "decode"

    @property
    def deepest(self) -> str:
        """The slowest tier that gave it a block, or `none`."""
        return next((tier for tier in (SSD, DRAM, DEVICE) if self.served.get(tier)), "none")

    @property
    def scores_prompt(self) -> bool:
        """Prompt logprobs are wanted and not complete: no prompt token may come from the cache unscored."""
        return self.prompt_logprobs is not None and len(self.prompt_logprobs) < self.prompt_tokens - 1

    @property
    def needs_all_states(self) -> bool:
        """Every token of the prompt has to go through the model: none may come from the cache."""
        return self.scores_prompt or self.params.pooling == "mean"

    def finish_reason(self, token: int) -> FinishReason | None:
        """Why `token`, its newest, is its last; None where it goes on."""
        if token in self.params.stop_token_ids and self.generated > self.params.min_tokens:
            return FinishReason.STOP
        if self.generated >= self.params.max_tokens:
            return FinishReason.LENGTH
        return None

    def hold_up(self, lease: Lease, now: float, *, waits: bool) -> float:
        """It was looked at again, and `waits` for its next block or does not: seconds of waiting since the last look. A
        wait ends when the last block came, whenever that is noticed."""
        since_s, self.held_since_s = self.held_since_s, now if waits else None
        if since_s is None:
            return 0.0
        seconds = (lease.landed_s if not waits and lease.landed_s > since_s else now) - since_s
        self.held_s += seconds
        return seconds

    @property
    def looks_up(self) -> bool:
        """Its prompt might have come from the cache."""
        return self.params.prompt_logprobs is None and self.params.pooling != "mean"


def request_from(
    id: RequestId,
    prompt: Sequence[int],
    params: SamplingParams,
    root: BlockHash,
    *,
    now: float,
    service: ServiceClass = ONLINE,
    retention: Retention = ORDINARY,
) -> Request:
    """A waiting request over a copy of `prompt`."""
    return Request(id, array("i", prompt), params, root, service, retention, now)


def explained(
    request: Request,
    asked_as: tuple[str, str],
    finish: str,
    failed: bool,
    phases_s: Mapping[str, float],
    block_tokens: int,
    now: float,
) -> Explanation:
    """Why a request that ended `now` went as it did. `asked_as`: the API's id, and the trace that it is part of."""
    full = request.prompt_tokens // block_tokens
    blocks = request.hashes[:full]
    return Explanation(
        request_id=asked_as[0],
        trace_parent=asked_as[1],
        sequence=request.id,
        tenant=request.service.tenant,
        arrival_s=request.arrival_s,
        admitted_s=request.admitted_s,
        first_s=request.first_token_s,
        ended_s=now,
        finish=finish,
        error=failed,
        background=request.service.background,
        preemptions=request.preemptions,
        prompt_tokens=request.prompt_tokens,
        generated_tokens=request.generated,
        block_tokens=block_tokens,
        served={tier: count * block_tokens for tier, count in request.served.items() if count},
        missed={reason: count * block_tokens for reason, count in request.missed.items()},
        decisions=request.decided,
        landed_s=dict(request.landed_by_tier_s),
        phases_s=phases_s,
        predicted_ttft_s=request.predicted_ttft_s,
        first_block=blocks[0].hex()[:SHOWN_HASH_DIGITS] if blocks else "",
        last_block=blocks[-1].hex()[:SHOWN_HASH_DIGITS] if blocks else "",
    )
