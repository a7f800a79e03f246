"""Arrivals, workloads, traces, figures, verdicts, reports and the command line of the load generator."""

from __future__ import annotations

import gzip
import itertools
import json
import shlex
import statistics
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import pytest

from loadgen import cli, compare, plots, report, selftest, suite
from loadgen.arrivals import arrivals
from loadgen.bench import Result, Settings
from loadgen.claims import CLAIMS, Arm, Claim, Goal, Spare
from loadgen.driver import Run
from loadgen.errors import UsageError
from loadgen.measure import Objectives, confidence
from loadgen.prompts import IdPrompter, TextPrompter
from loadgen.records import Outcome, Session
from loadgen.scrape import difference, parse, server_section
from loadgen.scripted import due_times, stalled
from loadgen.workload import CONTROLS, WORKLOADS, make_workload

TEXT = TextPrompter()
EXACT = IdPrompter(10, 1000)
GIVEN = {"mooncake": {"path": "none"}, "jsonl": {"path": "none"}}
SETTINGS = Settings(sessions=20, request_rate=1.0).shown() | {"model": "m"}


def _times(kind: str, count: int, **options: Any) -> list[float]:
    values = {"rate": 10.0, "burstiness": 1.0, "ramp_to": None, "duration_s": None, "seed": 3} | options
    return list(itertools.islice(arrivals(kind, **values), count))


def _runs(count: int = 1, ttft_s: float = 0.1, requests: int = 20, error: str | None = None) -> list[Run]:
    runs = []
    for repeat in range(count):
        outcomes = []
        for n in range(requests):
            first = n + ttft_s * (1 + 0.1 * ((n * 7 + repeat) % 5))
            o = Outcome(n, n % 2, float(n), 3, float(n), [first, first + 0.01, first + 0.02], first + 0.02, 50, 3, 20,
                        {"device": 5, "ssd": 15})  # fmt: skip
            if error and n == 0:
                o.error, o.detail = "http_5xx", error
            outcomes.append(o)
        runs.append(Run(outcomes, 20.0, [0.0] * 5, 0.1))
    return runs


def _document(**options: Any) -> dict[str, Any]:
    runs = _runs(**options)
    return report.make_document(runs, Objectives.parse(["ttft:125"]), SETTINGS, None)


# --- arrivals --------------------------------------------------------------------------------------------------------


def test_arrivals_come_at_the_rate_asked_for_and_are_seeded():
    """Gaps have the mean 1/rate and the spread of their kind; the same seed gives the same times."""
    assert _times("constant", 4) == pytest.approx([0, 0.1, 0.2, 0.3])
    for kind, burstiness, spread in (("poisson", 1.0, 1.0), ("gamma", 0.25, 2.0), ("gamma", 4.0, 0.5)):
        times = _times(kind, 20_000, burstiness=burstiness)
        gaps = [b - a for a, b in itertools.pairwise(times)]
        assert statistics.fmean(gaps) == pytest.approx(0.1, rel=0.05)
        assert statistics.stdev(gaps) / statistics.fmean(gaps) == pytest.approx(spread, rel=0.05)
        assert times == _times(kind, 20_000, burstiness=burstiness)
        assert times != _times(kind, 20_000, burstiness=burstiness, seed=4)


@pytest.mark.parametrize(("start", "end"), [(10.0, 110.0), (110.0, 10.0), (60.0, 60.0)])
def test_a_ramp_goes_from_one_rate_to_the_other(start: float, end: float):
    """In the first and the last tenth of a ramp as many arrive as the rates there say, and none after its end."""
    times = _times("ramp", 10**6, rate=start, ramp_to=end, duration_s=200.0)
    early, late = sum(t < 20 for t in times) / 20, sum(t > 180 for t in times) / 20
    assert early == pytest.approx(start + (end - start) * 0.05, rel=0.15)
    assert late == pytest.approx(end - (end - start) * 0.05, rel=0.15)
    assert max(times) <= 200.0


# --- workloads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in WORKLOADS if name not in GIVEN])
def test_a_workload_is_the_same_for_the_same_seed_and_another_for_another(name: str):
    """Two lists of sessions of one seed are equal, those of another seed share no first prompt."""
    workload = make_workload(name, {})
    first, again, other = (list(itertools.islice(workload.sessions(EXACT, seed), 5)) for seed in (1, 1, 2))
    assert first == again
    assert not {str(s.turns[0].prompt[:16]) for s in first} & {str(s.turns[0].prompt[:16]) for s in other}


