"""What wraps every request: its id, its line in the metrics and in the log, and the net under unexpected errors."""

from __future__ import annotations

import asyncio
import logging
import re
import traceback
import uuid
from collections.abc import Iterator
from typing import NamedTuple

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api import schema
from server.api.errors import UNEXPECTED, BodyTimeout, UnsupportedMediaType, error_response
from server.api.sse import CLIENT_GONE
from server.errors import BodyTooLarge, InvalidRequest
from server.metrics import Metrics

log = logging.getLogger("terrace.api")

REQUEST_ID = "request_id"
MAY_NAME = "may_name"
"""Keys in the request's state: its id, and whether that was made here, so that the body may give a better one."""
_GOOD_ID = re.compile(schema.REQUEST_ID_PATTERN)
BODY_TIMEOUT_S = 60.0
"""A body that takes longer is a stuck or hostile client; 8 MiB in a minute is 1.1 Mbit/s."""
DISCARD_BYTES = 64 * 2**20
"""How much of an over-long body is read and dropped, so that the client sees the 413 and not a reset connection."""
DISCARD_TIMEOUT_S = 10.0
SCAN_BYTES = 2**18
_SEPARATORS = (b",", b"{", b"[")
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
        given = Headers(scope=scope).get("x-request-id", "")
        state = scope.setdefault("state", {})
        state[REQUEST_ID] = given if _GOOD_ID.fullmatch(given) else uuid.uuid4().hex
        state[MAY_NAME] = state[REQUEST_ID] != given
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
        level = logging.WARNING if status >= 500 else logging.DEBUG
        log.log(level, "request %s %s %s %d", request_id, method, route, status, extra={REQUEST_ID: request_id})


class BodyLimits(NamedTuple):
    """`values`: JSON values in a body, about: its commas and brackets outside strings."""

    bytes: int
    values: int


async def read_json_body(scope: Scope, receive: Receive, limits: BodyLimits) -> bytes:
    """The body, never holding more than `limits.bytes` of it. Raises BodyTooLarge and its like.

    Parsing holds up the loop, by what there is to build rather than by bytes: 1 ms for a prompt of 8 MiB, 300 ms for as
    many bytes of small objects. So values are counted first, which is quicker by far.
    """
    body = await _read_bytes(scope, receive, limits.bytes)
    # Most bodies have few such bytes, strings included, and need no closer look.
    if sum(body.count(byte) for byte in _SEPARATORS) > limits.values:
        values = 0
        for part in outside_strings(body):
            values += sum(part.count(byte) for byte in _SEPARATORS)
            if values > limits.values:
                raise BodyTooLarge(
                    f"the body has more than the limit of {limits.values} JSON values", code="too_many_values"
                )
            await asyncio.sleep(0)
    return body


def outside_strings(body: bytes, piece_bytes: int = SCAN_BYTES) -> Iterator[bytes]:
    """What of `body` is in no string, piece by piece, if it is JSON."""
    inside, start = 0, 0
    while start < len(body):
        end = start + piece_bytes
        piece = body[start:end]
        if (len(piece) - len(piece.rstrip(b"\\"))) % 2:  # never between a backslash and what it escapes
            end += 1
            piece = body[start:end]
        parts = piece.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
        yield b"".join(parts[inside::2])
        inside ^= (len(parts) - 1) & 1
        start = end


def name_request(scope: Scope, request_id: str | None) -> None:
    """Take the id that a body gives, well formed, unless a header gave one."""
    if request_id is not None and scope["state"][MAY_NAME]:
        scope["state"][REQUEST_ID] = request_id


async def _read_bytes(scope: Scope, receive: Receive, limit_bytes: int) -> bytes:
    headers = Headers(scope=scope)
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Besides being clearer, this keeps web pages from posting to a local daemon: a browser asks first.
        raise UnsupportedMediaType(f"Content-Type must be application/json, got {kind[:100]!r}", param="content-type")
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedMediaType("compressed bodies are not supported", param="content-encoding")
    declared = headers.get("content-length", "")
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            if declared.isdigit() and int(declared[:20]) > limit_bytes:
                await _refuse(receive, limit_bytes, 0, more=True)
            return await _read(receive, limit_bytes)
    except TimeoutError:
        raise BodyTimeout(f"the body did not arrive within {BODY_TIMEOUT_S:.0f} s") from None


async def _read(receive: Receive, limit_bytes: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise InvalidRequest("the client left before its body was complete", code="incomplete_body")
        part = message.get("body", b"")
        size += len(part)
        if size > limit_bytes:
            parts.clear()
            await _refuse(receive, limit_bytes, size, more=message.get("more_body", False))
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


async def _refuse(receive: Receive, limit_bytes: int, size: int, *, more: bool) -> None:
    """Raises BodyTooLarge after dropping what is still to come, within reason."""
    await discard(receive, size, more=more)
    raise BodyTooLarge(f"the body is larger than the limit of {limit_bytes} bytes; send a shorter prompt")


async def discard(receive: Receive, size: int, *, more: bool) -> None:
    """Drops what is still to come of a body of which `size` bytes came, within reason."""
    try:
        async with asyncio.timeout(DISCARD_TIMEOUT_S):
            while more and size < DISCARD_BYTES:
                message = await receive()
                size += len(message.get("body", b""))
                more = message.get("more_body", False)
    except TimeoutError:
        pass
