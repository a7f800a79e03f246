"""What wraps every request: its id, its line in the metrics and in the log, and the net under unexpected errors."""

from __future__ import annotations

import logging
import re
import traceback
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api import schema
from server.api.errors import UNEXPECTED, error_response
from server.api.sse import CLIENT_GONE
from server.logs import REQUEST_ID as LOGGED_ID
from server.logs import TRACE_PARENT
from server.metrics import Metrics

log = logging.getLogger("terrace.api")

REQUEST_ID = "request_id"
MAY_NAME = "may_name"
"""Keys in the request's state: its id, and whether that was made here, so that the body may give a better one."""
_GOOD_ID = re.compile(schema.REQUEST_ID_PATTERN)
_PROBES = frozenset({"/livez", "/readyz", "/health"})
"""They fail for as long as the state that they tell of lasts, several times a minute: the state itself is logged."""
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})


class RequestContext:
    """Outermost middleware, pure ASGI. Takes a well-formed X-Request-Id or makes one; every answer carries it."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        state = scope.setdefault("state", {})
        state[REQUEST_ID] = given if _GOOD_ID.fullmatch(given) else uuid.uuid4().hex
        state[MAY_NAME] = state[REQUEST_ID] != given
        LOGGED_ID.set(state[REQUEST_ID])
        TRACE_PARENT.set(headers.get("traceparent", ""))
        status = CLIENT_GONE

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = state[REQUEST_ID]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:  # noqa: BLE001 - the net under every bug of ours
            # The message of an exception may quote the prompt, and prompts never go to the log: type and place only.
            place = traceback.extract_tb(error.__traceback__)[-6:]
            where = " < ".join(f"{frame.name}:{frame.lineno}" for frame in reversed(place))
            log.error("request failed: %s at %s", type(error).__name__, where, extra={REQUEST_ID: state[REQUEST_ID]})
            if status == CLIENT_GONE:
                await error_response(UNEXPECTED)(scope, receive, send_with_id)
        finally:
            self._record(scope, status, state[REQUEST_ID])

    def _record(self, scope: Scope, status: int, request_id: str) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        method = scope["method"] if scope["method"] in _METHODS else "OTHER"
        self._metrics.http(route, method, status)
        level = logging.WARNING if status >= 500 and route not in _PROBES else logging.DEBUG
        log.log(level, "request %s %s %s %d", request_id, method, route, status, extra={REQUEST_ID: request_id})


def name_request(scope: Scope, request_id: str | None) -> None:
    """Take the id that a body gives, well formed, unless a header gave one."""
    if request_id is not None and scope["state"][MAY_NAME]:
        scope["state"][REQUEST_ID] = request_id
        LOGGED_ID.set(request_id)
