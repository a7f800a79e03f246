"""`terrace simulate`: sweeps, load, what it says and writes, and what it refuses."""

from __future__ import annotations

import gzip
import json
import sys
from array import array
from pathlib import Path
from random import Random
from typing import Any

import pytest

from server.cli import main
from server.recorder import Ended, Recorder
from server.sim import summary
from server.sim.replay import TOO_LONG
from server.sim.simulate import What, combinations, load_trace, possible, simulate, swept

BLOCK = 16
SMALL = ["--device=24blocks", "--dram=50%"]
PNG = b"\x89PNG"


def _rows(seed: int, requests: int = 60, gap_s: float = 1.0) -> list[dict[str, Any]]:
    """Conversations that take turns at random, as lines of a trace."""
    rng = Random(seed)
    histories = [[1000 * n] for n in range(12)]
    rows = []
    for number in range(requests):
        history = rng.choice(histories)
        history.extend(range(history[-1] + 1, history[-1] + 1 + rng.randint(1, 2)))
        rows.append({"timestamp": number * gap_s * 1e3, "input_length": len(history) * BLOCK + 1,
                     "output_length": rng.randint(1, 8), "hash_ids": [*history, 1_000_000 + number],
                     "block_tokens": BLOCK})  # fmt: skip
    return rows


