"""By the request's priority, lower first, then by arrival. A better priority takes a worse one's place."""

from __future__ import annotations

from server.scheduler.request import Request


class Priority:
    def rank(self, request: Request) -> tuple[int, float, int]:
        return request.priority, request.arrival_s, request.id

    def outranks(self, waiting: Request, running: Request) -> bool:
        return waiting.priority < running.priority
