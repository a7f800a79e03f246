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


class OpsRoutes:
    """Probes, metrics and version of one service; never guarded by API keys."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.router = APIRouter()
        add = self.router.add_api_route
        status = answers(schema.StatusResponse) | errors(503)
        add("/livez", self.livez, methods=["GET"], responses=status)
        add("/readyz", self.readyz, methods=["GET"], responses=status)
        add("/health", self.readyz, methods=["GET"], responses=status, operation_id="health")
        add("/version", self.version, methods=["GET"], responses=answers(schema.VersionResponse))
        add("/metrics", self.metrics, methods=["GET"], response_class=PlainTextResponse)
        add("/metrics/vllm", self.vllm_metrics, methods=["GET"], response_class=PlainTextResponse)

    async def livez(self) -> Response:
        """200 while the process is worth keeping, also while it starts or drains."""
        if self._service.engine.state == "failed":
            return error_response(EngineFailed("the engine has failed; restart the server"))
        return JSONResponse({"status": "alive"})

    async def readyz(self) -> Response:
        """200 while requests are taken."""
        state = self._service.engine.state
        if state != "ready":
            return error_response(NotReady(f"the server is {state}"))
        return JSONResponse({"status": "ready"})

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
