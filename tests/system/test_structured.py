"""Constrained texts in the whole engine: how a request is scheduled does not show in them either."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from server.runner import grammar
from server.types import Choice, Constraint, JsonSchema, Regex, SamplingParams
from tests.system.harness import complete, complete_all, running

FEW = {"model__dtype": "float32", "kv__device_gib": "64MiB"}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "ages": {"type": "array", "items": {"type": "integer"}, "minItems": 8, "maxItems": 16},
        "kind": {"enum": ["cat", "dog"]},
        "when": {"type": "string", "format": "date"},
    },
    "required": ["name", "ages", "kind", "when"],
    "additionalProperties": False,
}
CONSTRAINTS: tuple[Constraint | None, ...] = (
    JsonSchema(json.dumps(SCHEMA)),
    None,
    Regex("[A-Z][a-z]{40,60}[.]"),
    Choice(("Lisbon", "Oslo", "nowhere at all")),
)
PROMPTS = [[1, *range(10 + row, 90 + row)] for row in range(6)]


async def test_preemption_and_batching_do_not_show() -> None:
    """With a device tier too small for the batch constrained requests lose their blocks and start again: unseen."""
    async with running(**FEW, kv__prefix_caching=False) as daemon:
        assert daemon.grammars is not None
        grammars = [
            None if constraint is None else await daemon.grammars.compile(constraint, "", "x")
            for constraint in CONSTRAINTS
        ]
        base = SamplingParams(max_tokens=100, temperature=0.9, stop_token_ids=daemon.tokenizer.eos_token_ids)
        asked = [replace(base, seed=row, grammar=grammars[row % len(grammars)]) for row in range(len(PROMPTS))]
        alone = [await complete(daemon, prompt, params) for prompt, params in zip(PROMPTS, asked, strict=True)]
        texts = [daemon.tokenizer.decode(tokens) for tokens in alone]
        token_bytes = daemon.engine.kv.layout.token_bytes
    assert texts[3] in ("Lisbon", "Oslo", "nowhere at all")
    tight = {**FEW, "kv__device_gib": 400 * token_bytes / 2**30, "model__max_model_len": 200}
    async with running(**tight, scheduler__max_num_batched_tokens=64, scheduler__max_num_seqs=8) as daemon:
        assert await complete_all(daemon, PROMPTS, asked) == alone
        assert daemon.engine.scheduler.preemptions > 0


async def test_a_daemon_without_the_library_serves_the_rest(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the package is missing the start says so, and free texts are as ever."""
    monkeypatch.setattr(grammar, "llguidance", None)
    async with running(**FEW) as daemon:
        assert daemon.grammars is None
        assert len(await complete(daemon, PROMPTS[0], SamplingParams(max_tokens=5))) == 5
    assert "llguidance" in caplog.text


async def test_a_stuck_grammar_costs_its_request_only() -> None:
    """One request ends with an error, in the middle of a batch; those beside it and after it are as ever."""
    async with running(**FEW) as daemon:
        assert daemon.grammars is not None
        fine = await daemon.grammars.compile(Choice(("Lisbon",)), "", "x")
        stuck = await daemon.grammars.compile(Regex(r"(?:\p{L}{0,90}\d?){100}"), "", "x")
        stops = daemon.tokenizer.eos_token_ids
        bias = dict.fromkeys(stops, -100.0)
        asked = [
            SamplingParams(max_tokens=400, grammar=stuck, seed=1, logit_bias=bias),
            SamplingParams(max_tokens=20, grammar=fine, stop_token_ids=stops),
            SamplingParams(max_tokens=20, seed=3),
        ]
        found = await complete_all(daemon, PROMPTS[:3], asked)
        assert len(found[0]) < 400
        assert daemon.tokenizer.decode(found[1]) == "Lisbon"
        assert len(found[2]) == 20
        assert await complete(daemon, PROMPTS[1], asked[1]) == found[1]
        text = daemon.metrics.render().decode()
    assert 'terrace_requests_finished_total{finish_reason="error",model_name="demo"} 1.0' in text
