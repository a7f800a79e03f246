"""What is refused and how, and what the engine is asked for when it is not."""

from __future__ import annotations

import asyncio
import functools
import json
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api import requests, schema
from server.api.embedding_schema import EmbeddingRequest
from server.api.response_schema import ResponseRequest
from server.errors import InvalidRequest
from server.types import NO_TARGETS, ONLINE, Targets
from tests.unit.api_fake import EOS, ByteTokenizer, FakeEngine, client, make_app, text_reply

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
TEXT = {"prompt": "abc"}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def tool_with(inside: Any) -> dict[str, Any]:
    """A tool whose parameters hold `inside` somewhere."""
    return {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "x-inside": inside}}}


NESTED: Any = functools.reduce(lambda inner, _: {"items": inner}, range(32), {})
BOTH: list[tuple[dict[str, Any], str | None]] = [
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 11}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"presence_penalty": 2.1}, "presence_penalty"),
    ({"frequency_penalty": -2.1}, "frequency_penalty"),
    ({"logit_bias": []}, "logit_bias"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"٣": 1}}, "logit_bias"),
    ({"logit_bias": {"258": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {"1": True}}, "logit_bias"),
    ({"logit_bias": {str(i): 0 for i in range(1025)}}, "logit_bias"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"n": 10**30}, "n"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": 10**12}, "max_tokens"),
    ({"min_tokens": 17, "max_tokens": 16}, "min_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"stop": 1}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": ["x", 1]}, "stop"),
    ({"stop": [str(i) for i in range(17)]}, "stop"),
    ({"stop": "x" * 1025}, "stop"),
    ({"stop_token_ids": [258]}, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ({"stop_token_ids": "x"}, "stop_token_ids"),
    ({"seed": 2**63}, "seed"),
    ({"seed": "x"}, "seed"),
    ({"priority": 1001}, "priority"),
    ({"service_tier": "scale"}, "service_tier"),
    ({"service_tier": 1}, "service_tier"),
    ({"ttft_target_ms": 0}, "ttft_target_ms"),
    ({"ttft_target_ms": "1s"}, "ttft_target_ms"),
    ({"ttft_target_ms": 1e9}, "ttft_target_ms"),
    ({"tpot_target_ms": -1}, "tpot_target_ms"),
    ({"tpot_target_ms": True}, "tpot_target_ms"),
    ({"cache_salt": "x" * 257}, "cache_salt"),
    ({"cache_salt": 1}, "cache_salt"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usages": True}}, "stream_options.include_usages"),
    ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"ignore_eos": 1}, "ignore_eos"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    ({"allowed_token_ids": []}, "allowed_token_ids"),
    ({"allowed_token_ids": [258]}, "allowed_token_ids"),
    ({"bad_words": "x"}, "bad_words"),
    ({"bad_words": [""]}, "bad_words[0]"),
    ({"bad_words": ["\ud800"]}, None),
    ({"return_token_ids": "yes"}, "return_token_ids"),
    ({"return_tokens_as_token_ids": 1}, "return_tokens_as_token_ids"),
    ({"add_special_tokens": 1}, "add_special_tokens"),
    ({"request_id": "a b"}, "request_id"),
    ({"request_id": ""}, "request_id"),
    ({"spaces_between_special_tokens": False}, "spaces_between_special_tokens"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"length_penalty": 0.5}, "length_penalty"),
    ({"stream_interval": 10}, "stream_interval"),
    ({"user": {}}, "user"),
    ({"model": ""}, "model"),
    ({"tempreature": 1}, "tempreature"),
    ({"": 1}, None),
]
ONLY_TEXT: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["a", ""]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": ["a", [1]]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [1.0]}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": {}}, "prompt"),
    ({"prompt": [258]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [10**40]}, "prompt"),
    ({"prompt": ["a"] * 65}, "prompt"),
    ({"prompt": "x" * 512}, "prompt"),
    ({"max_tokens": 509}, "prompt"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"suffix": "x"}, "suffix"),
    ({"best_of": 1, "n": 2}, "best_of"),
    ({"best_of": 17}, "best_of"),
    ({"best_of": 2, "stream": True}, "best_of"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"echo": "x"}, "echo"),
    ({"messages": []}, "messages"),
]
ONLY_CHAT: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
    ({"messages": [{"role": "tool", "tool_call_id": "x"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "x", "tool_call_id": "x"}]}, "messages[0].tool_call_id"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages[0].tool_calls"),
    ({"messages": [{"role": "user", "content": "x", "reasoning_content": "x"}]}, "messages[0].reasoning_content"),
    ({"messages": [{"role": "assistant", "tool_calls": [CALL]}]}, "messages[0].tool_calls"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [CALL | {"type": "custom"}]}]},
        "messages[0].tool_calls[0].type",
    ),
    (
        {"messages": [{"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}}]},
        "messages[0].function_call",
    ),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].id"),
    ({"messages": [{"role": "user", "content": "x", "weight": 1}]}, "messages[0].weight"),
    ({"messages": [{"role": "user", "content": "x" * 600}]}, "messages"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 4, "max_completion_tokens": 5}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"logprobs": 2}, "logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"best_of": 2}, "best_of"),
    ({"echo": True}, "echo"),
    ({"prompt": "x"}, "prompt"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "x" * 65}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}, "tools[0].function.parameters"),
    ({"tools": [tool_with("x" * 65_536)]}, "tools[0].function.parameters"),
    ({"tools": [tool_with(NESTED)]}, "tools[0].function.parameters"),
    ({"tools": [tool_with({"maximum": float("nan")})]}, "tools[0].function.parameters"),
    ({"tools": [tool_with({})] * 129}, "tools"),
    ({"tools": [tool_with({})]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": "any"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
    ({"tool_choice": {"type": "custom", "custom": {"name": "f"}}}, "tool_choice.type"),
    (
        {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "none", "tools": []}}},
        "tool_choice.allowed_tools.mode",
    ),
    ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
    ({"documents": [{"text": "x"}]}, "documents"),
    ({"documents": ["x"]}, "documents[0]"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ({"include_reasoning": 1}, "include_reasoning"),
    ({"reasoning_effort": "huge"}, "reasoning_effort"),
    ({"reasoning_effort": "none"}, "reasoning_effort"),
    ({"functions": [{}]}, "functions"),
    ({"function_call": {"name": "f"}}, "function_call"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"prediction": {}}, "prediction"),
    ({"reasoning_effort": "low"}, "reasoning_effort"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"chat_template_kwargs": {"a": []}}, "chat_template_kwargs.a"),
    ({"chat_template_kwargs": {"a": 1e300}}, "chat_template_kwargs.a"),
    ({"chat_template_kwargs": {"tools": "x"}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"add_generation_prompt": False}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"fail": True}}, "messages"),
]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [("/v1/completions", TEXT | extra, param) for extra, param in BOTH + ONLY_TEXT]
    + [("/v1/chat/completions", CHAT | extra, param) for extra, param in BOTH + ONLY_CHAT],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else None,
)
async def test_what_cannot_be_served_is_refused_by_name(path: str, body: dict[str, Any], param: str | None) -> None:
    """Every bad value is a 4xx whose `param` names the field and whose message does too; nothing reaches the engine."""
    engine = FakeEngine()
    async with client(make_app(engine)) as http:
        answer = await http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code in (400, 404), answer.text
    error = answer.json()["error"]
    if param is not None and not (param.startswith("stop_token_ids") and "[" in str(error["param"])):
        expected = (
            "messages" if path.endswith("chat/completions") and param == "prompt" and "prompt" not in body else param
        )
        assert error["param"] == expected, error
    if error["param"] and error["code"] not in ("context_length_exceeded", "model_not_found"):
        assert error["param"].split("[")[0].split(".")[0] in error["message"]
    assert engine.submitted == []


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 400, "9" * 5000])
async def test_numbers_that_json_lacks_are_refused(text: str) -> None:
    """NaN, infinities and floats that overflow are a 400 in every numeric field."""
    engine = FakeEngine()
    async with client(make_app(engine)) as http:
        for name in ("temperature", "top_p", "top_k", "n", "max_tokens", "seed", "presence_penalty", "logprobs"):
            body = f'{{"prompt": "a", "{name}": {text}}}'
            answer = await http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
            assert answer.status_code == 400, (name, answer.text)
        body = f'{{"prompt": "a", "logit_bias": {{"1": {text}}}}}'
        answer = await http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400
    assert engine.submitted == []


