"""What is answered: text, choices, log-probabilities, usage, stops. Streamed and whole answers say the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from server.api import schema
from server.engine import GenerateSpec
from server.types import FinishReason
from tests.unit.api_fake import BOS, EOS, FakeEngine, client, make_app, text_reply

TEXT = "/v1/completions"
CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]


async def whole(engine: FakeEngine, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The answer to `body`, checked against the documented schema; afterwards the engine holds nothing."""
    async with client(make_app(engine)) as http:
        answer = await http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    (schema.CompletionResponse if path == TEXT else schema.ChatResponse).model_validate_json(answer.content)
    assert engine.open == {}
    return answer.json()


@pytest.mark.parametrize("path", [TEXT, CHAT])
@pytest.mark.parametrize("burst", [1, 3, 100])
async def test_token_ids_are_shown_if_asked_for(path: str, burst: int) -> None:
    """`return_token_ids`: every counted token, the one that ended the text too, whole as streamed, and the prompt once
    for each choice; without it none of this."""
    engine = FakeEngine(text_reply("grün"))
    engine.burst = burst
    body = {"return_token_ids": True, "n": 2} | ({"prompt": ["a", "b"]} if path == TEXT else {"messages": HI})
    answer = await whole(engine, path, body)
    expected = [*"grün".encode(), EOS]
    assert [choice["token_ids"] for choice in answer["choices"]] == [expected] * (4 if path == TEXT else 2)
    rendered = list(b"<user>hi\n<assistant>")
    if path == TEXT:
        prompts = [choice["prompt_token_ids"] for choice in answer["choices"]]
        assert prompts == [[BOS, 97], [BOS, 97], [BOS, 98], [BOS, 98]]
    else:
        assert answer["prompt_token_ids"] == rendered
    ids: dict[int, list[int]] = {}
    prompts_of: dict[int, list[list[int]]] = {}
    for chunk in await streamed(engine, path, body):
        for choice in chunk["choices"]:
            ids.setdefault(choice["index"], []).extend(choice.get("token_ids", []))
            shown = choice.get("prompt_token_ids", chunk.get("prompt_token_ids"))
            prompts_of.setdefault(choice["index"], []).extend([] if shown is None else [shown])
    assert list(ids.values()) == [expected] * len(answer["choices"])
    wanted = [[p] for p in prompts] if path == TEXT else [[rendered]] * 2
    assert [prompts_of[index] for index in sorted(prompts_of)] == wanted
    del body["return_token_ids"]
    assert "token_ids" not in json.dumps(await whole(engine, path, body))


async def test_token_ids_end_where_a_stop_string_does() -> None:
    """Tokens after the one that completed a stop string are neither counted nor shown."""
    engine = FakeEngine(text_reply("abcdef"))
    engine.burst = 100
    answer = await whole(engine, TEXT, {"prompt": "x", "stop": "cd", "return_token_ids": True})
    assert answer["choices"][0]["token_ids"] == list(b"abcd")
    assert answer["usage"]["completion_tokens"] == 4


async def test_log_probabilities_name_tokens_by_number_if_asked() -> None:
    """`return_tokens_as_token_ids`: `token_id:N` in both shapes of log-probabilities; the text stays as it is."""
    engine = FakeEngine(text_reply("ab"))
    more = {"return_tokens_as_token_ids": True}
    shown = (await whole(engine, TEXT, {"prompt": "x", "logprobs": 1} | more))["choices"][0]
    assert shown["text"] == "ab"
    assert shown["logprobs"]["tokens"] == ["token_id:97", "token_id:98"]
    assert list(shown["logprobs"]["top_logprobs"][0]) == ["token_id:97"]
    shown = (await whole(engine, CHAT, {"messages": HI, "logprobs": True, "top_logprobs": 1} | more))["choices"][0]
    assert [entry["token"] for entry in shown["logprobs"]["content"]] == ["token_id:97", "token_id:98"]
    assert shown["logprobs"]["content"][0]["bytes"] == [97]


def events_of(answer: httpx.Response) -> list[Any]:
    """Payloads of a finished event stream, in order; the closing [DONE] is checked and left out."""
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    blocks = answer.text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""], blocks[-2:]
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks[:-1])
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]


