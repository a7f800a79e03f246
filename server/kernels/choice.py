"""What computes on a CPU: the native kernels or torch."""

from __future__ import annotations

from typing import Protocol

from server.errors import ConfigError
from server.kernels.attention import INT8_BACKENDS
from server.kernels.native import load, select


class Wanted(Protocol):
    """Of the configuration's section on the model, what counts here."""

    @property
    def device(self) -> str: ...
    @property
    def kernels(self) -> str: ...
    @property
    def quantization(self) -> str: ...


def use_native(wanted: Wanted) -> bool:
    """Whether the native kernels compute the model. Raises ConfigError where that is asked for and cannot be."""
    kernels, quantization = wanted.kernels, wanted.quantization
    if quantization == "fp8" and wanted.device == "cpu":
        message = "quantization 'fp8' is for a GPU; on a CPU use --quantization w8a8"
        raise ConfigError(message, param="model.quantization")
    found = wanted.device == "cpu" and kernels != "torch" and load() is not None
    for param, value, needs in (("kernels", kernels, kernels == "native"),
                                ("quantization", quantization, quantization not in ("none", "fp8"))):  # fmt: skip
        if needs and not found:
            raise ConfigError(
                f"{param} {value!r} needs the native CPU kernels, which are not in use: they take --device cpu, no "
                "--kernels torch, and a C compiler when Terrace is installed",
                param=f"model.{param}",
            )
    return found


def computed_by(wanted: Wanted) -> str:
    """The kernels and their instruction set, in a word or two. Others round otherwise: what they left in a cache is not
    what these would compute, to the bit."""
    library = load()
    return f"native {select(library, 'auto')}" if library is not None and use_native(wanted) else "torch"


def choose_backend(asked: str, kv_dtype: str, *, native: bool) -> str:
    """The attention backend's name: what is asked for, with "auto" the native kernels where `native`, else torch's.

    Raises ConfigError where it cannot hold KV of `kv_dtype`. Whether there is a backend of this name is not asked here.
    """
    if kv_dtype == "fp8":
        raise ConfigError("kv_dtype fp8 is for a GPU; on a CPU use --kv-dtype int8", param="kv.kv_dtype")
    backend = asked if asked != "auto" else "native" if native else "cpu"
    if kv_dtype == "int8" and backend not in INT8_BACKENDS:
        raise ConfigError(
            f"kv_dtype int8 needs the attention backend 'native', not {backend!r}: install with a C compiler, without "
            "--kernels torch; or use --kv-dtype bfloat16",
            param="kv.kv_dtype",
        )
    return backend