def _file(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "trace.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _document(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "simulation.json").read_text())


@pytest.fixture
def trace(tmp_path: Path) -> str:
    """The path of a trace of sixty requests."""
    return _file(tmp_path, _rows(6))


def test_a_sweep_prints_a_row_per_combination(trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Sizes as bytes, shares and blocks, shown as typed, in 120 columns; figures also as JSON, with both limits."""
    out = tmp_path / "out"
    arguments = ["simulate", trace, "--device=24blocks", "--sweep=eviction=lru,s3fifo", "--sweep=dram=0,50%,1GiB",
                 "--slo", "ttft:1000", f"--output={out}"]  # fmt: skip
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 120 for line in lines if not line.startswith("written: "))
    cells = [line.split()[:2] for line in lines if line.split()[:1] in (["lru"], ["s3fifo"])]
    assert cells[:6] == [[name, size] for name in ("lru", "s3fifo") for size in ("0", "50%", "1GiB")]
    document = _document(out)
    assert document["swept"] == ["eviction", "dram"]
    rows = document["rows"]
    assert [(row["eviction"], row["dram"]) for row in rows[:3]] == [("lru", "0"), ("lru", "50%"), ("lru", "1GiB")]
    assert rows[0]["hit"] <= rows[1]["hit"] <= rows[2]["hit"] <= rows[2]["limits"]["infinite"] + 1e-9
    assert all(row["met"] == 1.0 for row in rows)
    assert all(sum(row["stalls_s"].values()) == pytest.approx(row["mean_ttft_ms"] * 60 / 1e3) for row in rows)


def test_two_processes_find_what_one_does(trace: str):
    """Rows are the same but for how long they took to find."""
    chosen = combinations(What(device="24blocks"), ["dram=0,50%"])
    alone, both = (simulate(chosen, load_trace(trace), {}, jobs) for jobs in (1, 2))
    for row in (*alone, *both):
        del row["wall_s"]
    assert alone == both


def test_the_page_and_its_plots_hold_everything(trace: str, tmp_path: Path):
    """One file with tables and plots in it, nothing loaded from elsewhere; a trace's name cannot become markup."""
    evil = Path(trace).rename(tmp_path / "<script>alert(1)<")
    out = tmp_path / "out"
    assert main(["simulate", str(evil), "--device=24blocks", "--sweep=dram=0,50%", "--sweep=ssd=0,100%",
                 f"--output={out}"]) == 0  # fmt: skip
    page = (out / "simulation.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    for outside in ('src="http', 'href="http', "@import"):
        assert outside not in page
    plots = {path.name: path.read_bytes()[:4] for path in out.glob("*.png")}
    assert plots == dict.fromkeys(("hits.png", "ttft.png", "stalls.png", "written.png"), PNG)
    assert page.count("<svg") == 4
    document = _document(out)
    assert document["left_out"] == ["dram=0, ssd=100%"]
    assert all(sentence in page for sentence in document["findings"])
    assert document["trace"]["requests"] == 60
    assert document["trace"]["distinct_blocks"] == load_trace(str(evil)).distinct


def test_without_matplotlib_the_page_says_so(trace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Tables are there, plots are not."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["simulate", trace, *SMALL, f"--output={tmp_path / 'out'}"]) == 0
    assert "matplotlib is not installed" in (tmp_path / "out" / "simulation.html").read_text()
    assert not list((tmp_path / "out").glob("*.png"))


# --- in words --------------------------------------------------------------------------------------------------------


def _found(ttft_ms: float | None, hit: float, **typed: Any) -> dict[str, Any]:
    figures = {"mean_ttft_ms": ttft_ms, "p99_ttft_ms": ttft_ms, "hit": hit, "met": 1.0}
    return {**figures, "ssd_written_bytes": 0, "refused": 0, **typed}


def test_the_best_step_up_is_named_with_what_it_buys():
    """Against the first row, one name at a time; then what is best of all."""
    rows = [_found(100.0, 0.1, dram="0", ssd="0"), _found(61.0, 0.19, dram="1TiB", ssd="0"),
            _found(80.0, 0.1, dram="0", ssd="4TB"), _found(50.0, 0.2, dram="1TiB", ssd="4TB")]  # fmt: skip
    rows[3]["ssd_written_bytes"] = 5e12
    assert summary.findings(rows, ["dram", "ssd"]) == [
        "From dram=0, ssd=0 the best single step is dram=1TiB: mean TTFT 0.61 x (61.0 ms instead of 100 ms), "
        "p99 0.61 x, 1.9 x the hits (19.0 % instead of 10.0 %).",
        "ssd=4TB: mean TTFT 0.80 x (80.0 ms instead of 100 ms), p99 0.80 x, as many hits (10.0 %).",
        "The best of all is dram=1TiB, ssd=4TB: mean TTFT 0.50 x (50.0 ms instead of 100 ms), p99 0.50 x, "
        "2 x the hits (20.0 % instead of 10.0 %), 5000 GB more written to SSD.",
    ]


def test_steps_that_buy_nothing_are_not_praised():
    """Nor is one load compared with another, or a daemon that refused all with one that did not."""
    rows = [_found(100.0, 0.0, load=0.5, dram="0"), _found(99.0, 0.1, load=0.5, dram="1"),
            _found(500.0, 0.0, load=1.0, dram="0"), _found(None, 0.0, load=1.0, dram="1")]  # fmt: skip
    assert summary.findings(rows, ["load", "dram"]) == [
        "At load=0.5, from dram=0 no single step shortens the mean TTFT by 2% or more.",
        "dram=1: mean TTFT 0.99 x (99.0 ms instead of 100 ms), p99 0.99 x, hits (10.0 % instead of 0.0 %).",
    ]
    assert summary.findings(rows[:1], []) == []


def test_more_of_everything_is_not_advised_where_one_step_does_as_well():
    """The best of all is named only if it is better than the best step."""
    rows = [_found(100.0, 0.1, dram="0", ssd="0"), _found(50.0, 0.2, dram="1TiB", ssd="0"),
            _found(49.9, 0.2, dram="1TiB", ssd="4TB")]  # fmt: skip
    assert len(summary.findings(rows, ["dram", "ssd"])) == 1


# --- load ------------------------------------------------------------------------------------------------------------


def test_load_is_a_share_of_what_the_daemon_can_do(tmp_path: Path):
    """At a tenth all takes ten times as long as the work does, at twice the device never rests."""
    trace = load_trace(_file(tmp_path, _rows(8)))
    chosen = combinations(What(device="200blocks", max_running=8), ["load=0.1,2"])
    calm, busy = simulate(chosen, trace, {})
    assert calm["device_busy"] < 0.8 < 0.99 < busy["device_busy"]
    span_s = 60 / calm["capacity_requests_per_s"]
    assert calm["virtual_s"] == pytest.approx(10 * span_s, rel=0.05)
    assert busy["virtual_s"] == pytest.approx(span_s, rel=0.05)


def test_all_policies_of_a_sweep_get_the_same_arrivals(tmp_path: Path):
    """Capacity is that of the sizes with fixed policies; other sizes have their own."""
    trace = load_trace(_file(tmp_path, _rows(9)))
    names = ["dram=0,100%", "eviction=lru,s3fifo", "policy=fcfs,priority"]
    rows = simulate(combinations(What(device="24blocks", load=0.9), names), trace, {})
    rates = {(row["dram"], row["capacity_requests_per_s"]) for row in rows}
    assert len(rows) == 8
    assert len(rates) == 2


# --- traces that are recorded, and those that are none ---------------------------------------------------------------


def test_what_the_daemon_recorded_is_simulated(tmp_path: Path):
    """Requests that ended in another order than they came; the second finds what the first one left."""
    path = tmp_path / "recorded.jsonl"
    recorder = Recorder(path, 2**20, BLOCK, 5.0)
    shared = array("i", range(10 * BLOCK))
    recorder.record(Ended(9.0, b"root", shared + array("i", range(500, 520)), 7))
    recorder.record(Ended(8.0, b"root", shared, 0))
    recorder.record(Ended(10.0, b"another tenant", shared, 3))
    recorder.close()
    out = tmp_path / "out"
    assert main(["simulate", str(path), "--device=100blocks", f"--output={out}"]) == 0
    document = _document(out)
    (row,) = document["rows"]
    assert document["trace"]["span_s"] == 2.0
    assert row["hit"] == pytest.approx(10 * BLOCK / (10 * BLOCK * 3 + 20)) == row["limits"]["infinite"]
    assert (row["requests"], row["refused"]) == (3, 0)


def test_a_request_that_no_size_holds_is_refused_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Its reason stands below the table and in the JSON; it counts as not having met the SLO."""
    rows = _rows(2, requests=9)
    rows.append({"timestamp": 0, "input_length": 100 * BLOCK, "output_length": 1, "hash_ids": list(range(9000, 9100)),
                 "block_tokens": BLOCK})  # fmt: skip
    out = tmp_path / "out"
    trace = _file(tmp_path, rows)
    assert main(["simulate", trace, "--device=40blocks", "--slo", "ttft:9999", f"--output={out}"]) == 0
    said = capsys.readouterr().out
    assert "refused" in said
    assert f"Refused: {TOO_LONG}." in said
    (row,) = _document(out)["rows"]
    assert row["refused_because"] == {TOO_LONG: 1}
    assert row["met"] == pytest.approx(0.9)
    assert main(["simulate", _file(tmp_path, rows[-1:]), "--device=40blocks"]) == 0  # nothing is served, nothing breaks
    assert "1 requests" in capsys.readouterr().out


GOOD = json.dumps({"timestamp": 0, "input_length": 10, "output_length": 1, "hash_ids": [1]})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "has no requests"),
        (b"\xff\xfe\x00", "not text"),
        (b"timestamp,tokens\n1,2\n", "line 1: not JSON"),
        (f"{GOOD}\n[1]\n".encode(), "line 2: not an object"),
        (f'{GOOD}\n{{"timestamp": 1}}\n'.encode(), "line 2: not of the Mooncake format: KeyError('hash_ids')"),
        (GOOD.replace("10", "0").encode(), "line 1: not of the Mooncake format: ValueError('a length"),
        (GOOD.replace('"timestamp": 0', '"timestamp": NaN').encode(), "timestamp is not a time"),
        (GOOD.replace("10", "1000").encode(), "1 hash_ids for 1000 tokens in blocks of 512"),
        (f'{GOOD}\n{GOOD[:-1]}, "block_tokens": 16}}'.encode(), "has blocks of 16 and 512 tokens"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_no_trace_is_one_line(tmp_path: Path, content: bytes, said: str, capsys: pytest.CaptureFixture[str]):
    """The line at fault and what is wrong with it; exit code 2 and no traceback."""
    path = tmp_path / "trace"
    path.write_bytes(content)
    assert main(["simulate", str(path)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("terrace simulate: error: ")
    assert error.count("\n") == 1


def test_files_that_cannot_be_read_or_written_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """None, cut short, not really compressed, or a file where the output folder should be."""
    cut, plain = tmp_path / "cut.gz", tmp_path / "plain.gz"
    cut.write_bytes(gzip.compress(GOOD.encode() * 100)[:-20])
    plain.write_text(GOOD)
    for path, said in ((tmp_path / "none", "No such file"), (cut, "ended before"), (plain, "Not a gzipped file")):
        assert main(["simulate", str(path)]) == 2
        assert said in capsys.readouterr().err
    trace = tmp_path / "trace"
    trace.write_text(GOOD)
    assert main(["simulate", str(trace), f"--output={plain}"]) == 2
    assert "--output" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device=none"], "--device none: must look like"),
        (["--device=1blocks"], "give it more"),
        (["--dram=0", "--ssd=1TB"], "--ssd needs --dram"),
        (["--eviction=best"], "there are "),
        (["--profile=tpu"], "h200-8b"),
        (["--speedup=0"], "--speedup 0.0: must be above 0"),
        (["--max-running=-1"], "--max-running -1: must be above 0"),
        (["--load=nan"], "--load nan: must be above 0"),
        (["--load=0.5", "--speedup=2"], "leave --speedup away"),
        (["--load=0.5", "--limit=1"], "come at the same time"),
        (["--sweep=colour=red"], "there are profile"),
        (["--sweep=speedup=fast"], "--sweep speedup=fast"),
        (["--slo", "speed:1"], "ttft, tpot and e2el"),
    ],
)
def test_what_cannot_be_simulated_is_one_line(
    trace: str, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
):
    """A mistake on the command line is named before anything is replayed; exit code 2."""
    assert main(["simulate", trace, *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("terrace simulate: error: ")


def test_combinations_keep_the_order_in_which_they_were_given(trace: str):
    """The last name varies fastest, what is the same in all is not shown, twice the same is once."""
    sweeps = ["max-running=4,8", "dram=0,1GiB", "policy=fcfs,fcfs"]
    chosen = combinations(What(), sweeps)
    assert [(what.max_running, what.dram) for what in chosen] == [(4, "0"), (4, "1GiB"), (8, "0"), (8, "1GiB")]
    assert swept(chosen, sweeps) == ["max_running", "dram"]
    assert possible(chosen, load_trace(trace)) == (chosen, [])


def test_help_fits_and_names_everything(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Every name that can be swept has a flag with a word on it, in 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["simulate", "--help"])
    lines = capsys.readouterr().out.splitlines()
    for name in ("profile", "device", "dram", "ssd", "eviction", "policy", "load", "speedup", "max-running"):
        assert any(line.strip().startswith(f"--{name} ") for line in lines)
    assert max(map(len, lines)) <= 80
