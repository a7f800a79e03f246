"""What operators and their machines ask: is it alive, is it ready, what does it count, which version is it."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, PlainTextResponse, Response

from server.api import schema
from server.api.errors import error_response
from server.api.openai import answers, errors
from server.api.service import Service
from server.errors import NotReady, TerraceError


class EngineFailed(TerraceError):
    """The engine stopped on an error: only a restart helps, so liveness must fail."""

    status = 503
    code = "engine_failed"


class EngineStuck(TerraceError):
    """There is work, and no step ended for longer than any may take: what holds it up will hardly let go."""

    status = 503
    code = "engine_stuck"


class OpsRoutes:
    """Probes, metrics and version of one service; never guarded by API keys."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.router = APIRouter()
        add = self.router.add_api_route
        good = answers(schema.StatusResponse)
        add("/livez", self.livez, methods=["GET"], responses=good | errors(503))
        ready = good | {503: errors(503)[503] | {"model": schema.NotReadyResponse}}
        add("/readyz", self.readyz, methods=["GET"], responses=ready)
        add("/health", self.readyz, methods=["GET"], responses=ready, operation_id="health")
        add("/version", self.version, methods=["GET"], responses=answers(schema.VersionResponse))
        add("/metrics", self.metrics, methods=["GET"], response_class=PlainTextResponse)
        add("/metrics/vllm", self.vllm_metrics, methods=["GET"], response_class=PlainTextResponse)

    async def livez(self) -> Response:
        """200 while the process is worth keeping, also while it starts or drains: steps end, or there is no work."""
        if self._service.engine.state == "failed":
            return error_response(EngineFailed("the engine has failed; restart the server"))
        if (stuck := self._stuck()) is not None:
            return error_response(stuck)
        return JSONResponse({"status": "alive"})

    async def readyz(self) -> Response:
        """200 while requests are taken; else what is waited for."""
        engine, stuck = self._service.engine, self._stuck()
        if engine.state == "ready" and stuck is None:
            return JSONResponse({"status": "ready"})
        now = engine.snapshot()
        left = {"running": now.running, "waiting": now.waiting}
        status = engine.state if stuck is None else "stuck"
        why = stuck or NotReady(f"the server is {status}")
        return error_response(why, more={"status": status, "progress": left})

    def _stuck(self) -> EngineStuck | None:
        seconds = self._service.engine.stuck_s()
        if seconds < self._service.limits.stuck_after_s:
            return None
        return EngineStuck(f"there is work, and no step ended for {seconds:.0f} s; restart the server")

    async def version(self) -> Response:
        """The version that runs."""
        return JSONResponse({"version": self._service.version})

    async def metrics(self) -> Response:
        """Prometheus exposition. Every number is of one moment of the loop; the text is made beside it."""
        metrics = self._service.metrics
        text = await asyncio.to_thread(metrics.text, metrics.page())
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    async def vllm_metrics(self) -> Response:
        """The same numbers under vLLM's names, where there are such."""
        metrics = self._service.metrics
        text = await asyncio.to_thread(metrics.vllm_text, metrics.page())
        return Response(text, media_type=CONTENT_TYPE_LATEST)
