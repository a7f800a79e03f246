"""What the routes need, in one place: handed over by `build.py`, faked by tests."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from server.api.dialects.dialect import NO_DIALECT, Dialect
from server.config import ServerConfig
from server.engine import Engine
from server.metrics import Metrics
from server.runner.grammar import Grammars
from server.text import Tokenizer
from server.types import NO_TARGETS, Targets


@dataclass(frozen=True)
class Service:
    """One served model. Loop thread.

    `wall_clock` gives Unix seconds (for `created`). `limits` is the configuration of the HTTP front.
    `api_key_hashes` and `admin_key_hashes` are SHA-256 digests; without API keys the service is open to all.
    """

    engine: Engine
    tokenizer: Tokenizer
    metrics: Metrics
    model_name: str
    version: str
    wall_clock: Callable[[], float]
    limits: ServerConfig
    api_key_hashes: Sequence[bytes] = ()
    admin_key_hashes: Sequence[bytes] = ()
    default_targets: Targets = NO_TARGETS
    """Of requests that name none; not of those in the background."""
    dialect: Dialect = NO_DIALECT
    grammars: Grammars | None = None
    """Compiles what texts must be; None where that cannot be enforced."""

    @property
    def max_model_len(self) -> int:
        return self.engine.max_model_len


def hash_keys(keys: Iterable[str]) -> tuple[bytes, ...]:
    """The digests under which API keys are kept, so that no key stands in memory for longer than a comparison."""
    return tuple(hashlib.sha256(key.encode()).digest() for key in keys)
