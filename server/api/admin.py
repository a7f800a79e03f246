"""The cache as an operator handles it: look up, pin, prefetch, evict, clear. Guarded by keys of its own (`auth.py`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from server.api import schema
from server.api.auth import ADMIN_PREFIX
from server.api.body import read_json_body
from server.api.chat import render_chat
from server.api.openai import answers, body_of, errors
from server.api.requests import Encoder, cache_salt, check_ids, check_model
from server.api.service import Service
from server.errors import InvalidRequest, NotFound, NotReady
from server.explain import Explanation
from server.tenants import digest_of
from server.types import BlockHash

MAX_SHOWN_ID = 128


class AdminRoutes:
    """The handlers of one service. Every chain is named as a request would name it: prompt or messages, salt, key."""

    def __init__(self, service: Service, encoder: Encoder) -> None:
        self._service = service
        self._encoder = encoder
        self.router = APIRouter()
        add = self.router.add_api_route
        chains: list[tuple[str, Callable[..., Any], type[BaseModel], type[BaseModel]]] = [
            ("lookup", self.lookup, schema.CacheRequest, schema.CacheLookup),
            ("pin", self.pin, schema.CachePinRequest, schema.CacheCount),
            ("unpin", self.unpin, schema.CacheRequest, schema.CacheCount),
            ("prefetch", self.prefetch, schema.CacheRequest, schema.CacheCount),
            ("evict", self.evict, schema.CacheRequest, schema.CacheCount),
        ]
        refusals = errors(400, 401, 404, 408, 413, 415, 429, 500, 503)
        for name, handler, body, answer in chains:
            path = f"{ADMIN_PREFIX}/{name}"
            add(path, handler, methods=["POST"], openapi_extra=body_of(body), responses=answers(answer) | refusals)
        counted = answers(schema.CacheCount) | errors(401, 404, 503)
        add(f"{ADMIN_PREFIX}/clear", self.clear, methods=["POST"], responses=counted)
        explained = answers(schema.Explanations) | errors(400, 401, 404)
        add(f"{ADMIN_PREFIX}/explain", self.explain_many, methods=["GET"], responses=explained)
        add(f"{ADMIN_PREFIX}/explain/{{request_id}}", self.explain, methods=["GET"], responses=explained)
        shown = answers(schema.CacheStats) | errors(401, 404)
        add(f"{ADMIN_PREFIX}/stats", self.stats, methods=["GET"], responses=shown)

    async def lookup(self, request: Request) -> Response:
        """What is cached of this prompt, where, and whether a request would load or compute it, and why."""
        tokens, hashes = await self._chain(await self._body(request, schema.CacheRequest))
        size = self._service.engine.kv.layout.block_tokens
        found = self._service.engine.cache_lookup(hashes)
        spans = [
            {
                "tier": span.tier,
                "tokens": span.blocks * size,
                "decision": span.decision,
                "reason": span.reason,
                "load_s": span.load_s,
                "compute_s": span.compute_s,
            }
            for span in found
        ]
        cached = sum(span.blocks for span in takewhile(lambda span: span.tier is not None, found)) * size
        return JSONResponse({"prompt_tokens": tokens, "cached_tokens": cached, "spans": spans})

    async def pin(self, request: Request) -> Response:
        """Keep the cached beginning of this prompt for a time. 0 blocks: none is cached, or pins hold their share."""
        body = await self._body(request, schema.CachePinRequest)
        _, hashes = await self._chain(body)
        return self._counted(self._service.engine.cache_pin(hashes, body.ttl_s))

    async def unpin(self, request: Request) -> Response:
        """End the pins on this prompt; `blocks` counts pins."""
        _, hashes = await self._chain(await self._body(request, schema.CacheRequest))
        return self._counted(self._service.engine.cache_unpin(hashes))

    async def prefetch(self, request: Request) -> Response:
        """Bring what is on SSD of this prompt up to DRAM; answers at once with what is on its way."""
        _, hashes = await self._chain(await self._body(request, schema.CacheRequest))
        return self._counted(self._service.engine.cache_prefetch(hashes))

    async def evict(self, request: Request) -> Response:
        """Forget this prompt, in every tier, as far as no request uses it and no pin keeps it."""
        _, hashes = await self._chain(await self._body(request, schema.CacheRequest))
        return self._counted(self._service.engine.cache_evict(hashes))

    async def clear(self) -> Response:
        """Forget everything that no request uses and no pin keeps; `blocks` counts copies."""
        self._check_ready()
        return self._counted(self._service.engine.cache_clear())

    async def stats(self) -> Response:
        """Every tier and every hop, as of now."""
        kv = self._service.engine.snapshot().kv
        tiers = [
            {
                "name": tier.name,
                "up": tier.up,
                "capacity_bytes": tier.capacity_blocks * kv.block_bytes,
                "used_bytes": (tier.capacity_blocks - tier.free_blocks) * kv.block_bytes,
                "evicted_blocks": dict(tier.evicted),
                "declined_blocks": dict(tier.declined),
            }
            for tier in kv.tiers
        ]
        hops = [
            {
                "source": hop.source,
                "target": hop.target,
                "moved_bytes": hop.moved_blocks * kv.block_bytes,
                "bytes_per_s": kv.block_bytes / hop.block_s if hop.moved_blocks and hop.block_s else 0.0,
                "in_flight_blocks": hop.in_flight_blocks,
                "waiting_blocks": hop.waiting_blocks,
                "failed": dict(hop.failed),
            }
            for hop in kv.hops
        ]
        answer = {"block_bytes": kv.block_bytes, "block_tokens": kv.block_tokens, "tiers": tiers, "hops": hops}
        return JSONResponse(answer | {"recovered_blocks": kv.recovered_blocks, "pinned_blocks": kv.pinned_blocks})

    async def explain(self, request_id: str) -> Response:
        """Why the sequences of one request went as they did; its id is the X-Request-Id that its answer carried."""
        found = self._service.engine.explanations.find(request_id)
        if not found:
            raise NotFound(f"there is no request {request_id[:MAX_SHOWN_ID]!r} among the last that ended")
        return self._explained(found)

    async def explain_many(self, limit: int = Query(20, ge=1, le=1000), slowest: bool = False) -> Response:
        """The same of those that ended last, or of the slowest of the last few hundred, by their first token."""
        explanations = self._service.engine.explanations
        return self._explained(explanations.slowest(limit) if slowest else explanations.latest(limit))

    def _explained(self, found: Sequence[Explanation]) -> Response:
        offset_s = self._service.engine.explanations.wall_offset_s
        return JSONResponse({"requests": [one.report(offset_s) for one in found]})

    async def _body(self, request: Request, model: type[Any]) -> Any:
        raw = await read_json_body(request.scope, request.receive, self._service.body_limits)
        return schema.parse(model, raw)

    async def _chain(self, body: schema.CacheRequest) -> tuple[int, list[BlockHash]]:
        """Tokens of the prompt, and the hashes of its full blocks."""
        self._check_ready()
        check_model(self._service, body.model)
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequest("exactly one of 'prompt' and 'messages' is required", param="prompt")
        if body.messages is not None:
            text = render_chat(self._service, body.messages, True, {}, tools=body.tools)
            ids = await self._encoder.encode(text, add_special_tokens=False)
        elif isinstance(body.prompt, str):
            ids = await self._encoder.encode(body.prompt, add_special_tokens=True)
        else:
            ids = list(body.prompt or ())
            check_ids(self._service, ids, "prompt")
        salt = cache_salt(self._tenant(body), body.cache_salt)
        return len(ids), self._service.engine.chain(ids, salt)

    def _tenant(self, body: schema.CacheRequest) -> str:
        tenants = self._service.tenants
        if body.tenant is not None and body.api_key is None:
            found, param = tenants.id_of(body.tenant), "tenant"
        elif body.api_key is not None and body.tenant is None:
            found, param = tenants.find(digest_of(body.api_key)), "api_key"
        elif body.tenant is not None or tenants.guarded:
            raise InvalidRequest("exactly one of 'tenant' and 'api_key' says whose blocks are meant", param="api_key")
        else:
            return ""
        if found is None:
            raise InvalidRequest(f"'{param}' is none of this server", param=param)
        return found

    def _check_ready(self) -> None:
        if self._service.engine.state != "ready":
            raise NotReady(f"the server is {self._service.engine.state}")

    def _counted(self, blocks: int) -> Response:
        return JSONResponse({"blocks": blocks, "tokens": blocks * self._service.engine.kv.layout.block_tokens})
