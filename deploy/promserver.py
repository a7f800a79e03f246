"""A Prometheus of our own for a moment: where its programs come from, its process, and its HTTP API."""

from __future__ import annotations

import json
import math
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

HERE = Path(__file__).parent
UNPACKED = HERE.parent / ".prometheus"
START_S = 30.0
POLL_S = 0.1


class ObserveError(Exception):
    """What stands in the way, in words for whoever ran the command."""


def programs() -> Path:
    """The folder with `prometheus` and `promtool`, unpacked here if they are nowhere. ObserveError without."""
    found = subprocess.run([HERE / "install_prometheus.sh", UNPACKED], capture_output=True, text=True, check=False)
    if found.returncode:
        raise ObserveError(found.stderr.strip() or "deploy/install_prometheus.sh failed")
    return Path(found.stdout.strip())


@dataclass(frozen=True)
class Line:
    """One series: its labels, and (unix time, value) in order."""

    labels: Mapping[str, str]
    points: Sequence[tuple[float, float]]

    @property
    def finite(self) -> list[tuple[float, float]]:
        return [(when, value) for when, value in self.points if math.isfinite(value)]


class Prometheus:
    """Scrapes one daemon and evaluates `rules` every `interval_s` seconds, from the block's begin to its end."""

    def __init__(self, folder: Path, target: str, rules: Sequence[Path], interval_s: int = 1) -> None:
        """`folder` holds its configuration, its data and what it says; `target` is host:port."""
        self._binary = programs() / "prometheus"
        self._folder = folder
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self._address = f"127.0.0.1:{probe.getsockname()[1]}"
        every = f"{interval_s}s"
        config = {
            "global": {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": every},
            "rule_files": [str(path) for path in rules],
            "scrape_configs": [{"job_name": "terrace", "static_configs": [{"targets": [target]}]}],
        }
        # JSON is YAML.
        (folder / "prometheus.yaml").write_text(json.dumps(config), encoding="utf-8")
        self._http = httpx.Client(base_url=f"http://{self._address}", timeout=30, trust_env=False)

    def __enter__(self) -> Self:
        flags = [f"--config.file={self._folder / 'prometheus.yaml'}", f"--storage.tsdb.path={self._folder / 'data'}",
                 f"--web.listen-address={self._address}", "--log.level=warn"]  # fmt: skip
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen([self._binary, *flags], stdout=log, stderr=log, cwd=self._folder)
        try:
            self._until_ready()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _until_ready(self) -> None:
        deadline_s = time.monotonic() + START_S
        while True:
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                said = (self._folder / "log").read_text(encoding="utf-8", errors="replace").strip()
                raise ObserveError(f"Prometheus did not start: {said[-1000:]}")
            try:
                if self._http.get("/-/ready").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(POLL_S)

    def _stop(self) -> None:
        self._http.close()
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._folder / "data", ignore_errors=True)

    def query(self, expression: str) -> list[Line]:
        """An instant vector, now. ObserveError when it is refused."""
        result = self._get("query", query=expression)["result"]
        return [Line(row["metric"], [_point(row["value"])]) for row in result]

    def query_range(self, expression: str, start_s: float, end_s: float, step_s: float = 1.0) -> list[Line]:
        """The same at every step between two unix times."""
        result = self._get("query_range", query=expression, start=start_s, end=end_s, step=step_s)["result"]
        return [Line(row["metric"], [_point(value) for value in row["values"]]) for row in result]

    def label_values(self, metric: str, label: str) -> list[str]:
        values: list[str] = self._get(f"label/{label}/values", **{"match[]": metric})
        return values

    def rules(self) -> list[dict[str, Any]]:
        """Every rule that is loaded: `name`, `type`, `health`, `lastError`, of alerts also `state`."""
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def _get(self, path: str, **parameters: Any) -> Any:
        answer = self._http.get(f"/api/v1/{path}", params=parameters).json()
        if answer["status"] != "success":
            raise ObserveError(answer["error"])
        return answer["data"]


def _point(pair: Sequence[Any]) -> tuple[float, float]:
    return float(pair[0]), float(pair[1])
