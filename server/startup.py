"""How far the start of the daemon is. Written by the one thread that starts it, read by any."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Startup:
    """`seconds` by part of the start, of those that are over; `phase` is the one that goes on, empty between two."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock`: monotonic seconds."""
        self._clock = clock
        self._began_s = self._phase_s = clock()
        self.seconds: dict[str, float] = {}
        self.phase = ""
        self.done_bytes = 0
        self.total_bytes = 0

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """The body is this part of the start."""
        self.phase, self._phase_s = phase, self._clock()
        self.done_bytes = self.total_bytes = 0
        yield
        self.seconds[phase] = self._clock() - self._phase_s
        self.phase = ""

    def moved(self, done_bytes: int, total_bytes: int) -> None:
        """So much of the phase's data is read."""
        self.done_bytes, self.total_bytes = done_bytes, total_bytes

    def report(self) -> dict[str, str | float | None]:
        """As /readyz shows it; `share`: of the phase, None where nothing is counted in it."""
        now, done, total = self._clock(), self.done_bytes, self.total_bytes
        return {
            "phase": self.phase or "wiring",
            "share": round(done / total, 3) if total else None,
            "phase_s": round(now - self._phase_s, 3),
            "elapsed_s": round(now - self._began_s, 3),
        }
