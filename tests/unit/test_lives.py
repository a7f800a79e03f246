"""What the cache says of itself: ages, second lives and ghosts of blocks; what hits spared, what loads cost, and why
what is cached was computed all the same."""

from __future__ import annotations

import pytest

from server.kvcache.lives import SAMPLE, Lives, sampled
from server.kvcache.report import kv_report
from server.kvcache.step_cost import StepWork
from server.types import DEVICE, DRAM, SSD, TierFault
from tests.property.core import come, hashes_of, kv_with_on_ssd_only, land, make_kv, visit

PROMPT = [1, 2, 3, 4, 5, 6]  # three blocks of two
FOLLOWED, OTHER = bytes([SAMPLE]) + bytes(31), bytes([SAMPLE + 1]) + bytes(31)


def counts(histogram) -> int:
    return sum(histogram.counts)


# --- lives -----------------------------------------------------------------------------------------------------------


def test_one_block_in_eight_is_followed():
    """Which, its hash says: the same ones in every tier."""
    values = [bytes([number]) + bytes(31) for number in range(256)]
    assert len(sampled(values)) == 256 // SAMPLE
    assert sampled([FOLLOWED, OTHER]) == [FOLLOWED]


def test_a_followed_block_has_a_life_and_a_ghost():
    """Arrival to eviction, and from there to the next request; others have only their age."""
    lives = Lives(64)
    for value in (FOLLOWED, OTHER):
        lives.came(value, 10.0)
        lives.evicted(value, 30.0, 100.0)
        lives.asked_in_vain(value, 160.0)
    life = lives.life
    assert (counts(life.eviction_age_s), life.eviction_age_s.total) == (2, 140.0)
    assert (counts(life.lifetime_s), life.lifetime_s.total) == (1, 90.0)
    assert (counts(life.evict_to_reuse_s), life.evict_to_reuse_s.total) == (1, 60.0)
    assert life.ghost_hit_blocks == SAMPLE


def test_a_ghost_is_asked_for_once_and_ends_where_its_block_is_back():
    """What came back is no ghost, nor what was asked for already."""
    lives = Lives(64)
    lives.evicted(FOLLOWED, 0.0, 1.0)
    lives.came(FOLLOWED, 2.0)
    lives.asked_in_vain(FOLLOWED, 3.0)
    assert lives.life.ghost_hit_blocks == 0
    lives.evicted(FOLLOWED, 0.0, 4.0)
    lives.asked_in_vain(FOLLOWED, 5.0)
    lives.asked_in_vain(FOLLOWED, 6.0)
    assert lives.life.ghost_hit_blocks == SAMPLE


def test_as_many_ghosts_as_the_tier_has_frames():
    """A block that left so long ago that twice the tier would not have it either is forgotten."""
    lives = Lives(2 * SAMPLE)
    values = [bytes([SAMPLE, number]) + bytes(30) for number in range(3)]
    for value in values:
        lives.evicted(value, 0.0, 1.0)
    for value in values:
        lives.asked_in_vain(value, 2.0)
    assert lives.life.ghost_hit_blocks == 2 * SAMPLE


def test_what_was_there_before_this_process_has_no_age():
    """Nobody knows when it was used last."""
    lives = Lives(8)
    lives.evicted(OTHER, 0.0, 1e6)
    lives.asked_again(0.0, 1e6)
    assert counts(lives.life.eviction_age_s) == counts(lives.life.reuse_gap_s) == 0


def test_blocks_dropped_by_an_operator_leave_no_trace():
    """No ghost and no lifetime: it was not for want of room."""
    lives = Lives(8)
    lives.came(FOLLOWED, 1.0)
    lives.gone(FOLLOWED)
    lives.asked_in_vain(FOLLOWED, 2.0)
    assert not lives.came_s
    assert lives.life.ghost_hit_blocks == counts(lives.life.lifetime_s) == 0


def test_requests_see_gaps_and_ghosts_by_tier():
    """A request is counted where the block is, and as missed in the faster tiers that had it."""
    kv = make_kv(4, 64)
    tokens, value = next(([n, n], hashes_of(kv, [n, n])[0]) for n in range(1000) if sampled(hashes_of(kv, [n, n])))
    visit(kv, tokens, now=1.0)
    land(kv, now=1.0)
    visit(kv, [7] * 8, now=5.0)
    assert not kv.device.has(value)
    kv.asked([value], 9.0)
    device, dram = (tier.life for tier in kv_report(kv).tiers)
    assert counts(device.evict_to_reuse_s) == 1
    assert device.ghost_hit_blocks == SAMPLE
    assert (counts(dram.reuse_gap_s), dram.reuse_gap_s.total) == (1, pytest.approx(8.0))
    assert counts(device.reuse_gap_s) == dram.ghost_hit_blocks == 0


# --- accounts --------------------------------------------------------------------------------------------------------


def test_hits_spare_what_they_would_have_cost():
    """By tier, position and measured steps: later blocks spare more, as they attend to more; once each."""
    kv = make_kv(4, 8)
    for tokens, pairs in ((8, 36), (16, 136), (8, 100)):
        kv.planner.step.observe(StepWork(tokens, pairs), 0.01 * tokens + 0.0001 * pairs)
    visit(kv, PROMPT)
    land(kv)
    lease = come(kv, PROMPT)
    kv.accounts.credit(lease)
    device, dram = (tier.life for tier in kv_report(kv).tiers)
    expected = kv.planner.step.tokens_s(0, 4)
    assert device.avoided_s == pytest.approx(expected) != 0
    kv.accounts.credit(lease)
    assert device.avoided_s == pytest.approx(expected)
    kv.release(lease)
    visit(kv, [7] * 8)
    lease = come(kv, PROMPT, now=1.0)
    kv.accounts.credit(lease)
    assert dram.avoided_s == pytest.approx(expected)


