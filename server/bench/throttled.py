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
        self._lock = threading.Lock()
        self._moving = threading.Event()
        self._moving.set()

    def set_rate(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        with self._lock:
            self._free_at = 0.0
        (self._moving.set if bytes_per_s else self._moving.clear)()

    def preadv(self, fd: int, buffers: Buffers, offset: int) -> int:
        self._wait(buffers)
        return super().preadv(fd, buffers, offset)

    def pwritev(self, fd: int, buffers: Buffers, offset: int) -> int:
        self._wait(buffers)
        return super().pwritev(fd, buffers, offset)

    def _wait(self, buffers: Buffers) -> None:
        self._moving.wait()
        with self._lock:
            now = time.monotonic()
            self._free_at = max(now, self._free_at) + sum(len(b) for b in buffers) / (self.bytes_per_s or 1e12)
            delay_s = self._free_at - now
        if delay_s > 0:
            time.sleep(delay_s)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve as `terrace serve` does, with the disk slowed."""
    rate, *arguments = sys.argv[1:] if argv is None else argv
    disk = SlowIo()
    disk.set_rate(float(rate) * 1e6)
    return cli.main(arguments, disk)


if __name__ == "__main__":
    sys.exit(main())
