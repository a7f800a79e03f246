"""Where the time up to a request's first token goes, seen from outside: from the steps that run and the requests that
are not in them. Nothing in the production code knows that it is watched.

The causes sum to the time to first token. The scheduler plans in no time, so all time is either that of a step or that
of the device at rest; at rest, whoever was admitted waits for blocks, or the scheduler would have planned a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from server.scheduler.request import Request
from server.scheduler.scheduler import Scheduler
from server.types import RequestId, StepPlan

CAUSES = {
    "queue": "not admitted yet: on its way in, no place, no room, or somebody else computes its prefix",
    "loading": "admitted, but in no step: its blocks are on their way up",
    "turn": "admitted, but in no step: others filled it",
    "computing": "in a step, however small its part of it",
    "preempted": "from when its blocks were taken to when it computes or loads again",
}


@dataclass(slots=True)
class _Account:
    """Of one request: what is known of it up to `seen_s`."""

    seen_s: float
    preemptions: int
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CAUSES, 0.0))

    def spend(self, cause: str, until_s: float) -> None:
        self.seconds[cause] += until_s - self.seen_s
        self.seen_s = until_s


class Stalls:
    """`start` and `end` around every step, with the same clock as the scheduler's; then `of` a finished request."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.idle_s = 0.0
        """How long the device rested while admitted requests waited for their blocks."""
        self._scheduler = scheduler
        self._accounts: dict[RequestId, _Account] = {}
        self._in_step: list[tuple[_Account, str]] = []
        self._free_s = 0.0

    def start(self, plan: StepPlan, now: float) -> None:
        """A step was planned and starts."""
        running = self._scheduler.running
        if now > self._free_s:
            admitted_s = min(request.admitted_s or 0.0 for request in running)
            self.idle_s += now - max(self._free_s, admitted_s)
        first = [request for request in running if request.first_token_s is None]
        if first:
            rows = {row.request_id for row in plan.rows}
            self._in_step = [(self._account(request, now), _cause(request, rows)) for request in first]

    def end(self, now: float) -> None:
        """The step is over, its tokens not yet handed out."""
        for account, cause in self._in_step:
            account.spend(cause, now)
        self._in_step = []
        self._free_s = now

    def of(self, request: Request) -> Mapping[str, float]:
        """Seconds by cause, up to its first token."""
        return self._accounts[request.id].seconds

    def _account(self, request: Request, now: float) -> _Account:
        """Up to `now`: if time has passed since the last step, it was preempted or waited for its blocks at rest."""
        account = self._accounts.get(request.id)
        if account is None:
            account = self._accounts[request.id] = _Account(request.arrival_s, request.preemptions)
            account.spend("queue", request.admitted_s or request.arrival_s)
        if request.preemptions > account.preemptions:
            account.preemptions = request.preemptions
            account.spend("preempted", now)
        else:
            account.spend("loading", now)
        return account


def _cause(request: Request, rows: set[RequestId]) -> str:
    if request.id in rows:
        return "computing"
    return "loading" if request.lease is not None and request.lease.loading else "turn"
