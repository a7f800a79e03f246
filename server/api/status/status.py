"""The one sampler behind /status, the live page and `terrace top`. Loop thread.

Once a second it copies a page of the metrics, keeps what only grows for a minute, and one point of 19 numbers for a
quarter of an hour: 0.6 ms a second, 0.4 MB in all. JSON is made when somebody asks (0.3 ms), once a second however many
do.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import asdict
from typing import Any

from server.api.status.counters import Counters, counters_of
from server.api.status.moment import COLUMNS, Moment, hops_of, rounded, tiers_of
from server.api.status.ring import Ring
from server.api.status.verdict import DAY_S, verdicts
from server.api.status.warnings import WarningLog
from server.errors import Overloaded
from server.metrics import Metrics
from server.metrics.page import Page

log = logging.getLogger("terrace.status")

INTERVAL_S = 1.0
RING_POINTS = 900
RECENT_POINTS, MINUTE_POINTS = 10, 60
"""Rates are those of the last ten seconds, or they would jump with every prompt; percentiles those of a minute."""
RETRY_AFTER_S = 10


class Status:
    """`clock`: monotonic seconds. `max_watchers`: streams at once."""

    def __init__(
        self,
        metrics: Metrics,
        model_name: str,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        *,
        max_watchers: int,
        warnings: WarningLog | None = None,
    ) -> None:
        self.warnings = warnings or WarningLog()
        self.watchers = 0
        self.ticks = 0
        """How often it was sampled; the number of the newest sample."""
        self._metrics = metrics
        self._model_name = model_name
        self._clock = clock
        self._wall_clock = wall_clock
        self._max_watchers = max_watchers
        self._started_s = wall_clock()
        self._over = False
        self._ring = Ring(COLUMNS, RING_POINTS)
        self._counters: deque[Counters] = deque(maxlen=MINUTE_POINTS + 1)
        self._today = (0, 0.0)
        """The day (since 1970, UTC) and what had been written to SSD when it began, or when we did."""
        self._ticked = asyncio.Event()
        self._shown = self._history = (0, b"")
        """JSON, with the number of the sample that it was made of."""
        self.moment = self.sample()

    async def run(self) -> None:
        """Sample until cancelled; then nobody watches any more."""
        try:
            while True:
                left_s = INTERVAL_S - self._wall_clock() % INTERVAL_S
                # On the full second, which makes for even steps; a timer that fired too early must not make two of one.
                await asyncio.sleep(left_s if left_s > INTERVAL_S / 2 else left_s + INTERVAL_S)
                self.sample()
        except Exception:
            log.exception("the live page stands still until the next start")
            raise
        finally:
            self._over = True
            self._ticked.set()

    def sample(self) -> Moment:
        """Look now, and wake who watches."""
        page = self._metrics.page()
        now = counters_of(page, self._clock())
        before = self._counters[-1] if self._counters else now
        self._counters.append(now)
        self.moment = self._moment(page, now)
        point = self.moment.point(now.since(before))
        self._ring.add(round(self.moment.time_s, 1), {name: rounded(value) for name, value in point.items()})
        self.ticks += 1
        ticked, self._ticked = self._ticked, asyncio.Event()
        ticked.set()
        return self.moment

    def _moment(self, page: Page, now: Counters) -> Moment:
        wall_s = self._wall_clock()
        day = int(wall_s // DAY_S)
        if self._today[0] != day:
            self._today = day, now.written_bytes
        waiting = {labels[-1]: int(count) for labels, count in page.rows("requests_waiting")}
        loading = waiting.pop("kv_restore", 0)
        kept = self._counters
        return Moment(
            time_s=wall_s,
            uptime_s=wall_s - self._started_s,
            state=next((labels[-1] for labels, is_so in page.rows("state") if is_so), "starting"),
            running=int(page.value("requests_running")),
            loading=loading,
            waiting=sum(waiting.values()),
            tiers=tiers_of(page),
            hops=hops_of(page),
            recent=now.since(kept[max(0, len(kept) - 1 - RECENT_POINTS)]),
            minute=now.since(kept[0]),
            today_bytes=now.written_bytes - self._today[1],
            today_since_s=max(day * DAY_S, self._started_s),
            faults=self._ring.sum("failed"),
            has_ssd=bool(page.rows("ssd_written_bytes_total")),
        )

    def shown(self) -> bytes:
        """The newest sample as a JSON object; nothing in it is of a single request or tenant."""
        if self._shown[0] != self.ticks:
            self._shown = self.ticks, json.dumps(self._status(), separators=(",", ":")).encode()
        return self._shown[1]

    async def history(self) -> bytes:
        """The ring as a JSON object of columns, oldest first, null where there is no number. 27,000 numbers take 10 ms:
        they are written in another thread."""
        if self._history[0] != self.ticks:
            ticks, columns = self.ticks, self._ring.columns()
            self._history = ticks, await asyncio.to_thread(_columns_json, columns)
        return self._history[1]

    def _status(self) -> dict[str, Any]:
        facts = self._metrics.facts
        known = {"model": self._model_name, "version": facts.version, "interval_s": INTERVAL_S}
        judged = [asdict(verdict) for verdict in verdicts(self.moment, facts)]
        shown = self.moment.shown(facts) | {"verdicts": judged, "watchers": self.watchers}
        return known | shown | {"point": self._ring.last()}

    # --- watching ----------------------------------------------------------------------------------------------------

    def enter(self) -> None:
        """One more watches; say `leave` exactly once. Raises Overloaded."""
        if self.watchers >= self._max_watchers:
            raise Overloaded(
                f"{self.watchers} live pages are open; more with --max-watchers",
                retry_after_s=RETRY_AFTER_S,
                code="too_many_watchers",
            )
        self.watchers += 1

    def leave(self) -> None:
        self.watchers -= 1

    async def numbers(self) -> AsyncGenerator[int, None]:
        """The number of the newest sample, now and whenever there is a newer one, until `run` ends. Who takes long
        skips some."""
        while not self._over:
            seen, ticked = self.ticks, self._ticked
            yield seen
            if self.ticks == seen:
                await ticked.wait()


def _columns_json(columns: Mapping[str, Any]) -> bytes:
    plain = {name: [None if value != value else value for value in column] for name, column in columns.items()}
    return json.dumps(plain, separators=(",", ":")).encode()
