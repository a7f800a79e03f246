"""The scheduling seam: who goes first, who goes last.

`rank` orders: the lowest is admitted first, gets its part of a step first and is preempted last. It is asked for once,
when a request comes, and kept in `request.rank`, so that queues stay in order by insertion and a step costs nothing per
waiting request. Whatever a policy has to learn beside that, it is told by `queued`, `started`, `served` and `ended`.

Background requests rank behind all others and give way to all others; policies need not know of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from math import inf
from types import MappingProxyType
from typing import Any

from server.registry import resolve
from server.scheduler.request import Request

Rank = tuple[Any, ...]

POLICIES = {
    "deadline": "server.scheduler.policies.deadline:EarliestDeadline",
    "fair": "server.scheduler.policies.fair:WeightedFair",
    "fcfs": "server.scheduler.policies.fcfs:FirstComeFirstServed",
    "prefix": "server.scheduler.policies.prefix:SharedPrefixTogether",
    "priority": "server.scheduler.policies.priority:Priority",
    "spf": "server.scheduler.policies.spf:ShortestPrefillFirst",
}
EVEN: Mapping[str, float] = MappingProxyType({})
"""All tenants weigh 1."""


class SchedulingPolicy(ABC):
    """Ranks requests. Loop thread only, no clock of its own; all seconds are those of the scheduler's."""

    def __init__(self, weights: Mapping[str, float] = EVEN) -> None:
        """`weights`: of tenants that do not weigh 1."""
        self.weights = weights

    @abstractmethod
    def rank(self, request: Request) -> Rank:
        """A place that no other request has. `work_s`, `hashes` and `arrival_s` of the request are known. Pure."""

    def outranks(self, waiting: Request, running: Request) -> bool:
        """May `waiting` take the place of `running`? False for two requests of which `rank` prefers the latter."""
        del waiting, running
        return False

    def overtakes(self, waiting: Request, running: Request) -> bool:
        """May `waiting` be computed before what is left of the prompt of `running`, which keeps its blocks? Only if it
        outranks it."""
        return self.outranks(waiting, running)

    def step_s(self, request: Request) -> float:
        """How long a step may take that computes this prompt: who outranks it and comes meanwhile waits for its end."""
        del request
        return inf

    def late(self, request: Request, done_s: float) -> Rank | None:
        """`request`, whose turn it is, gets its first token at `done_s` at the earliest: a worse rank, or None to go
        on. No request may be put back more often than once."""
        del request, done_s
        return None

    def queued(self, request: Request) -> None:  # noqa: B027 - most policies do not care
        """`request` was taken, with the rank that it was given."""

    def started(self, request: Request) -> None:  # noqa: B027 - most policies do not care
        """`request` was admitted, for the first time or again."""

    def served(self, request: Request) -> None:  # noqa: B027 - most policies do not care
        """`request` got its first token."""

    def ended(self, request: Request, decode_s: float) -> None:  # noqa: B027 - most policies do not care
        """`request` is over; its answer took about `decode_s` of the device's time."""


def make_policy(name: str, weights: Mapping[str, float] = EVEN) -> SchedulingPolicy:
    """A fresh policy by its name in `POLICIES`; ConfigError names the ones there are."""
    policy: SchedulingPolicy = resolve("scheduler.policy", POLICIES, name)(weights)
    return policy
