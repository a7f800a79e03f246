"""A batch on a real daemon that is killed: a small run of what `python -m tests.system.batch_kill` does at length."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.system.batch_kill import run


def test_kill_9_in_a_batch(tmp_path: Path):
    """After three kills every line is exactly once in the output, with its own answer, and no commit came undone."""
    report = run(tmp_path, lines=240, kills=3, seed=1)
    assert report.problems == []
    assert report.completed == 240
    assert max(report.resumed) > 0


@pytest.mark.nightly
def test_many_kills_in_a_long_batch(tmp_path: Path):
    """The same with 2,000 lines and 20 kills."""
    report = run(tmp_path, lines=2000, kills=20, seed=2)
    assert report.problems == []
    assert report.completed == 2000
