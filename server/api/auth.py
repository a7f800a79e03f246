"""Bearer API keys. Everything is guarded but the paths that probes and scrapers need.

Here a tenant's rate limits show first: an answer says what is left, and a body that could not be served is not read.
"""

from __future__ import annotations

import hashlib
import hmac

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import error_response
from server.api.status.live import Viewer
from server.api.status.pages import FILES
from server.api.tenancy import Tenants
from server.errors import TerraceError, Unauthorized

OPEN_PATHS = frozenset(
    {"/livez", "/readyz", "/health", "/metrics", "/metrics/vllm", "/version", "/openapi.json", "/ui/", *FILES}
)
STATUS_PATHS = frozenset({"/status", "/status/stream"})
UNKNOWN_KEY = "the API key is not known to this server"
ADMIN_PREFIX = "/v1/cache"
TENANT = "tenant"
"""Key in the request's state: the id of the tenant, which separates its cached prefixes from those of others."""
_VIEWER = "viewer"


class AdminOff(TerraceError):
    """There are API keys but no admin keys: then nobody is an admin."""

    status = 404
    type = "invalid_request_error"
    code = "admin_api_off"


def request_tenant(scope: Scope) -> str:
    """The tenant whose request this is; empty where there are no API keys."""
    return str(scope.get("state", {}).get(TENANT, ""))


def viewer_of(scope: Scope) -> Viewer:
    """Who asks for the status."""
    viewer = scope["state"][_VIEWER]
    assert isinstance(viewer, Viewer), "set for every path in STATUS_PATHS"
    return viewer


class BearerAuth:
    """Pure ASGI middleware. Refuses by default: a new route is guarded unless it is listed as open.

    The cache admin API takes admin keys only; without any it is open like the rest if that is open, else off. The
    status takes both kinds, and shows what the key may see.
    """

    def __init__(self, app: ASGIApp, tenants: Tenants) -> None:
        self._app = app
        self._tenants = tenants

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            try:
                if _for_admins(scope["path"]):
                    self._check_admin(scope)
                elif scope["path"] in STATUS_PATHS:
                    scope.setdefault("state", {})[_VIEWER] = self._viewer(scope)
                elif self._tenants.guarded:
                    send = self._check_tenant(scope, send)
            except TerraceError as error:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check_admin(self, scope: Scope) -> None:
        if self._tenants.admins:
            if not self._is_admin(_digest(scope)):
                raise Unauthorized(UNKNOWN_KEY)
        elif self._tenants.guarded:
            raise AdminOff("the cache admin API is off; start the server with --admin-key to use it")

    def _is_admin(self, digest: bytes) -> bool:
        # All of them are compared, as with tenants.
        return sum(hmac.compare_digest(other, digest) for other in self._tenants.admins) > 0

    def _viewer(self, scope: Scope) -> Viewer:
        """An admin, a tenant, or, where neither needs a key, anybody: who is everybody's admin if there are no keys."""
        if not self._tenants.guarded and not self._tenants.admins:
            return Viewer("all")
        if not self._tenants.guarded and "authorization" not in Headers(scope=scope):
            return Viewer("none")
        digest = _digest(scope)
        tenant = self._tenants.find(digest)
        if self._is_admin(digest):
            return Viewer("all")
        if tenant is None:
            raise Unauthorized(UNKNOWN_KEY)
        return Viewer("own", tenant)

    def _check_tenant(self, scope: Scope, send: Send) -> Send:
        """Notes whose request it is. What to send the answer with, so that it says what is left of the limits."""
        tenant = self._tenants.find(_digest(scope))
        if tenant is None:
            raise Unauthorized(UNKNOWN_KEY)
        scope.setdefault("state", {})[TENANT] = tenant
        if self._tenants.gate(tenant).limited:
            send = self._with_limits(tenant, send)
        return send

    def _with_limits(self, tenant: str, send: Send) -> Send:
        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self._tenants.gate(tenant).headers(self._tenants.clock()).items():
                    headers[name] = value
            await send(message)

        return send_with_limits


def _for_admins(path: str) -> bool:
    return path == ADMIN_PREFIX or path.startswith(f"{ADMIN_PREFIX}/")


def _digest(scope: Scope) -> bytes:
    """Of the key that came. Raises Unauthorized when none did."""
    scheme, _, key = (Headers(scope=scope).get("authorization") or "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise Unauthorized("no API key given; send the header 'Authorization: Bearer KEY'", code="missing_api_key")
    return hashlib.sha256(key.strip().encode("latin-1")).digest()
