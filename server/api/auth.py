"""Bearer API keys. Everything is guarded but the paths that probes and scrapers need."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.errors import error_response
from server.errors import Unauthorized

OPEN_PATHS = frozenset({"/livez", "/readyz", "/health", "/metrics", "/version", "/openapi.json"})
TENANT = "tenant"
"""Key in the request's state: a name of the API key that separates its cached prefixes from those of other keys."""


class BearerAuth:
    """Pure ASGI middleware. Refuses by default: a new route is guarded unless it is listed as open."""

    def __init__(self, app: ASGIApp, key_hashes: Sequence[bytes]) -> None:
        self._app = app
        self._tenants = [(key, hashlib.sha256(b"tenant:" + key).hexdigest()[:32]) for key in key_hashes]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._tenants and scope["path"] not in OPEN_PATHS:
            try:
                scope.setdefault("state", {})[TENANT] = self._tenant(Headers(scope=scope).get("authorization"))
            except Unauthorized as error:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _tenant(self, header: str | None) -> str:
        scheme, _, key = (header or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthorized("no API key given; send the header 'Authorization: Bearer KEY'", code="missing_api_key")
        digest = hashlib.sha256(key.strip().encode("latin-1")).digest()
        # Every key is compared, so that the time taken tells nothing about which one came close.
        matches = [tenant for known, tenant in self._tenants if hmac.compare_digest(known, digest)]
        if not matches:
            raise Unauthorized("the API key is not known to this server")
        return matches[0]
