"""Quantised checkpoints: the codes and scales of one linear layer to its weights in floats.

Knows how each `quant_method` of a config.json names, packs and scales weights; refuses to know models, files, and what
becomes of the floats (they go where any checkpoint's do, and may be packed anew there). A layer is quantised if the
checkpoint has scales for it: what a quantiser left alone, such as `lm_head` on its ignore list, has a plain weight and
is loaded as ever. Scales of activations and of KV are left out: only weights are quantised here.

One layer at a time, about ten bytes of scratch memory a weight: 0.6 GB for the largest matrix of an 8B model, freed
before the next.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from server.errors import ConfigError
from server.registry import resolve

SCHEMES: dict[str, str] = {
    "awq": "server.models.quantized:Awq",
    "compressed-tensors": "server.models.quantized:CompressedTensors",
    "fp8": "server.models.quantized:Fp8",
    "gptq": "server.models.quantized:Gptq",
}
"""`quant_method` -> "module:class" of a `Scheme`, made from the whole `quantization_config`."""

SCALES = frozenset({"scales", "weight_scale", "weight_scale_inv"})
"""A layer with one of these is quantised."""
ACTIVATIONS = frozenset({
    "input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point",
    "q_scale", "k_scale", "v_scale", "kv_scale", "k_zero_point", "v_zero_point",
})  # fmt: skip
"""Of inputs, outputs and KV: no weight depends on them."""
AWQ_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word of 8 codes those of 8 consecutive outputs lie, in 4 bits each from the lowest."""
ONES = {4: 0x11111111, 8: 0x01010101}
"""Bits of a code -> a word with one in each."""


@dataclass(frozen=True, slots=True)
class Stored:
    """The tensors that a checkpoint has for one linear layer, by the last part of their names."""

    layer: str
    tensors: Mapping[str, Tensor]

    def get(self, part: str) -> Tensor | None:
        return self.tensors.get(part)

    def need(self, part: str) -> Tensor:
        if part not in self.tensors:
            raise ConfigError(f"the checkpoint lacks {self.layer}.{part}: fetch it again", param="model")
        return self.tensors[part]

    def words(self, part: str) -> Tensor:
        """A matrix of packed codes, int32 [rows, words]."""
        tensor = self.need(part)
        if tensor.dtype != torch.int32 or tensor.ndim != 2:
            raise self.wrong(part, "not a matrix of int32")
        return tensor

    def wrong(self, part: str, why: str) -> ConfigError:
        tensor = self.need(part)
        kind = str(tensor.dtype).removeprefix("torch.")
        return ConfigError(f"tensor {self.layer}.{part}, {kind} {list(tensor.shape)}, is {why}", param="model")


@dataclass(frozen=True, slots=True)
class RowCodes:
    """Weights as 8-bit floats with a scale for each row: what can be multiplied as it is. `codes` e4m3 [rows, in],
    `scales` fp32 [rows]."""

    codes: Tensor
    scales: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def split(self, rows: Sequence[int]) -> list[RowCodes]:
        """Consecutive parts of so many rows."""
        return [RowCodes(*part) for part in zip(self.codes.split(rows), self.scales.split(rows), strict=True)]

    def floats(self) -> Tensor:
        """float32 [rows, in]."""
        return self.codes.to(torch.float32).mul_(self.scales[:, None])


Values = Tensor | RowCodes


class Scheme(Protocol):
    """One `quant_method`. Made from a checkpoint's `quantization_config`; ConfigError for what it cannot read."""

    @property
    def parts(self) -> Collection[str]:
        """Last parts of the names of the tensors that make up a weight."""
        ...

    def weight(self, stored: Stored, /) -> Values:
        """float32 [out, in], or the codes, from `parts`, as many as there are. ConfigError that names the tensor at
        fault."""
        ...


def scheme_of(config: Mapping[str, Any]) -> Scheme | None:
    """Of the contents of a config.json; None if it says nothing of quantisation."""
    settings = config.get("quantization_config")
    if not settings:
        return None
    if not isinstance(settings, dict):
        raise ConfigError("config.json: quantization_config is not an object", param="model")
    scheme: Scheme = resolve("quantization_config.quant_method", SCHEMES, str(settings.get("quant_method")))(settings)
    return scheme


