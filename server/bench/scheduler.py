"""Host time of one step: production Scheduler and KVManager with a runner that computes nothing.

What the loop thread spends in `plan` and `commit` is time in which no request is served and no byte is sent, and on a
GPU it adds to every token. The claim: at most 1 ms at 256 running requests, growing with the new tokens of the step and
not with the contexts. So every size is measured with short contexts and with 128k tokens each.

Goals are judged by the median of the thread's own CPU time: the wall-clock quantiles beside it also hold what other
processes took from this one, which on a busy machine is most of the p99.
"""

from __future__ import annotations

import gc
import time
from array import array
from dataclasses import dataclass

from server.bench.report import Report, quantile
from server.kvcache.manager import KVManager, TierSpec
from server.process import GC_THRESHOLDS
from server.scheduler.limits import Limits
from server.scheduler.policy import make_policy
from server.scheduler.request import request_from
from server.scheduler.scheduler import ADMIT_RESERVE_RATIO, Scheduler
from server.types import DEVICE, BlockLayout, SamplingParams, StepPlan, StepResult

GOAL_RUNNING = 256
GOAL_S = 0.001
SHORT_TOKENS = 128
LONG_TOKENS = 128 * 1024
BLOCK_TOKENS = 16
DISTINCT_CONTEXTS = 256
"""Beyond that many requests, several share a context (as `n` choices of one prompt do): it has to fit in memory."""
GROWTH_RATIO = 2.0
"""Long contexts may cost this much more per step than short ones: caches miss more, but nothing walks a context."""


@dataclass(frozen=True)
class StepTimes:
    """Seconds per step, sample by sample."""

    plan_s: list[float]
    commit_s: list[float]
    cpu_s: list[float]

    @property
    def total_s(self) -> list[float]:
        return [plan + commit for plan, commit in zip(self.plan_s, self.commit_s, strict=True)]


def run(*, quick: bool) -> Report:
    """Measure decode steps at each number of running requests, and prefill steps; see the module's docstring."""
    report = Report("scheduler", quick=quick)
    columns = [f"{part} {q} us" for part in PARTS for q in ("p50", "p99")]
    report.header("running", "context", "step kind", "tokens", "CPU p50 us", *columns)
    steps = 50 if quick else 400
    medians: dict[tuple[int, int], float] = {}
    for context in (SHORT_TOKENS, 4096 if quick else LONG_TOKENS):
        for running in (16, 64, 256, 1024):
            times = measure_decode(running, context, steps)
            medians[running, context] = quantile(times.cpu_s, 0.5)
            _record(report, "decode", running, context, running, times)
    for running in (1, 16):
        _record(report, "prefill", running, 8192, 2048, measure_prefill(running, 8192, 2048))
    for (running, context), median in medians.items():
        if running == GOAL_RUNNING:
            text = f"CPU time of plan+commit at {running} running x {context} tokens: {median * 1e3:.2f} ms, goal 1 ms"
            report.goal(text, met=median <= GOAL_S)
    _judge_growth(report, medians)
    return report


PARTS = ("step", "plan", "commit")


def _record(report: Report, kind: str, running: int, context: int, tokens: int, times: StepTimes) -> None:
    parts = dict(zip(PARTS, (times.total_s, times.plan_s, times.commit_s), strict=True))
    shown = [f"{quantile(samples, q) * 1e6:.0f}" for samples in parts.values() for q in (0.5, 0.99)]
    report.row(running, context, kind, tokens, f"{quantile(times.cpu_s, 0.5) * 1e6:.0f}", *shown)
    raw = {"plan_s": times.plan_s, "commit_s": times.commit_s, "cpu_s": times.cpu_s}
    report.keep(kind=kind, running=running, context_tokens=context, **raw)


def _judge_growth(report: Report, medians: dict[tuple[int, int], float]) -> None:
    short, long = sorted({context for _, context in medians})
    ratio = medians[GOAL_RUNNING, long] / medians[GOAL_RUNNING, short]
    text = (
        f"{long // short} x the context costs {ratio:.2f} x the time per step at {GOAL_RUNNING}, goal {GROWTH_RATIO} x"
    )
    report.goal(text, met=ratio <= GROWTH_RATIO)


