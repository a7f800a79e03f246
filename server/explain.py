"""Why one request took as long as it did: where its prompt came from, what was decided about each tier, and how long
each phase was. Kept for the last few hundred requests, and handed on as a trace where that is wanted.

Loop thread. Ids, hashes and numbers only: no prompt, no answer, no key.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from server.types import SpanReport, TierName

PHASES = ("queue", "kv_restore", "prefill", "decode")


@dataclass(frozen=True, slots=True)
class Explanation:
    """One sequence that ended. Seconds without a word about them are the engine's clock.

    `request_id` is the API's, which several sequences may share; `trace_parent` what came with it, for the trace.
    `first_s` and `admitted_s` are None where it did not come to that. `served`: prompt tokens from the cache, by tier;
    `missed`: prompt tokens that were cached and computed all the same, by reason. `decisions`: of what lay below the
    device when it was admitted. `landed_s`: when the last block from each tier came.
    """

    request_id: str
    trace_parent: str
    sequence: int
    tenant: str
    arrival_s: float
    admitted_s: float | None
    first_s: float | None
    ended_s: float
    finish: str
    error: bool
    background: bool
    preemptions: int
    prompt_tokens: int
    generated_tokens: int
    block_tokens: int
    served: Mapping[TierName, int]
    missed: Mapping[str, int]
    decisions: Sequence[SpanReport]
    landed_s: Mapping[TierName, float]
    phases_s: Mapping[str, float]
    predicted_ttft_s: float
    first_block: str
    last_block: str

    @property
    def total_s(self) -> float:
        return self.ended_s - self.arrival_s

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_s is None else self.first_s - self.arrival_s

    def report(self, wall_offset_s: float) -> dict[str, Any]:
        """As JSON. `wall_offset_s`: from the engine's clock to Unix time."""
        computed = self.prompt_tokens - sum(self.served.values())
        return {
            "request_id": self.request_id,
            "sequence": self.sequence,
            "tenant": self.tenant,
            "arrived_at": round(self.arrival_s + wall_offset_s, 3),
            "finish_reason": self.finish,
            "background": self.background,
            "preemptions": self.preemptions,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.generated_tokens,
            "prompt_tokens_by_source": {"computed": computed, **self.served},
            "cached_but_computed_tokens": dict(self.missed),
            "decisions": [self._decision(span) for span in self.decisions],
            "phases_s": {phase: round(seconds, 6) for phase, seconds in self.phases_s.items()},
            "ttft_s": None if self.ttft_s is None else round(self.ttft_s, 6),
            "predicted_ttft_s": round(self.predicted_ttft_s, 6),
            "total_s": round(self.total_s, 6),
            "first_block": self.first_block,
            "last_block": self.last_block,
        }

    def _decision(self, span: SpanReport) -> dict[str, Any]:
        return {
            "tier": span.tier,
            "tokens": span.blocks * self.block_tokens,
            "decision": span.decision,
            "reason": span.reason,
            "load_s": round(span.load_s, 6),
            "compute_s": round(span.compute_s, 6),
        }

    def stretches(self) -> Iterator[tuple[str, float, float]]:
        """What it did from when to when: `queue`, `load TIER`, `prefill`, `decode`. Loads and prefill may overlap."""
        moments = [self.arrival_s, self.admitted_s, self.first_s]
        edges = [*(moment for moment in moments if moment is not None), self.ended_s]
        for name, (start_s, end_s) in zip(("queue", "prefill", "decode"), pairwise(edges), strict=False):
            yield name, start_s, end_s
        if self.admitted_s is not None:
            yield from ((f"load {tier}", self.admitted_s, landed_s) for tier, landed_s in self.landed_s.items())


class Explanations:
    """The last `kept` of them; none where that is 0. Each is told to `sink`, too, where there is one."""

    def __init__(self, kept: int, wall_offset_s: float, sink: Callable[[Explanation], None] | None = None) -> None:
        self._ring: deque[Explanation] = deque(maxlen=kept)
        self._sink = sink
        self.wall_offset_s = wall_offset_s

    @property
    def wanted(self) -> bool:
        return self._sink is not None or self._ring.maxlen != 0

    def add(self, one: Explanation) -> None:
        self._ring.append(one)
        if self._sink is not None:
            self._sink(one)

    def find(self, request_id: str) -> list[Explanation]:
        """All sequences of one request, oldest first."""
        return [one for one in self._ring if one.request_id == request_id]

    def latest(self, count: int) -> list[Explanation]:
        """Newest first."""
        return list(reversed(self._ring))[:count]

    def slowest(self, count: int) -> list[Explanation]:
        """By time to the first token, slowest first; those that never had one by their whole time."""
        return sorted(self._ring, key=_slowness, reverse=True)[:count]


def _slowness(one: Explanation) -> float:
    return one.total_s if one.ttft_s is None else one.ttft_s
