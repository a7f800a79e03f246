"""From a folder or hub id to a loaded model: finds the files, checks them, and streams tensors into the parameters.

Tensors are read one at a time from memory-mapped safetensors straight into (slices of) the fused parameters, so the
peak is the model plus one tensor. Those of a quantised checkpoint become floats on the way (`quantized.py`). Whatever
is wrong with the checkpoint is a ConfigError that names the culprit and says what to do; a tensor that the model has no
place for is one too: a model that ignores weights answers wrongly.
"""

from __future__ import annotations

import difflib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor

from server.errors import ConfigError
from server.models import MODELS
from server.models.base import Model, Parameter, Parts
from server.models.cuda import cuda_parts
from server.models.fp8 import Fp8Parts, Fp8Rows
from server.models.layers import TorchParts
from server.models.quantized import RowCodes, Scheme, Values, float_tensors, scheme_of
from server.registry import resolve

log = logging.getLogger("terrace.models")

DTypeName = Literal["auto", "float32", "bfloat16", "float16"]
LoadFormat = Literal["auto", "dummy"]
Progress = Callable[[int, int], None]
"""`progress(done_bytes, total_bytes)`, called after every tensor."""

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
NATIVE_QUANTIZATIONS = ("int8", "w8a8", "int8-g32", "int4-g32", "w4a8")
"""Formats that the native kernels make of any checkpoint's weights."""
CUDA_QUANTIZATIONS = ("fp8",)
"""Likewise a GPU that multiplies in fp8."""
SAFETENSORS_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
CONFIG_PATTERNS = ("*.json", "*.model", "*.txt", "*.jinja")
IGNORED_TENSORS = re.compile(r"\.rotary_emb\.inv_freq$|\.masked_bias$")
"""Derived buffers that old checkpoints carry; they hold nothing the config does not say."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def resolve_folder(model: str, revision: str | None = None, *, offline: bool = False, weights: bool = True) -> Path:
    """The local folder of `model`: a folder as it is, or a hub id downloaded to (or found in) the hub's cache.

    `offline` looks in the cache only, as huggingface_hub's own offline mode does. Without `weights` only configuration
    and tokenizer files are fetched, enough for `load_format="dummy"`. Blocking; does network and file I/O.
    """
    path = Path(model).expanduser()
    if model and path.is_dir():
        return path
    if model and path.exists():
        raise ConfigError(f"model {model!r} is a file; pass the folder that holds config.json", param="model")
    if model.startswith((".", "/", "~")) or not HUB_ID.fullmatch(model):
        message = f"model {model!r} is neither a folder nor a hub id of the form owner/name{_nearest(path)}"
        raise ConfigError(message, param="model")
    return _download(model, revision, offline, weights)


def _nearest(path: Path) -> str:
    """What of the path exists, and what the rest might have been."""
    if path.exists():
        return ""
    parent = next(parent for parent in path.absolute().parents if parent.is_dir())
    wanted, *rest = path.absolute().relative_to(parent).parts
    found = sorted(entry.name for entry in parent.iterdir() if entry.is_dir()) if os.access(parent, os.R_OK) else []
    near = difflib.get_close_matches(wanted, found, n=1)
    meant = [str(whole) for name in near if (whole := parent.joinpath(name, *rest)).is_dir()]
    return f"; did you mean {meant[0]!r}?" if meant else f"; {str(parent)!r} has no {wanted!r}"


def _download(model: str, revision: str | None, offline: bool, weights: bool) -> Path:
    patterns = [*CONFIG_PATTERNS, "*.safetensors"] if weights else list(CONFIG_PATTERNS)
    ignored = ["*/*", "consolidated*"]  # exports to other formats, and second copies of the weights
    try:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                local_files_only=offline,
                allow_patterns=patterns,
                ignore_patterns=ignored,
            )
        )
    except GatedRepoError:
        advice = "asks for a licence: accept it on the hub, then log in with `hf auth login`"
    except RepositoryNotFoundError:
        advice = "is not on the hub and not a folder here (a private one needs `hf auth login`)"
    except RevisionNotFoundError:
        advice = f"has no revision {revision!r} on the hub"
    except LocalEntryNotFoundError:
        advice = (
            "is not a folder here and not (wholly) in the hub cache, and the hub is out of reach: run "
            f"`hf download {model}` on a machine with network and bring the cache over, or pass a folder"
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        advice = f"could not be fetched from the hub: {error}"
    raise ConfigError(f"model {model!r} {advice}", param="model")


def load_config(folder: Path) -> Any:
    """The checkpoint's transformers config. Never runs code from the folder.

    Raises ConfigError if config.json is missing, unreadable, or names an architecture that is not in `MODELS` or a
    quantisation that is not in `SCHEMES`.
    """
    from transformers import AutoConfig  # a second of imports that a caller with a bad path need not wait for

    raw = _read_json(folder / "config.json", "is it a model folder?")
    model_class(raw)
    scheme_of(raw)
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for a bad config: each becomes the operator's one line
        raise ConfigError(f"{folder / 'config.json'}: {error}", param="model") from error


def model_class(raw: Mapping[str, Any]) -> type[Model]:
    """The class in `MODELS` for the contents of a config.json; without `architectures`, by its `model_type`."""
    names = raw.get("architectures") or []
    if not names:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        names = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(raw.get("model_type", ""), str(raw.get("model_type")))]
    if names[0] not in MODELS:
        raise ConfigError(f"architecture {names[0]!r} is not supported (there are: {', '.join(MODELS)})", param="model")
    return resolve("architecture", MODELS, names[0])


def load_model(
    folder: Path,
    *,
    dtype: DTypeName = "auto",
    device: torch.device | str = "cpu",
    load_format: LoadFormat = "auto",
    seed: int = 0,
    progress: Progress | None = None,
    quantization: str = "none",
    native: bool = False,
) -> Model:
    """Loads the checkpoint in `folder` into a new model on `device`.

    `dtype="auto"` is the checkpoint's own. `native`: computed by the native kernels, which must be there; they know the
    NATIVE_QUANTIZATIONS, and torch the CUDA_QUANTIZATIONS. In torch, on a CPU without bf16/fp16 arithmetic,
    half-precision matrix products are many times slower than fp32: there `dtype="float32"` is the better choice
    wherever memory allows. Weights of a quantised checkpoint become `dtype`, or what `quantization` makes of their
    values; codes in fp8 are kept as they are where they can be.
    `load_format="dummy"` reads only config.json and fills the parameters with random values that depend on `seed`.
    """
    config = load_config(folder)
    cls = model_class(config.to_dict())
    report = progress or (lambda done, total: None)
    if load_format == "dummy":
        model = cls.build(config, _parts(_dtype(dtype, config, ()), device, quantization, native))
        fill_random(model.parameters(), seed, report, device)
        return model
    files = checkpoint_files(folder)
    model = cls.build(config, _parts(_dtype(dtype, config, files), device, quantization, native))
    scheme = scheme_of(config.to_dict())
    if scheme is None:
        _fill(model, _tensors(files), report)
        return model
    _log_quantised(config.to_dict(), files, model, quantization)
    _fill(model, _float_tensors(files, scheme, {*model.parameters(), *model.fused()}), report)
    return model


def _log_quantised(config: Mapping[str, Any], files: Sequence[Path], model: Model, quantization: str) -> None:
    """One line that says what the weights are kept as, for whoever expects them to stay as small as their files."""
    stored = sum(path.stat().st_size for path in files) / 2**30
    held = sum(parameter.nbytes for parameter in model.parameters().values()) / 2**30
    kind = str(model.dtype).removeprefix("torch.") if quantization == "none" else quantization
    method = config["quantization_config"]["quant_method"]
    log.info("the checkpoint is quantised (%s, %.2f GiB of files): its weights become %s, %.2f GiB",
             method, stored, kind, held)  # fmt: skip


def _parts(dtype: torch.dtype, device: torch.device | str, quantization: str, native: bool) -> Parts:
    if native:
        from server.models.native import NativeParts  # needs the library, which may not have been built

        return NativeParts(dtype, quantization)
    return torch_parts(dtype, device, quantization)


def torch_parts(dtype: torch.dtype, device: torch.device | str, quantization: str) -> Parts:
    """Parts that torch computes, with weights of `dtype`, or of one of the CUDA_QUANTIZATIONS. Raises ConfigError for
    fp8 beside another `dtype` than bfloat16."""
    parts = cuda_parts(dtype, device) if torch.device(device).type == "cuda" else TorchParts(dtype, device)
    return Fp8Parts(parts) if quantization == "fp8" else parts


def weights_bytes(
    folder: Path,
    dtype: DTypeName,
    load_format: LoadFormat,
    quantization: str = "none",
    quantizations: Collection[str] = (),
    native: bool = False,
) -> tuple[str, dict[str, int]]:
    """The flag of the precision that `load_model` would take, and what the weights would need in each, and in each of
    the `quantizations` that can be made beside that dtype. Reads no weights, and takes no memory for them. Raises
    ConfigError where `quantization` cannot."""
    config = load_config(folder)
    chosen = _dtype(dtype, config, () if load_format == "dummy" else checkpoint_files(folder))
    cls = model_class(config.to_dict())

    def needed(kind: torch.dtype, quantised: str) -> int:
        model = cls.build(config, _parts(kind, "meta", quantised, native))
        return sum(weight.nbytes for weight in model.parameters().values())

    sizes = {f"--dtype {name}": needed(kind, "none") for name, kind in DTYPES.items()}
    # fp8 computes in bfloat16 alone: no way out for who asked for another dtype.
    able = [name for name in quantizations if name in (quantization, *NATIVE_QUANTIZATIONS) or chosen == torch.bfloat16]
    sizes |= {f"--quantization {name}": needed(chosen, name) for name in able}
    (name,) = (name for name, kind in DTYPES.items() if kind == chosen)
    return f"--dtype {name}" if quantization == "none" else f"--quantization {quantization}", sizes


def checkpoint_files(folder: Path) -> Sequence[Path]:
    """The safetensors files of a folder. Raises ConfigError for a missing shard or a pickle-only checkpoint."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return _shards(index)
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    pickles = sorted(path.name for suffix in ("*.bin", "*.pt", "*.pth") for path in folder.glob(suffix))
    if pickles:
        raise ConfigError(
            f"{folder} has only pickled weights ({pickles[0]}), which can run code when loaded: save them as "
            "safetensors (in transformers: from_pretrained, then save_pretrained) or pick a revision that has them",
            param="model",
        )
    raise ConfigError(
        f"{folder} has neither model.safetensors nor model.safetensors.index.json: fetch the weights, or use "
        "load format 'dummy' for random ones",
        param="model",
    )