def test_prompts_are_as_long_as_asked_for_and_shared_where_they_should_be():
    """Token-id prompts have exact lengths; groups share their prefix and nothing else; the control shares nothing."""
    parameters = {"groups": "3", "prefix": "100", "question": "7", "output": "5"}
    shared = list(itertools.islice(make_workload("shared-prefix", parameters).sessions(EXACT, 0), 30))
    assert {len(s.turns[0].prompt) for s in shared} == {107}
    assert len({tuple(s.turns[0].prompt[:100]) for s in shared}) == 3
    assert len({tuple(s.turns[0].prompt) for s in shared}) == 30
    apart = list(itertools.islice(make_workload("control-no-reuse", {}).sessions(EXACT, 0), 30))
    assert len({tuple(s.turns[0].prompt[:16]) for s in apart}) == 30


def test_text_is_as_long_as_the_servers_tokens_say():
    """With two tokens a word, half as many words make the same prompt length."""
    assert len(TextPrompter(tokens_per_word=2.0).make("a", 100).split()) == 50


def test_unknown_workloads_and_parameters_are_named():
    """The error says what was typed and what there is."""
    for name, parameters, said in (
        ("nope", {}, "there are random"),
        ("random", {"size": "1"}, "random has input, output"),
        ("random", {"input": "-3"}, "must be a number, or LOW-HIGH"),
        ("random", {"input": "9-3"}, "HIGH not below LOW"),
        ("shared-prefix", {"groups": "0"}, "must be above 0"),
        ("mooncake", {}, "needs -P path="),
    ):
        with pytest.raises(UsageError, match=said):
            make_workload(name, parameters)


def _trace(folder: Path, rows: list[dict[str, Any]], name: str = "trace.jsonl") -> str:
    path = folder / name
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return str(path)


def _sessions(name: str, **parameters: str) -> list[Session]:
    return list(make_workload(name, parameters).sessions(EXACT, 0))


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.jsonl.gz"])
def test_a_mooncake_trace_keeps_times_lengths_and_shared_blocks(tmp_path: Path, name: str):
    """Equal hash ids give equal tokens; the last block is cut to the length; speed-up and scale apply."""
    rows = [{"timestamp": 1000, "input_length": 1300, "output_length": 20, "hash_ids": [1, 2, 3]},
            {"timestamp": 3000, "input_length": 1100, "output_length": 10, "hash_ids": [1, 2, 9]}]  # fmt: skip
    path = _trace(tmp_path, rows, name)
    one, two = _sessions("mooncake", path=path, speedup="2")
    assert (one.start_s, two.start_s) == (0.0, 1.0)
    first, second = one.turns[0].prompt, two.turns[0].prompt
    assert (len(first), len(second), one.turns[0].output_tokens) == (1300, 1100, 20)
    assert first[:1024] == second[:1024]
    assert first[1024:1100] != second[1024:1100]
    small = _sessions("mooncake", path=path, scale="0.125")
    assert len(small[0].turns[0].prompt) == 162
    assert small[0].turns[0].prompt[:128] == small[1].turns[0].prompt[:128]


def test_json_lines_of_ones_own_make_sessions(tmp_path: Path):
    """Lines of one session follow each other; a missing prompt is named with its line."""
    path = _trace(tmp_path, [{"prompt": "a", "session": 1, "output_tokens": 4}, {"prompt": [1, 2]},
                             {"prompt": "b", "session": 1, "pause_s": 2, "body": {"top_p": 1}}])  # fmt: skip
    talk, single = _sessions("jsonl", path=path)
    assert [(t.prompt, t.output_tokens, t.pause_s, t.extra) for t in talk.turns] == [
        ("a", 4, 0.0, None),
        ("b", 64, 2.0, {"top_p": 1}),
    ]
    assert single.turns[0].prompt == [1, 2]
    with pytest.raises(UsageError, match="line 1: `prompt` must be"):
        _sessions("jsonl", path=_trace(tmp_path, [{"text": "a"}]))
    with pytest.raises(UsageError, match="No such file"):
        _sessions("jsonl", path=str(tmp_path / "none"))


# --- figures and verdicts --------------------------------------------------------------------------------------------


def test_the_result_has_the_keys_that_other_tools_read():
    """vLLM's names are there beside our own section, and all of it is JSON without NaN."""
    document = _document()
    keys = (
        "request_throughput output_throughput mean_ttft_ms median_tpot_ms p99_itl_ms std_e2el_ms ttfts itls input_lens "
        "output_lens max_concurrent_requests total_token_throughput"
    )
    for key in keys.split():
        assert key in document
    assert document["mean_tpot_ms"] == pytest.approx(10.0)
    assert document["request_goodput"] == pytest.approx(12 / 20)
    assert document["terrace"]["cache"]["by_tier"] == {"device": 100, "ssd": 300}
    json.dumps(document, allow_nan=False)


