"""What one tenant feels of another: nothing in its times of what the other has cached, next to nothing of its flood.

One daemon on the demo model with a tenants file, over HTTP, in two parts.

The spy. The victim sends a prompt, then the spy sends that prompt, or one like it that nobody ever sent, and the time
to its first token is all that it has to tell which it was. How well it can is the area under the ROC curve (the chance
that of two requests the one of a cached prompt was faster), and the accuracy, on the second half of the requests, of
the threshold that was best on the first half. The same spy on its own cache shows that it would see a hit.

The flood. A calm tenant sends prompts one after the other, while another one with a limit of requests is quiet, or
stays within its limit, or sends ten times as much and is refused the rest. The three take turns every few seconds.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from math import sqrt
from pathlib import Path

import httpx

from server.bench.report import Report, quantile
from server.bench.turns import serving
from server.demo.corpus import example
from server.tenants import add_key

TRIALS = 240
SPY_TOKENS, CALM_TOKENS = 500, 1500
SURE = 0.99
"""Of the intervals: one run in a hundred misses the goal by chance."""
Z = 2.576
RESAMPLES = 2000
GOAL_OWN_AUC = 0.9
FLOOD_PER_MINUTE = 60
OVER = 10
"""Times its limit that the flood sends."""
SLOT_S = 4.0
ROUNDS = 14
GOAL_RATIO = 1.1
FLAGS = ["--device-gib=0.5", "--max-model-len=2K"]


def run(*, quick: bool) -> Report:
    """Both parts, about two and a half minutes; see the module's docstring."""
    report = Report("isolation", quick=quick)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tenants.toml"
        keys = {name: add_key(file, name, {}) for name in ("victim", "spy", "calm")}
        keys["flood"] = add_key(file, "flood", {"requests_per_minute": FLOOD_PER_MINUTE})
        with serving("demo", [*FLAGS, f"--tenants-file={file}"]) as (http, _):
            _spy(report, http, keys, 12 if quick else TRIALS)
            url = str(http.base_url)
            asyncio.run(_flood(report, url, keys, 1 if quick else ROUNDS, 1.0 if quick else SLOT_S))
    return report


# --- the spy ---------------------------------------------------------------------------------------------------------


