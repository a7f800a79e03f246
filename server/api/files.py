"""/v1/files: upload, list, look at, read and delete. Every handler runs on the loop thread."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import ValidationError
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from server.api import batch_schema
from server.api.auth import request_tenant
from server.api.multipart import OVERHEAD_BYTES, Form, Piece
from server.api.openai import answers, errors
from server.api.service import Service
from server.api.sse import unless_gone
from server.batches.content import CHUNK_BYTES, Handle
from server.batches.records import FileRecord, Page
from server.batches.vault import FILE_TTL_S, Upload, Vault
from server.errors import InvalidRequest, TerraceError

MAX_FIELD_BYTES = 256
MAX_FILENAME_CHARS = 255
_FIELDS = ("file", "purpose", "expires_after[anchor]", "expires_after[seconds]")
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "file": {"type": "string", "format": "binary", "description": "JSON lines."},
                        "purpose": {"type": "string", "enum": ["batch"]},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {
                            "type": "integer",
                            "minimum": batch_schema.MIN_TTL_S,
                            "maximum": batch_schema.MAX_TTL_S,
                        },
                    },
                    "required": ["file", "purpose"],
                    "additionalProperties": False,
                }
            }
        },
    }
}


class FilesOff(TerraceError):
    """The operator gave no place to keep files and batches in."""

    status = 404
    type = "invalid_request_error"
    code = "batch_api_off"


def vault_of(service: Service) -> Vault:
    """Raises FilesOff."""
    if service.vault is None:
        raise FilesOff("files and batches are off; start the server with --data-path (batch.data_path) to use them")
    return service.vault


class FileRoutes:
    """The handlers of one service."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.router = APIRouter()
        add: Callable[..., None] = self.router.add_api_route
        taken = answers(batch_schema.FileObject) | errors(400, 401, 403, 404, 408, 413, 415, 429, 500, 507)
        add("/v1/files", self.create, methods=["POST"], openapi_extra=_BODY, responses=taken)
        listed = answers(batch_schema.FileList) | errors(400, 401, 404)
        add("/v1/files", self.list, methods=["GET"], responses=listed)
        shown = answers(batch_schema.FileObject) | errors(400, 401, 404)
        add("/v1/files/{file_id}", self.retrieve, methods=["GET"], responses=shown)
        deleted = answers(batch_schema.FileDeleted) | errors(400, 401, 404, 409)
        add("/v1/files/{file_id}", self.delete, methods=["DELETE"], responses=deleted)
        binary = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
        content: dict[int | str, dict[str, Any]] = {200: {"content": binary, "description": "The bytes of the file."}}
        add(
            "/v1/files/{file_id}/content",
            self.content,
            methods=["GET"],
            response_class=Response,
            responses=content | errors(400, 401, 404),
        )

    async def create(self, request: Request) -> Response:
        """Upload the input of a batch."""
        vault = vault_of(self._service)
        form = Form(request.scope, request.receive, vault.limits.max_file_bytes + OVERHEAD_BYTES)
        try:
            record = await vault.upload(request_tenant(request.scope), lambda upload: _receive(form, upload))
        except TerraceError:
            await form.discard()
            raise
        return JSONResponse(file_object(record))

    async def list(
        self,
        request: Request,
        purpose: str | None = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        order: Literal["asc", "desc"] = "desc",
        after: str | None = None,
    ) -> Response:
        """Files, by default the newest first."""
        page = Page(limit, after, order == "asc")
        found, more = await vault_of(self._service).files(request_tenant(request.scope), purpose, page)
        return JSONResponse(list_object([file_object(record) for record in found], more))

    async def retrieve(self, request: Request, file_id: str) -> Response:
        """What is known of a file."""
        return JSONResponse(file_object(await self._file(request, file_id)))

    async def delete(self, request: Request, file_id: str) -> Response:
        """Delete a file that no batch in work reads."""
        await vault_of(self._service).delete_file(request_tenant(request.scope), file_id)
        return JSONResponse({"id": file_id, "object": "file", "deleted": True})

    async def content(self, request: Request, file_id: str) -> Response:
        """The bytes of a file."""
        return _Content(vault_of(self._service), await self._file(request, file_id))

    async def _file(self, request: Request, file_id: str) -> FileRecord:
        return await vault_of(self._service).file(request_tenant(request.scope), file_id)


def file_object(record: FileRecord) -> dict[str, Any]:
    """As OpenAI shows a file."""
    return {
        "id": record.id,
        "object": "file",
        "bytes": record.bytes,
        "created_at": record.created_at,
        "expires_at": record.expires_at,
        "filename": record.filename,
        "purpose": record.purpose,
        "status": "processed",
    }


def list_object(data: list[dict[str, Any]], more: bool) -> dict[str, Any]:
    """As OpenAI shows a page of a list."""
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": more}


async def _receive(form: Form, upload: Upload) -> tuple[str, int]:
    """Writes the file of `form`; its name and how long to keep it. Raises TerraceError."""
    fields: dict[str, bytes] = {}
    filename: str | None = None
    async with aclosing(form.pieces()) as pieces:
        async for piece in pieces:
            _check_piece(piece, fields)
            if piece.name == "file":
                filename = piece.filename
                await upload.write(piece.data)
            else:
                fields[piece.name] += piece.data
    if "file" not in fields or filename is None:
        raise InvalidRequest("'file' is required: a part with a filename", param="file")
    if fields.get("purpose") != b"batch":
        raise InvalidRequest("'purpose' must be 'batch'; this server keeps no other files", param="purpose")
    return filename[:MAX_FILENAME_CHARS], _ttl_s(fields)


def _check_piece(piece: Piece, fields: dict[str, bytes]) -> None:
    """Notes a field that begins. Raises InvalidRequest for one that is unknown, comes twice or is too long."""
    name = piece.name
    if name not in _FIELDS:
        raise InvalidRequest(f"'{name[:100]}' is not a field of this form; remove it", param=name[:100])
    if piece.begins:
        if name in fields:
            raise InvalidRequest(f"'{name}' may be given once", param=name)
        fields[name] = b""
    if name != "file" and len(fields[name]) + len(piece.data) > MAX_FIELD_BYTES:
        raise InvalidRequest(f"'{name}' is too long", param=name)


def _ttl_s(fields: dict[str, bytes]) -> int:
    given = {name: fields.get(f"expires_after[{name}]") for name in ("anchor", "seconds")}
    if given == {"anchor": None, "seconds": None}:
        return FILE_TTL_S
    seconds = given["seconds"] or b""
    try:
        anchor = (given["anchor"] or b"").decode(errors="replace")
        value = int(seconds) if seconds.isdigit() else seconds.decode(errors="replace")
        return batch_schema.ExpiresAfter.model_validate({"anchor": anchor, "seconds": value}).seconds
    except ValidationError:
        raise InvalidRequest(
            f"'expires_after' needs anchor 'created_at' and seconds from {batch_schema.MIN_TTL_S} to "
            f"{batch_schema.MAX_TTL_S}",
            param="expires_after",
        ) from None


class _Content(Response):
    """Sends a file as it is read, to a client that is still there."""

    media_type = "application/octet-stream"

    def __init__(self, vault: Vault, record: FileRecord) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"Content-Length": str(record.bytes), "X-Content-Type-Options": "nosniff"})
        self._vault = vault
        self._record = record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._vault.reading(self._record.id) as handle:
            await unless_gone(receive, self._send(handle, send))

    async def _send(self, handle: Handle, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        while chunk := await handle.read(CHUNK_BYTES):
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
