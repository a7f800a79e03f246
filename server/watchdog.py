"""Does the daemon get on? A task on the loop thread that looks once a second, tells systemd, and says once what there
is to see when it does not.

The engine is stuck when there is work and no step ended for `stuck_after_s`; /livez judges by the same. A loop that
stands still cannot look at itself: for that a thread of the interpreter's own waits beside it, and writes the stacks of
all threads when it was not called off in time. No prompt and no token is in what is written.
"""

from __future__ import annotations

import asyncio
import faulthandler
import json
import logging
from itertools import islice
from typing import Any

from server.engine import Engine
from server.notify import Notifier
from server.scheduler.request import Request

log = logging.getLogger("terrace.watchdog")

BEAT_S = 1.0
STDERR = 2
"""The file itself: it can be written to without the interpreter's lock."""
SHOWN_REQUESTS = 32
"""Of those running, and of those waiting, how many the dump shows."""


class Watchdog:
    def __init__(self, stuck_after_s: float, notifier: Notifier, period_s: float = 0.0) -> None:
        """`period_s`: within that systemd wants to hear of us; 0.0: it does not."""
        self._stuck_after_s = stuck_after_s
        self._notifier = notifier
        self._beat_s = min(BEAT_S, period_s / 3) if period_s else BEAT_S
        self._engine: Engine | None = None
        self._said = False

    def watch(self, engine: Engine) -> None:
        """The start is over: from now on the engine has to get on."""
        self._engine = engine

    async def run(self) -> None:
        """Until cancelled."""
        try:
            while True:
                faulthandler.dump_traceback_later(self._stuck_after_s + self._beat_s, file=STDERR)
                self._look()
                await asyncio.sleep(self._beat_s)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _look(self) -> None:
        engine = self._engine
        if engine is None:
            self._notifier.needs(self._stuck_after_s)
            return
        seconds = engine.stuck_s()
        if seconds >= self._stuck_after_s:
            if not self._said:
                self._said = True
                log.error("stuck: no step ended for %.0f s; %s", seconds, json.dumps(describe(engine)))
                dump_stacks()
            return
        if self._said:
            self._said = False
            log.warning("steps end again")
        if engine.state != "failed":
            running, waiting = len(engine.scheduler.running), len(engine.scheduler.waiting)
            self._notifier.alive(f"{engine.state}: {running} requests running, {waiting} waiting")


def dump_stacks() -> None:
    """Where every thread is, to stderr."""
    faulthandler.dump_traceback(file=STDERR, all_threads=True)


def describe(engine: Engine) -> dict[str, Any]:
    """Scheduler and cache in numbers."""
    now = engine.snapshot()
    scheduler = engine.scheduler
    return {
        "state": now.state,
        "running": [_request(request) for request in islice(scheduler.running, SHOWN_REQUESTS)],
        "waiting": [_request(request) for request in islice(scheduler.waiting, SHOWN_REQUESTS)],
        "running_count": now.running,
        "waiting_by_reason": dict(now.waiting_by_reason),
        "stalled_by": engine.kv.stalled_by(),
        "tiers": {
            tier.name: {
                "up": tier.up,
                "blocks": tier.capacity_blocks,
                "free": tier.free_blocks,
                "cached": tier.cached_blocks,
                "referenced": tier.referenced_blocks,
                "in_flight": tier.in_flight_blocks,
            }
            for tier in now.kv.tiers
        },
        "hops": {
            f"{hop.source}->{hop.target}": {
                "in_flight": hop.in_flight_blocks, "waiting": hop.waiting_blocks, "failed": dict(hop.failed),
            }
            for hop in now.kv.hops
        },
    }  # fmt: skip


def _request(request: Request) -> dict[str, Any]:
    lease = request.lease
    return {
        "id": request.id,
        "arrival_s": round(request.arrival_s, 3),
        "prompt_tokens": request.prompt_tokens,
        "computed_tokens": request.computed_tokens,
        "generated": request.generated,
        "blocks": 0 if lease is None else len(lease.table),
        "loading": lease is not None and lease.loading,
        "background": request.service.background,
    }
