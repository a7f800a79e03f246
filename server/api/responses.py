"""POST /v1/responses: a chat request in other words, and its answer as items and as events.

A response is planned as the chat request that says the same, so that whatever chats learn, responses can do: `_as_chat`
is the one place where the two meet. Nothing is stored: what refers to an earlier response is refused or not found.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from server.api import response_schema as wire
from server.api import schema
from server.api.auth import request_tenant
from server.api.generate import Choice, Generation, Shown, Whole
from server.api.messages import TextPart
from server.api.middleware import name_request
from server.api.openai import SSE, Ways, answers, body_of, deliver, errors, read_if_welcome, told
from server.api.parsing import parse
from server.api.render import chat_logprobs
from server.api.requests import Encoder, Plan, plan_chat
from server.api.service import Service
from server.api.structured import JsonSchemaFormat, ResponseFormat
from server.errors import InvalidRequest, Overloaded, TerraceError
from server.types import FinishReason

PATH = "/v1/responses"
TRUNCATED_ROOM_RATIO = 0.25
"""Share of the context that `truncation: auto` leaves for the output of a request that does not limit it."""


class NotStored(InvalidRequest):
    """An earlier response is asked for."""

    status = 404
    code = "not_found"


class ResponseRoutes:
    """The handlers of one service. `router` is what the application includes."""

    def __init__(self, service: Service, encoder: Encoder) -> None:
        self._service = service
        self._encoder = encoder
        self.router = APIRouter()
        add = self.router.add_api_route
        refusals = errors(400, 401, 404, 408, 413, 415, 429, 500, 503)
        body = body_of(wire.ResponseRequest)
        whole = answers(wire.ResponseObject, content=SSE)
        add(PATH, self.create, methods=["POST"], openapi_extra=body, responses=whole | refusals)
        counted = answers(wire.InputTokens) | refusals
        add(f"{PATH}/input_tokens", self.count, methods=["POST"], openapi_extra=body, responses=counted)
        for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")):
            path = f"{PATH}/{{response_id}}{path}"
            add(path, self.missing, methods=[method], responses=errors(401, 404), status_code=404)

    async def create(self, request: Request) -> Response:
        """Generate the assistant's next turn, as an item."""
        body = await self._body(request)
        plan = await plan_response(self._service, self._encoder, body, request_tenant(request.scope))

        def ways(generation: Generation) -> Ways:
            answer = _Answer(self._service, body, generation)
            return Ways(answer.whole, answer.events)

        return await deliver(self._service, request, plan, ways, stream=bool(body.stream))

    async def count(self, request: Request) -> Response:
        """How many tokens the input of a response is."""
        plan = await plan_response(
            self._service, self._encoder, await self._body(request), request_tenant(request.scope)
        )
        return JSONResponse({"object": "response.input_tokens", "input_tokens": len(plan.prompts[0].ids)})

    async def missing(self, response_id: str) -> Response:
        """Responses are not stored, so that there is none to get, list, delete or cancel."""
        raise NotStored(
            f"there is no response {response_id[:200]!r}: responses are not stored here; send the whole conversation "
            "as input",
            param="response_id",
        )

    async def _body(self, request: Request) -> wire.ResponseRequest:
        raw = await read_if_welcome(self._service, request)
        body = parse(wire.ResponseRequest, raw)
        name_request(request.scope, body.request_id)
        return body


# --- from a response to a chat ---------------------------------------------------------------------------------------


async def plan_response(service: Service, encoder: Encoder, request: wire.ResponseRequest, tenant: str) -> Plan:
    """Raises TerraceError for whatever of `request` cannot be served, in its own words."""
    if request.top_logprobs and not request.shows_logprobs:
        raise InvalidRequest(f"'top_logprobs' needs include: ['{wire.LOGPROBS}']", param="top_logprobs")
    turns = _turns(request)
    try:
        if request.truncation == "auto":
            turns = await _newest_that_fit(service, encoder, request, turns, tenant)
        return await plan_chat(service, encoder, _as_chat(request, turns), tenant)
    except InvalidRequest as error:
        raise _reworded(error) from None


def _turns(request: wire.ResponseRequest) -> list[schema.Message]:
    """The input as the turns of a chat."""
    if isinstance(request.input, str):
        return [schema.Message(role="user", content=request.input)]
    return [
        schema.Message(
            role=item.role,
            content=item.content
            if isinstance(item.content, str)
            else [TextPart(type="text", text=part.said) for part in item.content],
        )
        for item in request.input
    ]


