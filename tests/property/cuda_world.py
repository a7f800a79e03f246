"""The device tier over a fake device that reorders and fails: what a call reports is so, and nothing moves after it.

Beside the tier stands a model of what every frame of both memories must hold while no call has it. Frames that a call
leaves to nobody are poisoned at once, so a copy that comes too late, or goes elsewhere, shows. The tier's threads are
real: the same acts may interleave in another way, so no act is drawn from what the threads have done so far.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from server.kvcache.host import HostArena
from server.kvcache.tiers.base import Move
from server.types import TierFault
from tests.fake_device import FAULTS, POISON, FakeDevice
from tests.system.ssd_store import BLOCK_BYTES, Block, content, fill

FRAMES = 12
SETTLE_ROUNDS, SETTLE_S = 40, 0.0002
FREE = bytes([POISON]) * BLOCK_BYTES

Act = Literal["arrive", "spoil", "forget", "onboard", "spill", "cancel", "copy", "fail", "refuse", "finish"]
Step = tuple[Act, int, int]
"""What happens, to how many at most, and the seed of all that is chosen in it."""


@dataclass
class Call:
    moves: Sequence[Move]
    blocks: Sequence[Block]
    onboard: bool
    task: asyncio.Task[Sequence[TierFault | None]]
    spoilt: frozenset[int]
    """Host frames whose bytes or labels were not right when it began."""


class CudaWorld:
    """Frames of the device and of the host are free, or hold a block, or belong to one call. One loop runs it all."""

    def __init__(self, burst_bytes: int) -> None:
        """`burst_bytes`: the tier's own limit of what is in flight each way."""
        self._burst_bytes = burst_bytes
        self.host = HostArena(FRAMES, BLOCK_BYTES)
        self.device = FakeDevice(FRAMES, self.host)
        self.tier = self.device.tier()
        self.calls: list[Call] = []
        self.here: dict[int, Block] = {}
        """Device frame -> what it holds; those of open calls are not in it, nor in `free_here`."""
        self.there: dict[int, Block] = {}
        self.free_here, self.free_there = set(range(FRAMES)), set(range(FRAMES))
        self.spoilt: set[int] = set()
        self.number = 0
        for frame in range(FRAMES):
            self.host.view(frame)[:] = FREE
        for frame in range(FRAMES // 2):
            self.here[frame] = self._new_block()
            self.free_here.remove(frame)
            self.device.write(frame, content(self.here[frame].hash))

    async def run(self, steps: Iterable[Step]) -> None:
        """Raises AssertionError when the tier breaks a promise."""
        try:
            for act, count, seed in steps:
                getattr(self, act)(count, Random(seed))
                await self._settle()
            await self._all_return()
        finally:
            self.device.free = True
            for stream in (self.device.up, self.device.down):
                while stream.batches:
                    stream.happen(Random(0))
            await asyncio.gather(*(call.task for call in self.calls), return_exceptions=True)
            await self.tier.aclose()
        assert not self.device.pins.pinned, "memory is still pinned"

    # --- acts --------------------------------------------------------------------------------------------------------

    def arrive(self, count: int, random: Random) -> None:
        """Blocks land in the host arena."""
        for frame in _some(self.free_there, count, random):
            self.free_there.remove(frame)
            self.there[frame] = self._new_block()
            fill(self.host, frame, self.there[frame])

    def spoil(self, count: int, random: Random) -> None:
        """A host frame or two hold something else than is said, or their label is another block's."""
        for frame in _some(self.there.keys() - self.spoilt, min(count, 2), random):
            self.spoilt.add(frame)
            if random.randrange(2):
                self.host.label(frame, Block(0, 9).hash)
            else:
                self.host.view(frame)[random.randrange(BLOCK_BYTES)] ^= 1

    def forget(self, count: int, random: Random) -> None:
        """A block is evicted from the device."""
        for frame in _some(self.here, 1, random):
            self._free_here(frame)

    def onboard(self, count: int, random: Random) -> None:
        hosts = _some(self.there, count, random)
        frames = _some(self.free_here, len(hosts), random)
        blocks = [self.there.pop(host) for host, _ in zip(hosts, frames, strict=False)]
        self.free_here.difference_update(frames)
        self._begin(self.tier.write, True, blocks, hosts, frames)

    def spill(self, count: int, random: Random) -> None:
        frames = _some(self.here, count, random)
        hosts = _some(self.free_there, len(frames), random)
        blocks = [self.here.pop(frame) for frame, _ in zip(frames, hosts, strict=False)]
        self.free_there.difference_update(hosts)
        self._begin(self.tier.read, False, blocks, hosts, frames)

    def cancel(self, count: int, random: Random) -> None:
        if self.calls:
            random.choice(self.calls).task.cancel()

    def copy(self, count: int, random: Random) -> None:
        """Copies of one direction happen, in any order within a batch."""
        stream = random.choice((self.device.up, self.device.down))
        for _ in range(count):
            stream.happen(random)

    def fail(self, count: int, random: Random) -> None:
        """The oldest batch of one direction fails half way."""
        random.choice((self.device.up, self.device.down)).happen(random, fail=True)

    def refuse(self, count: int, random: Random) -> None:
        """A function of the driver fails the next time in one direction."""
        random.choice((self.device.up, self.device.down)).refuse = random.choice(FAULTS)

    def finish(self, count: int, random: Random) -> None:
        """All copies that wait happen."""
        for stream in (self.device.up, self.device.down):
            while stream.batches:
                stream.happen(random)

    # --- what must hold ----------------------------------------------------------------------------------------------

    def check(self) -> None:
        for frame in self.free_here:
            assert self.device.block(frame) == FREE, "a byte moved into a device frame that no call has"
        for frame, block in self.here.items():
            assert self.device.block(frame) == content(block.hash), "a device frame does not hold its block"
        for frame in self.free_there:
            assert bytes(self.host.view(frame)) == FREE, "a byte moved into a host frame that no call has"
        for frame in self.there.keys() - self.spoilt:
            assert bytes(self.host.view(frame)) == content(self.there[frame].hash), "a host frame lost its block"
            assert self.host.digest_of(frame, self.there[frame].hash), "a block in the host arena lost its label"
        for frame in self._coming():
            assert all(
                self.host.digest_of(frame, move.hash) is None
                for call in self.calls for move in call.moves if not call.onboard and move.host == frame
            ), "a block has its label before it has come"  # fmt: skip
        for stream in (self.device.up, self.device.down):
            most = stream.fields.lanes * self._burst_bytes
            assert stream.most_bytes <= most, "more in flight one way than a burst for each lane"
        assert not self.device.misuses, "the driver was misused"

    def _coming(self) -> set[int]:
        """Host frames that a copy has still to write to: only this thread lets copies happen."""
        targets = {target for batch in list(self.device.down.batches) for target, _, _ in list(batch.copies)}
        return {(target - self.host.address) // self.host.stride for target in targets}

    def _returned(self, call: Call) -> None:
        cancelled = call.task.cancelled()
        outcomes = [TierFault("io")] * len(call.moves) if cancelled else call.task.result()
        assert len(outcomes) == len(call.moves), "not an outcome for each move"
        for move, block, fault in zip(call.moves, call.blocks, outcomes, strict=True):
            if call.onboard:
                assert cancelled or move.host not in call.spoilt or fault, "a spoilt block went up"
                assert move.host in call.spoilt or not fault or fault.reason == "io", "a good block was refused"
                self._went_up(move, block, fault)
            else:
                labelled = self.host.digest_of(move.host, move.hash) is not None
                assert cancelled or labelled != bool(fault), "a label for what has come, and for nothing else"
                self._came_down(move, block, fault)

    def _went_up(self, move: Move, block: Block, fault: TierFault | None) -> None:
        self.spoilt.discard(move.host)
        self._free_there(move.host)
        if fault:
            refused = fault.reason == "corrupt"
            assert not refused or self.device.block(move.frame) == FREE, "bytes of a block that was refused went up"
            self._free_here(move.frame)
        else:
            self.here[move.frame] = block

    def _came_down(self, move: Move, block: Block, fault: TierFault | None) -> None:
        self.here[move.frame] = block
        if fault:
            self._free_there(move.host)
        else:
            self.there[move.host] = block

    # --- helpers -----------------------------------------------------------------------------------------------------

    def _new_block(self) -> Block:
        self.number += 1
        return Block(self.number, 0)

    def _begin(
        self, method: Callable, onboard: bool, blocks: Sequence[Block], hosts: Sequence[int], frames: Sequence[int]
    ) -> None:
        ends = zip(blocks, hosts, frames, strict=False)
        moves = [block.move(host, frame) for block, host, frame in ends]
        task = asyncio.get_running_loop().create_task(method(moves))
        self.calls.append(Call(moves, blocks, onboard, task, frozenset(self.spoilt)))

    async def _settle(self) -> None:
        """Let loop and copy threads go on until nothing seems to change; then look at what returned, and at all."""
        before: object = None
        for _ in range(SETTLE_ROUNDS):
            await asyncio.sleep(SETTLE_S)
            now = self._progress()
            if now == before:
                break
            before = now
        for call in [call for call in self.calls if call.task.done()]:
            self.calls.remove(call)
            self._returned(call)
        self.check()

    def _progress(self) -> object:
        streams = (self.device.up, self.device.down)
        return [(len(s.batches), s.in_flight_bytes) for s in streams], [call.task.done() for call in self.calls]

    async def _all_return(self) -> None:
        for _ in range(1000):
            if not self.calls:
                return
            self.finish(1, Random(0))
            await self._settle()
        raise AssertionError("a call does not return")

    def _free_here(self, frame: int) -> None:
        self.here.pop(frame, None)
        self.device.write(frame, FREE)
        self.free_here.add(frame)

    def _free_there(self, frame: int) -> None:
        self.host.expect_nothing(frame)
        self.host.view(frame)[:] = FREE
        self.free_there.add(frame)


def _some(frames: Iterable[int], count: int, random: Random) -> list[int]:
    """At most `count` of them."""
    all_frames = sorted(frames)
    return random.sample(all_frames, min(count, len(all_frames)))