async def test_context_length_is_refused_with_the_numbers() -> None:
    """Prompt plus output beyond the model's length is OpenAI's context_length_exceeded and says by how much."""
    async with client(make_app(FakeEngine(max_model_len=20))) as http:
        error = (await http.post("/v1/completions", json={"prompt": "x" * 9, "max_tokens": 11})).json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert "maximum context length is 20 tokens" in error["message"]
        assert "requested 21 tokens (10 in the prompt, 11 for the completion)" in error["message"]
        assert (await http.post("/v1/completions", json={"prompt": "x" * 9, "max_tokens": 10})).status_code == 200
        messages = [{"role": "user", "content": "x" * 30}]
        error = (await http.post("/v1/chat/completions", json={"messages": messages})).json()["error"]
        assert error["code"] == "context_length_exceeded"


async def test_prompts_are_cut_from_the_left_if_asked() -> None:
    """`truncate_prompt_tokens` keeps the end, also of what is echoed; -1 leaves just the room that the output needs."""
    engine = FakeEngine(text_reply("ok"), max_model_len=40)
    async with client(make_app(engine)) as http:
        for extra in (
            {"prompt": "abcdef", "truncate_prompt_tokens": 3, "echo": True},
            {"prompt": "x" * 90, "truncate_prompt_tokens": -1, "max_tokens": 30},
            {"prompt": list(range(90)), "truncate_prompt_tokens": -1, "max_tokens": 39},
            {"prompt": "ab", "truncate_prompt_tokens": 30, "add_special_tokens": False},
        ):
            answer = await http.post("/v1/completions", json=extra)
            assert answer.status_code == 200, answer.text
        messages = [{"role": "user", "content": "x" * 90}]
        chat = {"messages": messages, "truncate_prompt_tokens": -1, "add_special_tokens": True, "max_tokens": 5}
        assert (await http.post("/v1/chat/completions", json=chat)).status_code == 200
    prompts = [list(spec.prompt) for spec in engine.submitted]
    assert prompts[0] == list(b"def")
    assert [len(prompt) for prompt in prompts[1:]] == [10, 1, 2, 35]
    assert prompts[3] == list(b"ab")


