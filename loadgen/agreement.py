"""Do other load generators see what this one sees? The same load on the same server, in turns, figure by figure.

    python -m loadgen.agreement --vllm vllm --guidellm guidellm

Each flag names a command that is installed somewhere, with its own environment. Three loads: a closed loop and a
constant rate on a scripted server (log-normal latencies, the same for everybody), and a closed loop on the daemon.

The peers' own formulas: vLLM's TPOT is ours, its TTFT counts from the sending, and at a constant rate its clock starts
one gap before the first request. guidellm calls our TPOT `inter_token_latency`; its `time_per_output_token` divides the
whole latency by all tokens, and is not compared.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from loadgen import bench, report
from loadgen.bench import Settings
from loadgen.daemon import Served
from loadgen.errors import UsageError
from loadgen.prompts import TextPrompter
from loadgen.selftest import scripted_server

RESULT = Path(__file__).parent / "results" / "agreement.json"
TOKENIZER = Path(__file__).parent.parent / "server" / "demo" / "model"
"""The peers make their prompts with one."""
DEMO_TOKENS_PER_WORD = 3.1
"""Roughly, of the demo model's tokenizer."""
GOAL = 0.03
Figures = dict[str, float]
"""Means over a run: `ttft` and `tpot` in ms, `requests` and `tokens` (of output) per second."""


@dataclass(frozen=True)
class Setup:
    """One load on one server."""

    name: str
    scripted: dict[str, float] | None
    """Latencies of the scripted server; None: the daemon with the demo model."""
    requests: int
    input: int
    output: int
    concurrency: int | None = None
    rate: float | None = None
    rounds: int = 2
    peers: tuple[str, ...] = ("vllm", "guidellm")


SCRIPT = {"ttft": 0.15, "itl": 0.015, "sigma": 0.3}
SETUPS = (
    Setup("scripted server, closed loop of 8", SCRIPT, 100, 128, 64, concurrency=8),
    Setup("scripted server, 8 requests/s", SCRIPT, 100, 128, 64, rate=8.0),
    Setup("daemon, closed loop of 1", None, 20, 500, 32, concurrency=1, rounds=5, peers=("vllm",)),
)
"""The daemon shares two cores with the tool, so it serves a model of 15 ms a token, beside which a client costs little.
guidellm's processes slow it all the same: what it sees is true, and not what the others see."""
LARGER = {"hidden_size": 640, "intermediate_size": 1920, "num_hidden_layers": 8, "num_attention_heads": 10}
"""Than the demo model: 33M parameters, random ones."""


def ours(command: Sequence[str], url: str, model: str, setup: Setup, prompts: Path) -> Figures:
    """`terrace bench`, in this process."""
    del command
    settings = Settings(
        base_url=url, model=model, workload="jsonl", parameters={"path": str(prompts), "output": str(setup.output)},
        sessions=None, request_rate=setup.rate, arrivals="constant", max_concurrency=setup.concurrency, warmup=0,
    )  # fmt: skip
    result = bench.run_sync(settings)
    if not result.valid:
        raise UsageError(f"our own run is invalid: {result.document['terrace']['client']['invalid_because']}")
    return _keys_of_vllm(result.document)


def vllm(command: Sequence[str], url: str, model: str, setup: Setup, prompts: Path) -> Figures:
    """`vllm bench serve`."""
    how = ["--max-concurrency", str(setup.concurrency)] if setup.concurrency else ["--burstiness", "1e9"]
    with tempfile.TemporaryDirectory() as folder:
        _called([
            *command, "bench", "serve", "--backend", "openai", "--base-url", url, "--model", model,
            "--tokenizer", str(TOKENIZER), "--dataset-name", "custom", "--dataset-path", str(prompts),
            "--skip-chat-template", "--disable-shuffle", "--custom-output-len", str(setup.output), "--ignore-eos",
            "--num-prompts", str(setup.requests), "--request-rate", str(setup.rate or "inf"), *how,
            "--num-warmups", "0", "--ready-check-timeout-sec", "0", "--disable-tqdm", "--save-result",
            "--result-dir", folder, "--result-filename", "result.json",
        ])  # fmt: skip
        return _keys_of_vllm(json.loads((Path(folder) / "result.json").read_text()))


