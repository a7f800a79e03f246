"""Every supported family computes what transformers computes: logits, and greedy continuations token for token."""

from __future__ import annotations

import random

import pytest
import torch

from server.kernels.native import load
from server.models import MODELS
from server.models.layers import RMSNorm
from server.models.weights import DTypeName, load_model
from tests.numeric.conftest import Checkpoint
from tests.numeric.families import FAMILIES, VARIANTS, VOCAB, Paged

TOLERANCE = 1e-4
"""Greatest absolute difference of logits, relative to their standard deviation (fp32 both sides)."""


def random_tokens(count: int, seed: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(VOCAB) for _ in range(count)]


@torch.inference_mode()
def reference_logits(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    return model(torch.tensor([tokens])).logits[0].float()


def test_every_family_in_the_dict_is_compared() -> None:
    """A family added to MODELS without a checkpoint here fails this test."""
    compared = {model_class.__name__ for _, model_class, _ in FAMILIES.values()}
    assert set(MODELS) == compared


native = pytest.mark.skipif(load() is None, reason="the native kernels were not built: no C compiler")
PRECISE = [("torch", "cpu"), ("torch", "reference"), pytest.param("native", "native", marks=native)]
"""Parts of the model and attention that compute in fp32 with fp32 weights."""


@pytest.mark.parametrize(("parts", "backend"), PRECISE)
@pytest.mark.parametrize("name", [*FAMILIES, *VARIANTS])
def test_logits(checkpoint: Checkpoint, name: str, parts: str, backend: str) -> None:
    """Logits of a 150-token text (longer than any window here) equal transformers', fed whole or in chunks."""
    folder, reference = checkpoint(name)
    tokens = random_tokens(150, seed=3)
    expected = reference_logits(reference, tokens)
    paged = Paged(load_model(folder, native=parts == "native"), backend)
    for chunk in (len(tokens), 64, 7):
        difference = (paged.logits(tokens, chunk) - expected).abs().max()
        assert difference <= TOLERANCE * expected.std()


@native
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_depend_on_the_sequence_alone(checkpoint: Checkpoint, name: str, dtype: DTypeName) -> None:
    """With the native parts and attention, logits have the same bits however a text is cut into chunks, and beside
    whatever else is computed."""
    folder, _ = checkpoint(name)
    model = load_model(folder, dtype=dtype, native=True)
    texts = [random_tokens(length, seed=length) for length in (150, 90, 1, 33)]
    alone = [Paged(model, "native").logits(text, len(text)) for text in texts]
    for chunk in (64, 7, 1):
        for text, whole in zip(texts, alone, strict=True):
            assert torch.equal(Paged(model, "native").logits(text, chunk), whole)
    paged = Paged(model, "native")
    together = paged.step([(row, 0, text) for row, text in enumerate(texts)], everywhere=True)
    assert torch.equal(together, torch.cat(alone))


@native
@pytest.mark.parametrize(
    ("quantization", "loss"), [("int8", 0.1), ("w8a8", 0.1), ("int8-g32", 0.1), ("int4-g32", 0.6), ("w4a8", 0.65)]
)
@pytest.mark.parametrize("name", FAMILIES)
def test_quantised_weights(checkpoint: Checkpoint, name: str, quantization: str, loss: float) -> None:
    """Logits of quantised weights are off by the weights' rounding: a part of the logits' own spread."""
    folder, reference = checkpoint(name)
    tokens = random_tokens(100, seed=4)
    exact = reference_logits(reference, tokens)
    model = load_model(folder, quantization=quantization, native=True)
    off = (Paged(model, "native").logits(tokens, 33) - exact).square().mean().sqrt() / exact.std()
    assert 0 < off <= loss


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_continuations(checkpoint: Checkpoint, name: str) -> None:
    """64 greedy tokens on 20 prompts equal transformers' generate, with the prompts one by one and batched together."""
    folder, reference = checkpoint(name)
    prompts = [random_tokens(length, seed=length + i) for length in (3, 17, 40, 70) for i in range(5)]
    expected = []
    for first in range(0, 20, 5):  # prompts of one length at a time: no padding on the other side
        batch = torch.tensor(prompts[first : first + 5])
        mask = torch.ones_like(batch)
        out = reference.generate(
            batch, attention_mask=mask, do_sample=False, max_new_tokens=64, min_new_tokens=64, pad_token_id=0
        )
        expected += out[:, batch.shape[1] :].tolist()
    model = load_model(folder)
    together = Paged(model, frames=500).greedy(prompts, 64, chunk=16)
    assert together == expected
    paged = Paged(model, frames=500)
    assert [paged.greedy([prompt], 64, chunk=1000)[0] for prompt in prompts] == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama3.1", "qwen3"])
def test_half_precision(checkpoint: Checkpoint, name: str, dtype: str) -> None:
    """In bf16 and fp16, KV included, logits are no further from fp32 than twice what transformers' own are."""
    folder, reference = checkpoint(name)
    tokens = random_tokens(100, seed=5)
    exact = reference_logits(reference, tokens)
    torch_dtype = getattr(torch, dtype)
    half = type(reference).from_pretrained(folder, dtype=torch_dtype, attn_implementation="eager")
    theirs = (reference_logits(half, tokens) - exact).abs().max()
    model = load_model(folder, dtype=dtype)
    assert model.dtype == torch_dtype
    ours = (Paged(model, kv_dtype=torch_dtype).logits(tokens, 33) - exact).abs().max()
    assert ours <= 2 * theirs


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_cache_under_fp32_weights(checkpoint: Checkpoint, kv_dtype: torch.dtype) -> None:
    """An fp32 model over a half-precision cache differs by the rounding of K and V: a few hundredths of a logit."""
    folder, reference = checkpoint("llama2")
    tokens = random_tokens(100, seed=6)
    exact = reference_logits(reference, tokens)
    ours = Paged(load_model(folder), kv_dtype=kv_dtype).logits(tokens, 33)
    assert (ours - exact).abs().max() <= 0.1 * exact.std()


def test_only_wanted_rows(checkpoint: Checkpoint) -> None:
    """Logits come for the wanted rows, in the order asked for, none of them if none is wanted."""
    folder, _ = checkpoint("qwen2")
    model = load_model(folder)
    tokens = torch.tensor(random_tokens(12, seed=7))
    positions = torch.arange(12)
    paged = Paged(model)
    everything = paged.step([(0, 0, tokens.tolist())], everywhere=True)
    again = model.logits(model.forward(tokens, positions, paged.attention, torch.tensor([7, 2, 11, 7])))
    torch.testing.assert_close(again, everything[[7, 2, 11, 7]], rtol=0, atol=1e-5)
    nothing = model.logits(model.forward(tokens, positions, paged.attention, torch.empty(0, dtype=torch.int64)))
    assert nothing.shape == (0, VOCAB)
    assert nothing.dtype == torch.float32


def test_nothing_is_computed_of_no_rows(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a chunk of which nothing is wanted, what follows the last layer's keys and values is left out: kernels of a
    GPU refuse to work on no rows. What comes after it finds them all."""
    folder, _ = checkpoint("qwen2")
    model, rows, norm = load_model(folder), list[int](), RMSNorm.__call__
    tokens = random_tokens(12, seed=7)
    expected = Paged(model).logits(tokens, 12)[-1]

    def counted(self: RMSNorm, x: torch.Tensor) -> torch.Tensor:
        rows.append(len(x))
        return norm(self, x)

    monkeypatch.setattr(RMSNorm, "__call__", counted)
    paged = Paged(model)
    assert len(paged.step([(0, 0, tokens[:8])], wanted=torch.empty(0, dtype=torch.int64))) == 0
    assert rows == [8] * (2 * model.geometry.layers - 1)
    torch.testing.assert_close(paged.step([(0, 8, tokens[8:])])[-1], expected, rtol=0, atol=1e-5)
