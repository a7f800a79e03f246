"""Who calls, and how much of it: keys, rate limits, requests at once. Loop thread only.

A request is charged by what it costs: one request and its whole prompt when it is admitted; when it is over, what it
generated is added and what the cache had of its prompt is given back. A bucket holds one minute's worth, fills evenly,
and may be overdrawn by what nobody could foresee: then the tenant waits until that is paid off.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import ceil

from server.errors import ConfigError, InvalidRequest, Overloaded
from server.tenants import Limits, Tenant

OTHER = "other"
"""How tenants without a name are counted: those of plain keys, or everybody where there are none."""
OUTCOMES = ("served", "aborted", "refused", "rate_limit", "concurrency")
KINDS = ("prompt", "cached", "generated")
CONCURRENCY_RETRY_S = 1
NO_LIMITS = Limits()


def tenant_of(key_hash: bytes) -> str:
    """The id of the tenant that a plain API key is, from the key's digest: says nothing about the key."""
    return hashlib.sha256(b"tenant:" + key_hash).hexdigest()[:32]


class Bucket:
    """Fills to `per_minute` in a minute."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._at_s = now

    def level(self, now: float) -> float:
        self._level = min(float(self.per_minute), self._level + (now - self._at_s) * self.per_minute / 60)
        self._at_s = now
        return self._level

    def wait_s(self, amount: float, now: float) -> float:
        """How long until `amount` is there, or, if that is more than it ever holds, until it is full."""
        return max(0.0, min(amount, self.per_minute) - self.level(now)) * 60 / self.per_minute

    def add(self, amount: float, now: float) -> None:
        self._level = min(float(self.per_minute), self.level(now) + amount)

    def resized(self, per_minute: int, now: float) -> Bucket:
        """A bucket of another size that is as full as this one."""
        other = Bucket(per_minute, now)
        other._level *= self.level(now) / self.per_minute
        return other


class Gate:
    """What one tenant has used, and may use."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.limits = NO_LIMITS
        self.requests: Bucket | None = None
        self.tokens: Bucket | None = None
        self.open = 0
        self.outcomes = dict.fromkeys(OUTCOMES, 0)
        self.charged = dict.fromkeys(KINDS, 0)

    def limit(self, limits: Limits, now: float) -> None:
        """From now on these limits hold; what was used stays used."""
        self.limits = limits
        self.requests = _bucket(limits.requests_per_minute, self.requests, now)
        self.tokens = _bucket(limits.tokens_per_minute, self.tokens, now)

    @property
    def limited(self) -> bool:
        return self.requests is not None or self.tokens is not None

    def check(self, now: float, prompt_tokens: int) -> None:
        """Raises Overloaded unless a request of that many tokens may start now."""
        most = self.limits.max_concurrent
        if most is not None and self.open >= most:
            self.outcomes["concurrency"] += 1
            raise Overloaded(
                f"{self.open} requests of this API key's tenant are running; at most {most} may at once",
                retry_after_s=CONCURRENCY_RETRY_S,
                code="concurrency_limit_exceeded",
            )
        waits = {
            "requests": self.requests.wait_s(1, now) if self.requests else 0.0,
            "tokens": self.tokens.wait_s(prompt_tokens, now) if self.tokens else 0.0,
        }
        kind = max(waits, key=lambda kind: waits[kind])
        if waits[kind] > 0:
            self.outcomes["rate_limit"] += 1
            limit = self.limits.requests_per_minute if kind == "requests" else self.limits.tokens_per_minute
            seconds = max(1, ceil(waits[kind]))
            raise Overloaded(
                f"the limit of {limit} {kind} per minute of this API key's tenant is reached; try again in {seconds} s",
                retry_after_s=seconds,
                code="rate_limit_exceeded",
            )

    def headers(self, now: float) -> dict[str, str]:
        """The rate limits as OpenAI's clients know them."""
        shown: dict[str, str] = {}
        for kind, bucket in (("requests", self.requests), ("tokens", self.tokens)):
            if bucket is not None:
                shown[f"x-ratelimit-limit-{kind}"] = str(bucket.per_minute)
                shown[f"x-ratelimit-remaining-{kind}"] = str(max(0, int(bucket.level(now))))
                shown[f"x-ratelimit-reset-{kind}"] = _duration(bucket.wait_s(bucket.per_minute, now))
        return shown


def _bucket(per_minute: int | None, before: Bucket | None, now: float) -> Bucket | None:
    if per_minute is None:
        return None
    return Bucket(per_minute, now) if before is None else before.resized(per_minute, now)


