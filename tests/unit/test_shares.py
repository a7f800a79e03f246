"""Quotas and floors in the books: who gives way, who does not, and what a restart remembers."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest

from server.kvcache import audit
from server.kvcache.eviction import POLICIES
from server.kvcache.manager import KVManager
from server.kvcache.tiers.base import Recovered
from server.types import DEVICE, DRAM, SSD, BlockHash, CacheLimit
from tests.property.core import cached_blocks, hashes_of, land
from tests.property.making import make_kv

every_policy = pytest.mark.parametrize("policy", sorted(POLICIES))


def shared(
    *frames: int, policy: str = "lru", limits: Mapping[str, Mapping[str, CacheLimit]] | None = None
) -> KVManager:
    """Tenants `a`, `b` and `c`, of whom only those in `limits` have any."""
    kv = make_kv(*frames, eviction=policy, shared=True)
    kv.share({tenant: (limits or {}).get(tenant, {}) for tenant in "abc"})
    return kv


def visit(kv: KVManager, tenant: str, first: int, blocks: int = 1) -> None:
    """A request of a tenant comes and goes; its blocks are like no other's but those of the same `first`."""
    tokens = list(range(first, first + 2 * blocks))
    hashes = hashes_of(kv, tokens, tenant)
    lease = kv.admit(hashes[: (len(tokens) - 1) // 2], 0.0, tenant=tenant)
    if lease.loading:
        land(kv)
        kv.join(lease)
    assert kv.grow(lease, len(tokens)), "no room"
    kv.seal(lease, hashes, blocks)
    kv.release(lease)
    audit.check(kv)


def has(kv: KVManager, tenant: str, tier: str = DEVICE) -> int:
    shares = kv.tiers[tier].shares
    assert shares is not None
    return shares.owned[kv.owners.number(tenant)]


@every_policy
def test_what_is_over_a_quota_goes_first(policy: str) -> None:
    """A flood takes what is free, but as soon as room is short it gives back its own beyond the quota: whoever was
    there before stays, however long ago that was."""
    kv = shared(20, policy=policy, limits={"b": {DEVICE: CacheLimit(quota=4)}})
    for number in range(10):
        visit(kv, "a", 1000 + 10 * number)
    for number in range(50):
        visit(kv, "b", 2000 + 10 * number)
        assert has(kv, "a") == 10
    assert has(kv, "b") == 10, "as long as nobody else wants it, it may have more"
    for number in range(6):
        visit(kv, "c", 5000 + 10 * number)
    assert (has(kv, "a"), has(kv, "b"), has(kv, "c")) == (10, 4, 6)


@every_policy
def test_a_floor_is_kept(policy: str) -> None:
    """However much the others want and however old it is, what a tenant holds up to its floor stays; beyond it goes."""
    kv = shared(20, policy=policy, limits={"a": {DEVICE: CacheLimit(floor=5)}})
    for number in range(12):
        visit(kv, "a", 1000 + 10 * number)
    for number in range(60):
        visit(kv, "b", 2000 + 10 * number)
        assert has(kv, "a") >= 5
    assert has(kv, "a") == 5
    newest = [1000 + 10 * number for number in range(7, 12)]
    assert all(cached_blocks(kv, [first, first + 1], "a") for first in newest), "the newest are what is kept"
    for number in range(8):
        visit(kv, "a", 8000 + 10 * number)
        assert has(kv, "a") >= 5
    assert cached_blocks(kv, [8070, 8071], "a"), "its own new blocks take the place of its old ones"


@every_policy
def test_without_limits_the_same_goes_as_ever(policy: str) -> None:
    """Tenants without limits share a tier exactly as if nobody asked whose a block is."""
    rng = random.Random(5)
    asked = [(rng.choice("abc"), 100 * rng.randrange(12), rng.randint(1, 5)) for _ in range(400)]
    left: list[set[BlockHash]] = []
    for is_shared in (False, True):
        kv = make_kv(16, 24, 40, eviction=policy, shared=is_shared)
        if is_shared:
            kv.share({tenant: {} for tenant in "abc"})
        for tenant, first, blocks in asked:
            visit(kv, tenant, first, blocks)
            land(kv)
        left += [set(books.find) for books in kv.levels]
    assert left[:3] == left[3:]


def test_floors_and_quotas_hold_in_every_tier() -> None:
    """What sinks to DRAM and to SSD is still its tenant's there, and comes up as such."""
    limits = {
        "a": dict.fromkeys((DRAM, SSD), CacheLimit(floor=6)),
        "b": dict.fromkeys((DRAM, SSD), CacheLimit(quota=5)),
    }
    kv = shared(8, 16, 24, limits=limits)
    visit(kv, "a", 1000, 6)
    land(kv)
    for number in range(60):
        visit(kv, "b", 3000 + 10 * number, 3)
        land(kv)
        visit(kv, "c", 6000 + 10 * number, 1)
        land(kv)
        assert has(kv, "a", DRAM) == has(kv, "a", SSD) == 6
    assert has(kv, "a") == 0
    assert has(kv, "b", DRAM) <= 16 - 6
    visit(kv, "a", 1000, 6)
    assert has(kv, "a") == 6


def test_blocks_that_are_held_count_towards_the_floor() -> None:
    """While a request of the tenant holds its blocks, as many others of its are no longer kept."""
    kv = shared(10, limits={"a": {DEVICE: CacheLimit(floor=4)}})
    visit(kv, "a", 1000, 4)
    books = kv.device
    assert (books.available, books.contested) == (6, 6)
    hashes = hashes_of(kv, list(range(2000, 2006)), "a")
    lease = kv.admit([], 0.0, tenant="a")
    assert kv.grow(lease, 6)
    assert (books.available, books.contested) == (3, 6)
    kv.seal(lease, hashes, 3)
    assert (books.available, books.contested) == (6, 9), "three that are held, one that is kept"
    audit.check(kv)
    kv.release(lease)
    assert (books.available, books.contested) == (6, 6)
    audit.check(kv)


def test_limits_can_change_at_any_time() -> None:
    """New floors keep what is there already, old ones let go of it, and a tenant may vanish with blocks left."""
    kv = shared(10)
    for number in range(10):
        visit(kv, "ab"[number % 2], 1000 + 10 * number)
    kv.share({"a": {DEVICE: CacheLimit(floor=5)}, "b": {DEVICE: CacheLimit(quota=1)}})
    audit.check(kv)
    assert kv.device.available == 5
    for number in range(4):
        visit(kv, "a", 5000 + 10 * number)
    assert (has(kv, "a"), has(kv, "b")) == (9, 1)
    kv.share({"b": {DEVICE: CacheLimit(floor=1)}})
    audit.check(kv)
    assert kv.device.available == 9
    kv.share({})
    audit.check(kv)
    assert kv.device.available == 10


def test_a_restart_knows_whose_blocks_they_are() -> None:
    """Floors hold for what outlived the process from the first moment, also of a tenant that is not here yet."""
    old = shared(8, 16, 16)
    for number, tenant in enumerate("aab"):
        visit(old, tenant, 1000 * number, 2)
        land(old)
    ssd = old.tiers[SSD]
    frames = list(ssd.policy.victims())
    owners = {tenant: [f for f in frames if ssd.owner_of(f) == old.owners.number(tenant)] for tenant in "ab"}
    kv = make_kv(8, 16, 16, shared=True)
    kv.share({"a": {SSD: CacheLimit(floor=4)}})
    values = [value for frame in frames if (value := ssd.hashes[frame]) is not None]
    above, depths = [ssd.above[frame] for frame in frames], [ssd.depth[frame] for frame in frames]
    kv.recover(Recovered(frames, values, above, depths, owners=owners))
    audit.check(kv)
    assert (has(kv, "a", SSD), has(kv, "b", SSD)) == (4, 2)
    assert kv.tiers[SSD].available == 12
    kv.share({"b": {SSD: CacheLimit(floor=2)}})
    assert kv.tiers[SSD].available == 14
    audit.check(kv)


def test_clear_forgets_what_floors_keep() -> None:
    """A floor is a promise among tenants; an operator may break it."""
    kv = shared(10, limits={"a": {DEVICE: CacheLimit(floor=4)}})
    visit(kv, "a", 1000, 4)
    assert kv.evict(hashes_of(kv, list(range(1000, 1008)), "a")[3:]) == 1
    assert kv.clear() == 3
    assert kv.device.available == 10
    audit.check(kv)


def test_the_audit_sees_what_is_wrong() -> None:
    """An owner, a count or a reserved block that is not as it should be is found."""
    for harm in ("owner", "count", "reserved"):
        kv = shared(10, limits={"a": {DEVICE: CacheLimit(floor=4)}})
        visit(kv, "a", 1000, 4)
        shares = kv.device.shares
        assert shares is not None
        if harm == "owner":
            shares.owner[next(iter(kv.device.find.values()))] = 2
        elif harm == "count":
            shares.owned[1] += 1
        else:
            kv.device.ranked[next(shares.reserved())] = 1
        with pytest.raises(audit.InvariantViolation):
            audit.check(kv)