async def test_words_and_tokens_to_keep_to_reach_the_engine() -> None:
    """Bad words as the tokenizer writes them, alone and after a space; allowed tokens once each."""
    engine = FakeEngine()
    async with client(make_app(engine)) as http:
        for path, body in (("/v1/completions", TEXT), ("/v1/chat/completions", CHAT)):
            more = {"bad_words": ["no", " x"], "allowed_token_ids": [7, 7, 9]}
            assert (await http.post(path, json=body | more)).status_code == 200
    for spec in engine.submitted:
        assert spec.params.bad_sequences == tuple(map(tuple, (b"no", b" no", b" x")))
        assert spec.params.allowed_token_ids == (7, 9)


async def test_default_lengths_fit_what_is_left() -> None:
    """Completions default to 16 tokens, chats to all that is left; neither default makes a fitting prompt fail."""
    engine = FakeEngine(max_model_len=40)
    async with client(make_app(engine)) as http:
        for prompt in ("x", "x" * 33):
            assert (await http.post("/v1/completions", json={"prompt": prompt})).status_code == 200
        for extra in ({}, {"max_tokens": 5}, {"max_completion_tokens": 6}, {"max_tokens": 10**6}):
            assert (await http.post("/v1/chat/completions", json=CHAT | extra)).status_code == 200
    left = 40 - len("<user>hi\n<assistant>")
    assert [spec.params.max_tokens for spec in engine.submitted] == [16, 6, left, 5, 6, left]