def test_a_restore_is_timed_to_its_last_landing():
    """From admission to the block that came last, whenever that is noticed, by the slowest tier."""
    kv = make_kv(4, 4, 16)
    visit(kv, PROMPT)
    land(kv)
    for start in (10, 20):
        visit(kv, list(range(start, start + 8)))
        land(kv)
    lease = kv.admit(hashes_of(kv, PROMPT), 1.0)
    land(kv, now=1.2)
    kv.join(lease)
    kv.accounts.restored(lease, 9.0)
    lives = {tier.name: tier.life.restore_s for tier in kv_report(kv).tiers}
    assert (counts(lives[SSD]), lives[SSD].total) == (1, pytest.approx(0.2))
    assert counts(lives[DRAM]) == 0


@pytest.mark.parametrize("reason", ["failed", "late", "split"])
def test_why_a_block_that_is_there_was_computed(reason: str):
    """Its load failed, was late, or the others were loaded meanwhile."""
    kv = make_kv(6, 16)
    visit(kv, PROMPT)
    land(kv)
    visit(kv, [7] * 12)
    land(kv)
    lease = kv.admit(hashes_of(kv, PROMPT), 1.0)
    if reason == "failed":
        for transfer in kv.plan_transfers(1.0):
            kv.complete(transfer.id, TierFault("io"), 1.0)
    elif reason == "late":
        kv.compute_until(lease, 1.0)
        kv.compute_until(lease, 1e6)
    assert kv.grow(lease, 2)
    assert lease.missed == {reason: 1}


def test_what_is_not_worth_loading_is_a_miss_with_a_reason():
    """All that its tier had, on the lease; a tier that is off is another reason."""
    kv = make_kv(4, 8)
    visit(kv, PROMPT)
    land(kv)
    visit(kv, [7] * 8)
    for tokens in (8, 16):
        kv.planner.step.observe(StepWork(tokens, tokens), 1e-9 * tokens)
    kv.planner.up[0].probe_s = 100.0
    assert kv.admit(hashes_of(kv, PROMPT), 1.0).missed == {"slower_than_recompute": 3}
    for _ in range(3):
        kv.planner.breakers[DRAM].failed(1.0)
    assert kv.admit(hashes_of(kv, PROMPT), 1.0).missed == {"disabled": 3}


# --- what is fetched early -------------------------------------------------------------------------------------------


def on_ssd_only():
    """A cache whose PROMPT is nowhere but on SSD, and its hashes."""
    kv = kv_with_on_ssd_only(PROMPT)
    return kv, hashes_of(kv, PROMPT)


def outcomes(kv) -> dict[str, int]:
    return {outcome: count for outcome, count in kv_report(kv).prefetched.items() if count}


def test_a_prefetch_that_is_used_was_useful():
    """Once for each block, when a request takes it."""
    kv, hashes = on_ssd_only()
    kv.prefetch(hashes)
    land(kv, now=1.0)
    assert outcomes(kv) == {}
    kv.admit(hashes, 2.0)
    assert outcomes(kv) == {"useful": 3}


def test_a_prefetch_that_somebody_waits_for_was_late():
    """Its blocks are on their way, and the request has to wait."""
    kv, hashes = on_ssd_only()
    kv.prefetch(hashes)
    kv.plan_transfers(1.0)
    kv.admit(hashes, 1.0)
    land(kv, now=1.0)
    assert outcomes(kv) == {"late": 3}


def test_a_prefetch_that_nobody_used_was_wasted():
    """The blocks went for others before anybody came."""
    kv, hashes = on_ssd_only()
    kv.prefetch(hashes)
    land(kv, now=1.0)
    for start in range(100, 180, 8):
        visit(kv, list(range(start, start + 8)), now=2.0)
        land(kv, now=2.0)
    assert outcomes(kv) == {"wasted": 3}


def test_a_prefetch_that_failed_or_was_given_up_was_cancelled():
    """A fault ends it, and so does the end of the process."""
    kv, hashes = on_ssd_only()
    kv.prefetch(hashes)
    land(kv, TierFault("io"), now=1.0, into=DRAM)
    assert outcomes(kv) == {"cancelled": 3}
    kv, hashes = on_ssd_only()
    kv.prefetch(hashes)
    kv.flush()
    assert outcomes(kv) == {"cancelled": 3}


# --- ways down and up ------------------------------------------------------------------------------------------------


def test_every_hop_counts_what_it_takes_and_refuses():
    """Blocks written by tier they go to; a duration for every landing."""
    kv = make_kv(4, 8, 16)
    visit(kv, PROMPT)
    land(kv, now=1.0)
    report = kv_report(kv)
    assert {tier: outcome["admit"] for tier, outcome in report.admissions.items()} == {DRAM: 3, SSD: 3}
    for hop in report.hops:
        assert counts(hop.duration_s) == hop.moved_blocks == (3 if hop.target != DEVICE and hop.source != SSD else 0)
