"""Checkpoints as quantisers publish them: every format, written here from its definition, loads as what it means."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from server.errors import ConfigError
from server.kernels.native import load
from server.models.quantized import SCHEMES, float_tensors, scheme_of
from server.models.weights import NATIVE_QUANTIZATIONS, DTypeName, load_model, weights_bytes
from tests.numeric.conftest import Checkpoint
from tests.numeric.families import Paged
from tests.numeric.test_models import random_tokens

TOKENS = random_tokens(40, seed=9)
Tensors = dict[str, torch.Tensor]
native = pytest.mark.skipif(load() is None, reason="the native kernels were not built: no C compiler")


# -- what the formats say --------------------------------------------------------------------------------------------


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint32 [rows, words] of unsigned codes [rows, n]: code i of a word from bit i * bits on, zeros after the last."""
    each = 32 // bits
    words = np.zeros((codes.shape[0], -(-codes.shape[1] // each)), np.uint32)
    for place in range(codes.shape[1]):
        words[:, place // each] |= codes[:, place].astype(np.uint32) << np.uint32(place % each * bits)
    return words


def words(packed: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(packed).view(np.int32))


def scales_of(rng: np.random.Generator, shape: tuple[int, ...], size: float, dtype: torch.dtype) -> torch.Tensor:
    """Scales that differ by up to three times, under which weights are of about `size`."""
    return torch.from_numpy(rng.uniform(0.5, 1.5, shape) * size).to(dtype)


def meant(codes: np.ndarray, zeros: np.ndarray | int, scales: torch.Tensor, group: np.ndarray) -> torch.Tensor:
    """(code - zero) * scale, with those of the group that each input is in: float32 [out, in]."""
    zero = zeros[:, group] if isinstance(zeros, np.ndarray) else zeros
    whole = torch.from_numpy(codes.astype(np.float32) - np.float32(zero))
    return whole * scales.float()[:, torch.from_numpy(group)]


@dataclass(frozen=True)
class Format:
    """One way to store a linear layer. `settings`: the config's `quantization_config`."""

    settings: dict[str, Any]
    store: Callable[..., tuple[Tensors, torch.Tensor]]
    options: dict[str, Any] = field(default_factory=dict)

    def layer(self, shape: tuple[int, int], rng: np.random.Generator) -> tuple[Tensors, torch.Tensor]:
        """Random codes and scales of a layer [out, in]: its tensors by last part of their names, and its weights."""
        return self.store(shape, rng, **self.options)


def awq(shape: tuple[int, int], rng: np.random.Generator, group: int) -> tuple[Tensors, torch.Tensor]:
    outputs, inputs = shape
    group = inputs if group < 0 else group
    codes, zeros = rng.integers(0, 16, shape), rng.integers(0, 16, (outputs, inputs // group))
    scales = scales_of(rng, zeros.shape, 0.15 / inputs**0.5, torch.float16)

    def interleaved(table: np.ndarray) -> torch.Tensor:  # [out, n] -> [n, out / 8]; nibble i holds output order[i]
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        return words(pack(table.T.reshape(table.shape[1], -1, 8)[:, :, order].reshape(table.shape[1], -1), 4))

    stored = {"qweight": interleaved(codes), "qzeros": interleaved(zeros), "scales": scales.T.contiguous()}
    return stored, meant(codes, zeros, scales, np.arange(inputs) // group)


def gptq(
    shape: tuple[int, int],
    rng: np.random.Generator,
    bits: int,
    group: int,
    less_one: bool = True,
    order: str = "stored",
) -> tuple[Tensors, torch.Tensor]:
    outputs, inputs = shape
    group_of = np.arange(inputs) // group
    if order == "shuffled":
        group_of = rng.permutation(group_of)
    codes, zeros = rng.integers(0, 2**bits, shape), rng.integers(0, 2**bits, (outputs, group_of.max() + 1))
    scales = scales_of(rng, zeros.shape, 2.4 / 2**bits / inputs**0.5, torch.float16)
    qzeros = pack(zeros.T, bits)
    if less_one:  # one is taken from every zero of a word at once
        qzeros -= np.uint32(sum(1 << bits * place for place in range(32 // bits)))
    stored = {
        "qweight": words(pack(codes, bits).T),
        "qzeros": words(qzeros),
        "scales": scales.T.contiguous(),
        "g_idx": torch.from_numpy(group_of.astype(np.int32)),
    }
    if order == "absent":
        del stored["g_idx"]
    return stored, meant(codes, zeros, scales, group_of)


def packed(
    shape: tuple[int, int], rng: np.random.Generator, bits: int, group: int | None = None, symmetric: bool = True,
    shuffled: bool | None = None,
) -> tuple[Tensors, torch.Tensor]:  # fmt: skip
    outputs, inputs = shape
    half = 2 ** (bits - 1)
    group_of = np.arange(inputs) // (group or inputs)
    stored = {"weight_shape": torch.tensor(shape)}
    if shuffled is not None:
        stored["weight_g_idx"] = torch.full((inputs,), -1, dtype=torch.int32)
    if shuffled:
        group_of = rng.permutation(group_of)
        stored["weight_g_idx"] = torch.from_numpy(group_of.astype(np.int32))
    codes = rng.integers(-half, half, shape)
    zeros = np.zeros((outputs, group_of.max() + 1), int)
    if not symmetric:
        zeros = rng.integers(-half, half, zeros.shape)
        stored["weight_zero_point"] = words(pack(zeros.T + half, bits).T)
    scales = scales_of(rng, zeros.shape, 1.2 / half / inputs**0.5, torch.bfloat16)
    stored |= {"weight_packed": words(pack(codes + half, bits)), "weight_scale": scales}
    return stored, meant(codes, zeros, scales, group_of)


def int8(
    shape: tuple[int, int], rng: np.random.Generator, zero: bool = False, group: int | None = None
) -> tuple[Tensors, torch.Tensor]:
    group_of = np.arange(shape[1]) // (group or shape[1])
    codes = rng.integers(-127, 128, shape)
    codes[:, :: group or shape[1]] = 127  # as symmetric quantisers leave it: the largest of a scale is the last code
    scales = scales_of(rng, (shape[0], group_of.max() + 1), 0.014 / shape[1] ** 0.5, torch.bfloat16)
    stored = {"weight": torch.from_numpy(codes.astype(np.int8)), "weight_scale": scales}
    zeros = rng.integers(-9, 10, tuple(scales.shape)) if zero else 0
    if zero:
        stored["weight_zero_point"] = torch.from_numpy(np.asarray(zeros, np.int8))
    return stored, meant(codes, zeros, scales, group_of)


def float8(
    shape: tuple[int, int],
    rng: np.random.Generator,
    block: tuple[int, int],
    name: str = "weight_scale",
    flat: bool = False,
) -> tuple[Tensors, torch.Tensor]:
    rows, columns = (of or whole for of, whole in zip(block, shape, strict=True))
    codes = torch.from_numpy(rng.normal(0, 60, shape)).to(torch.float32).to(torch.float8_e4m3fn)
    counts = (-(-shape[0] // rows), -(-shape[1] // columns))
    scales = scales_of(rng, counts, 0.025 / shape[1] ** 0.5, torch.float32)
    scale_of = scales[np.arange(shape[0]) // rows][:, np.arange(shape[1]) // columns]
    return {"weight": codes, name: scales.flatten() if flat else scales}, codes.float() * scale_of


def compressed(form: str, weights: Mapping[str, Any], **others: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": dict(weights), "input_activations": None}}
    settings = {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": ["lm_head"]}
    return settings | others


INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
BLOCK = {"strategy": "block", "block_structure": [32, 48]}

FORMATS = {
    "awq": Format(AWQ, awq, {"group": 32}),
    "awq, a scale an output": Format({"quant_method": "awq", "w_bit": 4, "q_group_size": -1}, awq, {"group": -1}),
    "gptq": Format(GPTQ, gptq, {"bits": 4, "group": 32}),
    "gptq, groups in order": Format(GPTQ, gptq, {"bits": 4, "group": 32, "order": "absent"}),
    "gptq, a last group cut short": Format(GPTQ | {"group_size": 40}, gptq, {"bits": 4, "group": 40}),
    "gptq, 8 bits": Format(GPTQ | {"bits": 8}, gptq, {"bits": 8, "group": 32}),
    "gptq, desc_act": Format(GPTQ | {"desc_act": True}, gptq, {"bits": 4, "group": 32, "order": "shuffled"}),
    "gptq_v2": Format(GPTQ | {"checkpoint_format": "gptq_v2"}, gptq, {"bits": 4, "group": 32, "less_one": False}),
    "fp8": Format({"quant_method": "fp8", "activation_scheme": "static"}, float8, {"block": (0, 0), "flat": True}),
    "fp8, a scale an output": Format({"quant_method": "fp8"}, float8, {"block": (1, 0)}),
    "fp8, blocks": Format(
        {"quant_method": "fp8", "weight_block_size": [32, 48]}, float8, {"block": (32, 48), "name": "weight_scale_inv"}
    ),
    "pack-quantized": Format(compressed("pack-quantized", INT4), packed, {"bits": 4, "group": 32}),
    "pack-quantized, zeros": Format(
        compressed("pack-quantized", INT4 | {"symmetric": False}), packed, {"bits": 4, "group": 32, "symmetric": False}
    ),
    "pack-quantized, actorder": Format(
        compressed("pack-quantized", INT4 | {"actorder": "group"}), packed, {"bits": 4, "group": 32, "shuffled": True}
    ),
    "pack-quantized, order unused": Format(
        compressed("pack-quantized", INT4), packed, {"bits": 4, "group": 32, "shuffled": False}
    ),
    "pack-quantized, 8 bits": Format(compressed("pack-quantized", INT8), packed, {"bits": 8}),
    "pack-quantized, 8 bits, zeros": Format(
        compressed("pack-quantized", INT8 | {"symmetric": False}), packed, {"bits": 8, "symmetric": False}
    ),
    "int-quantized": Format(compressed("int-quantized", INT8), int8),
    "int-quantized, zeros": Format(compressed("int-quantized", INT8 | {"symmetric": False}), int8, {"zero": True}),
    "naive-quantized": Format(
        compressed("naive-quantized", {"num_bits": 8, "type": "int", "group_size": 32}), int8, {"group": 32}
    ),
    "float-quantized": Format(compressed("float-quantized", FLOAT8), float8, {"block": (0, 0), "flat": True}),
    "float-quantized, a scale an output": Format(
        compressed("float-quantized", FLOAT8 | {"strategy": "channel"}), float8, {"block": (1, 0)}
    ),
    "naive-quantized, blocks": Format(
        compressed("naive-quantized", FLOAT8 | BLOCK), float8, {"block": (32, 48)}
    ),
}  # fmt: skip


# -- checkpoints of them ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A quantised checkpoint and a plain one of the weights that it means."""

    quantised: Path
    plain: Path

    def edit(self, **changes: torch.Tensor | None) -> None:
        """Replaces, adds or (None) drops tensors of the quantised one; names are given with __ for dots."""
        path = self.quantised / "model.safetensors"
        tensors: dict[str, torch.Tensor | None] = {**load_file(path)}
        tensors |= {name.replace("__", "."): value for name, value in changes.items()}
        save_file({name: value for name, value in tensors.items() if value is not None}, path)

    def configure(self, settings: object) -> None:
        path = self.quantised / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": settings}))

    def refuses(self, *expected: str) -> None:
        with pytest.raises(ConfigError) as caught:
            load_model(self.quantised)
        assert "\n" not in caught.value.message
        for text in expected:
            assert text in caught.value.message


Make = Callable[..., Pair]


@pytest.fixture
def make(checkpoint: Checkpoint, tmp_path: Path) -> Make:
    """`make(format, family)`: all linear layers of the family's tiny model in the format, save those `ignored`."""

    def pair(form: Format | str, family: str = "llama2", ignored: str = "lm_head") -> Pair:
        rng = np.random.default_rng(5)
        form = FORMATS[form] if isinstance(form, str) else form
        made = Pair(tmp_path / "quantised", tmp_path / "plain")
        for folder in (made.quantised, made.plain):
            shutil.copytree(checkpoint(family)[0], folder)
        plain = load_file(made.plain / "model.safetensors")
        quantised = dict(plain)
        for name in plain:
            if name.endswith(("proj.weight", "lm_head.weight")) and ignored not in name:
                del quantised[name]
                parts, plain[name] = form.layer(tuple(plain[name].shape), rng)
                quantised |= {name.removesuffix("weight") + part: tensor for part, tensor in parts.items()}
        save_file({name: tensor.contiguous() for name, tensor in quantised.items()},
                  made.quantised / "model.safetensors")  # fmt: skip
        save_file({name: tensor.contiguous() for name, tensor in plain.items()}, made.plain / "model.safetensors")
        made.configure(form.settings)
        return made

    return pair


def logits(folder: Path, **options: Any) -> torch.Tensor:
    backend = "native" if options.get("native") else "cpu"
    return Paged(load_model(folder, **options), backend).logits(TOKENS, 40)


def test_every_scheme_is_tested() -> None:
    """A method added to SCHEMES without a checkpoint here fails this test."""
    assert {form.settings["quant_method"] for form in FORMATS.values()} == set(SCHEMES)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format(make: Make, name: str) -> None:
    """A quantised checkpoint computes the same bits as a plain one of the weights that its format means."""
    pair = make(name)
    expected = logits(pair.plain)
    assert 0.1 < expected.std() < 10
    assert torch.equal(logits(pair.quantised), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["awq", "gptq", "fp8, blocks", "pack-quantized"])
def test_weights_are_rounded_once(make: Make, name: str, dtype: str) -> None:
    """In half precision every weight is the nearest to what the format means."""
    pair = make(name)
    loaded, plain = (load_model(folder, dtype=dtype).parameters() for folder in (pair.quantised, pair.plain))  # type: ignore[arg-type]
    assert all(torch.equal(loaded[name], plain[name]) for name in plain)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["awq", "gptq, desc_act", "fp8", "pack-quantized, zeros"])
@pytest.mark.parametrize("family", ["qwen2", "qwen2.5", "qwen3"])
def test_other_families(make: Make, name: str, family: str) -> None:
    """Biases, tied embeddings and norms on queries and keys stay what they are beside quantised layers."""
    pair = make(name, family)
    assert torch.equal(logits(pair.quantised), logits(pair.plain))


def test_what_is_ignored_is_plain(make: Make) -> None:
    """Layers that the quantiser left alone have plain weights, and one that it did not, such as a head, need not be in
    a decoder layer."""
    pair = make("gptq", ignored="mlp.down_proj")
    names = load_file(pair.quantised / "model.safetensors").keys()
    assert {"model.layers.0.mlp.down_proj.weight", "lm_head.qweight"} < names
    assert torch.equal(logits(pair.quantised), logits(pair.plain))


def test_layers_in_several_files(make: Make) -> None:
    """Codes and scales of one layer may lie in different files."""
    pair = make("gptq")
    whole = pair.quantised / "model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    place = {name: f"{'scales' if name.endswith('scales') else 'rest'}.safetensors" for name in tensors}
    for file in set(place.values()):
        save_file({name: tensors[name] for name in tensors if place[name] == file}, pair.quantised / file)
    (pair.quantised / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))
    assert torch.equal(logits(pair.quantised), logits(pair.plain))


def test_fused_projections(make: Make) -> None:
    """Quantised projections that are stored as one matrix load like those that are not."""
    pair = make("pack-quantized")
    tensors = load_file(pair.quantised / "model.safetensors")
    for layer in range(3):
        for whole, parts in (("self_attn.qkv", "qkv"), ("mlp.gate_up", ("gate", "up"))):
            block = f"model.layers.{layer}.{whole.split('.')[0]}."
            fused = f"model.layers.{layer}.{whole}_proj."
            for kind in ("weight_packed", "weight_scale"):
                tensors[fused + kind] = torch.cat([tensors.pop(f"{block}{part}_proj.{kind}") for part in parts])
            shapes = [tensors.pop(f"{block}{part}_proj.weight_shape") for part in parts]
            tensors[fused + "weight_shape"] = torch.tensor([sum(int(rows) for rows, _ in shapes), int(shapes[0][1])])
    save_file(tensors, pair.quantised / "model.safetensors")
    assert torch.equal(logits(pair.quantised), logits(pair.plain))


def test_groups_of_layers(make: Make) -> None:
    """Layers may differ in format and bits: a group that names a layer comes before one for all linear layers."""
    pair, other = make("pack-quantized"), {"num_bits": 8, "type": "int", "strategy": "channel"}
    codes, weight = int8((64, 96), np.random.default_rng(6))
    name, settings = "model.layers.1.mlp.down_proj", compressed("mixed-precision", INT4)
    settings["config_groups"]["group_0"]["format"] = "pack-quantized"
    named = {"targets": [r"re:.*layers\.1\.mlp\.down"], "weights": other, "format": "int-quantized"}
    settings["config_groups"]["group_1"] = named
    pair.configure(settings)
    dropped = dict.fromkeys([f"{name}.weight_packed", f"{name}.weight_shape"])
    pair.edit(**dropped, **{f"{name}.{part}": tensor for part, tensor in codes.items()})
    plain = load_file(pair.plain / "model.safetensors") | {f"{name}.weight": weight}
    save_file(plain, pair.plain / "model.safetensors")
    assert torch.equal(logits(pair.quantised), logits(pair.plain))


def test_bits_differ_between_layers(make: Make) -> None:
    """A GPTQ layer may have other bits than the config says of the rest."""
    pair = make("gptq")
    stored, weight = gptq((64, 96), np.random.default_rng(6), 8, 32)
    pair.edit(**{f"model.layers.1.mlp.down_proj.{part}": tensor for part, tensor in stored.items()})
    plain = load_file(pair.plain / "model.safetensors") | {"model.layers.1.mlp.down_proj.weight": weight}
    save_file(plain, pair.plain / "model.safetensors")
    assert torch.equal(logits(pair.quantised), logits(pair.plain))


def test_scales_of_activations(make: Make) -> None:
    """Scales of inputs and of KV concern no weight: they are left out."""
    pair = make("fp8")
    expected = logits(pair.quantised)
    pair.edit(model__layers__0__self_attn__q_proj__input_scale=torch.ones(1))
    pair.edit(model__layers__1__self_attn__k_scale=torch.ones(1))
    assert torch.equal(logits(pair.quantised), expected)


def test_biases_of_zeros(make: Make) -> None:
    """A bias of zeros that the model has no place for is left out; one that adds something is refused."""
    pair = make("gptq")
    expected = logits(pair.quantised)
    pair.edit(model__layers__0__mlp__down_proj__bias=torch.zeros(64))
    assert torch.equal(logits(pair.quantised), expected)
    pair.edit(model__layers__0__mlp__down_proj__bias=torch.ones(64))
    pair.refuses("model.layers.0.mlp.down_proj.bias", "no place")


def test_one_layer_at_a_time(make: Make) -> None:
    """Tensors are read as they are asked for: never more than those of one layer beyond what was taken."""
    tensors = load_file(make("gptq").quantised / "model.safetensors")
    read: list[str] = []

    def get(name: str) -> torch.Tensor:
        read.append(name)
        return tensors[name]

    scheme = scheme_of({"quantization_config": GPTQ})
    assert scheme is not None
    for taken, _ in float_tensors(tensors, get, scheme, ()):
        assert {name.rpartition(".")[0] for name in read} == {taken.rpartition(".")[0]}
        read.clear()


# -- kept as -----------------------------------------------------------------------------------------------------------


@native
@pytest.mark.parametrize("quantization", ["none", *NATIVE_QUANTIZATIONS])
@pytest.mark.parametrize("name", ["awq", "fp8, blocks", "int-quantized"])
def test_packed_anew(make: Make, name: str, quantization: str) -> None:
    """The native formats are made of the values that a quantised checkpoint means, as of any others."""
    pair = make(name)
    options: dict[str, Any] = {"native": True, "quantization": quantization}
    assert torch.equal(logits(pair.quantised, **options), logits(pair.plain, **options))


@native
def test_int8_is_kept(make: Make) -> None:
    """Under `int8`, the codes of a symmetric scale an output are kept if they reach 127, and the scale but for the
    rounding of a product."""
    pair = make("int-quantized")
    model = load_model(pair.quantised, native=True, quantization="int8")
    stored = load_file(pair.quantised / "model.safetensors")
    for index, layer in enumerate(model.layers):  # type: ignore[attr-defined]
        codes, scales = (stored[f"model.layers.{index}.mlp.down_proj.{part}"] for part in ("weight", "weight_scale"))
        kept = layer.down.rows(torch.arange(64))
        assert torch.equal((kept / scales.float()).round(), codes.float())
        assert (kept - codes.float() * scales.float()).abs().max() <= 2**-22 * kept.abs().max()


@native
def test_int8_in_groups_is_kept(make: Make) -> None:
    """Under `int8-g32`, symmetric codes that reach 127 in every group of 32 and have scales in bf16 keep their bits."""
    pair = make("naive-quantized")
    model = load_model(pair.quantised, native=True, quantization="int8-g32")
    plain = load_file(pair.plain / "model.safetensors")
    for index, layer in enumerate(model.layers):  # type: ignore[attr-defined]
        expected = plain[f"model.layers.{index}.mlp.down_proj.weight"]
        assert torch.equal(layer.down.rows(torch.arange(64)), expected)


@pytest.mark.parametrize(
    "name",
    ["fp8", "fp8, a scale an output", "float-quantized", "float-quantized, a scale an output"],
)
def test_fp8_is_kept(make: Make, name: str) -> None:
    """Under `fp8`, codes with a scale for each output, or one for all, are multiplied as they are; projections that are
    stored apart keep their own."""
    pair = make(name)
    model = load_model(pair.quantised, dtype="bfloat16", quantization="fp8")
    stored = load_file(pair.quantised / "model.safetensors")
    for index, layer in enumerate(model.layers):  # type: ignore[attr-defined]
        fused = {
            layer.qkv: ("self_attn.q", "self_attn.k", "self_attn.v"),
            layer.gate_up.linear: ("mlp.gate", "mlp.up"),
            layer.down: ("mlp.down",),
        }
        for linear, places in fused.items():
            codes, scales = (
                [stored[f"model.layers.{index}.{place}_proj.{part}"] for place in places]
                for part in ("weight", "weight_scale")
            )
            spread = [scale.float().reshape(-1).expand(len(code)) for code, scale in zip(codes, scales)]
            assert torch.equal(linear.codes.float(), torch.cat(codes).float())
            assert torch.equal(linear.scales[0], torch.cat(spread))


@pytest.mark.parametrize("name", ["fp8, blocks", "awq"])
def test_fp8_of_others(make: Make, name: str) -> None:
    """Weights stored otherwise are rounded to fp8 from what they mean."""
    pair = make(name)
    ours, plain = (load_model(folder, dtype="bfloat16", quantization="fp8") for folder in (pair.quantised, pair.plain))
    for layer, expected in zip(ours.layers, plain.layers, strict=True):  # type: ignore[attr-defined]
        assert torch.equal(layer.down.codes.float(), expected.down.codes.float())
        assert torch.equal(layer.down.scales, expected.down.scales)


@pytest.mark.parametrize(
    ("quantization", "packs"), [("none", False), ("fp8", False), pytest.param("int4-g32", True, marks=native)]
)
def test_sizes(make: Make, quantization: str, packs: bool, caplog: pytest.LogCaptureFixture) -> None:
    """The memory that weights need is known before they are read, and one line of the log says it."""
    folder, known = make("awq").quantised, [quantization] * (quantization != "none")
    chosen, sizes = weights_bytes(folder, "bfloat16", "auto", quantization, known, packs)
    with caplog.at_level(logging.INFO):
        model = load_model(folder, dtype="bfloat16", quantization=quantization, native=packs)
    assert sizes[chosen] == sum(parameter.nbytes for parameter in model.parameters().values())
    (line,) = [record.getMessage() for record in caplog.records if "quantised" in record.getMessage()]
    assert "awq" in line
    assert ("bfloat16" if quantization == "none" else quantization) in line


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_sizes_beside_what_fp8_cannot_be(make: Make, dtype: DTypeName) -> None:
    """Where weights could be fp8 but for their dtype, its size is not offered; asked for, it is refused."""
    folder = make("awq").plain
    assert "--quantization fp8" in weights_bytes(folder, "bfloat16", "auto", "none", ("fp8",))[1]
    assert "--quantization fp8" not in weights_bytes(folder, dtype, "auto", "none", ("fp8",))[1]
    with pytest.raises(ConfigError, match="--dtype bfloat16"):
        weights_bytes(folder, dtype, "auto", "fp8", ("fp8",))


def test_dtype_of_a_silent_config(make: Make) -> None:
    """Where the config names no dtype, it is that of tensors that hold floats, not codes."""
    pair = make("awq")
    pair.edit(a=torch.zeros(1, dtype=torch.int32))
    path = pair.quantised / "config.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "dtype"}))
    pair.edit(a=None)
    assert load_model(pair.quantised).dtype == torch.float32


# -- what can be wrong -----------------------------------------------------------------------------------------------


def group(**changes: Any) -> dict[str, Any]:
    return compressed("pack-quantized", INT4 | changes)


@pytest.mark.parametrize(("settings", "expected"), [
    ({"quant_method": "bitsandbytes"}, ("quant_method 'bitsandbytes'", "awq, compressed-tensors, fp8, gptq")),
    ({"bits": 4}, ("quant_method",)),
    ("awq", ("quantization_config is not an object",)),
    (AWQ | {"version": "gemv"}, ("version 'gemv'", "gemm")),
    (AWQ | {"bits": 8}, ("bits 8", "awq", "4")),
    (AWQ | {"group_size": None}, ("group_size None",)),
    (GPTQ | {"bits": 3}, ("bits 3", "4, 8")),
    (GPTQ | {"checkpoint_format": "marlin"}, ("checkpoint_format 'marlin'", "gptq, gptq_v2")),
    ({"quant_method": "fp8", "weight_block_size": [128]}, ("weight_block_size [128]",)),
    (compressed("nvfp4-pack-quantized", INT4), ("format 'nvfp4-pack-quantized'", "pack-quantized, int-quantized")),
    (compressed("float-quantized", INT4), ("config_groups.group_0.weights.type 'int'", "float")),
    (group(num_bits=3), ("config_groups.group_0.weights.num_bits 3", "4, 8")),
    (group(strategy="tensor_group"), ("strategy 'tensor_group'", "tensor, channel, group, block")),
    (group(group_size=0), ("config_groups.group_0.weights.group_size 0",)),
    (compressed("pack-quantized", {}) | {"config_groups": {"W4A16": ["Linear"]}}, ("config_groups.W4A16",)),
    (group() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, ("sparsity_config.format", "dense")),
    (group() | {"transform_config": {"config_groups": {"R1": {}}}}, ("transform_config",)),
])  # fmt: skip
def test_settings_that_are_not_known(make: Make, settings: object, expected: tuple[str, ...]) -> None:
    """A method, format or width that cannot be read is refused in one line that names the field and what there is."""
    pair = make("awq")
    pair.configure(settings)
    pair.refuses("quantization_config", *expected)


def test_a_layer_without_its_zeros(make: Make) -> None:
    """A tensor that a layer needs and the files lack is named."""
    pair = make("awq")
    pair.edit(model__layers__1__mlp__up_proj__qzeros=None)
    pair.refuses("lacks model.layers.1.mlp.up_proj.qzeros")


def test_a_layer_in_no_group(make: Make) -> None:
    """A layer with scales of which the config says nothing is refused by name."""
    pair, settings = make("pack-quantized"), group()
    settings["config_groups"]["group_0"]["targets"] = ["re:.*self_attn.*"]
    pair.configure(settings)
    pair.refuses("config_groups", "model.layers.0.mlp.")


@pytest.mark.parametrize(("name", "part", "tensor", "expected"), [
    ("awq", "scales", torch.ones(3, 96), ("the scales", "[96, 3]", "[96, 2]")),
    ("awq", "qweight", torch.ones(64, 12), ("qweight", "float32", "not a matrix of int32")),
    ("gptq", "qzeros", torch.ones(2, 6, dtype=torch.int32), ("qzeros", "2 bits", "4, 8")),
    ("gptq", "g_idx", torch.full((64,), 2, dtype=torch.int32), ("groups", "2 scales")),
    ("gptq", "g_idx", torch.full((64,), -1, dtype=torch.int32), ("groups", "2 scales")),
    ("gptq", "qweight", torch.ones(4, 96, dtype=torch.int32), ("groups", "up_proj")),
    ("awq", "qweight", torch.ones(32, 12, dtype=torch.int32), ("the scales", "up_proj")),
    ("fp8", "weight", torch.ones(96, 64, dtype=torch.int8), ("weight", "int8", "not a matrix of float8")),
    ("fp8, blocks", "weight_scale_inv", torch.ones(2, 2), ("[2, 2]", "[3, 2]")),
    ("int-quantized", "weight", torch.ones(96, 64), ("weight", "float32", "not a matrix of int8")),
])  # fmt: skip
def test_tensors_that_do_not_fit(
    make: Make, name: str, part: str, tensor: torch.Tensor, expected: tuple[str, ...]
) -> None:
    """A tensor of another type or shape than the config and the layer's others ask for is refused by name."""
    pair = make(name)
    pair.edit(**{f"model__layers__1__mlp__up_proj__{part}": tensor})
    pair.refuses("model.layers.1.mlp.up_proj", *expected)


def test_codes_without_scales(make: Make) -> None:
    """Codes that nothing says the scale of are refused, not taken for weights."""
    pair = make("fp8")
    pair.edit(model__layers__1__mlp__up_proj__weight_scale=None)
    pair.refuses("model.layers.1.mlp.up_proj.weight", "float8_e4m3fn", "scales")
    pair.configure(None)
    pair.refuses("float8_e4m3fn", "config.json")