async def streamed(engine: FakeEngine, path: str, body: dict[str, Any]) -> list[Any]:
    async with client(make_app(engine)) as http:
        answer = await http.post(path, json=body | {"stream": True})
    assert answer.status_code == 200, answer.text
    assert engine.open == {}
    return events_of(answer)


def joined(chunks: list[Any], path: str) -> dict[int, tuple[str, str | None, Any]]:
    """Per choice: all text, the finish reason and the stop reason."""
    result: dict[int, tuple[str, str | None, Any]] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            text, finish, stop = result.get(choice["index"], ("", None, None))
            assert finish is None, "nothing follows the finish reason"
            new = choice["text"] if path == TEXT else choice["delta"].get("content", "")
            finish, stop = choice["finish_reason"] or finish, choice.get("stop_reason", stop)
            result[choice["index"]] = (text + new, finish, stop)
    return result


async def test_a_plain_completion() -> None:
    """Text until the end-of-sequence token, which is counted and not shown; usage adds up."""
    answer = await whole(FakeEngine(text_reply("Hällo")), TEXT, {"prompt": "abc"})
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("Hällo", "stop", None)
    assert answer["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 7,
        "total_tokens": 11,
        "prompt_tokens_details": {
            "cached_tokens": 0,
            "cached_tokens_by_tier": {"device": 0, "dram": 0, "ssd": 0},
        },
    }
    assert (answer["object"], answer["model"], answer["created"]) == ("text_completion", "fake", 1_700_000_000)
    assert answer["id"].startswith("cmpl-")


async def test_a_plain_chat() -> None:
    """The template's prompt goes to the engine without special tokens added; the answer is an assistant's message."""
    engine = FakeEngine(text_reply("ok"))
    messages = [
        {"role": "developer", "content": "be"},
        {"role": "user", "content": [{"type": "text", "text": "a"}] * 2},
    ]
    answer = await whole(engine, CHAT, {"messages": messages})
    assert bytes(engine.submitted[0].prompt).decode() == "<system>be\n<user>a\na\n<assistant>"
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "ok", "refusal": None}
    assert answer["object"] == "chat.completion"


@pytest.mark.parametrize("path", [TEXT, CHAT])
@pytest.mark.parametrize("burst", [1, 3, 100])
@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"max_tokens": 5},
        {"stop": "wö"},
        {"stop": ["or", "lo w", "zzz"], "include_stop_str_in_output": True},
        {"stop_token_ids": [ord("w")]},
        {"stop_token_ids": [ord("w")], "include_stop_str_in_output": True},
        {"ignore_eos": True, "max_tokens": 40},
        {"ignore_eos": True, "max_tokens": 40, "skip_special_tokens": False},
        {"stop": "H", "min_tokens": 3},
        {"n": 3, "max_tokens": 20},
    ],
    ids=str,
)
async def test_streamed_and_whole_answers_are_the_same(path: str, burst: int, extra: dict[str, Any]) -> None:
    """The chunks joined are the whole answer, whatever the engine delivers at once; so are usage and finish reasons."""
    prompt = {"prompt": "abc"} if path == TEXT else {"messages": HI}
    outcomes = []
    for deliveries in (1, burst):
        engine = FakeEngine(text_reply("Héllo 日本 wörld"))
        engine.burst = deliveries
        answer = await whole(engine, path, prompt | extra)
        texts = {
            c["index"]: (c["text"] if path == TEXT else c["message"]["content"], c["finish_reason"], c["stop_reason"])
            for c in answer["choices"]
        }
        chunks = await streamed(engine, path, prompt | extra | {"stream_options": {"include_usage": True}})
        assert joined(chunks, path) == texts
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"] == answer["usage"]
        assert all(chunk["usage"] is None for chunk in chunks[:-1])
        outcomes.append((texts, answer["usage"]))
    assert outcomes[0] == outcomes[1]


async def test_no_usage_unless_asked() -> None:
    """Without include_usage no chunk has the field."""
    chunks = await streamed(FakeEngine(text_reply("a")), TEXT, {"prompt": "b"})
    assert all("usage" not in chunk for chunk in chunks)


