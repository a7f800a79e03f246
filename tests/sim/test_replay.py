"""Replays of traces on virtual time: what they must agree with, and the command line around them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, combinations
from pathlib import Path
from random import Random

import pytest

from server.cli import main
from server.kvcache.eviction import POLICIES
from server.sim import bounds
from server.sim.profile import PRESETS
from server.sim.replay import Asked, Replay, Setup, Tiers, prompt_of, replay
from server.sim.simulate import load_trace

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


# --- the command line ------------------------------------------------------------------------------------------------


def _file(tmp_path: Path, asked: list[Asked]) -> str:
    path = tmp_path / "trace.jsonl"
    rows = [{"timestamp": one.at_s * 1e3, "input_length": one.prompt_tokens, "output_length": one.output_tokens,
             "hash_ids": list(one.blocks), "block_tokens": BLOCK} for one in asked]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_sweep_prints_a_row_per_combination(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Sizes as bytes, shares and blocks; figures also as JSON, with both limits beside them."""
    trace = _file(tmp_path, _sessions(6))
    arguments = ["simulate", trace, "--device=24blocks", "--sweep=dram=0,50%,1GiB", "--sweep=eviction=lru,s3fifo",
                 "--slo", "ttft:1000", f"--output={tmp_path / 'out'}"]  # fmt: skip
    assert main(arguments) == 0
    assert "infinite" in capsys.readouterr().out
    rows = json.loads((tmp_path / "out" / "simulation.json").read_text())["rows"]
    assert [(row["dram"], row["eviction"]) for row in rows][:3] == [("0", "lru"), ("0", "s3fifo"), ("50%", "lru")]
    assert rows[0]["hit"] <= rows[2]["hit"] <= rows[4]["hit"] <= rows[4]["limits"]["infinite"] + 1e-9
    assert all(row["met"] == 1.0 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device=none"], "--device none: must look like"),
        (["--device=1blocks"], "give it more"),
        (["--ssd=1TB"], "--ssd needs --dram"),
        (["--eviction=best"], "there are cost"),
        (["--profile=tpu"], "h200-8b"),
        (["--sweep=colour=red"], "there are profile"),
        (["--sweep=speedup=fast"], "--sweep speedup=fast"),
        (["--slo", "speed:1"], "ttft, tpot and e2el"),
    ],
)
def test_what_cannot_be_simulated_is_one_line(
    tmp_path: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
):
    """A mistake on the command line is named before anything is replayed; exit code 2."""
    assert main(["simulate", _file(tmp_path, _sessions(7)), *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("terrace simulate: error: ")


def test_a_prompt_is_made_of_its_blocks():
    """Equal ids give equal tokens, and a part of a last block is that part."""
    prompt = prompt_of(Asked(0.0, 2 * BLOCK + 3, 1, (7, 8, 9)), BLOCK)
    assert prompt.tolist() == [7] * BLOCK + [8] * BLOCK + [9] * 3