def guidellm(command: Sequence[str], url: str, model: str, setup: Setup, prompts: Path) -> Figures:
    """`guidellm run`, with prompts of its own: as long as the others, and the scripted server does not read them."""
    del prompts
    how = f"kind=concurrent,streams={setup.concurrency}" if setup.concurrency else f"kind=constant,rate={setup.rate:g}"
    lengths = f"prompt_tokens={setup.input},output_tokens={setup.output}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        _called([
            *command, "run", "--backend", f"kind=openai_http,target={url},model={model},request_format=/v1/completions",
            "--profile", how, "--constraint", f"kind=max_requests,count={setup.requests}",
            "--data", f"kind=synthetic_text,{lengths}", "--tokenizer", f"kind=hf_auto,model={TOKENIZER}",
            "--output", f"kind=json,path={path}", "--disable-console",
        ])  # fmt: skip
        document = json.loads(path.read_text())["benchmarks"][0]
    metrics = {name: document["metrics"][name]["successful"] for name in
               ("time_to_first_token_ms", "inter_token_latency_ms", "request_latency")}  # fmt: skip
    good = document["requests"]["successful"]
    starts, ends = ([request[name] for request in good] for name in ("request_start_time", "request_end_time"))
    seconds = max(ends) - min(starts)
    return {"ttft": metrics["time_to_first_token_ms"]["mean"], "tpot": metrics["inter_token_latency_ms"]["mean"],
            "requests": len(good) / seconds,
            "tokens": sum(r["output_metrics"]["text_tokens"] for r in good) / seconds}  # fmt: skip


def _keys_of_vllm(document: dict[str, Any]) -> Figures:
    if document["failed"]:
        raise UsageError(f"{document['failed']} requests failed")
    return {"ttft": document["mean_ttft_ms"], "tpot": document["mean_tpot_ms"],
            "requests": document["request_throughput"], "tokens": document["output_throughput"]}  # fmt: skip


