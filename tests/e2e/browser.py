"""Headless Chromium over its debugging pipe: enough of the protocol to open a page, look at it and note what it did.

Needs no driver and no package: JSON messages, each ended by a NUL, on two file descriptors of the browser's process.
"""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
import os
import shutil
import subprocess
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless=new", "--remote-debugging-pipe", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-extensions", "--hide-scrollbars",
)  # fmt: skip
ANSWER_S = 60.0


def find_browser() -> str | None:
    """The first Chromium on the path."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One browser with one page. `requests`: every URL that it asked for; `complaints`: errors of console and page."""

    def __init__(self, path: str, profile: Path) -> None:
        self._reads, child_writes = (_above(fd) for fd in os.pipe())
        child_reads, self._writes = (_above(fd) for fd in os.pipe())
        flags = [*FLAGS, *(["--no-sandbox"] if os.geteuid() == 0 else []), f"--user-data-dir={profile}"]

        def give_pipes() -> None:
            os.dup2(child_reads, 3)
            os.dup2(child_writes, 4)

        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(
            [path, *flags, "about:blank"], stdout=quiet, stderr=quiet, pass_fds=(3, 4), preexec_fn=give_pipes
        )
        os.close(child_reads)
        os.close(child_writes)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._ids = itertools.count(1)
        self._answers: dict[int, dict[str, Any]] = {}
        self._news = threading.Condition()
        self._over = False
        self._session: str | None = None
        threading.Thread(target=self._read, name="browser", daemon=True).start()
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._process.terminate()
        self._process.wait(30)
        os.close(self._writes)

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """One command, and its result."""
        id = next(self._ids)
        message = {"id": id, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._writes, json.dumps(message).encode() + b"\0")
        with self._news:
            arrived = self._news.wait_for(lambda: id in self._answers or self._over, ANSWER_S)
        assert arrived, f"{method}: no answer"
        answer = self._answers.pop(id, {"error": "the browser is gone"})
        assert "error" not in answer, f"{method}: {answer['error']}"
        result: dict[str, Any] = answer["result"]
        return result

    def open(self, url: str, width: int, height: int, *, dark: bool = False) -> None:
        """Go to `url` in a window of that size, in CSS pixels."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Page.navigate", url=url)

    def value(self, expression: str) -> Any:
        """Of a JavaScript expression, in the page."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG, also what is below the window."""
        shot = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _read(self) -> None:
        rest = b""
        with os.fdopen(self._reads, "rb", buffering=0) as pipe:
            while chunk := pipe.read(65536):
                *messages, rest = (rest + chunk).split(b"\0")
                for message in messages:
                    self._take(json.loads(message))
        with self._news:
            self._over = True
            self._news.notify_all()

    def _take(self, message: dict[str, Any]) -> None:
        if "id" in message:
            with self._news:
                self._answers[message["id"]] = message
                self._news.notify_all()
            return
        method, params = message["method"], message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.complaints.append(json.dumps(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(json.dumps(params["entry"]))


def _above(fd: int) -> int:
    """The same file under a number that the browser's own two cannot meet."""
    other = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(fd)
    return other
