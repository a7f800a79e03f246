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
from server.api.errors import UNEXPECTED
from server.api.generate import Generation, collect
from server.api.render import ChatFormat, CompletionFormat, Format
from server.api.requests import Encoder, Plan, check_model, plan_chat, plan_completion
from server.api.service import Service
from server.batches.records import Answer, Tokens
from server.errors import InvalidRequest, TerraceError

log = logging.getLogger("terrace.batches")

_BACKGROUND = {"service_tier": "flex", "ttft_target_ms": None, "tpot_target_ms": None}


@dataclass(frozen=True)
class Endpoint:
    """A route that generates: its body, how that becomes a plan, and how the answer looks."""

    body: type[schema.GenerationRequest]
    plan: Callable[[Service, Encoder, Any, str], Awaitable[Plan]]
    shape: type[Format]


ENDPOINTS: Mapping[str, Endpoint] = {
    "/v1/completions": Endpoint(schema.CompletionRequest, plan_completion, CompletionFormat),
    "/v1/chat/completions": Endpoint(schema.ChatRequest, plan_chat, ChatFormat),
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

    def _parse(self, endpoint: str, line: bytes) -> tuple[BatchLine, schema.GenerationRequest]:
        parsed = schema.parse(BatchLine, line)
        if parsed.url != endpoint:
            raise InvalidRequest(f"'url' must be the batch's endpoint, {endpoint}", param="url")
        try:
            body = schema.parse(endpoint_named(endpoint).body, json.dumps(parsed.body).encode())
        except InvalidRequest as error:
            raise InvalidRequest(error.message, param=f"body.{error.param}", code=error.code) from None
        if body.stream:
            raise InvalidRequest("'stream' must be false or absent in a batch", param="body.stream")
        return parsed, body

    async def _answer(self, endpoint: Endpoint, body: schema.GenerationRequest, tenant: str) -> Answer:
        service = self._service
        plan = await endpoint.plan(service, self._encoder, body.model_copy(update=_BACKGROUND), tenant)
        id = uuid4().hex
        generation = Generation(service, plan, id)
        try:
            created = int(service.wall_clock())
            shape = endpoint.shape(service.tokenizer, id, created, service.model_name, generation)
            whole = shape.whole(await collect(generation))
            usage = generation.usage()
        finally:
            generation.close()
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return Answer(whole, Tokens(usage["prompt_tokens"], cached, usage["completion_tokens"]))
