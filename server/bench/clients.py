"""A thousand streaming clients at once on the demo model, over loopback, against a daemon in a process of its own.

The claim: none fails, memory returns to where it was, and the event loop keeps turning. A first wave warms the daemon
up (allocators, threads, connection state); what later waves add to its memory would be a leak. The client is written on
bare asyncio streams, because a thousand clients share this machine's cores with the server that they measure.
"""

from __future__ import annotations

import asyncio
import json
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from server.bench.report import Report, quantile

CLIENTS = 1000
WAVES = 3
OUTPUT_TOKENS = 32
STARTUP_TIMEOUT_S = 180.0
CLIENT_TIMEOUT_S = 300.0
GROWTH_BYTES = 32 * 2**20
"""What the daemon's memory may grow from the first wave to the last; a leak of 16 KiB per request would show."""
DEVICE_TIER = "32MiB"
"""So small that the first wave fills it: frames become resident when first used, and that is no leak."""
LAG = "terrace_event_loop_lag_seconds"


@dataclass(frozen=True)
class Outcome:
    """One client's stream: chunks received, seconds to the first and to the end, what went wrong if anything did."""

    chunks: int
    first_s: float
    total_s: float
    fault: str | None = None


def run(*, quick: bool) -> Report:
    """Start a daemon, send waves of clients, stop it; see the module's docstring."""
    report = Report("clients", quick=quick)
    clients = 50 if quick else CLIENTS
    _allow_open_files(2 * clients + 512)
    port = free_port()
    command = [sys.executable, "-m", "server", "serve", "demo", "--port", str(port), "--log-level", "warning"]
    command += ["--device-gib", DEVICE_TIER]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            asyncio.run(_waves(report, process, port, clients, log))
            process.send_signal(signal.SIGTERM)
            code = process.wait(60)
            report.goal(f"the daemon stops on SIGTERM with exit code 0 (got {code})", met=code == 0)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    return report


async def _waves(report: Report, process: subprocess.Popen[bytes], port: int, clients: int, log: IO[str]) -> None:
    await ready(process, port, log)
    model = json.loads(await get(port, "/v1/models"))["data"][0]["id"]
    before = rss_bytes(process.pid)
    report.header(
        "wave", "clients", "failed", "seconds", "chunks/s", "first p50 s", "first p99 s", "lag p99 ms", "RSS MiB"
    )
    report.row("start", 0, 0, "", "", "", "", "", f"{before / 2**20:.0f}")
    after, failed = [], 0
    for wave in range(WAVES):
        lag_before = lag_buckets(await get(port, "/metrics"))
        started = time.perf_counter()
        outcomes = await asyncio.gather(*(_client(port, model, wave, number) for number in range(clients)))
        seconds = time.perf_counter() - started
        lag_s = lag_quantile(lag_before, lag_buckets(await get(port, "/metrics")), 0.99)
        await asyncio.sleep(1.0)  # connections close and the daemon turns idle
        after.append(rss_bytes(process.pid))
        faults = [outcome.fault for outcome in outcomes if outcome.fault]
        failed += len(faults)
        first = [outcome.first_s for outcome in outcomes if not outcome.fault] or [float("nan")]
        rate = sum(outcome.chunks for outcome in outcomes) / seconds
        cells = (f"{seconds:.1f}", f"{rate:.0f}", f"{quantile(first, 0.5):.2f}", f"{quantile(first, 0.99):.2f}")
        report.row(wave, clients, len(faults), *cells, f"<={lag_s * 1e3:g}", f"{after[-1] / 2**20:.0f}")
        report.keep(
            wave=wave,
            clients=clients,
            faults=faults[:20],
            seconds=seconds,
            first_s=first,
            chunks=[outcome.chunks for outcome in outcomes],
            loop_lag_p99_s=lag_s,
            rss_before_bytes=before,
            rss_after_bytes=after[-1],
        )
        for fault in sorted(set(faults))[:5]:
            print(f"  fault: {fault}")
    growth = after[-1] - after[0]
    report.goal(f"{WAVES * clients} streaming clients, {clients} at once: {failed} failed, goal 0", met=failed == 0)
    text = f"memory after wave {WAVES} against wave 1: {growth / 2**20:+.1f} MiB, goal {GROWTH_BYTES >> 20} MiB"
    report.goal(text, met=growth <= GROWTH_BYTES)


