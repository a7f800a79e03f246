"""Limits of a small daemon, and the life of `terrace serve` as a process."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from tests.e2e.daemon import NAME, Served, ServerThread, Wait, start, tiny_config, write_model

LONG = {"prompt": "hello", "max_tokens": 400, "ignore_eos": True}


@pytest.fixture(scope="module")
def small(model_folder: Path) -> Iterator[Served]:
    """One request runs, one may wait; bodies are short; a key is needed."""
    limits = {
        "scheduler.max_num_seqs": 1,
        "scheduler.max_queued_requests": 1,
        "server.max_body_bytes": 4096,
        "server.api_keys": ("sesame", "open"),
    }
    with ServerThread(tiny_config(model_folder, **limits)) as running:
        yield running


def test_a_full_queue_is_429_with_retry_after(small: Served) -> None:
    """One runs, one waits, the third is told when to come back; those accepted are served."""
    with small.client(headers={"authorization": "Bearer sesame"}) as http, ThreadPoolExecutor(2) as pool:
        first = pool.submit(http.post, "/v1/completions", json=LONG)
        Wait().until(lambda: small.snapshot().running == 1, "the first request runs")
        second = pool.submit(http.post, "/v1/completions", json=LONG)
        Wait().until(lambda: small.snapshot().waiting == 1, "the second request waits")
        refused = http.post("/v1/completions", json=LONG)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert (first.result().status_code, second.result().status_code) == (200, 200)
        assert 'reason="queue_full"} 1.0' in http.get("/metrics").text


def test_keys_over_a_socket(small: Served) -> None:
    """A wrong key is an AuthenticationError of the client; any right one works; probes need none."""
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{small.url}/v1", api_key="guess", max_retries=0).models.list()
    for key in ("sesame", "open"):
        assert openai.OpenAI(base_url=f"{small.url}/v1", api_key=key).models.list().data[0].id == NAME
    with small.client() as http:
        assert http.get("/readyz").status_code == http.get("/metrics").status_code == 200


def test_a_long_body_is_413_over_a_socket(small: Served) -> None:
    """Declared or chunked, far larger than any buffer: the client reads its 413, and the daemon goes on."""
    megabytes = b'{"prompt": "' + b"x" * (4 << 20) + b'"}'
    headers = {"authorization": "Bearer sesame", "content-type": "application/json"}
    with small.client(headers=headers) as http:
        for content in (megabytes, (megabytes[i : i + 65536] for i in range(0, len(megabytes), 65536))):
            answer = http.post("/v1/completions", content=content)
            assert answer.status_code == 413
            assert answer.json()["error"]["code"] == "body_too_large"
        assert http.post("/v1/completions", json={"prompt": "hi", "max_tokens": 1}).status_code == 200


def test_sigterm_finishes_what_runs_and_exits_0(tmp_path: Path) -> None:
    """After SIGTERM the daemon is not ready and takes nothing new; the running stream gets every token; then exit 0.
    Who watches does not keep it from stopping."""
    process, url = start(write_model(tmp_path / "tiny", context=2048))
    try:
        body = LONG | {"max_tokens": 1500, "stream": True, "stream_options": {"include_usage": True}}
        with (
            httpx.Client(base_url=url, timeout=60, trust_env=False) as http,
            http.stream("GET", "/status/stream") as watched,
            http.stream("POST", "/v1/completions", json=body) as answer,
        ):
            lines, seen = answer.iter_lines(), watched.iter_lines()
            assert next(lines).startswith("data: ")
            assert next(seen) == "event: history"
            process.send_signal(signal.SIGTERM)
            Wait().until(lambda: http.get("/readyz").status_code == 503, "the daemon says that it is not ready")
            assert http.get("/livez").status_code == 200
            refused = http.post("/v1/completions", json={"prompt": "late"})
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) >= 1
            rest = [line for line in lines if line.startswith("data: ")]
            assert "event: live" in list(seen), "the stream of who watches has come to its end"
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2][6:])["usage"]["completion_tokens"] == 1500
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def test_what_outlasts_the_shutdown_timeout_is_told_so(tmp_path: Path) -> None:
    """A stream that SIGINT gives no time to finish ends with an error event; the exit code is 0 all the same."""
    process, url = start(write_model(tmp_path / "tiny", context=4096), "--shutdown-timeout-s", "0")
    try:
        with (
            httpx.Client(base_url=url, timeout=60, trust_env=False) as http,
            http.stream("POST", "/v1/completions", json=LONG | {"max_tokens": 4000, "stream": True}) as answer,
        ):
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            process.send_signal(signal.SIGINT)
            rest = [line for line in lines if line.startswith("data: ")]
        assert json.loads(rest[-1][6:])["error"]["code"] == "not_ready"
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
