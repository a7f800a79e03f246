"""GET /status, the moment as JSON, and GET /status/stream, the same as events: the past once, then every second."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.auth import viewer_of
from server.api.openai import answers, errors
from server.api.service import Service
from server.api.sse import EventStream
from server.api.status.live import Viewer, live_view
from server.api.status.schema import DaemonStatus

STALLED_S = 30.0
"""A watcher that takes nothing for so long makes room for others."""
NO_STORE = {"Cache-Control": "no-store"}


class StatusRoutes:
    """What `viewer_of` a request may see: sums for everybody with a key, requests and warnings by whose they are."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._status = service.status
        self.router = APIRouter()
        add = self.router.add_api_route
        add("/status", self.status, methods=["GET"], responses=answers(DaemonStatus) | errors(401))
        # Without an end, so whoever tries out every documented route would wait for ever.
        add("/status/stream", self.stream, methods=["GET"], include_in_schema=False)

    async def status(self, request: Request) -> Response:
        """What the daemon holds and does, by the second."""
        body = self._status.shown()[:-1] + b',"live":' + self._live(viewer_of(request.scope)) + b"}"
        return Response(body, headers=NO_STORE, media_type="application/json")

    async def stream(self, request: Request) -> Response:
        """Events `history` (once), then `status` and `live` every second."""
        viewer = viewer_of(request.scope)
        self._status.enter()
        return EventStream(self._events(viewer), self._status.leave, 0, stalled_s=STALLED_S)

    async def _events(self, viewer: Viewer) -> AsyncGenerator[bytes, None]:
        yield _event("history", await self._status.history())
        async for _ in self._status.numbers():
            yield _event("status", self._status.shown()) + _event("live", self._live(viewer))

    def _live(self, viewer: Viewer) -> bytes:
        service = self._service

        def name_of(tenant: str) -> str:
            return service.tenants.gate(tenant).name

        seen = live_view(service.live, viewer, self._status.warnings, name_of, service.wall_clock())
        return json.dumps(seen, separators=(",", ":")).encode()


def _event(name: str, data: bytes) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + data + b"\n\n"
