"""`python -m tests.gpu.prepare FOLDER`: wheels for a machine that has a GPU, torch for it, and no network.

Downloads what Terrace needs beside torch, transformers and what these bring, and says how much that is; carry FOLDER
over and say `make gpu-test WHEELS=FOLDER`. Runs anywhere with pip; installs nothing.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMIT_MIB = 64
"""What should not be exceeded, with the repository itself, where uploads are limited so."""
ALONE = ("flashinfer-python", "llguidance", "pytest-asyncio", "xxhash", "aiofiles", "python-multipart")
"""Taken without what they need: torch's own image has that, or it is for other devices, gigabytes of it in FlashInfer's
case, which needs TVM_FFI alone."""
TVM_FFI = "apache-tvm-ffi>=0.1.6,<0.2"
WHOLE = ("fastapi", "uvicorn", "httptools", "pydantic", "prometheus-client")
"""Taken with what they need: they fit each other only in certain versions."""
LIBC_MINORS = (5, 12, 17, 24, 27, 28, 31, 34, 35, 39)
"""Of the C libraries that wheels are made for and the machine may be expected to have; pip takes exact matches."""


def main(argv: Sequence[str] | None = None) -> int:
    """Download; the exit code is 1 where something could not be had or all of it is too much."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.prepare", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="version there [3.12]")
    args = parser.parse_args(argv)
    alone, whole = [TVM_FFI, *map(requirement, ALONE)], list(map(requirement, WHOLE))
    for names, more in ((alone, ["--no-deps"]), (whole, [])):
        done = subprocess.run(command(args.folder, args.python, names, more), check=False)
        if done.returncode:
            return 1
    return report(args.folder)


def requirement(name: str) -> str:
    """With the versions that pyproject.toml asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extra = project["optional-dependencies"]
    known = [*project["dependencies"], *extra["cuda"], *extra["dev"]]
    return next(entry for entry in known if re.match(r"[\w.-]+", entry)[0] == name)


def command(folder: Path, python: str, names: Sequence[str], more: Sequence[str]) -> list[str]:
    """What pip is asked for."""
    where = [part for minor in LIBC_MINORS for part in ("--platform", f"manylinux_2_{minor}_x86_64")]
    where += ["--platform", "manylinux2014_x86_64"]
    return [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--only-binary=:all:",
        "--implementation", "cp", "--python-version", python, *where, "--dest", str(folder), *more, *names,
    ]  # fmt: skip


def report(folder: Path) -> int:
    """Say what is there, largest first."""
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.whl")}
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        print(f"{size / 2**20:8.2f} MiB  {name}")
    total = sum(sizes.values()) / 2**20
    print(f"{total:8.2f} MiB  in all, of {LIMIT_MIB}")
    return int(total > LIMIT_MIB)


if __name__ == "__main__":
    sys.exit(main())
