"""The OpenAI routes, and /tokenize and /detokenize beside them. Every handler runs on the loop thread."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from server.api import schema
from server.api.auth import TENANT
from server.api.errors import UNEXPECTED, error_body
from server.api.generate import Generation, collect
from server.api.middleware import REQUEST_ID, read_json_body
from server.api.render import ChatFormat, CompletionFormat, Format
from server.api.requests import Encoder, Plan, check_ids, check_model, plan_chat, plan_completion, render_chat
from server.api.service import Service
from server.api.sse import CLIENT_GONE, DONE, EventStream, event, unless_gone
from server.errors import InvalidRequest, TerraceError

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
    404: "The model does not exist here.",
    408: "The body did not arrive in time.",
    413: "The body is larger than the limit.",
    415: "The body is not declared as JSON.",
    429: "A queue is full, or a limit of the API key is reached; Retry-After says when to try again.",
    500: "The server failed on this request.",
    503: "Starting or shutting down; Retry-After says when to try again.",
}
_BODY_ERRORS = (400, 401, 404, 408, 413, 415, 500)
_SSE = {"text/event-stream": {"schema": {"type": "string", "description": "Chunks as server-sent events."}}}


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
            ok = answers(answer, **({"content": _SSE} if generates else {}))
            add(path, handler, methods=["POST"], openapi_extra=body_of(body), responses=ok | refusals)
        add("/v1/models", self.models, methods=["GET"], responses=answers(schema.ModelList) | errors(401))
        one = answers(schema.ModelCard) | errors(401, 404)
        add("/v1/models/{model:path}", self.model, methods=["GET"], responses=one)

    async def completions(self, request: Request) -> Response:
        """Generate text that goes on from a prompt."""
        body = schema.parse(schema.CompletionRequest, await self._read_if_welcome(request))
        plan = await plan_completion(self._service, self._encoder, body, _tenant(request))
        return await self._answer(request, CompletionFormat, plan, bool(body.stream), body.usage_in)

    async def chat(self, request: Request) -> Response:
        """Generate the assistant's next turn."""
        body = schema.parse(schema.ChatRequest, await self._read_if_welcome(request))
        plan = await plan_chat(self._service, self._encoder, body, _tenant(request))
        return await self._answer(request, ChatFormat, plan, bool(body.stream), body.usage_in)

    async def tokenize(self, request: Request) -> Response:
        """The token ids of a prompt or of a rendered conversation."""
        body = schema.parse(schema.TokenizeRequest, await self._read(request))
        check_model(self._service, body.model)
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequest("exactly one of 'prompt' and 'messages' is required", param="prompt")
        special = body.add_special_tokens
        if body.messages is not None:
            add_prompt = body.add_generation_prompt is not False
            text = render_chat(self._service, body.messages, add_prompt, body.chat_template_kwargs or {})
            special = bool(special)
        else:
            if body.add_generation_prompt is not None or body.chat_template_kwargs is not None:
                raise InvalidRequest(
                    "'add_generation_prompt' and 'chat_template_kwargs' need messages", param="add_generation_prompt"
                )
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

    async def _read_if_welcome(self, request: Request) -> bytes:
        """The body of what is to be generated, unless the tenant's limits are used up: then it need not be read."""
        self._service.tenants.check(_tenant(request))
        return await self._read(request)

    async def _read(self, request: Request) -> bytes:
        return await read_json_body(request.scope, request.receive, self._service.limits.max_body_bytes)

    async def _answer(
        self, request: Request, make: type[Format], plan: Plan, stream: bool, usage_in: schema.UsageIn
    ) -> Response:
        generation = Generation(self._service, plan)
        try:
            created = int(self._service.wall_clock())
            name = self._service.model_name
            shape = make(self._service.tokenizer, uuid4().hex, created, name, generation)
            if stream:
                events = _events(generation, shape, usage_in, request.scope["state"].get(REQUEST_ID, ""))
                return EventStream(events, generation.close, self._service.limits.sse_keepalive_s)
            wholes = await unless_gone(request.receive, collect(generation))
        except BaseException:
            generation.close()
            raise
        generation.close()
        if wholes is None:
            return Response(status_code=CLIENT_GONE)
        return Response(shape.whole(wholes), media_type="application/json")


def _tenant(request: Request) -> str:
    return str(request.scope.get("state", {}).get(TENANT, ""))


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
    except TerraceError as error:
        yield event(error_body(error))
        return
    except Exception as error:  # noqa: BLE001 - the answer has begun, so the error goes into it
        # Type only: the message may quote the prompt.
        log.error("stream %s failed: %s", request_id, type(error).__name__, extra={REQUEST_ID: request_id})
        yield event(error_body(UNEXPECTED))
        return
    if usage_in != "none":
        yield shape.usage_chunk()
    yield DONE