async def _client(port: int, model: str, wave: int, number: int) -> Outcome:
    """One request with a prompt of its own, read to the end."""
    started = time.perf_counter()
    try:
        async with asyncio.timeout(CLIENT_TIMEOUT_S):
            return await _stream(port, model, f"The box {wave}-{number} is", started)
    except (OSError, TimeoutError, asyncio.IncompleteReadError, ValueError) as error:
        return Outcome(0, 0.0, time.perf_counter() - started, f"{type(error).__name__}: {error}")


async def _stream(port: int, model: str, prompt: str, started: float) -> Outcome:
    body = {"model": model, "prompt": prompt, "max_tokens": OUTPUT_TOKENS, "ignore_eos": True, "stream": True}
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(_request("POST", "/v1/completions", json.dumps(body).encode()))
        status = await reader.readline()
        if b" 200 " not in status:
            detail = (await reader.read(2000)).partition(b"\r\n\r\n")[2]
            return Outcome(0, 0.0, time.perf_counter() - started, f"{status.decode().strip()} {detail.decode()[:200]}")
        chunks, first_s, done = 0, 0.0, False
        while line := await reader.readline():
            if line.startswith(b"data: [DONE]"):
                done = True
            elif line.startswith(b"data: "):
                chunks += 1
                first_s = first_s or time.perf_counter() - started
                if b'"error"' in line:
                    return Outcome(chunks, first_s, time.perf_counter() - started, line.decode()[:200])
        fault = None if done and chunks else f"the stream ended after {chunks} chunks without [DONE]"
        return Outcome(chunks, first_s, time.perf_counter() - started, fault)
    finally:
        writer.close()


def _request(method: str, path: str, body: bytes = b"") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def get(port: int, path: str) -> str:
    """The body of a GET; OSError when the answer is not 200."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        # HTTP/1.0 keeps the answer free of chunk sizes.
        writer.write(_request("GET", path).replace(b"HTTP/1.1", b"HTTP/1.0", 1))
        answer = (await reader.read()).decode()
    finally:
        writer.close()
    head, _, body = answer.partition("\r\n\r\n")
    if " 200 " not in head.partition("\r\n")[0]:
        raise OSError(f"GET {path}: {head.partition(chr(13))[0]}")
    return body


async def ready(process: subprocess.Popen[bytes], port: int, log: IO[str]) -> None:
    deadline = time.monotonic() + STARTUP_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            log.seek(0)
            raise SystemExit(f"the daemon ended with code {process.returncode}:\n{log.read()[-4000:]}")
        try:
            await get(port, "/readyz")
        except OSError:
            await asyncio.sleep(0.2)
        else:
            return
    raise SystemExit(f"the daemon was not ready after {STARTUP_TIMEOUT_S:.0f} s")


def rss_bytes(pid: int) -> int:
    """Resident memory of a process, from /proc; 0 where there is no such thing."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return 0
    match = re.search(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def lag_buckets(metrics: str) -> dict[float, float]:
    """{upper edge in seconds: cumulative count} of the event-loop lag in a scrape."""
    found = re.findall(rf'^{LAG}_bucket{{[^}}]*le="([^"]+)"[^}}]*}} (\S+)', metrics, re.MULTILINE)
    return {float(edge): float(count) for edge, count in found}


def lag_quantile(before: Mapping[float, float], after: Mapping[float, float], q: float) -> float:
    """The bucket edge under which the share `q` of the samples between two scrapes lies; NaN without samples."""
    counts = {edge: count - before.get(edge, 0.0) for edge, count in sorted(after.items())}
    total = max(counts.values(), default=0.0)
    return next((edge for edge, count in counts.items() if total and count >= q * total), float("nan"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _allow_open_files(wanted: int) -> None:
    """Raise the soft limit, which the daemon inherits: every stream is a socket at both ends."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise SystemExit(f"this benchmark needs {wanted} open files, the hard limit is {hard}")
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
