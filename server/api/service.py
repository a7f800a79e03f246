"""What the routes need, in one place: handed over by `build.py`, faked by tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from server.api.body import BodyLimits
from server.api.dialects.dialect import NO_DIALECT, Dialect
from server.api.status.live import LiveRequest
from server.api.status.status import Status
from server.api.tenancy import Tenants
from server.batches.vault import Vault
from server.config import ServerConfig
from server.engine import Engine
from server.metrics import Metrics
from server.runner.grammar import Grammars
from server.tenants import digest_of
from server.text import Tokenizer
from server.types import NO_TARGETS, Pooling, Targets

LEAST_BODY_VALUES = 2**15


@dataclass(frozen=True)
class Service:
    """One served model. Loop thread.

    `wall_clock` gives Unix seconds (for `created`). `limits` is the configuration of the HTTP front.
    Without tenants the service is open to all.
    """

    engine: Engine
    tokenizer: Tokenizer
    metrics: Metrics
    model_name: str
    version: str
    wall_clock: Callable[[], float]
    limits: ServerConfig
    status: Status
    tenants: Tenants = field(default_factory=Tenants)
    default_targets: Targets = NO_TARGETS
    """Of requests that name none; not of those in the background."""
    vault: Vault | None = None
    """Files and batches, where the operator gave a place for them."""
    pooling: Pooling = "last"
    embedding_dimensions: int = 0
    """How hidden states become an embedding, and the length of those."""
    dialect: Dialect = NO_DIALECT
    live: set[LiveRequest] = field(default_factory=set)
    """What is being answered now."""
    grammars: Grammars | None = None
    """Compiles what texts must be; None where that cannot be enforced."""

    @property
    def max_model_len(self) -> int:
        return self.engine.max_model_len

    @property
    def body_limits(self) -> BodyLimits:
        """Room for two prompts of token ids as long as the model goes, or for many short ones."""
        values = self.limits.max_body_values or max(LEAST_BODY_VALUES, 2 * self.max_model_len)
        return BodyLimits(self.limits.max_body_bytes, values)


def hash_keys(keys: Iterable[str]) -> tuple[bytes, ...]:
    """The digests under which API keys are kept, so that no key stands in memory for longer than a comparison."""
    return tuple(map(digest_of, keys))
