"""The KV manager by example: one behaviour each. What holds in any order of calls is in tests/property."""

from __future__ import annotations

from array import array

import pytest

from server.kvcache import audit
from server.kvcache.audit import InvariantViolation
from server.kvcache.block import BlockTable
from server.kvcache.hashing import block_hash, chain_root, extend_hashes
from server.kvcache.pool import FramePool
from server.types import DEVICE, DRAM, TierFault
from tests.property.core import cached_blocks, come, hashes_of, land, make_kv, visit

PROMPT = [1, 2, 3, 4, 5, 6]  # three blocks of two


# --- identity --------------------------------------------------------------------------------------------------------


def test_a_hash_covers_everything_before_it():
    """A block's hash changes with any earlier token, with the tenant and with the model's fingerprint."""

    def last(fingerprint: bytes, salt: str, tokens: list[int]) -> bytes:
        hashes: list[bytes] = []
        extend_hashes(hashes, chain_root(fingerprint, salt), array("i", tokens), 2)
        return hashes[-1]

    same = last(b"model", "", PROMPT)
    assert last(b"model", "", PROMPT) == same
    others = [last(b"other", "", PROMPT), last(b"model", "tenant", PROMPT), last(b"model", "", [9, *PROMPT[1:]])]
    assert len({same, *others}) == 4


def test_hashes_are_extended_and_never_recomputed():
    """New tokens add hashes for the blocks they fill; those there are stay; a part of a block has none."""
    hashes: list[bytes] = []
    extend_hashes(hashes, b"root", array("i", [1, 2, 3]), 2)
    first = hashes[0]
    extend_hashes(hashes, b"root", array("i", [1, 2, 3, 4, 5]), 2)
    assert len(hashes) == 2
    assert hashes[0] is first
    assert hashes[1] == block_hash(first, array("i", [3, 4]).tobytes())


# --- match, seal, lease ----------------------------------------------------------------------------------------------


def test_a_prefix_is_found_again():
    """Full blocks that were computed once are matched by the next request that begins with them."""
    kv = make_kv(8)
    visit(kv, PROMPT)
    lease = kv.admit(hashes_of(kv, [1, 2, 3, 4, 9, 9]), 1.0)
    assert len(lease.blocks) == 2
    assert lease.found_in == [DEVICE, DEVICE]
    assert len(lease.table) == 2


def test_a_tenant_does_not_find_another_tenants_blocks():
    """The same tokens under another salt are other blocks."""
    kv = make_kv(8)
    visit(kv, PROMPT, salt="one")
    assert cached_blocks(kv, PROMPT, "one") == 3
    assert cached_blocks(kv, PROMPT, "two") == 0


def test_a_block_that_is_not_full_is_private():
    """The last, partly filled block is freed with its request and nobody finds it."""
    kv = make_kv(8)
    visit(kv, [1, 2, 3])
    assert cached_blocks(kv, [1, 2, 3, 4]) == 1
    assert kv.device.pool.free == 7


def test_sharing_counts_leases():
    """Two requests hold one block; it may go when both are gone, not before."""
    kv = make_kv(4)
    first, second = come(kv, PROMPT), come(kv, PROMPT)
    assert first.blocks[0] is second.blocks[0]
    assert kv.available_blocks == 1
    kv.release(first, 1.0)
    assert kv.available_blocks == 1
    kv.release(second, 2.0)
    assert kv.available_blocks == 4


def test_a_lease_is_released_once():
    """Releasing twice is a bug of the caller and is told so."""
    kv = make_kv(4)
    lease = come(kv, PROMPT)
    kv.release(lease, 0.0)
    with pytest.raises(AssertionError, match="exactly once"):
        kv.release(lease, 1.0)


