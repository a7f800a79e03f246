"""The study of decisions: its limits, its experiments on a little trace, and the page made of kept results."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from server.kvcache.eviction import POLICIES
from server.scheduler.draft import MIN_CHUNK_TOKENS
from server.sim import bounds, study
from server.sim.foresight import Foresight, Hindsight
from server.sim.profile import PRESETS
from server.sim.replay import Asked, Setup, Tiers, hash_chains, replay
from server.sim.simulate import load_trace
from server.types import ServiceClass, Targets

BLOCK = 16
PROFILE = replace(PRESETS["h200-8b"], token_s=1e-3)
BACKGROUND = ServiceClass(background=True)


def _conversations(seed: int = 0, requests: int = 300, gap_s: float = 1.0) -> list[Asked]:
    """Of which most end after a turn or two, and few go on."""
    rng = Random(seed)
    going: list[list[int]] = []
    asked = []
    for number in range(requests):
        if not going or rng.random() < 0.5:
            going.append([10_000 * (number + 1)])
        place = rng.randrange(max(0, len(going) - 30), len(going))
        history = going[place]
        history.extend(range(history[-1] + 1, history[-1] + 1 + rng.randint(1, 3)))
        blocks = (*history, 1_000_000_000 + number)
        asked.append(Asked(number * gap_s, len(history) * BLOCK + 1, rng.randint(1, 8), blocks))
    return asked


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "little.jsonl"
    rows: list[dict[str, Any]] = [
        {"timestamp": one.at_s * 1e3, "input_length": one.prompt_tokens, "output_length": one.output_tokens,
         "hash_ids": list(one.blocks), "block_tokens": BLOCK} for one in _conversations()
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# --- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [40, 80, 160])
def test_foresight_finds_nearly_what_is_optimal(capacity: int):
    """On the production books it finds more than any policy, and less than Belady's rule only as it takes in all."""
    asked = _conversations()
    optimal = bounds.optimal(asked, BLOCK, capacity)
    chains = bounds.hashed(asked, BLOCK)
    found = bounds.by_policy(asked, BLOCK, capacity, "learned", Foresight(chains))
    assert 0.8 * optimal <= found <= optimal
    assert found >= max(bounds.by_policy(asked, BLOCK, capacity, name) for name in POLICIES)


def test_a_replay_that_knows_the_future_finds_more():
    """Through the whole engine: it names the blocks as the replay does."""
    asked = _conversations()
    setup = Setup(PROFILE, Tiers(60, eviction="learned"), BLOCK)
    plain = replay(setup, asked)
    told = replay(replace(setup, reuse=Foresight(hash_chains(asked, BLOCK))), asked)
    assert sum(one.cached_tokens for one in told.served) > 1.2 * sum(one.cached_tokens for one in plain.served)


def test_hindsight_knows_from_the_beginning_and_learns_nothing():
    """Its densities are those of the model that has seen all, and stay."""
    asked = _conversations()
    seen = replay(Setup(PROFILE, Tiers(60, eviction="learned"), BLOCK), asked).reuse
    told = Hindsight(seen)
    before = list(told.density)
    assert before != Hindsight(type(seen)()).density
    replay(Setup(PROFILE, Tiers(60, eviction="learned"), BLOCK, reuse=told), asked)
    assert told.density == before


# --- classes in a replay ---------------------------------------------------------------------------------------------


