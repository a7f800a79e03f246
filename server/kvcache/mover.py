"""Carries out transfers and reports their outcome. The only async file of the cache but for the tiers: decides nothing.

The caller guarantees that both frames of a transfer stay reserved until `done` was called. The mover guarantees that
`done` is called exactly once per transfer, on the loop thread, when no byte of it moves any more; also when a tier
raised an OSError. Any other exception, of a tier or of `done`, is a bug and goes to `broke` instead.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from server.kvcache.tiers.base import Move, Tier
from server.types import DEVICE, DRAM, FrameId, Note, TierFault, TierName, Transfer

Done = Callable[[int, TierFault | None], None]
Broke = Callable[[BaseException], None]


class Mover:
    def __init__(self, tiers: Mapping[TierName, Tier], *, run_blocks: int = 8) -> None:
        """`tiers` are all but DRAM, which is the other end of every transfer. Blocks that lie side by side in a tier
        go in one call, at most `run_blocks` of them: large enough for one good I/O, small enough to overlap."""
        self._tiers = tiers
        self._run_blocks = run_blocks
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, transfers: Sequence[Transfer], done: Done, broke: Broke) -> None:
        for name, run in _runs(transfers, self._run_blocks):
            tier = self._tiers[name]
            moves = [_move(transfer) for transfer in run]
            call = tier.write(moves) if run[0].source[0] == DRAM else tier.read(moves)
            task = asyncio.get_running_loop().create_task(self._carry(call, run, done))
            self._tasks.add(task)
            task.add_done_callback(lambda task: self._over(task, broke))

    def note(self, notes: Sequence[Note]) -> None:
        """Hand `notes` to the tiers that outlive the process."""
        if notes:
            for tier in self._tiers.values():
                tier.note(notes)

    async def settled(self) -> None:
        """Until nothing moves any more."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _over(self, task: asyncio.Task[None], broke: Broke) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            broke(error)

    async def _carry(
        self, call: Coroutine[Any, Any, Sequence[TierFault | None]], run: Sequence[Transfer], done: Done
    ) -> None:
        outcomes: Sequence[TierFault | None]
        try:
            outcomes = await call
        except OSError as error:
            outcomes = [TierFault("io", str(error))] * len(run)
        for transfer, fault in zip(run, outcomes, strict=True):
            done(transfer.id, fault)


def _tier_end(transfer: Transfer) -> tuple[TierName, FrameId]:
    """The end of a transfer that is not in DRAM."""
    return transfer.target if transfer.source[0] == DRAM else transfer.source


def _move(transfer: Transfer) -> Move:
    host = transfer.source if transfer.source[0] == DRAM else transfer.target
    return Move(transfer.hash, transfer.parent, transfer.depth, host[1], _tier_end(transfer)[1], transfer.tenant)


def _runs(transfers: Sequence[Transfer], limit: int) -> list[tuple[TierName, list[Transfer]]]:
    """Transfers of one tier and direction, at most `limit` at a time; loads from below DRAM only where their frames are
    neighbours, as each run lands as one and somebody waits for it. The run that has the first transfer goes first."""
    runs: list[list[Transfer]] = []
    for transfer in sorted(transfers, key=lambda t: (t.source[0], t.target[0], _tier_end(t)[1])):
        if runs and _goes_with(runs[-1], transfer, limit):
            runs[-1].append(transfer)
        else:
            runs.append([transfer])
    turn = {transfer.id: position for position, transfer in enumerate(transfers)}
    runs.sort(key=lambda run: min(turn[transfer.id] for transfer in run))
    return [(_tier_end(run[0])[0], run) for run in runs]


def _goes_with(run: Sequence[Transfer], transfer: Transfer, limit: int) -> bool:
    last = run[-1]
    same = (last.source[0], last.target[0]) == (transfer.source[0], transfer.target[0])
    apart = _tier_end(last)[1] + 1 != _tier_end(transfer)[1]
    waited_for = transfer.target[0] == DRAM and transfer.source[0] != DEVICE
    return same and len(run) < limit and not (apart and waited_for)