def test_content_that_somebody_else_sealed_first_is_adopted():
    """Two requests compute the same block at the same time: the second to seal gives its frame back and shares."""
    kv = make_kv(8)
    hashes = hashes_of(kv, PROMPT)
    one, two = kv.admit([], 0.0), kv.admit([], 0.0)
    assert kv.grow(one, 2)
    assert kv.grow(two, 2)
    planned = two.table.view()
    kv.seal(one, hashes, 1)
    kv.seal(two, hashes, 1)
    assert one.blocks[0] is two.blocks[0]
    assert two.table.view().tolist() == one.table.view().tolist()
    assert planned.tolist() == [1], "a view that a step may still read does not change"
    assert kv.device.pool.free == 7
    audit.check(kv)


# --- room ------------------------------------------------------------------------------------------------------------


def test_growing_without_room_changes_nothing():
    """Either all frames are granted or none is, and nothing is evicted for nothing."""
    kv = make_kv(4)
    visit(kv, [9, 9])
    lease = come(kv, [1, 2, 3, 4])
    assert not kv.grow(lease, 12)
    assert len(lease.blocks) == 2
    assert cached_blocks(kv, [9, 9]) == 1
    assert kv.grow(lease, 8)
    assert cached_blocks(kv, [9, 9]) == 0


def test_eviction_takes_the_end_of_a_chain_first():
    """When frames are short, a cached prompt loses its last blocks and keeps its beginning."""
    kv = make_kv(4)
    visit(kv, PROMPT)
    come(kv, [7, 8, 9])
    assert cached_blocks(kv, PROMPT) == 2


def test_free_frames_are_used_before_anything_is_evicted():
    """The cache fills the device before it forgets."""
    kv = make_kv(6)
    visit(kv, PROMPT)
    visit(kv, [7, 8, 9, 10, 11, 12])
    assert cached_blocks(kv, PROMPT) == 3
    assert kv.device.evicted_blocks == 0


def test_frames_come_in_ascending_runs():
    """A fresh pool hands out neighbours, so that a prompt lies in one piece."""
    pool = FramePool(8)
    assert pool.take(3) == [0, 1, 2]
    assert pool.take(2) == [3, 4]
    pool.give_back([1, 2])
    assert pool.take(3) == [1, 2, 5]


def test_a_frame_is_given_back_once():
    """A frame that is free already is not taken back."""
    pool = FramePool(2)
    pool.give_back(pool.take(1))
    with pytest.raises(AssertionError, match="given back twice"):
        pool.give_back([0])


def test_a_table_view_survives_growth_and_replacement():
    """What a running step sees of a block table does not move under it."""
    table = BlockTable()
    table.extend([1, 2, 3])
    view = table.view()
    table.extend(range(100))
    table.replace(0, 77)
    assert view.tolist() == [1, 2, 3]
    assert table.view()[:3].tolist() == [77, 2, 3]


# --- a tier below ----------------------------------------------------------------------------------------------------


def test_sealed_blocks_spill_and_come_up_again():
    """A block that left the device is onboarded when it is matched, and the request waits for it."""
    kv = make_kv(4, 8)
    visit(kv, PROMPT)
    assert land(kv) == 3
    visit(kv, [7] * 8)
    lease = kv.admit(hashes_of(kv, PROMPT), 1.0)
    assert lease.found_in == [DRAM] * 3
    assert lease.onboarding == 3
    assert len(lease.table) == 0
    land(kv)
    assert lease.onboarding == 0
    assert len(lease.table) == 3
    audit.check(kv)


def test_dropping_a_block_that_was_spilled_moves_nothing():
    """Eviction of a block with a copy below starts no transfer."""
    kv = make_kv(4, 8)
    visit(kv, PROMPT)
    land(kv)
    assert kv.grow(kv.admit([], 0.0), 8)
    assert not kv.moving
    assert cached_blocks(kv, PROMPT) == 3


def test_a_failed_onboard_shortens_the_match():
    """The request computes from the first block that did not arrive; what failed by chance stays cached below."""
    kv = make_kv(4, 8)
    visit(kv, PROMPT)
    land(kv)
    visit(kv, [7] * 8)
    land(kv)
    lease = kv.admit(hashes_of(kv, PROMPT), 1.0)
    for transfer in kv.plan_transfers(1.0):
        kv.complete(transfer.id, TierFault("io") if transfer.hash == hashes_of(kv, PROMPT)[1] else None, 1.0)
    assert lease.onboarding == 0
    assert len(lease.blocks) == len(lease.table) == 1
    assert cached_blocks(kv, PROMPT) == 3
    audit.check(kv)