def float_tensors(
    names: Iterable[str], read: Callable[[str], Tensor], scheme: Scheme, places: Collection[str]
) -> Iterator[tuple[str, Values]]:
    """Every tensor of a checkpoint, layer by layer, with `X.weight` for the codes of every quantised layer X.

    `names`: of its tensors; `read`: one of them by name; `places`: names that the model has a use for. A bias of zeros
    without a place is left out: quantisers have written one for every layer.
    """
    layers: dict[str, dict[str, str]] = {}
    for name in names:
        layer, _, part = name.rpartition(".")
        if part not in ACTIVATIONS:
            layers.setdefault(layer, {})[part] = name
    for layer, parts in layers.items():
        quantised = not SCALES.isdisjoint(parts)
        if quantised:
            found = {part: read(name) for part, name in parts.items() if part in scheme.parts}
            yield f"{layer}.weight", scheme.weight(Stored(layer, found))
        for part, name in parts.items():
            if quantised and part in scheme.parts:
                continue
            tensor = read(name)
            if quantised and part == "bias" and name not in places and not tensor.any():
                continue
            yield name, tensor


class Awq:
    """AutoAWQ's "gemm" layout: qweight int32 [in, out / 8] and qzeros [in / group, out / 8] hold 8 outputs a word in
    the order of its kernel, scales [in / group, out]."""

    parts = ("qweight", "qzeros", "scales")

    def __init__(self, settings: Mapping[str, Any]) -> None:
        _check("version", settings, str(settings.get("version") or "gemm").lower(), ("gemm",))
        _check("bits", settings, settings.get("bits", settings.get("w_bit")), (4,))
        self._group = _group_size(settings, "q_group_size" if "q_group_size" in settings else "group_size")

    def weight(self, stored: Stored) -> Values:
        codes, zeros = (_awq_codes(stored.words(part)).T for part in ("qweight", "qzeros"))
        return _dequantised(stored.layer, codes, stored.need("scales").T, zeros, (1, self._group))


class Gptq:
    """AutoGPTQ's and GPTQModel's layout: qweight int32 [in * bits / 32, out] holds consecutive inputs in a word, qzeros
    [groups, out * bits / 32] consecutive outputs, scales [groups, out], g_idx [in] the group of every input.

    The format "gptq" stores zeros less one. The one was taken from whole words, so it is given back to whole words: a
    zero of 0 had borrowed from its neighbour. Bits are told from shapes, as `dynamic` lets layers differ in them.
    """

    parts = ("qweight", "qzeros", "scales", "g_idx")

    def __init__(self, settings: Mapping[str, Any]) -> None:
        _check("bits", settings, settings.get("bits"), tuple(ONES))
        form = settings.get("checkpoint_format") or settings.get("format") or "gptq"
        _check("checkpoint_format", settings, form, ("gptq", "gptq_v2"))
        self._less_one = form == "gptq"
        self._group = _group_size(settings, "group_size")

    def weight(self, stored: Stored) -> Values:
        words, packed, scales = stored.words("qweight"), stored.words("qzeros"), stored.need("scales")
        bits = 32 * packed.shape[1] // max(scales.shape[-1], 1)
        if bits not in ONES:
            raise stored.wrong("qzeros", f"of {bits} bits a zero (there are: {', '.join(map(str, ONES))})")
        if self._less_one:
            packed = packed + ONES[bits]
        codes, zeros = _unpacked(words.T, bits), _unpacked(packed, bits).T
        return _dequantised(stored.layer, codes, scales.T, zeros, (1, self._group), stored.get("g_idx"))


