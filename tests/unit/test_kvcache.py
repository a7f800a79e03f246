"""The KV manager by example: one behaviour each. What holds in any order of calls is in tests/property."""

from __future__ import annotations

from array import array

import pytest

from server.kvcache import audit
from server.kvcache.audit import InvariantViolation
from server.kvcache.block import BlockTable
from server.kvcache.hashing import block_hash, chain_root, extend_hashes
from server.kvcache.manager import Over
from server.kvcache.pool import FramePool
from server.kvcache.reuse import BATCH
from server.kvcache.step_cost import StepWork
from server.kvcache.tiers.base import Recovered
from server.types import DEVICE, DRAM, SSD, Retention, TierFault
from tests.property.core import cached_blocks, come, hashes_of, kv_with_on_ssd_only, land, make_kv, visit

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
    assert len(lease.table) == 2
    assert lease.served == {DEVICE: 2}


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
    assert first.table[0] == second.table[0]
    assert kv.available_blocks == 1
    kv.release(first)
    assert kv.available_blocks == 1
    kv.release(second)
    assert kv.available_blocks == 4


def test_a_lease_is_released_once():
    """Releasing twice is a bug of the caller and is told so."""
    kv = make_kv(4)
    lease = come(kv, PROMPT)
    kv.release(lease)
    with pytest.raises(AssertionError, match="exactly once"):
        kv.release(lease)


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
    assert len(lease.table) == 2
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
    assert kv.device.evicted["capacity"] == 0


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
    """A block that left the device is loaded when it is matched, and joins the table when it came."""
    kv = make_kv(4, 8)
    visit(kv, PROMPT)
    assert land(kv) == 3
    visit(kv, [7] * 8)
    lease = kv.admit(hashes_of(kv, PROMPT), 1.0)
    assert lease.loading
    assert kv.compute_until(lease, 1.0) == 0, "waiting beats computing as far as anybody knows"
    land(kv, now=1.0)
    assert kv.join(lease) == 3
    assert lease.served == {DEVICE: 0, DRAM: 3}
    assert not lease.loading
    audit.check(kv)


def test_dropping_a_block_that_was_spilled_moves_nothing():
    """Eviction of a block with a copy below starts no transfer."""
    kv = make_kv(4, 8)
    visit(kv, PROMPT)
    land(kv)
    assert kv.grow(kv.admit([], 0.0), 8)
    assert not kv.moving
    assert cached_blocks(kv, PROMPT) == 3


def test_what_failed_to_come_is_computed():
    """The request computes the block that did not arrive and takes those behind it; what failed by chance stays."""
    kv = make_kv(6, 16)
    visit(kv, PROMPT)
    land(kv)
    visit(kv, [7] * 12)
    land(kv)
    hashes = hashes_of(kv, PROMPT)
    lease = kv.admit(hashes, 1.0)
    for transfer in kv.plan_transfers(1.0):
        kv.complete(transfer.id, TierFault("io") if transfer.hash == hashes[1] else None, 1.0)
    assert kv.join(lease) == 1
    assert kv.compute_until(lease, 1.0) == 2
    assert kv.grow(lease, 4)
    kv.seal(lease, hashes, 2)
    assert kv.join(lease) == 1
    assert lease.served == {DEVICE: 0, DRAM: 2}
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
    assert kv.join(lease) == 0
    assert not lease.loads
    assert cached_blocks(kv, [1, 2]) == 0
    assert kv.tiers[DRAM].evicted["corrupt"] == 1
    audit.check(kv)


def test_a_corrupt_copy_in_dram_is_replaced_from_ssd():
    """A load that fails in one tier goes on from the next that has the block."""
    kv = make_kv(4, 8, 8)
    visit(kv, [1, 2])
    land(kv)
    visit(kv, [7] * 8)
    lease = kv.admit(hashes_of(kv, [1, 2]), 1.0)
    (first,) = [t for t in kv.plan_transfers(1.0) if t.target[0] == DEVICE]
    kv.complete(first.id, TierFault("corrupt"), 1.0)
    land(kv, now=1.0)
    assert kv.join(lease) == 1
    audit.check(kv)


def test_two_requests_share_one_load():
    """Both wait for the same transfer, and both get the block."""
    kv = make_kv(4, 8)
    visit(kv, [1, 2])
    land(kv)
    visit(kv, [7] * 8)
    land(kv)
    one, two = (kv.admit(hashes_of(kv, [1, 2]), 1.0) for _ in range(2))
    assert land(kv, now=1.0) == 1
    assert kv.join(one) == kv.join(two) == 1
    audit.check(kv)


