"""Earliest deadline first, by the latest moment at which a request can start and still meet its target.

A request that comes to its turn too late for that is put back once, with a deadline far away: serving it would help
nobody and make the next one late as well, which is how first-come-first-served collapses under overload. Without a
target the deadline is far away from the start.
"""

from __future__ import annotations

from math import inf

from server.scheduler.policy import Rank, SchedulingPolicy
from server.scheduler.request import Request

PATIENCE_S = 600.0
"""The deadline of those who have none, and of those who missed theirs."""


class EarliestDeadline(SchedulingPolicy):
    def rank(self, request: Request) -> Rank:
        target_s = request.service.targets.ttft_s
        wait_s = PATIENCE_S if target_s == inf else target_s
        return request.arrival_s + wait_s - request.work_s, request.arrival_s, request.id

    def late(self, request: Request, done_s: float) -> Rank | None:
        target_s = request.service.targets.ttft_s
        served = request.first_token_s is not None  # and preempted since: its target is behind it
        if served or done_s <= request.arrival_s + target_s or request.rank[1] != self.rank(request):
            return None
        return request.arrival_s + max(PATIENCE_S, target_s), request.arrival_s, request.id