def test_intervals_over_repeats_are_students():
    """Of 1, 2, 3 the mean is 2 and half the width of the 95 % interval 4.303 / sqrt(3)."""
    low, high = confidence([{"x": 1.0}, {"x": 2.0}, {"x": 3.0}])["x"]
    assert (low + high) / 2 == pytest.approx(2.0)
    assert (high - low) / 2 == pytest.approx(4.303 / 3**0.5)


def _words(a: dict[str, Any], b: dict[str, Any]) -> dict[str, str]:
    return {verdict.figure: verdict.word for verdict in compare.compare(a, b, 0.05)}


@pytest.mark.parametrize("count", [1, 4])
def test_comparing_finds_what_changed_and_nothing_else(count: int):
    """Twice the TTFT is worse, half of it better, the rest the same; with repeats and with requests to go by."""
    before, slower = _document(count=count), _document(count=count, ttft_s=0.2)
    assert _words(before, slower)["median_ttft_ms"] == "worse"
    assert _words(slower, before)["median_ttft_ms"] == "better"
    assert _words(before, slower)["median_tpot_ms"] == "same"
    assert _words(before, before)["output_throughput"] == "same"


def test_compare_ends_with_a_code_for_ci(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """0 when nothing is worse, 1 when something is, 2 for what is no result or no valid one."""
    paths = []
    for name, options in (("a", {}), ("b", {"ttft_s": 0.2}), ("c", {})):
        document = _document(count=4, **options)
        if name == "c":
            document["terrace"]["client"]["invalid_because"] = ["it was late"]
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps(document))
        paths.append(str(tmp_path / name))
    a, b, c = paths
    assert [cli.main(["compare", *pair]) for pair in ((a, a), (a, b), (b, a), (a, c))] == [0, 1, 0, 2]
    assert "it was late" in capsys.readouterr().err
    assert cli.main(["compare", a, str(tmp_path / "none")]) == 2


# --- reports ---------------------------------------------------------------------------------------------------------


def test_the_page_holds_everything_and_trusts_nobody(tmp_path: Path):
    """One file, nothing loaded from elsewhere, plots inside; what a server said cannot become markup."""
    evil = "<script>alert(1)</script>"
    runs = _runs(error=evil)
    outcomes = [o for run in runs for o in run.outcomes]
    document = report.make_document(runs, Objectives.parse([]), SETTINGS | {"label": evil}, None)
    report.write(tmp_path, document, outcomes)
    written = plots.write(tmp_path, document, outcomes)
    page = written[0].read_text()
    assert evil not in page
    assert "&lt;script&gt;" in page
    assert page.count("<svg") == len(written) - 1 >= 3
    for outside in ('src="http', 'href="http', "@import"):
        assert outside not in page
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written[1:])
    assert len((tmp_path / "requests.jsonl").read_text().splitlines()) == 20
    assert (tmp_path / "requests.csv").read_text().startswith("session,turn,")


def test_a_tier_that_does_not_help_is_named():
    """Blocks declined because the tier was slow, a tier that is off and blocks that did not verify are remarks."""
    before = parse('terrace_kv_tier_up{tier="ssd"} 1\nterrace_kv_integrity_failures_total{tier="ssd"} 0\n')
    after = parse(
        'terrace_kv_tier_up{tier="ssd"} 0\nterrace_kv_integrity_failures_total{tier="ssd"} 2\n'
        'terrace_kv_restore_declined_blocks_total{tier="ssd",reason="slower_than_recompute"} 70\n'
    )
    section = server_section(before, after, 1.0)
    assert section is not None
    said = " / ".join(section["remarks"])
    for part in ("ssd tier is switched off", "70 blocks that the ssd tier had", "2 blocks were refused"):
        assert part in said
    assert server_section(None, after, 1.0) is None


def test_what_the_daemon_did_per_second_is_told():
    """Tokens that came from the cache are not counted as work; busy is the share of time in steps."""
    name = "terrace_prompt_tokens_by_source_total"
    page = (
        f'{name}{{source="computed"}} %d\n{name}{{source="dram"}} %d\n'
        "terrace_generation_tokens_total %d\nterrace_engine_busy_seconds_total %f\n"
    )
    section = server_section(parse(page % (10, 0, 5, 1.0)), parse(page % (110, 500, 25, 4.0)), 10.0)
    assert section is not None
    assert (section["tokens_per_s"], section["busy_ratio"]) == (12.0, 0.3)


