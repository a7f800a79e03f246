"""Structured output as clients ask for it: the `openai` package over a real socket, the real engine behind."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, Field

from tests.e2e.daemon import NAME, Served

MESSAGES: Any = [{"role": "user", "content": "Where is the key?"}]
CLOSING = {str(ord(character)): 6 for character in '"}]'}
"""The model is random: without a push its texts would seldom end."""


class Key(BaseModel):
    """What a client defines as pydantic model."""

    metal: Literal["copper", "iron"]
    holes: int = Field(ge=1, le=9)
    places: list[bool] = Field(max_length=3)
    spare: str | None = Field(max_length=20)


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def test_a_pydantic_model_is_parsed(client: openai.OpenAI) -> None:
    """`parse` sends a strict schema and gets instances of the model, whatever the seed."""
    for seed in range(4):
        answer = client.chat.completions.parse(
            model=NAME, messages=MESSAGES, response_format=Key, seed=seed, logit_bias=CLOSING
        )
        assert answer.choices[0].finish_reason == "stop"
        key = answer.choices[0].message.parsed
        assert isinstance(key, Key)


def test_a_stream_of_it_adds_up(client: openai.OpenAI) -> None:
    """Streamed, the deltas are the very text of the unstreamed answer, and the client parses it as it comes."""
    asked: dict[str, Any] = {"model": NAME, "messages": MESSAGES, "seed": 5, "logit_bias": CLOSING}
    whole = client.chat.completions.parse(**asked, response_format=Key).choices[0].message
    with client.chat.completions.stream(**asked, response_format=Key) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion().choices[0]
    assert "".join(deltas) == whole.content
    assert final.message.parsed == whole.parsed
    assert final.finish_reason == "stop"


def test_what_contradicts_itself_is_the_clients_fault(client: openai.OpenAI) -> None:
    """Where the rest of the request bars all that its grammar allows, that is a 400, and in a stream an error."""
    asked: dict[str, Any] = {"model": NAME, "prompt": "a", "extra_body": {"guided_choice": ["0"], "bad_words": ["0"]}}
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(**asked)
    assert refused.value.code == "grammar_stuck"
    with pytest.raises(openai.APIError, match="nothing can follow"):
        list(client.completions.create(**asked, stream=True))


def test_any_json_object(client: openai.OpenAI) -> None:
    """`json_object`: every choice is an object; cut off, the reason is `length`."""
    asked: dict[str, Any] = {"model": NAME, "messages": MESSAGES, "response_format": {"type": "json_object"}}
    answer = client.chat.completions.create(**asked, n=4, seed=1, logit_bias=CLOSING | {"125": 20})
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        assert isinstance(json.loads(choice.message.content or ""), dict)
    cut = client.chat.completions.create(**asked, max_completion_tokens=1)
    assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == ("{", "length")


@pytest.mark.parametrize(
    ("extra", "pattern"),
    [
        ({"structured_outputs": {"regex": "[ab]{3}-[0-9]"}}, "[ab]{3}-[0-9]"),
        ({"structured_outputs": {"choice": ["yes", "no", "peut-être"]}}, "yes|no|peut-être"),
        ({"structured_outputs": {"grammar": 'root ::= "<" [a-z] ">"'}}, "<[a-z]>"),
        ({"structured_outputs": {"json": {"type": "boolean"}}}, "true|false"),
        ({"guided_choice": ["left", "right"], "ignore_eos": True}, "left|right"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": "é"}}}}, '"é"'),
    ],
)
def test_the_extensions_on_both_routes(client: openai.OpenAI, extra: dict[str, Any], pattern: str) -> None:
    """vLLM's fields, with completions and with chat, also where the model's end token is ignored."""
    text = client.completions.create(model=NAME, prompt="x", max_tokens=40, extra_body=extra).choices[0]
    chat = client.chat.completions.create(model=NAME, messages=MESSAGES, extra_body=extra).choices[0]
    for found, finish in ((text.text, text.finish_reason), (chat.message.content or "", chat.finish_reason)):
        assert re.fullmatch(pattern, found)
        assert finish == "stop"


def test_a_schema_that_cannot_be_enforced_is_refused(client: openai.OpenAI) -> None:
    """A 400 that names the field and the keyword, before anything runs."""
    schema = {"type": "array", "uniqueItems": True}
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(
            model=NAME,
            messages=MESSAGES,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        )
    assert refused.value.param == "response_format.json_schema.schema"
    assert "uniqueItems" in refused.value.message


def test_log_probabilities_are_of_the_model(client: openai.OpenAI) -> None:
    """They are of the raw distribution, one entry per token of the text."""
    answer = client.chat.completions.create(
        model=NAME, messages=MESSAGES, logprobs=True, extra_body={"structured_outputs": {"choice": ["abc"]}}
    )
    entries = answer.choices[0].logprobs
    assert entries is not None
    assert [entry.token for entry in entries.content or []] == ["a", "b", "c"]
    assert all(entry.logprob < -1 for entry in entries.content or [])
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3
