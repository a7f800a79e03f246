"""Virtual time: an event loop whose clock jumps to the next timer whenever nothing is ready.

An hour of stalled disk costs nothing, the same seed gives the same run to the last callback, and a deadlock is found
for free: nothing ready and no timer left means that somebody waits for what will never come.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

Result = TypeVar("Result")

AGAIN_S = 1.0
"""CPU seconds between alarms once the limit is passed."""

MAX_ITERATIONS = 200_000
"""A scenario takes some thousand turns of the loop; one that takes this many runs in circles."""


class SimFailure(AssertionError):
    """The simulation found something that must not be: a deadlock, an endless loop, a wrong token, a broken book."""


class _JumpingSelector:
    """Stands where the loop's I/O selector would: there is no I/O, so waiting is adding to the clock."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None:
            raise SimFailure("deadlock: nothing is ready and no timer is set\n" + describe_tasks(self._loop))
        self._loop.now_s += max(0.0, timeout)
        self._loop.iterations += 1
        if self._loop.iterations > self._loop.max_iterations:
            raise SimFailure("livelock: the event loop turns without end\n" + describe_tasks(self._loop))
        return []


class VirtualLoop(asyncio.BaseEventLoop):
    """An event loop without I/O and without real time. One thread; nothing outside it may call in."""

    def __init__(self, max_iterations: int = MAX_ITERATIONS) -> None:
        super().__init__()
        self.max_iterations = max_iterations
        self.now_s = 0.0
        self.iterations = 0
        self._selector = _JumpingSelector(self)

    def time(self) -> float:
        return self.now_s

    def _process_events(self, event_list: list[Any]) -> None:
        assert not event_list, "there is no I/O in virtual time"

    def _write_to_self(self) -> None:
        """Wakes a loop that sleeps in its selector; this one never does."""


def describe_tasks(loop: asyncio.AbstractEventLoop) -> str:
    """Where every unfinished task stands, one line each, innermost frame of this project first."""
    lines = []
    for task in sorted(asyncio.all_tasks(loop), key=lambda task: task.get_name()):
        frames = [f"{frame.f_code.co_qualname}:{frame.f_lineno}" for frame in task.get_stack()]
        lines.append(f"  {task.get_name()}: {' < '.join(reversed(frames)) or 'not started'}")
    return "\n".join(lines)


def run_virtual(main: Coroutine[Any, Any, Result], loop: VirtualLoop, *, cpu_limit_s: float) -> Result:
    """Run `main` to its end on `loop` and close it. Raises SimFailure on deadlock, livelock, or too much CPU time."""
    try:
        with cpu_limit(cpu_limit_s):
            return loop.run_until_complete(main)
    finally:
        _abandon_tasks(loop)
        loop.close()


def _abandon_tasks(loop: VirtualLoop) -> None:
    """After a failure tasks are left over; their being destroyed pending is no news."""
    for task in asyncio.all_tasks(loop):
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        task.get_coro().close()


@contextmanager
def cpu_limit(limit_s: float) -> Iterator[None]:
    """Ends a loop inside one callback, which no event loop could: by CPU time, so that a busy machine is no failure."""

    def on_alarm(number: int, frame: FrameType | None) -> None:
        where = f"{frame.f_code.co_qualname}:{frame.f_lineno}" if frame else "nowhere"
        raise SimFailure(f"hang: {limit_s:g} s of CPU time, last in {where}")

    before = signal.signal(signal.SIGVTALRM, on_alarm)
    signal.setitimer(signal.ITIMER_VIRTUAL, limit_s, AGAIN_S)  # whoever catches the first and goes on gets another
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
