"""Boards and rules ask only for what the daemon has, and what is committed is what the code makes."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.boards import BOARDS, FOLDER
from deploy.observe import RATE_INTERVAL, Answered, Asked, Found, asked_by, filled
from deploy.panels import COLUMNS, DATASOURCE_UID, as_json
from deploy.promserver import Line
from tests.unit.promql import Unknown, labels_of, shown_labels

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
UNITS = {"none", "short", "s", "percentunit", "bytes", "Bps", "reqps", "ops"}


def _board(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


def _rules(name: str) -> list[dict[str, Any]]:
    text = (DEPLOY / "prometheus/rules" / name).read_text(encoding="utf-8")
    return [rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]


def _panels(name: str) -> list[dict[str, Any]]:
    return [panel for panel in _board(name)["panels"] if panel["type"] != "row"]


RECORDING, ALERTS = _rules("recording.yaml"), _rules("alerts.yaml")
RECORDED = {rule["record"]: labels_of(rule["expr"], {}) for rule in RECORDING}


@pytest.mark.parametrize("name", BOARDS)
def test_what_is_committed_is_what_the_code_makes(name):
    """The JSON is made anew by `python -m deploy.boards`, byte for byte; no other is there."""
    assert (FOLDER / name).read_text(encoding="utf-8") == as_json(BOARDS[name])
    assert {path.name for path in FOLDER.glob("*.json")} == set(BOARDS)


@pytest.mark.parametrize("name", BOARDS)
def test_panels_have_a_place_of_their_own(name):
    """Ids are unique, no two panels overlap, and none reaches over the 24 columns."""
    panels = _board(name)["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        cell
        for place in (panel["gridPos"] for panel in panels)
        for cell in itertools.product(
            range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        )
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < COLUMNS


@pytest.mark.parametrize("name", BOARDS)
def test_every_panel_explains_itself(name):
    """Each panel has a title of its own, a description, a known unit and a query, and asks the picked data source."""
    panels = _panels(name)
    assert len({panel["title"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, panel["title"]
        assert panel["targets"], panel["title"]
        assert [panel["datasource"], *(target["datasource"] for target in panel["targets"])] == [DATASOURCE] * (
            1 + len(panel["targets"])
        )
    sources = [variable["type"] for variable in _board(name)["templating"]["list"]]
    assert sources == ["datasource", "query", "query"]


@pytest.mark.parametrize("name", BOARDS)
def test_every_query_asks_for_what_the_daemon_has(name):
    """Each query parses, names metrics, labels and label values that are declared, and has the labels that its legend
    shows; each metric is bound to the picked instances."""
    for asked in asked_by(_board(name)):
        text = filled(asked.expression, {"__rate_interval": RATE_INTERVAL, "instance": ".*", "model": ".*"})
        assert shown_labels(asked.legend) <= labels_of(text, RECORDED), asked
        assert len(re.findall(r"\b(?:terrace|process)_\w+", text)) == text.count('instance=~".*"'), asked


@pytest.mark.parametrize("rule", [*RECORDING, *ALERTS], ids=lambda rule: rule.get("record") or rule["alert"])
def test_every_rule_asks_for_what_the_daemon_has(rule):
    """Each rule names only metrics, labels and label values that are declared or recorded; its words, labels it has."""
    labels = labels_of(rule["expr"], RECORDED)
    if "alert" in rule:
        assert shown_labels(rule["annotations"]["summary"]) <= labels
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"]["runbook"] == f"RUNBOOK.md#{rule['alert'].lower()}"


def test_every_alert_is_tested_both_ways():
    """For each alert there is a moment at which it must fire and one at which it must not, with series that are the
    daemon's."""
    fires, rests = set(), set()
    for path in (DEPLOY / "prometheus/tests").glob("*.yaml"):
        for test in yaml.safe_load(path.read_text(encoding="utf-8"))["tests"]:
            for series in test["input_series"]:
                labels_of(series["series"], RECORDED)
            for moment in test["alert_rule_test"]:
                (fires if moment["exp_alerts"] else rests).add(moment["alertname"])
    assert fires == rests == {rule["alert"] for rule in ALERTS}


