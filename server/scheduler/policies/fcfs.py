"""First come, first served: by arrival, so that a preempted request returns to the head of the queue."""

from __future__ import annotations

from server.scheduler.policy import Rank, SchedulingPolicy
from server.scheduler.request import Request


class FirstComeFirstServed(SchedulingPolicy):
    def rank(self, request: Request) -> Rank:
        return request.arrival_s, request.id
