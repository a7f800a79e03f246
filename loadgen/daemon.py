"""Servers that are measured: processes of their own, killed at the end as the kernel would."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import httpx

from loadgen.errors import UsageError

READY_S = 120.0
POLL_S = 0.1


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


class Server:
    """One server with all its processes; it starts with the block and is killed with SIGKILL at its end."""

    def __init__(self, command: Sequence[str], port: int, *, ready: str, ready_s: float = READY_S) -> None:
        """`ready`: the path that answers 200 once it takes requests, within `ready_s`."""
        self.port = port
        self._command, self._ready, self._ready_s = command, ready, ready_s
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed at the end of the block
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start and wait until it is ready. UsageError with its last words when it ends first."""
        root = Path(__file__).parent.parent
        self._process = subprocess.Popen(
            self._command, stdout=subprocess.DEVNULL, stderr=self._errors, cwd=root, start_new_session=True
        )
        deadline_s = time.monotonic() + self._ready_s
        with httpx.Client(base_url=self.url, timeout=10) as http:
            while True:
                if self._process.poll() is not None:
                    self._errors.seek(0)
                    raise UsageError(f"the server ended: {self._errors.read()[-500:].decode(errors='replace').strip()}")
                if time.monotonic() > deadline_s:
                    raise UsageError(f"the server was not ready after {self._ready_s:g} s")
                try:
                    if http.get(self._ready).status_code == 200:
                        return
                except httpx.TransportError:
                    pass
                time.sleep(POLL_S)

    def pause(self) -> None:
        """Stop every thread of it until `resume`: nothing that it does on the side takes time from others."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):  # all of it has ended by itself
                os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """SIGKILL: it has no time to tidy up."""
        if self._process is not None:
            self._signal(signal.SIGKILL)
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


class Served(Server):
    """One daemon of ours on a free port of this machine."""

    def __init__(self, flags: Sequence[str], disk_mb_per_s: float | None = None) -> None:
        """`flags` as for `terrace serve`; `disk_mb_per_s` slows its SSD."""
        port = free_port()
        slow = [] if disk_mb_per_s is None else ["server.bench.throttled", f"{disk_mb_per_s:g}"]
        command = [sys.executable, "-m", *(slow or ["server"]), "serve", f"--port={port}", "--log-level=warning"]
        super().__init__([*command, *flags], port, ready="/readyz")
