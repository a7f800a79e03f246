"""Threads that wait for the disk. Some only read, some only write, and writes let reads go first.

They are daemon threads: a disk that never answers must not keep the process from ending. They spend their lives in
system calls and checksums, both outside the interpreter lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Any

WRITE_YIELDS_S = 0.02
"""How long a write waits for reads that are queued; then it goes all the same, so that it never starves."""

Work = Callable[[], Any]
Job = tuple[Work, asyncio.AbstractEventLoop, "asyncio.Future[Any]"]


class IoPool:
    def __init__(self, readers: int, writers: int) -> None:
        self._reads: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._writes: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._no_reads = threading.Event()
        self._no_reads.set()
        self._threads = [
            threading.Thread(target=target, name=f"terrace-ssd-{name}-{i}", daemon=True)
            for name, target, count in (("read", self._read, readers), ("write", self._write, writers))
            for i in range(count)
        ]
        self._counts = (readers, writers)
        for thread in self._threads:
            thread.start()

    async def read(self, work: Work) -> Any:
        """Run `work` on a reading thread. Loop thread; cancelled or not, it returns when `work` is over."""
        self._no_reads.clear()
        return await self._submit(self._reads, work)

    async def write(self, work: Work) -> Any:
        """The same on a writing thread."""
        return await self._submit(self._writes, work)

    def close(self, timeout_s: float) -> None:
        """End the threads; those that are stuck in the kernel are left behind after `timeout_s` each."""
        for jobs, count in zip((self._reads, self._writes), self._counts, strict=True):
            for _ in range(count):
                jobs.put(None)
        for thread in self._threads:
            thread.join(timeout_s)

    async def _submit(self, jobs: queue.SimpleQueue[Job | None], work: Work) -> Any:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Any] = loop.create_future()
        jobs.put((work, loop, done))
        try:
            return await asyncio.shield(done)
        except asyncio.CancelledError:
            await done
            raise

    def _read(self) -> None:
        while (job := self._reads.get()) is not None:
            _run(job)
            if self._reads.empty():
                self._no_reads.set()

    def _write(self) -> None:
        while (job := self._writes.get()) is not None:
            self._no_reads.wait(WRITE_YIELDS_S)
            _run(job)


def _run(job: Job) -> None:
    work, loop, done = job
    result: Any = None
    error: Exception | None = None
    try:
        result = work()
    except Exception as raised:  # noqa: BLE001 - it goes to whoever awaits it
        error = raised
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
        loop.call_soon_threadsafe(_resolve, done, result, error)


def _resolve(done: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if done.cancelled():
        return
    if error is not None:
        done.set_exception(error)
    else:
        done.set_result(result)