def test_a_batch_in_the_background_ends_with_the_others():
    """It gets what they leave, and what is left of it when they are over is not waited for."""
    online = _conversations(requests=40)
    batch = [Asked(0.0, 50 * BLOCK, 4, range(-100 * n - 50, -100 * n), BACKGROUND) for n in range(400)]
    batch = [replace(one, blocks=[2_000_000_000 + block for block in one.blocks]) for one in batch]
    setup = Setup(PROFILE, Tiers(30_000), BLOCK)
    alone, both = replay(setup, online), replay(setup, [*batch, *online])
    assert both.background_tokens > 1000
    assert any(one.e2e_s is None for one in both.served if one.asked.service.background)
    assert both.seconds == pytest.approx(alone.seconds, rel=0.05)
    least_s = PROFILE.step_s(PROFILE.prefill(0, MIN_CHUNK_TOKENS))
    for one, other in zip(alone.served, both.served[len(batch) :], strict=True):
        assert one.ttft_s is not None
        assert other.ttft_s is not None
        assert other.ttft_s <= 1.3 * one.ttft_s + 1.1 * least_s, "who comes waits for one short step"


def test_who_would_be_late_is_refused_in_a_replay():
    """All at once and all in a hurry: some are refused, and of the others most are in time."""
    hurry = ServiceClass(targets=Targets(2.0))
    asked = [replace(one, at_s=0.0, service=hurry) for one in _conversations(requests=60)]
    setup = Setup(PROFILE, Tiers(800), BLOCK, "deadline", refuse_late=True)
    found = replay(setup, asked)
    refused = [one for one in found.served if one.refused == "too_late"]
    served = [one for one in found.served if one.refused is None]
    assert refused
    assert sum(one.ttft_s is not None and one.ttft_s <= 2.2 for one in served) >= 0.9 * len(served)


def test_a_trace_says_of_what_class_its_requests_are(tmp_path: Path):
    """Tenant, priority, background and targets; those that want nothing get the targets that are given."""
    path = tmp_path / "trace.jsonl"
    line = {"timestamp": 0, "input_length": 16, "output_length": 1, "hash_ids": [1], "block_tokens": 16}
    said = [{}, {"tenant": "a", "priority": 2, "ttft_target_ms": 500}, {"background": True}]
    path.write_text("".join(json.dumps(line | more) + "\n" for more in said))
    services = [one.service for one in load_trace(str(path), targets=Targets(1.0, 0.1)).asked]
    assert services == [
        ServiceClass(targets=Targets(1.0, 0.1)),
        ServiceClass("a", 2, targets=Targets(0.5, 0.1)),
        ServiceClass(background=True),
    ]


def test_a_batch_comes_from_another_trace(trace: str):
    """With blocks of its own, all there from the beginning, in the background."""
    alone, both = load_trace(trace), load_trace(trace, background=trace)
    assert both.distinct == 2 * alone.distinct
    batch, online = both.asked[: len(alone.asked)], both.asked[len(alone.asked) :]
    assert online == alone.asked
    assert all(one.service.background and one.at_s == 0 for one in batch)
    assert not {block for one in batch for block in one.blocks} & {block for one in online for block in one.blocks}


# --- experiments -----------------------------------------------------------------------------------------------------


def test_experiments_make_tables_and_judge_goals(trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """On any trace: a result per experiment and trace is kept, printed with its goals; a missed one is exit code 1."""
    out = tmp_path / "out"
    code = study.main(["--traces", trace, "--only", "eviction", "coserving", f"--output={out}"])
    printed = capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["coserving-little-little.json", "eviction-little.json"]
    assert code == int("**Missed**" in printed)
    assert "| 100 % |" in printed
    rows = json.loads((out / "eviction-little.json").read_text())["rows"]
    cells = study.by(rows, "percent", "policy")
    for (percent, name), row in cells.items():
        assert row["hit"] <= cells[percent, "optimal"]["hit"] + 1e-9 <= row["infinite"] + 2e-9, name


def test_the_page_is_made_from_the_kept_results():
    """STUDY.md shows what lies in results/, and nothing else."""
    assert study.PAGE.read_text(encoding="utf-8") == study.page(study.load())


def test_an_unknown_trace_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """It is named, with exit code 2."""
    assert study.main(["--traces", str(tmp_path / "none.jsonl"), "--only", "eviction"]) == 2
    assert "none.jsonl" in capsys.readouterr().err
