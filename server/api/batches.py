"""/v1/batches: create, look at, cancel and list. Every handler runs on the loop thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import JSONResponse, Response

from server.api import batch_schema, schema
from server.api.auth import request_tenant
from server.api.body import read_json_body
from server.api.files import list_object, vault_of
from server.api.inprocess import endpoint_named
from server.api.openai import answers, body_of, errors
from server.api.service import Service
from server.batches.records import WINDOW, BatchRecord, Page


class BatchRoutes:
    """The handlers of one service."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.router = APIRouter()
        add: Callable[..., None] = self.router.add_api_route
        one = answers(batch_schema.BatchObject)
        body = body_of(batch_schema.BatchCreate)
        made = one | errors(400, 401, 403, 404, 408, 413, 415, 429, 500, 507)
        add("/v1/batches", self.create, methods=["POST"], openapi_extra=body, responses=made)
        listed = answers(batch_schema.BatchList) | errors(400, 401, 404)
        add("/v1/batches", self.list, methods=["GET"], responses=listed)
        add("/v1/batches/{batch_id}", self.retrieve, methods=["GET"], responses=one | errors(400, 401, 404))
        cancelled = one | errors(400, 401, 404, 409)
        add("/v1/batches/{batch_id}/cancel", self.cancel, methods=["POST"], responses=cancelled)

    async def create(self, request: Request) -> Response:
        """Run every line of an uploaded file in the background."""
        vault = vault_of(self._service)
        raw = await read_json_body(request.scope, request.receive, self._service.body_limits)
        body = schema.parse(batch_schema.BatchCreate, raw)
        endpoint_named(body.endpoint)
        record = await vault.create_batch(
            request_tenant(request.scope),
            body.endpoint,
            body.input_file_id,
            self._service.model_name,
            body.metadata,
            None if body.output_expires_after is None else body.output_expires_after.seconds,
        )
        return JSONResponse(batch_object(record))

    async def list(
        self, request: Request, limit: Annotated[int, Query(ge=1, le=100)] = 20, after: str | None = None
    ) -> Response:
        """Batches, the newest first."""
        found, more = await vault_of(self._service).batches(request_tenant(request.scope), Page(limit, after))
        return JSONResponse(list_object([batch_object(record) for record in found], more))

    async def retrieve(self, request: Request, batch_id: str) -> Response:
        """Where a batch stands."""
        return JSONResponse(batch_object(await vault_of(self._service).batch(batch_id, request_tenant(request.scope))))

    async def cancel(self, request: Request, batch_id: str) -> Response:
        """Run no more lines of a batch; what is done is kept."""
        return JSONResponse(batch_object(await vault_of(self._service).cancel(request_tenant(request.scope), batch_id)))


def batch_object(record: BatchRecord) -> dict[str, Any]:
    """As OpenAI shows a batch."""
    problems = [
        {"code": error.code, "line": error.line, "message": error.message, "param": error.param}
        for error in record.errors
    ]
    return {
        "id": record.id,
        "object": "batch",
        "endpoint": record.endpoint,
        "model": record.model,
        "errors": {"object": "list", "data": problems} if problems else None,
        "input_file_id": record.input_file_id,
        "completion_window": WINDOW,
        "status": record.status.value,
        "output_file_id": record.output_file_id,
        "error_file_id": record.error_file_id,
        "created_at": record.created_at,
        "in_progress_at": record.in_progress_at,
        "expires_at": record.expires_at,
        "finalizing_at": record.finalizing_at,
        "completed_at": record.completed_at,
        "failed_at": record.failed_at,
        "expired_at": record.expired_at,
        "cancelling_at": record.cancelling_at,
        "cancelled_at": record.cancelled_at,
        "request_counts": {"total": record.total, "completed": record.completed, "failed": record.failed},
        "usage": {
            "input_tokens": record.input_tokens,
            "input_tokens_details": {"cached_tokens": record.cached_tokens},
            "output_tokens": record.output_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": record.input_tokens + record.output_tokens,
        },
        "metadata": record.metadata,
    }
