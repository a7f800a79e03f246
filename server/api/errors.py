"""Every failure becomes one body: `{"error": {"message", "type", "param", "code"}}`, all four keys, always."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from server.errors import InvalidRequest, NotReady, Overloaded, TerraceError, Unauthorized, error_body

LARGEST_RETRY_AFTER_S = 3600
STRANGER = "stranger"
"""Key in a request's state: whether it is the first one on its connection."""
SLOWED = frozenset({400, 413, 415})
"""Refusals of a body that wait for `refusal_delay_s` where a stranger sent it."""


class UnsupportedMediaType(InvalidRequest):
    status = 415
    code = "unsupported_media_type"


class BodyTimeout(InvalidRequest):
    status = 408
    code = "body_timeout"


class _Unexpected(TerraceError):
    """A bug of ours; the details are in the log, not in the answer."""


UNEXPECTED = _Unexpected("the server failed on this request; its log names the error under the X-Request-Id")


def error_response(
    error: TerraceError, headers: Mapping[str, str] | None = None, more: Mapping[str, Any] | None = None
) -> Response:
    """The HTTP answer to `error`, with Retry-After where waiting helps. `more` stands in the body beside the error."""
    extra = dict(headers or {})
    if isinstance(error, Overloaded | NotReady):
        extra["Retry-After"] = str(min(max(1, round(error.retry_after_s)), LARGEST_RETRY_AFTER_S))
    if isinstance(error, Unauthorized):
        extra["WWW-Authenticate"] = "Bearer"
    if error.status in (408, 413):
        # The rest of the body is still on its way: this connection cannot carry another request.
        extra["Connection"] = "close"
    body = json.dumps({**error_body(error), **(more or {})}).encode()
    return Response(body, error.status, extra, media_type="application/json")


_HTTP_WORDS = {
    404: ("no such route: {method} {path}", "not_found"),
    405: ("{path} does not take {method}; see /openapi.json", "method_not_allowed"),
}


def install(app: FastAPI, refusal_delay_s: float) -> None:
    """Registers the handlers that turn exceptions of routes and of the router into error bodies.

    A refusal takes time of the loop, too: clients that make a connection for each bad body, one after the other, get
    theirs `refusal_delay_s` later, and so send fewer of them.
    """

    async def on_terrace(request: Request, error: Exception) -> Response:
        assert isinstance(error, TerraceError)
        if error.status in SLOWED and getattr(request.state, STRANGER, False):
            await asyncio.sleep(refusal_delay_s)
        return error_response(error)

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        words, code = _HTTP_WORDS.get(error.status_code, ("{method} {path} failed", "http_error"))
        refusal = InvalidRequest(words.format(method=request.method, path=request.url.path[:200]), code=code)
        refusal.status = error.status_code
        return error_response(refusal, error.headers)

    async def on_parameters(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        param = str(first["loc"][-1])
        return error_response(InvalidRequest(f"'{param}': {first['msg']}", param=param))

    app.add_exception_handler(TerraceError, on_terrace)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(RequestValidationError, on_parameters)
