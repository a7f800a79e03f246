"""From the bytes of a body to a request, or to one sentence that says which field is wrong and what would be right."""

from __future__ import annotations

import difflib
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from server.errors import InvalidRequest

MAX_PARAM_CHARS = 256

RequestT = TypeVar("RequestT", bound=BaseModel)


def parse(model: type[RequestT], body: bytes) -> RequestT:
    """The request in `body`, or InvalidRequest with one sentence that names the first field at fault and the fix."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        # One sentence is enough to go on with; the input is left out because it may be a whole prompt.
        detail = error.errors(include_url=False, include_context=True)[0]
    message, param = _explain(model, detail)
    raise InvalidRequest(message, param=param, code="invalid_json" if param is None else None)


def _explain(model: type[BaseModel], detail: ErrorDetails) -> tuple[str, str | None]:
    kind, words, given = detail["type"], detail["msg"], detail["input"]
    if kind == "json_invalid":
        return f"the body is not valid JSON: {words.partition(': ')[2] or words}", None
    param = _path(detail["loc"])
    if param is None:
        return "the body must be a JSON object", None
    if kind == "missing":
        return f"'{param}' is required", param
    if kind == "extra_forbidden":
        known = difflib.get_close_matches(str(detail["loc"][-1]), model.model_fields, n=1)
        hint = f"; did you mean '{known[0]}'?" if known and len(detail["loc"]) == 1 else "; remove it"
        return f"'{param}' is not a parameter that this server knows{hint}", param
    if kind == "none_required" or (kind == "too_long" and "at most 0" in words):
        return f"'{param}' is not supported by this server; remove it or set it to null", param
    words = words.removeprefix("Input should ").removeprefix("String should ").removeprefix("Value error, ")
    verbs = ("be ", "have ", "match ", "must ", "each ", "keys ", "the ")
    words = words if words.startswith(verbs) else f"be right: {words}"
    sentence = words if words.startswith(("must ", "each ", "keys ", "the ")) else f"must {words}"
    shown = f", got {given!r}" if isinstance(given, bool | float) or _short_int(given) else ""
    return f"'{param}': {sentence}{shown}", param


def _short_int(value: Any) -> bool:
    return isinstance(value, int) and abs(value) < 10**20


def _path(loc: tuple[int | str, ...]) -> str | None:
    """('messages', 0, '~text', 'content') -> 'messages[0].content'; None for the body itself."""
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.startswith("~"):
            path += f".{part}" if path else part
    return path[:MAX_PARAM_CHARS] or None