def _shards(index: Path) -> Sequence[Path]:
    weight_map = _read_json(index, "fetch it again").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{index} has no weight_map: fetch it again", param="model")
    shards = [index.parent / name for name in sorted(set(weight_map.values()))]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise ConfigError(
            f"{index.parent} lacks {len(missing)} of {len(shards)} shards: {', '.join(missing)}; fetch them again",
            param="model",
        )
    return shards


def _read_json(path: Path, advice: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path.parent} has no {path.name}: {advice}", param="model") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): {advice}", param="model") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a JSON object: {advice}", param="model")
    return content


def _dtype(wanted: DTypeName, config: Any, files: Sequence[Path]) -> torch.dtype:
    """The wanted dtype, else the config's, else that of the checkpoint's first tensor that holds floats, else fp32."""
    if wanted != "auto":
        return DTYPES[wanted]
    own = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    if isinstance(own, str):
        own = getattr(torch, own, own)
    if own is None and files:
        with _opened(files[0]) as file:
            stored = [file.get_slice(name).get_dtype() for name in file.keys()]  # noqa: SIM118 - safe_open is no mapping
            own = next((SAFETENSORS_DTYPES[kind] for kind in stored if kind in SAFETENSORS_DTYPES), stored[0])
    own = own or torch.float32
    if own not in DTYPES.values():
        raise ConfigError(
            f"the checkpoint's dtype {own} is not supported: choose one of {', '.join(DTYPES)}", param="dtype"
        )
    return own


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is damaged or cut short ({error}): fetch it again", param="model") from error


