"""What counting costs, and what a scrape does to those who are served.

Counting: the rig of `streaming` (256 streams, a runner that costs nothing, one core for the daemon), in turns as it is
and with metrics, accounts and lives of blocks that do nothing when called. What is compared is the loop thread's time
per token in the best round of each, as others on the machine only ever add to it; and the calls that count are timed by
themselves. With a model in the runner the share is smaller still.

A scrape: how long the loop copies the numbers of a daemon with three tiers, how long the text takes elsewhere; and how
late timers fire under 256 streams, without scrapes and with ten a second, of a client in a process of its own.
"""

from __future__ import annotations

import asyncio
import gc
import http.client
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

from server.bench.placing import first_token_s, quiet, serving
from server.bench.report import Report, quantile
from server.bench.streaming import PROMPT, free_daemon, read_streams, stream
from server.build import Daemon, build
from server.cli import loop_factory
from server.config import Config, KvConfig, ModelConfig, SchedulerConfig
from server.process import GC_THRESHOLDS

STREAMS, OUTPUT_TOKENS, PAIRS = 256, 100, 15
LAG_ROUNDS = 5
GOAL_COST = 0.01
GOAL_PAUSE_S = 0.005
TICK_S = 0.005
SCRAPE_EVERY_S = 0.1
RENDERS = 200
EMPTY_CALLS = 10_000

SILENT = {
    "metrics": ("step", "stalled", "generated", "inter_token", "first_token", "prompt_done", "finished", "rejected",
                "http"),
    "accounts": ("asked", "credit", "held_up", "restored"),
    "lives": ("came", "evicted", "gone", "used", "unused", "moved", "fetched", "asked_again", "asked_in_vain"),
}  # fmt: skip


def run(*, quick: bool) -> Report:
    """Both; see the module's docstring."""
    report = Report("metrics", quick=quick)
    cores = sorted(os.sched_getaffinity(0))
    with _process(read_streams, cores[-1]) as client, _process(scrape, cores[-1]) as scraper:
        interval_s, thresholds = sys.getswitchinterval(), gc.get_threshold()
        os.sched_setaffinity(0, {cores[0]})
        sys.setswitchinterval(_config(1).server.switch_interval_s)  # as `terrace serve` does
        try:
            with asyncio.Runner(loop_factory=loop_factory()) as runner:
                runner.run(_counting(report, client, quick=quick))
                runner.run(_timing(report, client, quick=quick))
                runner.run(_lag(report, client, scraper, quick=quick))
                runner.run(_rendering(report, quick=quick))
        finally:
            os.sched_setaffinity(0, set(cores))
            sys.setswitchinterval(interval_s)
            gc.set_threshold(*thresholds)
            gc.unfreeze()
    return report


@contextmanager
def _process(work: Callable[[Connection, int], None], core: int) -> Iterator[Connection]:
    """`work` in another process, and the end of its pipe; None through that ends it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, core), daemon=True)
    process.start()
    try:
        yield ours
    finally:
        ours.send(None)
        process.join(10)


def _config(streams: int) -> Config:
    return Config(
        model=ModelConfig(model="demo"),
        kv=KvConfig(device_gib=0.125),
        scheduler=SchedulerConfig(max_num_seqs=streams, max_num_batched_tokens=8192),
    )


def counters(daemon: Daemon) -> Iterator[tuple[Any, str]]:
    """Every call with which `daemon` counts: an object, and the name of its method."""
    kv = daemon.engine.kv
    parts: list[tuple[Any, str]] = [(daemon.metrics, "metrics"), (kv.accounts, "accounts")]
    for part, kind in [*parts, *((books.lives, "lives") for books in kv.levels)]:
        yield from ((part, name) for name in SILENT[kind])


def silence(daemon: Daemon) -> None:
    """From now on nothing of `daemon` is counted, until `let_count`."""
    for part, name in counters(daemon):
        assert callable(getattr(part, name)), f"there is no {name}"
        setattr(part, name, _nothing)


def let_count(daemon: Daemon) -> None:
    """End `silence`."""
    for part, name in counters(daemon):
        delattr(part, name)


def _nothing(*_: object, **__: object) -> None:
    """What a silent daemon calls instead."""


def _tame_collector() -> None:
    """As `terrace serve` does once it has started."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