def test_nobody_waits_for_a_load_for_ever():
    """A load that is late is waited for no longer; one past its deadline counts against its tier, which is then off."""
    kv = make_kv(4, 8)
    visit(kv, PROMPT)
    land(kv)
    visit(kv, [7] * 8)
    land(kv)
    lease = kv.admit(hashes_of(kv, PROMPT), 1.0)
    kv.plan_transfers(1.0)
    assert kv.compute_until(lease, 1.0) == 0
    assert 1.0 < kv.wake_s < 1.1
    assert kv.compute_until(lease, kv.wake_s) > 3, "all of it, and what follows in the same step"
    kv.plan_transfers(60.0)
    assert not lease.loads
    assert not kv.planner.breakers[DRAM].closed
    kv.release(lease)
    again = kv.admit(hashes_of(kv, PROMPT), 60.0)
    assert not again.loading
    assert kv.declined[(DRAM, "disabled")] == 3
    audit.check(kv)


def test_computing_from_the_front_meets_loading_from_the_back():
    """Where both take about as long, the request computes the first half while the second is loaded."""
    kv = make_kv(32, 64, guesses=[(0.01, 0.0)])
    prompt = list(range(32))
    visit(kv, prompt)
    land(kv)
    visit(kv, list(range(100, 164)))
    land(kv)
    kv.planner.up[0].late(0.01, 1)
    kv.planner.step.observe(StepWork(2), 0.01)
    hashes = hashes_of(kv, prompt)
    lease = kv.admit(hashes[:-1], 1.0)
    half = kv.compute_until(lease, 1.0)
    assert half == 7
    first = kv.plan_transfers(1.0)[0]
    assert first.hash == hashes[14], "loading starts at the end"


def test_a_slow_tier_is_left_alone():
    """Loading that would take far longer than computing is not begun, but for a block once a second, to find out."""
    kv = make_kv(4, 8, guesses=[(1.0, 0.0)])
    visit(kv, PROMPT)
    for transfer in kv.plan_transfers(0.0):
        kv.complete(transfer.id, None, 0.0)
    visit(kv, [7] * 8)
    kv.planner.up[0].late(1.0, 1)
    kv.planner.step.observe(StepWork(2), 0.001)
    probing = kv.admit(hashes_of(kv, PROMPT), 1.0)
    assert not probing.loading
    assert kv.compute_until(probing, 1.0) > 3, "nobody waits for it"
    assert kv.grow(probing, 4)
    assert kv.plan_transfers(1.0)[0].hash == hashes_of(kv, PROMPT)[2]
    land(kv)
    kv.release(probing)
    assert not kv.admit(hashes_of(kv, PROMPT), 1.5).loading
    assert kv.declined[(DRAM, "slower_than_recompute")] == 2 + 3


# --- three tiers -----------------------------------------------------------------------------------------------------


def test_blocks_sink_to_the_lowest_tier_and_rise_from_it():
    """Sealed blocks are copied to DRAM and on to SSD; they come up over both hops, and are counted where they lay."""
    kv = make_kv(4, 4, 16)
    visit(kv, PROMPT)
    land(kv)
    assert len(kv.tiers[SSD].find) == 3
    for start in (10, 20):
        visit(kv, list(range(start, start + 8)))
        land(kv)
    lease = kv.admit(hashes_of(kv, PROMPT), 1.0)
    land(kv, now=1.0)
    assert kv.join(lease) == 3
    assert lease.served == {DEVICE: 0, SSD: 3}
    audit.check(kv)


def test_a_received_request_fetches_to_dram():
    """Blocks that are only on SSD are in DRAM before their request is admitted; those of no use are not fetched."""
    kv = kv_with_on_ssd_only(PROMPT)
    hashes = hashes_of(kv, PROMPT)
    assert not kv.tiers[DRAM].has(hashes[0])
    kv.prefetch(hashes)
    land(kv, now=1.0)
    assert all(kv.tiers[DRAM].has(value) for value in hashes)
    assert not kv.device.has(hashes[0])
    audit.check(kv)


@pytest.mark.parametrize("soon", [False, True])
def test_what_was_fetched_early_counts_where_it_lay(soon: bool):
    """Whether its blocks were brought to DRAM or, as it is next, to the device: a request was served from SSD, once."""
    kv = kv_with_on_ssd_only(PROMPT, device=8)
    hashes = hashes_of(kv, PROMPT)
    kv.prefetch(hashes, soon=soon)
    land(kv, now=1.0)
    assert all(kv.device.has(value) == soon for value in hashes)
    for origin in (SSD, DEVICE):
        lease = kv.admit(hashes, 2.0)
        assert lease.loading == (not soon and origin == SSD)
        land(kv, now=2.0)
        kv.join(lease)
        assert +lease.served == {origin: 3}
        kv.release(lease)
    audit.check(kv)


