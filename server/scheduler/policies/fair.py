"""Weighted fair sharing of the device's time between tenants, by start-time fair queueing (Goyal, Vin and Cheng 1996).

Every tenant has an account of the work that was done or is waiting for it, divided by its weight; a request ranks by
what the account held before it. The clock of the accounts is that of the requests that are being served. A tenant that
asks for less than its share falls behind that clock, by `CREDIT_S` at most, and what it is behind is credit: its
requests go before everybody's who takes more than a share, so a flood of others' does not slow a modest tenant down.

When nobody waits for a first token, everybody has what was asked for, and all accounts are even again. Else a flood
that comes after silence would have all the credit, and go before the modest tenant who was there all the time.

Work is what a prompt costs beyond the cache; what the answer cost is added when it is over.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf

from server.scheduler.policy import EVEN, Rank, SchedulingPolicy
from server.scheduler.request import Request

CREDIT_S = 60.0
"""Seconds of the device that a tenant of weight 1 can save up; one of weight 3 three times as many."""
STEP_S = 0.2
"""How long a step may take that computes a prompt of a tenant who has asked for more than another. A step of 8,192
tokens takes 0.3 s, behind 100,000 others 1.5 s, and whoever comes meanwhile waits for its end."""


class WeightedFair(SchedulingPolicy):
    def __init__(self, weights: Mapping[str, float] = EVEN) -> None:
        super().__init__(weights)
        self._clock = 0.0
        self._account: dict[str, float] = {}
        self._unserved = 0
        """How many requests wait for their first token. Not those in the background, whose queue may never end."""

    def rank(self, request: Request) -> Rank:
        tenant = request.service.tenant
        start = max(self._clock - CREDIT_S, self._account.get(tenant, -inf))
        return start, request.arrival_s, request.id

    def outranks(self, waiting: Request, running: Request) -> bool:
        """Even after it was served, its tenant would have had less than the other's before."""
        if waiting.service.tenant == running.service.tenant:
            return False
        after = waiting.rank[1][0] + self._cost(waiting)
        return after < running.rank[1][0]

    def step_s(self, request: Request) -> float:
        own = self._account.get(request.service.tenant, -inf)
        return STEP_S if any(asked < own for asked in self._account.values()) else inf

    def queued(self, request: Request) -> None:
        self._account[request.service.tenant] = request.rank[1][0] + self._cost(request)
        self._unserved += not request.service.background

    def started(self, request: Request) -> None:
        self._clock = max(self._clock, request.rank[1][0])

    def served(self, request: Request) -> None:
        self._unserved -= not request.service.background
        if not self._unserved:
            self._account.clear()

    def ended(self, request: Request, decode_s: float) -> None:
        tenant = request.service.tenant
        if request.first_token_s is None:
            self.served(request)
        if tenant in self._account:
            self._account[tenant] += decode_s / self._weight(tenant)

    def _cost(self, request: Request) -> float:
        return request.work_s / self._weight(request.service.tenant)

    def _weight(self, tenant: str) -> float:
        return self.weights.get(tenant, 1.0)