class Fp8:
    """weight float8 [out, in] times weight_scale, or weight_scale_inv, which in spite of its name is multiplied too:
    one scale, one for each output, or one for each block of `weight_block_size`."""

    parts = ("weight", "weight_scale", "weight_scale_inv")

    def __init__(self, settings: Mapping[str, Any]) -> None:
        blocks = settings.get("weight_block_size")
        self._blocks = None if blocks is None else _block("weight_block_size", blocks)

    def weight(self, stored: Stored) -> Values:
        scales = stored.need("weight_scale" if "weight_scale" in stored.tensors else "weight_scale_inv")
        blocks = self._blocks or ((0, 0) if scales.numel() == 1 else (1, 0))
        return _dequantised(stored.layer, _plain_codes(stored, "float"), scales, 0, blocks)


@dataclass(frozen=True, slots=True)
class _Group:
    """One of `config_groups`: how the weights of the layers in `targets` are stored."""

    targets: tuple[str, ...]
    packed: bool
    kind: str
    bits: int
    blocks: tuple[int, int]

    def names(self, layer: str) -> bool:
        return any(
            re.match(target[3:], layer) if target.startswith("re:") else target == layer for target in self.targets
        )


class CompressedTensors:
    """compressed-tensors. pack-quantized: weight_packed int32 [out, in * bits / 32] holds the codes of weight_shape,
    raised by 2^(bits - 1) to be positive; weight_zero_point likewise, but packed along the outputs. The other formats:
    weight int8 or float8 [out, in]. weight_scale: of the tensor, or of each output, group or block; weight_g_idx [in]:
    the group of every input, -1 where they are in order."""

    parts = ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")

    def __init__(self, settings: Mapping[str, Any]) -> None:
        sparse = (settings.get("sparsity_config") or {}).get("format", "dense")
        _check("sparsity_config.format", settings, sparse, ("dense",))
        if settings.get("transform_config"):
            raise ConfigError("config.json: quantization_config.transform_config is not supported", param="model")
        groups = settings.get("config_groups") or {}
        self._groups = [_group(name, group, settings) for name, group in groups.items()]

    def weight(self, stored: Stored) -> Values:
        group = self._group_of(stored.layer)
        zeros, order = stored.get("weight_zero_point"), stored.get("weight_g_idx")
        if group.packed:
            outputs, inputs = stored.need("weight_shape").tolist()
            codes = _unpacked(stored.words("weight_packed"), group.bits)[:, :inputs]
            if zeros is None:
                zero: Tensor | int = 2 ** (group.bits - 1)
            else:
                zero = _unpacked(stored.words("weight_zero_point").T, group.bits)[:, :outputs].T
        else:
            codes, zero = _plain_codes(stored, group.kind), 0 if zeros is None else zeros
        if order is not None and order.min() < 0:
            order = None
        return _dequantised(stored.layer, codes, stored.need("weight_scale"), zero, group.blocks, order)

    def _group_of(self, layer: str) -> _Group:
        """By name before class: the linear layers that no other group names are "Linear"."""
        for group in self._groups:
            if group.names(layer):
                return group
        for group in self._groups:
            if "Linear" in group.targets:
                return group
        message = f"config.json: no target in quantization_config.config_groups is {layer}, which has scales"
        raise ConfigError(message, param="model")


def _group(name: str, group: Any, settings: Mapping[str, Any]) -> _Group:
    field = f"config_groups.{name}"
    args = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(args, dict):
        raise ConfigError(f"config.json: quantization_config.{field} has no weights", param="model")
    form = str(group.get("format") or settings.get("format"))
    kinds = {"pack-quantized": ("int",), "int-quantized": ("int",), "float-quantized": ("float",),
             "naive-quantized": ("int", "float")}  # fmt: skip
    _check("format", settings, form, tuple(kinds))
    kind, bits, size = args.get("type", "int"), args.get("num_bits", 8), args.get("group_size")
    _check(f"{field}.weights.type", settings, kind, kinds[form])
    _check(f"{field}.weights.num_bits", settings, bits, (4, 8) if kind == "int" else (8,))
    strategy = args.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    _check(f"{field}.weights.strategy", settings, strategy, ("tensor", "channel", "group", "block"))
    if strategy == "group":
        blocks = (1, _group_size(args, "group_size", f"{field}.weights.group_size"))
    elif strategy == "block":
        blocks = _block(f"{field}.weights.block_structure", args.get("block_structure"))
    else:
        blocks = (0, 0) if strategy == "tensor" else (1, 0)
    return _Group(tuple(group.get("targets") or ()), form == "pack-quantized", kind, bits, blocks)