def test_early_loads_leave_the_device_to_those_that_run():
    """Nothing is fetched to the device for later while less than half of it is free or evictable."""
    kv = make_kv(8, 16)
    visit(kv, PROMPT)
    land(kv)
    visit(kv, [7] * 16)
    running = kv.admit([], 1.0)
    assert kv.grow(running, 10)
    kv.prefetch(hashes_of(kv, PROMPT), soon=True)
    assert not any(transfer.target[0] == DEVICE for transfer in kv.plan_transfers(1.0))
    kv.release(running)
    assert any(transfer.target[0] == DEVICE for transfer in kv.plan_transfers(1.0))


def test_a_restart_finds_what_the_ssd_holds():
    """Books filled from what a tier recovered match, load, evict and pin like any others."""
    old = make_kv(4, 8, 8)
    visit(old, PROMPT)
    land(old)
    ssd, hashes = old.tiers[SSD], hashes_of(old, PROMPT)
    frames = [ssd.find[value] for value in reversed(hashes)]
    kv = make_kv(4, 8, 8)
    kv.recover(Recovered(frames, hashes[::-1], [*frames[1:], -1], [2, 1, 0], {hashes[2]: 50.0}))
    audit.check(kv)
    assert kv.pinned_blocks == 3
    lease = kv.admit(hashes, 1.0)
    land(kv, now=1.0)
    assert kv.join(lease) == 3
    kv.plan_transfers(100.0)
    assert kv.pinned_blocks == 0
    audit.check(kv)


def test_a_pin_outlasts_any_pressure():
    """Pinned blocks stay in the lowest tier whatever else is written; without the pin they go."""
    for pinned in (True, False):
        kv = make_kv(4, 8, 12, pin_ratio=0.5)
        visit(kv, PROMPT)
        land(kv)
        if pinned:
            assert kv.pin(hashes_of(kv, PROMPT), 1e9, 0.0) == 3
        for start in range(10, 200, 8):
            visit(kv, list(range(start, start + 8)))
            land(kv)
        assert cached_blocks(kv, PROMPT) == (3 if pinned else 0)
        audit.check(kv)


def test_pins_are_bounded():
    """Beyond their share nothing more is pinned, and the caller is told."""
    kv = make_kv(4, 8, 12, pin_ratio=0.25)
    for start in (0, 10):
        visit(kv, list(range(start, start + 6)))
        land(kv)
    assert kv.pin(hashes_of(kv, list(range(6))), 1e9, 0.0) == 3
    assert kv.pin(hashes_of(kv, list(range(10, 16))), 1e9, 0.0) == 0
    assert kv.unpin(hashes_of(kv, list(range(6)))) == 1
    assert kv.pin(hashes_of(kv, list(range(10, 16))), 1e9, 0.0) == 3


def test_evicting_by_hand_leaves_nothing():
    """What an operator evicts is nowhere any more, and the lowest tier is told."""
    kv = make_kv(4, 8, 12)
    visit(kv, PROMPT)
    land(kv)
    kv.take_notes()
    assert kv.evict(hashes_of(kv, PROMPT)) == 3
    assert cached_blocks(kv, PROMPT) == 0
    assert [note.kind for note in kv.take_notes()] == ["drop"] * 3
    audit.check(kv)


def test_a_full_disk_is_lived_with():
    """Without room for new frames the tier goes on with those it has, and tries again a minute later."""
    kv = make_kv(8, 8, 12)
    visit(kv, [1, 2])
    land(kv)
    visit(kv, [3, 4])
    land(kv, TierFault("no_space"), into=SSD)
    assert kv.tiers[SSD].pool.unusable() == 11
    audit.check(kv)
    visit(kv, [5, 6])
    land(kv, now=1.0)
    assert kv.tiers[SSD].has(hashes_of(kv, [5, 6])[0]), "the one frame there is changed hands"
    visit(kv, [7, 8])
    land(kv, now=62.0)
    assert kv.tiers[SSD].pool.unusable() == 0
    audit.check(kv)


def test_a_tier_that_was_sick_gets_what_it_missed_though_nobody_asks():
    """What cannot be written while the lowest tier is off is written once that works again, on an idle daemon too."""
    kv = make_kv(8, 32, 32)
    for start in (0, 10, 20):
        visit(kv, [start, start + 1])
        land(kv, TierFault("io"), into=SSD)
    assert not kv.planner.breakers[SSD].closed
    visit(kv, PROMPT)
    land(kv, now=0.5)
    assert not any(kv.tiers[SSD].has(value) for value in hashes_of(kv, PROMPT))
    assert not kv.busy, "a drain does not wait for it"
    assert 0.5 < kv.wake_s < 2.0
    land(kv, now=kv.wake_s)
    assert all(kv.tiers[SSD].has(value) for value in hashes_of(kv, PROMPT))
    audit.check(kv)


