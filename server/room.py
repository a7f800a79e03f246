"""Is there room for what is asked for, in memory and on disk? What is refused says what is needed, what there is, and
the nearest setting that fits. Linux; reads a few files.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import inf
from pathlib import Path
from tempfile import TemporaryFile

from server.errors import ConfigError

log = logging.getLogger("terrace.room")

SPARE_BYTES = 256 * 2**20
"""For activations, requests and the interpreter, beyond what is taken at start."""
LEAST_GIB = 0.01
"""What is less is not worth to be advised."""
GIB = 2**30


def available_bytes(root: Path = Path("/")) -> int | None:
    """What the machine has left, or, if that is less, what the control group may still take; None where that cannot be
    known. Pages of files can be given back, and count as left."""
    found = []
    fields = _fields(root / "proc/meminfo")
    if "MemAvailable:" in fields:
        found.append(fields["MemAvailable:"] * 1024)
    group = _group(root)
    limit, used = _number(group / "memory.max"), _number(group / "memory.current")
    if limit is not None and used is not None:
        found.append(max(0, limit - used + _fields(group / "memory.stat").get("inactive_file", 0)))
    return min(found, default=None)


def _group(root: Path) -> Path:
    """Of this process in the second version of control groups."""
    folder = root / "sys/fs/cgroup"
    for line in _lines(root / "proc/self/cgroup"):
        if line.startswith("0::"):
            own = folder / line[3:].lstrip("/")
            return own if own.is_dir() else folder
    return folder


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return []


def _number(path: Path) -> int | None:
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdecimal() else None


def _fields(path: Path) -> dict[str, int]:
    words = (line.split() for line in _lines(path))
    return {word[0]: int(word[1]) for word in words if len(word) > 1 and word[1].isdecimal()}


def check_memory(
    name: str,
    weights: Mapping[str, int],
    precision: str,
    tiers: Mapping[str, float],
    available: int | None,
    spare: int,
) -> None:
    """Raises ConfigError unless model `name` and its tiers fit into `available` bytes and leave `spare` of them.

    `weights`: bytes by the flag of a precision in which the model can be served, `precision` being the one asked for.
    `tiers`: GiB that are asked for by flag, from the one to give up last to the one to give up first.
    """
    needed = weights[precision] + sum(tiers.values()) * GIB + spare
    if available is None or needed <= available:
        return
    asked = "".join(f" + {flag} {size:g}" for flag, size in tiers.items() if size)
    raise ConfigError(
        f"model {name} does not fit: weights {_gib(weights[precision])} GiB with {precision}{asked} + "
        f"{_gib(spare)} GiB to work in = {_gib(needed)} GiB needed, {_gib(available)} GiB available; "
        f"{_advice(weights, precision, tiers, available - spare)}",
        param="kv.device_gib",
    )


def check_dram(dram_gib: float, available: int | None) -> None:
    """Raises ConfigError unless so much memory can be pinned, beside what the process works with."""
    room_gib = inf if available is None else max(0, available - SPARE_BYTES) / GIB
    if dram_gib > room_gib:
        raise ConfigError(
            f"dram_gib {dram_gib:g} does not fit: {room_gib:.3g} GiB are available; --dram-gib {_floor(room_gib)} fits",
            param="kv.dram_gib",
        )


def _advice(weights: Mapping[str, int], precision: str, tiers: Mapping[str, float], room: int) -> str:
    """What fits into `room` bytes: less of the tiers, or another precision."""
    left_gib = max(0.0, (room - weights[precision]) / GIB)
    fitting: dict[str, float] = {}
    for flag, size in tiers.items():
        fitting[flag] = min(size, left_gib)
        left_gib -= fitting[flag]
    if fitting[next(iter(tiers))] >= LEAST_GIB:
        less = (f"{flag} {_floor(size)}" for flag, size in fitting.items() if size < tiers[flag])
        return f"{' '.join(less)} fits"
    for other, size in weights.items():
        if size + LEAST_GIB * GIB <= room:
            return f"{other} leaves room: {_gib(size)} GiB of weights"
    return "take a smaller model or a larger machine"


def _gib(size: float) -> str:
    return f"{size / GIB:.3g}" if size < 1000 * GIB else f"{size / GIB:.0f}"


def _floor(gib: float) -> str:
    return f"{int(gib / LEAST_GIB) * LEAST_GIB:.10g}"


def check_disk(path: Path, wanted_gib: float, floor_gib: float) -> None:
    """Raises ConfigError unless the SSD tier may write to `path`. Makes the directory. A file system that is smaller
    than the tier and what it leaves free is warned of: the tier then makes do with what there is, and serving does not
    depend on it."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with TemporaryFile(dir=path):
            size_gib = disk_gib(path)
    except OSError as error:
        raise unusable(path, error) from error
    if wanted_gib + floor_gib > size_gib:
        log.warning(
            "the SSD tier does not fit and takes what there is: ssd_gib %g + ssd_min_free_gib %g that stay free = "
            "%g GiB needed, the file system of %s has %.3g GiB in all; --ssd-gib %s fits",
            wanted_gib, floor_gib, wanted_gib + floor_gib, path, size_gib, _floor(max(0.0, size_gib - floor_gib)),
        )  # fmt: skip


def disk_gib(path: Path) -> float:
    """Size of the file system there, used or not. Raises OSError."""
    disk = os.statvfs(path)
    return disk.f_blocks * disk.f_frsize / GIB


def unusable(path: Path, error: OSError) -> ConfigError:
    """The SSD tier cannot be there."""
    return ConfigError(
        f"cannot write to {path} for the SSD tier: {error.strerror}; give user {os.geteuid()} a directory that it may "
        "write, or name another --ssd-path",
        param="kv.ssd_path",
    )


@contextmanager
def taking(field: str, gib: float) -> Iterator[None]:
    """Around taking memory: what the system refuses, by a limit that is not looked at before, is one line, too."""
    try:
        yield
    except OSError as error:
        flag = field.replace("_", "-")
        message = f"cannot take the memory of {field} {gib:g}: {error.strerror}; lower --{flag}"
        raise ConfigError(message, param=f"kv.{field}") from error