@pytest.mark.parametrize("path", [TEXT, CHAT])
async def test_usage_so_far_in_every_chunk(path: str) -> None:
    """With continuous_usage_stats each chunk says how many tokens there are until then; without include_usage none."""
    prompt = {"prompt": "abc"} if path == TEXT else {"messages": HI}
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = await streamed(FakeEngine(text_reply("abcd")), path, prompt | {"stream_options": options})
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert set(counts) >= {1, 2, 3, 4}
    assert len({chunk["usage"]["prompt_tokens"] for chunk in chunks}) == 1
    plain = {"stream_options": {"continuous_usage_stats": True}}
    assert all("usage" not in chunk for chunk in await streamed(FakeEngine(text_reply("a")), path, prompt | plain))


async def test_one_chunk_per_delivery_and_never_half_a_character() -> None:
    """What the engine delivers together goes out together; a character split over tokens comes whole."""
    engine = FakeEngine(text_reply("日本語"))
    engine.burst = 4
    chunks = await streamed(engine, TEXT, {"prompt": "a"})
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["日", "本", "語"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


async def test_chat_chunks_begin_with_the_role_and_end_with_an_empty_delta() -> None:
    """OpenAI's order: role, contents, finish."""
    chunks = await streamed(FakeEngine(text_reply("ab")), CHAT, {"messages": HI})
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "a"}, {"content": "b"}, {}]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1


