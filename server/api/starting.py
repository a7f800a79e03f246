"""What is answered until the daemon is built: alive, not ready, and how far the start is."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.errors import error_response
from server.errors import NotReady
from server.metrics.families import STATES
from server.metrics.page import Page, series_of
from server.startup import Startup


class Starting:
    """An ASGI application for the time of the start. Nothing in it needs a key, and nothing else is served."""

    def __init__(self, startup: Startup, model_name: str) -> None:
        self._startup = startup
        self._series = series_of(model_name)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._answer(scope["path"])(scope, receive, send)

    def _answer(self, path: str) -> Response:
        if path == "/livez":
            return JSONResponse({"status": "alive"})
        if path == "/metrics":
            return Response(self._metrics(), media_type=CONTENT_TYPE_LATEST)
        report = self._startup.report()
        share = "" if report["share"] is None else f", {report['share']:.0%}"
        refusal = NotReady(f"the server is starting ({report['phase']}{share})")
        if path in ("/readyz", "/health"):
            return error_response(refusal, more={"status": "starting", "progress": report})
        return error_response(refusal)

    def _metrics(self) -> str:
        """The state alone: whoever scrapes sees that the daemon is up, and not ready."""
        page = Page()
        page.put_all("state", {state: int(state == "starting") for state in STATES})
        page.put_all("startup_phase_seconds", dict(self._startup.seconds))
        return page.text(self._series, {})


class Front:
    """An application that is replaced while it is served."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)