async def test_values_that_change_nothing_are_accepted() -> None:
    """Null is absent, everywhere; fields that ask for the default behaviour, or are bookkeeping, pass."""
    engine = FakeEngine(text_reply("ok"))
    async with client(make_app(engine)) as http:
        for model, body, path in (
            (schema.CompletionRequest, TEXT, "/v1/completions"),
            (schema.ChatRequest, CHAT, "/v1/chat/completions"),
        ):
            nulls = {name: None for name in model.model_fields if name not in body}
            assert (await http.post(path, json=nulls | body)).status_code == 200
        neutral = {
            "tools": [],
            "functions": [],
            "tool_choice": "none",
            "function_call": "auto",
            "response_format": {"type": "text"},
            "modalities": ["text"],
            "service_tier": "auto",
            "store": True,
            "metadata": {"a": "b"},
            "user": "u",
            "parallel_tool_calls": True,
            "verbosity": "medium",
        }
        answer = await http.post("/v1/chat/completions", json=CHAT | neutral)
        assert answer.status_code == 200
        said = answer.json()["choices"][0]["message"]
        again = {"messages": [*CHAT["messages"], said | {"tool_calls": None, "audio": None, "annotations": []}]}
        assert (await http.post("/v1/chat/completions", json=again)).status_code == 200


