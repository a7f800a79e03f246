"""What the routes need, in one place: handed over by `build.py`, faked by tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from server.api.tenancy import Tenants
from server.config import ServerConfig
from server.engine import Engine
from server.metrics import Metrics
from server.tenants import digest_of
from server.text import Tokenizer
from server.types import NO_TARGETS, Targets


@dataclass(frozen=True)
class Service:
    """One served model. Loop thread.

    `wall_clock` gives Unix seconds (for `created`). `limits` is the configuration of the HTTP front.
    Without tenants the service is open to all. `admin_key_hashes` are SHA-256 digests.
    """

    engine: Engine
    tokenizer: Tokenizer
    metrics: Metrics
    model_name: str
    version: str
    wall_clock: Callable[[], float]
    limits: ServerConfig
    tenants: Tenants = field(default_factory=Tenants)
    admin_key_hashes: Sequence[bytes] = ()
    default_targets: Targets = NO_TARGETS
    """Of requests that name none; not of those in the background."""

    @property
    def max_model_len(self) -> int:
        return self.engine.max_model_len


def hash_keys(keys: Iterable[str]) -> tuple[bytes, ...]:
    """The digests under which API keys are kept, so that no key stands in memory for longer than a comparison."""
    return tuple(map(digest_of, keys))