def measure_decode(running: int, context: int, steps: int) -> StepTimes:
    """Time `steps` steps in which `running` requests decode one token each, after `context` tokens (at least)."""
    scheduler = make_scheduler(blocks=(running + 1) * ((context + steps) // BLOCK_TOKENS + 8), step_tokens=1 << 20)
    params = SamplingParams(max_tokens=2 * steps + 1024)
    root = scheduler.kv.root("")
    for number in range(running):
        seed = number % DISTINCT_CONTEXTS
        # Lengths differ, so that the requests do not all seal a block in the same step.
        prompt = array("i", range(seed * 1_000_003, seed * 1_000_003 + context + seed % BLOCK_TOKENS))
        scheduler.submit(request_from(number, prompt, params, root, now=0.0))
    now = 0.0
    while scheduler.waiting or any(request.lacking > 1 for request in scheduler.running):
        now += 1.0
        step(scheduler, now)
    assert len(scheduler.running) == running, "every request decodes"
    return _timed(scheduler, steps, now)


def measure_prefill(running: int, context: int, step_tokens: int) -> StepTimes:
    """Time the steps in which `running` prompts of `context` tokens are computed, `step_tokens` tokens per step."""
    scheduler = make_scheduler(blocks=(running + 1) * (context // BLOCK_TOKENS + 8), step_tokens=step_tokens)
    root = scheduler.kv.root("")
    for number in range(running):
        prompt = array("i", range(number * 1_000_003, number * 1_000_003 + context))
        params = SamplingParams(max_tokens=1024)
        scheduler.submit(request_from(number, prompt, params, root, now=0.0))
    step(scheduler, 1.0)  # the first one admits
    return _timed(scheduler, running * context // step_tokens - 2, 1.0)


def make_scheduler(blocks: int, step_tokens: int) -> Scheduler:
    """A scheduler over a device tier with room for `blocks` blocks of 16 tokens, without bytes behind them."""
    layout = BlockLayout(layers=1, kv_heads=1, head_dim=1, dtype_bytes=2, block_tokens=BLOCK_TOKENS)
    limits = Limits(
        max_running=min(1024, step_tokens),
        max_step_tokens=step_tokens,
        max_chunk_tokens=step_tokens,
        max_queued_requests=4096,
        max_queued_tokens=1 << 40,
        max_model_len=1 << 30,
    )
    frames = int(blocks * (1 + 2 * ADMIT_RESERVE_RATIO))  # nobody waits for memory here
    return Scheduler(KVManager(layout, [TierSpec(DEVICE, frames)], b"bench"), make_policy("fcfs"), limits)


def null_result(plan: StepPlan) -> StepResult:
    """What a runner would report that computes nothing and samples token 7."""
    none = [None] * len(plan.rows)
    tokens = [7 if row.sample is not None else None for row in plan.rows]
    return StepResult(plan.id, tokens, none, none, 0.0, 0.0)


def step(scheduler: Scheduler, now: float) -> tuple[float, float, float]:
    """One step; the seconds that plan and commit took, and the CPU time of both."""
    started, started_cpu = time.perf_counter(), time.thread_time()
    plan = scheduler.plan(now)
    planned, planned_cpu = time.perf_counter(), time.thread_time()
    assert plan is not None, "there is work in every step of a benchmark"
    result = null_result(plan)
    ran, ran_cpu = time.perf_counter(), time.thread_time()
    scheduler.commit(plan, result, now)
    cpu = planned_cpu - started_cpu + time.thread_time() - ran_cpu
    return planned - started, time.perf_counter() - ran, cpu


def _timed(scheduler: Scheduler, steps: int, now: float) -> StepTimes:
    # The collector as the daemon sets it once it is up: what exists now is not garbage, what comes later may be.
    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    try:
        samples = [step(scheduler, now + number) for number in range(steps)]
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
    plan_s, commit_s, cpu_s = (list(column) for column in zip(*samples, strict=True))
    return StepTimes(plan_s, commit_s, cpu_s)