class Watch:
    """The CPU time of all counting calls of a daemon, without that of reading the clock."""

    def __init__(self, daemon: Daemon) -> None:
        self.calls = 0
        self._all_s = 0.0
        nothing = self._timed(_nothing)
        for _ in range(EMPTY_CALLS):
            nothing()
        self._empty_s = self._all_s / EMPTY_CALLS
        self.calls, self._all_s = 0, 0.0
        for part, name in counters(daemon):
            setattr(part, name, self._timed(getattr(part, name)))

    @property
    def spent_s(self) -> float:
        return max(0.0, self._all_s - self.calls * self._empty_s)

    def _timed(self, call: Callable[..., object]) -> Callable[..., None]:
        def timed(*arguments: object, **named: object) -> None:
            started_s = time.thread_time()
            call(*arguments, **named)
            self._all_s += time.thread_time() - started_s
            self.calls += 1

        return timed


async def _counting(report: Report, client: Connection, *, quick: bool) -> None:
    streams, tokens, pairs = (16, 50, 2) if quick else (STREAMS, OUTPUT_TOKENS, PAIRS)
    found: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    async with free_daemon(_config(streams)) as (daemon, port):
        await stream(client, port, streams, tokens)
        _tame_collector()
        for number in range(pairs):
            for silent in (False, True) if number % 2 else (True, False):
                if silent:
                    silence(daemon)
                rate, _, cost_us = await stream(client, port, streams, tokens)
                found[not silent].append((rate, cost_us))
                if silent:
                    let_count(daemon)
    report.header("counting", "tokens/s", "loop us/token", "least")
    least = {}
    for counts, name in ((True, "yes"), (False, "no")):
        rates, costs = zip(*found[counts], strict=True)
        least[counts] = min(costs)
        report.row(name, f"{median(rates):,.0f}", f"{median(costs):.2f}", f"{least[counts]:.2f}")
    cost = least[True] / least[False] - 1
    ratios = [ours[1] / theirs[1] - 1 for ours, theirs in zip(found[True], found[False], strict=True)]
    low, middle, high = (quantile(ratios, q) for q in (0.25, 0.5, 0.75))
    report.keep(streams=streams, tokens=tokens, counting=found[True], silent=found[False])
    shown = (
        f"best of {pairs} rounds {cost:+.2%} of the loop's time; pair by pair {middle:+.2%}, half of them between "
        f"{low:+.2%} and {high:+.2%}"
    )
    report.goal(f"counting costs at most {GOAL_COST:.0%} at {streams} streams ({shown})", met=cost <= GOAL_COST)


async def _timing(report: Report, client: Connection, *, quick: bool) -> None:
    """What the counting calls take, each by itself: on a machine with company this tells what pairs cannot."""
    streams, tokens, rounds = (16, 50, 1) if quick else (STREAMS, OUTPUT_TOKENS, 3)
    async with free_daemon(_config(streams)) as (daemon, port):
        await stream(client, port, streams, tokens)
        _tame_collector()
        watch = Watch(daemon)
        costs_us = [(await stream(client, port, streams, tokens))[2] for _ in range(rounds)]
    all_s = sum(costs_us) / 1e6 * streams * tokens
    share, per_token = watch.spent_s / all_s, watch.calls / (rounds * streams * tokens)
    report.keep(streams=streams, tokens=tokens, rounds=rounds, calls=watch.calls, calls_s=watch.spent_s, loop_s=all_s)
    shown = f"{share:.2%}, {per_token:.3f} calls per token of {watch.spent_s / watch.calls * 1e6:.2f} us"
    report.goal(
        f"the calls that count take at most {GOAL_COST:.0%} of the loop's time ({shown})", met=share <= GOAL_COST
    )