def test_a_report_says_what_to_type_for_the_same_load():
    """The command of a result is parsed back to the very settings that made it."""
    given = ["--workload=multi-turn", "-P", "turns=3", "--request-rate=2", "--num-sessions=7", "--arrivals=gamma",
             "--burstiness=0.5", "--chat", "--no-ignore-eos", "--token-ids=3:9", '--body={"a": "b c"}', "--seed=4",
             "--warmup=1", "--max-concurrency=3"]  # fmt: skip
    first = cli._settings(cli._parser().parse_args(["run", *given]))
    words = shlex.split(report.as_command(first.shown()))
    assert words[:2] == ["terrace", "bench"]
    assert cli._settings(cli._parser().parse_args(["run", *words[2:]])) == first


def test_a_counter_that_was_reset_counts_from_zero():
    """A server restarted in between is not shown with negative figures."""
    assert difference(parse("a_total 5\n"), parse("a_total 2\n")) == {("a_total", ()): 2.0}


# --- the suite -------------------------------------------------------------------------------------------------------


def test_claims_name_workloads_arms_and_files_that_exist():
    """Every claim can be made: its workload, its parameters and the arms of its goals exist; the controls are among
    them."""
    for claim in CLAIMS:
        make_workload(claim.settings.workload, claim.settings.parameters)
        names = [arm.name for arm in claim.arms]
        assert {goal.arm for goal in claim.goals} <= set(names[1:])
        assert {goal.full for goal in claim.goals if isinstance(goal, Spare)} <= set(names)
        assert len(set(names)) == len(names)
    assert {claim.name for claim in CLAIMS} >= set(CONTROLS)


def _found(ratio: float) -> suite.Found:
    claim = next(claim for claim in CLAIMS if claim.name == "control-fits")
    rounds = {}
    for arm, ttft_s in zip(claim.arms, (0.1, 0.1 * ratio), strict=True):
        runs = _runs(ttft_s=ttft_s)
        document = report.make_document(runs, Objectives.parse([]), SETTINGS, None)
        rounds[arm.name] = [Result(document, runs[0].outcomes)] * 3
    return suite.Found(claim, rounds)


@pytest.mark.parametrize(("ratio", "met"), [(1.0, True), (0.8, False), (1.2, False)])
def test_a_control_fails_by_a_gain_as_by_a_loss(ratio: float, met: bool):
    """A control that shows tiers faster is as wrong as one that shows them slower."""
    assert [v["met"] for v in suite.verdicts(_found(ratio)) if "ratio" in v] == [met]


def _beside(slow: float, others_tokens: float) -> suite.Found:
    """A fifth of the requests, the slowest, takes `slow` times as long beside other work, of which the daemon did
    `others_tokens` a second; alone that work gets 100 tokens a second, and the requests take 0.4 of the device."""
    claim = Claim("x", "", Settings(), (Arm("alone", ()), Arm("beside", ()), Arm("others", ())), (
        Goal("beside", 1.1), Goal("beside", 1.1, quantile=0.99), Goal("beside", 1.1, latency="tpot", quantile=None),
        Spare("beside", "others", 0.5),
    ))  # fmt: skip
    rounds = {}
    for arm, tokens_per_s, factor in (("alone", 0.0, 1.0), ("beside", others_tokens, slow), ("others", 100.0, 1.0)):
        runs = _runs()
        for outcome in runs[0].outcomes[2::5]:
            outcome.chunk_s = [outcome.scheduled_s + factor * (at_s - outcome.scheduled_s) for at_s in outcome.chunk_s]
        server = {"seconds": 10.0, "busy_ratio": 0.4, "tokens_per_s": tokens_per_s, "remarks": []}
        result = Result(report.make_document(runs, Objectives.parse([]), SETTINGS, server), runs[0].outcomes)
        server["tokens_per_s"] += suite.asked_tokens_per_s(result) * (arm != "others")
        rounds[arm] = [result]
    return suite.Found(claim, rounds)


@pytest.mark.parametrize(
    ("slow", "others_tokens", "met"),
    [(1.05, 31.0, [True] * 4), (1.2, 31.0, [True, False, True, True]), (2.0, 29.0, [True, False, False, False])],
)
def test_a_claim_about_tails_means_and_spare_time(slow: float, others_tokens: float, met: list[bool]):
    """A fifth of slow requests shows in the p99 and, if slow enough, in the mean, not in the median; spare time is held
    against what the first arm leaves."""
    verdicts = [verdict for verdict in suite.verdicts(_beside(slow, others_tokens)) if "ratio" in verdict]
    assert [verdict["met"] for verdict in verdicts] == met
    assert verdicts[-1]["ratio"] == pytest.approx(others_tokens / 60)
    shown = suite.table([_beside(slow, others_tokens).document(quick=False)])
    assert "TTFT p99 " in shown
    assert "spare time used " in shown
    assert ("**missed**" in shown) != all(met)


