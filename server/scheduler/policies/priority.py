"""By the request's priority, lower first, then by arrival. A better priority takes a worse one's place."""

from __future__ import annotations

from server.scheduler.policy import Rank, SchedulingPolicy
from server.scheduler.request import Request


class Priority(SchedulingPolicy):
    def rank(self, request: Request) -> Rank:
        return request.service.priority, request.arrival_s, request.id

    def outranks(self, waiting: Request, running: Request) -> bool:
        return waiting.service.priority < running.service.priority