def test_a_corrupt_copy_is_forgotten():
    """A block whose only copy does not verify is never tried again."""
    kv = make_kv(4, 8)
    visit(kv, [1, 2])
    land(kv)
    visit(kv, [7] * 8)
    lease = kv.admit(hashes_of(kv, [1, 2]), 1.0)
    land(kv, TierFault("corrupt"))
    assert not lease.blocks
    assert cached_blocks(kv, [1, 2]) == 0
    audit.check(kv)


def test_a_block_that_is_sent_for_again_is_not_trusted_before_it_lands():
    """One of a lease's blocks fails, and before the others arrive another request sends for it again: the first lease
    must not take the unfinished copy for its own."""
    kv = make_kv(4, 8)
    visit(kv, PROMPT[:4])
    land(kv)
    visit(kv, [7] * 8)
    land(kv)
    first = kv.admit(hashes_of(kv, PROMPT[:4]), 1.0)
    head, tail = kv.plan_transfers(1.0)
    kv.complete(head.id, TierFault("io"), 1.0)
    second = kv.admit(hashes_of(kv, PROMPT[:2]), 2.0)
    kv.complete(tail.id, None, 2.0)
    assert first.onboarding == 0
    assert len(first.blocks) == 0
    land(kv)
    assert len(second.table) == 1
    audit.check(kv)


def test_available_frames_can_be_taken():
    """A parent whose child is being spilled is not counted as available, and is again when the child has landed."""
    kv = make_kv(4, 8, transfers_max=1)
    visit(kv, PROMPT[:4])
    (parent,) = kv.plan_transfers(0.0)
    kv.complete(parent.id, None, 0.0)
    assert kv.available_blocks == 4
    (child,) = kv.plan_transfers(0.0)
    assert kv.available_blocks == 2
    assert kv.grow(kv.admit([], 0.0), 4)
    kv.complete(child.id, None, 1.0)
    assert kv.available_blocks == 2
    audit.check(kv)


def test_an_abandoned_onboard_still_lands():
    """A request that leaves while its blocks are on their way leaves them cached on the device."""
    kv = make_kv(4, 8)
    visit(kv, PROMPT)
    land(kv)
    visit(kv, [7] * 8)
    land(kv)
    lease = kv.admit(hashes_of(kv, PROMPT), 1.0)
    transfers = kv.plan_transfers(1.0)
    kv.release(lease, 2.0)
    assert kv.available_blocks == 1, "frames in flight belong to their transfers"
    for transfer in transfers:
        kv.complete(transfer.id, None, 3.0)
    assert kv.available_blocks == 4
    audit.check(kv)


def test_transfers_in_flight_are_bounded():
    """At most `transfers_max` move at once; the rest waits its turn."""
    kv = make_kv(8, 8, transfers_max=2)
    visit(kv, list(range(12)))
    assert len(kv.plan_transfers(0.0)) == 2
    assert kv.plan_transfers(0.0) == []
    kv.complete(1, None, 0.0)
    assert len(kv.plan_transfers(0.0)) == 1


# --- the audit -------------------------------------------------------------------------------------------------------


def test_the_audit_sees_a_lost_frame():
    """A frame that nobody owns and that is not free is a breach, in words."""
    kv = make_kv(4)
    kv.device.pool.take(1)
    with pytest.raises(InvariantViolation, match="device: 4 frames, 0 owned, 3 free"):
        audit.check(kv)


def test_the_audit_sees_a_wrong_lease_count():
    """A count that no lease backs is a breach."""
    kv = make_kv(4)
    visit(kv, PROMPT)
    next(iter(kv.index.values())).leases += 1
    with pytest.raises(InvariantViolation, match="counts 1 leases, 0 hold it"):
        audit.check(kv)
