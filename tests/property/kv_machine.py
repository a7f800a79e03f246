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
from server.kvcache.books import TierBooks
from server.kvcache.eviction import POLICIES
from server.kvcache.hashing import extend_hashes
from server.kvcache.manager import KVManager, TierSpec
from server.kvcache.step_cost import StepWork
from server.types import DEVICE, DRAM, SSD, BlockHash, BlockLayout, CacheLimit, TierFault, TierName, Transfer

NOISE = "noise"

# Three sequences that part late: most requests share blocks, some of them all.
tokens_of = st.builds(
    lambda sequence, length: list(sequence[:length]),
    st.sampled_from([(0,) * 9, (0, 0, 0, 0, 0, 1, 1, 1, 1), (0, 0, 1, 1, 1, 1, 1, 1, 1)]),
    st.integers(1, 9),
)
salts = st.sampled_from(["", "", "", "tenant", "flood"])
# Floors and quotas as shares of a tier; the floors leave a frame over.
shares = st.dictionaries(
    st.sampled_from(["tenant", "flood"]),
    st.dictionaries(
        st.sampled_from([DEVICE, DRAM, SSD]),
        st.tuples(st.sampled_from([0, 0.25, 0.5]), st.sampled_from([0, 0.25, 0.5, None])),
        max_size=3,
    ),
)


@dataclass(eq=False)
class Holder:
    """What a request would keep: its lease, its tokens, how many of them are computed."""

    lease: Lease
    salt: str
    tokens: array[int]
    hashes: list[BlockHash]
    computed: int = 0


@dataclass
class Model:
    """Content of every frame, and what belongs under every hash that was ever made."""

    frames: dict[tuple[TierName, int], Any] = field(default_factory=dict)
    truth: dict[BlockHash, Any] = field(default_factory=dict)


def watch(machine: KVMachine, books: TierBooks) -> None:
    """From now on whatever goes from `books` for want of room must be what the limits say."""
    drop, shares = books.drop, books.shares
    assert shares is not None

    def watched(frame: int, reason: str) -> None:
        if reason == "capacity":
            tenants = machine.kv.owners.tenants
            has = {tenant: shares.owned[number] for number, tenant in enumerate(tenants)}
            mine = tenants[books.owner_of(frame)]
            limit = machine.limits.get(mine, {}).get(books.name, CacheLimit())
            assert has[mine] > limit.floor, f"{mine} keeps less than its floor of {books.name}"
            over = {
                tenant
                for tenant, tiers in machine.limits.items()
                if (quota := tiers[books.name].quota) is not None and has[tenant] > quota
            }
            could = {tenants[books.owner_of(other)] for other in books.policy.victims()}
            assert mine in over or not over & could, f"{mine} gives way, but {over & could} is over its quota"
        drop(frame, reason)

    books.drop = watched  # type: ignore[method-assign]


