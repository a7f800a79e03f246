"""The scheduling seam: who goes first, who goes last. Pure functions of requests.

`rank` orders: the lowest is admitted first and preempted last. It must not change while a request lives, so that
queues are kept in order by insertion and a step costs nothing per waiting request. `outranks` says whether a waiting
request may take a running one's place; it must be false for two requests of which `rank` prefers the running one.
"""

from __future__ import annotations

from typing import Any, Protocol

from server.registry import resolve
from server.scheduler.request import Request

POLICIES = {
    "fcfs": "server.scheduler.policies.fcfs:FirstComeFirstServed",
    "priority": "server.scheduler.policies.priority:Priority",
}


class SchedulingPolicy(Protocol):
    def rank(self, request: Request) -> Any: ...
    def outranks(self, waiting: Request, running: Request) -> bool: ...


def make_policy(name: str) -> SchedulingPolicy:
    """A fresh policy by its name in `POLICIES`; ConfigError names the ones there are."""
    policy: SchedulingPolicy = resolve("scheduler.policy", POLICIES, name)()
    return policy