def test_an_endurance_budget_is_kept():
    """Beyond the budget nothing is written."""
    kv = make_kv(8, 32, 32, write_bytes_per_day=86_400.0)
    for start in range(0, 60, 4):
        visit(kv, list(range(start, start + 4)))
        land(kv)
    assert kv.traffic.hops[-1].outcomes["reject_wear"] > 0
    assert kv.traffic.hops[-1].outcomes["admit"] == 1, "60 seconds' worth of 1 byte per second: one block of 32 bytes"


def test_what_should_not_outlive_the_process_does_not():
    """Blocks of a transient request stay above the SSD until another request uses them."""
    kv = make_kv(8, 8, 8)
    lease = kv.admit([], 0.0)
    lease.retention = Retention(transient=True)
    assert kv.grow(lease, 6)
    kv.seal(lease, hashes_of(kv, PROMPT), 3)
    kv.release(lease)
    land(kv)
    assert len(kv.tiers[DRAM].find) == 3
    assert not kv.tiers[SSD].find
    visit(kv, [*PROMPT, 7])
    land(kv)
    assert len(kv.tiers[SSD].find) == 3


def test_available_frames_can_be_taken():
    """A parent whose child is being spilled is not counted as available, and is again when the child has landed."""
    kv = make_kv(4, 8, in_flight_max=1)
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
    kv.release(lease)
    assert kv.available_blocks == 1, "frames in flight belong to their transfers"
    for transfer in transfers:
        kv.complete(transfer.id, None, 3.0)
    assert kv.available_blocks == 4
    audit.check(kv)


def test_transfers_in_flight_are_bounded():
    """At most `in_flight_max` move at once per hop and direction; the rest waits its turn."""
    kv = make_kv(8, 8, in_flight_max=2)
    visit(kv, list(range(12)))
    assert len(kv.plan_transfers(0.0)) == 2
    assert kv.plan_transfers(0.0) == []
    kv.complete(next(iter(kv.traffic.in_flight)), None, 0.0)
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
    kv.device.holds[0] += 1
    with pytest.raises(InvariantViolation, match="counts 1 holds, 0 are known"):
        audit.check(kv)


# --- what giving way costs -------------------------------------------------------------------------------------------


def test_the_price_of_a_lease_is_what_it_alone_holds():
    """Blocks that others hold too stay on the device: they give no frame and cost nothing to get back."""
    kv = make_kv(32)
    kv.planner.step.observe(StepWork(100), 0.1)
    one, other = come(kv, list(range(16))), come(kv, [*range(8), *range(50, 58)])
    seconds, frames = kv.price(other, 16, kv.traffic.queued())
    assert frames == 4
    assert seconds == pytest.approx(kv.planner.step.tokens_s(8, 8))
    kv.release(one)
    assert kv.price(other, 16, kv.traffic.queued())[1] == 8


def test_what_lies_below_too_is_loaded_if_that_is_faster():
    """The price is that of the shorter way back."""
    for block_s, loaded in ((1e-6, True), (10.0, False)):
        kv = make_kv(32, 64, guesses=[(block_s, 0.0)])
        kv.planner.step.observe(StepWork(100), 0.1)
        lease = come(kv, list(range(16)))
        for transfer in kv.plan_transfers(0.0):
            kv.complete(transfer.id, None, 0.0)
        seconds, frames = kv.price(lease, 16, kv.traffic.queued())
        assert frames == 8
        assert (seconds < 0.5 * kv.planner.step.tokens_s(0, 16)) == loaded


def test_a_batch_leaves_its_blocks_in_a_kind_of_their_own():
    """What only the background used is told apart from what others will ask for; what it found stays theirs."""
    kv = make_kv(32)
    visit(kv, list(range(8)))
    kinds = [kv.device.kind[kv.device.find[value]] for value in hashes_of(kv, list(range(8)))]
    assert BATCH not in kinds
    lease = come(kv, [*range(8), *range(50, 58)])
    kv.release(lease, over=Over(16, 0, background=True))
    after = [kv.device.kind[kv.device.find[value]] for value in hashes_of(kv, [*range(8), *range(50, 58)])]
    assert after[:4] == kinds
    assert set(after[4:]) == {BATCH}
    audit.check(kv)