def _as_chat(request: wire.ResponseRequest, turns: Sequence[schema.Message]) -> schema.ChatRequest:
    """The chat request that asks for the same: what both may say is copied, what has other names is renamed."""
    shared = {
        name: getattr(request, name) for name in schema.GenerationRequest.model_fields if name != "stream_options"
    }
    shared["response_format"] = _format_of(request)
    first = [] if request.instructions is None else [schema.Message(role="system", content=request.instructions)]
    return schema.ChatRequest.model_construct(
        **shared,
        messages=[*first, *turns],
        max_completion_tokens=request.max_output_tokens,
        logprobs=request.shows_logprobs,
        top_logprobs=request.top_logprobs if request.shows_logprobs else None,
        chat_template_kwargs=request.chat_template_kwargs,
    )


def _format_of(request: wire.ResponseRequest) -> ResponseFormat | None:
    """`text.format` as a chat names it."""
    wanted = None if request.text is None else request.text.format
    if not isinstance(wanted, wire.SchemaFormat):
        return None if wanted is None else ResponseFormat(type=wanted.type)
    schema_ = JsonSchemaFormat.model_construct(**wanted.model_dump(exclude={"type"}))
    return ResponseFormat.model_construct(type="json_schema", json_schema=schema_)


async def _newest_that_fit(
    service: Service, encoder: Encoder, request: wire.ResponseRequest, turns: list[schema.Message], tenant: str
) -> list[schema.Message]:
    """`turns` without as many of the oldest as it takes to leave room for the output. What is left begins with the
    system's voice, if the input does, and then with a user's turn; a last turn that is too long by itself stays."""
    voice = next((i for i, turn in enumerate(turns) if turn.role not in ("system", "developer")), len(turns))
    starts = [voice, *(i for i in range(voice + 1, len(turns)) if turns[i].role == "user")]
    room = min(
        request.max_output_tokens or int(service.max_model_len * TRUNCATED_ROOM_RATIO), service.max_model_len - 1
    )

    async def fits(start: int) -> bool:
        chat = _as_chat(request, turns[:voice] + turns[start:])
        try:
            plan = await plan_chat(service, encoder, chat, tenant)
        except InvalidRequest as error:
            if error.code != "context_length_exceeded":
                raise
            return False
        return len(plan.prompts[0].ids) + room <= service.max_model_len

    low, high = 0, len(starts) - 1  # the later the start the shorter the prompt
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if await fits(starts[middle]) else (middle + 1, high)
    return turns[:voice] + turns[starts[low] :]


_WORDS = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "response_format.json_schema.schema": "text.format.schema",
}


def _reworded(error: InvalidRequest) -> InvalidRequest:
    """The refusal of a chat in the words of the response that it was made of."""
    old = error.param or ""
    new = _WORDS.get(old.partition("[")[0], old)
    message = error.message.replace(f"'{old}'", f"'{new}'").replace(f"in the {old}", f"in the {new}")
    reworded = InvalidRequest(message, param=new or None, code=error.code)
    reworded.status = error.status
    return reworded


# --- from a generation to an answer ----------------------------------------------------------------------------------


