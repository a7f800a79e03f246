"""Sends the sessions of a workload when they are due, and watches itself: a late client would measure itself.

Open loop: a session starts at its time whatever became of the others. Closed loop: so many sessions at once, the next
starts when one ends. In both, a request's latency counts from when it was due.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from loadgen.client import Client
from loadgen.records import Outcome, Prompt, Session

Clock = Callable[[], float]
TICK_S = 0.01
LATE_S = 0.005
"""A client whose p99 of lateness or of event-loop lag is above this has measured itself."""
BUSY_SHARE = 0.9
"""Of one core: above this the client was at its limit."""
AHEAD = 8
"""Sessions made in advance, so that making one does not delay another."""


@dataclass(frozen=True)
class Load:
    """How sessions are sent. Open loop when `arrivals` is given or the sessions have times of their own."""

    sessions: Iterator[Session]
    count: int | None
    """Sessions to start; None: until `duration_s` or the workload is over."""
    arrivals: Iterator[float] | None = None
    duration_s: float | None = None
    """No session starts after this; those that run go on to their end."""
    max_concurrency: int | None = None
    """Open loop: requests in flight at once, the others wait and their latency counts it. Closed: sessions at once."""


@dataclass
class Run:
    """What came of one load."""

    outcomes: list[Outcome]
    seconds: float
    """From the first scheduled time to the last end."""
    lag_s: list[float]
    """How late the client's own timer fired, every TICK_S."""
    cpu_share: float
    """Of one core, of this process."""
    timer_s: float = 0.001
    """What a punctual event loop is late by all the same."""
    invalid: list[str] = field(default_factory=list)
    """Why its figures are the client's and not the server's; empty: they are not."""
    interrupted: bool = False
    """It was cancelled: only requests that were over by then are in it."""


