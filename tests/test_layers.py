"""Imports only go down, siblings never import each other; only a few modules may touch clock, environment or torch.

The rules are those of the design: a deterministic control plane that does no I/O and reads no clock, in a thin shell.
They are checked on syntax trees, imports inside functions and lazily resolved "module:attribute" strings included.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(path.relative_to(ROOT) for top in ("server", "loadgen") for path in (ROOT / top).rglob("*.py"))

# Unit -> layer, lowest first. A unit may import from lower layers and from itself, never from its own layer's others.
LAYERS = [
    {"base"},  # types errors registry quantities ownership settings histogram startup notify logs room explain
    {"metrics", "config", "recorder", "tenants", "tracing"},
    {"kvcache", "kernels"},
    {"scheduler", "models"},
    {"runner", "engine", "text", "batches"},
    {"sim"},
    {"api", "place"},
    {"build", "cachectl", "top", "watchdog"},
    {"process"},
    {"demo"},
    {"cli"},
    {"bench"},
    {"__main__"},
]
LEVEL = {unit: level for level, units in enumerate(LAYERS) for unit in units}
BASE = set("types errors registry quantities ownership settings histogram startup notify logs room explain".split())

LOADGEN_FILES = {"server/sim/study.py", "server/sim/simulate.py", "server/sim/summary.py", "server/sim/page.py"}
"""They read the traces that load tests replay, and show figures as those do."""
CLOCKED = {"cli", "cachectl", "build", "place", "process", "sim", "bench", "demo"}
TORCH = {"models", "runner", "build", "place", "bench", "demo", "kernels"}
TORCH_FILES = {"server/kvcache/arena.py", "server/kvcache/codec.py", "server/kvcache/tiers/device.py"}
NO_TORCH_FILES = {"server/kernels/attention.py", "server/kernels/__init__.py"}
SOLE_IMPORTERS = {"flashinfer": "server/kernels/flashinfer.py", "llguidance": "server/runner/grammar.py"}

MODULE_STRING = re.compile(r"(server(?:\.\w+)+)(?::\w+)?")


def unit_of(module: str) -> str | None:
    """`server.kvcache.pool` -> `kvcache`, `server.types` -> `base`; None for `server` itself and what is not ours."""
    parts = module.split(".")
    if parts[0] != "server" or len(parts) == 1:
        return None
    return "base" if parts[1] in BASE else parts[1]


def imported_modules(tree: ast.Module, module: str, *, is_package: bool) -> Iterator[tuple[int, str, bool]]:
    """(line, absolute module, whether it is only for type checkers) of everything that `tree` imports."""
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parent = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*parent, *([node.module] if node.module else [])])
            # `from server import types` names a module; `from server.types import X` names one too, harmlessly longer.
            names = [f"{source}.{alias.name}" for alias in node.names] if source == "server" else [source]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and package[0] == "server":
            match = MODULE_STRING.fullmatch(node.value)
            # loadgen names modules too: it starts them as processes. A setting's name (`server.port`) looks like
            # one, but of no known unit.
            names = [match[1]] if match and unit_of(match[1]) in LEVEL else []
        for name in names:
            yield getattr(node, "lineno", 0), name, id(node) in typing_only


def violations(path: PurePosixPath, source: str) -> list[str]:
    """Every breach of the layering rules in one file, as `path:line: what`."""
    tree = ast.parse(source)
    is_package = path.name == "__init__.py"
    module = ".".join(path.parent.parts if is_package else path.with_suffix("").parts)
    unit = unit_of(module)
    found: list[str] = []

    def report(line: int, what: str) -> None:
        found.append(f"{path}:{line}: {what}")

    if tree.body and ast.get_docstring(tree) is None:
        report(1, "has no module docstring")
    if unit is not None and unit not in LEVEL:
        report(1, f"`{unit}` stands in no layer")
        return found
    for line, name, typing_only in imported_modules(tree, module, is_package=is_package):
        what = _import_breach(str(path), unit, name, typing_only=typing_only)
        if what:
            report(line, what)
    if unit != "config":
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv"):
                report(node.lineno, "only config.py reads the environment")
    return found


def _import_breach(path: str, unit: str | None, name: str, *, typing_only: bool) -> str | None:
    top, other = name.split(".")[0], unit_of(name)
    if unit is None:
        return f"loadgen and server do not import each other: {name}" if top == "server" else None
    if top in ("loadgen", "tests") and path not in LOADGEN_FILES:
        return f"server imports nothing from {top}"
    if other is not None and other != unit and (other not in LEVEL or LEVEL[other] >= LEVEL[unit]):
        return f"`{unit}` must not import `{name}`: it is not in a lower layer"
    if top == "asyncio" and (unit in ("base", "config", "scheduler", "kernels", "models") or _sync_kvcache(path)):
        return "asyncio in the synchronous core"
    if top in ("time", "datetime") and unit not in CLOCKED:
        return f"reads a clock ({name}): `now` is passed in"
    if top == "torch" and not typing_only:
        allowed = (unit in TORCH and path not in NO_TORCH_FILES) or path in TORCH_FILES
        return None if allowed else "torch in the control plane"
    if path != SOLE_IMPORTERS.get(top, path):
        return f"{top} is imported in {SOLE_IMPORTERS[top]} only"
    return None


def _sync_kvcache(path: str) -> bool:
    folder = "server/kvcache/"
    return path.startswith(folder) and path != f"{folder}mover.py" and not path.startswith(f"{folder}tiers/")


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_layers(path: Path):
    """Every source file keeps the layering rules."""
    assert violations(PurePosixPath(path.as_posix()), (ROOT / path).read_text(encoding="utf-8")) == []


def test_there_is_something_to_check():
    """The file list is not empty by accident."""
    assert Path("server/types.py") in SOURCES


@pytest.mark.parametrize(
    ("path", "code", "breach"),
    [
        ("server/kvcache/pool.py", "from server.scheduler import request", "not in a lower layer"),
        ("server/kvcache/pool.py", "from server.kernels.attention import AttentionBackend", "not in a lower layer"),
        ("server/kvcache/pool.py", "from ..scheduler import request", "not in a lower layer"),
        ("server/kvcache/pool.py", "def f():\n    import server.engine", "not in a lower layer"),
        ("server/kvcache/pool.py", "TABLE = {'a': 'server.models.llama:Llama'}", "not in a lower layer"),
        ("server/types.py", "from server import config", "not in a lower layer"),
        ("server/engine.py", "from server.runner.runner import Runner", "not in a lower layer"),
        ("server/api/app.py", "from server.cli import main", "not in a lower layer"),
        ("server/api/app.py", "import loadgen", "nothing from loadgen"),
        ("loadgen/client.py", "from server.types import BlockLayout", "do not import each other"),
        ("server/novel.py", "import json", "stands in no layer"),
        ("server/scheduler/scheduler.py", "import asyncio", "asyncio in the synchronous core"),
        ("server/kvcache/manager.py", "from asyncio import sleep", "asyncio in the synchronous core"),
        ("server/engine.py", "import time", "reads a clock"),
        ("server/api/app.py", "from datetime import datetime", "reads a clock"),
        ("server/scheduler/scheduler.py", "def f():\n    from time import monotonic", "reads a clock"),
        ("server/runner/runner.py", "import os\nx = os.environ['A']", "only config.py reads the environment"),
        ("server/cli.py", "import os\nx = os.getenv('A')", "only config.py reads the environment"),
        ("server/kvcache/manager.py", "import torch", "torch in the control plane"),
        ("server/engine.py", "from torch import nn", "torch in the control plane"),
        ("server/kernels/attention.py", "import torch", "torch in the control plane"),
        ("server/kernels/cpu.py", "import flashinfer", "flashinfer is imported in"),
        ("server/runner/sampling.py", "from llguidance import LLMatcher", "llguidance is imported in"),
    ],
)
def test_checker_catches_planted_breaches(path, code, breach):
    """Each rule fails on a file that breaks it, so the net has no hole where it seems to hold."""
    found = violations(PurePosixPath(path), f'"""Planted."""\n{code}\n')
    assert [breach in line for line in found] == [True]


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("server/kvcache/mover.py", "import asyncio"),
        ("server/kvcache/tiers/ssd.py", "import asyncio"),
        ("server/kvcache/arena.py", "import torch"),
        ("server/kernels/flashinfer.py", "import flashinfer, torch"),
        ("server/kernels/attention.py", "if TYPE_CHECKING:\n    import torch"),
        ("server/config.py", "import os\nx = os.environ"),
        ("server/cli.py", "import time\nfrom server import build"),
        ("server/engine.py", "from server.scheduler.scheduler import Scheduler\nfrom server.types import StepPlan"),
        ("server/registry.py", "from server.errors import ConfigError"),
        ("server/kvcache/manager.py", "from .pool import Pool\nfrom server.kvcache import block"),
    ],
)
def test_checker_allows_what_the_design_allows(path, code):
    """The rules do not forbid what the design permits."""
    assert violations(PurePosixPath(path), f'"""Fine."""\n{code}\n') == []


def test_checker_wants_a_docstring():
    """A file that holds code says in its docstring what it knows; an empty __init__.py need not."""
    assert violations(PurePosixPath("server/text.py"), "x = 1\n") == ["server/text.py:1: has no module docstring"]
    assert violations(PurePosixPath("server/models/__init__.py"), "") == []
