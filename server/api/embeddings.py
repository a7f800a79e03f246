"""POST /v1/embeddings: the pooled hidden states of prompts, as vectors of length 1."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api import embedding_schema as wire
from server.api.auth import request_tenant
from server.api.generate import Generation, Whole
from server.api.openai import Ways, answers, body_of, deliver, errors, read_if_welcome
from server.api.parsing import parse
from server.api.requests import Encoder, plan_embeddings
from server.api.service import Service
from server.types import Vector


class EmbeddingRoutes:
    """The handler of one service. `router` is what the application includes."""

    def __init__(self, service: Service, encoder: Encoder) -> None:
        self._service = service
        self._encoder = encoder
        self.router = APIRouter()
        self.router.add_api_route(
            "/v1/embeddings",
            self.embeddings,
            methods=["POST"],
            openapi_extra=body_of(wire.EmbeddingRequest),
            responses=answers(wire.EmbeddingResponse) | errors(400, 401, 404, 408, 413, 415, 429, 500, 503),
        )

    async def embeddings(self, request: Request) -> Response:
        """Vectors of texts: near each other where the model sees the texts as alike."""
        body = parse(wire.EmbeddingRequest, await read_if_welcome(self._service, request))
        plan = await plan_embeddings(self._service, self._encoder, body, request_tenant(request.scope))
        return await deliver(
            self._service, request, plan, lambda made: embedding_ways(self._service, body, made), stream=False
        )


def embedding_ways(service: Service, body: wire.EmbeddingRequest, generation: Generation) -> Ways:
    """How to answer `body`."""

    def answer(wholes: Sequence[Whole]) -> bytes:
        encoded = body.encoding_format == "base64"
        data = []
        for index, whole in enumerate(wholes):
            assert whole.choice.pooled is not None, "a pooled prompt ends with its vector"
            vector = normalised(whole.choice.pooled[: body.dimensions])
            shown = base64.b64encode(vector.astype("<f4").tobytes()).decode() if encoded else vector.tolist()
            # One vector at a time: between two of them other threads come to their turn.
            data.append(json.dumps({"object": "embedding", "index": index, "embedding": shown}, separators=(",", ":")))
        usage = generation.usage()
        del usage["completion_tokens"]
        rest = json.dumps({"object": "list", "model": service.model_name, "usage": usage}, separators=(",", ":"))
        return f'{rest[:-1]},"data":[{",".join(data)}]}}'.encode()

    # A thousand vectors of 4,096 components are seconds of JSON.
    return Ways(answer, heavy=True)


def normalised(vector: Vector) -> Vector:
    """`vector` at length 1; one of zeros stays as it is."""
    length = float(np.linalg.norm(vector))
    return vector / np.float32(length) if length > 0 else vector
