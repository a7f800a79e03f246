"""The file that says who may call: tenants, the digests of their keys, and what each may use.

TOML, one table per tenant; a key is in it as its SHA-256 digest only. Read strictly: what is wrong is one line that
names the file, the line where it can be told, and the field. Knows the format, and how to add a key to a file; it knows
no tier, no clock and no request.
"""

from __future__ import annotations

import difflib
import hashlib
import hmac
import json
import os
import re
import secrets
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from server.errors import ConfigError
from server.quantities import parse_bytes
from server.types import CacheLimit, TierName

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
RESERVED_NAMES = frozenset({"other"})
"""Labels of the metrics that are nobody's name."""
MAX_TENANTS = 1000
MAX_KEYS = 16
"""Of one tenant at once: a rotation needs two."""
MIN_SECRET_CHARS = 16
FLOORS_SHARE_MAX = 0.95
"""Of a tier, how much all floors together may keep: what comes needs a place before what is old can go."""
KEY_BYTES = 32
"""Of randomness in a key: a plain digest of it tells nothing."""


def _digest(value: str) -> str:
    if DIGEST.fullmatch(value) is None:
        raise ValueError("is not sha256: and 64 hexadecimal digits; `terrace keys add` makes one")
    return value


def _amount(value: object) -> object:
    """A share of a tier as a fraction, or a size in bytes as an int."""
    if isinstance(value, str):
        text = value.strip()
        if text.endswith("%"):
            value = float(text[:-1]) / 100 if re.fullmatch(r"\d+(\.\d+)?\s*", text[:-1]) else -1.0
        elif text[-1:].isalpha():
            return parse_bytes(text)
        else:
            value = None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError("is neither a share (0.25, '25%') nor a size with its unit ('2GiB')")
    return float(value)


Amount = Annotated[int | float, BeforeValidator(_amount)]
Digest = Annotated[str, AfterValidator(_digest)]


