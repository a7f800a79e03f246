"""The load generator against a whole daemon over a real socket."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loadgen import cli
from tests.e2e.daemon import Served


def _run(served: Served, folder: Path, *arguments: str) -> dict:
    flags = ["--base-url", served.url, "--quiet", "--output", str(folder), *arguments]
    assert cli.main(flags) in (0, 3)  # 3: this machine was busy with other tests
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("chat", [False, True])
def test_conversations_are_measured_and_their_hits_seen(served: Served, tmp_path: Path, chat: bool):
    """Every turn succeeds, later turns hit the cache, and client and server count the same prompt tokens."""
    arguments = ["--workload", "multi-turn", "-P", "turns=3", "-P", "first=100", "-P", "question=10", "-P", "output=5",
                 "-P", "think_s=0.01", "--request-rate", "20", "--num-sessions", "5", "--warmup", "0"]  # fmt: skip
    document = _run(served, tmp_path, *arguments, *(["--chat"] if chat else []))
    ours = document["terrace"]
    assert (document["completed"], document["failed"], document["total_output_tokens"]) == (15, 0, 75)
    assert [row["hit_ratio"] > 0.3 for row in ours["turns"]] == [False, True, True]
    by_source = ours["server"]["prompt_tokens_by_source"]
    assert sum(by_source.values()) == ours["cache"]["prompt_tokens"]
    assert ours["cache"]["cached_tokens"] == sum(count for source, count in by_source.items() if source != "computed")
    assert ours["settings"]["tokens_per_word"] > 1


def test_token_ids_make_prompts_of_exact_length(served: Served, tmp_path: Path):
    """With --token-ids every prompt has the length asked for, counted by the server."""
    document = _run(served, tmp_path, "--token-ids", "0:200", "-P", "input=64", "-P", "output=3",
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