def _spy(report: Report, http: httpx.Client, keys: dict[str, str], trials: int) -> None:
    report.header("whose cache", "trials", "hit p50 ms", "miss p50 ms", "AUC", "99 % interval", "accuracy", "interval")
    rng, numbers = random.Random(1), itertools.count()
    for whose, sender in (("another's", "victim"), ("its own", "spy")):
        times: list[tuple[bool, float]] = []
        for hit in rng.sample([True, False] * (trials // 2), trials):
            sent, like_it = (_prompt(next(numbers), SPY_TOKENS) for _ in range(2))
            _first_token_s(http, keys[sender], sent)
            times.append((hit, _first_token_s(http, keys["spy"], sent if hit else like_it)))
        area, low, high = auc(times)
        right, least, most = accuracy(times)
        medians = [f"{quantile([s for was, s in times if was == hit], 0.5) * 1e3:.1f}" for hit in (True, False)]
        shown = f"{area:.3f}", f"{low:.3f}-{high:.3f}", f"{right:.3f}", f"{least:.3f}-{most:.3f}"
        report.row(whose, len(times), *medians, *shown)
        report.keep(cache=whose, times=times, auc=area, auc_low=low, auc_high=high, accuracy=right)
        if sender == "victim":
            said = f"AUC of the spy on another's cache {area:.3f}, 99 % interval {low:.3f} to {high:.3f}, holds 0.5"
            report.goal(said, met=low <= 0.5 <= high)
            said = f"accuracy of its best threshold {right:.3f}, 99 % interval {least:.3f} to {most:.3f}, holds 0.5"
            report.goal(said, met=least <= 0.5 <= most)
        else:
            said = f"on its own cache it sees the hits: AUC {area:.3f} (goal {GOAL_OWN_AUC})"
            report.goal(said, met=area >= GOAL_OWN_AUC)


def _prompt(number: int, tokens: int) -> str:
    return f"{number}. " + example(seed=number, target_tokens=tokens, kind="completion").prompt


def _first_token_s(http: httpx.Client, key: str, prompt: str) -> float:
    body = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "stream": True}
    started = time.perf_counter()
    with http.stream("POST", "/v1/completions", json=body, headers=_bearer(key)) as response:
        response.raise_for_status()
        first_s = 0.0
        for line in response.iter_lines():
            if line.startswith("data: {"):
                first_s = first_s or time.perf_counter() - started
    return first_s


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def auc(times: Sequence[tuple[bool, float]]) -> tuple[float, float, float]:
    """The chance that a hit was faster than a miss, and its interval, from resampling both."""
    hits, misses = ([s for was, s in times if was == hit] for hit in (True, False))
    rng = random.Random(2)
    areas = sorted(_area(rng.choices(hits, k=len(hits)), rng.choices(misses, k=len(misses))) for _ in range(RESAMPLES))
    tail = int((1 - SURE) / 2 * RESAMPLES)
    return _area(hits, misses), areas[tail], areas[-1 - tail]


def _area(hits: Sequence[float], misses: Sequence[float]) -> float:
    """Mann and Whitney's statistic by ranks, ties in the middle."""
    ranked = sorted([(s, True) for s in hits] + [(s, False) for s in misses])
    below, area = 0, 0.0
    for _, group in itertools.groupby(ranked, key=lambda pair: pair[0]):
        kinds = [hit for _, hit in group]
        fast = sum(kinds)
        area += (len(kinds) - fast) * (below + fast / 2)
        below += fast
    return area / (len(hits) * len(misses))


def accuracy(times: Sequence[tuple[bool, float]]) -> tuple[float, float, float]:
    """Of the threshold that was best on the first half: how often it is right on the second, and Wilson's interval."""
    first, second = times[: len(times) // 2], times[len(times) // 2 :]
    threshold = max((s for _, s in first), key=lambda s: sum((other <= s) == hit for hit, other in first))
    count = len(second)
    right = sum((s <= threshold) == hit for hit, s in second) / count
    middle, half = right + Z**2 / (2 * count), Z * sqrt(right * (1 - right) / count + Z**2 / (4 * count**2))
    return right, (middle - half) / (1 + Z**2 / count), (middle + half) / (1 + Z**2 / count)


# --- the flood -------------------------------------------------------------------------------------------------------


async def _flood(report: Report, url: str, keys: dict[str, str], rounds: int, slot_s: float) -> None:
    """Slots in changing order, so that what else the machine does concerns all alike."""
    arms = {"quiet": 0, "within its limit": 1, f"{OVER} x its limit": OVER}
    times: dict[str, list[float]] = {name: [] for name in arms}
    answers: dict[str, list[int]] = {name: [] for name in arms}
    loud = await Loud.connected(url, keys["flood"])
    async with httpx.AsyncClient(base_url=url, timeout=60) as calm:
        prompts = (_prompt(number, CALM_TOKENS) for number in itertools.count())
        for turn in range(rounds):
            order = list(arms)[turn % 3 :] + list(arms)[: turn % 3]
            for name in order:
                saved_up: list[int] = []
                while 429 not in saved_up:  # while it was the others' turn
                    saved_up.append(await loud.ask())
                flooding = asyncio.create_task(_send(loud, arms[name], answers[name]))
                await _calm(calm, keys["calm"], prompts, time.perf_counter() + slot_s, times[name])
                flooding.cancel()
                with suppress(asyncio.CancelledError):
                    await flooding
    report.header("the other is", "requests", "p50 ms", "p99 ms", "flood served", "flood refused")
    for name in arms:
        p50, p99 = (f"{quantile(times[name], q) * 1e3:.1f}" for q in (0.5, 0.99))
        served, refused = (answers[name].count(code) for code in (200, 429))
        report.row(name, len(times[name]), p50, p99, served, refused)
        report.keep(other=name, first_s=times[name], served=served, refused=refused)
    loud_name = f"{OVER} x its limit"
    ratio, low, high = slower(times["quiet"], times[loud_name])
    report.keep(ratio=ratio, ratio_low=low, ratio_high=high)
    text = f"p99 TTFT beside a flood of {OVER} x its limit {ratio:.3f} x that beside nobody"
    report.goal(f"{text}, 99 % interval {low:.2f} to {high:.2f} (goal {GOAL_RATIO})", met=ratio <= GOAL_RATIO)
    report.goal("of the flood some was served and most refused", met=_mostly_refused(answers[loud_name]))


def slower(before: Sequence[float], after: Sequence[float]) -> tuple[float, float, float]:
    """By what factor the p99 of `after` is that of `before`, and its interval, from resampling both."""
    rng = random.Random(3)

    def again(times: Sequence[float]) -> float:
        return quantile(rng.choices(times, k=len(times)), 0.99)

    ratios = sorted(again(after) / again(before) for _ in range(RESAMPLES))
    tail = int((1 - SURE) / 2 * RESAMPLES)
    return quantile(after, 0.99) / quantile(before, 0.99), ratios[tail], ratios[-1 - tail]


def _mostly_refused(codes: Sequence[int]) -> bool:
    return set(codes) <= {200, 429} and codes.count(429) > codes.count(200)


async def _calm(http: httpx.AsyncClient, key: str, prompts: Iterator[str], until: float, times: list[float]) -> None:
    while time.perf_counter() < until:
        body = {"prompt": next(prompts), "max_tokens": 1, "temperature": 0, "stream": True}
        started = time.perf_counter()
        async with http.stream("POST", "/v1/completions", json=body, headers=_bearer(key)) as response:
            response.raise_for_status()
            first_s = 0.0
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    first_s = first_s or time.perf_counter() - started
        times.append(first_s)


async def _send(loud: Loud, times_limit: int, answers: list[int]) -> None:
    """Short requests at so many times the limit, whatever becomes of them; none at 0."""
    while times_limit:
        await asyncio.sleep(60 / (FLOOD_PER_MINUTE * times_limit))
        answers.append(await asyncio.shield(loud.ask()))  # not cut off in the middle of an answer


class Loud:
    """One connection of the flood, on a bare socket: it shares the processor with the server that is measured."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: str) -> None:
        body = b'{"prompt": "flood", "max_tokens": 1}'
        head = ["POST /v1/completions HTTP/1.1", "Host: loud", "Content-Type: application/json"]
        head += [f"Authorization: Bearer {key}", f"Content-Length: {len(body)}", "", ""]
        self._request = "\r\n".join(head).encode() + body
        self._reader, self._writer = reader, writer
        self._turn = asyncio.Lock()

    @classmethod
    async def connected(cls, url: str, key: str) -> Loud:
        parts = httpx.URL(url)
        return cls(*await asyncio.open_connection(parts.host, parts.port), key)

    async def ask(self) -> int:
        """The status of the answer to one short request."""
        async with self._turn:
            self._writer.write(self._request)
            head = await self._reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"(?i)content-length: (\d+)", head)
            assert length is not None, "an answer of this server says how long it is"
            await self._reader.readexactly(int(length[1]))
            return int(head.split(b" ", 2)[1])