def test_the_suites_page_and_table_show_its_verdicts():
    """A missed goal is visible in both; the page is self-contained."""
    documents = [_found(1.2).document(quick=False)]
    page = suite.page(documents)
    assert "GOAL MISSED" in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("https://matplotlib.org", "")
    assert "**missed**" in suite.table(documents)
    xml.etree.ElementTree.fromstring(plots.ttft_by_arm(documents[0]))


def test_the_documentation_shows_the_kept_results():
    """The tables in the README are those that the kept results make."""
    text = suite.README.read_text(encoding="utf-8")
    assert suite.renewed(text) == text


# --- the selftest ----------------------------------------------------------------------------------------------------


def _judged(case: selftest.Case, off: float = 1.0, invalid: tuple[str, ...] = ()) -> selftest.Row:
    """What the client reports when every latency that it sees is `off` times the scripted one."""
    outcomes = []
    for n, row in enumerate(case.rows):
        sent_s = row["timestamp"] / 1e3
        at_s = [sent_s + off * (stalled(sent_s + at, case.stall) - sent_s) for at in due_times(row["body"]["script"])]
        outcomes.append(Outcome(n, 0, sent_s, len(at_s), sent_s, at_s, at_s[-1], 1, len(at_s)))
    run = Run(outcomes, case.over_s, [0.0], 0.1, invalid=list(invalid))
    document = report.make_document([run], Objectives.parse([]), SETTINGS, None)
    return selftest.judged(case, Result(document, outcomes), 0.0)


def test_the_selftest_holds_every_percentile_against_the_script():
    """A perfect client is off by nothing; one that sees all 3 % too long is found out, unless it says so itself."""
    good, bad = _judged(selftest.TRUTH), _judged(selftest.TRUTH, 1.03)
    assert good.error == pytest.approx(0, abs=1e-9)
    assert set(good.reported) == {f"p{p}_{n}_ms" for p in ("50", "90", "95", "99", "99.9")
                                  for n in ("ttft", "tpot", "itl", "e2el")}  # fmt: skip
    assert bad.error == pytest.approx(0.03, abs=1e-6)
    assert [row.lies for row in (good, bad, _judged(selftest.TRUTH, 1.03, ("late",)))] == [False, True, False]


def test_the_selftest_has_goals_that_can_be_missed():
    """Truth, the marking of a client at its limit, and reach are each missed by a client that falls short of it."""
    crowds = [_judged(case) for case in selftest.REACH if case.requests <= 2000]
    truth, limit = _judged(selftest.TRUTH), _judged(selftest.LIMIT, 1.5, ("late",))
    assert [v["met"] for v in selftest.verdicts(truth, limit, crowds)] == [True] * 4
    short = selftest.verdicts(_judged(selftest.TRUTH, 1.03), _judged(selftest.LIMIT, 1.5), crowds[:2])
    assert [v["met"] for v in short] == [False] * 4


def test_the_selftest_runs_against_a_server_process(capsys: pytest.CaptureFixture[str]):
    """The whole path, with a small load: both cases are reported and no request fails."""
    assert cli.main(["selftest", "--quick"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--base-url", "ftp://x"], "--base-url ftp://x"),
        (["--base-url", "http://127.0.0.1:9", "--request-rate", "1"], "--base-url http://127.0.0.1:9"),
        (["--workload", "nope", "--request-rate", "1"], "--workload nope"),
        (["--goodput", "speed:1"], "there are ttft, tpot and e2el"),
        (["--goodput", "ttft"], "must look like ttft:200"),
        (["--body", "[1]"], "must be a JSON object"),
        (["--api-key-file", "/nowhere/key"], "--api-key-file"),
        (["sweep", "--workload", "random"], "--request-rate"),
        (["suite", "nope"], "there are multi-turn"),
        (["suite", "--quick"], "give --output"),
    ],
)
def test_what_cannot_work_is_one_line_and_code_two(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    """A mistake on the command line is named with its flag, before anything is sent."""
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("terrace bench: error: ")
    assert len(error.splitlines()) == 1


def test_workloads_are_listed_with_their_parameters(capsys: pytest.CaptureFixture[str]):
    """`terrace bench workloads` names each, says what it is and what -P takes."""
    assert cli.main(["workloads"]) == 0
    shown = capsys.readouterr().out
    for name in WORKLOADS:
        assert f"{name}: " in shown
    assert "speedup=1.0" in shown
