"""What one benchmark found: raw numbers with the machine they came from, printed as tables and optionally kept.

A claim cites a run, so a saved result carries commit, processor, versions and time beside every raw sample.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def quantile(samples: Sequence[float], q: float) -> float:
    """The smallest sample that at least the share `q` of all samples do not exceed."""
    ordered = sorted(samples)
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)]


class Report:
    """Collects rows and goals of one benchmark as it runs."""

    def __init__(self, name: str, *, quick: bool) -> None:
        self.name = name
        self.quick = quick
        self.raw: list[dict[str, Any]] = []
        self.missed: list[str] = []
        self.met: list[str] = []
        self._widths: list[int] = []

    def header(self, *columns: str) -> None:
        """Start a table; cells are as wide as their heading."""
        self._widths = [max(len(column), 9) for column in columns]
        print(f"\n{self.name}{' (quick: not a measurement)' if self.quick else ''}")
        self.row(*columns)

    def row(self, *cells: object) -> None:
        print("  ".join(f"{cell!s:>{width}}" for cell, width in zip(cells, self._widths, strict=True)), flush=True)

    def keep(self, **sample: Any) -> None:
        """Raw numbers for the saved result; units live in the names."""
        self.raw.append(sample)

    def goal(self, statement: str, *, met: bool) -> None:
        (self.met if met else self.missed).append(statement)

    def print_verdict(self) -> None:
        for statement in self.met:
            print(f"goal met: {statement}")
        for statement in self.missed:
            print(f"GOAL MISSED: {statement}")

    def save(self) -> Path:
        """Write everything as JSON under results/; the path."""
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{self.name}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}.json"
        document = {
            "benchmark": self.name,
            "quick": self.quick,
            "environment": environment(),
            "goals_met": self.met,
            "goals_missed": self.missed,
            "samples": self.raw,
        }
        path.write_text(json.dumps(document, separators=(",", ":")) + "\n", encoding="utf-8")
        return path


def environment() -> dict[str, Any]:
    """Commit, processor and versions: what a number means nothing without. No host name, no path."""
    versions = {}
    for name in ("torch", "transformers", "numpy", "fastapi", "uvicorn", "uvloop"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "absent"
    return {
        "commit": _commit(),
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "load_1m": os.getloadavg()[0],
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "versions": versions,
        "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
