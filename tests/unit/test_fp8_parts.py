"""Models with linear layers in fp8, over what the kernels say that they do: weights, and what comes of them."""

from __future__ import annotations

import sys

import pytest
import torch

from server.config import Config
from server.errors import ConfigError
from server.kernels.flashinfer import FP8_MAX
from server.models.fp8 import Fp8Linear, Fp8Parts, Fp8Rows
from server.models.layers import TorchParts
from server.place import place_of
from tests.numeric import fp8_fake
from tests.numeric.families import FAMILIES, VARIANTS, Paged
from tests.unit.test_cuda_parts import model

BOUND = 0.03
"""Of the mean error of logits, relative to their standard deviation: a few layers in bf16."""
PARTS = TorchParts(torch.bfloat16, "cpu")


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "server.kernels.fp8", fp8_fake)
    import server.kernels

    monkeypatch.setattr(server.kernels, "fp8", fp8_fake, raising=False)


@pytest.mark.parametrize("name", [*FAMILIES, *VARIANTS])
def test_logits_are_those_of_the_rounded_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every family and setting, with inputs that are not rounded: whatever is fused and split, each projection has its
    own weights and scales. What is left is the rounding of these products to bf16."""
    monkeypatch.setattr(fp8_fake, "quantise_rows", lambda x: (x, torch.ones(len(x), 1)))
    text = torch.randint(0, 256, (90,), generator=torch.Generator().manual_seed(3)).tolist()
    ours, theirs = model(name, Fp8Parts(PARTS)), model(name, TorchParts(torch.float32, "cpu"))
    targets = theirs.parameters()
    for place, parameter in ours.parameters().items():
        if isinstance(parameter, Fp8Rows):
            rows, linear = slice(parameter.first, parameter.first + parameter.count), parameter.linear
            targets[place].copy_(linear.codes[rows].float() * linear.scales[0, rows, None])
        else:
            targets[place].copy_(parameter)
    found, expected = (Paged(made, "reference").logits(text, 40) for made in (ours, theirs))
    assert (found - expected).abs().mean() <= BOUND * expected.std()
    ours.layers[1].qkv.scales.copy_(ours.layers[1].qkv.scales.roll(1, 1))  # planted: each output has its neighbour's
    assert (Paged(ours, "reference").logits(text, 40) - expected).abs().mean() > BOUND * expected.std()


@pytest.mark.parametrize("name", ["llama3.1", "qwen3"])
def test_inputs_are_rounded(name: str) -> None:
    """Two factors of 3 bits leave an error of 4 % in every product: logits keep most of their likeness."""
    text = torch.randint(0, 256, (90,), generator=torch.Generator().manual_seed(3)).tolist()
    found = Paged(model(name, Fp8Parts(PARTS)), "reference").logits(text, 90)
    expected = Paged(model(name, PARTS), "reference").logits(text, 90)
    assert torch.corrcoef(torch.stack((found.flatten(), expected.flatten())))[0, 1] >= 0.94


def test_weights_are_rounded_by_output() -> None:
    """Each output has its own scale, its largest weight is kept, and nothing is further off than half a step."""
    linear = Fp8Linear(64, 32, False, "cpu")
    weight = torch.randn(32, 64) * torch.logspace(-6, 6, 32)[:, None]
    weight[3] = 0.0
    linear.part(0, 16).copy_(weight[:16])
    linear.part(16, 16).copy_(weight[16:].to(torch.bfloat16))
    weight[16:] = weight[16:].to(torch.bfloat16).float()
    kept = linear.codes.float() * linear.scales.t()
    torch.testing.assert_close(kept.abs().amax(dim=1), weight.abs().amax(dim=1))
    half_a_step = torch.maximum(weight.abs() * 2**-4, linear.scales.t() * 2**-10)
    assert ((kept - weight).abs() <= half_a_step * 1.001).all()
    assert linear.codes.float().abs().max() == FP8_MAX
    assert linear.part(0, 16).nbytes == 16 * 64 + 16 * 4


def test_a_row_is_rounded_by_itself() -> None:
    """A row's result does not depend on what is fed beside it, however large that is."""
    linear = Fp8Linear(32, 16, False, "cpu")
    linear.part(0, 16).copy_(torch.randn(16, 32))
    x = torch.randn(5, 32).to(torch.bfloat16)
    alone = linear(x[2:3])
    x[0] *= 1000
    assert torch.equal(linear(x)[2:3], alone)


def test_a_product_is_added_in_place() -> None:
    """`add_to` gives the sum in the tensor that it adds to."""
    linear = Fp8Linear(32, 16, True, "cpu")
    linear.part(0, 16).copy_(torch.randn(16, 32))
    assert linear.bias is not None
    linear.bias.normal_()
    x, onto = torch.randn(3, 32).to(torch.bfloat16), torch.randn(3, 16).to(torch.bfloat16)
    expected = onto.float() + linear(x).float()
    assert linear.add_to(x, onto) is onto
    torch.testing.assert_close(onto.float(), expected, rtol=2**-8, atol=2**-6)  # it may be rounded once, or twice


@pytest.mark.parametrize("shape", [(60, 32), (64, 24)])
def test_layers_of_odd_sizes_are_refused(shape: tuple[int, int]) -> None:
    """Tensor cores take sixteen at once."""
    with pytest.raises(ConfigError, match=f"multiple of 16 inputs and outputs, not {shape[0]} and {shape[1]}"):
        Fp8Linear(*shape, False, "cpu")


def test_it_computes_in_bf16() -> None:
    """Others are refused with what to do."""
    with pytest.raises(ConfigError, match="not in float16; use --dtype bfloat16"):
        Fp8Parts(TorchParts(torch.float16, "cpu"))


def test_a_cpu_refuses_it() -> None:
    """With what there is instead."""
    config = Config.model_validate({"model": {"model": "demo", "quantization": "fp8"}})
    with pytest.raises(ConfigError, match="on a CPU use --quantization w8a8"):
        place_of(config)
