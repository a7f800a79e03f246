"""Carries out transfers and reports their outcome. The only async file of the cache: it decides nothing.

The caller guarantees that both frames of a transfer stay reserved until `done` was called. The mover guarantees that
`done` is called exactly once per transfer, on the loop thread, when no byte of it moves any more; also when the copy
raised an OSError. Any other exception, of the copy or of `done`, is a bug and goes to `broke` instead.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from server.types import TierFault, Transfer

CopyFn = Callable[[Transfer], Awaitable[TierFault | None]]


class Mover:
    def __init__(self, copy: CopyFn) -> None:
        """`copy` moves one block's bytes; it returns a fault, or None when the target is exactly the source."""
        self._copy = copy
        self._tasks: set[asyncio.Task[None]] = set()

    def start(
        self,
        transfer: Transfer,
        done: Callable[[int, TierFault | None], None],
        broke: Callable[[BaseException], None],
    ) -> None:
        task = asyncio.get_running_loop().create_task(self._carry(transfer, done))
        self._tasks.add(task)

        def over(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            error = None if task.cancelled() else task.exception()
            if error is not None:
                broke(error)

        task.add_done_callback(over)

    async def _carry(self, transfer: Transfer, done: Callable[[int, TierFault | None], None]) -> None:
        try:
            fault = await self._copy(transfer)
        except OSError as error:
            fault = TierFault("io", str(error))
        done(transfer.id, fault)
