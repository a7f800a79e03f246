"""Random bodies against a daemon: each is answered 200 or 4xx; afterwards the daemon still serves and holds nothing.

`python -m tests.e2e.fuzz --count 50000` starts a daemon of its own on a tiny random model, whose memory must become
flat; `--url` takes a running one. Three kinds of body, half of them valid but for a few fields: mutated requests,
arbitrary JSON, arbitrary bytes. Some clients leave in the middle. Everything is drawn from one seed, so that a finding
can be repeated.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import resource
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import httpx
from pydantic import BaseModel

from server.api import schema
from server.api.embedding_schema import EmbeddingRequest
from server.api.response_schema import ResponseRequest

BODIES: dict[str, type[BaseModel]] = {
    "/v1/completions": schema.CompletionRequest,
    "/v1/chat/completions": schema.ChatRequest,
    "/v1/responses": ResponseRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/tokenize": schema.TokenizeRequest,
    "/detokenize": schema.DetokenizeRequest,
}
PATHS = tuple(BODIES)
IN_FLIGHT = 32
PARTS = 10
GROWTH_MAX = 1.1
"""Caches are full after half of a long run; from then on memory is flat."""
WORDS = ("", "a", "hello", "ß→𝄞", "\u0000", "\ufeff", "<|eos|>", "{{ 1/0 }}", "x" * 2000, "data: [DONE]\n\n", "\\u00")
NUMBERS = (0, 1, 2, 3, -1, 7, 0.5, 1.5, -0.0, 1e-300, 1e300, 2**31, 2**63, -(2**63), 2**64, 10**25, True, False)
FIELDS = tuple(sorted({"unheard_of", *(name for body in BODIES.values() for name in body.model_fields)}))
# What a client may well mean, so that a good part of the bodies reach the engine.
SENSIBLE: dict[str, tuple[Any, ...]] = {
    "prompt": ("hello", ["a", "b"], [1, 2, 3], [[4, 5], [6]], "日本語 " * 20, [257, 0, 255]),
    "messages": ([{"role": "user", "content": "hi"}], [{"role": "system", "content": [{"type": "text", "text": "é"}]}]),
    "input": (
        "hello",
        [{"role": "user", "content": "hi"}],
        [1, 2],
        ["a", "b"],
        [{"role": "assistant", "content": []}],
        [
            {"type": "reasoning", "summary": []},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{"},
            {"type": "function_call_output", "call_id": "c", "output": []},
        ],
    ),
    "instructions": ("", "Be brief."),
    "max_output_tokens": (1, 9),
    "include": (["message.output_text.logprobs"], ["reasoning.encrypted_content"], []),
    "truncation": ("auto", "disabled"),
    "encoding_format": ("float", "base64"),
    "dimensions": (1, 32, 33),
    "truncate_prompt_tokens": (-1, 1, 5, 10**6),
    "allowed_token_ids": ([97], [97, 98, 255]),
    "bad_words": (["a"], ["ab", "c"]),
    "add_special_tokens": (True, False),
    "return_token_ids": (True,),
    "return_tokens_as_token_ids": (True,),
    "request_id": ("r1",),
    "tokens": ([], [1, 2, 3], [255, 254, 253], [257]),
    "echo": (True, False),
    "n": (1, 2, 3),
    "best_of": (2, 3),
    "logprobs": (0, 1, 5, True),
    "top_logprobs": (0, 3),
    "prompt_logprobs": (0, 2),
    "max_tokens": (1, 2, 8, 20),
    "max_completion_tokens": (1, 9),
    "min_tokens": (0, 3),
    "stream": (True, False),
    "stream_options": ({"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}, {}),
    "temperature": (0, 0.7, 2.0, 1e-9),
    "top_p": (0, 0.1, 1),
    "top_k": (-1, 0, 1, 40, 100000),
    "min_p": (0, 0.5, 1),
    "repetition_penalty": (0.01, 1.3, 100),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "logit_bias": ({"97": 100}, {str(i): -100 for i in range(256)}, {}),
    "stop": ("a", ["b", "cd"], "\n", []),
    "stop_token_ids": ([97], []),
    "include_stop_str_in_output": (True,),
    "ignore_eos": (True,),
    "skip_special_tokens": (True, False),
    "seed": (0, -1, 2**63 - 1),
    "priority": (-1000, 5),
    "cache_salt": ("", "tenant"),
    "tools": (
        [],
        [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        [{"type": "function", "name": "f", "parameters": {"type": "object"}}],
    ),
    "tool_choice": (
        "none",
        "auto",
        "required",
        {"type": "function", "function": {"name": "f"}},
        {"type": "function", "name": "f"},
        {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
    ),
    "reasoning": ({"effort": "none"}, {"effort": "high"}, {}),
    "max_tool_calls": (1,),
    "parallel_tool_calls": (True, False),
    "continue_final_message": (True, False),
    "include_reasoning": (True, False),
    "chat_template_kwargs": ({"enable_thinking": False}, {"m": "x"}),
    "return_token_strs": (True,),
}


@dataclass
class Outcome:
    """Answers by status, and what no server may do: other statuses, broken transports, wrong error bodies."""

    statuses: Counter[int] = field(default_factory=Counter)
    left: int = 0
    faults: list[str] = field(default_factory=list)


def anything(draw: random.Random, depth: int = 0) -> Any:
    """Arbitrary JSON, mostly small."""
    kind = draw.randrange(7 if depth < 3 else 4)
    if kind == 0:
        return None
    if kind == 1:
        return draw.choice(NUMBERS)
    if kind in (2, 3):
        return draw.choice(WORDS)
    if kind == 4:
        return [anything(draw, depth + 1) for _ in range(draw.randrange(4))]
    if kind == 5:
        return {draw.choice((*FIELDS, *WORDS[:6])): anything(draw, depth + 1) for _ in range(draw.randrange(4))}
    return {"role": draw.choice(("user", "assistant", "system", "tool", "")), "content": anything(draw, depth + 1)}


def body_for(draw: random.Random, path: str) -> bytes:
    """One body: a request with some fields set, sensibly or not; or any JSON; or no JSON at all."""
    kind = draw.random()
    if kind < 0.1:
        return json.dumps(anything(draw)).encode()
    base: dict[str, Any] = {
        "/v1/completions": {"prompt": draw.choice(SENSIBLE["prompt"])},
        "/v1/chat/completions": {"messages": draw.choice(SENSIBLE["messages"])},
        "/v1/responses": {"input": draw.choice(SENSIBLE["input"])},
        "/v1/embeddings": {"input": draw.choice(SENSIBLE["input"])},
        "/tokenize": {"prompt": draw.choice(WORDS)},
        "/detokenize": {"tokens": draw.choice(SENSIBLE["tokens"])},
    }[path]
    own = [name for name in BODIES[path].model_fields if name in SENSIBLE]
    for _ in range(draw.randrange(7)):
        sensible = bool(own) and draw.random() < 0.9
        name = draw.choice(own if sensible else FIELDS)
        base[name] = draw.choice(SENSIBLE[name]) if sensible else anything(draw)
    data = json.dumps(base).encode()
    if kind < 0.2:
        cut = bytearray(data[: draw.randrange(len(data))])
        for _ in range(draw.randrange(4)):
            cut.insert(draw.randrange(len(cut) + 1), draw.randrange(256))
        return bytes(cut)
    if kind < 0.25:
        return data.replace(b"1", draw.choice((b"NaN", b"Infinity", b"1e999", b"01", b"9" * 5000)))
    return data


async def fuzz(client: httpx.AsyncClient, count: int, seed: int) -> Outcome:
    """Sends `count` bodies, at most IN_FLIGHT at a time."""
    outcome = Outcome()
    draw = random.Random(seed)
    jobs = iter(range(count))

    async def worker() -> None:
        for number in jobs:
            path = draw.choice(PATHS)
            await _send(client, path, body_for(draw, path), draw.random() < 0.03, outcome, f"seed {seed} #{number}")

    await asyncio.gather(*(worker() for _ in range(min(IN_FLIGHT, count))))
    return outcome


async def _send(client: httpx.AsyncClient, path: str, body: bytes, leaves: bool, outcome: Outcome, name: str) -> None:
    headers = {"content-type": "application/json"}
    try:
        async with client.stream("POST", path, content=body, headers=headers) as answer:
            if leaves:
                outcome.left += 1
                return
            content = await answer.aread()
    except httpx.HTTPError as error:
        outcome.faults.append(f"{name}: {type(error).__name__} on {path} {body[:300]!r}")
        return
    outcome.statuses[answer.status_code] += 1
    fault = _fault(answer.status_code, content)
    if fault:
        outcome.faults.append(f"{name}: {answer.status_code}, {fault}, on {path} {body[:300]!r}: {content[-300:]!r}")


def _fault(status: int, content: bytes) -> str | None:
    if status == 200:
        if content.startswith(b"event:"):
            last = content.rstrip().rpartition(b"\n\n")[2]
            good = last.startswith((b"event: response.completed\n", b"event: response.incomplete\n"))
            return None if good else "a broken stream"
        if content.startswith(b"data:"):
            return None if content.endswith(b"data: [DONE]\n\n") and b'"error"' not in content else "a broken stream"
        json.loads(content)
        return None
    if not 400 <= status < 500:
        return "a status that bad input must not cause"
    error = json.loads(content).get("error", {})
    return None if set(error) == {"message", "type", "param", "code"} else "not an error body"


async def still_serves(client: httpx.AsyncClient) -> list[str]:
    """What is wrong with the daemon after the storm; nothing, one hopes. Waits for clients that left to be noticed."""
    wrong = []
    for path in ("/livez", "/readyz"):
        if (await client.get(path)).status_code != 200:
            wrong.append(f"{path} fails")
    answer = await client.post("/v1/completions", json={"prompt": "hello", "max_tokens": 2})
    if answer.status_code != 200:
        wrong.append(f"a plain completion is answered {answer.status_code}")
    for _ in range(500):
        text = (await client.get("/metrics")).text
        held = [
            line for line in text.splitlines() if line.startswith("terrace_requests_running") and line[-4:] != " 0.0"
        ]
        if not held:
            break
        await asyncio.sleep(0.02)
    return wrong + [f"requests are still running: {line}" for line in held]


async def storm(url: str, count: int, seed: int) -> Outcome:
    """Fuzzes the daemon at `url` and checks on it."""
    limits = httpx.Limits(max_connections=IN_FLIGHT)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits, trust_env=False) as client:
        outcome = await fuzz(client, count, seed)
        outcome.faults += await still_serves(client)
    return outcome


def resident_mib() -> float:
    """Memory of this process, which has the daemon in it."""
    with open("/proc/self/statm", encoding="ascii") as pages:
        return int(pages.read().split()[1]) * resource.getpagesize() / 2**20


async def storms(url: str, count: int, seed: int, console: TextIO) -> Outcome:
    """PARTS storms of `count` bodies in all, with a line on each; a fault if memory still grows in the second half."""
    total, sizes = Outcome(), []
    for part in range(PARTS):
        outcome = await storm(url, count // PARTS, seed * PARTS + part)
        sizes.append(resident_mib())
        total.statuses.update(outcome.statuses)
        total.left += outcome.left
        total.faults += outcome.faults
        print(f"{(part + 1) * (count // PARTS)} bodies: {dict(sorted(total.statuses.items()))}, {total.left} left, "
              f"{len(total.faults)} faults, {sizes[-1]:.0f} MiB", file=console, flush=True)  # fmt: skip
    growth = sizes[-1] / sizes[PARTS // 2 - 1]
    if growth > GROWTH_MAX:
        total.faults.append(f"memory grew {growth:.2f} x in the second half: {[round(size) for size in sizes]} MiB")
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=50_000, help="bodies to send")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bodies")
    parser.add_argument("--url", help="a running daemon; default: an own one on a tiny random model")
    options = parser.parse_args()
    if options.url:
        outcome = asyncio.run(storm(options.url, options.count, options.seed))
        print(f"{options.count} bodies: {dict(sorted(outcome.statuses.items()))}, {outcome.left} left")
    else:
        from tests.e2e.daemon import ServerThread, fuzz_config, write_model

        with tempfile.TemporaryDirectory() as folder:
            model = write_model(Path(folder) / "tiny")
            with ServerThread(fuzz_config(model)) as served:
                outcome = asyncio.run(storms(served.url, options.count, options.seed, sys.stdout))
    for fault in outcome.faults[:20]:
        print(fault, file=sys.stderr)
    return 1 if outcome.faults else 0


if __name__ == "__main__":
    sys.exit(main())