def _called(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UsageError(f"{shlex.join(command[:3])} ended with {done.returncode}: {done.stderr[-800:]}")


@contextmanager
def larger_model() -> Iterator[str]:
    """A folder with the demo model's tokenizer and the configuration of a larger one."""
    with tempfile.TemporaryDirectory() as folder:
        for path in TOKENIZER.glob("*.json"):
            (Path(folder) / path.name).write_bytes(path.read_bytes())
        config = json.loads((TOKENIZER / "config.json").read_text(encoding="utf-8"))
        (Path(folder) / "config.json").write_text(json.dumps(config | LARGER), encoding="utf-8")
        yield folder


@contextmanager
def server(setup: Setup) -> Iterator[tuple[str, str]]:
    """(URL, model) of a fresh server: nobody finds what another left in its cache."""
    if setup.scripted is None:
        with larger_model() as folder, Served([folder, "--load-format=dummy", "--threads=1"]) as served:
            bench.run_sync(Settings(base_url=served.url, sessions=4, max_concurrency=1, warmup=4))
            yield served.url, Path(folder).name
    else:
        with scripted_server(["--default", json.dumps(setup.scripted)]) as (url, _):
            yield url, "scripted"


TOOLS: dict[str, Callable[[Sequence[str], str, str, Setup, Path], Figures]] = {
    "terrace": ours, "vllm": vllm, "guidellm": guidellm,
}  # fmt: skip


@contextmanager
def prompts_of(setup: Setup, number: int) -> Iterator[Path]:
    """A file with the prompts of a round: what both tools send, in this order."""
    make = TextPrompter(vary=number, tokens_per_word=DEMO_TOKENS_PER_WORD)
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        for n in range(setup.requests):
            file.write(json.dumps({"prompt": make.make(n, setup.input)}) + "\n")
        file.flush()
        yield Path(file.name)


def measured(setup: Setup, commands: dict[str, Sequence[str]], console: Console) -> dict[str, list[Figures]]:
    """Every tool's figures, round after round, each on a server of its own, in turns."""
    tools = ["terrace", *(name for name in setup.peers if name in commands)]
    found: dict[str, list[Figures]] = {name: [] for name in tools}
    for number in range(setup.rounds):
        order = tools if number % 2 == 0 else tools[::-1]
        with prompts_of(setup, number) as prompts:
            for name in order:
                with server(setup) as (url, model):
                    figures = TOOLS[name](commands[name], url, model, setup, prompts)
                found[name].append(figures)
                shown = ", ".join(f"{key} {value:.2f}" for key, value in figures.items())
                console.print(f"{setup.name}, round {number + 1}, {name}: {shown}", highlight=False, soft_wrap=True)
    return found


def compared(found: dict[str, list[Figures]]) -> list[dict[str, Any]]:
    """Per peer and figure: the medians over the rounds, and the median of how far apart the two were in a round."""
    rows = []
    for peer in [name for name in found if name != "terrace"]:
        for key in UNITS:
            mine, theirs = ([run[key] for run in found[name]] for name in ("terrace", peer))
            apart = statistics.median(one / other - 1 for one, other in zip(mine, theirs, strict=True))
            rows.append({"peer": peer, "figure": key, "terrace": statistics.median(mine),
                         "theirs": statistics.median(theirs), "apart": apart})  # fmt: skip
    return rows


HEADER = ("| load | figure | terrace bench | peer | theirs | apart |", "|---|---|---|---|---|---|")
UNITS = {"ttft": ("TTFT mean", "ms"), "tpot": ("TPOT mean", "ms"), "requests": ("requests", "/s"),
         "tokens": ("output tokens", "/s")}  # fmt: skip


def table(path: Path = RESULT) -> str:
    """The documentation's table, from what was kept."""
    if not path.is_file():
        return "Nothing was measured yet."
    lines = list(HEADER)
    for load in json.loads(path.read_text(encoding="utf-8"))["loads"]:
        for row in load["rows"]:
            title, unit = UNITS[row["figure"]]
            cells = [load["name"], title, f"{row['terrace']:.2f} {unit}", row["peer"], f"{row['theirs']:.2f} {unit}",
                     f"{row['apart']:+.1%}"]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and keep; 1 when a figure is further apart than the goal."""
    parser = argparse.ArgumentParser(prog="python -m loadgen.agreement", description=__doc__.splitlines()[0])
    parser.add_argument("--vllm", metavar="COMMAND", help="such as `vllm`, or `/venv/bin/python -m ...`")
    parser.add_argument("--guidellm", metavar="COMMAND")
    parser.add_argument("--only", default="", metavar="TEXT", help="loads whose name has this; the others stay")
    parser.add_argument("--output", type=Path, default=RESULT, metavar="FILE")
    args = parser.parse_args(argv)
    peers = {name: shlex.split(given) for name in ("vllm", "guidellm") if (given := getattr(args, name))}
    if not peers:
        parser.error("name a peer: --vllm, --guidellm, or both")
    console = Console()
    loads: list[dict[str, Any]] = []
    if args.only and args.output.is_file():
        known = json.loads(args.output.read_text(encoding="utf-8"))["loads"]
        loads = [load for load in known if load["name"] in {setup.name for setup in SETUPS}]
    for setup in SETUPS:
        if args.only not in setup.name:
            continue
        loads = [load for load in loads if load["name"] != setup.name]
        found = measured(setup, {"terrace": [], **peers}, console)
        loads.append({"name": setup.name, "rounds": found, "rows": compared(found)})
    document = {"date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()), "environment": report.environment(),
                "loads": loads}  # fmt: skip
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(document, separators=(",", ":")) + "\n", encoding="utf-8")
    console.print(table(args.output), highlight=False, soft_wrap=True)
    missed = [row for load in loads for row in load["rows"] if abs(row["apart"]) > GOAL]
    console.print(f"{'GOAL MISSED' if missed else 'goal met'}: every figure within {GOAL:.0%}", highlight=False)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
