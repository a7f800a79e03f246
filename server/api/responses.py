"""POST /v1/responses: a chat request in other words, and its answer as items and as events.

Nothing is stored: what refers to an earlier response is refused or not found.
"""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from server.api import response_schema as wire
from server.api.auth import request_tenant
from server.api.generate import Generation
from server.api.middleware import name_request
from server.api.openai import SSE, Ways, answers, body_of, deliver, errors, read_if_welcome
from server.api.parsing import parse
from server.api.requests import Encoder
from server.api.response_answer import ResponseAnswer
from server.api.response_plan import plan_response
from server.api.service import Service
from server.errors import InvalidRequest

PATH = "/v1/responses"


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
            answer = ResponseAnswer(self._service, body, generation)
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
