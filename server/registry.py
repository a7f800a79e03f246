"""Name -> implementation, resolved lazily: a new tier, backend, model or policy is one file and one line in a dict."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import Any

from server.errors import ConfigError


def resolve(kind: str, table: Mapping[str, str], name: str) -> Any:
    """The object that `table[name] = "module:attribute"` names. Raises ConfigError listing what there is."""
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"unknown {kind} {name!r}{hint} (there are: {', '.join(sorted(table))})", param=kind)
    module, _, attribute = table[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