def _check(field: str, settings: Mapping[str, Any], value: Any, known: tuple[Any, ...]) -> None:
    """ConfigError unless the value of a field is one that is known."""
    if value not in known:
        message = f"config.json: quantization_config.{field} {value!r} is not supported for {settings['quant_method']}"
        raise ConfigError(f"{message} (there are: {', '.join(map(str, known))})", param="model")


def _group_size(settings: Mapping[str, Any], key: str, field: str | None = None) -> int:
    """Inputs that share a scale; 0 for all of them, which configs write as -1."""
    size = settings.get(key)
    if not isinstance(size, int) or size == 0 or size < -1:
        message = f"config.json: quantization_config.{field or key} {size!r} is no count of inputs, nor -1 for all"
        raise ConfigError(message, param="model")
    return max(size, 0)


def _block(field: str, value: Any) -> tuple[int, int]:
    if isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(n, int) and n > 0 for n in value):
        return value[0], value[1]
    message = f"config.json: quantization_config.{field} {value!r} is not two numbers, of outputs and of inputs"
    raise ConfigError(message, param="model")


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """int32 [rows, words] -> uint8 [rows, words * 32 / bits]: codes of 4 or 8 bits, the lowest of a word first."""
    codes = words.contiguous().view(torch.uint8)
    return codes if bits == 8 else torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)


def _awq_codes(words: Tensor) -> Tensor:
    return _unpacked(words, 4).unflatten(1, (-1, 8))[..., AWQ_NIBBLES].flatten(1)


def _plain_codes(stored: Stored, kind: str) -> Tensor:
    """`weight` [out, in] that holds a code in a byte: "int" or "float"."""
    codes = stored.need("weight")
    if codes.ndim != 2 or codes.itemsize != 1 or codes.is_floating_point() != (kind == "float"):
        raise stored.wrong("weight", f"not a matrix of {kind}8")
    return codes


def _dequantised(
    layer: str,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | int,
    blocks: tuple[int, int],
    order: Tensor | None = None,
) -> Values:
    """(codes - zeros) * scales, float32 [out, in], of codes [out, in]; these themselves if they are e4m3 with a scale
    for each output, or one for all.

    `scales` and `zeros` have a number for each block of `blocks` outputs and inputs, 0 for all of them; `zeros` may be
    one number. `order` int [in]: the group of every input, as many groups as there are scales, in place of the inputs
    of `blocks`.
    """
    outputs, inputs = codes.shape
    rows, columns = blocks[0] or outputs, blocks[1] or inputs
    counts = [math.ceil(outputs / rows), math.ceil(inputs / columns) if order is None else scales.shape[-1]]
    if order is not None and (order.shape != (inputs,) or order.min() < 0 or order.max() >= counts[1]):
        raise ConfigError(f"the groups of {layer}'s inputs do not fit its {counts[1]} scales an output", param="model")

    def spread(table: Tensor) -> Tensor:
        if table.numel() != math.prod(counts):
            message = f"the scales or zeros of {layer} are {list(table.shape)}, not {counts} as its weights need"
            raise ConfigError(f"{message}, {list(codes.shape)}", param="model")
        table = table.reshape(counts)
        if order is not None:
            return table.index_select(1, order)
        if 1 < columns < inputs:
            table = table.repeat_interleave(columns, 1)[:, :inputs]
        if 1 < rows < outputs:
            table = table.repeat_interleave(rows, 0)[:outputs]
        return table

    if (
        codes.dtype == torch.float8_e4m3fn
        and isinstance(zeros, int)
        and columns == inputs
        and order is None
        and rows in (1, outputs)
    ):
        return RowCodes(codes, spread(scales.float()).expand(outputs, 1).flatten())
    values = codes.to(torch.float32).sub_(spread(zeros) if isinstance(zeros, Tensor) else zeros)
    return values.mul_(spread(scales.float()))