class Driver:
    """One run of one load. Loop thread."""

    def __init__(
        self,
        client: Client,
        load: Load,
        clock: Clock = time.perf_counter,
        cpu_clock: Clock = time.process_time,
        progress: Callable[[Driver], None] | None = None,
    ) -> None:
        """`clock` is the one that `client` stamps with."""
        self.outcomes: list[Outcome] = []
        self.in_flight = 0
        self.started = 0
        self._client, self._load = client, load
        self._clock, self._cpu_clock = clock, cpu_clock
        self._progress = progress
        self._start_s = 0.0
        self._lag_s: list[float] = []
        self._gate: asyncio.Semaphore | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None
        self._interrupted = False

    @property
    def now_s(self) -> float:
        """Seconds since the start of the run."""
        return self._clock() - self._start_s

    async def run(self) -> Run:
        """Until every session is over, or until it is cancelled: then what was in flight is given up, and the others
        are the result."""
        source = itertools.islice(self._load.sessions, self._load.count)
        ahead = list(itertools.islice(source, AHEAD))
        open_loop = self._load.arrivals is not None or (bool(ahead) and ahead[0].start_s is not None)
        gc.collect()
        gc.disable()  # what a pause delays would look as if the server had
        self._start_s, cpu_s = self._clock(), self._cpu_clock()
        ticker = asyncio.create_task(self._tick())
        try:
            if open_loop:
                if self._load.max_concurrency:
                    self._gate = asyncio.Semaphore(self._load.max_concurrency)
                await self._open(ahead, source)
            else:
                sessions = itertools.chain(ahead, source)
                workers = [self._worker(sessions) for _ in range(self._load.max_concurrency or 1)]
                await asyncio.gather(*workers)
            while self._tasks:
                await asyncio.wait(self._tasks)
        except asyncio.CancelledError:
            self._interrupted = True
        finally:
            gc.enable()
            ticker.cancel()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._interrupted:
            self.outcomes = [outcome for outcome in self.outcomes if outcome.end_s > 0]
        if self._failure is not None:
            raise self._failure
        busy_s = self._clock() - self._start_s
        return self._result((self._cpu_clock() - cpu_s) / busy_s if busy_s else 0.0)

    async def _open(self, ahead: list[Session], source: Iterator[Session]) -> None:
        while ahead:
            session = ahead.pop(0)
            at_s = session.start_s
            if at_s is None:
                at_s = next(self._load.arrivals or iter(()), None)
            if at_s is None or (self._load.duration_s is not None and at_s > self._load.duration_s):
                return
            if len(ahead) < AHEAD and (more := next(source, None)) is not None:
                ahead.append(more)
            await self._until(at_s)
            task = asyncio.create_task(self._session(session, at_s, self.started))
            self.started += 1
            self._tasks.add(task)
            task.add_done_callback(self._over)

    async def _worker(self, sessions: Iterator[Session]) -> None:
        for session in sessions:
            if self._load.duration_s is not None and self.now_s > self._load.duration_s:
                return
            self.started += 1
            await self._session(session, self.now_s, self.started - 1)

    async def _until(self, at_s: float) -> None:
        if (left_s := at_s - self.now_s) > 0:
            await asyncio.sleep(left_s)

    def _over(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._failure = self._failure or task.exception()

    async def _session(self, session: Session, due_s: float, number: int) -> None:
        history: list[tuple[str, Prompt]] = []
        last = len(session.turns) - 1
        for position, turn in enumerate(session.turns):
            due_s += turn.pause_s
            await self._until(due_s)
            history.append(("user", turn.prompt))
            outcome = Outcome(number, position, due_s, turn.output_tokens)
            self.outcomes.append(outcome)
            await self._request(history, outcome, turn.extra, keep_answer=position < last)
            if outcome.error is not None:
                return  # what would follow depends on an answer that there is not
            due_s = outcome.end_s
            if position < last:
                history.append(("assistant", self._said(outcome, turn.prompt)))
                outcome.answer = ""

    @staticmethod
    def _said(outcome: Outcome, prompt: Prompt) -> Prompt:
        """The answer as part of the next prompt. A prompt of token ids is followed by made-up ids, as many as were
        generated: the stream carries text only."""
        if isinstance(prompt, str):
            return outcome.answer
        return [prompt[at % len(prompt)] for at in range(outcome.output_tokens)]

    async def _request(
        self,
        history: list[tuple[str, Prompt]],
        outcome: Outcome,
        extra: Mapping[str, object] | None,
        *,
        keep_answer: bool,
    ) -> None:
        if self._gate is None:
            await self._send(history, outcome, extra, keep_answer)
            return
        async with self._gate:
            await self._send(history, outcome, extra, keep_answer)

    async def _send(
        self, history: list[tuple[str, Prompt]], outcome: Outcome, extra: Mapping[str, object] | None, keep_answer: bool
    ) -> None:
        self.in_flight += 1
        try:
            await self._client.complete(history, outcome, extra, keep_answer=keep_answer)
        finally:
            self.in_flight -= 1
            self._onto_own_clock(outcome)

    def _onto_own_clock(self, outcome: Outcome) -> None:
        start_s = self._start_s
        outcome.sent_s -= start_s
        outcome.end_s -= start_s
        outcome.chunk_s = [at_s - start_s for at_s in outcome.chunk_s]

    async def _tick(self) -> None:
        due_s = self.now_s
        while True:
            due_s += TICK_S
            await asyncio.sleep(due_s - self.now_s)
            late_s = self.now_s - due_s
            self._lag_s.append(late_s)
            due_s += max(0.0, late_s)
            if self._progress is not None and len(self._lag_s) % 25 == 0:
                self._progress(self)

    def _result(self, cpu_share: float) -> Run:
        first_s = min((o.scheduled_s for o in self.outcomes), default=0.0)
        last_s = max((o.end_s for o in self.outcomes), default=0.0)
        run = Run(self.outcomes, last_s - first_s, self._lag_s, cpu_share, interrupted=self._interrupted)
        run.invalid = faults_of(run, capped=self._gate is not None)
        if self._interrupted:
            run.invalid.insert(0, f"interrupted after {self.now_s:.0f} s; requests in flight are left out")
        return run


def faults_of(run: Run, *, capped: bool) -> list[str]:
    """Why the run says more of the client than of the server. `capped`: requests wait for a slot on purpose."""
    reasons = []
    late_s = _p99([o.sent_s - o.scheduled_s for o in run.outcomes])
    if late_s > LATE_S and not capped:
        reasons.append(f"requests were sent {late_s * 1e3:.1f} ms late at p99, above {LATE_S * 1e3:g} ms")
    lag_s = _p99(run.lag_s)
    if lag_s > LATE_S:
        reasons.append(f"the client's event loop lagged {lag_s * 1e3:.1f} ms at p99, above {LATE_S * 1e3:g} ms")
    if run.cpu_share > BUSY_SHARE:
        reasons.append(f"the client used {run.cpu_share:.0%} of its core, above {BUSY_SHARE:.0%}")
    return reasons


def _p99(values: list[float]) -> float:
    """As in the report: interpolated, so that one of eighty does not decide alone."""
    return float(np.percentile(values, 99)) if values else 0.0
