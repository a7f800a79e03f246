"""Replays of traces on virtual time: what they must agree with, and where the time goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, combinations
from pathlib import Path
from random import Random

import pytest

from server.kvcache.eviction import POLICIES
from server.sim import bounds
from server.sim.profile import PRESETS
from server.sim.replay import TOO_LONG, Asked, Replay, Setup, Tiers, prompt_of, replay
from server.sim.simulate import load_trace
from server.sim.stalls import CAUSES

BLOCK = 16
PROFILE = replace(PRESETS["h200-8b"], token_s=1e-3)
"""So slow that loading even a short block is always worth it."""
TRACES = Path(__file__).resolve().parents[3] / "shared" / "traces"


def _sessions(seed: int, sessions: int = 12, turns: int = 5, gap_s: float = 1.0) -> list[Asked]:
    """Conversations that take turns at random; each turn adds a block or two and the beginning of one."""
    rng = Random(seed)
    histories = [[1000 * n] for n in range(sessions)]
    asked = []
    for number in range(sessions * turns):
        history = rng.choice(histories)
        history.extend(range(history[-1] + 1, history[-1] + 1 + rng.randint(1, 2)))
        blocks = (*history, 1_000_000 + number)
        asked.append(Asked(number * gap_s, len(history) * BLOCK + 1, rng.randint(1, 8), blocks))
    return asked


def _replayed(asked: list[Asked], tiers: Tiers) -> Replay:
    return replay(Setup(PROFILE, tiers, BLOCK), asked)


def _hits(found: Replay) -> int:
    return sum(one.cached_tokens for one in found.served) // BLOCK


@pytest.mark.parametrize("tiers", [Tiers(400), Tiers(24, 400), Tiers(24, 48, 400)], ids=str)
def test_with_room_for_everything_a_replay_finds_what_an_infinite_cache_does(tiers: Tiers):
    """Whatever tier it is in: requests that are far apart find every block that was ever computed."""
    asked = _sessions(1)
    found = _replayed(asked, tiers)
    assert _hits(found) == bounds.infinite(asked, BLOCK)
    assert all(one.refused is None and one.ttft_s is not None and one.ttft_s > 0 for one in found.served)


@pytest.mark.parametrize("eviction", sorted(POLICIES))
def test_one_tier_in_a_replay_evicts_as_its_books_alone_do(eviction: str):
    """Far apart, the whole engine and the books of one tier find the same blocks, but for those that answers take."""
    asked = _sessions(2)
    alone = bounds.by_policy(asked, BLOCK, 40, eviction)
    assert _hits(_replayed(asked, Tiers(40, eviction=eviction))) == pytest.approx(alone, rel=0.12)


def test_a_replay_is_the_same_every_time():
    """The same trace and setup give the same figures to the last one."""
    asked = _sessions(3, gap_s=0.01)
    first, second = (_replayed(asked, Tiers(12, 24, 60)) for _ in range(2))
    assert first == second


def _long(blocks: Sequence[int]) -> tuple[int, ...]:
    """Twenty blocks for each."""
    return tuple(20 * block + part for block in blocks for part in range(20))


def _long_tokens(one: Asked) -> int:
    return 20 * (len(one.blocks) - 1) * BLOCK + 1


def test_a_slower_disk_and_a_busier_device_cost_time():
    """Long prompts from a disk at a tenth of the speed come later, and so does what is asked for all at once."""
    asked = [replace(one, blocks=_long(one.blocks), prompt_tokens=_long_tokens(one)) for one in _sessions(4)]
    tiers = Tiers(300, 300, 40_000)

    def mean_ttft_s(setup: Setup, gap: float) -> float:
        found = replay(setup, [replace(one, at_s=one.at_s * gap) for one in asked])
        return sum(one.ttft_s or 0.0 for one in found.served) / len(asked)

    slow = replace(PROFILE, ssd_read=replace(PROFILE.ssd_read, bytes_per_s=6e8))
    quick = mean_ttft_s(Setup(PROFILE, tiers, BLOCK), 1.0)
    assert mean_ttft_s(Setup(slow, tiers, BLOCK), 1.0) > quick
    assert mean_ttft_s(Setup(PROFILE, tiers, BLOCK), 0.0001) > quick


def _best(requests: list[tuple[int, ...]], capacity: int) -> int:
    """The most hits that any choice of what to keep gives, by trying all."""
    states = {frozenset[int](): 0}
    for request in requests:
        after: dict[frozenset[int], int] = {}
        for state, hits in states.items():
            found = next((n for n, block in enumerate(request) if block not in state), len(request))
            pool = state | set(request)
            for kept in chain.from_iterable(combinations(sorted(pool), size) for size in range(capacity + 1)):
                after[frozenset(kept)] = max(after.get(frozenset(kept), 0), hits + found)
        states = after
    return max(states.values())


@pytest.mark.parametrize("seed", range(40))
def test_the_optimum_is_the_best_of_all_choices(seed: int):
    """Belady's rule with prefixes against an exhaustive search over what to keep after each request."""
    rng = Random(seed)
    tree = {0: (), 1: (0,), 2: (0,), 3: (0, 1), 4: (), 5: (4,)}
    asked = []
    for _ in range(6):
        block = rng.choice(list(tree))
        blocks = (*tree[block], block)
        asked.append(Asked(0.0, len(blocks) * BLOCK, 1, blocks))
    capacity = rng.randint(1, 4)
    assert bounds.optimal(asked, BLOCK, capacity) == _best([tuple(one.blocks) for one in asked], capacity)


