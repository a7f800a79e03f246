"""Never unbounded: a daemon under a load that needs far more cache than it has, and everything that could grow watched.

A real daemon on the demo model with small tiers and an SSD cap, clients that come and go, come back to old
conversations, and sometimes leave in the middle. Every few seconds: resident memory, open files, bytes on disk, blocks
and queues, and how late the event loop is. In the second half nothing may be larger than it was in the first, but for
noise, and the cap on disk may not be passed at any moment.
"""

from __future__ import annotations

import asyncio
import os
import random
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from server.bench.report import Report
from server.bench.turns import serving
from server.demo.corpus import example

DISK_GIB = 0.125
FLAGS = ["--device-gib=0.012", "--dram-gib=0.02", f"--ssd-gib={DISK_GIB}", "--ssd-min-free-gib=0"]
CLIENTS = 12
PAUSE_S = 0.1
"""Mean time that a client thinks: without it all come at once, and the event loop's lag is that of reading requests."""
CONVERSATIONS = 400
"""Far more than fit on the disk."""
SAMPLE_S = 2.0
GROWTH = 1.03
"""The largest of the second half may exceed that of the first by this factor, plus SLACK_BYTES for memory."""
SLACK_BYTES = 8 * 2**20
GOAL_LAG_S = 0.005


@dataclass(frozen=True)
class Sample:
    at_s: float
    rss_bytes: int
    files: int
    disk_bytes: int
    waiting: float
    spill_queue_bytes: float


def run(*, quick: bool) -> Report:
    """Ten minutes, or ten seconds; see the module's docstring."""
    report = Report("soak", quick=quick)
    with tempfile.TemporaryDirectory() as disk, serving("demo", [*FLAGS, f"--ssd-path={disk}"]) as (http, pid):
        asyncio.run(_soak(report, str(http.base_url), pid, Path(disk), 10.0 if quick else 600.0))
    return report


async def _soak(report: Report, url: str, pid: int, disk: Path, seconds: float) -> None:
    limits = httpx.Limits(max_connections=CLIENTS + 1)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as http:
        until = time.monotonic() + seconds
        clients = [asyncio.create_task(_client(http, number, until)) for number in range(CLIENTS)]
        samples = []
        while time.monotonic() < until:
            await asyncio.sleep(SAMPLE_S)
            samples.append(_sample(pid, disk, await _scrape(http)))
        outcomes = [await client for client in clients]
        last = await _scrape(http)
    served, failed = (sum(outcome[i] for outcome in outcomes) for i in range(2))
    _verdict(report, samples, served, failed, last)


async def _client(http: httpx.AsyncClient, number: int, until: float) -> tuple[int, int]:
    """One client after another: a conversation of the many, new or old; one in ten leaves early."""
    rng = random.Random(number)
    served = failed = 0
    while time.monotonic() < until:
        text = example(seed=rng.randrange(CONVERSATIONS), target_tokens=rng.choice((100, 300, 600)), kind="completion")
        body = {"prompt": text.prompt, "max_tokens": 8, "temperature": 0, "stream": True}
        leaves = rng.random() < 0.1
        await asyncio.sleep(rng.uniform(0, 2 * PAUSE_S))
        try:
            async with http.stream("POST", "/v1/completions", json=body) as response:
                failed += response.status_code != 200
                async for _ in response.aiter_lines():
                    if leaves:
                        break
            served += 1
        except httpx.HTTPError:
            failed += 1
    return served, failed


async def _scrape(http: httpx.AsyncClient) -> Mapping[str, float]:
    """Sums of all samples by name, and the lag histogram's buckets by their edge."""
    totals: dict[str, float] = {}
    for family in text_string_to_metric_families((await http.get("/metrics")).text):
        for sample in family.samples:
            name = sample.name
            if name == "terrace_event_loop_lag_seconds_bucket":
                name = f"lag {sample.labels['le']}"
            totals[name] = totals.get(name, 0.0) + sample.value
    return totals


def _sample(pid: int, disk: Path, metrics: Mapping[str, float]) -> Sample:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    files = sum(entry.stat().st_blocks * 512 for folder in disk.iterdir() for entry in os.scandir(folder))
    return Sample(
        time.monotonic(),
        pages * os.sysconf("SC_PAGE_SIZE"),
        len(os.listdir(f"/proc/{pid}/fd")),
        files,
        metrics["terrace_requests_waiting"],
        metrics["terrace_kv_transfer_queue_bytes"],
    )


def _verdict(report: Report, samples: list[Sample], served: int, failed: int, last: Mapping[str, float]) -> None:
    settled = samples[len(samples) // 6 :]
    halves = settled[: len(settled) // 2], settled[len(settled) // 2 :]
    report.header("what", "first half", "second half")
    for name, slack in (("rss_bytes", SLACK_BYTES), ("files", 0), ("waiting", 2), ("spill_queue_bytes", 2**20)):
        before, after = (max(getattr(sample, name) for sample in half) for half in halves)
        report.row(name, before, after)
        report.goal(f"{name} does not grow ({before} -> {after})", met=after <= GROWTH * before + slack)
    most = max(sample.disk_bytes for sample in samples)
    report.row("disk_bytes", *(max(sample.disk_bytes for sample in half) for half in halves))
    report.goal(f"bytes on disk {most} <= cap {int(DISK_GIB * 2**30)}", met=most <= DISK_GIB * 2**30)
    lag_s = _quantile_edge(last, 0.99)
    report.goal(f"event-loop lag p99 <= {lag_s * 1e3:g} ms (bucket edge; goal 5 ms)", met=lag_s <= GOAL_LAG_S)
    evicted, hits = last["terrace_kv_evicted_blocks_total"], last["terrace_kv_hit_tokens_total"]
    print(f"{served} requests, {failed} failed, {evicted:.0f} blocks evicted, {hits:.0f} prompt tokens from the cache")
    report.goal(f"{failed} of {served} requests failed", met=failed == 0)
    raw = [asdict(sample) for sample in samples]
    report.keep(samples=raw, served=served, failed=failed, evicted=evicted, hits=hits)


def _quantile_edge(metrics: Mapping[str, float], q: float) -> float:
    """Upper edge of the lag bucket that the quantile falls into."""
    edges = sorted((float(name[4:]), count) for name, count in metrics.items() if name.startswith("lag "))
    return next(edge for edge, count in edges if count >= q * edges[-1][1])
