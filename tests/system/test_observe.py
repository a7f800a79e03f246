"""Prometheus itself against a daemon under load: the boards show something, the alerts fire. Skipped where neither PATH
nor Debian's packages have Prometheus."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from deploy.observe import BOARDS, RULES, main
from deploy.promserver import ObserveError, programs

TESTS = sorted((Path(__file__).resolve().parents[2] / "deploy/prometheus/tests").glob("*.yaml"))
RULES_IN_FILES = [
    rule for path in RULES for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]
]
SECONDS = 10
NOWHERE = "terrace_requests_that_no_daemon_counts_total"


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


def test_every_panel_shows_something(promtool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Under load every query of both boards returns numbers, every rule is evaluated and records something, the metrics
    pass promtool, and a killed daemon raises its alert. A board whose one query cannot return anything is found out."""
    planted = json.loads(BOARDS[0].read_text(encoding="utf-8"))
    panel = next(panel for panel in planted["panels"] if panel["type"] == "timeseries")
    panel["targets"] = [{"expr": f"sum(rate({NOWHERE}[$__rate_interval]))", "legendFormat": "none"}]
    (tmp_path / "planted.json").write_text(json.dumps(planted | {"uid": "planted", "panels": [panel]}))
    arguments = ["--board", str(tmp_path / "planted.json"), "--output", str(tmp_path)]
    assert main(["--seconds", str(SECONDS), *arguments]) == 1
    said = capsys.readouterr().out.splitlines()
    faults = [line for line in said if line.startswith("fault: ")]
    assert [NOWHERE in fault for fault in faults] == [True], faults
    assert any(f" {len(RULES_IN_FILES)} rules are evaluated" in line for line in said)
    pictures = {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}
    assert pictures.keys() == {"terrace-serving.png", "terrace-tiering.png", "planted.png"}
    assert all(picture.startswith(b"\x89PNG") for picture in pictures.values())