class KVMachine(RuleBasedStateMachine):
    manager: type[KVManager] = KVManager

    @initialize(
        frames=st.tuples(st.integers(1, 5), st.sampled_from([0, 1, 4, 8]), st.sampled_from([0, 2, 5, 9])),
        block_tokens=st.integers(1, 2),
        policies=st.tuples(*[st.sampled_from(sorted(POLICIES))] * 3),
        in_flight_max=st.integers(1, 3),
        step_s=st.sampled_from([None, 1e-4, 1e-2, 1e-2, 10.0]),
        write_bytes_per_day=st.sampled_from([0.0, 0.0, 1e5]),
        limits=st.one_of(st.none(), shares),
    )
    def start(
        self,
        frames: tuple[int, int, int],
        block_tokens: int,
        policies: tuple[str, str, str],
        in_flight_max: int,
        step_s: float | None,
        write_bytes_per_day: float,
        limits: Any,
    ) -> None:
        names = (DEVICE, DRAM, SSD)[: 1 + bool(frames[1]) + bool(frames[1] and frames[2])]
        tiers = [TierSpec(*spec, in_flight_max) for spec in zip(names, frames, policies, strict=False)]
        layout = BlockLayout(1, 1, 1, 8, block_tokens)
        self.kv = self.manager(
            layout,
            tiers,
            b"model",
            write_bytes_per_day=write_bytes_per_day,
            pin_ratio=0.5,
            spill_pace_s=0.0,
            shared=limits is not None,
        )
        self.shared = limits is not None
        self.limits: dict[str, dict[TierName, CacheLimit]] = {}
        if step_s is not None:
            self.kv.planner.step.observe(StepWork(1), step_s)
        self.size = block_tokens
        self.holders: list[Holder] = []
        self.moving: list[tuple[Transfer, Any]] = []
        self.model = Model()
        self.now = 0.0
        if self.shared:
            for books in self.kv.levels:
                watch(self, books)
            self.share(limits)

    def later(self) -> float:
        self.now += 1e-5
        return self.now

    def chain(self, tokens: list[int], salt: str) -> Holder:
        """A request that is not admitted yet; what its blocks hold is known from now on."""
        holder = Holder(Lease(), salt, array("i", tokens), [])
        extend_hashes(holder.hashes, self.kv.root(salt), holder.tokens, self.size)
        for number, value in enumerate(holder.hashes):
            self.model.truth[value] = tuple(
                self.content(holder, position) for position in range(number * self.size, (number + 1) * self.size)
            )
        return holder

    def content(self, holder: Holder, position: int) -> Any:
        return (holder.salt, *holder.tokens[: position + 1])

    # --- what a scheduler does ---------------------------------------------------------------------------------------

    @rule(tokens=tokens_of, salt=salts)
    def admit(self, tokens: list[int], salt: str) -> None:
        """A request arrives; what it matched on the device must hold its own tokens."""
        holder = self.chain(tokens, salt)
        usable = holder.hashes[: (len(tokens) - 1) // self.size]
        holder.lease = self.kv.admit(usable, self.later(), tenant=salt)
        holder.computed = len(holder.lease.table) * self.size
        self.holders.append(holder)
        self.read(holder, holder.computed)

    @rule(tokens=tokens_of, salt=salts, soon=st.booleans())
    def prefetch(self, tokens: list[int], salt: str, soon: bool) -> None:
        """A request is received and waits, or is next."""
        self.kv.prefetch(self.chain(tokens, salt).hashes, soon=soon)

    @rule(tokens=tokens_of, salt=salts)
    def visit(self, tokens: list[int], salt: str) -> None:
        """A request comes, computes all that there is room for, and leaves."""
        self.admit(tokens, salt)
        holder = self.holders[-1]
        self.step(holder, len(tokens))
        self.holders.remove(holder)
        self.kv.release(holder.lease)

    @rule(
        tokens=tokens_of,
        salt=salts,
        comes_back=st.sampled_from([0, 1, 1, 2]),
        landings=st.lists(st.sampled_from([None, None, None, "io", "corrupt", "late"]), min_size=2, max_size=8),
    )
    def park(self, tokens: list[int], salt: str, comes_back: int, landings: list[str | None]) -> None:
        """All leave; a session ends, its blocks sink, another takes their frames on the device; then it may be back."""
        while self.holders:
            self.kv.release(self.holders.pop().lease)
        self.visit(tokens, salt)
        self.land_all()
        self.visit([7, *tokens], "flood")
        self.land_all()
        for _ in range(comes_back):
            self.admit(tokens, salt)
        for reason in landings:
            self.plan_transfers()
            if reason == "late":
                self.wait(5.0)
            elif self.moving:
                self.finish(0, reason)

    def land_all(self) -> None:
        """Everything that moves lands well."""
        for _ in range(30):
            self.plan_transfers()
            while self.moving:
                self.finish(-1, None)
            if not self.kv.busy:
                return

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), count=st.integers(1, 9))
    def compute(self, data: st.DataObject, count: int) -> None:
        """A step: take what came, grow, read all KV before it, write new KV, seal what is full; or there is no room."""
        self.step(data.draw(st.sampled_from(self.holders)), count)

    def step(self, holder: Holder, count: int) -> None:
        limit, lease = len(holder.tokens), holder.lease
        granted = len(lease.table) * self.size
        if lease.loading and holder.computed < granted:
            limit = granted
        elif lease.loading:
            self.kv.seal(lease, holder.hashes, holder.computed // self.size)
            if lease.sealed == len(lease.table) and self.kv.join(lease):
                holder.computed = len(lease.table) * self.size
                assert holder.computed < len(holder.tokens), "no token is left to sample from"
                self.read(holder, holder.computed)
            if lease.loading:
                limit = min(limit, self.kv.compute_until(lease, self.later()) * self.size)
        end = min(holder.computed + count, limit)
        wanted = self.kv.layout.blocks_for(end) - len(lease.table)
        room = self.kv.available_blocks
        if not self.kv.grow(lease, end):
            assert wanted > room, f"{wanted} frames refused, {room} available"
            return
        assert wanted <= room or wanted <= 0, f"{wanted} frames granted, {room} available"
        self.read(holder, holder.computed)
        shared = set(self.kv.device.find.values())
        for position in range(holder.computed, end):
            frame = int(holder.lease.table.view()[position // self.size])
            assert frame not in shared, "a step writes into a shared frame"
            slots = self.slots((DEVICE, frame))
            slots[position % self.size] = self.content(holder, position)
        holder.computed = max(holder.computed, end)
        self.kv.seal(holder.lease, holder.hashes, holder.computed // self.size)
        self.read(holder, holder.computed)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        self.holders.remove(holder)
        self.kv.release(holder.lease)

    @rule(seconds=st.sampled_from([0.002, 0.3, 5.0, 100.0]))
    def wait(self, seconds: float) -> None:
        """Time passes: loads are late or past their deadline, breakers try again, pins run out."""
        self.now += seconds

    # --- what an operator does ---------------------------------------------------------------------------------------

    @rule(tokens=tokens_of, salt=salts, seconds=st.sampled_from([0.001, 50.0]))
    def pin(self, tokens: list[int], salt: str, seconds: float) -> None:
        """Pins hold no more than their share, and hold it."""
        self.kv.pin(self.chain(tokens, salt).hashes, self.now + seconds, self.later())
        assert self.kv.pinned_blocks <= self.kv.pin_blocks_max, "pins hold more than their share"

    @rule(tokens=tokens_of, salt=salts, act=st.sampled_from(["unpin", "evict", "clear"]))
    def admin(self, tokens: list[int], salt: str, act: str) -> None:
        hashes = self.chain(tokens, salt).hashes
        if act == "unpin":
            self.kv.unpin(hashes)
        elif act == "evict":
            self.kv.evict(hashes)
        else:
            self.kv.clear()

    @precondition(lambda self: self.shared)
    @rule(wanted=shares)
    def share(self, wanted: dict[str, dict[TierName, tuple[float, float | None]]]) -> None:
        """Tenants and their limits are others from now on."""
        self.limits = {}
        for books in self.kv.levels:
            left, frames = books.pool.capacity - 1, books.pool.capacity
            for tenant, tiers in wanted.items():
                floor, quota = tiers.get(books.name, (0, None))
                limit = CacheLimit(min(left, int(floor * frames)), None if quota is None else int(quota * frames))
                left -= limit.floor
                self.limits.setdefault(tenant, {})[books.name] = limit
        self.kv.share(self.limits)

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
        if reason == "corrupt" and transfer.source[0] != DEVICE:  # what is found bad is bad from then on
            self.model.frames[transfer.source] = [NOISE] * self.size
        self.kv.complete(transfer.id, TierFault(reason) if reason else None, self.later())

    # --- what must hold ----------------------------------------------------------------------------------------------

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
        for books in self.kv.levels:
            for value, frame in books.find.items():
                if books.ready[frame]:
                    held = tuple(self.slots((books.name, frame)))
                    assert held == self.model.truth[value], f"{books.name} frame {frame} holds {held}"
        for holder in self.holders:
            self.read(holder, holder.computed)

    def teardown(self) -> None:
        """Everybody leaves, every transfer ends: only free or ready frames remain."""
        if not hasattr(self, "kv"):
            return
        for holder in self.holders:
            self.kv.release(holder.lease)
        self.holders.clear()
        if self.shared:
            self.share({})
        while self.kv.moving or self.moving:
            self.plan_transfers()
            if self.moving:
                transfer, before = self.moving.pop()
                self.model.frames[transfer.target] = before
                self.kv.complete(transfer.id, None, self.later())
        audit.check(self.kv)
        assert not self.kv.leases
        self.now += 1000.0
        self.kv.plan_transfers(self.now)
        for transfer in [flight.transfer for flight in self.kv.traffic.in_flight.values()]:
            self.kv.complete(transfer.id, TierFault("io"), self.later())
        for books in self.kv.levels:
            assert all(books.ready[f] and books.ranked[f] for f in books.find.values()), "something is held for ever"
            free = books.available + books.pool.unusable()
            assert free == books.pool.capacity, f"{books.name}: frames are lost"
        self.bytes_are_right()
