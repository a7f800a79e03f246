"""A client at the ASGI seam that reads and leaves when a test says so: without sockets or waits."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI


class Call:
    """One request at the ASGI seam: the test decides when the client reads and when it leaves."""

    def __init__(
        self,
        app: FastAPI,
        body: dict[str, Any],
        path: str = "/v1/completions",
        method: str = "POST",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.received: list[bytes] = []
        self.status: int | None = None
        self.ended = False
        self.reading = asyncio.Event()
        self.reading.set()
        self.leave = asyncio.Event()
        self._body: bytes | None = json.dumps(body).encode()
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "server": ("terrace", 80),
            "client": ("127.0.0.1", 1),
            "headers": [
                (name.encode(), value.encode())
                for name, value in ({"content-type": "application/json"} | dict(headers or {})).items()
            ],
        }
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.leave.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        assert not self.ended, "nothing may follow the end"
        await self.reading.wait()
        if message["type"] == "http.response.start":
            self.status = message["status"]
        else:
            self.received.append(message.get("body", b""))
            self.ended = not message.get("more_body", False)


async def settle(until: Callable[[], bool] = lambda: False, rounds: int = 200) -> None:
    """Lets every ready task run, for at most `rounds` turns of the loop."""
    for _ in range(rounds):
        if until():
            return
        await asyncio.sleep(0)