async def _lag(report: Report, client: Connection, scraper: Connection, *, quick: bool) -> None:
    """How late timers fire while streams are served, with and without scrapes, in turns."""
    streams, tokens, rounds = (16, 400, 1) if quick else (STREAMS, OUTPUT_TOKENS, LAG_ROUNDS)
    found: dict[bool, list[float]] = {False: [], True: []}
    pauses: list[float] = []
    async with free_daemon(_config(streams)) as (daemon, port):
        _time_pages(daemon, pauses)
        await stream(client, port, streams, tokens)
        _tame_collector()
        for number in range(2 * rounds):
            scraped = bool(number % 2)
            scraper.send(port if scraped else 0)
            async with _ticking(found[scraped]):
                await stream(client, port, streams, tokens)
        scraper.send(0)
    report.header("scrapes", "lag p50 ms", "p99 ms", "max ms")
    for scraped, lags in found.items():
        shown = (f"{quantile(lags, q) * 1e3:.2f}" for q in (0.5, 0.99, 1.0))
        report.row(len(pauses) if scraped else "none", *shown)
    report.keep(lag_s=found[False], lag_scraped_s=found[True], page_s=pauses)
    more_s = quantile(found[True], 0.99) - quantile(found[False], 0.99)
    statement = f"scrapes delay timers by at most {GOAL_PAUSE_S * 1e3:.0f} ms under load (p99 {more_s * 1e3:+.2f} ms)"
    report.goal(statement, met=more_s <= GOAL_PAUSE_S)
    statement = f"{len(pauses)} scrapes held the loop for at most {GOAL_PAUSE_S * 1e3:.0f} ms each"
    report.goal(f"{statement} (longest {max(pauses) * 1e3:.2f} ms)", met=max(pauses) <= GOAL_PAUSE_S)


def _time_pages(daemon: Daemon, pauses: list[float]) -> None:
    """Note how long the loop is held by each scrape: CPU time, as others may have their turn in between."""
    page: Callable[[], Any] = daemon.metrics.page

    def timed() -> Any:
        started_s = time.thread_time()
        made = page()
        pauses.append(time.thread_time() - started_s)
        return made

    daemon.metrics.page = timed  # type: ignore[method-assign]


@asynccontextmanager
async def _ticking(lags: list[float]) -> AsyncIterator[None]:
    async def tick() -> None:
        while True:
            before_s = time.perf_counter()
            await asyncio.sleep(TICK_S)
            lags.append(time.perf_counter() - before_s - TICK_S)

    ticking = asyncio.create_task(tick())
    yield
    ticking.cancel()


def scrape(pipe: Connection, core: int) -> None:
    """Read the /metrics of the port that it is told, again and again until it is told 0; None ends it."""
    os.sched_setaffinity(0, {core})
    while (port := pipe.recv()) is not None:
        while port and not pipe.poll(SCRAPE_EVERY_S):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request("GET", "/metrics")
            assert connection.getresponse().read().startswith(b"# HELP"), "no metrics"
            connection.close()


async def _rendering(report: Report, *, quick: bool) -> None:
    """Pages of a daemon with three tiers that has done a little of everything."""
    with tempfile.TemporaryDirectory() as folder:
        kv = KvConfig(device_gib=0.0625, dram_gib=0.0625, ssd_gib=0.125, ssd_path=Path(folder), ssd_min_free_gib=0)
        daemon = build(Config(model=ModelConfig(model="demo", threads=1), kv=kv))
        async with serving((daemon,)):
            await first_token_s(daemon, daemon.tokenizer.encode(PROMPT * 8))
            await quiet(daemon)
            metrics = daemon.metrics
            found: list[list[float]] = []
            for _ in range(10 if quick else RENDERS):
                marks = [time.perf_counter()]
                page = metrics.page()
                marks.append(time.perf_counter())
                text = metrics.text(page)
                marks.append(time.perf_counter())
                metrics.vllm_text(page)
                marks.append(time.perf_counter())
                found.append([after - before for before, after in pairwise(marks)])
    columns = [sorted(column) for column in zip(*found, strict=True)]
    report.header("part", "p50 ms", "p99 ms", "where")
    for name, seconds, where in zip(("page", "text", "vllm text"), columns, ("loop", "thread", "thread"), strict=True):
        report.row(name, f"{median(seconds) * 1e3:.2f}", f"{quantile(seconds, 0.99) * 1e3:.2f}", where)
    report.row("lines", text.count(b"\n"), "", "")
    report.keep(page_s=columns[0], text_s=columns[1], vllm_text_s=columns[2], lines=text.count(b"\n"))
