"""The parts of decoders for a GPU, over a stand-in for FlashInfer, beside torch's parts."""

from __future__ import annotations

import pytest
import torch

from server.kernels.flashinfer import Operations
from server.models.base import Model, Parts
from server.models.cuda import CudaLinear, CudaParts
from server.models.layers import TorchParts
from server.models.weights import model_class
from tests.numeric.families import BASE, FAMILIES, VARIANTS, Paged
from tests.numeric.flashinfer_fake import FakeFlashInfer

TOLERANCE = 1e-4
"""Of logits, relative to their standard deviation; fp32 on both sides."""


def model(name: str, parts: Parts) -> Model:
    """A model with seeded parameters, the same for all parts."""
    config_class, architecture, differences = (FAMILIES | VARIANTS)[name]
    config = config_class(**{**BASE, **differences}, architectures=[architecture.__name__])
    made = model_class(config.to_dict()).build(config, parts)
    generator = torch.Generator().manual_seed(7)
    for parameter in made.parameters().values():
        values = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(values * 1.5 / parameter.shape[-1] ** 0.5 if len(parameter.shape) == 2 else 1 + 0.3 * values)
    return made


@pytest.mark.parametrize("name", [*FAMILIES, *VARIANTS])
def test_logits_are_those_of_torchs_parts(name: str) -> None:
    """Every family and setting gives the logits that torch's parts give, whole prompts or chunks of them."""
    text = torch.randint(0, 256, (90,), generator=torch.Generator().manual_seed(3)).tolist()
    library = FakeFlashInfer()
    ours = Paged(model(name, CudaParts(torch.float32, "cpu", Operations(library))), "reference")
    theirs = Paged(model(name, TorchParts(torch.float32, "cpu")), "reference").logits(text, 90)
    for chunk in (90, 17, 1):
        assert (ours.logits(text, chunk) - theirs).abs().max() <= TOLERANCE * theirs.std()


def test_a_layer_is_four_kernels_beside_its_products() -> None:
    """Of a layer without norms on heads there remain two norms, one rotation and one activation."""
    library = FakeFlashInfer()
    paged = Paged(model("llama2", CudaParts(torch.float32, "cpu", Operations(library))), "reference")
    paged.step([(0, 0, [1, 2, 3])])
    layers = BASE["num_hidden_layers"]
    called = [name for name, _, _ in library.calls]
    assert {name: called.count(name) for name in set(called)} == {
        "rmsnorm": 2 * layers + 1,
        "apply_rope_with_cos_sin_cache_inplace": layers,
        "silu_and_mul": layers,
    }


def test_heads_are_views_of_the_projection() -> None:
    """Queries, keys and values are not copied: they lie in the projection, the first two rotated there."""
    parts = CudaParts(torch.float32, "cpu", Operations(FakeFlashInfer()))
    made = model("qwen3", parts)
    qkv = torch.randn(5, (4 + 2 * 2) * 32)
    before = qkv.clone()
    q, k, v = made.layers[0].heads(qkv, *parts.angles(made.rotary, torch.arange(5)))
    assert q.data_ptr() == qkv.data_ptr()
    assert all(tensor.untyped_storage().data_ptr() == qkv.data_ptr() for tensor in (k, v))
    assert not torch.equal(qkv[:, : 6 * 32], before[:, : 6 * 32])
    assert torch.equal(qkv[:, 6 * 32 :], before[:, 6 * 32 :])


@pytest.mark.parametrize("bias", [False, True])
def test_the_residual_is_added_in_place(bias: bool) -> None:
    """`add_to` gives the sum in the tensor that it adds to."""
    linear = CudaLinear(8, 6, bias, torch.float32, "cpu")
    linear.weight.normal_()
    if linear.bias is not None:
        linear.bias.normal_()
    x, residual = torch.randn(3, 8), torch.randn(3, 6)
    expected = residual + linear(x)
    out = linear.add_to(x, residual)
    assert out is residual
    torch.testing.assert_close(out, expected)