@torch.inference_mode()
def _fill(model: Model, tensors: Iterable[tuple[str, Values]], report: Progress) -> None:
    targets, fused = dict(model.parameters()), model.fused()
    tied = "lm_head.weight" not in targets
    total = sum(target.nbytes for target in targets.values())
    done = 0
    for name, tensor in tensors:
        if IGNORED_TENSORS.search(name) or (tied and name == "lm_head.weight"):
            continue
        for part, values in _split(name, tensor, fused, targets):
            target = targets.pop(part, None)
            if target is None:
                raise ConfigError(_unplaced(part, model), param="model")
            if target.shape != values.shape:
                raise ConfigError(
                    f"tensor {name}: the checkpoint has shape {list(values.shape)}, config.json asks for "
                    f"{list(target.shape)}",
                    param="model",
                )
            _place(name, values, target)
            done += target.nbytes
            report(done, total)
    if targets:
        raise ConfigError(_missing(sorted(targets)), param="model")


def _place(name: str, values: Values, target: Any) -> None:
    """Codes go where codes are kept as they are, elsewhere as the floats that they stand for."""
    if isinstance(values, RowCodes):
        if isinstance(target, Fp8Rows):
            target.take(values)
            return
        values = values.floats()
    if not values.is_floating_point() or values.itemsize == 1:
        raise ConfigError(_codes_alone(name, values), param="model")
    target.copy_(values)


