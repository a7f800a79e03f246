"""Threads that wait for the disk. Some only read, some only write, and writes let reads go first.

They are daemon threads: a disk that never answers must not keep the process from ending. They spend their lives in
system calls and checksums, both outside the interpreter lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

WRITE_YIELDS_S = 0.02
"""How long a write waits for reads that are queued; then it goes all the same, so that it never starves."""

T = TypeVar("T")
Work = Callable[[], T]


class _Patient(asyncio.Future):
    """A future that refuses to be cancelled: a cancelled task that awaits it learns of that when it is done."""

    def cancel(self, msg: Any = None) -> bool:
        return False


class _Call(Generic[T]):
    """The works of one call: `done` is set on the loop, once, when the last of them is over."""

    def __init__(self, works: Sequence[Work[T]]) -> None:
        self.loop = asyncio.get_running_loop()
        self.done = _Patient(loop=self.loop)
        self.works = works
        self.results: list[T | None] = [None] * len(works)
        self.error: BaseException | None = None
        self.left = len(works)

    def finish(self) -> None:
        """Loop thread; the second time it does nothing."""
        if not self.done.done():
            self.done.set_result(None)


_Jobs = queue.SimpleQueue[tuple[_Call, int] | None]
"""A call and the index of one of its works; None ends a thread."""


class IoPool:
    """`readers` and `writers` threads. `read` and `write` on the loop thread."""

    def __init__(self, readers: int, writers: int) -> None:
        self._reads: _Jobs = queue.SimpleQueue()
        self._writes: _Jobs = queue.SimpleQueue()
        self._no_reads = threading.Event()
        self._counting = threading.Lock()
        self._closing = False
        self._open: set[_Call] = set()
        self._readers = [threading.Thread(target=self._read, name=f"terrace-read-{i}") for i in range(readers)]
        self._writers = [threading.Thread(target=self._write, name=f"terrace-write-{i}") for i in range(writers)]
        for thread in (*self._readers, *self._writers):
            thread.daemon = True
            thread.start()

    async def read(self, works: Sequence[Work[T]]) -> list[T]:
        """Run all of `works` on reading threads. Cancelled or not, it returns when the last of them is over.

        Raises TimeoutError when the pool was closed and gave up on them.
        """
        self._no_reads.clear()
        return await self._submit(self._reads, works)

    async def write(self, works: Sequence[Work[T]]) -> list[T]:
        """The same on writing threads."""
        return await self._submit(self._writes, works)

    def close(self, timeout_s: float, clock: Callable[[], float]) -> bool:
        """End the threads when their queues are empty; any thread but the loop's.

        False when some are still stuck after `timeout_s` in all. Their calls return all the same, so that a disk that
        never answers cannot hold up whoever awaits them: bytes may still move, until the process ends.
        """
        deadline_s = clock() + timeout_s
        self._closing = True
        for jobs, threads in ((self._reads, self._readers), (self._writes, self._writers)):
            for _ in threads:
                jobs.put(None)
        threads = [*self._readers, *self._writers]
        for thread in threads:
            thread.join(max(0.0, deadline_s - clock()))
        if not any(thread.is_alive() for thread in threads):
            return True
        for call in list(self._open):
            call.error = TimeoutError("the disk does not answer")
            call.loop.call_soon_threadsafe(call.finish)
        return False

    async def _submit(self, jobs: _Jobs, works: Sequence[Work[T]]) -> list[T]:
        assert not self._closing, "no call is made to a tier that is closed"
        if not works:
            return []
        call = _Call(works)
        self._open.add(call)
        for i in range(len(works)):
            jobs.put((call, i))
        try:
            await call.done
        finally:
            self._open.discard(call)
        if call.error is not None:
            raise call.error
        return call.results  # type: ignore[return-value]

    def _read(self) -> None:
        while (job := self._reads.get()) is not None:
            if self._reads.empty():
                self._no_reads.set()
            self._run(*job)

    def _write(self) -> None:
        while (job := self._writes.get()) is not None:
            if not self._reads.empty():
                self._no_reads.wait(WRITE_YIELDS_S)
            self._run(*job)

    def _run(self, call: _Call[T], index: int) -> None:
        try:
            call.results[index] = call.works[index]()
        except BaseException as error:  # noqa: BLE001 - a bug: it goes to whoever awaits the call
            call.error = error
        with self._counting:
            call.left -= 1
            last = call.left == 0
        if last:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                call.loop.call_soon_threadsafe(call.finish)
