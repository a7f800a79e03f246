"""First come, first served: by arrival, so that a preempted request returns to the head of the queue."""

from __future__ import annotations

from server.scheduler.request import Request


class FirstComeFirstServed:
    def rank(self, request: Request) -> tuple[float, int]:
        return request.arrival_s, request.id

    def outranks(self, waiting: Request, running: Request) -> bool:
        return False
