"""Every knob of the daemon: one frozen tree, read once at start.

Precedence: defaults < TOML file < environment < command-line flags. Unknown keys are errors with a suggestion, because
a misspelt limit that is silently ignored is a limit that does not hold. Only this module reads `os.environ`. It
knows names, units, defaults and ranges; it does not know what a model, a tier or a policy is, so names of such
things (`attention`, `eviction`, `policy`) are checked where their registries are.

Environment: `TERRACE_<SECTION>__<FIELD>`, e.g. `TERRACE_KV__DEVICE_GIB=4`; and `TERRACE_MODEL`, `TERRACE_API_KEYS`
(comma-separated) and `TERRACE_CONFIG` (the TOML file). `TERRACE_KEY` is for commands that ask a daemon. An empty
variable counts as not set.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import textwrap
import tomllib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    PrivateAttr,
    ValidationError,
)

from server.errors import ConfigError
from server.settings import (
    BatchConfig,
    Flag,
    KvConfig,
    ModelConfig,
    SchedulerConfig,
    Section,
    ServerConfig,
    key_weights,
)

__all__ = ["BatchConfig", "Config", "KvConfig", "ModelConfig", "SchedulerConfig", "ServerConfig", "key_weights"]

ENV_PREFIX = "TERRACE_"
_SECRETS = {"server.api_keys", "server.admin_keys"}
_ENV_SHORT = {"TERRACE_MODEL": "model.model", "TERRACE_API_KEYS": "server.api_keys"}
_ENV_FILE = "TERRACE_CONFIG"
_ENV_KEY = "TERRACE_KEY"
"""What `terrace top` shows to the daemon; no setting of the daemon's."""
# Kubernetes injects these into every pod of a namespace that has a Service called `terrace` or `terrace-...`.
_ENV_KUBERNETES = re.compile(r"TERRACE_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?)")


class Config(Section):
    """The whole configuration, valid and immutable. `load_config` makes it; a bare `Config()` is all defaults."""

    model: ModelConfig = ModelConfig()
    kv: KvConfig = KvConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    server: ServerConfig = ServerConfig()
    batch: BatchConfig = BatchConfig()

    _sources: dict[str, str] = PrivateAttr(default_factory=dict)

    def source(self, name: str) -> str:
        """Where `section.field` got its value: `default`, `file PATH`, `env NAME`, `flag --name` or `argument NAME`."""
        return self._sources.get(name, "default")

    def taking(self, other: Config, names: Collection[str]) -> tuple[Config, list[str]]:
        """This configuration with those values of `other`, and the names of all others that differ."""
        found: dict[str, dict[str, Any]] = {}
        for name in names:
            section, _, field = name.partition(".")
            found.setdefault(section, {})[field] = getattr(getattr(other, section), field)
        mixed = self.model_copy(update={key: getattr(self, key).model_copy(update=new) for key, new in found.items()})
        differing = [row[0] for row, old in zip(other.rows(), self.rows(), strict=True) if row[1] != old[1]]
        return mixed, [name for name in differing if name not in names]

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """(name, value as TOML, source) of every field, API keys as their number only; for `terrace config show`."""
        for option in OPTIONS:
            value = getattr(getattr(self, option.section), option.field)
            shown = f"<{len(value)} set>" if option.name in _SECRETS else toml_value(value)
            yield option.name, shown, self.source(option.name)


def toml_value(value: object) -> str:
    """`value` as it would stand in the TOML file; None as `none` (TOML says None by leaving the key out)."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    return repr(value) if isinstance(value, int | float) else json.dumps(str(value), ensure_ascii=False)


@dataclass(frozen=True)
class Supervisor:
    """Who started the daemon and wants to hear of it: systemd's socket, and how often it wants to; 0.0: never."""

    address: str = ""
    watchdog_s: float = 0.0


def supervisor(environ: Mapping[str, str] | None = None) -> Supervisor:
    """From what systemd sets for a service of Type=notify."""
    environ = os.environ if environ is None else environ
    ours = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    period_us = environ.get("WATCHDOG_USEC", "")
    return Supervisor(environ.get("NOTIFY_SOCKET", ""), int(period_us) / 1e6 if ours and period_us.isdecimal() else 0.0)


