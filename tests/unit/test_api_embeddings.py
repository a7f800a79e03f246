"""/v1/embeddings over a scripted engine, whose vectors are (tokens, first token, 4, 0)."""

from __future__ import annotations

import base64
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from tests.unit.api_fake import BOS, FakeEngine, client, make_app

PATH = "/v1/embeddings"


def unit(*components: float) -> Any:
    """About `components` at length 1."""
    return pytest.approx(np.array(components) / np.linalg.norm(components), abs=1e-6)


async def test_vectors_of_length_one_in_the_order_of_the_inputs() -> None:
    """Texts, token ids and lists of either; one prompt each, nothing generated; usage counts the prompts."""
    engine = FakeEngine()
    engine.cached_tokens = 1
    cases: list[tuple[Any, list[list[float]]]] = [
        ("ab", [[3, BOS, 4, 0]]),
        (["ab", "c"], [[3, BOS, 4, 0], [2, BOS, 4, 0]]),
        ([7, 8], [[2, 7, 4, 0]]),
        ([[7, 8], [9]], [[2, 7, 4, 0], [1, 9, 4, 0]]),
    ]
    async with client(make_app(engine)) as http:
        for given, expected in cases:
            answer = (await http.post(PATH, json={"input": given})).json()
            assert [item["index"] for item in answer["data"]] == list(range(len(expected)))
            assert [item["embedding"] for item in answer["data"]] == [unit(*row) for row in expected]
            tokens = int(sum(row[0] for row in expected))
            assert (answer["usage"]["prompt_tokens"], answer["usage"]["total_tokens"]) == (tokens, tokens)
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == len(expected)
    assert {(spec.params.max_tokens, spec.params.pooling) for spec in engine.submitted} == {(0, "last")}
    assert engine.open == {}


async def test_the_client_of_openai_reads_them() -> None:
    """The `openai` package asks for base64 and gets the same numbers; fewer dimensions are scaled to length 1 again."""
    transport = httpx.ASGITransport(make_app(FakeEngine()), raise_app_exceptions=True)
    http = httpx.AsyncClient(transport=transport)
    async with openai.AsyncOpenAI(api_key="none", base_url="http://terrace/v1", http_client=http) as api:
        whole = await api.embeddings.create(model="fake", input="ab")
        short = await api.embeddings.create(model="fake", input="ab", dimensions=2, encoding_format="float")
    assert whole.data[0].embedding == unit(3, BOS, 4, 0)
    assert short.data[0].embedding == unit(3, BOS)
    assert whole.usage.prompt_tokens == 3


async def test_base64_is_of_little_endian_floats() -> None:
    """What `encoding_format: base64` carries, byte for byte."""
    async with client(make_app(FakeEngine())) as http:
        body = {"input": [[3, 1]], "encoding_format": "base64", "dimensions": 1}
        answer = await http.post(PATH, json=body)
    assert base64.b64decode(answer.json()["data"][0]["embedding"]) == b"\x00\x00\x80\x3f"


async def test_what_vllm_adds_is_understood() -> None:
    """Truncation from the left, no special tokens, a salt, a priority and the background."""
    engine = FakeEngine()
    more = {"truncate_prompt_tokens": 2, "add_special_tokens": False, "cache_salt": "s", "priority": -1}
    async with client(make_app(engine)) as http:
        assert (await http.post(PATH, json={"input": "abcd", "service_tier": "flex"} | more)).status_code == 200
        assert (await http.post(PATH, json={"input": "x" * 600, "truncate_prompt_tokens": -1})).status_code == 200
    first, second = engine.submitted
    assert (bytes(first.prompt), first.cache_salt, first.service.priority) == (b"cd", "s", -1)
    assert first.service.background
    assert len(second.prompt) == engine.max_model_len


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": [999]}, "input"),
        ({"input": "x" * 600}, "input"),
        ({"input": ["a"] * 4}, "input"),
        ({"input": "a", "dimensions": 5}, "dimensions"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"input": "a", "stream": True}, "stream"),
        ({"input": "a", "model": "other"}, "model"),
    ],
    ids=str,
)
async def test_what_cannot_be_embedded_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    """Each is a 4xx whose `param` names the field; nothing reaches the engine."""
    engine = FakeEngine()
    async with client(make_app(engine, max_embedding_inputs=3)) as http:
        answer = await http.post(PATH, json=body)
    assert answer.status_code in (400, 404), answer.text
    assert answer.json()["error"]["param"] == param
    assert engine.submitted == []
