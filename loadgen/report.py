"""What a benchmark says: a table for the terminal, JSON with vLLM's keys, JSON lines and CSV per request."""

from __future__ import annotations

import csv
import json
import os
import platform
import shlex
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from loadgen.driver import Run
from loadgen.measure import (
    FORMULAS,
    LATENCIES,
    PERCENTILES,
    Objectives,
    cache_section,
    client_section,
    confidence,
    errors_section,
    itl_s,
    merged,
    summarize,
    timeline,
    tokens_of,
    tpot_s,
    ttft_s,
    turns_section,
)
from loadgen.records import Outcome

FORMAT = 1
TITLES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "end to end"}


def make_document(
    runs: Sequence[Run], objectives: Objectives, settings: Mapping[str, Any], server: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The whole result of `runs`, repeats of one load. `settings` has what was asked for; `server` what it counted."""
    outcomes = merged(runs)
    together = Run(
        outcomes,
        sum(run.seconds for run in runs),
        [lag for run in runs for lag in run.lag_s],
        sum(run.cpu_share for run in runs) / len(runs),
        invalid=[reason for run in runs for reason in run.invalid],
        interrupted=any(run.interrupted for run in runs),
    )
    repeats = [summarize(run, objectives) for run in runs]
    document: dict[str, Any] = {
        "date": time.strftime("%Y%m%d-%H%M%S", time.gmtime()),
        "endpoint_type": settings["api"],
        "backend": settings["api"],
        "label": settings.get("label"),
        "model_id": settings["model"],
        "tokenizer_id": None,
        "num_prompts": len(outcomes),
        "request_rate": settings.get("request_rate") or "inf",
        "burstiness": settings.get("burstiness"),
        "max_concurrency": settings.get("max_concurrency"),
        **summarize(together, objectives),
        "max_concurrent_requests": max(repeat["max_concurrent_requests"] for repeat in repeats),
    }
    document |= _samples(outcomes)
    document["terrace"] = {
        "format": FORMAT,
        "settings": dict(settings),
        "formulas": FORMULAS,
        "goodput_ms": dict(objectives.limits_ms),
        "client": client_section(together),
        "errors": errors_section(outcomes),
        "cache": cache_section(outcomes),
        "turns": turns_section(outcomes),
        "repeats": repeats,
        "confidence_95": confidence(repeats),
        "server": server,
        "timeline": timeline(runs[0].outcomes),
        "environment": environment(),
    }
    return document


def _samples(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Per request, in order of scheduled time; seconds, as the tools that read these keys expect."""
    ordered = sorted(outcomes, key=lambda o: o.scheduled_s)
    return {
        "input_lens": [o.prompt_tokens for o in ordered],
        "output_lens": [tokens_of(o) for o in ordered],
        "ttfts": [round(ttft_s(o), 6) if o.chunk_s else 0.0 for o in ordered],
        "itls": [[round(gap, 6) for gap in itl_s(o)] for o in ordered],
        "start_times": [round(o.sent_s, 6) for o in ordered],
        "errors": [f"{o.error}: {o.detail}" if o.error else "" for o in ordered],
    }


def as_command(settings: Mapping[str, Any]) -> str:
    """What one would type for this load, but for the server."""
    flags = {"--num-sessions": settings["sessions"], "--duration": settings["duration_s"],
             "--request-rate": settings["request_rate"], "--ramp-to": settings["ramp_to"],
             "--max-concurrency": settings["max_concurrency"], "--warmup": settings["warmup"],
             "--seed": settings["seed"] or None}  # fmt: skip
    if settings["arrivals"] != "poisson":
        flags["--arrivals"] = settings["arrivals"]
    if settings["arrivals"] == "gamma":
        flags["--burstiness"] = settings["burstiness"]
    if settings["token_ids"]:
        flags["--token-ids"] = ":".join(map(str, settings["token_ids"]))
    if settings["body"]:
        flags["--body"] = json.dumps(settings["body"])
    words = ["terrace", "bench", "--workload", settings["workload"]]
    words += [word for key, value in settings["parameters"].items() for word in ("-P", f"{key}={value}")]
    words += [word for flag, value in flags.items() if value is not None for word in (flag, str(value))]
    words += ["--chat"] * settings["chat"] + ["--no-ignore-eos"] * (not settings["ignore_eos"])
    return shlex.join(words)


def environment() -> dict[str, Any]:
    """Commit, processor and versions: what a figure means nothing without. No host name, no path."""
    versions: dict[str, str | None] = {}
    for name in ("terrace", "torch", "httptools", "uvloop", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {"commit": _commit(), "python": platform.python_version(), "cores": os.cpu_count(),
            "processor": _processor(), "platform": f"{platform.system()} {platform.machine()}",
            "versions": versions}  # fmt: skip


def terrace_version() -> str:
    """Version and commit of the checkout."""
    known = environment()
    return f"{known['versions']['terrace']} ({known['commit']})"


def _commit() -> str | None:
    """Of the checkout that this file is in, with `+` when it was changed; None outside of one."""
    folder = Path(__file__).parent
    try:
        shown = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"], cwd=folder, capture_output=True, text=True
        )
    except OSError:
        return None
    return shown.stdout.strip() or None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def write(folder: Path, document: Mapping[str, Any], outcomes: Sequence[Outcome]) -> list[Path]:
    """result.json, requests.jsonl and requests.csv under `folder`; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in ("result.json", "requests.jsonl", "requests.csv")]
    paths[0].write_text(json.dumps(document, separators=(",", ":"), allow_nan=False) + "\n", encoding="utf-8")
    rows = [_row(outcome) for outcome in outcomes]
    with paths[1].open("w", encoding="utf-8") as lines:
        for row, outcome in zip(rows, outcomes, strict=True):
            chunks = [round(at, 6) for at in outcome.chunk_s]
            lines.write(json.dumps({**row, "chunk_s": chunks}, separators=(",", ":")) + "\n")
    with paths[2].open("w", encoding="utf-8", newline="") as table:
        writer = csv.DictWriter(table, list(rows[0]) if rows else ["session"])
        writer.writeheader()
        writer.writerows(rows)
    return paths


def _row(o: Outcome) -> dict[str, Any]:
    tpot = tpot_s(o) if o.chunk_s else None
    return {
        "session": o.session,
        "turn": o.turn,
        "scheduled_s": round(o.scheduled_s, 6),
        "sent_s": round(o.sent_s, 6),
        "end_s": round(o.end_s, 6),
        "ttft_ms": round(ttft_s(o) * 1e3, 3) if o.chunk_s else None,
        "tpot_ms": None if tpot is None else round(tpot * 1e3, 3),
        "prompt_tokens": o.prompt_tokens,
        "output_tokens": tokens_of(o),
        "cached_tokens": o.cached_tokens,
        **{f"cached_{tier}": o.cached_by_tier.get(tier, 0) for tier in ("device", "dram", "ssd")},
        "error": o.error,
        "detail": o.detail,
    }


# --- the terminal ----------------------------------------------------------------------------------------------------


def show(document: Mapping[str, Any], console: Console) -> None:
    """Everything a person wants to know at once; the rest is in the files."""
    ours = document["terrace"]
    console.print(_latency_table(document))
    console.print(_rates(document))
    for line in cache_lines(document):
        console.print(line)
    if ours["turns"]:
        console.print(_turn_table(ours["turns"]))
    for kind, error in ours["errors"].items():
        console.print(f"[red]{error['count']} failed, {kind}[/]: {error['example']}", highlight=False)
    for remark in (ours["server"] or {}).get("remarks", []):
        console.print(f"[yellow]server[/]: {remark}", highlight=False)
    client = ours["client"]
    late, lag = client["lateness_ms"]["p99"], client["loop_lag_ms"]["p99"]
    console.print(f"client: sent {late:.1f} ms late at p99, loop lag {lag:.1f} ms, {client['cpu_share']:.0%} of a core")
    for reason in client["invalid_because"]:
        console.print(f"[bold red]INVALID[/]: {reason}", highlight=False)


def _latency_table(document: Mapping[str, Any]) -> Table:
    table = Table(title="milliseconds, from the scheduled time", title_justify="left")
    table.add_column("")
    for column in ("mean", "median", *(f"p{p:g}" for p in PERCENTILES[1:])):
        table.add_column(column, justify="right", no_wrap=True)
    intervals = document["terrace"]["confidence_95"]
    for name in LATENCIES:
        shown = [with_interval(document[f"{what}_{name}_ms"], intervals.get(f"{what}_{name}_ms"))
                 for what in ("mean", "median")]  # fmt: skip
        table.add_row(TITLES[name], *shown, *(number(document[f"p{p:g}_{name}_ms"]) for p in PERCENTILES[1:]))
    sent = document["terrace"]["client"]["from_sent"]
    keys = ["mean_ttft_ms", "median_ttft_ms", *(f"p{p:g}_ttft_ms" for p in PERCENTILES[1:])]
    table.add_row("TTFT, sent", *(number(sent[key]) for key in keys), style="dim")
    return table


def _rates(document: Mapping[str, Any]) -> str:
    ours = document["terrace"]
    parts = [
        f"{document['completed']} of {document['num_prompts']} requests in {document['duration']:.1f} s",
        f"{document['request_throughput']:.2f} requests/s",
        f"{document['output_throughput']:.0f} output tokens/s",
        f"{document['total_token_throughput']:.0f} tokens/s",
        f"at most {document['max_concurrent_requests']} at once",
    ]
    if document["request_goodput"] is not None:
        limits = " ".join(f"{name}<={limit:g}ms" for name, limit in ours["goodput_ms"].items())
        parts.append(f"goodput {document['request_goodput']:.2f}/s ({limits})")
    return ", ".join(parts)


def cache_lines(document: Mapping[str, Any]) -> list[str]:
    """Hits by tier as clients saw them, and bytes moved as the server counted them."""
    cache, server = document["terrace"]["cache"], document["terrace"]["server"] or {}
    lines = []
    if cache["hit_ratio"] is not None:
        tiers = ", ".join(f"{tier} {count / cache['prompt_tokens']:.1%}" for tier, count in cache["by_tier"].items())
        lines.append(f"prompt tokens from the cache: {cache['hit_ratio']:.1%}" + (f" ({tiers})" if tiers else ""))
    moved = {hop: count for hop, count in server.get("moved_bytes", {}).items() if count}
    if moved:
        lines.append("moved: " + ", ".join(f"{hop} {count / 1e6:.1f} MB" for hop, count in moved.items()))
    if server.get("ssd_written_bytes"):
        written, read = server["ssd_written_bytes"] / 1e6, server["ssd_read_bytes"] / 1e6
        lines.append(f"SSD: {written:.1f} MB written, {read:.1f} MB read")
    return lines


def _turn_table(turns: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="by turn", title_justify="left")
    for column in ("turn", "requests", "TTFT median ms", "TTFT p99 ms", "prompt tokens from the cache"):
        table.add_column(column, justify="right")
    for row in turns:
        hit = "" if row["hit_ratio"] is None else f"{row['hit_ratio']:.1%}"
        cells = (row["turn"], row["completed"], number(row["median_ttft_ms"]), number(row["p99_ttft_ms"]), hit)
        table.add_row(*map(str, cells))
    return table


def number(value: float | None) -> str:
    """Three digits that matter; `-` for nothing."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def with_interval(value: float | None, interval: Sequence[float] | None) -> str:
    """A figure and half the width of its 95 % interval."""
    if interval is None:
        return number(value)
    return f"{number(value)} ±{number((interval[1] - interval[0]) / 2)}"