@pytest.mark.parametrize(
    "wrong",
    [
        "rate(terrace_requests_done_total[5m])",
        'terrace_kv_tier_up{disk="ssd"}',
        'terrace_kv_tier_up{tier="tape"}',
        "sum by (tier) (terrace_requests_running)",
        "rate(terrace_kv_restore_seconds[5m])",
        "histogram_quantile(0.5, sum by (tier) (rate(terrace_kv_restore_seconds_bucket[5m])))",
        "terrace_kv_tier_up / terrace_requests_running",
        "terrace:never_recorded:ratio",
    ],
)
def test_the_check_finds_what_cannot_be(wrong):
    """An unknown metric, label, value or recorded series, a lost bucket and two sides that never meet are all found."""
    with pytest.raises(Unknown):
        labels_of(wrong, RECORDED)


def test_no_numbers_are_a_fault_that_names_the_query():
    """NaN is no number, nothing is none, and a refused query says why; a rule that failed is a fault as well."""
    asked = Asked("board", {"title": "Panel"}, {"expr": "x / y", "legendFormat": ""})
    nan, number = (Line({}, [(0.0, value)]) for value in (math.nan, 0.0))
    rule = {"name": "Rule", "health": "err", "lastError": "many-to-many"}
    found = Found(
        [Answered(asked, [nan, number]), Answered(asked, [nan]), Answered(asked), Answered(asked, error="why")]
    )
    found.rules = [rule, {"name": "Good", "health": "ok"}]
    none = "board: Panel: no data: x / y"
    assert found.faults == [none, none, "board: Panel: why: x / y", "rule Rule: many-to-many"]


def test_compose_brings_boards_rules_and_data_together():
    """Every mounted file is there, Prometheus scrapes the daemon under the job that the alerts look for and loads the
    rules, and Grafana finds the boards and, by the uid they ask for, Prometheus."""
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    services, mounts = compose["services"], {}
    for name, service in services.items():
        mounts[name] = dict(reversed(mount.split(":")[:2]) for mount in service["volumes"])
        for source in mounts[name].values():
            assert (DEPLOY / source).exists() if source.startswith(".") else source in compose["volumes"], source

    config = yaml.safe_load((DEPLOY / mounts["prometheus"]["/etc/prometheus/prometheus.yaml"]).read_text())
    assert "--config.file=/etc/prometheus/prometheus.yaml" in services["prometheus"]["command"]
    assert [str(Path(pattern).parent) for pattern in config["rule_files"]] == ["/etc/prometheus/rules"]
    assert mounts["prometheus"]["/etc/prometheus/rules"] == "./prometheus/rules"
    (job,) = config["scrape_configs"]
    port = services["terrace"]["ports"][0].rpartition(":")[2]
    assert job == {"job_name": "terrace", "static_configs": [{"targets": [f"terrace:{port}"]}]}

    provisioning = DEPLOY / mounts["grafana"]["/etc/grafana/provisioning"]
    (source,) = yaml.safe_load((provisioning / "datasources/terrace.yaml").read_text())["datasources"]
    (provider,) = yaml.safe_load((provisioning / "dashboards/terrace.yaml").read_text())["providers"]
    assert source["url"] == "http://prometheus:9090"
    assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]
    assert DEPLOY / mounts["grafana"][provider["options"]["path"]] == FOLDER
    home = Path(services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert home.parent == Path(provider["options"]["path"])
    assert home.name in BOARDS
    for name in BOARDS:
        first = _board(name)["templating"]["list"][0]
        assert (first["name"], first["query"], first["current"]["value"]) == ("datasource", "prometheus", source["uid"])
    assert source["uid"] == DATASOURCE_UID