async def test_sampling_comes_from_client_then_model_then_neutral(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's own defaults apply where the client is silent; what it says wins; EOS ids stop unless ignored."""
    monkeypatch.setattr(ByteTokenizer, "generation_defaults", {"temperature": 0.6, "top_p": 0.9, "top_k": 20})
    engine = FakeEngine()
    async with client(make_app(engine)) as http:
        for extra in (
            {},
            {"temperature": 0, "top_p": 1, "top_k": -1, "stop_token_ids": [7], "ignore_eos": True},
            {"temperature": 1e-9, "top_p": 0, "stop_token_ids": [7], "logit_bias": {"5": -100}},
            {"top_k": 10**9, "seed": -1, "priority": -3, "min_tokens": 2, "repetition_penalty": 1.5},
        ):
            assert (await http.post("/v1/completions", json=TEXT | extra)).status_code == 200
    one, two, three, four = (spec.params for spec in engine.submitted)
    assert (one.temperature, one.top_p, one.top_k, one.min_p) == (0.6, 0.9, 20, 0.0)
    assert one.stop_token_ids == {EOS}
    assert (two.temperature, two.top_p, two.top_k) == (0, 1, 0)
    assert two.stop_token_ids == {7}
    assert (three.temperature, three.top_p, three.top_k) == (0, 1, 1)
    assert three.stop_token_ids == {7, EOS}
    assert three.logit_bias == {5: -100.0}
    assert four.top_k == ByteTokenizer.vocab_size
    assert four.seed == 2**63 - 1
    assert engine.submitted[3].service.priority == -3
    assert (four.min_tokens, four.repetition_penalty) == (2, 1.5)


@pytest.mark.parametrize(("path", "body"), [("/v1/completions", TEXT), ("/v1/chat/completions", CHAT)])
async def test_service_and_targets_reach_the_engine(path: str, body: dict[str, Any]) -> None:
    """Only `flex` is background; targets come in milliseconds; the defaults hold for online requests that name none."""
    engine = FakeEngine()
    cases: list[tuple[dict[str, Any], bool, Targets]] = [
        ({}, False, Targets(2.0, 0.05)),
        ({"service_tier": None}, False, Targets(2.0, 0.05)),
        ({"service_tier": "auto"}, False, Targets(2.0, 0.05)),
        ({"service_tier": "default", "ttft_target_ms": 500}, False, Targets(0.5, 0.05)),
        ({"service_tier": "priority", "tpot_target_ms": 20.5}, False, Targets(2.0, 0.0205)),
        ({"service_tier": "flex"}, True, NO_TARGETS),
        ({"service_tier": "flex", "ttft_target_ms": 60_000}, True, Targets(ttft_s=60.0)),
    ]
    async with client(make_app(engine, default_targets=Targets(2.0, 0.05))) as http:
        for extra, _, _ in cases:
            answer = await http.post(path, json=body | extra | {"n": 2})
            assert answer.status_code == 200, answer.text
    expected = [(background, targets) for _, background, targets in cases for _ in range(2)]
    assert [(spec.service.background, spec.service.targets) for spec in engine.submitted] == expected


async def test_without_targets_any_time_is_good() -> None:
    """Neither client nor configuration names a target: there is none."""
    engine = FakeEngine()
    async with client(make_app(engine)) as http:
        await http.post("/v1/completions", json=TEXT)
    assert engine.submitted[0].service == ONLINE


async def test_seeds_name_the_draws() -> None:
    """Choice i of a seeded request draws with seed + i, for every prompt alike; without a seed all draws differ."""
    engine = FakeEngine()
    async with client(make_app(engine)) as http:
        await http.post("/v1/completions", json={"prompt": ["a", "b"], "n": 2, "seed": 5})
        await http.post("/v1/completions", json={"prompt": ["a", "a"], "n": 2})
    seeds = [spec.params.seed for spec in engine.submitted]
    assert seeds[:4] == [5, 6, 5, 6]
    assert len(set(seeds[4:])) == 4


async def test_long_texts_are_encoded_on_the_pool_and_only_so_many_wait() -> None:
    """A long text leaves the loop thread; when too many wait the answer is 429 rather than a longer queue."""
    hold, where = threading.Event(), []

    class Slow(ByteTokenizer):
        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            where.append(threading.current_thread())
            if len(text) > requests.INLINE_CHARS:
                hold.wait(10)
            return super().encode(text[:5], add_special_tokens=add_special_tokens)

    encoder = requests.Encoder(Slow())  # type: ignore[arg-type]
    long = "x" * (requests.INLINE_CHARS + 1)
    waiting = [
        asyncio.ensure_future(encoder.encode(long, add_special_tokens=True)) for _ in range(requests.MAX_QUEUED_ENCODES)
    ]
    await asyncio.sleep(0)
    with pytest.raises(requests.Overloaded):
        await encoder.encode(long, add_special_tokens=True)
    assert len(await encoder.encode("short", add_special_tokens=True)) == 6
    hold.set()
    assert [len(ids) for ids in await asyncio.gather(*waiting)] == [6] * requests.MAX_QUEUED_ENCODES
    assert len(await encoder.encode(long, add_special_tokens=True)) == 6
    assert where.count(threading.main_thread()) == 1


JSONISH = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.sampled_from(
            [
                *schema.ChatRequest.model_fields,
                *schema.CompletionRequest.model_fields,
                *ResponseRequest.model_fields,
                *EmbeddingRequest.model_fields,
            ]
        )
        | st.text(max_size=4),
        JSONISH,
        max_size=5,
    ),
    st.sampled_from(
        [
            schema.CompletionRequest,
            schema.ChatRequest,
            ResponseRequest,
            EmbeddingRequest,
            schema.TokenizeRequest,
            schema.DetokenizeRequest,
        ]
    ),
)
def test_any_json_is_a_request_or_one_sentence(body: dict[str, Any], model: type[schema.BaseModel]) -> None:
    """Whatever JSON comes, the parser gives a request or InvalidRequest with a bounded sentence; nothing else."""
    try:
        schema.parse(model, json.dumps(TEXT | CHAT | body).encode())  # type: ignore[type-var]
        return
    except InvalidRequest as refusal:
        error = refusal
    assert 0 < len(error.message) < 600
    assert error.param is None or error.param