@dataclass(frozen=True)
class Option:
    """One field of the tree, as the command line and the documentation see it."""

    section: str
    field: str
    flags: tuple[str, ...]
    kind: Literal["value", "bool", "list", "positional"]
    choices: tuple[str, ...]
    common: bool
    default: Any
    description: str

    @property
    def name(self) -> str:
        return f"{self.section}.{self.field}"

    @property
    def metavar(self) -> str:
        """The unit where the field's name ends in one, else its last word: TOKENS, S, GIB, PORT."""
        return self.field.rpartition("_")[2].upper()

    @property
    def typed(self) -> str:
        """How an error message calls it when it came from the command line."""
        return f"flag {self.flags[0]}" if self.flags else f"argument {self.metavar}"

    @property
    def env(self) -> str:
        return f"{ENV_PREFIX}{self.section.upper()}__{self.field.upper()}"


def _options() -> Iterator[Option]:
    for section, outer in Config.model_fields.items():
        assert isinstance(outer.annotation, type), "every top-level field is a section"
        schema = outer.annotation.model_json_schema()["properties"]
        for field, info in outer.annotation.model_fields.items():
            flag = next((m for m in info.metadata if isinstance(m, Flag)), Flag())
            kind: Literal["value", "bool", "list", "positional"] = "value"
            if flag.positional:
                kind = "positional"
            elif isinstance(info.default, bool):
                kind = "bool"
            elif isinstance(info.default, tuple):
                kind = "list"
            yield Option(
                section=section,
                field=field,
                flags=() if flag.positional else flag.names or ("--" + field.replace("_", "-"),),
                kind=kind,
                choices=tuple(schema[field].get("enum", ())),
                common=flag.common,
                default=info.default,
                description=info.description or "",
            )


OPTIONS: tuple[Option, ...] = tuple(_options())
_BY_NAME = {option.name: option for option in OPTIONS}


def example_toml() -> str:
    """A commented configuration file in which every field stands at its default: deploy/config.example.toml."""
    lines = [
        "# Every setting of Terrace with its default. Uncomment what you change; unknown keys are errors.",
        "# This file < environment (TERRACE_SECTION__FIELD) < flags. `terrace config show` shows the outcome.",
    ]
    for section in Config.model_fields:
        lines += ["", f"[{section}]"]
        for option in OPTIONS:
            if option.section == section:
                lines += ["", *textwrap.wrap(option.description, 118, initial_indent="# ", subsequent_indent="# ")]
                unset = f"# {option.field} =  # not set"
                lines += [unset if option.default is None else f"# {option.field} = {toml_value(option.default)}"]
    return "\n".join(lines) + "\n"


