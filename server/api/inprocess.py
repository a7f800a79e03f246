"""Requests that come from a batch and not from a socket: the same checks, the same engine, the same answers.

They run in the background (`service_tier: flex`) whatever they say: a batch is what the idle device is for.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from server.api import schema
from server.api.batch_schema import BatchLine
from server.api.embedding_schema import EmbeddingRequest
from server.api.embeddings import embedding_ways
from server.api.errors import UNEXPECTED
from server.api.generate import Generation, collect
from server.api.openai import Ways, shaped
from server.api.render import ChatFormat, CompletionFormat
from server.api.requests import Encoder, Plan, check_model, plan_chat, plan_completion, plan_embeddings
from server.api.response_answer import ResponseAnswer
from server.api.response_plan import plan_response
from server.api.response_schema import ResponseRequest
from server.api.service import Service
from server.batches.records import Answer, Tokens
from server.errors import InvalidRequest, TerraceError

log = logging.getLogger("terrace.batches")

_BACKGROUND = {"service_tier": "flex", "ttft_target_ms": None, "tpot_target_ms": None}


Body = schema.GenerationRequest | EmbeddingRequest


@dataclass(frozen=True)
class Endpoint:
    """A route whose requests may stand in a batch: its body, how that becomes a plan, and how it is answered."""

    body: type[Body]
    plan: Callable[[Service, Encoder, Any, str], Awaitable[Plan]]
    ways: Callable[[Service, Any, Generation], Ways]


ENDPOINTS: Mapping[str, Endpoint] = {
    "/v1/completions": Endpoint(
        schema.CompletionRequest,
        plan_completion,
        lambda service, body, made: Ways(shaped(service, CompletionFormat, made).whole),
    ),
    "/v1/chat/completions": Endpoint(
        schema.ChatRequest,
        plan_chat,
        lambda service, body, made: Ways(shaped(service, ChatFormat, made).whole),
    ),
    "/v1/responses": Endpoint(
        ResponseRequest,
        plan_response,
        lambda service, body, made: Ways(ResponseAnswer(service, body, made).whole),
    ),
    "/v1/embeddings": Endpoint(EmbeddingRequest, plan_embeddings, embedding_ways),
}


def endpoint_named(name: str) -> Endpoint:
    """Raises InvalidRequest when batches cannot use it."""
    if name not in ENDPOINTS:
        raise InvalidRequest(f"'endpoint' must be one of {', '.join(ENDPOINTS)}", param="endpoint")
    return ENDPOINTS[name]


class InProcess:
    """Answers lines of batches over one service."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._encoder = Encoder(service.tokenizer)
        """Its own, so that long prompts of batches leave the queue for those of clients alone."""

    def check(self, endpoint: str, line: bytes) -> str:
        """The line's `custom_id`. Any thread. Raises TerraceError when it can be told already that it cannot be run."""
        parsed, body = self._parse(endpoint, line)
        check_model(self._service, body.model)
        return parsed.custom_id

    async def answer(self, endpoint: str, line: bytes, tenant: str) -> Answer:
        """Runs the line; whoever cancels this aborts it. Loop thread. Raises TerraceError."""
        try:
            return await self._answer(endpoint_named(endpoint), self._parse(endpoint, line)[1], tenant)
        except TerraceError:
            raise
        except Exception as error:
            # Type only: the message may quote the prompt.
            log.error("a line of a batch failed: %s", type(error).__name__)
            raise UNEXPECTED from error

    def _parse(self, endpoint: str, line: bytes) -> tuple[BatchLine, Body]:
        parsed = schema.parse(BatchLine, line)
        if parsed.url != endpoint:
            raise InvalidRequest(f"'url' must be the batch's endpoint, {endpoint}", param="url")
        try:
            body: Body = schema.parse(endpoint_named(endpoint).body, json.dumps(parsed.body).encode())
        except InvalidRequest as error:
            raise InvalidRequest(error.message, param=f"body.{error.param}", code=error.code) from None
        if isinstance(body, schema.GenerationRequest) and body.stream:
            raise InvalidRequest("'stream' must be false or absent in a batch", param="body.stream")
        return parsed, body

    async def _answer(self, endpoint: Endpoint, body: Body, tenant: str) -> Answer:
        service = self._service
        idle = {name: value for name, value in _BACKGROUND.items() if name in type(body).model_fields}
        body = body.model_copy(update=idle)
        plan = await endpoint.plan(service, self._encoder, body, tenant)
        generation = Generation(service, plan, uuid4().hex)
        try:
            way = endpoint.ways(service, body, generation)
            whole = await way.answer(await collect(generation))
            usage = generation.usage()
        finally:
            generation.close()
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return Answer(whole, Tokens(usage["prompt_tokens"], cached, usage["completion_tokens"]))
