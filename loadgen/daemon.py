"""Daemons that the suite measures: processes of their own, killed at the end as the kernel would."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import httpx

from loadgen.errors import UsageError

READY_S = 120.0
POLL_S = 0.1


class Served:
    """One daemon on a free port of this machine; it starts with the block and is killed with SIGKILL at its end."""

    def __init__(self, flags: Sequence[str], disk_mb_per_s: float | None = None) -> None:
        """`flags` as for `terrace serve`; `disk_mb_per_s` slows its SSD."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        slow = [] if disk_mb_per_s is None else ["server.bench.throttled", f"{disk_mb_per_s:g}"]
        self._command = [sys.executable, "-m", *(slow or ["server"]), "serve", f"--port={self.port}",
                         "--log-level=warning", *flags]  # fmt: skip
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed at the end of the block
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start and wait until it is ready. UsageError with its last words when it ends first."""
        root = Path(__file__).parent.parent
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=self._errors, cwd=root)
        deadline_s = time.monotonic() + READY_S
        with httpx.Client(base_url=self.url, timeout=10) as http:
            while True:
                if self._process.poll() is not None:
                    self._errors.seek(0)
                    raise UsageError(f"the daemon ended: {self._errors.read()[-500:].decode(errors='replace').strip()}")
                if time.monotonic() > deadline_s:
                    raise UsageError(f"the daemon was not ready after {READY_S:g} s")
                try:
                    if http.get("/readyz").status_code == 200:
                        return
                except httpx.TransportError:
                    pass
                time.sleep(POLL_S)

    def kill(self) -> None:
        """SIGKILL: it has no time to tidy up."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self._errors.close()