def _tensors(files: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    for path in files:
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                yield name, file.get_tensor(name)


def _float_tensors(files: Sequence[Path], scheme: Scheme, places: Collection[str]) -> Iterator[tuple[str, Values]]:
    """`_tensors` of a quantised checkpoint: what belongs to one layer may lie in several files."""
    with ExitStack() as stack:
        opened = [stack.enter_context(_opened(path)) for path in files]
        place = {name: file for file in opened for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping
        yield from float_tensors(place, lambda name: place[name].get_tensor(name), scheme, places)


def _split(
    name: str, tensor: Values, fused: Mapping[str, Sequence[str]], targets: Mapping[str, Parameter]
) -> Iterator[tuple[str, Values]]:
    """(parameter, values) pairs of one checkpoint tensor: itself, or the parts stacked in it along the first axis."""
    parts = fused.get(name)
    if parts is None or not all(part in targets for part in parts):
        yield name, tensor
        return
    rows = [targets[part].shape[0] for part in parts]
    if sum(rows) != tensor.shape[0]:
        raise ConfigError(
            f"tensor {name}: the checkpoint has shape {list(tensor.shape)}, config.json asks for {sum(rows)} rows",
            param="model",
        )
    yield from zip(parts, tensor.split(rows), strict=True)


def _unplaced(name: str, model: Model) -> str:
    if name in model.parameters():
        return f"tensor {name} is in the checkpoint twice"
    return (
        f"tensor {name} has no place in the model that config.json describes: config and weights are not of the same "
        "model, or this variant is not supported"
    )


def _codes_alone(name: str, values: Tensor) -> str:
    kind = str(values.dtype).removeprefix("torch.")
    return f"tensor {name} is of {kind}, and neither the checkpoint nor config.json has scales or a method for it"


def _missing(names: Sequence[str]) -> str:
    hint = "; does config.json lack tie_word_embeddings?" if "lm_head.weight" in names else ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"the checkpoint lacks {', '.join(names[:3])}{more}: fetch it again{hint}"


@torch.inference_mode()
def fill_random(
    parameters: Mapping[str, Parameter], seed: int, report: Progress, device: torch.device | str = "cpu"
) -> None:
    """Fills parameters with seeded values under which activations and logits stay of order one.

    Matrices are uniform with standard deviation 1 / sqrt(inputs), gains are one, biases small. One generator for all,
    in the order of the names, so a seed gives the same values on every CPU. They are drawn on `device`: a CPU takes a
    minute for 8B of them.
    """
    total = sum(target.nbytes for target in parameters.values())
    generator = torch.Generator(device).manual_seed(seed)
    done = 0
    for name in sorted(parameters):
        target = parameters[name]
        values = torch.empty(target.shape, device=device)
        if values.ndim == 1 and name.endswith("norm.weight"):
            target.copy_(values.fill_(1.0))
        else:
            bound = math.sqrt(3.0 / values.shape[-1]) if values.ndim > 1 else 0.1
            target.copy_(values.uniform_(-bound, bound, generator=generator))
        done += target.nbytes
        report(done, total)
