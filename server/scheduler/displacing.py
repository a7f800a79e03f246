"""Whose blocks are taken back when others need the room. Pure, loop thread only."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from server.kvcache.manager import KVManager
from server.scheduler.request import Request

MOST_DOUBLINGS = 99
"""Of a price: far beyond what any request costs, and within what a float holds."""


def cheapest(kv: KVManager, candidates: Sequence[Request]) -> Request | None:
    """Whose blocks would be back soonest for the room that they give; the last in rank of equals. Each preemption that
    a request has suffered doubles its price, so that it is not the same one again and again."""
    queued = kv.traffic.queued()

    def price(request: Request) -> float:
        assert request.lease is not None
        seconds, frames = kv.price(request.lease, request.computed_tokens, queued)
        return seconds * 2.0 ** min(request.preemptions, MOST_DOUBLINGS) / frames if frames else inf

    return min(reversed(candidates), key=price, default=None)


def room_without(kv: KVManager, others: Sequence[Request]) -> int:
    """Blocks that there would be room for at most if all these gave theirs back. Where that is too little, to displace
    one of them only costs it what it computed, step after step."""
    return kv.available_blocks + sum(len(other.lease.table) for other in others if other.lease is not None)