def _duration(seconds: float) -> str:
    """1h2m3s, 6m0s, 1.5s, 20ms."""
    if seconds < 1:
        return f"{ceil(seconds * 1e3)}ms"
    minutes, rest = divmod(ceil(seconds * 10) / 10, 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{f'{hours}h' if hours else ''}{f'{minutes}m' if hours or minutes else ''}{rest:g}s"


class Permit:
    """One request that was let in. End it exactly once with `leave` or `cancel`; what comes after that does nothing."""

    def __init__(self, tenants: Tenants, tenant: str, prompt_tokens: int) -> None:
        self._tenants = tenants
        self._tenant = tenant
        self._prompt_tokens = prompt_tokens
        self._over = False

    def leave(self, *, cached_tokens: int, generated_tokens: int, served: bool) -> None:
        """It is over; `generated_tokens` of all its choices, shown or not."""
        if not self._over:
            gate = self._end("served" if served else "aborted", cached_tokens - generated_tokens, 0)
            for kind, count in zip(KINDS, (self._prompt_tokens, cached_tokens, generated_tokens), strict=True):
                gate.charged[kind] += count

    def cancel(self) -> None:
        """The engine did not take it: it costs nothing."""
        if not self._over:
            self._end("refused", self._prompt_tokens, 1)

    def _end(self, outcome: str, tokens: int, requests: int) -> Gate:
        self._over = True
        gate, now = self._tenants.gate(self._tenant), self._tenants.clock()
        gate.open -= 1
        gate.outcomes[outcome] += 1
        if gate.tokens is not None:
            gate.tokens.add(tokens, now)
        if gate.requests is not None:
            gate.requests.add(requests, now)
        return gate


class Tenants:
    """Everybody who may call. `guarded` is False where anybody may."""

    def __init__(
        self,
        plain: Sequence[bytes] = (),
        clock: Callable[[], float] = lambda: 0.0,
        rejected: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """`plain`: digests of keys that are each a tenant of its own, without a name or limits. `clock`: seconds.
        `rejected` is told when somebody's limit is reached."""
        self.clock = clock
        self.admins: Sequence[bytes] = ()
        """Digests of the keys of whoever runs the server; they are no tenants."""
        self._rejected = rejected
        self.keys: Sequence[tuple[bytes, str]] = ()
        """Digests and the ids of their tenants."""
        self._plain = [(key, tenant_of(key)) for key in plain]
        self._ids: dict[str, str] = {}
        self._gates: dict[str, Gate] = {}
        self._other = Gate(OTHER)
        self.replace(())

    def replace(self, named: Iterable[Tenant], plain: Sequence[bytes] | None = None) -> None:
        """These are the tenants from now on, with a name and, unless None, without; requests that run go on. Raises
        ConfigError, and nothing is changed, when a key is of both kinds."""
        named, now = list(named), self.clock()
        nameless = self._plain if plain is None else [(key, tenant_of(key)) for key in plain]
        for tenant in named:
            if any(key == other for key in tenant.keys for other, _ in nameless):
                raise ConfigError(f"a key of tenant {tenant.name!r} is one of --api-key, too; keep one")
        for tenant in named:
            self._gates.setdefault(tenant.id, Gate(tenant.name)).limit(tenant.limits, now)
        self._plain = nameless
        self._ids = {tenant.name: tenant.id for tenant in named}
        self.keys = [*self._plain, *((key, tenant.id) for tenant in named for key in tenant.keys)]

    @property
    def guarded(self) -> bool:
        return bool(self.keys)

    def find(self, digest: bytes) -> str | None:
        """The id of the tenant whose key has this digest. Every key is compared, so that the time taken tells nothing
        about which one came close."""
        matches = [tenant for other, tenant in self.keys if hmac.compare_digest(other, digest)]
        return matches[0] if matches else None

    def id_of(self, name: str) -> str | None:
        """The id of the tenant of this name."""
        return self._ids.get(name)

    def gate(self, tenant: str) -> Gate:
        """By id."""
        return self._gates.get(tenant, self._other)

    def check(self, tenant: str, prompt_tokens: int = 1) -> None:
        """Raises Overloaded when a request of so many tokens could not start now."""
        try:
            self.gate(tenant).check(self.clock(), prompt_tokens)
        except Overloaded:
            self._rejected("rate_limit")
            raise

    def enter(self, tenant: str, prompt_tokens: int) -> Permit:
        """Let a request in and charge for it. Raises Overloaded."""
        self.check(tenant, prompt_tokens)
        gate, now = self.gate(tenant), self.clock()
        gate.open += 1
        if gate.requests is not None:
            gate.requests.add(-1, now)
        if gate.tokens is not None:
            gate.tokens.add(-prompt_tokens, now)
        return Permit(self, tenant, prompt_tokens)

    def priority(self, tenant: str, wanted: int | None) -> int:
        """The priority of a request that asked for `wanted`. Raises InvalidRequest when that is too urgent."""
        most = self.gate(tenant).limits.most_urgent_priority
        if most is None:
            return wanted or 0
        if wanted is not None and wanted < most:
            raise InvalidRequest(
                f"'priority' must be at least {most} with this API key, got {wanted} (less is more urgent)",
                param="priority",
            )
        return max(0, most) if wanted is None else wanted

    def numbers(self) -> Mapping[str, Gate]:
        """By id, of all that ever had a name here, and by an empty one of the others together: for the metrics."""
        return {"": self._other} | self._gates
