"""Responses and embeddings of the demo model behind its real surface, read by the `openai` package."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import openai
import pytest

from server.api.app import create_app
from server.build import service_of
from tests.system.harness import running

FACTS = "Mira keeps coins in Lisbon. The rain was cold that night. Tom plays chess. Anna speaks Danish."
ASKED = f"{FACTS} What does Tom play?"


@asynccontextmanager
async def demo(**settings: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    """A client of a daemon with the demo model."""
    async with running(model__dtype="float32", kv__device_gib="64MiB", **settings) as daemon:
        http = httpx.AsyncClient(transport=httpx.ASGITransport(create_app(service_of(daemon))))
        async with openai.AsyncOpenAI(api_key="none", base_url="http://terrace/v1", http_client=http) as api:
            yield api


async def test_the_demo_model_answers_in_items_and_in_events() -> None:
    """It recalls what the input said, whole and streamed, the second time from the cache."""
    async with demo() as api:
        whole = await api.responses.create(model="demo", input=ASKED, temperature=0)
        async with api.responses.stream(model="demo", input=ASKED, temperature=0) as stream:
            final = await stream.get_final_response()
    assert (whole.status, whole.output_text, final.output_text) == ("completed", "Tom plays chess.", "Tom plays chess.")
    assert whole.usage is not None
    assert final.usage is not None
    assert whole.usage.input_tokens_details.cached_tokens == 0
    assert final.usage.input_tokens_details.cached_tokens > 0


@pytest.mark.parametrize("pooling", ["mean", "last"])
async def test_the_same_text_has_the_same_vector(pooling: str) -> None:
    """Alone, beside others, cached or not, in one chunk or in many, for both ways of pooling."""
    found = []
    for chunk in (None, 8):
        settings = {"model__embedding_pooling": pooling, "scheduler__prefill_chunk_tokens": chunk}
        async with demo(**settings) as api:
            for texts in ([FACTS], [ASKED, FACTS]):
                answer = await api.embeddings.create(model="demo", input=texts)
                found.append(answer.data[-1].embedding)
                other = answer.data[0].embedding
    for vector in found:
        assert vector == pytest.approx(found[0], abs=1e-5)
    assert other != pytest.approx(found[0], abs=1e-2)
