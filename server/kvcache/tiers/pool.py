"""Threads that wait for the disk. Some only read, some only write, and writes let reads go first.

They are daemon threads: a disk that never answers must not keep the process from ending. They spend their lives in
system calls and checksums, both outside the interpreter lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

WRITE_YIELDS_S = 0.02
"""How long a write waits for reads that are queued; then it goes all the same, so that it never starves."""

T = TypeVar("T")
Work = Callable[[], T]


class _Call(Generic[T]):
    """The works of one call: `done` is set on the loop, once, when the last of them is over."""

    def __init__(self, count: int) -> None:
        self.loop = asyncio.get_running_loop()
        self.done: asyncio.Future[None] = self.loop.create_future()
        self.results: list[T | None] = [None] * count
        self.error: BaseException | None = None
        self.left = count


class IoPool:
    """`readers` and `writers` threads. `read` and `write` on the loop thread."""

    def __init__(self, readers: int, writers: int) -> None:
        lock = threading.Lock()
        self._lock = lock
        self._readable, self._writable, self._no_reads = (threading.Condition(lock) for _ in range(3))
        self._reads: deque[tuple[_Call, int, Work]] = deque()
        self._writes: deque[tuple[_Call, int, Work]] = deque()
        self._closing = False
        self._threads = [
            threading.Thread(target=target, name=f"terrace-ssd-{name}-{i}", daemon=True)
            for name, target, count in (("read", self._read, readers), ("write", self._write, writers))
            for i in range(count)
        ]
        for thread in self._threads:
            thread.start()

    async def read(self, works: Sequence[Work[T]]) -> list[T]:
        """Run all of `works` on reading threads. Cancelled or not, it returns when the last of them is over."""
        return await self._submit(self._reads, self._readable, works)

    async def write(self, works: Sequence[Work[T]]) -> list[T]:
        """The same on writing threads."""
        return await self._submit(self._writes, self._writable, works)

    def close(self, timeout_s: float, clock: Callable[[], float]) -> bool:
        """End the threads when their queues are empty. False when some are still stuck after `timeout_s` in all."""
        deadline_s = clock() + timeout_s
        with self._lock:
            self._closing = True
            self._readable.notify_all()
            self._writable.notify_all()
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - clock()))
        return not any(thread.is_alive() for thread in self._threads)

    async def _submit(
        self, jobs: deque[tuple[_Call, int, Work]], ready: threading.Condition, works: Sequence[Work[T]]
    ) -> list[T]:
        if not works:
            return []
        call: _Call[T] = _Call(len(works))
        with self._lock:
            assert not self._closing, "no call is made to a tier that is closed"
            jobs.extend((call, i, work) for i, work in enumerate(works))
            ready.notify(len(works))
        cancelled: asyncio.CancelledError | None = None
        while not call.done.done():
            try:
                await asyncio.wait((call.done,))  # which a cancellation of this task does not cancel
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            raise cancelled
        if call.error is not None:
            raise call.error
        return call.results  # type: ignore[return-value]

    def _read(self) -> None:
        while True:
            with self._lock:
                self._readable.wait_for(lambda: self._reads or self._closing)
                if not self._reads:
                    return
                job = self._reads.popleft()
                if not self._reads:
                    self._no_reads.notify_all()
            self._run(*job)

    def _write(self) -> None:
        while True:
            with self._lock:
                self._writable.wait_for(lambda: self._writes or self._closing)
                if not self._writes:
                    return
                job = self._writes.popleft()
                self._no_reads.wait_for(lambda: not self._reads, WRITE_YIELDS_S)
            self._run(*job)

    def _run(self, call: _Call[T], index: int, work: Work[T]) -> None:
        try:
            call.results[index] = work()
        except BaseException as error:  # noqa: BLE001 - a bug: it goes to whoever awaits the call
            call.error = error
        with self._lock:
            call.left -= 1
            last = call.left == 0
        if last:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                call.loop.call_soon_threadsafe(call.done.set_result, None)
