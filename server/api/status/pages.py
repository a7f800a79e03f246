"""The files of the live page and of /docs, as the package holds them: nothing comes from elsewhere or stands inline."""

from __future__ import annotations

import hashlib
from importlib import resources

from fastapi import APIRouter, Request
from starlette.responses import Response

FILES = {
    "/ui": ("index.html", "text/html"),
    "/ui/page.js": ("page.js", "text/javascript"),
    "/ui/charts.js": ("charts.js", "text/javascript"),
    "/ui/page.css": ("page.css", "text/css"),
    "/ui/icon.svg": ("icon.svg", "image/svg+xml"),
    "/ui/uPlot.js": ("uPlot.iife.min.js", "text/javascript"),
    "/ui/uPlot.css": ("uPlot.min.css", "text/css"),
    "/docs": ("docs.html", "text/html"),
    "/ui/docs.js": ("docs.js", "text/javascript"),
    "/ui/docs.css": ("docs.css", "text/css"),
}
"""By path. They hold no secret, so they need no key; what they show does."""
SECURITY = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
"""Nothing from elsewhere, nothing inline. uPlot sets its styles through the CSSOM, which this allows."""
HEADERS = {
    "Content-Security-Policy": SECURITY,
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""`no-cache`: kept, and asked for again by ETag, so that a page never runs with another version's script."""


class _File:
    def __init__(self, name: str, media_type: str) -> None:
        self._body = resources.files(__package__).joinpath("static", name).read_bytes()
        self._media_type = media_type
        self._tag = f'"{hashlib.sha256(self._body).hexdigest()[:32]}"'

    async def send(self, request: Request) -> Response:
        headers = HEADERS | {"ETag": self._tag}
        if request.headers.get("if-none-match") == self._tag:
            return Response(status_code=304, headers=headers)
        return Response(self._body, headers=headers, media_type=self._media_type)


class PageRoutes:
    """Every file under its path. Its links are relative, so that it also works behind a prefix."""

    def __init__(self) -> None:
        self.router = APIRouter()
        for path, (name, media_type) in FILES.items():
            self.router.add_api_route(path, _File(name, media_type).send, methods=["GET"], include_in_schema=False)
        self.router.add_api_route("/ui/", self.without_slash, methods=["GET"], include_in_schema=False)

    async def without_slash(self) -> Response:
        """Relative links would be wrong below this one."""
        return Response(status_code=308, headers={"Location": "../ui"})
