"""Prometheus itself against a daemon under load: the boards show something, the alerts fire. Skipped where neither PATH
nor Debian's packages have Prometheus."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from deploy.observe import BOARDS, RULES, observe
from deploy.promserver import ObserveError, programs

TESTS = sorted((Path(__file__).resolve().parents[2] / "deploy/prometheus/tests").glob("*.yaml"))
SECONDS = 12


@pytest.fixture(scope="module")
def promtool() -> Path:
    try:
        return programs() / "promtool"
    except ObserveError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("arguments", [["check", "rules", "--lint=all", *RULES], ["test", "rules", *TESTS]])
def test_rules_are_clean_and_every_alert_fires_and_rests(promtool: Path, arguments: list):
    """promtool finds nothing to say of the rules, and its tests of each alert, firing and not, pass."""
    done = subprocess.run([promtool, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_panel_shows_something(promtool: Path):
    """Under load every query of both boards returns numbers, every rule is evaluated and records something, the metrics
    pass promtool, and a killed daemon raises its alert. The one query that cannot return anything is found out."""
    boards = [json.loads(path.read_text(encoding="utf-8")) for path in BOARDS]
    planted = json.loads(json.dumps(boards[0]))
    target = next(panel for panel in planted["panels"] if panel["type"] == "timeseries")["targets"][0]
    target["expr"] = "sum(rate(terrace_requests_that_no_daemon_counts_total[$__rate_interval]))"
    found = observe(SECONDS, [*boards, planted])
    assert [fault for fault in found.faults if "that_no_daemon_counts" not in fault] == []
    assert len(found.faults) == 1
    assert len(found.answers) > 100
