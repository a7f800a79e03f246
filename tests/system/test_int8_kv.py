"""KV as int8: a fourth of the memory, the same facts recalled, and tiers that notice nothing."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

import server.demo
from server.bench.placing import prefer_loading
from server.build import Daemon, build
from server.config import ModelConfig, load_config
from server.demo.corpus import example
from server.engine import GenerateSpec
from server.errors import ConfigError
from server.kernels import choice
from server.text import Tokenizer
from server.types import SSD, SamplingParams
from tests.system.harness import complete, complete_all, running, settled

GREEDY = SamplingParams(max_tokens=32, temperature=0)
DEMO = {"model__dtype": "float32", "kv__device_gib": "64MiB"}
INT8 = DEMO | {"kv__kv_dtype": "int8", "kv__device_gib": "16MiB"}


@pytest.fixture(scope="module")
def questions() -> list[list[int]]:
    """16 documents of 100 to 700 tokens, each ending in a question."""
    tokenizer = Tokenizer.load(Path(server.demo.__file__).parent / "model")
    found = [example(seed=100 + i, target_tokens=100 + 40 * i, kind="completion") for i in range(16)]
    return [tokenizer.encode(document.prompt) for document in found]


async def surprise(daemon: Daemon, documents: list[list[int]]) -> float:
    """Perplexity of the documents' tokens."""
    params = replace(GREEDY, max_tokens=1, prompt_logprobs=0)
    total, count = 0.0, 0
    for document in documents:
        stream = daemon.engine.submit(GenerateSpec(document, params))
        async for events in stream:
            for event in events:
                for entry in event.prompt_logprobs or ():
                    total, count = total - entry.logprob, count + 1
        stream.close()
    assert count == sum(len(document) - 1 for document in documents)
    return math.exp(total / count)


async def test_it_says_nearly_the_same(questions: list[list[int]]) -> None:
    """The same facts are recalled as with float32 KV, and the perplexity of documents and answers is within 1 %."""
    async with running(**DEMO) as daemon:
        expected = await complete_all(daemon, questions, GREEDY)
        documents = [question + answer for question, answer in zip(questions, expected, strict=True)]
        exact = await surprise(daemon, documents)
    async with running(**INT8) as daemon:
        found, rounded = await complete_all(daemon, questions, GREEDY), await surprise(daemon, documents)
    assert abs(rounded / exact - 1) < 0.01
    assert found == expected


async def test_reference_and_native_agree(questions: list[list[int]]) -> None:
    """Both backends that hold int8 generate the same."""
    prompts, answers = questions[:3], []
    for attention in ("native", "reference"):
        async with running(**INT8, model__attention=attention) as daemon:
            answers.append(await complete_all(daemon, prompts, GREEDY))
    assert answers[0] == answers[1]


async def test_the_tiers_give_it_back(tmp_path: Path, questions: list[list[int]]) -> None:
    """After a restart blocks of int8 come from SSD through DRAM, and the answers are those computed from nothing; a
    cache of float32 KV beside it is another one."""
    tiers = {"kv__dram_gib": "16MiB", "kv__ssd_gib": "200MiB", "kv__ssd_path": tmp_path, "kv__ssd_min_free_gib": 0}

    async def ask(daemon: Daemon) -> tuple[list[list[int]], Counter[str]]:
        served: Counter[str] = Counter()
        answers = [await complete(prefer_loading(daemon), q, GREEDY, served=served) for q in questions[:5]]
        await settled(daemon)
        return answers, +served

    async with running(**INT8, **tiers) as daemon:
        assert daemon.engine.kv.layout.token_bytes == 3 * 2 * 2 * (64 + 4)
        expected, served = await ask(daemon)
        assert not served
    async with running(**INT8, **tiers) as daemon:
        answers, served = await ask(daemon)
        assert (answers, served[SSD] > 0) == (expected, True)
    async with running(**DEMO, **tiers) as daemon:
        assert (await ask(daemon))[1] == Counter()


def test_a_backend_that_cannot_hold_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the setting and the way out, with the native kernels and without."""
    with pytest.raises(ConfigError, match=r"needs the attention backend 'native', not 'cpu': .* --kv-dtype bfloat16"):
        build(load_config({"kv.kv_dtype": "int8", "model.attention": "cpu"}, environ={}))
    monkeypatch.setattr(choice, "load", lambda: None)
    assert choice.choose_backend("auto", "auto", native=choice.use_native(ModelConfig())) == "cpu"
    with pytest.raises(ConfigError, match="install with a C compiler"):
        build(load_config({"kv.kv_dtype": "int8"}, environ={}))


@pytest.mark.parametrize("asked", [{"kernels": "native"}, {"quantization": "int8"}])
def test_kernels_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch, asked: dict[str, str]) -> None:
    """What needs the native kernels says so where they were not built, and where torch is asked for beside it."""
    with pytest.raises(ConfigError, match="needs the native CPU kernels"):
        choice.use_native(ModelConfig.model_validate({"device": "cuda", **asked}))
    monkeypatch.setattr(choice, "load", lambda: None)
    with pytest.raises(ConfigError, match="a C compiler when Terrace is installed"):
        choice.use_native(ModelConfig.model_validate(asked))


@pytest.mark.skipif(choice.load() is None, reason="the native kernels were not built: no C compiler")
def test_other_kernels_have_another_cache() -> None:
    """Torch does not find blocks of the native kernels, which round otherwise; the same choice finds them again."""
    asked = ({"kernels": "native"}, {"kernels": "torch"}, {"kernels": "native"})
    first, other, again = (choice.computed_by(ModelConfig.model_validate(one)) for one in asked)
    assert (first, other) == (again, "torch")
    roots = [build(load_config({f"model.{key}": value for key, value in one.items()}, environ={})).engine.kv.root("")
             for one in asked[:2]]  # fmt: skip
    assert roots[0] != roots[1]
