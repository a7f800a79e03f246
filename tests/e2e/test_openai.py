"""The daemon as its clients see it: the `openai` package and plain HTTP over a real socket, the real engine behind."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.daemon import NAME, Served, Wait

HELLO = "The copper key is in the old mill."
AB = {"97": 100, "98": 100}
"""Biases that leave only the letters a and b: text whose pieces can be foretold, drawn by the real sampler."""


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture(autouse=True)
def idle_afterwards(served: Served) -> Iterator[None]:
    """After every test the engine is idle and no block is held."""
    yield
    Wait().until(lambda: served.snapshot().running == served.snapshot().waiting == 0, "the engine is idle")
    assert served.snapshot().kv.tiers[0].referenced_blocks == 0


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    """The client finds the model by listing and by name, and is told when it does not exist."""
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "terrace"
    with pytest.raises(openai.NotFoundError) as refusal:
        client.models.retrieve("gpt-4")
    assert refusal.value.code == "model_not_found"


def test_completion_and_usage(client: openai.OpenAI) -> None:
    """A completion of as many tokens as asked for, counted."""
    answer = client.completions.create(model=NAME, prompt=HELLO, max_tokens=7, extra_body={"ignore_eos": True})
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(HELLO), 7)


def test_the_same_seed_gives_the_same_text(client: openai.OpenAI) -> None:
    """Streamed or not, alone or as one of several choices: the seed names the draw."""

    def ask(**more: Any) -> Any:
        return client.completions.create(model=NAME, prompt=HELLO, max_tokens=40, logit_bias=AB, seed=11, **more)

    alone = ask().choices[0].text
    assert set(alone) == {"a", "b"}
    assert ask().choices[0].text == alone
    assert "".join(chunk.choices[0].text for chunk in ask(stream=True)) == alone
    several = [choice.text for choice in ask(n=3).choices]
    assert several[0] == alone
    assert len(set(several)) == 3


def test_chat_whole_and_streamed(client: openai.OpenAI) -> None:
    """The streamed deltas add up to the whole message; the last chunk has the usage and no choices."""
    arguments: dict[str, Any] = {
        "model": NAME,
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is the key?"}],
        "max_completion_tokens": 20,
        "temperature": 0,
        "logit_bias": {"97": 30, "98": 30},
    }
    whole = client.chat.completions.create(**arguments)
    chunks = list(client.chat.completions.create(**arguments, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


async def test_the_asynchronous_client(served: Served) -> None:
    """Many requests of one asynchronous client run side by side; each says what it says alone."""
    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60) as client:

        async def ask(number: int) -> str:
            stream = await client.completions.create(
                model=NAME, prompt=f"number {number}", max_tokens=12, logit_bias=AB, seed=number, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

        together = await asyncio.gather(*(ask(number) for number in range(16)))
        assert [await ask(number) for number in range(16)] == together
    assert all(len(text) == 12 for text in together)
    assert len(set(together)) > 1


def test_cached_tokens_grow_when_a_prompt_comes_again(client: openai.OpenAI) -> None:
    """The second identical prompt is served from cached blocks and says so; another cache salt is not."""
    prompt = "a prompt that nobody else sends, long enough to fill several blocks of sixteen tokens each"

    def cached(**more: Any) -> int:
        answer = client.completions.create(model=NAME, prompt=prompt, max_tokens=2, extra_body=more)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        assert answer.usage.prompt_tokens_details.cached_tokens is not None
        return answer.usage.prompt_tokens_details.cached_tokens

    assert cached() == 0
    assert 64 <= cached() < len(prompt)
    assert cached(cache_salt="another tenant") == 0


def test_a_stop_string_across_tokens_ends_the_text(client: openai.OpenAI) -> None:
    """Every token is one letter, so the stop string spans two; the text ends before it, or after it if asked."""
    arguments: dict[str, Any] = {"model": NAME, "prompt": HELLO, "max_tokens": 60, "logit_bias": AB, "seed": 3}
    full = client.completions.create(**arguments).choices[0].text
    assert "ab" in full
    cut = client.completions.create(**arguments, stop=["zz", "ab"]).choices[0]
    assert (cut.text, cut.finish_reason) == (full[: full.index("ab")], "stop")
    kept = client.completions.create(**arguments, stop="ab", extra_body={"include_stop_str_in_output": True}).choices[0]
    assert kept.text == cut.text + "ab"


def test_logprobs_agree_with_greedy_choice(client: openai.OpenAI) -> None:
    """The greedy token is the likeliest of its alternatives, alternatives are sorted, offsets ascend."""
    answer = client.completions.create(model=NAME, prompt=HELLO, max_tokens=8, temperature=0, logprobs=3)
    shown = answer.choices[0].logprobs
    assert shown is not None
    assert shown.token_logprobs is not None
    assert shown.top_logprobs is not None
    for logprob, top in zip(shown.token_logprobs, shown.top_logprobs, strict=True):
        assert logprob == max(top.values()) <= 0
        assert list(top.values()) == sorted(top.values(), reverse=True)
    assert shown.text_offset == sorted(shown.text_offset or [])
    chat = client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": "hi"}],
        max_tokens=4,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
        extra_body={"ignore_eos": True},
    )
    assert chat.choices[0].logprobs is not None
    content = chat.choices[0].logprobs.content
    assert content is not None
    assert len(content) == 4
    assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in content)


def test_echoed_prompt_logprobs_are_those_of_generation(client: openai.OpenAI) -> None:
    """Scoring a greedy answer as a prompt gives the log-probabilities that it was generated with."""
    arguments: dict[str, Any] = {"model": NAME, "temperature": 0, "logprobs": 0}
    answer = client.completions.create(prompt=list(HELLO.encode()), max_tokens=6, logit_bias={"97": 20}, **arguments)
    text, shown = answer.choices[0].text, answer.choices[0].logprobs
    assert text == "aaaaaa"
    again = client.completions.create(prompt=HELLO + text, max_tokens=0, echo=True, **arguments).choices[0]
    assert again.text == HELLO + text
    assert again.logprobs is not None
    assert again.logprobs.token_logprobs is not None
    assert shown is not None
    assert again.logprobs.token_logprobs[0] is None
    assert again.logprobs.token_logprobs[-6:] == pytest.approx(shown.token_logprobs, abs=1e-4)


def test_best_of_and_many_prompts(client: openai.OpenAI) -> None:
    """best_of returns the likeliest of those it generated; prompts times choices come prompt-major."""
    arguments: dict[str, Any] = {"model": NAME, "max_tokens": 6, "seed": 5, "logprobs": 0}
    every = client.completions.create(prompt=HELLO, n=6, **arguments).choices
    best = client.completions.create(prompt=HELLO, best_of=6, **arguments).choices
    means = [sum(c.logprobs.token_logprobs or []) / len(c.logprobs.token_logprobs or [1]) for c in every if c.logprobs]
    assert len(best) == 1
    assert best[0].text == every[means.index(max(means))].text
    two = client.completions.create(prompt=["one", "two"], n=2, echo=True, **arguments).choices
    assert [choice.index for choice in two] == [0, 1, 2, 3]
    assert [choice.text[:3] for choice in two] == ["one", "one", "two", "two"]


def test_responses_whole_streamed_and_continued(client: openai.OpenAI) -> None:
    """The stream helper ends with what the whole answer says; its items are good input; the second turn is cached."""
    arguments: dict[str, Any] = {
        "model": NAME,
        "input": [{"role": "user", "content": "Where is the key? Tell me all that you know about it."}],
        "max_output_tokens": 24,
        "temperature": 0,
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 2,
        "extra_body": {"allowed_token_ids": [97, 98], "ignore_eos": True},
    }
    whole = client.responses.create(**arguments)
    assert whole.status == "incomplete"
    assert len(whole.output_text) == 24
    kinds = []
    with client.responses.stream(**arguments) as stream:
        for event in stream:
            kinds.append(event.type)
            if event.type == "response.incomplete":
                assert event.response.output_text == whole.output_text
                assert event.response.usage is not None
                assert event.response.usage.output_tokens == 24
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.incomplete"
    again: list[Any] = [*arguments["input"], *[item.model_dump() for item in whole.output]]
    again.append({"role": "user", "content": "And the mill?"})
    second = client.responses.create(**arguments | {"input": again})
    assert second.usage is not None
    assert second.usage.input_tokens_details.cached_tokens >= 48
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(whole.id)
    with pytest.raises(openai.BadRequestError) as refusal:
        client.responses.create(model=NAME, input="x", previous_response_id=whole.id)
    assert "whole conversation" in refusal.value.message


def test_embeddings(client: openai.OpenAI) -> None:
    """The same text gives the same vector, alone, beside others, cached or not; every vector has length 1."""
    texts = ["the key is in the mill", "the tower", "k" * 200]
    several = [item.embedding for item in client.embeddings.create(model=NAME, input=texts).data]
    assert [len(vector) for vector in several] == [32] * 3
    assert all(sum(x * x for x in vector) == pytest.approx(1, abs=1e-5) for vector in several)
    for text, vector in zip(texts, several, strict=True):
        answer = client.embeddings.create(model=NAME, input=text)
        assert answer.data[0].embedding == pytest.approx(vector, abs=1e-4)
    assert several[0] != pytest.approx(several[1], abs=1e-2)
    assert answer.usage.prompt_tokens == 200


def test_errors_arrive_as_the_client_knows_them(client: openai.OpenAI) -> None:
    """OpenAI's exception classes, with the field and the code, for what is refused."""
    with pytest.raises(openai.BadRequestError) as refusal:
        client.completions.create(model=NAME, prompt="x" * 600)
    assert refusal.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as refusal:
        client.chat.completions.create(
            model=NAME,
            messages=[{"role": "user", "content": "hi"}],
            tools=[{"type": "function", "function": {"name": "f"}}],
        )
    assert refusal.value.param == "tools"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_blocks_at_once(served: Served, stream: bool) -> None:
    """Closing the connection in the middle of a generation gives all its blocks back, unfinished."""
    aborted = 'finish_reason="abort",model_name="tiny"} '

    def count() -> float:
        with served.client() as http:
            return float(http.get("/metrics").text.split(aborted)[1].split("\n")[0])

    before = count()
    body = {"prompt": HELLO, "max_tokens": 470, "n": 8, "ignore_eos": True, "stream": stream}
    with httpx.Client(base_url=served.url, timeout=60, trust_env=False) as http:
        if stream:
            with http.stream("POST", "/v1/completions", json=body) as answer:
                assert next(answer.iter_lines()).startswith("data: ")
                assert served.snapshot().kv.tiers[0].referenced_blocks > 0
        else:
            connection = served.url.removeprefix("http://").split(":")
            with socket.create_connection((connection[0], int(connection[1]))) as raw:
                data = json.dumps(body).encode()
                head = ["POST /v1/completions HTTP/1.1", "Host: t", "Content-Type: application/json"]
                raw.sendall("\r\n".join([*head, f"Content-Length: {len(data)}", "", ""]).encode() + data)
                Wait().until(lambda: served.snapshot().running > 0, "the request runs")
    Wait().until(lambda: served.snapshot().running == served.snapshot().waiting == 0, "the request is aborted")
    assert served.snapshot().kv.tiers[0].referenced_blocks == 0
    assert count() > before


async def test_three_hundred_streaming_clients(served: Served) -> None:
    """Three hundred clients stream at once: none fails, each gets all its tokens, and no block stays held."""
    limits = httpx.Limits(max_connections=300)
    async with httpx.AsyncClient(base_url=served.url, timeout=120, limits=limits, trust_env=False) as http:

        async def stream(number: int) -> int:
            body = {"prompt": f"client {number} says", "max_tokens": 8, "stream": True, "ignore_eos": True}
            body["stream_options"] = {"include_usage": True}
            async with http.stream("POST", "/v1/completions", json=body) as answer:
                assert answer.status_code == 200
                lines = [line async for line in answer.aiter_lines() if line.startswith("data: ")]
            assert lines[-1] == "data: [DONE]"
            return int(json.loads(lines[-2][6:])["usage"]["completion_tokens"])

        counts = await asyncio.gather(*(stream(number) for number in range(300)))
    assert counts == [8] * 300
