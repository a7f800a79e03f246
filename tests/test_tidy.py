"""The tree stays small, honest and free of what only one machine or one afternoon knows."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from server.config import OPTIONS

ROOT = Path(__file__).resolve().parent.parent
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 70
LONG_ALLOWED: set[str] = set()
"""Exceptions to the two limits, as `path` or `path:function`. Empty, and meant to stay so."""

TEXT_SUFFIXES = {".py", ".md", ".toml", ".yaml", ".yml", ".json", ".sh", ".cfg", ".service", ".c", ".h", ".html", ""}
SKIPPED = {"build", "dist", "node_modules", "results", "model"}
MAY_PRINT = re.compile(r"server/(cli|cachectl|process|bench/\w+|demo/\w+|metrics/__main__|sim/\w+)\.py")
# Built from pieces so that this file does not trip over itself.
UNFINISHED = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK")) + r")\b")
ONE_MACHINE = re.compile("|".join((r"(?<![\w.])/(wo" + "rk|ro" + "ot|ho" + r"me|Us" + r"ers)/\w", "/tm" + "p/v/")))
REGISTRIES = re.compile("|".join(("pypi" + r"\.org", r"download\.pytorch" + r"\.org", "files.python" + "hosted")))


@cache
def texts() -> dict[str, str]:
    """Text files of the tree by relative path, without hidden and generated ones."""
    found = {}
    for path in sorted(ROOT.rglob("*")):
        relative = path.relative_to(ROOT)
        hidden = any(part.startswith(".") and part != ".ci" for part in relative.parts[:-1])
        generated = any(part in SKIPPED or part.endswith(".egg-info") for part in relative.parts[:-1])
        if path.is_file() and not hidden and not generated and path.suffix in TEXT_SUFFIXES:
            found[relative.as_posix()] = path.read_text(encoding="utf-8")
    return found


@cache
def trees(top: str) -> dict[str, ast.Module]:
    return {name: ast.parse(text) for name, text in texts().items() if name.startswith(top) and name.endswith(".py")}


def hits(pattern: re.Pattern[str]) -> list[str]:
    return [
        f"{name}:{number}: {line.strip()}"
        for name, text in texts().items()
        for number, line in enumerate(text.splitlines(), start=1)
        if pattern.search(line)
    ]


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_nothing_is_left_unfinished():
    """No file carries a note that something is still to be done."""
    assert hits(UNFINISHED) == []


def test_no_file_knows_one_machine():
    """No file names a path of the machine it was written on, or a package registry."""
    assert hits(ONE_MACHINE) == []
    assert hits(REGISTRIES) == []


def test_files_and_functions_fit():
    """No file in server/ is over 600 lines and no function over 70."""
    long = [
        f"{name}: {lines} lines"
        for name, text in texts().items()
        if name.startswith("server/") and name.endswith(".py") and (lines := text.count("\n")) > MAX_FILE_LINES
        if name not in LONG_ALLOWED
    ]
    for name, tree in trees("server/").items():
        for function in functions(tree):
            lines = (function.end_lineno or 0) - function.lineno + 1
            if lines > MAX_FUNCTION_LINES and f"{name}:{function.name}" not in LONG_ALLOWED:
                long.append(f"{name}:{function.name}: {lines} lines")
    assert long == []


def test_every_package_has_a_readme():
    """Each package has a page that says what it is for."""
    packages = [ROOT / "server", ROOT / "loadgen", *(path.parent for path in (ROOT / "server").glob("*/__init__.py"))]
    assert [str(p.relative_to(ROOT)) for p in packages if not (p / "README.md").is_file()] == []


def test_every_folder_of_code_is_a_package():
    """A folder without __init__.py would be left out of the wheel."""
    folders = {path.parent for top in ("server", "loadgen") for path in (ROOT / top).rglob("*.py")}
    assert [str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_every_test_says_what_it_proves():
    """Each test function has a docstring: the sentence it proves."""
    silent = [
        f"{name}:{function.lineno}: {function.name}"
        for name, tree in trees("tests/").items()
        for function in functions(tree)
        if function.name.startswith("test_") and not ast.get_docstring(function)
    ]
    assert silent == []


def test_no_error_is_swallowed_whole():
    """No bare `except:`, and no `except Exception` or wider whose body does nothing."""
    swallowed = []
    for name, tree in trees("server/").items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.ExceptHandler):
                continue
            wide = node.type is None or (
                isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")
            )
            idle = all(isinstance(statement, ast.Pass | ast.Continue) for statement in node.body)
            if node.type is None or (wide and idle):
                swallowed.append(f"{name}:{node.lineno}")
    assert swallowed == []


def test_only_commands_print():
    """print() belongs to commands that a person runs; the daemon logs events."""
    printing = [
        f"{name}:{node.lineno}"
        for name, tree in trees("server/").items()
        if not MAY_PRINT.fullmatch(name)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert printing == []


# Distributions that are used without an import of ours, and by whom.
USED_BY_OTHERS = {
    "httptools": "parses HTTP for uvicorn, whose class for it server/api/connections.py extends",
    "jinja2": "transformers renders chat templates with it",
    "uvloop": "resolved by name in server/cli.py",
}


def _imports(top: str) -> set[str]:
    names = set()
    for tree in trees(top).values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names.add(node.module.split(".")[0])
    return names - {"server", "loadgen", "deploy", "tests", "__future__"}


def _module(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9_.-]+", requirement)
    assert match, requirement
    name = match[0].lower().replace("-", "_").removesuffix("_python")
    return {"scikit_learn": "sklearn"}.get(name, name)


@cache
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_dependencies_are_used_and_declared():
    """Every core dependency is imported by the server, and it imports nothing else from outside."""
    declared = {_module(requirement) for requirement in project()["dependencies"]}
    imported = {name for name in _imports("server/") if name not in sys.stdlib_module_names}
    extra = project()["optional-dependencies"]
    optional = {_module(requirement) for requirement in [*extra["cuda"], *extra["study"]]}
    # Parts of FastAPI and of pydantic that those two pin themselves.
    assert imported - declared - optional - {"starlette", "pydantic_core"} == set()
    assert declared - imported - set(USED_BY_OTHERS) == set()


def test_tests_import_only_what_is_declared():
    """The test suite, and what makes the boards, need nothing beyond the core and the `dev` extra."""
    extra = project()["optional-dependencies"]
    declared = {_module(requirement) for requirement in [*project()["dependencies"], *extra["dev"], *extra["cuda"]]}
    others = _imports("tests/clients/")  # each of those runs in an environment of its own
    used = _imports("tests/") - others | _imports("deploy/")
    imported = {name for name in used if name not in sys.stdlib_module_names}
    assert {name.replace("yaml", "pyyaml") for name in imported} - declared - {"starlette"} == set()


def test_every_setting_is_read():
    """A setting that nothing reads is a promise that nothing keeps: each is read outside config.py."""
    read = {
        node.attr
        for name, tree in trees("server/").items()
        if name != "server/config.py"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
    }
    by_config_itself = {"server.api_key_file", "server.admin_key_file"}
    assert {option.name for option in OPTIONS if option.field not in read} - by_config_itself == set()