class _Table(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class CacheShare(_Table):
    """What a tenant may hold (`quota`) and keep (`floor`) of one tier: an int is bytes, a float a share of the tier."""

    floor: Amount = 0.0
    quota: Amount | None = None


class Limits(_Table):
    """What a tenant may use; None: no limit."""

    weight: float = Field(default=1.0, ge=0.001, le=1000)
    """Its part of the device under the policy `fair`."""
    requests_per_minute: int | None = Field(default=None, ge=1, le=10**9)
    tokens_per_minute: int | None = Field(default=None, ge=1, le=10**12)
    max_concurrent: int | None = Field(default=None, ge=1, le=10**6)
    most_urgent_priority: int | None = Field(default=None, ge=-(2**31), le=2**31)
    """Of what it may ask for as `priority`, the smallest."""


class _Entry(Limits):
    keys: list[Digest] = Field(min_length=1, max_length=MAX_KEYS)
    cache: dict[str, CacheShare] = Field(default_factory=dict)


@dataclass(frozen=True)
class Tenant:
    """`id` names it inside: the salt of its cache. It comes from the name and the file's secret, so it outlives every
    key and every restart, and no client can choose it."""

    name: str
    id: str
    keys: tuple[bytes, ...]
    limits: Limits
    cache: Mapping[TierName, CacheShare]


def digest_of(key: str) -> bytes:
    """What is kept of a key."""
    return hashlib.sha256(key.encode()).digest()


def read_tenants(path: Path) -> list[Tenant]:
    """The tenants in a file. Raises ConfigError with one line on what is wrong, and where."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the tenants file {path}: {error}", param="server.tenants_file") from error
    return parse_tenants(text, str(path))


def parse_tenants(text: str, called: str) -> list[Tenant]:
    """The tenants in the `text` of a file that is `called` so in errors."""
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{called} is not valid TOML: {error}", param="server.tenants_file") from error
    try:
        return _tenants(tree)
    except _Wrong as wrong:
        line = _line_of(text, wrong.field)
        where = f"{called}, line {line}" if line else called
        name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in wrong.field)[1:]
        said = f"{where}: {name} {wrong.what}"
        raise ConfigError(said, param="server.tenants_file") from None


class _Wrong(Exception):
    def __init__(self, field: tuple[str | int, ...], what: str) -> None:
        self.field = field
        self.what = what


def _tenants(tree: dict[str, Any]) -> list[Tenant]:
    for name in tree.keys() - {"cache_secret", "tenants"}:
        raise _Wrong((name,), f"is not known here{_did_you_mean(name, ('cache_secret', 'tenants'))}")
    secret = tree.get("cache_secret", "")
    if not isinstance(secret, str) or 0 < len(secret) < MIN_SECRET_CHARS:
        raise _Wrong(("cache_secret",), f"must be a string of at least {MIN_SECRET_CHARS} characters")
    tables = tree.get("tenants", {})
    if not isinstance(tables, dict) or not 0 < len(tables) <= MAX_TENANTS:  # none must not open the daemon to everyone
        raise _Wrong(("tenants",), f"must hold 1 to {MAX_TENANTS} tables, such as [tenants.acme]")
    found: list[Tenant] = []
    owners: dict[bytes, str] = {}
    for name, table in tables.items():
        entry = _entry(name, table)
        keys = tuple(bytes.fromhex(value.removeprefix("sha256:")) for value in entry.keys)
        for number, key in enumerate(keys):
            if owners.setdefault(key, name) != name or key in keys[:number]:
                raise _Wrong(("tenants", name, "keys", number), f"is a key of tenant {owners[key]!r} already")
        limits = Limits(**{field: getattr(entry, field) for field in Limits.model_fields})
        found.append(Tenant(name, _id(name, secret), keys, limits, entry.cache))
    return found


def _entry(name: str, table: Any) -> _Entry:
    if NAME.fullmatch(name) is None or name in RESERVED_NAMES:
        rule = "1 to 63 of a-z, 0-9, - and _, the first a letter or digit"
        raise _Wrong(("tenants", name), f"is not a name for a tenant: {rule}; {', '.join(RESERVED_NAMES)} is taken")
    try:
        entry = _Entry.model_validate(table)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        fields = CacheShare.model_fields if "cache" in first["loc"] else _Entry.model_fields
        what = re.sub(r"^(Value error, |\w+ (?=should ))", "", first["msg"])
        if first["type"] == "extra_forbidden":
            what = f"is not known here{_did_you_mean(str(first['loc'][-1]), fields)}"
        raise _Wrong(("tenants", name, *first["loc"]), what) from None
    return entry


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _id(name: str, secret: str) -> str:
    return hmac.new(secret.encode(), b"terrace tenant\0" + name.encode(), hashlib.sha256).hexdigest()[:32]


def _line_of(text: str, field: tuple[str | int, ...]) -> int | None:
    """The line on which `field` stands, or the table that it is missing from; None where that cannot be told."""
    names = [str(part) for part in field if isinstance(part, str)]
    table: list[str] = []
    best: tuple[int, int] | None = None
    for number, line in enumerate(text.splitlines(), start=1):
        stripped = line.strip()
        if stripped.startswith("["):
            table = [part.strip().strip("\"'") for part in stripped.strip("[] ").split(".")]
            here = table
        else:
            key = stripped.partition("=")[0].strip()
            here = [*table, *(part.strip().strip("\"'") for part in key.split("."))] if key else []
        depth = len(here)
        if here and here == names[:depth] and (best is None or depth > best[0]):
            best = depth, number
    return best[1] if best else None


def cache_limits(
    tenants: Iterable[Tenant], frames: Mapping[TierName, int], block_bytes: int, room_blocks: int
) -> dict[str, dict[TierName, CacheLimit]]:
    """The floors and quotas of `tenants`, by id and tier, in blocks of tiers with so many `frames`; the first of them
    is the device, where `room_blocks` blocks must always find room. Raises ConfigError."""
    limits: dict[str, dict[TierName, CacheLimit]] = {}
    floors = dict.fromkeys(frames, 0)
    device = next(iter(frames))
    for tenant in tenants:
        limits[tenant.id] = {}
        for tier, share in tenant.cache.items():
            where = f"tenants.{tenant.name}.cache.{tier}"
            if tier not in frames:
                raise ConfigError(f"{where}: there is no such tier here; there are: {', '.join(frames)}", param=where)
            floor = _blocks(share.floor, frames[tier], block_bytes)
            quota = None if share.quota is None else _blocks(share.quota, frames[tier], block_bytes)
            if quota is not None and quota < floor:
                raise ConfigError(f"{where}: the quota is less than the floor; nobody could keep that", param=where)
            if floor or quota is not None:
                limits[tenant.id][tier] = CacheLimit(floor, quota)
            floors[tier] += floor
    for tier, floor in floors.items():
        most = int(FLOORS_SHARE_MAX * frames[tier]) - (room_blocks if tier == device else 0)
        if floor > max(0, most):
            more = f" and a longest request ({room_blocks} blocks)" if tier == device else ""
            raise ConfigError(
                f"the floors of all tenants keep {floor} of the {frames[tier]} blocks of the {tier} tier; at most "
                f"{max(0, most)} can be kept: new blocks{more} must find room; lower tenants.*.cache.{tier}.floor",
                param=f"tenants.*.cache.{tier}.floor",
            )
    return limits


def _blocks(amount: float, frames: int, block_bytes: int) -> int:
    return amount // block_bytes if isinstance(amount, int) else int(amount * frames)


# --- new keys --------------------------------------------------------------------------------------------------------


def add_key(path: Path, name: str, limits: Mapping[str, Any]) -> str:
    """Add a new random key of tenant `name` to the file, which is made if it is not there; returns the key, which is
    nowhere else. `limits` by the names in `Limits`, for a tenant that is new. Raises ConfigError; then the file is as
    it was."""
    try:
        text = path.read_text(encoding="utf-8")
        known = {tenant.name for tenant in parse_tenants(text, str(path))}
    except FileNotFoundError:
        text, known = f'cache_secret = "{secrets.token_hex(KEY_BYTES)}"\n', set()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}", param="file") from error
    key = f"tk-{secrets.token_urlsafe(KEY_BYTES)}"
    digest = f"sha256:{digest_of(key).hex()}"
    if name not in known:
        rows = [f"{field} = {json.dumps(value)}" for field, value in limits.items()]
        new = "\n".join([text.rstrip("\n"), "", f"[tenants.{name}]", f'keys = ["{digest}"]', *rows, ""])
    elif limits:
        raise ConfigError(f"tenant {name!r} is in {path} already; change its limits there", param=min(limits))
    else:
        new = _with_digest(text, name, digest)
    after = {tenant.name: tenant for tenant in parse_tenants(new, f"{path} with the new key")}
    if after.keys() != known | {name} or digest_of(key) not in after[name].keys:
        raise ConfigError(f'cannot tell where {path} has the keys of {name!r}: add "{digest}" yourself', param="file")
    _write(path, new)
    return key


def _with_digest(text: str, name: str, digest: str) -> str:
    """`text` with one more digest at the front of the tenant's keys, as far as they stand where they usually do."""
    header = re.search(rf"^\s*\[\s*tenants\s*\.\s*[\"']?{re.escape(name)}[\"']?\s*\]", text, re.MULTILINE)
    keys = re.compile(r"^\s*keys\s*=\s*\[", re.MULTILINE).search(text, header.end()) if header else None
    return text if keys is None else f'{text[: keys.end()]}"{digest}", {text[keys.end() :]}'


def _write(path: Path, text: str) -> None:
    """All of it or nothing, readable by its owner only."""
    temporary = path.with_name(f"{path.name}.new")
    try:
        temporary.unlink(missing_ok=True)
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}", param="file") from error
