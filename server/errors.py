"""Errors that cross the API boundary, each with its HTTP answer. Inside the core, the world's errors are values."""

from __future__ import annotations

from typing import Any


class TerraceError(Exception):
    """Base of every error a client or an operator may see. `param` names the request field at fault, if one is."""

    status = 500
    type = "server_error"
    code: str | None = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class InvalidRequest(TerraceError):
    """The request can never succeed as it stands."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class ModelNotFound(TerraceError):
    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class NotFound(TerraceError):
    """There is no such object, or it is another tenant's."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class Conflict(TerraceError):
    """The object's state forbids it; `message` says which state would allow it."""

    status = 409
    type = "invalid_request_error"
    code = "conflict"


class QuotaExceeded(TerraceError):
    """A tenant's quota is used up: waiting does not help, deleting does."""

    status = 403
    type = "invalid_request_error"
    code = "quota_exceeded"


class StorageFull(TerraceError):
    """The disk has no room, or would have less than is to stay free. Nothing that was there is lost."""

    status = 507
    code = "storage_full"


class Unauthorized(TerraceError):
    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class BodyTooLarge(TerraceError):
    status = 413
    type = "invalid_request_error"
    code = "body_too_large"


class Overloaded(TerraceError):
    """A named limit is reached; the same request may succeed after `retry_after_s`."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"

    def __init__(self, message: str, *, retry_after_s: int, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.retry_after_s = retry_after_s


class NotReady(TerraceError):
    """Loading or draining: this daemon takes no work now."""

    status = 503
    type = "server_error"
    code = "not_ready"

    def __init__(self, message: str, *, retry_after_s: int = 5) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


GRAMMAR_STUCK = (
    "the grammar that the text must follow became too complex, or nothing can follow in it that the other parameters "
    "allow; simplify it"
)
"""What a token event says of that, see `GrammarStuck`."""


class StepFailed(TerraceError):
    """A forward pass raised: the requests in it end with an error, the daemon goes on."""

    code = "step_failed"


class DeviceLost(TerraceError):
    """The device answers with an error even when nothing is asked of it: after an illegal access, say, every call of
    this process fails. Only a new process helps, so the daemon ends.
    """

    code = "device_lost"


class GrammarStuck(InvalidRequest):
    """The rest of the request bars all that its grammar allows, or to follow the grammar costs too much."""

    code = "grammar_stuck"


class ConfigError(TerraceError):
    """The operator's configuration or environment cannot work; printed as one line, without a traceback."""

    code = "config_error"


def error_body(error: TerraceError) -> dict[str, dict[str, Any]]:
    """The one body that every failure has, with all four keys."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}
