"""The nouns of files and batches: plain data, times in Unix seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

WINDOW = "24h"
WINDOW_S = 86_400
"""The only completion window there is, OpenAI's."""


class Status(StrEnum):
    """Where a batch stands. The time at which it got there is the record's `<status>_at`, where there is one."""

    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


ENDED = frozenset({Status.FAILED, Status.COMPLETED, Status.EXPIRED, Status.CANCELLED})


class Outcome(StrEnum):
    """What became of a line."""

    COMPLETED = "completed"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file whose content is complete and on disk. `filename` is the client's word and names nothing here."""

    id: str
    tenant: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    expires_at: int | None = None


@dataclass(frozen=True, slots=True)
class LineError:
    """What is wrong with an input file; `line` counts from 1, None for the file as a whole."""

    code: str | None
    message: str
    param: str | None
    line: int | None


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a line, or all lines of a batch so far, took."""

    input: int = 0
    cached: int = 0
    output: int = 0


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """One batch as of the moment that it was read. Of `total` lines, `completed` + `failed` have a committed result."""

    id: str
    tenant: str
    endpoint: str
    input_file_id: str
    model: str
    metadata: Mapping[str, str] | None
    output_ttl_s: int | None
    """How long after their making output and error file are kept; None: until deleted."""
    created_at: int
    expires_at: int
    status: Status = Status.VALIDATING
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    output_file_id: str | None = None
    error_file_id: str | None = None
    errors: Sequence[LineError] = ()

    @property
    def unfinished(self) -> int:
        """Lines without a result."""
        return self.total - self.completed - self.failed


@dataclass(frozen=True, slots=True)
class LineResult:
    """The one result of line `line` of a batch: `content` is a line of the output file if `ok`, else of the error file,
    without the newline."""

    batch_id: str
    line: int
    ok: bool
    content: bytes
    tokens: Tokens = Tokens()


@dataclass(frozen=True, slots=True)
class Page:
    """Part of a list, in the order of creation: at most `limit` objects that come after the one with id `after`."""

    limit: int
    after: str | None = None
    ascending: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """What a line was answered: the body that an HTTP client would have got, as JSON without a newline."""

    body: bytes
    tokens: Tokens


class Answerer(Protocol):
    """Runs lines; knows what is in them. `line` is one line of an input file, `endpoint` its batch's."""

    def check(self, endpoint: str, line: bytes) -> str:
        """The line's `custom_id`. Any thread. Raises TerraceError when it can be told already that it cannot be run."""

    async def answer(self, endpoint: str, line: bytes, tenant: str) -> Answer:
        """Runs the line in the background; whoever cancels this aborts it. Loop thread. Raises TerraceError."""
