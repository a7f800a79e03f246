"""The benchmarks' own arithmetic and machinery; never how fast anything is."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest

from server.bench import clients, isolation, metrics, report, split
from server.bench.scheduler import make_scheduler, measure_decode, measure_prefill
from server.metrics import Metrics
from tests.property.core import visit
from tests.property.making import make_kv


@pytest.mark.parametrize(("q", "value"), [(0.0, 1), (0.5, 2), (0.75, 3), (0.99, 4), (1.0, 4)])
def test_quantile(q, value):
    """A quantile is a sample: the smallest that at least the share q does not exceed."""
    assert report.quantile([4, 1, 3, 2], q) == value


def test_report_keeps_what_it_found(tmp_path, monkeypatch, capsys):
    """A saved result holds samples, goals and environment; a missed goal is counted and said."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    found = report.Report("example", quick=True)
    found.header("a", "b")
    found.row(1, "x")
    found.keep(seconds=1.5)
    found.goal("one is one", met=True)
    found.goal("one is two", met=False)
    found.print_verdict()
    saved = json.loads(found.save().read_text())
    assert saved["samples"] == [{"seconds": 1.5}]
    assert (saved["goals_met"], saved["goals_missed"]) == (["one is one"], ["one is two"])
    assert {"commit", "cpu", "versions"} <= saved["environment"].keys()
    assert "GOAL MISSED: one is two" in capsys.readouterr().out


def test_scheduler_measurement_runs_the_real_thing():
    """Every decode and prefill step that is measured is one of the production scheduler's, with one sample each."""
    times = measure_decode(running=8, context=40, steps=20)
    assert len(times.plan_s) == len(times.commit_s) == len(times.cpu_s) == 20
    assert len(measure_prefill(running=2, context=256, step_tokens=64).total_s) == 6
    assert make_scheduler(blocks=100, step_tokens=64).kv.available_blocks >= 100


SCRAPE = """\
# TYPE terrace_event_loop_lag_seconds histogram
terrace_event_loop_lag_seconds_bucket{model_name="demo",le="0.001"} %d
terrace_event_loop_lag_seconds_bucket{model_name="demo",le="0.1"} %d
terrace_event_loop_lag_seconds_bucket{model_name="demo",le="+Inf"} %d
terrace_event_loop_lag_seconds_count{model_name="demo"} 9
"""


def test_lag_between_two_scrapes():
    """The lag's quantile is that of the samples between two scrapes, as the upper edge of a bucket."""
    before, after = clients.lag_buckets(SCRAPE % (5, 5, 5)), clients.lag_buckets(SCRAPE % (6, 14, 15))
    assert clients.lag_quantile(before, after, 0.1) == 0.001
    assert clients.lag_quantile(before, after, 0.9) == 0.1
    assert clients.lag_quantile(before, after, 0.99) == math.inf
    assert math.isnan(clients.lag_quantile(before, before, 0.99))


def _cell(load_ms: int, compute_ms: int, own_ms: int, tokens: int = 1024) -> split.Cell:
    return split.Cell(tokens, [load_ms / 1e3] * 3, [compute_ms / 1e3] * 3, [own_ms / 1e3] * 3, 0)


@pytest.mark.parametrize(
    ("cells", "missed"),
    [
        ([_cell(100, 110, 65), _cell(100, 400, 104)], 0),
        ([_cell(100, 110, 66), _cell(100, 400, 104)], 1),
        ([_cell(100, 110, 65), _cell(400, 100, 106)], 1),
        ([_cell(400, 100, 104)], 1),
        ([_cell(100, 110, 65), _cell(100, 110, 104, tokens=256)], 0),
    ],
)
def test_split_judges_by_the_better_of_the_two(cells, missed):
    """Never worse than the better of loading and computing, and far better where they are equal, of which there must be
    a case."""
    found = report.Report("split", quick=True)
    split.judge(found, cells)
    assert len(found.missed) == missed


def test_split_measures_real_daemons():
    """Small, it runs to its end: what is to be loaded is loaded, and every cell has all its rounds."""
    found = split.run(quick=True)
    cell = found.raw[-1]
    assert len(cell["load_s"]) == len(cell["compute_s"]) == len(cell["own_s"]) >= 2
    assert all(seconds > 0 for seconds in cell["load_s"] + cell["compute_s"] + cell["own_s"])


def test_a_spy_that_sees_nothing_and_one_that_sees_all():
    """Times that say nothing give an area around one half and hold it; hits that are all faster give one; ties count
    half."""
    alike = [(number % 2 == 0, float(number * 7 % 101)) for number in range(100)]
    area, low, high = isolation.auc(alike)
    assert low < 0.5 < high
    assert low < area < high
    right, least, most = isolation.accuracy(alike)
    assert least < 0.5 < most
    assert least < right < most
    apart = [(number % 2 == 0, float(number % 2)) for number in range(100)]
    assert isolation.auc(apart) == (1.0, 1.0, 1.0)
    right, least, _ = isolation.accuracy(apart)
    assert right == 1.0
    assert least > 0.8
    assert isolation.auc([(True, 1.0), (False, 1.0)] * 3) == (0.5, 0.5, 0.5)


def test_a_silenced_daemon_counts_nothing():
    """All calls with which a daemon counts exist, and none of them does anything afterwards; a watched one counts."""
    kv = make_kv(4, 8)
    silent, watched = (SimpleNamespace(metrics=Metrics("m"), engine=SimpleNamespace(kv=kv)) for _ in range(2))
    watch = metrics.Watch(watched)
    metrics.silence(silent)
    for daemon in (silent, watched):
        daemon.metrics.generated(5)
    assert [daemon.metrics.page().value("generation_tokens_total") for daemon in (silent, watched)] == [0, 5]
    assert watch.calls == 1
    visit(kv, [1, 2, 3, 4])
    assert not kv.device.lives.came_s
    metrics.let_count(silent)
    silent.metrics.generated(5)
    assert silent.metrics.page().value("generation_tokens_total") == 5
    wanted = {name for names in metrics.SILENT.values() for name in names}
    assert {name for _, name in metrics.counters(watched)} == wanted
