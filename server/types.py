"""The nouns that every layer shares: what a block, a step and a token event are.

Plain data only. This module imports neither torch nor asyncio and knows no policy: it can be imported by the control
plane, by the device thread and by the simulator alike. Units live in names (`_s`, `_tokens`, `_bytes`). Nobody changes
any of these after making it; the three that a step makes per row are not frozen only because that doubles their cost.
"""

from __future__ import annotations

from array import array
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from math import inf
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from server.histogram import AGE_S, MOVE_S, Histogram

BlockHash = bytes
"""32 bytes: keyed hash over (parent hash, token ids); the chain's root is the fingerprint and the cache salt."""
FrameId = int
"""Index of one block-sized place in one tier."""
TierName = str
"""`device`, `dram`, `ssd`, ..."""
RequestId = int

DEVICE: TierName = "device"
DRAM: TierName = "dram"
SSD: TierName = "ssd"


Pooling = Literal["mean", "last"]
"""How the final hidden states of a prompt become one vector: their mean, or the last token's."""
Vector = npt.NDArray[np.float32]


class FinishReason(StrEnum):
    """Why a request ended. STOP and LENGTH are the client's own doing; the others are not."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """Shape of one block, K and V of all layers: `[layers, 2, kv_heads, block_tokens, head_dim]`, one contiguous range.

    Llama-3-8B in bf16 with 16 tokens: 32 * 2 * 8 * 16 * 128 * 2 B = 2 MiB. `scale_bytes`: what quantised KV keeps
    beside each vector of head_dim.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype_bytes: int
    block_tokens: int
    scale_bytes: int = 0

    @property
    def token_bytes(self) -> int:
        return self.layers * 2 * self.kv_heads * (self.head_dim * self.dtype_bytes + self.scale_bytes)

    @property
    def block_bytes(self) -> int:
        return self.token_bytes * self.block_tokens

    def blocks_for(self, tokens: int) -> int:
        """Blocks that `tokens` tokens occupy, the last one perhaps partly."""
        return -(-tokens // self.block_tokens)


@dataclass(frozen=True, slots=True)
class ModelGeometry:
    """The shapes of a decoder that memory, attention and limits depend on.

    `windows[layer]` is the sliding-window length in tokens of that layer (a query at position p sees p-window+1 .. p),
    or None for full attention. `scale` multiplies q.k before the softmax.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    scale: float
    windows: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class JsonSchema:
    """The text is one JSON value that the schema, itself JSON text, allows. Properties come in the schema's order."""

    text: str


@dataclass(frozen=True, slots=True)
class Regex:
    """The text matches the regular expression from end to end."""

    text: str


@dataclass(frozen=True, slots=True)
class Choice:
    """The text is one of these."""

    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FreeGrammar:
    """The text follows a grammar in Lark's notation (from its rule `start`) or in GBNF (from `root`)."""

    text: str


@dataclass(frozen=True, slots=True)
class Tag:
    """`begin`, then a JSON value that `schema` (JSON text) allows, then `end`. Names of control tokens in the two
    literal texts stand for these tokens."""

    begin: str
    schema: str
    end: str


@dataclass(frozen=True, slots=True)
class TaggedJson:
    """Calls of tools: any one of `tags`, or with `several` any number of them, `separator` between.

    Without `trigger` the text is that and nothing else, at least one. With it, free text may come before, between and
    after, also alone; but `trigger`, with which every `begin` begins, starts a tag wherever it stands.
    """

    tags: tuple[Tag, ...]
    several: bool = False
    separator: str = ""
    trigger: str = ""


@dataclass(frozen=True, slots=True)
class Either:
    """The text is what one of these says."""

    options: tuple[Constraint, ...]


@dataclass(frozen=True, slots=True)
class Behind:
    """Free text up to `close`, and behind it what `inner` says; a model thinks before it answers.

    `open` is what the free text begins with, and then it may also be missing; "": the text begins within it.
    """

    inner: Constraint
    open: str
    close: str


Constraint = JsonSchema | Regex | Choice | FreeGrammar | TaggedJson | Either | Behind
"""What a generated text must be."""


class Grammar(Protocol):
    """A compiled constraint, made by `runner/grammar.py`, which alone knows what is inside."""

    def start(self) -> Any: ...


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. Validated at the API's edge; here every value is in range.

    `temperature == 0` is greedy. `top_k == 0` and `top_p == 1` and `min_p == 0` switch the filters off.
    `stop_token_ids` already holds the model's EOS ids unless the client asked to ignore them.
    `logprobs` / `prompt_logprobs`: None for none, else the number of alternatives per token (0: only the token's own).
    `allowed_token_ids`: nothing else is chosen; empty: anything. `bad_sequences`: runs of tokens that the output does
    not complete; none of them is empty.
    `pooling`: what is wanted is no token but the prompt's hidden state, pooled; then `max_tokens` is 0.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    seed: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    allowed_token_ids: Sequence[int] = ()
    bad_sequences: Sequence[Sequence[int]] = ()
    pooling: Pooling | None = None
    grammar: Grammar | None = None

    @property
    def needs_history(self) -> bool:
        """The choice of a token depends on those before it by more than the model."""
        penalties = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0
        return bool(penalties or self.bad_sequences or self.grammar is not None)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities (natural log, of the raw model distribution) of one token and its best alternatives."""

    token: int
    logprob: float
    rank: int
    """1 for the most likely token of the vocabulary."""
    top: Sequence[tuple[int, float]] = ()


@dataclass(frozen=True, slots=True)
class Retention:
    """What a client says about the future of its blocks.

    `transient`: they should not outlive the process, so they are not written to SSD. `session`: more of this
    conversation will come, so they count as used twice from the start. `keep_s`: they stay in the lowest tier for that
    long, within the share that pins may hold.
    """

    transient: bool = False
    session: bool = False
    keep_s: float = 0.0


ORDINARY = Retention()


@dataclass(frozen=True, slots=True)
class Targets:
    """How long a request may take, in seconds: to its first token, and per token after it on average; inf: any time."""

    ttft_s: float = inf
    tpot_s: float = inf


NO_TARGETS = Targets()


@dataclass(frozen=True, slots=True)
class ServiceClass:
    """Whose a request is, and how urgent. `tenant`: by its API key, empty where there are none. `background`: it only
    fills what others leave idle."""

    tenant: str = ""
    priority: int = 0
    background: bool = False
    targets: Targets = NO_TARGETS

    def met(self, ttft_s: float, tpot_s: float | None, *, failed: bool) -> dict[str, bool]:
        """By target that a request of it has, if it is not in the background: was it met? One that `failed` met none;
        who left before a first token was late has seen no target missed."""
        met: dict[str, bool] = {}
        if not self.background and self.targets.ttft_s < inf:
            met["ttft"] = not failed and ttft_s <= self.targets.ttft_s
        if not self.background and self.targets.tpot_s < inf:
            met["tpot"] = not failed and (tpot_s is None or tpot_s <= self.targets.tpot_s)
        return met


ONLINE = ServiceClass()


@dataclass(frozen=True, slots=True)
class CacheLimit:
    """Of one tenant in one tier, in blocks. `floor`: up to so many do not go for others. `quota`: what it has beyond it
    goes first; None: it may have all."""

    floor: int = 0
    quota: int | None = None


@dataclass(slots=True)
class SampleSpec:
    """Sample one token after this row. `history` is every token before it; it does not change while the step runs, but
    that of a row that follows another step grows by the token it is fed: `params.needs_history` is false there.

    `position` is the index that the sampled token will have: with `params.seed` it names the random draw, so the same
    seed gives the same token whatever else is in the batch and however often the request was preempted.
    """

    params: SamplingParams
    position: int
    prompt_tokens: int
    history: Sequence[int]

    @property
    def generated(self) -> int:
        return self.position - self.prompt_tokens


@dataclass(slots=True)
class StepRow:
    """One request's share of a step: feed `tokens`, whose first has position `start`.

    `frames` is an int32 view of the request's block table, covering at least `start + len(tokens)` tokens.
    `prompt_logprobs`: number of alternatives wanted for every *following prompt token* of the fed ones, or None; then
    `targets` are the tokens that follow each fed token (one shorter when the prompt ends in this row).
    `follows`: `tokens` is one placeholder, for the token that the step before this one samples for this request.
    """

    request_id: RequestId
    tokens: array[int]
    start: int
    frames: npt.NDArray[np.int32]
    sample: SampleSpec | None = None
    prompt_logprobs: int | None = None
    targets: array[int] | None = None
    pool: Pool | None = None
    follows: bool = False


@dataclass(frozen=True, slots=True)
class Pool:
    """What to do with the hidden states of a row's tokens, after the final norm: add them to the request's own sum
    (`mean`), and give the vector out if the prompt ends in this row (`ends`)."""

    pooling: Pooling
    ends: bool


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward pass. `retired`: drop what is kept for these requests; they are over, or were preempted and will come
    again with their whole history.
    """

    id: int
    rows: Sequence[StepRow]
    retired: Sequence[RequestId] = ()

    @property
    def tokens(self) -> int:
        return sum(len(row.tokens) for row in self.rows)


@dataclass(frozen=True, slots=True)
class StepResult:
    """Outcome of one plan, aligned with its rows: the sampled token (None where the row samples nothing).

    `ends`: rows whose grammar ends the request, STOP where the text is complete and ERROR where it cannot go on; a
    token of None then says that none belongs to the text any more. `pooled`: the vectors, float32 [hidden], by the
    position of the row that a pooled prompt ended in.
    """

    id: int
    tokens: Sequence[int | None]
    logprobs: Sequence[TokenLogprobs | None]
    prompt_logprobs: Sequence[Sequence[TokenLogprobs] | None]
    started_s: float
    finished_s: float
    pooled: Mapping[int, Vector] = field(default_factory=dict)
    ends: Mapping[int, FinishReason] = field(default_factory=dict)


class StepRunner(Protocol):
    """Runs plans in the order in which they come. Real: one device thread; simulated: an oracle model on the virtual
    clock.

    The caller guarantees: frames of the plan stay reserved until what `run` gives is done; at most one plan comes while
    another runs. The runner guarantees: it is done only when the step no longer touches any frame. `StepFailed` is
    raised when the step produced nothing; then a step with rows that follow it fails, too.
    """

    def run(self, plan: StepPlan) -> Awaitable[StepResult]:
        """Starts with the plan at once, not when it is awaited."""
        ...

    async def aclose(self) -> None: ...


@dataclass(slots=True)
class TokenEvent:
    """What one commit tells one stream: at most one new token, and whether the request is over."""

    request_id: RequestId
    token: int | None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: Sequence[TokenLogprobs] | None = None
    finish: FinishReason | None = None
    error: str | None = None
    pooled: Vector | None = None


@dataclass(frozen=True, slots=True)
class Transfer:
    """One block in flight between two tiers. Never cancelled, only completed: until then both frames are its own."""

    id: int
    hash: BlockHash
    source: tuple[TierName, FrameId]
    target: tuple[TierName, FrameId]
    planned_s: float
    parent: BlockHash | None = None
    """Hash of the block before this one in its chain; None for a first block."""
    depth: int = 0
    """Blocks before this one in its chain."""
    tenant: str = ""
    """Whose block it is, as far as that is known; what outlives the process remembers it."""


@dataclass(frozen=True, slots=True)
class Note:
    """What a tier that outlives the process should remember about block `hash` in `frame`, beyond its bytes.

    `touch`: it was just used, and so was every block before it in its chain. `drop`: it is not there any more.
    `pin`: it is kept until `until_s`, Unix time in seconds; 0 ends that.
    """

    kind: Literal["touch", "drop", "pin"]
    hash: BlockHash
    frame: FrameId
    until_s: float = 0.0


@dataclass(slots=True)
class TierLife:
    """How blocks fare in one tier, since the start: the very numbers that are counted with. Some are of one block in
    eight, see `kvcache/lives.py`."""

    eviction_age_s: Histogram = field(default_factory=lambda: Histogram(AGE_S))
    """Last use to eviction for want of room."""
    lifetime_s: Histogram = field(default_factory=lambda: Histogram(AGE_S))
    reuse_gap_s: Histogram = field(default_factory=lambda: Histogram(AGE_S))
    evict_to_reuse_s: Histogram = field(default_factory=lambda: Histogram(AGE_S))
    ghost_hit_blocks: int = 0
    """Asked for, and would have been here if the tier had twice the size: an estimate."""
    restore_s: Histogram = field(default_factory=lambda: Histogram(MOVE_S))
    """From admission to having all on the device, of requests for which this was the slowest tier."""
    avoided_s: float = 0.0
    """What hits of this tier would have cost to compute, as steps were measured."""
    held_up_s: float = 0.0
    """How long requests waited for loads from this tier and did nothing else."""


@dataclass(frozen=True, slots=True)
class TierReport:
    """One tier at one moment, counters since the start. Blocks: `referenced` are held, `cached` could be evicted."""

    name: TierName
    up: bool
    capacity_blocks: int
    free_blocks: int
    cached_blocks: int
    referenced_blocks: int
    in_flight_blocks: int
    evicted: Mapping[str, int]
    """By reason: `capacity`, `corrupt`, `admin`."""
    declined: Mapping[str, int]
    """Blocks that were here and were computed all the same: `slower_than_recompute`, `disabled`."""
    breaker_opened: int
    life: TierLife = field(default_factory=TierLife)


@dataclass(frozen=True, slots=True)
class HopReport:
    """Blocks moving one way between two neighbouring tiers, counters since the start."""

    source: TierName
    target: TierName
    moved_blocks: int
    in_flight_blocks: int
    waiting_blocks: int
    busy_s: float
    block_s: float
    """Measured seconds per block while busy."""
    failed: Mapping[str, int]
    duration_s: Histogram = field(default_factory=lambda: Histogram(MOVE_S))
    """Start to landing of a block; the very one that is counted with."""


@dataclass(frozen=True, slots=True)
class KvReport:
    """The whole cache at one moment, fastest tier first."""

    block_bytes: int
    block_tokens: int
    tiers: Sequence[TierReport]
    hops: Sequence[HopReport]
    admissions: Mapping[TierName, Mapping[str, int]]
    """Of blocks on their way down to a tier: `admit`, `reject_cold`, `reject_wear`, `no_room`."""
    recovered_blocks: int
    pinned_blocks: int
    owned: Mapping[str, Mapping[TierName, int]] = field(default_factory=dict)
    """Blocks by tenant and tier, of tenants that were named."""
    prefetched: Mapping[str, int] = field(default_factory=dict)
    """Blocks that were fetched before a request needed them: `useful`, `late`, `wasted`, `cancelled`."""


@dataclass(frozen=True, slots=True)
class SpanReport:
    """Neighbouring blocks of one chain that lie in the same tier, and what a request would do with them."""

    tier: TierName | None
    """None: they are nowhere."""
    blocks: int
    decision: str
    """`use` (on the device), `load`, `split` (compute the front while loading the rest), `compute`."""
    reason: str
    load_s: float
    compute_s: float


DIGEST_BYTES = 16
"""Of a block's checksum."""
LEFT, MOVED, REFUSED = range(3)
"""What became of a block: its target holds anything; it is there; it was not what it should be, and did not go."""


class Moved(NamedTuple):
    """Of each block its state, and the checksum that it has or should have, 16 bytes. `error`: why some are `LEFT`."""

    states: bytes
    digests: bytes
    error: OSError | None

    def digest(self, block: int) -> bytes:
        return self.digests[block * DIGEST_BYTES : (block + 1) * DIGEST_BYTES]


@dataclass(frozen=True, slots=True)
class TierFault:
    """The world's error in one transfer: what happened, in words for the log. Returned, never raised."""

    reason: str
    """`io`, `corrupt`, `no_space` or `timeout`."""
    detail: str = ""
