"""The OpenAI routes, and /tokenize and /detokenize beside them. Every handler runs on the loop thread."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple
from uuid import uuid4

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from server.api import schema
from server.api.auth import request_tenant
from server.api.body import read_json_body
from server.api.chat import render_chat
from server.api.errors import UNEXPECTED
from server.api.generate import Generation, Whole, collect
from server.api.middleware import REQUEST_ID, name_request
from server.api.render import ChatFormat, CompletionFormat, Format
from server.api.requests import Encoder, Plan, check_ids, check_model, plan_chat, plan_completion
from server.api.service import Service
from server.api.sse import CLIENT_GONE, DONE, EventStream, event, unless_gone
from server.errors import InvalidRequest, TerraceError, error_body

log = logging.getLogger("terrace.api")


def errors(*codes: int) -> dict[int | str, dict[str, Any]]:
    """The error answers of a route, for the OpenAPI document."""
    return {code: {"model": schema.ErrorResponse, "description": _WHEN[code]} for code in sorted(codes)}


def answers(model: type[BaseModel], **more: Any) -> dict[int | str, dict[str, Any]]:
    """The success of a route, for the OpenAPI document."""
    return {200: {"model": model, **more}}


_WHEN = {
    400: "The request cannot be served as it stands; `param` names the field.",
    401: "No API key, or one that is not known.",
    403: "A quota is used up; deleting helps, waiting does not.",
    404: "What is named does not exist here.",
    408: "The body did not arrive in time.",
    409: "The state of what is named forbids it.",
    413: "The body is larger than the limit.",
    415: "The body is not declared as what the route takes.",
    429: "A queue is full; Retry-After says when to try again.",
    500: "The server failed on this request.",
    503: "Starting or shutting down; Retry-After says when to try again.",
    507: "The disk is full.",
}
_BODY_ERRORS = (400, 401, 404, 408, 413, 415, 500)
_EVENT = {
    "type": "object",
    "description": "One of the server-sent events: `data` is a chunk as JSON, or `[DONE]`.",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}
# Before OpenAPI 3.2 the schema of a stream is that of each event.
SSE = {"text/event-stream": {"schema": _EVENT}}


def body_of(model: type[BaseModel]) -> dict[str, Any]:
    """Declares the body that a handler reads and validates itself."""
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}}
    return {"requestBody": {"required": True, "content": content}}


class OpenAIRoutes:
    """The handlers of one service. `router` is what the application includes."""

    def __init__(self, service: Service, encoder: Encoder) -> None:
        self._service = service
        self._encoder = encoder
        self._created = int(service.wall_clock())
        self.router = APIRouter()
        add = self.router.add_api_route
        posts: list[tuple[str, Callable[..., Any], type[BaseModel], type[BaseModel]]] = [
            ("/v1/completions", self.completions, schema.CompletionRequest, schema.CompletionResponse),
            ("/v1/chat/completions", self.chat, schema.ChatRequest, schema.ChatResponse),
            ("/tokenize", self.tokenize, schema.TokenizeRequest, schema.TokenizeResponse),
            ("/detokenize", self.detokenize, schema.DetokenizeRequest, schema.DetokenizeResponse),
        ]
        for path, handler, body, answer in posts:
            generates = path.startswith("/v1/")
            refusals = errors(*_BODY_ERRORS, 429, *([503] if generates else []))
            ok = answers(answer, **({"content": SSE} if generates else {}))
            add(path, handler, methods=["POST"], openapi_extra=body_of(body), responses=ok | refusals)
        add("/v1/models", self.models, methods=["GET"], responses=answers(schema.ModelList) | errors(401))
        one = answers(schema.ModelCard) | errors(401, 404)
        add("/v1/models/{model:path}", self.model, methods=["GET"], responses=one)

    async def completions(self, request: Request) -> Response:
        """Generate text that goes on from a prompt."""
        body = schema.parse(schema.CompletionRequest, await read_if_welcome(self._service, request))
        name_request(request.scope, body.request_id)
        plan = await plan_completion(self._service, self._encoder, body, request_tenant(request.scope))
        return await self._answer(request, CompletionFormat, plan, bool(body.stream), body.usage_in)

    async def chat(self, request: Request) -> Response:
        """Generate the assistant's next turn."""
        body = schema.parse(schema.ChatRequest, await read_if_welcome(self._service, request))
        name_request(request.scope, body.request_id)
        plan = await plan_chat(self._service, self._encoder, body, request_tenant(request.scope))
        return await self._answer(request, ChatFormat, plan, bool(body.stream), body.usage_in)

    async def tokenize(self, request: Request) -> Response:
        """The token ids of a prompt or of a rendered conversation."""
        body = schema.parse(schema.TokenizeRequest, await self._read(request))
        check_model(self._service, body.model)
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequest("exactly one of 'prompt' and 'messages' is required", param="prompt")
        special = body.add_special_tokens
        if body.messages is not None:
            text = render_chat(
                self._service,
                body.messages,
                body.add_generation_prompt,
                body.chat_template_kwargs or {},
                continue_final_message=body.continue_final_message,
                tools=body.tools,
            )
            special = bool(special)
        else:
            for name in ("add_generation_prompt", "continue_final_message", "chat_template_kwargs", "tools"):
                if getattr(body, name) is not None:
                    raise InvalidRequest(f"'{name}' needs messages", param=name)
            text = body.prompt or ""
            special = special is not False
        tokens = await self._encoder.encode(text, add_special_tokens=special)
        names = [self._service.tokenizer.token_text(token) for token in tokens] if body.return_token_strs else None
        answer = {"count": len(tokens), "max_model_len": self._service.max_model_len, "tokens": tokens}
        return JSONResponse(answer | {"token_strs": names})

    async def detokenize(self, request: Request) -> Response:
        """The text of token ids."""
        body = schema.parse(schema.DetokenizeRequest, await self._read(request))
        check_model(self._service, body.model)
        check_ids(self._service, body.tokens, "tokens")
        return JSONResponse({"prompt": self._service.tokenizer.decode(body.tokens, skip_special_tokens=False)})

    async def models(self) -> Response:
        """The one model that is served."""
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, model: str) -> Response:
        """The served model, by name."""
        check_model(self._service, model)
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        return {
            "id": self._service.model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "terrace",
            "max_model_len": self._service.max_model_len,
        }

    async def _read(self, request: Request) -> bytes:
        return await read_json_body(request.scope, request.receive, self._service.body_limits)

    async def _answer(
        self, request: Request, make: type[Format], plan: Plan, stream: bool, usage_in: schema.UsageIn
    ) -> Response:
        service = self._service

        def ways(generation: Generation) -> Ways:
            shape = shaped(service, make, generation)
            return Ways(shape.whole, lambda request_id: _events(generation, shape, usage_in, request_id))

        return await deliver(service, request, plan, ways, stream=stream)


