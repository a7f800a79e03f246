"""The KV manager against a model of bytes: every call in any order, every transfer torn until it is complete.

`machine(...)` gives a rule-based state machine over one configuration. The model keeps the content of every frame of
every tier as a tag: what a request computed there, or noise. A sealed block's content is the tuple of salt and tokens
up to its end, so a copy is right exactly when it holds the tag of its hash.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from server.kvcache import audit
from server.kvcache.block import Lease
from server.kvcache.hashing import extend_hashes
from server.kvcache.manager import KVManager, TierSpec
from server.types import DEVICE, DRAM, BlockHash, BlockLayout, TierFault, TierName, Transfer

NOISE = "noise"

# Three sequences that part late: most requests share blocks, some of them all.
tokens_of = st.builds(
    lambda sequence, length: list(sequence[:length]),
    st.sampled_from([(0,) * 9, (0, 0, 0, 0, 0, 1, 1, 1, 1), (0, 0, 1, 1, 1, 1, 1, 1, 1)]),
    st.integers(1, 9),
)
salts = st.sampled_from(["", "", "", "tenant"])


@dataclass(eq=False)
class Holder:
    """What a request would keep: its lease, its tokens, how many of them are computed."""

    lease: Lease
    salt: str
    tokens: array[int]
    hashes: list[BlockHash]
    computed: int | None = None
    """None while its blocks are on their way."""


@dataclass
class Model:
    """Content of every frame, and what belongs under every hash that was ever made."""

    frames: dict[tuple[TierName, int], Any] = field(default_factory=dict)
    truth: dict[BlockHash, Any] = field(default_factory=dict)


class KVMachine(RuleBasedStateMachine):
    manager: type[KVManager] = KVManager

    @initialize(
        device=st.integers(1, 5),
        lower=st.integers(0, 4),
        block_tokens=st.integers(1, 2),
        policies=st.tuples(st.sampled_from(["lru", "slru"]), st.sampled_from(["lru", "slru"])),
        transfers_max=st.integers(1, 3),
    )
    def start(self, device: int, lower: int, block_tokens: int, policies: tuple[str, str], transfers_max: int) -> None:
        tiers = [TierSpec(DEVICE, device, policies[0])]
        if lower:
            tiers.append(TierSpec(DRAM, lower, policies[1]))
        layout = BlockLayout(1, 1, 1, 8, block_tokens)
        self.kv = self.manager(layout, tiers, b"model", transfers_max=transfers_max)
        self.size = block_tokens
        self.holders: list[Holder] = []
        self.moving: list[tuple[Transfer, Any]] = []
        self.model = Model()
        self.now = 0.0

    def later(self) -> float:
        self.now += 1.0
        return self.now

    def ready(self) -> list[Holder]:
        return [holder for holder in self.holders if holder.computed is not None]

    def content(self, holder: Holder, position: int) -> Any:
        return (holder.salt, *holder.tokens[: position + 1])

    # --- what a scheduler does ---------------------------------------------------------------------------------------

    @rule(tokens=tokens_of, salt=salts)
    def admit(self, tokens: list[int], salt: str) -> None:
        """A request arrives; what it matched and is ready must hold its own tokens."""
        holder = Holder(Lease(), salt, array("i", tokens), [])
        extend_hashes(holder.hashes, self.kv.root(salt), holder.tokens, self.size)
        for number, value in enumerate(holder.hashes):
            self.model.truth[value] = tuple(
                self.content(holder, position) for position in range(number * self.size, (number + 1) * self.size)
            )
        holder.lease = self.kv.admit(holder.hashes[: (len(tokens) - 1) // self.size], self.later())
        self.holders.append(holder)
        self.settle()

    @rule(tokens=tokens_of, salt=salts)
    def visit(self, tokens: list[int], salt: str) -> None:
        """A request comes, computes all that there is room for, and leaves."""
        self.admit(tokens, salt)
        holder = self.holders[-1]
        if holder.computed is not None:
            self.step(holder, len(tokens))
        self.holders.remove(holder)
        self.kv.release(holder.lease, self.later())

    @precondition(lambda self: self.ready())
    @rule(data=st.data(), count=st.integers(1, 9))
    def compute(self, data: st.DataObject, count: int) -> None:
        """A step: grow, read all KV before it, write new KV, seal what is full. Or the device has no room."""
        self.step(data.draw(st.sampled_from(self.ready())), count)

    def step(self, holder: Holder, count: int) -> None:
        assert holder.computed is not None
        end = min(holder.computed + count, len(holder.tokens))
        wanted = self.kv.layout.blocks_for(end) - len(holder.lease.blocks)
        room = self.kv.available_blocks
        if not self.kv.grow(holder.lease, end):
            assert wanted > room, f"{wanted} frames refused, {room} available"
            return
        assert wanted <= room, f"{wanted} frames granted, {room} available"
        self.read(holder, holder.computed)
        shared = {block.copies[DEVICE].frame for block in self.kv.index.values() if DEVICE in block.copies}
        for position in range(holder.computed, end):
            frame = int(holder.lease.table.view()[position // self.size])
            assert frame not in shared, "a step writes into a shared frame"
            slots = self.slots((DEVICE, frame))
            slots[position % self.size] = self.content(holder, position)
        holder.computed = end
        self.kv.seal(holder.lease, holder.hashes, end // self.size)
        self.read(holder, end)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        self.holders.remove(holder)
        self.kv.release(holder.lease, self.later())

    # --- what a mover does -------------------------------------------------------------------------------------------

    @rule(land=st.booleans())
    def plan_transfers(self, land: bool = False) -> None:
        """Transfers start, and end at once where `land` is true."""
        for transfer in self.kv.plan_transfers(self.later()):
            self.model.frames[transfer.target] = [NOISE] * self.size
            self.moving.append((transfer, list(self.slots(transfer.source))))
            if land:
                self.finish(-1, None)

    @precondition(lambda self: self.moving)
    @rule(data=st.data(), reason=st.sampled_from([None, None, None, "io", "corrupt", "no_space"]))
    def complete(self, data: st.DataObject, reason: str | None) -> None:
        """One transfer ends, in any order. Its source has not changed, its target was nobody's."""
        self.finish(data.draw(st.integers(0, len(self.moving) - 1)), reason)

    def finish(self, number: int, reason: str | None) -> None:
        transfer, before = self.moving.pop(number)
        assert self.slots(transfer.source) == before, "a source changed in flight"
        assert self.slots(transfer.target) == [NOISE] * self.size, "a target was written in flight"
        if reason is None:
            self.model.frames[transfer.target] = list(before)
        self.kv.complete(transfer.id, TierFault(reason) if reason else None, self.later())
        self.settle()

    # --- what must hold ----------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Requests whose blocks have landed may read them from now on."""
        for holder in self.holders:
            if holder.computed is None and not holder.lease.onboarding:
                holder.computed = len(holder.lease.blocks) * self.size
                assert holder.computed < len(holder.tokens), "no token is left to sample from"
                self.read(holder, holder.computed)

    def slots(self, place: tuple[TierName, int]) -> list[Any]:
        return self.model.frames.setdefault(place, [NOISE] * self.size)

    def read(self, holder: Holder, end: int) -> None:
        """What attention would read through the block table is the request's own."""
        table = holder.lease.table.view().tolist()
        for position in range(end):
            slot = self.slots((DEVICE, table[position // self.size]))[position % self.size]
            assert slot == self.content(holder, position), f"position {position} of {holder.tokens} reads {slot}"

    @invariant()
    def books(self) -> None:
        if hasattr(self, "kv"):
            audit.check(self.kv)

    @invariant()
    def bytes_are_right(self) -> None:
        if not hasattr(self, "kv"):
            return
        for value, block in self.kv.index.items():
            for name, copy in block.copies.items():
                if copy.ready:
                    held = tuple(self.slots((name, copy.frame)))
                    assert held == self.model.truth[value], f"{name} frame {copy.frame} holds {held}"
        for holder in self.ready():
            assert holder.computed is not None
            self.read(holder, holder.computed)

    def teardown(self) -> None:
        """Everybody leaves, every transfer ends: only free or ready frames remain."""
        if not hasattr(self, "kv"):
            return
        for holder in self.holders:
            self.kv.release(holder.lease, self.later())
        self.holders.clear()
        while self.kv.moving or self.moving:
            self.plan_transfers()
            transfer, before = self.moving.pop()
            self.model.frames[transfer.target] = before
            self.kv.complete(transfer.id, None, self.later())
        audit.check(self.kv)
        assert not self.kv.leases
        assert all(copy.ready and copy.ranked for block in self.kv.index.values() for copy in block.copies.values())
        for tier in self.kv.tiers.values():
            assert tier.available == tier.pool.capacity, f"{tier.name}: frames are lost"
        self.bytes_are_right()
