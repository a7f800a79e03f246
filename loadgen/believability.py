"""Does `terrace simulate` foretell what the daemon does? Five loads on real daemons, and the same on virtual time.

    python -m loadgen.believability [NAME ...]

The machine is measured from outside, over HTTP: prompts and answers of several lengths alone, and the links from what
the daemon says of its hops. That makes a profile. Each load runs on a daemon with three tiers that records what it is
asked; the recording is replayed with the profile measured just before and just after it, for a shared machine's pace
drifts; and what clients saw is held against it: the mean time to the first token and the share of prompt tokens from
the cache.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
from rich.console import Console

from loadgen import bench, report
from loadgen.agreement import larger_model
from loadgen.bench import Settings
from loadgen.daemon import Served
from loadgen.errors import UsageError

Array = npt.NDArray[np.float64]
RESULT = Path(__file__).parent / "results" / "believability.json"
GOAL = 0.15
STEP_TOKENS = 512
BLOCK_TOKENS = 16
DEVICE_GIB, DRAM_GIB, SSD_GIB = 0.08, 0.2, 1.0
"""Some 10,000 and 26,000 tokens of the larger model, and more than any load here has."""
FLAGS = ("--load-format=dummy", "--threads=1", f"--block-size={BLOCK_TOKENS}", f"--device-gib={DEVICE_GIB}",
         f"--max-num-batched-tokens={STEP_TOKENS}", f"--prefill-chunk-tokens={STEP_TOKENS}")  # fmt: skip
LOWER = (f"--dram-gib={DRAM_GIB}", f"--ssd-gib={SSD_GIB}", "--ssd-min-free-gib=0")
LENGTHS = (16, 300, 700, 1500, 2500)
REPEATS = 6


@dataclass(frozen=True)
class Load:
    """One load, in sessions per second."""

    name: str
    workload: str
    sessions: int
    rate: float
    parameters: dict[str, object]

    def settings(self, url: str) -> Settings:
        return Settings(base_url=url, workload=self.workload, sessions=self.sessions, request_rate=self.rate, warmup=0,
                        parameters={key: str(value) for key, value in self.parameters.items()})  # fmt: skip


LOADS = (
    Load("prompts of their own", "random", 30, 0.4, {"input": "200-1200", "output": "4-16"}),
    Load("one system prompt", "shared-prefix", 50, 0.7, {"prefix": 1500, "question": "40-200", "output": 8}),
    Load("conversations", "multi-turn", 10, 0.15,
         {"turns": 5, "first": 1000, "question": "50-100", "output": 8, "think_s": 4}),
    Load("documents", "long-documents", 24, 0.3, {"documents": 8, "document": 2000, "question": 40, "output": 8}),
    Load("back after a while", "idle-resume", 10, 0.2, {"history": 1800, "question": 60, "output": 8, "idle_s": 25}),
)  # fmt: skip
"""At less than half of what the daemon can do: near all of it a tenth of an error in a step is a doubled queue."""


# --- measuring the machine -------------------------------------------------------------------------------------------


@dataclass
class Alone:
    """What requests alone took: (tokens, seconds) of prompts to their first token, and of contexts per token."""

    prompts: list[tuple[float, float]] = field(default_factory=list)
    contexts: list[tuple[float, float]] = field(default_factory=list)

    def __add__(self, other: Alone) -> Alone:
        return Alone(self.prompts + other.prompts, self.contexts + other.contexts)


def alone(folder: str, seeds: Iterator[int]) -> Alone:
    """Requests of several lengths, one at a time, on a daemon of their own."""
    found = Alone()
    with tempfile.TemporaryDirectory() as disk, Served([folder, *FLAGS, *LOWER, f"--ssd-path={disk}"]) as served:

        def ask(input: int, output: int) -> tuple[float, dict[str, Any]]:
            # No prompt twice: nothing is found, and what is computed goes down to the tiers as it does under load.
            settings = Settings(base_url=served.url, workload="random", sessions=REPEATS, max_concurrency=1,
                                parameters={"input": str(input), "output": str(output)}, warmup=1,
                                seed=next(seeds))  # fmt: skip
            document = bench.run_sync(settings).document
            return document["terrace"]["cache"]["prompt_tokens"] / REPEATS, document

        for length in (LENGTHS[0], LENGTHS[-2]):
            tokens, document = ask(length, 24)
            found.contexts.append((tokens, document["median_tpot_ms"] / 1e3))
        for length in LENGTHS:
            tokens, document = ask(length, 1)
            found.prompts.append((tokens, document["mean_ttft_ms"] / 1e3))
    return found


def step_costs(alone: Alone) -> dict[str, float]:
    """From times to the first token of prompts alone, and times per token of answers alone.

    TPOT(n) = base + context * n, and TTFT(n) = request + steps * base + token * n + pair * n^2 / 2.
    """
    contexts, paces = np.asarray(alone.contexts).T
    context_s, base_s = np.polyfit(contexts, paces, 1).clip(min=0.0)
    n, took = np.asarray(alone.prompts).T
    beyond = took - np.ceil(n / STEP_TOKENS) * base_s
    request_s, token_s, pair_s = not_negative(np.stack([np.ones_like(n), n, n * n / 2], axis=1), beyond, took)
    return {"base_s": float(base_s), "weights_s": 0.0, "token_s": token_s, "pair_s": pair_s,
            "context_s": float(context_s), "request_s": request_s}  # fmt: skip


def not_negative(terms: Array, values: Array, scale: Array) -> list[float]:
    """Least squares of the errors over `scale`, by leaving out what would be below zero, the worst first."""
    used = list(range(terms.shape[1]))
    while used:
        found = np.linalg.lstsq(terms[:, used] / scale[:, None], values / scale, rcond=None)[0]
        if found.min() >= 0:
            given = dict(zip(used, found.tolist(), strict=True))
            return [given.get(place, 0.0) for place in range(terms.shape[1])]
        del used[int(found.argmin())]
    return [0.0] * terms.shape[1]


def links(folder: str) -> dict[str, Any]:
    """Bytes of KV per token, and bytes per second of every hop, as the daemon measures them while documents go down
    and come up again."""
    load = Load("links", "long-documents", 48, 1.0, {"documents": 12, "document": 2000, "question": 20, "output": 4})
    with tempfile.TemporaryDirectory() as disk:
        flags = [*FLAGS, "--dram-gib=0.1", *LOWER[1:], f"--ssd-path={disk}"]
        with Served([folder, *flags]) as served:
            bench.run_sync(load.settings(served.url))
            with httpx.Client(base_url=served.url) as http:
                stats = http.get("/v1/cache/stats").json()
    hops = {(hop["source"], hop["target"]): hop["bytes_per_s"] for hop in stats["hops"]}
    ways = {"dram": ("dram", "device"), "ssd_read": ("ssd", "dram"), "ssd_write": ("dram", "ssd")}
    rates = {name: {"bytes_per_s": hops[way] or 1e9, "latency_s": 1e-3} for name, way in ways.items()}
    return {"kv_bytes_per_token": stats["block_bytes"] // BLOCK_TOKENS, **rates}


# --- measured and foretold -------------------------------------------------------------------------------------------


def measured(load: Load, folder: str, trace: Path) -> dict[str, float]:
    """What clients of a daemon with three tiers see; what it was asked is in `trace` then."""
    with (
        tempfile.TemporaryDirectory() as disk,
        Served([folder, *FLAGS, *LOWER, f"--ssd-path={disk}", f"--record-path={trace}"]) as served,
    ):
        result = bench.run_sync(load.settings(served.url))
        if not result.valid:
            raise UsageError(f"{load.name}: {result.document['terrace']['client']['invalid_because']}")
        with httpx.Client(base_url=served.url) as http:  # a recording is written as requests end
            assert http.get("/v1/cache/stats").status_code == 200
    document = result.document
    keep_last(trace, document["completed"])
    return {"ttft_ms": document["mean_ttft_ms"], "hit": document["terrace"]["cache"]["hit_ratio"]}


def keep_last(trace: Path, requests: int) -> None:
    """Drops from a recording what came before the load: small prompts by which the load generator learns how many
    characters a token has."""
    lines = sorted(trace.read_text(encoding="utf-8").splitlines(), key=lambda line: json.loads(line)["timestamp"])
    trace.write_text("".join(f"{line}\n" for line in lines[-requests:]), encoding="utf-8")


def foretold(trace: Path, machine: Path) -> dict[str, float]:
    """What the simulator says of the same requests on the same machine."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = [f"--device={DEVICE_GIB}", f"--dram={DRAM_GIB}", f"--ssd={SSD_GIB}", f"--step-tokens={STEP_TOKENS}"]
        command = [sys.executable, "-m", "server", "simulate", str(trace), f"--profile={machine}", *sizes,
                   f"--output={folder}"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UsageError(f"terrace simulate ended with {done.returncode}: {done.stderr[-500:]}")
        row = json.loads((Path(folder) / "simulation.json").read_text(encoding="utf-8"))["rows"][0]
    return {"ttft_ms": row["mean_ttft_ms"], "hit": row["hit"], "busy": row["device_busy"]}


HEADER = ("| load | TTFT mean, measured | foretold | | tokens from the cache, measured | foretold | | device busy |",
          "|---|---|---|---|---|---|---|---|")  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """One row of the documentation's table."""
    real, said = row["measured"], row["foretold"]
    cells = [row["load"], f"{real['ttft_ms']:.0f} ms", f"{said['ttft_ms']:.0f} ms", f"{row['ttft_apart']:+.1%}",
             f"{real['hit']:.1%}", f"{said['hit']:.1%}", f"{row['hit_apart']:+.1%}",
             f"{said['busy']:.0%}"]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def apart(real: float, said: float) -> float:
    """How much more was foretold than measured, as a share of what was measured."""
    return said / real - 1 if real else said


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and keep; 1 when a figure is further apart than the goal."""
    parser = argparse.ArgumentParser(prog="python -m loadgen.believability", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(load.name for load in LOADS))
    args = parser.parse_args(argv)
    console = Console()
    rows: list[dict[str, Any]] = []
    seeds = count()
    with larger_model() as folder, tempfile.TemporaryDirectory() as work:
        ways = links(folder)
        before = alone(folder, seeds)
        for load in [load for load in LOADS if not args.names or load.name in args.names]:
            trace, machine = Path(work) / f"{load.workload}.jsonl", Path(work) / f"{load.workload}.json"
            real = measured(load, folder, trace)
            after = alone(folder, seeds)
            found = {"name": "measured", **ways, **step_costs(before + after)}
            machine.write_text(json.dumps(found), encoding="utf-8")
            said = foretold(trace, machine)
            rows.append({"load": load.name, "measured": real, "foretold": said, "profile": found,
                         "ttft_apart": apart(real["ttft_ms"], said["ttft_ms"]),
                         "hit_apart": apart(real["hit"], said["hit"])})  # fmt: skip
            console.print(line(rows[-1]), highlight=False, soft_wrap=True)
            before = after
    if not args.names:
        document = {"environment": report.environment(), "goal": GOAL, "loads": rows}
        RESULT.write_text(json.dumps(document) + "\n", encoding="utf-8")
    return int(any(max(abs(row["ttft_apart"]), abs(row["hit_apart"])) > GOAL for row in rows))


if __name__ == "__main__":
    sys.exit(main())
