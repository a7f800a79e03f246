"""What is learned about reuse, and what follows from it for eviction and for writes to SSD."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from random import Random

import numpy as np
import pytest

from server.kvcache.admission import Admission
from server.kvcache.planner import WriteBudget
from server.kvcache.reuse import (
    BINS,
    CLASSES,
    EDGES_S,
    GUESS,
    LONGEST_S,
    ReuseModel,
    bin_of,
    class_of,
    densities,
    kind_of,
    unused,
)
from server.types import BlockHash

SHORT, LONG = kind_of(10, 4), kind_of(10, 4000)
LATER = 200.0


def names() -> Iterator[BlockHash]:
    return (number.to_bytes(8, "little") for number in count())


def taught(requests: int = 2000, *, every_s: float = 1.0) -> ReuseModel:
    """It saw requests of two kinds: those that answered much were asked for again a minute later, the others never."""
    model, fresh, due = ReuseModel(), names(), []
    for number in range(requests):
        now = number * every_s
        while due and due[0][0] <= now:
            model.asked([due.pop(0)[1]], now)
        value = next(fresh)
        model.now_s = now
        model.left([value], [0], [LONG if number % 2 else SHORT])
        if number % 2:
            due.append((now + 60.0, value))
    return model


def test_ages_fall_into_bins_that_grow():
    """Every age has a bin, and its edges are where they are said to be."""
    assert [bin_of(age) for age in (0.0, 0.99, 1.0, 1.29)] == [0, 0, 1, 2]
    for number in range(1, BINS):
        assert bin_of(float(EDGES_S[number]) * 1.001) == number
    assert bin_of(100 * LONGEST_S) == BINS - 1


def test_every_request_has_a_kind_and_every_block_a_class():
    """However long prompt and answer are."""
    rng = Random(1)
    for _ in range(200):
        kind = kind_of(rng.randrange(10 ** rng.randrange(1, 8)), rng.randrange(10 ** rng.randrange(1, 8)))
        assert 0 <= class_of(rng.randrange(100), kind) < CLASSES


def test_density_is_the_best_that_keeping_can_bring():
    """Against trying every moment to give up, hit by hit and second by second."""
    hazard = np.random.default_rng(2).uniform(0, 0.4, (3, BINS))
    widths = np.append(np.diff(EDGES_S), EDGES_S[-1])
    found = densities(hazard)
    for row in range(3):
        for start in range(0, BINS, 7):
            left, hits, seconds, best = 1.0, 0.0, 0.0, 0.0
            for bin in range(start, BINS):
                used = left * hazard[row, bin]
                hits, seconds, left = hits + used, seconds + (left - used / 2) * widths[bin], left - used
                best = max(best, hits / seconds)
            assert found[row, start] == pytest.approx(best)


def test_before_anything_is_learned_the_older_is_worth_less():
    """Which is LRU."""
    density = densities(GUESS[None])[0]
    assert all(density[1:] <= density[:-1])


def test_learns_what_comes_back_and_when():
    """Of two kinds of requests it tells the one that comes back, and that it does a minute later."""
    model = taught()
    back, gone = (class_of(0, kind) for kind in (LONG, SHORT))
    assert model.class_density(back, model.now_s) > 5 * model.class_density(gone, model.now_s)
    assert model.class_density(back, model.now_s - 40) > 1.5 * model.class_density(back, model.now_s)
    assert model.class_density(back, model.now_s - LATER) < model.class_density(back, model.now_s)
    assert model.likely(back, model.now_s, np.inf, 0.0) > 0.9
    assert model.likely(gone, model.now_s, np.inf, 0.0) < 0.6  # nobody knows what it does after an hour


def test_what_leaves_one_tier_late_and_the_next_early_has_little_chance_there():
    """The chance to be used in a tier is that of the time between the two thresholds."""
    model = taught()
    back = class_of(0, LONG)
    now = model.class_density(back, model.now_s)
    assert model.likely(back, model.now_s, now / 1e3, now / 1e3) == 0.0
    assert model.likely(back, model.now_s, now / 1e3, 0.0) < 0.5 * model.likely(back, model.now_s, np.inf, 0.0)


def test_those_that_still_wait_count_as_far_as_they_got():
    """If nobody knew of those that never came back, all that came back would be all there is."""
    model = taught(3000)
    left = unused(np.repeat(GUESS[None], 1, axis=0))[0]
    assert left[-1] < 1
    gone = class_of(0, SHORT)
    assert model.likely(gone, model.now_s, np.inf, 0.0) < 1 - left[-1]


def test_those_within_a_bin_count_as_the_part_of_it_that_is_over():
    """Of 1000 blocks 20 come back in 100 s, within one long bin that is not over: that is not most of those in it."""
    model, values = ReuseModel(), [number.to_bytes(8, "little") for number in range(1000)]
    for value in values:
        model.left([value], [0], [SHORT])
    for number, value in enumerate(values[:20]):
        model.asked([value], 800.0 + 5 * number)
    model.now_s = 900.0
    model.left([], [], [])
    assert bin_of(800.0) == bin_of(900.0)
    assert model.class_density(class_of(0, SHORT), 100.0) == pytest.approx(20 / (1000 * 100.0), rel=0.3)


def test_what_it_follows_is_bounded():
    """However many blocks it sees it follows so many, every second of them, or every fourth; and it still learns."""
    model = taught(40_000, every_s=0.02)
    assert len(model._followed) <= 8192
    assert model.likely(class_of(0, LONG), model.now_s, np.inf, 0.0) > 0.9


def test_expected_blocks_are_worth_most_and_the_soonest_more():
    """While somebody waits who will ask for them; not before and not after."""
    model = ReuseModel()
    first, second, other = b"first", b"second", b"other"
    before = model.density[model.cell(first, 0, 0.0)]
    numbers = [model.expect([first]), model.expect([second, first]), *(model.expect([bytes([n])]) for n in range(8))]
    late = model.expect([other])
    worth = [model.density[model.cell(value, 0, 0.0)] for value in (first, second, other)]
    assert worth[0] >= worth[1] > worth[2] > 1e3 * before
    model.served([first], numbers[0])
    assert model.density[model.cell(first, 0, 0.0)] > 1e3 * before  # the second one waits for it still
    model.served([second, first], numbers[1])
    model.served([other], late)
    assert model.density[model.cell(first, 0, 0.0)] == before


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_a_full_tier_takes_its_share_and_the_likeliest_of_all(share: float):
    """Whatever the scale of the chances is: it finds the bar by itself, and what is above it goes in."""
    rng, admission = Random(3), Admission(share, WriteBudget(0.0), 1)
    taken, left = [], []
    for number in range(20_000):
        likely = 0.1 * rng.random() ** 2
        admitted = admission.admit(likely, 0.0, full=True, kept=False) == "admit"
        if number > 10_000:
            (taken if admitted else left).append(likely)
    assert len(taken) / (len(taken) + len(left)) == pytest.approx(share, abs=0.05)
    assert np.percentile(taken, 10) > np.percentile(left, 85)


def test_a_tier_with_room_takes_everything_and_a_kept_block_is_always_taken():
    """Nobody has to go for it; or somebody asked for it."""
    admission = Admission(0.01, WriteBudget(0.0), 1)
    for _ in range(1000):
        assert admission.admit(0.0, 0.0, full=False, kept=False) == "admit"
        assert admission.admit(0.0, 0.0, full=True, kept=True) == "admit"
        admission.admit(0.5, 0.0, full=True, kept=False)
    assert admission.admit(0.0, 0.0, full=True, kept=False) == "reject_cold"


def test_no_share_outspends_the_endurance_budget():
    """When it is empty nothing is written; before that, as it is short, half the share is."""
    rng, admission = Random(4), Admission(1.0, WriteBudget(86_400.0 * 100), 1)
    outcomes = [admission.admit(0.1 * rng.random(), 0.0, full=False, kept=False) for _ in range(20_000)]
    assert outcomes.count("admit") == 6000  # a minute's worth
    assert outcomes[4000:8000].count("reject_cold") == pytest.approx(2000, abs=200)
    assert outcomes[-4000:].count("reject_wear") > 1000
