"""A step in one call of the library has the bits of the same step part by part."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config

from server.kernels.native import load
from server.kernels.native.rows import DRAWING, EDIT, Choice, Edits, Telling, choose, describe
from server.models.base import Attention
from server.models.weights import load_model
from tests.numeric.conftest import Checkpoint
from tests.numeric.families import BASE, FAMILIES, VARIANTS, Paged
from tests.numeric.test_models import random_tokens
from tests.unit.native import instruction_sets, selected

pytestmark = pytest.mark.skipif(load() is None, reason="the native kernels were not built: no C compiler")

FORMATS = [("float32", "none"), ("bfloat16", "none"), ("float16", "none"), ("float32", "int8"), ("float32", "int4-g32"),
           ("bfloat16", "w8a8"), ("float32", "w4a8")]  # fmt: skip
STEPS = {
    "one token": [1],
    "few rows": [1, 1, 1],
    "a tile": [1] * 14,
    "more than a tile": [20, 1, 1, 18],
    "chunks": [130, 1, 290, 1, 1, 77],
}


class PartByPart:
    """An attention backend that the library does not know."""

    def __init__(self, attention: Attention) -> None:
        self._attention = attention

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor, /) -> Tensor:
        return self._attention.run(layer, q, k, v)


@pytest.fixture(params=[1, 2, 3], ids="{} threads".format)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def scores_of(model: Any, tokens: Tensor, positions: Tensor, attention: Attention, wanted: Tensor) -> Iterator[Tensor]:
    """Logits of the wanted tokens, the tokens chosen by them, of which the first may not be the most likely one, and
    what is told of those from the second on."""
    how = np.zeros(len(wanted), DRAWING)
    how[1:] = (0.9, 0.0, 0.3, 0, 0.8)
    logits = model.scores(tokens, positions, attention, wanted)
    yield logits.clone()
    rows = np.zeros(len(wanted), EDIT)
    rows[0] = (1, 0, 1, 1, 1.2, 0.5, 0.1)
    best = int(choose(logits[:1], how[:1])[0])
    edits = Edits(rows, np.array([0, best, 3]), np.array([0, -np.inf, 2], np.float32))
    if model.launches(attention):
        arrays = tokens.numpy(), positions.numpy(), attention, wanted.numpy()
        told = Telling(np.arange(1, len(wanted)), 4)
        yield from map(torch.from_numpy, model.launch(*arrays, Choice(how, edits, told), None, -1).wait())
    else:
        chosen = choose(logits, how, edits)
        assert chosen[0] != best
        yield chosen
        yield from describe(logits[1:], chosen[1:], 4)


def states_of(folder: Path, dtype: str, quantization: str, *, whole: bool) -> Iterator[Tensor]:
    """Of every step in STEPS, one after the other: logits of all its tokens; states, logits and tokens of some
    of them, one twice."""
    model: Any = load_model(
        folder, dtype=cast(Any, dtype), quantization=quantization, native=True, load_format="dummy", seed=5
    )
    paged = Paged(model, "native", kv_dtype=torch.bfloat16)
    forward, some = model.forward, []

    def once(tokens: Tensor, positions: Tensor, attention: Attention, wanted: Tensor) -> Tensor:
        taken = attention if whole else PartByPart(attention)
        assert model._whole.takes(taken) == whole
        last = len(tokens) - 1
        picked = torch.tensor([last, 0, last])
        model.forward = forward
        some.append(forward(tokens, positions, taken, picked))
        some.extend(scores_of(model, tokens, positions, taken, picked))
        states = forward(tokens, positions, taken, wanted)
        model.forward = once
        return cast(Tensor, states)

    model.forward = once
    for step, lengths in enumerate(STEPS.values()):
        rows = [(row, 0, random_tokens(length, seed=row + step)) for row, length in enumerate(lengths)]
        yield paged.step(rows, everywhere=True)
        yield from some
        some.clear()


def assert_the_same(folder: Path, dtype: str, quantization: str) -> None:
    apart, whole = (states_of(folder, dtype, quantization, whole=way) for way in (False, True))
    for one, other in zip(apart, whole, strict=True):
        assert torch.isfinite(one).all()
        assert torch.equal(one, other)


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize(("dtype", "quantization"), FORMATS)
def test_formats(tmp_path: Path, threads: int, isa: str, dtype: str, quantization: str) -> None:
    """On every instruction set; an inner width that does not fill its tiles is computed another way."""
    for inner in (96, 80):
        folder = tmp_path / str(inner)
        config = Qwen3Config(**{**BASE, "intermediate_size": inner, "head_dim": 32, "attention_bias": True})
        config.architectures = ["Qwen3ForCausalLM"]
        config.save_pretrained(folder)
        with selected(isa):
            assert_the_same(folder, dtype, quantization)


@pytest.mark.parametrize("name", [*FAMILIES, *VARIANTS])
def test_families(checkpoint: Checkpoint, name: str) -> None:
    """Biases, norms of heads, windows, scaled rotations, tied embeddings."""
    folder, _ = checkpoint(name)
    assert_the_same(folder, "bfloat16", "none")
