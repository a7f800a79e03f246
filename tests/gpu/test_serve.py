"""`terrace serve --device cuda` as a process: it starts, answers as on a CPU, and ends when it is told to."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time

import httpx
import pytest

from server.bench.clients import free_port

pytestmark = pytest.mark.gpu

READY_S = 240.0
QUESTION = "Mira keeps coins in Lisbon. Tom plays chess. Anna speaks Danish. What does Tom play?"


def test_a_daemon_on_a_gpu_answers() -> None:
    """It gets ready, says that Tom plays chess, to the second request from pinned memory or the device, and SIGTERM
    ends it with exit code 0."""
    port = free_port()
    command = [sys.executable, "-m", "server", "serve", "demo", "--device", "cuda", f"--port={port}"]
    command += ["--device-gib=64MiB", "--dram-gib=64MiB", "--log-level=warning"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
                deadline = time.monotonic() + READY_S
                while not ready(http):
                    assert process.poll() is None, said(log)
                    assert time.monotonic() < deadline, "the daemon does not get ready"
                    time.sleep(0.2)
                body = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 16}
                for _ in range(2):
                    answer = http.post("/v1/chat/completions", json=body).raise_for_status().json()
                    assert answer["choices"][0]["message"]["content"] == "Tom plays chess."
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0, said(log)
        finally:
            process.kill()
            process.wait()


def ready(http: httpx.Client) -> bool:
    try:
        return http.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


def said(log: object) -> str:
    log.seek(0)  # type: ignore[attr-defined]
    return log.read()[-4000:]  # type: ignore[attr-defined]
