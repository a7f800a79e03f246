"""The load generator against a whole daemon over a real socket."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from loadgen import cli
from tests.e2e.daemon import Served, ServeProcess, Wait


def _bench(url: str, folder: Path, *arguments: str) -> dict:
    flags = ["--base-url", url, "--quiet", "--output", str(folder), *arguments]
    assert cli.main(flags) in (0, 3)  # 3: this machine was busy with other tests
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("chat", [False, True])
def test_conversations_are_measured_and_their_hits_seen(served: Served, tmp_path: Path, chat: bool):
    """Every turn succeeds, later turns hit the cache, and client and server count the same prompt tokens."""
    arguments = ["--workload", "multi-turn", "-P", "turns=3", "-P", "first=100", "-P", "question=10", "-P", "output=5",
                 "-P", "think_s=0.01", "--request-rate", "20", "--num-sessions", "5", "--warmup", "0"]  # fmt: skip
    document = _bench(served.url, tmp_path, *arguments, *(["--chat"] if chat else []))
    ours = document["terrace"]
    assert (document["completed"], document["failed"], document["total_output_tokens"]) == (15, 0, 75)
    assert [row["hit_ratio"] > 0.3 for row in ours["turns"]] == [False, True, True]
    by_source = ours["server"]["prompt_tokens_by_source"]
    assert sum(by_source.values()) == ours["cache"]["prompt_tokens"]
    assert ours["cache"]["cached_tokens"] == sum(count for source, count in by_source.items() if source != "computed")
    assert ours["settings"]["tokens_per_word"] > 1


def test_token_ids_make_prompts_of_exact_length(served: Served, tmp_path: Path):
    """With --token-ids every prompt has the length asked for, counted by the server."""
    document = _bench(served.url, tmp_path, "--token-ids", "0:200", "-P", "input=64", "-P", "output=3",
                    "--max-concurrency", "3", "--num-sessions", "10")  # fmt: skip
    assert document["input_lens"] == [64] * 10
    assert document["output_lens"] == [3] * 10


def test_refused_requests_are_counted_and_end_with_code_one(served: Served, tmp_path: Path):
    """A request that the server refuses is an error with the server's words, not a latency."""
    flags = ["--base-url", served.url, "--quiet", "--output", str(tmp_path), "--token-ids", "0:200", "-P", "input=5000",
             "--request-rate", "50", "--num-sessions", "3", "--warmup", "0"]  # fmt: skip
    assert cli.main(flags) in (1, 3)
    errors = json.loads((tmp_path / "result.json").read_text())["terrace"]["errors"]
    assert errors["http_4xx"]["count"] == 3
    assert "5000" in errors["http_4xx"]["example"]


def test_ctrl_c_reports_on_what_was_over(served: Served, tmp_path: Path):
    """A run that would take an hour is interrupted: exit code 130, a result with the requests that were over, no error
    among them."""
    command = [sys.executable, "-m", "loadgen", "--base-url", served.url, "--request-rate=20", "--duration=3600", "-P",
               "input=20", "-P", "output=2", "--output", str(tmp_path)]  # fmt: skip
    with served.client() as http:
        before = _finished(http.get("/metrics").text)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        Wait().until(lambda: _finished(http.get("/metrics").text) > before + 20, "requests are answered")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    document = json.loads((tmp_path / "result.json").read_text())
    assert document["completed"] > 0
    assert document["failed"] == 0
    assert "interrupted" in document["terrace"]["client"]["invalid_because"][0]


def _finished(metrics: str) -> float:
    lines = [line for line in metrics.splitlines() if line.startswith("terrace_requests_finished_total{")]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def test_a_daemons_recording_is_replayed_with_the_same_hits(tmp_path: Path):
    """What a daemon recorded of conversations, replayed on it: the same requests and prompt tokens, and prefixes hit as
    they did; after SIGTERM every request is in the file, and no word of any."""
    path = tmp_path / "traffic.jsonl"
    flags = ["demo", "--threads=1", "--device-gib=64MiB", f"--record-path={path}"]
    with ServeProcess(tmp_path / "log", *flags) as daemon:
        daemon.ready()
        first = _bench(daemon.url, tmp_path / "one", "--workload=multi-turn", "-P", "turns=3", "-P", "first=200", "-P",
                       "question=40", "-P", "output=2", "-P", "think_s=0.05", "--request-rate=20", "--num-sessions=4",
                       "--token-ids=300:900")  # fmt: skip
        Wait().until(lambda: len(path.read_bytes().splitlines()) >= 12, "the recording has what was asked")
        copy = tmp_path / "copy.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [row for row in rows if row["input_length"] >= 200]
        copy.write_text("".join(json.dumps(row) + "\n" for row in rows))
        again = _bench(daemon.url, tmp_path / "two", "--workload=mooncake", "-P", f"path={copy}", "--token-ids=300:900")
        assert daemon.stop(signal.SIGTERM) == 0
    assert again["completed"] == first["completed"] == 12
    assert again["total_input_tokens"] == first["total_input_tokens"]
    hits = [document["terrace"]["cache"]["hit_ratio"] for document in (first, again)]
    assert hits[0] > 0.4
    assert hits[1] == pytest.approx(hits[0], abs=0.1)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {frozenset(row) for row in rows} == {
        frozenset({"timestamp", "input_length", "output_length", "hash_ids", "block_tokens"})
    }
    assert sum(row["input_length"] >= 200 for row in rows) == 24


def test_where_nothing_can_be_recorded_the_daemon_does_not_start(tmp_path: Path):
    """A recording into a folder is refused with the name of the setting and the path."""
    with ServeProcess(tmp_path / "log", "demo", f"--record-path={tmp_path}") as daemon:
        assert daemon.process.wait(60) == 2
        assert f"cannot record to {tmp_path}: not a regular file" in daemon.said()
