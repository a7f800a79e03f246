"""Conversations that come back: time to the first token by turn, with tiers off, with DRAM, with SSD, after kill -9.

Real daemons, one after the other, over HTTP: twelve conversations take turns, so that a device tier which holds a third
of all their KV has forgotten each by the time it comes back. What one turn sends is everything that was said before,
the answer included, and something new. After the last turn the daemon with an SSD tier is killed with SIGKILL, started
again on the same directory, and asked for one more turn.
"""

from __future__ import annotations

import json
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from server.bench.model import Workload, make_model
from server.bench.report import Report
from server.demo.corpus import example

GOAL_WARM = 0.2
GOAL_RESTART = 1.1
READY_S = 120.0


@dataclass(frozen=True)
class Talk:
    """One model and its conversations. `token_bytes`: KV per token; tokens, about: `first` of the first turn (a
    document, a long instruction), `per_turn` of each that follows."""

    name: str
    conversations: int
    turns: int
    token_bytes: int
    first: int
    per_turn: int
    new_tokens: int
    block_tokens: int


DEMO = Talk("demo", 12, 6, 3 * 1024, 3200, 50, 8, 64)  # a block of less than 128 KiB costs more than its bytes
RANDOM = Talk("125M", 12, 6, 24 * 1024, 1400, 32, 8, 16)
SHAPE = Workload(layers=12, hidden=768, vocab=32_000, prompt=0, output=0, concurrency=(1,), repeats=0)
QUICK_TALK = Talk("demo", 4, 3, 3 * 1024, 200, 50, 4, 16)


def run(*, quick: bool) -> Report:
    """Both models; see the module's docstring."""
    report = Report("turns", quick=quick)
    with tempfile.TemporaryDirectory() as folder:
        if not quick:
            make_model(SHAPE, Path(folder))
        for talk in (QUICK_TALK,) if quick else (DEMO, RANDOM):
            _compare(report, talk, "demo" if talk.name == "demo" else folder)
    return report


def _compare(report: Report, talk: Talk, model: str) -> None:
    report.header("model", "tiers", *(f"turn {turn + 1} ms" for turn in range(talk.turns + 2)), "cached")
    longest = talk.first + (talk.turns + 1) * (talk.per_turn + talk.new_tokens)
    working_set = talk.conversations * longest * talk.token_bytes
    device = [f"--device-gib={working_set / 3 / 2**30:.4f}", f"--block-size={talk.block_tokens}"]
    dram = ["--dram-gib=0.25" if working_set < 2**27 else "--dram-gib=1"]
    with tempfile.TemporaryDirectory() as disk:
        ssd = [*device, "--dram-gib=0.03" if working_set < 2**27 else "--dram-gib=0.12"]
        ssd += ["--ssd-gib=2", f"--ssd-path={disk}", "--ssd-min-free-gib=0"]
        modes = {"off": device, "dram": device + dram, "dram+ssd": ssd}
        first_s: dict[str, list[list[float]]] = {}
        for mode, flags in modes.items():
            first_s[mode] = _play(report, talk, model, mode, flags)
    warm_s = {mode: median(chain.from_iterable(turns[1 : talk.turns])) for mode, turns in first_s.items()}
    for mode in ("dram", "dram+ssd"):
        ratio = warm_s[mode] / warm_s["off"]
        statement = f"{talk.name}, {mode}: TTFT of turns after the first {1 - ratio:.0%} lower than with tiers off"
        report.goal(f"{statement} (goal {1 - GOAL_WARM:.0%})", met=ratio <= GOAL_WARM)
    again = median(first_s["dram+ssd"][-1]) / median(first_s["dram+ssd"][-2])  # prompts grow: the nearest in length
    statement = f"{talk.name}: TTFT after kill -9 {again:.2f} x that of the turn before (goal {GOAL_RESTART})"
    report.goal(statement, met=again <= GOAL_RESTART)


def _play(report: Report, talk: Talk, model: str, mode: str, flags: list[str]) -> list[list[float]]:
    """All turns of all conversations; the last is after a kill where there is an SSD tier. Seconds by turn."""
    texts = [f"Conversation {number}." for number in range(talk.conversations)]
    first_s: list[list[float]] = []
    cached = 0
    with serving(model, flags) as (http, _):
        for turn in range(talk.turns + 1):
            first_s.append([])
            for number in range(talk.conversations):
                cached += _turn(http, talk, texts, number, turn, first_s)
        if mode == "dram+ssd":
            time.sleep(1.0)  # what is written in the background is written; a kill at any moment is the tests' business
    if mode == "dram+ssd":
        with serving(model, flags) as (http, _):
            first_s.append([])
            for number in range(talk.conversations):
                cached += _turn(http, talk, texts, number, talk.turns + 1, first_s)
    shown = [f"{median(turn) * 1e3:.0f}" for turn in first_s] + ["-"] * (talk.turns + 2 - len(first_s))
    report.row(talk.name, mode, *shown, cached)
    report.keep(model=talk.name, tiers=mode, first_s=first_s, cached_tokens=cached)
    return first_s


def _turn(http: httpx.Client, talk: Talk, texts: list[str], number: int, turn: int, first_s: list[list[float]]) -> int:
    """One turn of one conversation; the tokens of its prompt that came from the cache."""
    texts[number] += " " + _words(talk, number, turn)
    body = {
        "prompt": texts[number], "max_tokens": talk.new_tokens, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    started = time.perf_counter()
    first, answer = 0.0, ""
    usage: dict[str, Any] = {}
    with http.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if event["choices"]:
                first = first or time.perf_counter() - started
                answer += event["choices"][0]["text"]
            usage = event.get("usage") or usage
    first_s[turn].append(first)
    texts[number] += answer
    return int(usage["prompt_tokens_details"]["cached_tokens"])


def _words(talk: Talk, number: int, turn: int) -> str:
    """What the user says, different in every conversation and turn."""
    seed, tokens = number * 1000 + turn, talk.per_turn if turn else talk.first
    if talk.name == "demo":
        return example(seed=seed, target_tokens=tokens, kind="completion").prompt
    return " ".join(f"w{random.Random(f'{seed} {i}').randrange(SHAPE.vocab)}" for i in range(tokens))


@contextmanager
def serving(model: str, flags: list[str]) -> Iterator[tuple[httpx.Client, int]]:
    """A daemon on a free port, a connection to it and its process id; at the end it is killed, as the kernel would."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "server", "serve", model, f"--port={port}", "--log-level=warning", *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300) as http:
            _await_ready(http, process)
            yield http, process.pid
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def _await_ready(http: httpx.Client, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + READY_S
    while True:
        assert process.poll() is None, f"the daemon ended with {process.returncode}"
        assert time.monotonic() < deadline, "the daemon does not get ready"
        try:
            if http.get("/readyz").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