class _Answer:
    """One answer: the whole of it, or its events. `whole` or `events`, once."""

    def __init__(self, service: Service, request: wire.ResponseRequest, generation: Generation) -> None:
        self._service = service
        self._request = request
        self._generation = generation
        self._id = f"resp_{uuid4().hex}"
        self._item_id = f"msg_{uuid4().hex}"
        self._created = int(service.wall_clock())
        self._sequence = 0
        wanted = None if request.text is None else request.text.format
        self._format = {"type": "text"} if wanted is None else wanted.model_dump(by_alias=True)
        if isinstance(wanted, wire.SchemaFormat):
            self._format["schema"] = json.loads(wanted.schema_)

    def whole(self, wholes: Sequence[Whole]) -> bytes:
        """The answer of a request that does not stream."""
        [whole] = wholes
        body = self._finished(whole.choice, whole.text, self._logprobs(whole.tokens))
        return json.dumps(body, separators=(",", ":")).encode()

    async def events(self, request_id: str) -> AsyncGenerator[bytes, None]:
        """The stream. An error after the first byte is a last event `response.failed`."""
        text: list[str] = []
        logprobs: list[dict[str, Any]] = []
        try:
            for event in self._opening():
                yield event
            async with aclosing(self._generation.pieces()) as pieces:
                async for choice, piece in pieces:
                    text.append(piece.text)
                    shown = self._logprobs(piece.tokens)
                    logprobs += shown
                    if piece.text or shown:
                        yield self._event("output_text.delta", **self._place(), delta=piece.text, logprobs=shown)
                    if piece.finish is not None:
                        for event in self._closing(choice, "".join(text), logprobs):
                            yield event
        except Exception as error:  # noqa: BLE001 - the answer has begun, so the error goes into it
            failure = told(error, request_id)
            yield self._event("failed", response=self._response("failed", error=_fault(failure)))

    def _opening(self) -> Iterator[bytes]:
        for name in ("created", "in_progress"):
            yield self._event(name, response=self._response("in_progress"))
        yield self._event("output_item.added", output_index=0, item=self._item("in_progress", []))
        yield self._event("content_part.added", **self._place(), part=_part("", []))

    def _closing(self, choice: Choice, text: str, logprobs: list[dict[str, Any]]) -> Iterator[bytes]:
        response = self._finished(choice, text, logprobs)
        [item] = response["output"]
        yield self._event("output_text.done", **self._place(), text=text, logprobs=logprobs)
        yield self._event("content_part.done", **self._place(), part=item["content"][0])
        yield self._event("output_item.done", output_index=0, item=item)
        yield self._event(response["status"], response=response)

    def _event(self, name: str, **fields: Any) -> bytes:
        kind = f"response.{name}"
        data = json.dumps({"type": kind, "sequence_number": self._sequence, **fields}, separators=(",", ":"))
        self._sequence += 1
        return f"event: {kind}\ndata: {data}\n\n".encode()

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item_id, "output_index": 0, "content_index": 0}

    def _item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._item_id, "type": "message", "status": status, "role": "assistant", "content": content}

    def _logprobs(self, tokens: Sequence[Shown]) -> list[dict[str, Any]]:
        content: list[dict[str, Any]] = chat_logprobs(self._service.tokenizer, tokens)["content"]
        return content

    def _finished(self, choice: Choice, text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        cut = choice.finish is FinishReason.LENGTH
        status = "incomplete" if cut else "completed"
        return self._response(
            status,
            output=[self._item(status, [_part(text, logprobs)])],
            incomplete_details={"reason": "max_output_tokens"} if cut else None,
            completed_at=None if cut else int(self._service.wall_clock()),
            usage=self._usage(),
        )

    def _usage(self) -> dict[str, Any]:
        usage = self._generation.usage()
        return {
            "input_tokens": usage["prompt_tokens"],
            # Nothing here is charged for writing, so nothing counts as written.
            "input_tokens_details": usage["prompt_tokens_details"] | {"cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }

    def _response(self, status: str, **outcome: Any) -> dict[str, Any]:
        """The response object: what the client asked for, as it was understood, and what came of it so far."""
        request, params = self._request, self._generation.plan.specs[0][0].params
        empty: dict[str, Any] = {
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            "output": [],
            "usage": None,
        }
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            **(empty | outcome),
            "background": False,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "max_tool_calls": request.max_tool_calls,
            "metadata": request.metadata or {},
            "model": self._service.model_name,
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "prompt_cache_key": request.prompt_cache_key,
            "prompt_cache_retention": request.prompt_cache_retention,
            "reasoning": {"effort": None, "summary": None},
            "safety_identifier": request.safety_identifier,
            "service_tier": "flex" if request.service_tier == "flex" else "default",
            "store": False,
            "temperature": params.temperature if request.temperature is None else request.temperature,
            "text": {"format": self._format, "verbosity": "medium"},
            "tool_choice": request.tool_choice or "auto",
            "tools": [],
            "top_logprobs": request.top_logprobs or 0,
            "top_p": params.top_p if request.top_p is None else request.top_p,
            "truncation": request.truncation or "disabled",
            "user": request.user,
        }


def _part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _fault(error: TerraceError) -> dict[str, str]:
    """The two codes that clients of this route know."""
    return {
        "code": "rate_limit_exceeded" if isinstance(error, Overloaded) else "server_error",
        "message": error.message,
    }
