"""What a JSON schema costs per token: batches of 16 with a schema and without one, turn by turn, through the engine.

Two models: the demo model, whose steps of a few milliseconds hide nothing, to see what it costs in itself; and random
weights in the shape of Qwen3-0.6B with its 151,936 tokens, a byte-level vocabulary of random words, where the goal is
judged. Drawn at temperature 1 on both sides, so
that the sampler's own work is the same; time per token is taken from each request's first token to its last. The
schema is an array of records that does not end before the tokens do.
"""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from server.bench.report import Report
from server.build import Daemon, build
from server.config import Config, KvConfig, ModelConfig
from server.engine import GenerateSpec
from server.types import Grammar, JsonSchema, SamplingParams

REQUESTS = 16
PROMPT_TOKENS = 16
MOST = 0.10
"""The goal: a schema lengthens the time per token by at most this share."""
SCHEMA = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 60},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "kind": {"enum": ["cat", "dog", "parrot", None]},
            "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{2,12}$"}, "maxItems": 4},
            "born": {"type": "string", "format": "date"},
        },
        "required": ["name", "age", "kind"],
        "additionalProperties": False,
    },
}


@dataclass(frozen=True)
class Case:
    """One model and how long it is measured."""

    name: str
    layers: int
    """0: the demo model."""
    vocab: int
    tokens: int
    turns: int


FULL = (Case("demo", 0, 2_048, tokens=200, turns=9), Case("0.6B shape", 28, 151_936, tokens=16, turns=4))
QUICK = (Case("demo", 0, 2_048, tokens=16, turns=1), Case("small", 1, 5_000, tokens=8, turns=1))


def run(*, quick: bool) -> Report:
    """Every case in turn; the goal is judged by the median of the ratios of neighbouring turns."""
    report = Report("structured", quick=quick)
    report.header("model", "vocabulary", "free, ms per token", "schema, ms per token", "overhead")
    for case in QUICK if quick else FULL:
        with tempfile.TemporaryDirectory() as folder:
            daemon = build(_config(case, Path(folder)))
            asyncio.run(_measure(report, case, daemon))
    return report


def _config(case: Case, folder: Path) -> Config:
    kv = KvConfig(device_gib=0.5)
    if not case.layers:
        return Config(kv=kv)
    _write_model(case, folder)
    model = ModelConfig(model=str(folder), dtype="float32", load_format="dummy", max_model_len=512)
    return Config(model=model, kv=kv)


def _write_model(case: Case, folder: Path) -> None:
    """Qwen3-0.6B's configuration with this many layers and tokens, and a vocabulary of bytes and random words."""
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": case.layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": case.vocab,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"})
    )
    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = random.Random(0)
    seen = set(names)
    while len(names) < case.vocab - 1:
        letters = words.choices("etaoinshrdlcumwfgypbvk", k=words.randint(2, 10))
        name = words.choice(("", "\u0120")) + "".join(letters)
        if name not in seen:
            seen.add(name)
            names.append(name)
    tokenizer = Tokenizer(models.BPE(vocab={name: id for id, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))


async def _measure(report: Report, case: Case, daemon: Daemon) -> None:
    assert daemon.grammars is not None, "texts of these models can be constrained"
    schema = await daemon.grammars.compile(JsonSchema(json.dumps(SCHEMA)), "", "schema")
    serving = asyncio.create_task(daemon.engine.run())
    await asyncio.sleep(0)
    free_s, schema_s, ratios = [], [], []
    for turn in range(-1, case.turns):  # the first turn warms up and does not count
        order: Sequence[Grammar | None] = (None, schema) if turn % 2 else (schema, None)
        found = {grammar is not None: await _batch(daemon, case, grammar, turn) for grammar in order}
        if turn >= 0:
            free_s.append(found[False])
            schema_s.append(found[True])
            ratios.append(found[True] / found[False])
            report.keep(model=case.name, turn=turn, free_token_s=found[False], schema_token_s=found[True])
    overhead = median(ratios) - 1
    times = [f"{median(times) * 1e3:.2f}" for times in (free_s, schema_s)]
    report.row(case.name, case.vocab, *times, f"{overhead:.1%}")
    if case.layers:
        report.goal(
            f"{case.name}: a JSON schema costs {overhead:.1%} per token at {REQUESTS} requests, at most {MOST:.0%}",
            met=overhead <= MOST,
        )
    await daemon.engine.drain(30)
    await serving
    await daemon.aclose()


async def _batch(daemon: Daemon, case: Case, grammar: Grammar | None, turn: int) -> float:
    """Seconds per token of 16 requests at once, the mean over them."""
    base = SamplingParams(max_tokens=case.tokens, grammar=grammar)

    async def one(row: int) -> float:
        prompt = random.Random(f"{turn} {row}").choices(range(256), k=PROMPT_TOKENS)
        stream = daemon.engine.submit(GenerateSpec(prompt, replace(base, seed=row)))
        first_s, tokens = 0.0, 0
        async for events in stream:
            first_s = first_s or time.perf_counter()
            tokens += sum(event.token is not None for event in events)
        last_s = time.perf_counter()
        stream.close()
        assert tokens == case.tokens, f"{tokens} tokens, wanted {case.tokens}"
        return (last_s - first_s) / (tokens - 1)

    each = await asyncio.gather(*(one(row) for row in range(REQUESTS)))
    return sum(each) / len(each)
