"""The page of parameters is what the request models say, and no parameter of OpenAI's is unknown to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_type_hints

import pytest
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from server.api import parameters
from tests.unit.api_fake import FakeEngine, client, make_app

SDK: dict[str, Any] = {
    "/v1/completions": completion_create_params.CompletionCreateParamsStreaming,
    "/v1/chat/completions": chat_create_params.CompletionCreateParamsStreaming,
    "/v1/responses": response_create_params.ResponseCreateParamsStreaming,
    "/v1/embeddings": embedding_create_params.EmbeddingCreateParams,
}
LEAST = {
    "/v1/completions": {"prompt": "a"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
    "/v1/responses": {"input": "a"},
    "/v1/embeddings": {"input": "a"},
}


def test_the_page_is_up_to_date():
    """PARAMETERS.md is what `python -m server.api.parameters` prints."""
    shipped = Path(parameters.__file__).with_name("PARAMETERS.md").read_text(encoding="utf-8")
    assert shipped == parameters.page()


@pytest.mark.parametrize("route", parameters.ROUTES)
def test_every_parameter_of_openai_is_known(route):
    """Each name in the client's types, which come from OpenAI's published specification, is on the page as OpenAI's."""
    rows = {row.name: row for row in parameters.parameters(route)}
    named = set(get_type_hints(SDK[route]))
    assert named - rows.keys() == set()
    assert {name for name in named if not rows[name].of_openai} == set()
    assert parameters.ROUTES[route][1] - rows.keys() == set()


@pytest.mark.parametrize("route", parameters.ROUTES)
async def test_the_page_tells_the_truth(route):
    """What the page calls refused is a 400 that names the field as unsupported, not as unknown; what it calls accepted
    changes nothing of what the engine is asked for."""
    engine = FakeEngine()
    taken = {"boolean": True, "string": "x", "object": {"a": "b"}, "integer": 3}
    async with client(make_app(engine)) as http:
        await http.post(route, json=LEAST[route] | {"seed": 1} if route != "/v1/embeddings" else LEAST[route])
        plain = engine.submitted.pop()
        for row in parameters.parameters(route):
            if row.status == parameters.REFUSED:
                answer = await http.post(route, json=LEAST[route] | {row.name: ["x"]})
                error = answer.json()["error"]
                assert (answer.status_code, error["param"]) == (400, row.name)
                assert "not supported" in error["message"] or "must be absent" in error["message"]
            elif row.status == parameters.ACCEPTED:
                body = LEAST[route] | {row.name: taken[row.values.partition(",")[0]]}
                body |= {} if route == "/v1/embeddings" else {"seed": 1}
                assert (await http.post(route, json=body)).status_code == 200, row.name
                assert engine.submitted.pop() == plain
            elif row.status == parameters.DEFAULT_ONLY:
                answer = await http.post(route, json=LEAST[route] | {row.name: "another"})
                assert answer.status_code == 400
                assert answer.json()["error"]["param"].startswith(row.name)
    assert engine.submitted == []
