"""The page of every parameter, made from the request models: implemented, accepted or refused, and in which bounds.

`python -m server.api.parameters` prints it; PARAMETERS.md is that, word for word. What a field does is told by the
field: one that admits nothing but null is refused, a description that begins with "Accepted" says that it has no
effect, one that begins with "Only" that nothing but the default is taken.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from server.api.embedding_schema import EmbeddingRequest
from server.api.response_schema import ResponseRequest
from server.api.schema import INT31, INT63, ChatRequest, CompletionRequest

IMPLEMENTED, ACCEPTED, DEFAULT_ONLY, REFUSED = "implemented", "accepted, no effect", "default only", "refused"

ROUTES: Mapping[str, tuple[type[BaseModel], frozenset[str]]] = {
    "/v1/completions": (
        CompletionRequest,
        frozenset(
            "best_of echo frequency_penalty logit_bias logprobs max_tokens model n presence_penalty prompt seed stop "
            "stream stream_options suffix temperature top_p user".split()
        ),
    ),
    "/v1/chat/completions": (
        ChatRequest,
        frozenset(
            "audio frequency_penalty function_call functions logit_bias logprobs max_completion_tokens max_tokens "
            "messages metadata modalities model moderation n parallel_tool_calls prediction presence_penalty "
            "prompt_cache_key prompt_cache_options prompt_cache_retention reasoning_effort response_format "
            "safety_identifier seed service_tier stop store stream stream_options temperature tool_choice tools "
            "top_logprobs top_p user verbosity web_search_options".split()
        ),
    ),
    "/v1/responses": (
        ResponseRequest,
        frozenset(
            "access_programs background background_options context_management conversation image include input "
            "instructions max_output_tokens max_tool_calls metadata model moderation parallel_tool_calls "
            "previous_response_id prompt prompt_cache_key prompt_cache_options prompt_cache_retention reasoning "
            "safety_identifier service_tier store stream stream_options temperature text tool_choice tools "
            "top_logprobs top_p truncation user".split()
        ),
    ),
    "/v1/embeddings": (EmbeddingRequest, frozenset("dimensions encoding_format input model user".split())),
}
"""Route -> the model of its body, and the names that OpenAI's own API knows there; all others are extensions."""


@dataclass(frozen=True, slots=True)
class Parameter:
    name: str
    of_openai: bool
    status: str
    values: str
    description: str


def parameters(route: str) -> Iterator[Parameter]:
    """Every parameter of `route`: OpenAI's by name, then the extensions by name."""
    model, of_openai = ROUTES[route]
    document = model.model_json_schema()
    shapes, definitions = document["properties"], document.get("$defs", {})
    for name in sorted(model.model_fields, key=lambda name: (name not in of_openai, name)):
        description = model.model_fields[name].description or ""
        values = _values(shapes[name], definitions)
        yield Parameter(name, name in of_openai, _status(values, description), values or "-", description)


def _status(values: str, description: str) -> str:
    if values in ("", "empty list"):
        return REFUSED
    if description.startswith("Accepted"):
        return ACCEPTED
    return DEFAULT_ONLY if description.startswith("Only") else IMPLEMENTED


def _values(shape: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """What a JSON schema admits besides null, in words."""
    if "$ref" in shape:
        return _values(definitions[shape["$ref"].rpartition("/")[2]], definitions)
    if alternatives := shape.get("anyOf") or shape.get("oneOf"):
        found = dict.fromkeys(_values(inner, definitions) for inner in alternatives)
        return "; or ".join(words for words in found if words)
    if "const" in shape or "enum" in shape:
        return ", ".join(f"`{str(v).lower()}`" for v in shape.get("enum", [shape.get("const")]))
    kind = shape.get("type", "any")
    if kind == "null":
        return ""
    if kind == "array":
        if shape.get("maxItems") == 0:
            return "empty list"
        entry = _values(shape.get("items", {}), definitions)
        return f"list of {f'({entry})' if ',' in entry else entry}{_bounds(shape, 'Items')}"
    if kind == "object":
        fields = ", ".join(shape.get("properties", ()))
        return f"object ({fields})" if fields else f"object{_bounds(shape, 'Properties')}"
    if kind == "string":
        pattern = f", like `{shape['pattern']}`" if "pattern" in shape else ""
        return f"string{_bounds(shape, 'Length')}{pattern}"
    return f"{kind if isinstance(kind, str) else 'scalar'}{_bounds(shape, '')}"


def _bounds(shape: Mapping[str, Any], of: str) -> str:
    """Of a number's value (`of` is empty), or of how many there are of what; limits that only keep numbers sane are
    left out."""
    low, high = shape.get(f"min{of}" if of else "minimum"), shape.get(f"max{of}" if of else "maximum")
    low = None if low in (-INT63 - 1, -1e18) or (of and low == 0) else low
    high = None if high in (INT31, INT63, 1e18) else high
    unit = {"Length": " characters", "Items": " entries", "Properties": " entries"}.get(of, "")
    if "exclusiveMinimum" in shape:
        return f", above {shape['exclusiveMinimum']:g}" + ("" if high is None else f", at most {high:.12g}")
    if of and low == 1 and high is None:
        return ", not empty"
    if low is not None and high is not None:
        return f", {low}{unit}" if low == high else f", {low} to {high}{unit}"
    if low is not None:
        return f", at least {low}{unit}"
    return "" if high is None else f", at most {high}{unit}"


def page() -> str:
    """The whole page, in Markdown."""
    lines = [
        "# Every parameter",
        "",
        "Made by `python -m server.api.parameters` from the request models; a test compares the two, and the names",
        "with those of the `openai` package. Null always means absent; what is not listed is refused by name. Where",
        "the configuration sets a lower limit (`max_choices`, `max_logprobs`, `max_stop_strings` ...), that one holds.",
        "",
        f"- **{IMPLEMENTED}**: does what OpenAI's documentation, or the last column, says.",
        f"- **{ACCEPTED}**: taken, because clients send it; changes nothing, and the last column says why.",
        f"- **{DEFAULT_ONLY}**: only the value that changes nothing is taken; any other is a 400 that names the field.",
        f"- **{REFUSED}**: a 400 that names the field.",
    ]
    for route in ROUTES:
        rows = list(parameters(route))
        counts = Counter(row.status for row in rows if row.of_openai)
        told = "; ".join(f"{counts[status]} {status}" for status in (IMPLEMENTED, ACCEPTED, DEFAULT_ONLY, REFUSED))
        lines += ["", f"## {route}", "", f"Of OpenAI's {sum(counts.values())} parameters: {told}."]
        for of_openai, title in ((True, "OpenAI's"), (False, "extension")):
            lines += ["", f"| {title} | | values | |", "|---|---|---|---|"]
            for row in rows:
                if row.of_openai is of_openai:
                    cells = (f"`{row.name}`", row.status, row.values, row.description)
                    lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
