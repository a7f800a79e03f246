"""Bodies of /v1/files and /v1/batches, and the lines of an input file, as strict pydantic models."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, JsonValue
from pydantic_core import PydanticCustomError

from server.api.schema import ShortText, _Response
from server.api.structured import Strict
from server.batches.records import Status

MAX_CUSTOM_ID_CHARS = 512
MIN_TTL_S, MAX_TTL_S = 3600, 30 * 86_400
Ttl = Annotated[int, Field(ge=MIN_TTL_S, le=MAX_TTL_S)]
MAX_METADATA_KEY_CHARS = 64


def _short_keys(value: dict[str, str]) -> dict[str, str]:
    if any(len(key) > MAX_METADATA_KEY_CHARS for key in value):
        raise PydanticCustomError("metadata", f"keys must have at most {MAX_METADATA_KEY_CHARS} characters")
    return value


BatchMetadata = Annotated[
    dict[str, Annotated[str, Field(max_length=512)]],
    Field(max_length=16, json_schema_extra={"propertyNames": {"maxLength": MAX_METADATA_KEY_CHARS}}),
    AfterValidator(_short_keys),
]


class ExpiresAfter(Strict):
    anchor: Literal["created_at"]
    seconds: Ttl


class BatchCreate(Strict):
    """Body of POST /v1/batches."""

    input_file_id: ShortText = Field(description="A file uploaded with the purpose `batch`: JSON lines.")
    endpoint: ShortText = Field(description="The route that every line is for, e.g. /v1/chat/completions.")
    completion_window: Literal["24h"]
    metadata: BatchMetadata | None = None
    output_expires_after: ExpiresAfter | None = Field(
        default=None, description="When output and error file go, counted from their making; absent: when deleted."
    )


class BatchLine(Strict):
    """One line of an input file: a request to `url`, which must be the batch's endpoint."""

    custom_id: str = Field(min_length=1, max_length=MAX_CUSTOM_ID_CHARS)
    method: Literal["POST"]
    url: ShortText
    body: dict[str, JsonValue]


class FileObject(_Response):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["processed"]


class FileList(_Response):
    object: Literal["list"]
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(_Response):
    id: str
    object: Literal["file"]
    deleted: Literal[True]


class BatchError(_Response):
    code: str | None
    line: int | None
    message: str
    param: str | None


class BatchErrors(_Response):
    object: Literal["list"]
    data: list[BatchError]


class BatchRequestCounts(_Response):
    total: int
    completed: int
    failed: int


class InputTokensDetails(_Response):
    cached_tokens: int


class OutputTokensDetails(_Response):
    reasoning_tokens: int


class BatchUsage(_Response):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class BatchObject(_Response):
    id: str
    object: Literal["batch"]
    endpoint: str
    model: str
    errors: BatchErrors | None
    input_file_id: str
    completion_window: Literal["24h"]
    status: Status
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: BatchRequestCounts
    usage: BatchUsage
    metadata: dict[str, str] | None


class BatchList(_Response):
    object: Literal["list"]
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool
