"""Shortest prefill first, by what is not cached, with ageing: a second of work counts like so many seconds of waiting.

As a rank that never changes: whoever came `AGEING` seconds earlier may bring a second of work more.
"""

from __future__ import annotations

from server.scheduler.policy import Rank, SchedulingPolicy
from server.scheduler.request import Request

AGEING = 20.0
"""Seconds of waiting that outweigh one second of work."""


class ShortestPrefillFirst(SchedulingPolicy):
    def rank(self, request: Request) -> Rank:
        return request.arrival_s + AGEING * request.work_s, request.id
