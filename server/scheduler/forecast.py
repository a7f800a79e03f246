"""What a request will cost and when it will be served, as far as that is known when it comes. Pure, loop thread only.

A queue of prompts is worked off at the pace that steps were measured to have, while those that decode take their part
of every step. What nobody can know is left out: who will come and go before, and how long answers will be.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import islice

from server.kvcache.manager import KVManager
from server.scheduler.request import Request
from server.types import BlockHash


def prompt_work_s(kv: KVManager, prompt_tokens: int, reusable: Sequence[BlockHash]) -> float:
    """Seconds of the device for what is not cached of a prompt, in whichever tier, in one step."""
    step = kv.planner.step
    cached = _known(kv, reusable) * kv.layout.block_tokens
    return step.base_s + step.tokens_s(cached, prompt_tokens - cached)


def left_s(kv: KVManager, request: Request) -> float:
    """Seconds of the device until a running request's prompt is computed, steps not counted."""
    return kv.planner.step.tokens_s(request.computed_tokens, request.lacking) if request.lacking > 1 else 0.0


def ttft_s(
    kv: KVManager, request: Request, reusable: Sequence[BlockHash], waiting: Sequence[Request],
    running: Sequence[Request], step_tokens: int,
) -> float:  # fmt: skip
    """Seconds from now to the first token of `request`, which ranks somewhere in `waiting`, in order of rank.

    All that ranks before it is computed first, in steps of `step_tokens`, of which each also carries what decodes; its
    own blocks come up from lower tiers meanwhile.
    """
    position = bisect_left(waiting, request.rank, key=lambda other: other.rank)
    prompts = [other for other in running if other.lacking > 1 and other.rank < request.rank]
    ahead_s = sum(left_s(kv, other) for other in prompts)
    ahead_s += sum(_in_company_s(kv, other) for other in islice(waiting, position))
    own_s = _in_company_s(kv, request)
    tokens_s, each_s = _step_s(kv, running, request.service.background, step_tokens)
    steps = max(1.0, (ahead_s + own_s) / tokens_s) if tokens_s else 1.0
    return max(ahead_s, _load_s(kv, reusable)) + own_s + steps * each_s


def stretch(kv: KVManager, running: Sequence[Request], background: bool, step_tokens: int) -> float:
    """How long a second's work on prompts takes, in steps of `step_tokens` that also carry what decodes."""
    tokens_s, each_s = _step_s(kv, running, background, step_tokens)
    return 1 + each_s / tokens_s if tokens_s else 1.0


def _step_s(kv: KVManager, running: Sequence[Request], background: bool, step_tokens: int) -> tuple[float, float]:
    """Seconds of a full step: its prompt tokens, and what it takes beside them."""
    step = kv.planner.step
    decodes = [other for other in running if other.lacking == 1 and other.service.background <= background]
    each_s = step.base_s + sum(step.decode_s(other.computed_tokens) for other in decodes)
    return step.tokens_s(0, step_tokens), each_s


def _in_company_s(kv: KVManager, request: Request) -> float:
    """The device time of a waiting request's prompt, without the step that it shares with others."""
    return max(0.0, request.work_s - kv.planner.step.base_s)


def _known(kv: KVManager, hashes: Sequence[BlockHash]) -> int:
    """How many leading blocks are cached somewhere. As a child is not kept without its parent, by halving."""
    return bisect_left(hashes, True, key=lambda value: not kv.knows(value))


def _load_s(kv: KVManager, hashes: Sequence[BlockHash]) -> float:
    """Until what is cached below the device is on it."""
    known = _known(kv, hashes)
    above = bisect_left(hashes, True, hi=known, key=lambda value: not kv.device.has(value))
    if above == known:
        return 0.0
    level = kv.traffic.level_of(hashes[known - 1])
    return kv.planner.load_s(level, known - above, kv.traffic.queued()) if level else 0.0
