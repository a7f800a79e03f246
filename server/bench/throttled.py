"""A daemon whose SSD is slow: `python -m server.bench.throttled MB_PER_S serve MODEL [flags]`.

Tiers that lose against computing are what the planner exists for; here is one on demand.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence

from server import cli
from server.kvcache.tiers.files import Buffers, OsIo


class SlowIo(OsIo):
    """The real disk behind a rate limit: reads and writes of all threads share `bytes_per_s`; 0: nothing moves."""

    def __init__(self) -> None:
        self.bytes_per_s = float("inf")
        self._free_at = 0.0
        self._changed = threading.Condition()

    def set_rate(self, bytes_per_s: float) -> None:
        """From now on, also for those that are on their way: what is left of them goes at the new rate."""
        with self._changed:
            self.bytes_per_s = bytes_per_s
            self._free_at = 0.0
            self._changed.notify_all()

    def preadv(self, fd: int, buffers: Buffers, offset: int) -> int:
        self._wait(buffers)
        return super().preadv(fd, buffers, offset)

    def pwritev(self, fd: int, buffers: Buffers, offset: int) -> int:
        self._wait(buffers)
        return super().pwritev(fd, buffers, offset)

    def _wait(self, buffers: Buffers) -> None:
        left = float(sum(len(buffer) for buffer in buffers))
        with self._changed:
            while left > 0:
                rate = self.bytes_per_s
                if not rate:
                    self._changed.wait()
                    continue
                due_s = self._free_at = max(time.monotonic(), self._free_at) + left / rate
                while (wait_s := due_s - time.monotonic()) > 0 and rate == self.bytes_per_s:
                    self._changed.wait(wait_s)
                left = min(left, max(0.0, wait_s) * rate) if wait_s > 0 else 0.0


def main(argv: Sequence[str] | None = None) -> int:
    """Serve as `terrace serve` does, with the disk slowed."""
    rate, *arguments = sys.argv[1:] if argv is None else argv
    disk = SlowIo()
    disk.set_rate(float(rate) * 1e6)
    return cli.main(arguments, disk)


if __name__ == "__main__":
    sys.exit(main())
