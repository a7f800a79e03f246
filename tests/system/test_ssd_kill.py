"""The SSD tier among crashes and faults: small runs of what `python -m tests.system.ssd_*` does at length."""

from __future__ import annotations

import logging
from pathlib import Path
from random import Random

import pytest

from tests.system.ssd_faults import run
from tests.system.ssd_kill import kill_once
from tests.system.ssd_store import small_segments


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    small_segments(monkeypatch.setattr)
    caplog.set_level(logging.ERROR)


def test_kill_9_under_a_write_load(tmp_path: Path):
    """After each kill every recovered block is exact or refused, the cap holds and the lock is free."""
    rng = Random(1)
    total = 0
    for _ in range(5):
        good, _, problems = kill_once(tmp_path, rng)
        assert problems == []
        total += good  # not of each: on a busy machine the whole tiny store may be overwritten between two flushes
    assert total > 0


@pytest.mark.parametrize("seed", [1, 2])
async def test_a_storm_of_faults(tmp_path: Path, seed: int):
    """Under every kind of fault no read reports success with wrong bytes, nothing is raised, all damage is reported."""
    storm = await run(tmp_path, 1200, seed)
    assert storm.problems == []
    assert storm.outcomes["read ok"] > 500
    assert storm.outcomes["read corrupt"] > 100