def load_config(
    overrides: Mapping[str, Any] | None = None,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> Config:
    """The effective configuration. `overrides` is {"section.field": value} from the flags; values may be strings.

    `file` defaults to what TERRACE_CONFIG names, if anything; `environ` to the process's own. Raises ConfigError with
    one line that names the field, where its value came from and what would be right.
    """
    environ = os.environ if environ is None else environ
    if file is None and environ.get(_ENV_FILE):
        file = Path(environ[_ENV_FILE])
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    layers = [(_from_file(file), f"file {file}")] if file is not None else []
    for layer, source in layers:
        values |= layer
        sources |= dict.fromkeys(layer, source)
    for name, variable in _env_names(environ).items():
        values[name] = environ[variable]
        sources[name] = f"env {variable}"
    for name, value in (overrides or {}).items():
        if name not in _BY_NAME:
            raise ConfigError(f"unknown setting {name!r}{_hint(name)}", param=name)
        values[name] = value
        sources[name] = _BY_NAME[name].typed
    config = _with_key_files(_validate(values, sources))
    config._sources.update(sources)
    return config


def client_key(environ: Mapping[str, str] | None = None) -> str | None:
    """The key that commands which ask a daemon show to it, unless told another."""
    return (os.environ if environ is None else environ).get(_ENV_KEY) or None


def _from_file(path: Path) -> dict[str, Any]:
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    values = {}
    for section, fields in tree.items():
        if section not in Config.model_fields:
            what = "section" if isinstance(fields, dict) else "key"
            raise ConfigError(f"unknown {what} {section!r} in {path}{_hint(section)}", param=section)
        if not isinstance(fields, dict):
            raise ConfigError(
                f"{section!r} in {path} must be a section: write [{section}] on a line of its own", param=section
            )
        for field, value in fields.items():
            name = f"{section}.{field}"
            if name not in _BY_NAME:
                raise ConfigError(f"unknown key {name!r} in {path}{_hint(name)}", param=name)
            values[name] = value
    return values


def _env_names(environ: Mapping[str, str]) -> dict[str, str]:
    """{section.field: variable} for every non-empty TERRACE_ variable; ConfigError for one that means nothing."""
    long_names = {option.env: option.name for option in OPTIONS}
    found: dict[str, str] = {}
    for variable in sorted(environ):
        if not variable.startswith(ENV_PREFIX) or variable == _ENV_FILE or not environ[variable]:
            continue
        name = long_names.get(variable) or _ENV_SHORT.get(variable)
        if name is None:
            if variable == _ENV_KEY or _ENV_KUBERNETES.fullmatch(variable):
                continue
            near = difflib.get_close_matches(variable, [*long_names, *_ENV_SHORT, _ENV_FILE], n=1)
            near = near or [o.env for o in OPTIONS if variable == ENV_PREFIX + o.field.upper()]
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"unknown environment variable {variable}{hint}", param=variable)
        if name in found:
            raise ConfigError(f"{found[name]} and {variable} both set {name}; keep one", param=name)
        found[name] = variable
    return found


def _hint(name: str) -> str:
    leaf = name.rpartition(".")[2]
    same_leaf = [option.name for option in OPTIONS if option.field == leaf]
    near = same_leaf or difflib.get_close_matches(name, [*_BY_NAME, *Config.model_fields], n=1)
    if not near:
        near_leaf = difflib.get_close_matches(leaf, [option.field for option in OPTIONS], n=1)
        near = [option.name for option in OPTIONS if option.field in near_leaf]
    return f"; did you mean {near[0]!r}?" if near else ""


def _validate(values: Mapping[str, Any], sources: Mapping[str, str]) -> Config:
    tree: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        section, _, field = name.partition(".")
        tree.setdefault(section, {})[field] = value
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"][:2])
        message = first["msg"].removeprefix("Value error, ")
        message = message[:1].lower() + message[1:]
        given = "" if name in _SECRETS else f" = {first['input']!r}"
        if len(first["loc"]) == 1:  # fields that do not fit together: the message starts with the one to blame
            field, _, message = message.partition(" ")
            name = f"{name}.{field}"
            given = f" = {toml_value(values[name])}"
        raise ConfigError(f"{name}{given} ({sources.get(name, 'default')}): {message}", param=name) from None


def _with_key_files(config: Config) -> Config:
    server = config.server
    update = {
        "api_keys": _with_keys(server.api_keys, server.api_key_file, "server.api_key_file"),
        "admin_keys": _with_keys(server.admin_keys, server.admin_key_file, "server.admin_key_file"),
    }
    return config.model_copy(update={"server": server.model_copy(update=update)})


def _with_keys(keys: tuple[str, ...], path: Path | None, name: str) -> tuple[str, ...]:
    """`keys` and those in the file, each once."""
    if path is None:
        return keys
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {name} {path}: {error}", param=name) from error
    found = tuple(key for line in lines if (key := line.partition("#")[0].strip()))
    if not found:
        # An empty file must not open the daemon to everyone.
        raise ConfigError(f"{name} {path} holds no key", param=name)
    if name == "server.api_key_file":
        try:
            key_weights(keys + found)
        except ValueError as error:
            raise ConfigError(f"{name} {path} {error}", param=name) from None
    return tuple(dict.fromkeys(keys + found))
