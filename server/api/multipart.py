"""multipart/form-data as it arrives, never more than one chunk of it in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.datastructures import Headers
from starlette.types import Receive, Scope

from server.api.body import BODY_TIMEOUT_S, discard
from server.api.errors import BodyTimeout, UnsupportedMediaType
from server.errors import BodyTooLarge, InvalidRequest

OVERHEAD_BYTES = 64 * 2**10
"""What a form may hold besides its file: boundaries, headers, short fields."""
UPLOAD_TIMEOUT_S = 3600.0
"""A form that takes longer is a stuck or hostile client; 200 MiB in an hour is 0.5 Mbit/s."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Some of one field's data; `begins` with the first one, which may be empty."""

    name: str
    filename: str | None
    data: bytes
    begins: bool


class Form:
    """One request's form. `pieces` may be consumed once; after an error `discard` what is left."""

    def __init__(self, scope: Scope, receive: Receive, limit_bytes: int) -> None:
        """`limit_bytes` bounds the whole body. Raises UnsupportedMediaType, InvalidRequest, BodyTooLarge."""
        headers = Headers(scope=scope)
        kind, options = parse_options_header(headers.get("content-type", "")[:1000])
        if kind != b"multipart/form-data":
            raise UnsupportedMediaType("Content-Type must be multipart/form-data", param="content-type")
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise UnsupportedMediaType("compressed bodies are not supported", param="content-encoding")
        try:
            self._parser = MultipartParser(options[b"boundary"], self._callbacks())  # type: ignore[arg-type]
        except (KeyError, FormParserError):
            raise InvalidRequest("Content-Type names no valid boundary", param="content-type") from None
        self._receive = receive
        self._limit_bytes = limit_bytes
        self._size = 0
        self._more = True
        self._ended = False
        self._found: list[Piece] = []
        self._headers: dict[str, str] = {}
        self._field = self._value = b""
        self._name: str = ""
        self._filename: str | None = None

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Every field's data, in the order of the body. Raises InvalidRequest, BodyTooLarge, BodyTimeout."""
        try:
            async with asyncio.timeout(UPLOAD_TIMEOUT_S):
                while self._more:
                    for piece in await self._read():
                        yield piece
        except TimeoutError:
            raise BodyTimeout(f"the body did not arrive, or nothing of it came for {BODY_TIMEOUT_S:.0f} s") from None
        if not self._ended:
            raise InvalidRequest("the form ends in the middle; send its last boundary", code="incomplete_body")

    async def discard(self) -> None:
        """Drops what is still to come, within reason, so that the client reads its answer."""
        await discard(self._receive, self._size, more=self._more)

    async def _read(self) -> list[Piece]:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            message = await self._receive()
        if message["type"] == "http.disconnect":
            self._more = False
            raise InvalidRequest("the client left before its body was complete", code="incomplete_body")
        data = message.get("body", b"")
        self._more = message.get("more_body", False)
        self._size += len(data)
        if self._size > self._limit_bytes:
            raise BodyTooLarge(f"the body is larger than the limit of {self._limit_bytes} bytes")
        try:
            self._parser.write(data)
        except FormParserError:
            raise InvalidRequest("the body is not valid multipart/form-data", code="invalid_form") from None
        found, self._found = self._found, []
        return found

    def _callbacks(self) -> Mapping[str, object]:
        return {
            "on_part_begin": self._on_part_begin,
            "on_header_field": self._on_header_field,
            "on_header_value": self._on_header_value,
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_headers_finished,
            "on_part_data": self._on_part_data,
            "on_end": self._on_end,
        }

    def _on_part_begin(self) -> None:
        self._headers = {}

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        self._headers[self._field.decode("latin-1").lower()] = self._value.decode("latin-1")
        self._field = self._value = b""

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get("content-disposition"))
        if b"name" not in options:
            raise FormParserError("a part has no name")
        # Clients write names in UTF-8, which headers show as Latin-1.
        self._name = options[b"name"].decode(errors="replace")
        filename = options.get(b"filename")
        self._filename = None if filename is None else filename.decode(errors="replace")
        self._found.append(Piece(self._name, self._filename, b"", True))

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._found.append(Piece(self._name, self._filename, data[start:end], False))

    def _on_end(self) -> None:
        self._ended = True
