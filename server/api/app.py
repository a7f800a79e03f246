"""The ASGI application: routes, middlewares, error bodies and the OpenAPI document put together."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic.json_schema import models_json_schema

from server.api import batch_schema, embedding_schema, errors, response_schema, schema
from server.api.admin import AdminRoutes
from server.api.auth import BearerAuth
from server.api.batches import BatchRoutes
from server.api.embeddings import EmbeddingRoutes
from server.api.files import FileRoutes
from server.api.middleware import RequestContext
from server.api.openai import OpenAIRoutes
from server.api.ops import OpsRoutes
from server.api.requests import Encoder
from server.api.responses import ResponseRoutes
from server.api.service import Service
from server.api.status.pages import PageRoutes
from server.api.status.routes import StatusRoutes

_BODIES = (
    schema.CompletionRequest,
    schema.ChatRequest,
    response_schema.ResponseRequest,
    embedding_schema.EmbeddingRequest,
    schema.TokenizeRequest,
    schema.DetokenizeRequest,
    schema.CacheRequest,
    schema.CachePinRequest,
    batch_schema.BatchCreate,
)


def create_app(service: Service) -> FastAPI:
    """The application over `service`. No CORS; /docs is our own, as FastAPI's loads scripts from elsewhere."""
    encoder = Encoder(service.tokenizer)

    app = FastAPI(
        title="Terrace",
        version=service.version,
        summary="OpenAI-compatible LLM serving with a tiered KV cache.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    routers = [
        OpenAIRoutes(service, encoder).router,
        FileRoutes(service).router,
        BatchRoutes(service).router,
        ResponseRoutes(service, encoder).router,
        EmbeddingRoutes(service, encoder).router,
        AdminRoutes(service, encoder).router,
        OpsRoutes(service).router,
        StatusRoutes(service).router,
    ]
    if service.limits.ui:
        routers.append(PageRoutes().router)
    for router in routers:
        app.include_router(router)
    errors.install(app, service.limits.refusal_delay_s)
    # Added last is outermost: even a refusal has a request id and is counted.
    app.add_middleware(BearerAuth, tenants=service.tenants)
    app.add_middleware(RequestContext, metrics=service.metrics)
    plain = app.openapi
    # Made when first asked for: it takes 100 ms, which a start need not wait for.
    app.openapi = lambda: app.openapi_schema or _document(app, plain(), guarded=service.tenants.guarded)  # type: ignore[method-assign]
    routes = [route for router in routers for route in router.routes]
    service.metrics.declare_http(
        (route.path, method)
        for route in routes
        if isinstance(route, APIRoute)
        for method in sorted(route.methods or ())
    )
    return app


def _document(app: FastAPI, document: dict[str, Any], *, guarded: bool) -> dict[str, Any]:
    """FastAPI's `document` with the bodies that handlers read themselves; kept by `app`."""
    _, definitions = models_json_schema(
        [(body, "validation") for body in _BODIES], ref_template="#/components/schemas/{model}"
    )
    components = document.setdefault("components", {})
    components.setdefault("schemas", {}).update(definitions["$defs"])
    if guarded:
        components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"bearer": []}]
    app.openapi_schema = document
    return document
