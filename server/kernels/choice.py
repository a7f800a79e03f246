"""Which attention backend a CPU gets."""

from __future__ import annotations

from server.errors import ConfigError
from server.kernels.attention import INT8_BACKENDS
from server.kernels.native import load


def choose_backend(asked: str, kv_dtype: str) -> str:
    """The backend's name: what is asked for, with "auto" the native kernels where they were built, else torch's.

    Raises ConfigError where it cannot hold KV of `kv_dtype`. Whether there is a backend of this name is not asked here.
    """
    native = load() is not None
    backend = asked if asked != "auto" else "native" if native else "cpu"
    if kv_dtype == "int8" and backend not in INT8_BACKENDS:
        missing = "" if native else ", whose kernels were not built (install a C compiler and reinstall)"
        raise ConfigError(
            f"kv_dtype int8 needs the attention backend 'native'{missing}; or use --kv-dtype bfloat16",
            param="kv.kv_dtype",
        )
    return backend
