"""The command line: `terrace serve|top|config|cache|keys|bench|simulate`. All flags come from the configuration.

Knows argparse and exit codes; refuses to know what a daemon is made of (`build.py` does, imported only to serve, so
that `--help` answers at once). Exit codes: 0 done, 1 the work failed, 2 the configuration or environment cannot work.
"""

from __future__ import annotations

import argparse
import asyncio
import difflib
import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from server.config import OPTIONS, Config, Option, client_key, example_toml, load_config, toml_value
from server.errors import TerraceError
from server.tenants import Limits, add_key, read_tenants

DEFAULT_URL = "http://127.0.0.1:8000"
SECTION_TITLES = {
    "model": "model",
    "kv": "KV cache",
    "scheduler": "scheduling",
    "server": "HTTP server and process",
    "batch": "files and batches",
}


def main(argv: Sequence[str] | None = None, disk: Any = None) -> int:
    """Run one command; the exit code. Errors that an operator can mend are one line on stderr, without a traceback.

    `disk` stands in for the operating system below the SSD tier of `serve`, as in `build.build`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["bench"]:
        return int(importlib.import_module("loadgen.cli").main(arguments[1:]))
    if arguments[:1] == ["simulate"]:
        return int(importlib.import_module("server.sim.simulate").main(arguments[1:]))
    arguments = ["--help-all" if a == "--help=all" else a for a in arguments]
    args, unknown = _parser(help_all="--help-all" in arguments).parse_known_args(arguments)
    if unknown:
        print(f"terrace: error: unknown argument {unknown[0]}{_flag_hint(unknown[0])}", file=sys.stderr)
        return 2
    args.disk = disk
    if args.command is None:
        _parser().print_help()
        return 2
    try:
        return int(args.run(args))
    except TerraceError as error:
        if args.debug:
            raise
        print(f"terrace: error: {error.message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser(help_all: bool = False) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="terrace",
        description="An LLM server whose KV cache is terraced over device memory, host DRAM and SSD.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"terrace {_version()}")
    parser.set_defaults(command=None, debug=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    serve = commands.add_parser(
        "serve",
        usage="terrace serve [MODEL] [flags]",
        help="serve a model over HTTP",
        description="Serve MODEL over an OpenAI-compatible HTTP API.",
        epilog="Every flag can also stand in the --config file (section.field) or in the environment "
        "(TERRACE_SECTION__FIELD); flags win." + ("" if help_all else " All flags: terrace serve --help-all"),
        allow_abbrev=False,
    )
    _add_options(serve, show_all=help_all)
    serve.set_defaults(run=_serve)

    _add_top(commands)
    config = commands.add_parser("config", help="show or check the configuration", allow_abbrev=False)
    actions = config.add_subparsers(dest="action", metavar="show|check|example", required=True)
    for name, run, text in (
        ("show", _show, "print every setting, its value and where it comes from"),
        ("check", _check, "check file, environment and flags; exit 2 when they cannot work"),
    ):
        usage = f"terrace config {name} [MODEL] [flags]"
        action = actions.add_parser(name, usage=usage, help=text, description=text, allow_abbrev=False)
        _add_options(action, show_all=help_all)
        action.set_defaults(run=run)
    example = actions.add_parser("example", help="print a configuration file with every default", allow_abbrev=False)
    example.set_defaults(run=_example)

    cache = commands.add_parser("cache", help="look at, check or empty caches on SSD", allow_abbrev=False)
    acts = cache.add_subparsers(dest="action", metavar="list|verify|clear", required=True)
    for name, text in (
        ("list", "every cache below --ssd-path: blocks, size, last use, whether a daemon has it open"),
        ("verify", "read and check every block; exit 1 when any does not verify"),
        ("clear", "delete caches that no daemon uses; with --all or a fingerprint"),
    ):
        act = acts.add_parser(name, help=text, description=text, allow_abbrev=False)
        act.add_argument("--ssd-path", type=Path, required=True, metavar="PATH", help="the daemon's --ssd-path")
        if name != "list":
            act.add_argument(
                "fingerprint", nargs="?", metavar="FINGERPRINT", help="only this one; its beginning will do"
            )
        if name == "clear":
            act.add_argument("--all", action="store_true", help="all of them")
        act.set_defaults(run=_cache)

    keys = commands.add_parser("keys", help="API keys of tenants, and their limits", allow_abbrev=False)
    acts = keys.add_subparsers(dest="action", metavar="add|check", required=True)
    _add_keys(acts)

    commands.add_parser("bench", help="measure a server, compare results; terrace bench --help", add_help=False)
    commands.add_parser("simulate", help="replay a trace on other sizes and policies", add_help=False)
    return parser


def _add_top(commands: Any) -> None:
    text = "show what a running daemon does, live; the same as its page /ui"
    top = commands.add_parser("top", help=text, description=text, allow_abbrev=False)
    top.add_argument("url", nargs="?", metavar="URL", default=DEFAULT_URL, help=f"of the daemon [{DEFAULT_URL}]")
    top.add_argument("--key", help="API or admin key; better in the environment, as TERRACE_KEY, where nobody sees it")
    top.add_argument("--once", action="store_true", help="print it once, as plain text, and exit")
    top.set_defaults(run=_top)


def _add_keys(actions: Any) -> None:
    text = "print a new random key of TENANT, once, and add its digest to FILE, which is made if it is not there (0600)"
    add = actions.add_parser("add", help=text, description=text, allow_abbrev=False)
    add.add_argument("file", type=Path, metavar="FILE", help="the daemon's --tenants-file; send it SIGHUP afterwards")
    add.add_argument("tenant", metavar="TENANT", help="who the key is for; a tenant may have several, to change them")
    group = add.add_argument_group("limits of a new tenant; those of the cache are set in the file")
    for name, kind, limit in (
        ("requests-per-minute", int, "requests a minute"),
        ("tokens-per-minute", int, "tokens a minute: prompts, but for what the cache has, and answers"),
        ("max-concurrent", int, "requests at once"),
        ("most-urgent-priority", int, "the smallest priority that it may ask for"),
        ("weight", float, "its part of the device under --policy fair [1]"),
    ):
        group.add_argument(f"--{name}", type=kind, metavar="N", default=argparse.SUPPRESS, help=limit)
    add.set_defaults(run=_add_key)
    check = actions.add_parser("check", help="is FILE right? exit 2 when not", allow_abbrev=False)
    check.add_argument("file", type=Path, metavar="FILE")
    check.set_defaults(run=_check_keys)


def _add_options(parser: argparse.ArgumentParser, *, show_all: bool) -> None:
    """Every field of the configuration as a flag of `parser`, uncommon ones hidden unless `show_all`.

    Defaults are suppressed: the namespace holds only what the operator typed, under its dotted name.
    """
    parser.add_argument("--config", type=Path, metavar="FILE", help="configuration in TOML")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a configuration error")
    parser.add_argument("--help-all", action="help", help="show every flag and exit")
    groups = {section: parser.add_argument_group(title) for section, title in SECTION_TITLES.items()}
    for option in OPTIONS:
        _add_option(groups[option.section], option, shown=show_all or option.common)


def _add_option(group: Any, option: Option, *, shown: bool) -> None:
    text = argparse.SUPPRESS
    if shown:
        default = "" if option.default in (None, ()) else f" [{toml_value(option.default)}]"
        text = (option.description + default).replace("%", "%%")
    settings: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
    metavar = "|".join(option.choices) or option.metavar
    if option.kind == "positional":
        group.add_argument(option.name, metavar=option.metavar, nargs="?", **settings)
        return
    settings["dest"] = option.name
    if option.kind == "bool":
        settings["action"] = argparse.BooleanOptionalAction
    else:
        settings |= {"action": "append" if option.kind == "list" else "store", "metavar": metavar}
    for position, flag in enumerate(option.flags):
        if position:
            settings["help"] = argparse.SUPPRESS  # other servers' name for the same thing: accepted, not advertised
        group.add_argument(flag, **settings)


def _flag_hint(argument: str) -> str:
    flag = argument.partition("=")[0]
    known = [name for option in OPTIONS for name in option.flags]
    near = difflib.get_close_matches(flag, [*known, "--config", "--help-all"], n=1)
    return f"; did you mean {near[0]}?" if near else "; terrace serve --help-all lists every flag"


def _load(args: argparse.Namespace) -> Config:
    names = {option.name for option in OPTIONS}
    return load_config({name: value for name, value in vars(args).items() if name in names}, file=args.config)


def _serve(args: argparse.Namespace) -> int:
    config = _load(args)
    process = importlib.import_module("server.process")
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return int(runner.run(process.serve(config, args.disk, lambda: _load(args))))


def loop_factory() -> Any:
    """uvloop's event loop where it is installed; None for asyncio's own."""
    try:
        return importlib.import_module("uvloop").new_event_loop
    except ImportError:
        return None


def _top(args: argparse.Namespace) -> int:
    return int(importlib.import_module("server.top").top(args.url, args.key or client_key(), once=args.once))


def _show(args: argparse.Namespace) -> int:
    rows = list(_load(args).rows())
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for name, value, source in rows:
        print(f"{name:{widths[0]}}  {value:{widths[1]}}  {source}")
    return 0


def _check(args: argparse.Namespace) -> int:
    _load(args)
    print("the configuration is valid")
    return 0


def _example(args: argparse.Namespace) -> int:
    print(example_toml(), end="")
    return 0


def _cache(args: argparse.Namespace) -> int:
    cachectl = importlib.import_module("server.cachectl")
    if args.action == "list":
        return int(cachectl.list_all(args.ssd_path))
    if args.action == "verify":
        return int(cachectl.verify(args.ssd_path, args.fingerprint))
    if (args.fingerprint is None) != args.all:
        print("terrace: error: say which cache to clear: a FINGERPRINT, or --all", file=sys.stderr)
        return 2
    return int(cachectl.clear(args.ssd_path, args.fingerprint))


def _add_key(args: argparse.Namespace) -> int:
    limits = {name: value for name, value in vars(args).items() if name in Limits.model_fields}
    print(add_key(args.file, args.tenant, limits))
    return 0


def _check_keys(args: argparse.Namespace) -> int:
    tenants = read_tenants(args.file)
    print(f"{len(tenants)} tenants with {sum(len(tenant.keys) for tenant in tenants)} keys")
    return 0


def _version() -> str:
    try:
        return version("terrace")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