@pytest.mark.parametrize(
    ("stop", "include", "text", "reason"),
    [
        ("wö", False, "Hello ", "wö"),
        ("wö", True, "Hello wö", "wö"),
        (["ld!", "xx"], False, "Hello wör", "ld!"),
        ("!?", False, "Hello wörld!", None),
        ("Hello", False, "", "Hello"),
        (["lo", "l"], False, "He", "l"),
    ],
)
async def test_stop_strings_may_straddle_tokens(stop: Any, include: bool, text: str, reason: str | None) -> None:
    """The text ends before (or after) the first stop string, and the rest of the engine's work is given back."""
    engine = FakeEngine(text_reply("Hello wörld!"))
    body = {"prompt": "a", "stop": stop, "include_stop_str_in_output": include}
    choice = (await whole(engine, TEXT, body))["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (text, "stop", reason)
    assert engine.aborted == (reason is not None)


async def test_usage_counts_tokens_up_to_the_stop_string_however_they_arrive() -> None:
    """Tokens that came in the same delivery after a stop string are not billed."""
    for burst in (1, 64):
        engine = FakeEngine(text_reply("abcdefgh"))
        engine.burst = burst
        answer = await whole(engine, TEXT, {"prompt": "a", "stop": "cd"})
        assert answer["usage"]["completion_tokens"] == 4


async def test_a_client_stop_token_is_the_stop_reason() -> None:
    """A stop token that the client named is reported by id; the model's own end is not."""
    engine = FakeEngine(text_reply("abc"))
    choice = (await whole(engine, TEXT, {"prompt": "a", "stop_token_ids": [ord("c")]}))["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("ab", "stop", ord("c"))


async def test_prompts_times_choices_are_indexed_prompt_major() -> None:
    """k prompts with n choices give k*n choices: all of the first prompt, then all of the second."""
    engine = FakeEngine()
    answer = await whole(engine, TEXT, {"prompt": ["ab", "cde"], "n": 2, "max_tokens": 3})
    assert [(c["index"], c["text"]) for c in answer["choices"]] == [(0, "bab"), (1, "bab"), (2, "edc"), (3, "edc")]
    assert answer["usage"]["prompt_tokens"] == 3 + 4
    assert answer["usage"]["completion_tokens"] == 12
    chunks = await streamed(engine, TEXT, {"prompt": ["ab", "cde"], "n": 2, "max_tokens": 3})
    assert {index: text for index, (text, _, _) in joined(chunks, TEXT).items()} == dict(
        enumerate(["bab"] * 2 + ["edc"] * 2)
    )


async def test_token_ids_are_a_prompt_and_lists_of_them_are_prompts() -> None:
    """Ids go to the engine as they are: nothing is added."""
    engine = FakeEngine(text_reply("x"))
    await whole(engine, TEXT, {"prompt": [1, 2, 3]})
    await whole(engine, TEXT, {"prompt": [[4], [5, 6]]})
    assert [list(spec.prompt) for spec in engine.submitted] == [[1, 2, 3], [4], [5, 6]]


async def test_best_of_returns_the_likeliest_by_mean_logprob() -> None:
    """best_of generates more than it returns, ranks by mean log-probability, and bills all that was generated."""
    engine = FakeEngine()

    def by_seed(spec: GenerateSpec) -> Iterator[int]:
        while True:
            yield ord("a") + spec.params.seed % 7

    engine.reply = by_seed
    # The fake's log-probability is -1 - seed % 7: seeds 4, 5, 6, 7 score -5, -6, -7, -1.
    answer = await whole(engine, TEXT, {"prompt": "p", "best_of": 4, "n": 2, "seed": 4, "max_tokens": 2})
    assert [choice["text"] for choice in answer["choices"]] == ["aa", "ee"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert all(choice["logprobs"] is None for choice in answer["choices"])
    assert answer["usage"]["completion_tokens"] == 8
    assert {spec.params.logprobs for spec in engine.submitted} == {0}


async def test_cached_tokens_are_reported_once_per_prompt() -> None:
    """Choices of one prompt share it: its cached tokens count once, and never exceed the prompt."""
    engine = FakeEngine(text_reply("x"))
    engine.cached_tokens = 2
    answer = await whole(engine, TEXT, {"prompt": ["abc", "def"], "n": 3})
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 4


async def test_completion_logprobs_are_parallel_lists() -> None:
    """Offsets count characters (a split character begins once), and the chosen token is among the alternatives."""
    answer = await whole(FakeEngine(text_reply("hé!")), TEXT, {"prompt": "a", "logprobs": 2, "seed": 0})
    shown = answer["choices"][0]["logprobs"]
    assert shown["tokens"] == ["h", "\\xc3", "\\xa9", "!"]
    assert shown["text_offset"] == [0, 1, 1, 2]
    assert shown["token_logprobs"] == [-1.0] * 4
    assert shown["top_logprobs"][0] == {"h": -1.0, "i": -1.5}


async def test_echo_puts_the_prompt_in_front_with_its_logprobs() -> None:
    """The first prompt token has no log-probability; offsets go on through the prompt into the answer."""
    body = {"prompt": "añ", "logprobs": 1, "echo": True, "max_tokens": 2, "seed": 0}
    engine = FakeEngine(text_reply("xyz"))
    choice = (await whole(engine, TEXT, body))["choices"][0]
    assert choice["text"] == "añxy"
    shown = choice["logprobs"]
    assert shown["tokens"] == ["<s>", "a", "\\xc3", "\\xb1", "x", "y"]
    assert shown["text_offset"] == [0, 0, 1, 2, 2, 3]
    assert shown["token_logprobs"][0] is None
    assert shown["top_logprobs"][0] is None
    assert shown["token_logprobs"][1:] == [-1.0] * 5
    chunks = await streamed(engine, TEXT, body)
    assert joined(chunks, TEXT)[0][0] == "añxy"
    assert [t for chunk in chunks for t in (chunk["choices"][0]["logprobs"] or {"tokens": []})["tokens"]] == shown[
        "tokens"
    ]


async def test_echo_of_token_ids_shows_their_text() -> None:
    """A prompt of ids is echoed decoded, special tokens and all."""
    choice = (await whole(FakeEngine(text_reply("x")), TEXT, {"prompt": [BOS, 97], "echo": True}))["choices"][0]
    assert choice["text"] == "<s>ax"


async def test_max_tokens_zero_scores_the_prompt() -> None:
    """With echo and logprobs, max_tokens 0 answers the prompt's own log-probabilities and generates nothing."""
    body = {"prompt": "abc", "echo": True, "logprobs": 0, "max_tokens": 0}
    answer = await whole(FakeEngine(text_reply("xyz")), TEXT, body)
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("abc", "length")
    assert choice["logprobs"]["tokens"] == ["<s>", "a", "b", "c"]
    assert answer["usage"]["completion_tokens"] == 0


async def test_prompt_logprobs_are_listed_by_position() -> None:
    """One entry per prompt token, none for the first; every choice shows the same."""
    body = {"prompt": "ab", "prompt_logprobs": 2, "n": 2, "seed": 0}
    answer = await whole(FakeEngine(text_reply("x")), TEXT, body)
    first, second = (choice["prompt_logprobs"] for choice in answer["choices"])
    assert first == second
    assert first[0] is None
    assert first[1]["97"] == {"logprob": -1.0, "rank": 1, "decoded_token": "a"}
    assert first[1]["98"] == {"logprob": -1.5, "rank": 2, "decoded_token": "b"}
    assert len(first) == 3


async def test_chat_logprobs_carry_bytes() -> None:
    """Every token has its bytes, so that a client can join half characters; alternatives are as many as asked."""
    body = {"messages": HI, "logprobs": True, "top_logprobs": 2, "seed": 0}
    answer = await whole(FakeEngine(text_reply("é")), CHAT, body)
    content = answer["choices"][0]["logprobs"]["content"]
    assert bytes(byte for token in content for byte in token["bytes"]).decode() == "é"
    assert [len(token["top_logprobs"]) for token in content] == [2, 2]
    plain = await whole(FakeEngine(text_reply("é")), CHAT, body | {"top_logprobs": None})
    assert [token["top_logprobs"] for token in plain["choices"][0]["logprobs"]["content"]] == [[], []]


async def test_tokens_cut_off_by_a_stop_string_have_no_logprobs_shown() -> None:
    """The listed tokens are those whose text is shown, streamed or not."""
    body = {"prompt": "a", "stop": "cd", "logprobs": 0}
    answer = await whole(FakeEngine(text_reply("abcdef")), TEXT, body)
    assert answer["choices"][0]["logprobs"]["tokens"] == ["a", "b"]
    chunks = await streamed(FakeEngine(text_reply("abcdef")), TEXT, body)
    assert [t for c in chunks for t in (c["choices"][0]["logprobs"] or {"tokens": []})["tokens"]] == ["a", "b"]


async def test_logprobs_are_always_json_numbers() -> None:
    """Minus infinity and NaN are shown as -9999, which is what OpenAI shows."""
    from server.types import TokenLogprobs
    from tests.unit import api_fake

    engine = FakeEngine(text_reply("ab"))
    bad = TokenLogprobs(97, float("-inf"), 1, [(98, float("nan"))])
    real = api_fake.FakeStream._logprobs
    api_fake.FakeStream._logprobs = lambda *_: bad  # type: ignore[method-assign]
    try:
        answer = await whole(engine, TEXT, {"prompt": "a", "logprobs": 1, "max_tokens": 1})
    finally:
        api_fake.FakeStream._logprobs = real  # type: ignore[method-assign]
    assert answer["choices"][0]["logprobs"]["token_logprobs"] == [-9999.0]


@pytest.mark.parametrize(
    ("finish", "state", "status", "code"),
    [
        (FinishReason.ERROR, "ready", 500, "step_failed"),
        (FinishReason.ABORT, "draining", 503, "not_ready"),
        (FinishReason.ABORT, "ready", 500, "aborted"),
    ],
)
async def test_an_engine_that_gives_up_is_an_error_not_an_answer(
    finish: FinishReason, state: str, status: int, code: str
) -> None:
    """Whole answers get the status; a stream that has begun gets one data event with the error body, and ends."""
    for n in (1, 3):
        engine = FakeEngine(text_reply("abcdef"))
        engine.failure, engine.state = finish, state
        async with client(make_app(engine)) as http:
            answer = await http.post(TEXT, json={"prompt": "a", "n": n})
            assert answer.status_code == status
            assert answer.json()["error"]["code"] == code
            answer = await http.post(TEXT, json={"prompt": "a", "n": n, "stream": True})
        assert answer.status_code == 200
        blocks = answer.text.strip().split("\n\n")
        assert json.loads(blocks[-1].removeprefix("data: "))["error"]["code"] == code
        assert "[DONE]" not in answer.text
        assert engine.open == {}


async def test_end_of_sequence_first_is_an_empty_answer() -> None:
    """A model with nothing to say is answered with empty text, not with an error."""

    def silent(spec: GenerateSpec) -> Iterator[int]:
        while True:
            yield EOS

    answer = await whole(FakeEngine(silent), CHAT, {"messages": HI})
    assert answer["choices"][0]["message"]["content"] == ""
    assert answer["usage"]["completion_tokens"] == 1