async def read_if_welcome(service: Service, request: Request) -> bytes:
    """The body of what is to be generated, unless the tenant's limits are used up: then it need not be read."""
    service.tenants.check(request_tenant(request.scope))
    return await read_json_body(request.scope, request.receive, service.body_limits)


def shaped(service: Service, make: type[Format], generation: Generation) -> Format:
    """The format `make` of one new answer."""
    return make(service.tokenizer, uuid4().hex, int(service.wall_clock()), service.model_name, generation)


class Ways(NamedTuple):
    """How to answer one generation: at once, or by server-sent events, which get the request's id for the log. `heavy`:
    making the whole takes long, so it is done off the loop thread."""

    whole: Callable[[Sequence[Whole]], bytes]
    events: Callable[[str], AsyncGenerator[bytes, None]] | None = None
    heavy: bool = False

    async def answer(self, wholes: Sequence[Whole]) -> bytes:
        """The body of the answer at once."""
        return await asyncio.to_thread(self.whole, wholes) if self.heavy else self.whole(wholes)


async def deliver(
    service: Service, request: Request, plan: Plan, ways: Callable[[Generation], Ways], *, stream: bool
) -> Response:
    """Runs `plan` and answers in one of its `ways`. However it ends, and also when the client goes away, nothing of it
    goes on."""
    generation = Generation(service, plan, request.scope["state"].get(REQUEST_ID, ""))
    try:
        way = ways(generation)
        if stream:
            assert way.events is not None, "who streams has events"
            events = way.events(request.scope["state"].get(REQUEST_ID, ""))
            return EventStream(events, generation.close, service.limits.sse_keepalive_s)
        wholes = await unless_gone(request.receive, collect(generation))
    except BaseException:
        generation.close()
        raise
    generation.close()
    if wholes is None:
        return Response(status_code=CLIENT_GONE)
    return Response(await way.answer(wholes), media_type="application/json")


def told(error: Exception, request_id: str) -> TerraceError:
    """What a client is told of an error after its answer has begun; what nobody expected goes to the log."""
    if isinstance(error, TerraceError):
        return error
    # Type only: the message may quote the prompt.
    log.error("stream %s failed: %s", request_id, type(error).__name__, extra={REQUEST_ID: request_id})
    return UNEXPECTED


async def _events(
    generation: Generation, shape: Format, usage_in: schema.UsageIn, request_id: str
) -> AsyncGenerator[bytes, None]:
    """The SSE events of one answer. An error after the first byte is one `data:` event that holds an error body."""
    tail = "}\n\n" if usage_in == "none" else ',"usage":null}\n\n'
    try:
        if usage_in == "all":
            tail = shape.usage_tail()
        for chunk in shape.openings(tail):
            yield chunk
        async with aclosing(generation.pieces()) as pieces:
            async for choice, piece in pieces:
                if usage_in == "all":
                    tail = shape.usage_tail()
                yield shape.chunk(choice.index, piece, choice.stop_reason, tail)
    except Exception as error:  # noqa: BLE001 - the answer has begun, so the error goes into it
        yield event(error_body(told(error, request_id)))
        return
    if usage_in != "none":
        yield shape.usage_chunk()
    yield DONE