@pytest.mark.parametrize("eviction", sorted(POLICIES))
def test_no_policy_beats_the_optimum(eviction: str):
    """And the optimum does not beat a cache without end."""
    asked = _sessions(5, sessions=20, turns=6)
    for capacity in (16, 40, 80):
        optimal = bounds.optimal(asked, BLOCK, capacity)
        assert bounds.by_policy(asked, BLOCK, capacity, eviction) <= optimal <= bounds.infinite(asked, BLOCK)


KNOWN = [
    ("conversation_first30min", 96_534, 0.3409, {1000: (0.0433, 0.0549, 0.1856), 10_000: (0.2056, 0.1978, 0.3409)}),
    ("synthetic_first2k", 33_310, 0.3282, {1000: (0.0193, 0.0175, 0.1555), 10_000: (0.1720, 0.1975, 0.3282)}),
]
"""Block hit rates: with no limit, and by capacity those of LRU, S3-FIFO and the optimum."""


@pytest.mark.parametrize(("name", "distinct", "infinite", "known"), KNOWN, ids=[row[0] for row in KNOWN])
def test_hit_rates_on_public_traces_are_the_published_ones(
    name: str, distinct: int, infinite: float, known: dict[int, tuple[float, float, float]]
):
    """LRU, S3-FIFO and the optimum on parts of Mooncake's traces, against an independent replay: within a point."""
    path = TRACES / f"{name}.jsonl.gz"
    if not path.is_file():
        pytest.skip("the public traces are not here")
    trace = load_trace(str(path))
    asked = sum(len(one.blocks) for one in trace.asked)
    assert trace.distinct == distinct
    assert bounds.infinite(trace.asked, 512) / asked == pytest.approx(infinite, abs=0.01)
    for capacity, (lru, s3fifo, optimal) in known.items():
        assert bounds.by_policy(trace.asked, 512, capacity, "lru") / asked == pytest.approx(lru, abs=0.01)
        assert bounds.by_policy(trace.asked, 512, capacity, "s3fifo") / asked == pytest.approx(s3fifo, abs=0.01)
        assert bounds.optimal(trace.asked, 512, capacity) / asked == pytest.approx(optimal, abs=0.01)


@pytest.mark.parametrize("tiers", [Tiers(24, 48, 400), Tiers(40, 400), Tiers(40)], ids=str)
@pytest.mark.parametrize("step_tokens", [16, 8192])
def test_stalls_sum_to_the_time_to_the_first_token(tiers: Tiers, step_tokens: int):
    """In a crowd, with long answers that preempt each other, for every request: no second is lost or counted twice."""
    asked = [replace(one, output_tokens=60 + one.output_tokens) for one in _sessions(1, gap_s=0.01)]
    found = replay(Setup(PROFILE, tiers, BLOCK, max_running=8, step_tokens=step_tokens), asked)
    assert found.preemptions > 0
    for one in found.served:
        assert sum(one.stalls_s.values()) == pytest.approx(one.ttft_s or 0.0, rel=1e-9)
        assert min(one.stalls_s.values()) >= 0
    assert sum(one.stalls_s["queue"] for one in found.served) > 0


def test_every_cause_of_a_stall_is_told_apart():
    """Three tiers, small steps, long answers: some wait for a place, for blocks, for their turn, after preemption."""
    rng = Random(1)
    asked = [replace(one, output_tokens=rng.randint(50, 120)) for one in _sessions(1, gap_s=0.01)]
    found = replay(Setup(PROFILE, Tiers(24, 48, 400), BLOCK, max_running=8, step_tokens=16), asked)
    assert all(sum(one.stalls_s[cause] for one in found.served) > 0 for cause in CAUSES)


def test_a_device_at_rest_while_blocks_are_loaded_is_seen():
    """A prompt that lies in DRAM as a whole, and nothing else to do: it loads, then computes its one token."""
    prompts = [tuple(range(first, first + 41)) for first in (0, 1000, 0)]
    asked = [Asked(100.0 * n, 40 * BLOCK + 1, 1, blocks) for n, blocks in enumerate(prompts)]
    found = replay(Setup(PROFILE, Tiers(42, 400), BLOCK), asked)
    again = found.served[2]
    assert again.by_tier["dram"] > 30 * BLOCK
    assert again.stalls_s["loading"] == pytest.approx(found.idle_loading_s)
    assert again.stalls_s["loading"] > 30 * BLOCK * PROFILE.kv_bytes_per_token / PROFILE.dram.bytes_per_s
    assert found.served[0].stalls_s["computing"] == pytest.approx(found.served[0].ttft_s)


def test_a_request_longer_than_the_device_is_refused():
    """It is counted with its reason, and the others are served."""
    asked = _sessions(3)[:5]
    asked.insert(2, Asked(asked[1].at_s, 100 * BLOCK, 1, tuple(range(7000, 7100))))
    found = _replayed(asked, Tiers(40))
    assert [one.refused for one in found.served] == [None, None, TOO_LONG, None, None, None]


def test_a_prompt_is_made_of_its_blocks():
    """Equal ids give equal tokens, and a part of a last block is that part."""
    prompt = prompt_of(Asked(0.0, 2 * BLOCK + 3, 1, (7, 8, 9)), BLOCK)
    assert prompt.tolist() == [7] * BLOCK + [8] * BLOCK + [9] * 3
