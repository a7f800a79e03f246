"""Bearer API keys. Everything is guarded but the paths that probes and scrapers need."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.errors import error_response
from server.errors import TerraceError, Unauthorized

OPEN_PATHS = frozenset({"/livez", "/readyz", "/health", "/metrics", "/version", "/openapi.json"})
ADMIN_PREFIX = "/v1/cache"
TENANT = "tenant"
"""Key in the request's state: a name of the API key that separates its cached prefixes from those of other keys."""


class AdminOff(TerraceError):
    """There are API keys but no admin keys: then nobody is an admin."""

    status = 404
    type = "invalid_request_error"
    code = "admin_api_off"


def tenant_of(key_hash: bytes) -> str:
    """The name of an API key's tenant, from the key's digest: says nothing about the key."""
    return hashlib.sha256(b"tenant:" + key_hash).hexdigest()[:32]


def request_tenant(scope: Scope) -> str:
    """The tenant whose request this is; empty where there are no API keys."""
    return str(scope.get("state", {}).get(TENANT, ""))


class BearerAuth:
    """Pure ASGI middleware. Refuses by default: a new route is guarded unless it is listed as open.

    The cache admin API takes admin keys only; without any it is open like the rest if that is open, else off.
    """

    def __init__(self, app: ASGIApp, key_hashes: Sequence[bytes], admin_hashes: Sequence[bytes]) -> None:
        self._app = app
        self._tenants = [(key, tenant_of(key)) for key in key_hashes]
        self._admins = [(key, "") for key in admin_hashes]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (self._tenants or self._admins) and scope["path"] not in OPEN_PATHS:
            try:
                known = self._known(scope["path"])
                if known:
                    tenant = self._tenant(Headers(scope=scope).get("authorization"), known)
                    scope.setdefault("state", {})[TENANT] = tenant
            except TerraceError as error:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _known(self, path: str) -> Sequence[tuple[bytes, str]]:
        if path != ADMIN_PREFIX and not path.startswith(f"{ADMIN_PREFIX}/"):
            return self._tenants
        if self._tenants and not self._admins:
            raise AdminOff("the cache admin API is off; start the server with --admin-key to use it")
        return self._admins

    def _tenant(self, header: str | None, known: Sequence[tuple[bytes, str]]) -> str:
        scheme, _, key = (header or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthorized("no API key given; send the header 'Authorization: Bearer KEY'", code="missing_api_key")
        digest = hashlib.sha256(key.strip().encode("latin-1")).digest()
        # Every key is compared, so that the time taken tells nothing about which one came close.
        matches = [tenant for other, tenant in known if hmac.compare_digest(other, digest)]
        if not matches:
            raise Unauthorized("the API key is not known to this server")
        return matches[0]
