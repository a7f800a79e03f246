"""Numbers as people type and read them, with units: 8MiB, 100ms, 32k.

What is typed and is no string stays as it is; a ValueError says what is wrong with one that is no such quantity.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

BYTE_UNITS = {"": 1, "b": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate(("k", "m", "g", "t"), start=1)
    for suffix, base in (("", 1024), ("ib", 1024), ("b", 1000))
}
TIME_UNITS = {"": 1.0, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
COUNT_UNITS = {"": 1, "k": 1000, "K": 1024, "m": 1000**2, "M": 1024**2}
_QUANTITY = re.compile(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?|\.[0-9]+)\s*([A-Za-z]*)\s*")


def _quantity(text: str, units: Mapping[str, float], what: str) -> float:
    match = _QUANTITY.fullmatch(text)
    if match is None or match[2] not in units:
        raise ValueError(f"is not {what} (units: {', '.join(u for u in units if u)})")
    return float(match[1].replace("_", "")) * units[match[2]]


def _whole(value: float) -> int:
    if value != int(value):
        raise ValueError("is not a whole number")
    return int(value)


def parse_bytes(value: object) -> object:
    """Bytes, from `8MiB` and the like."""
    return _whole(_quantity(value.lower(), BYTE_UNITS, "a size in bytes")) if isinstance(value, str) else value


def parse_gib(value: object) -> object:
    """GiB, from `512MiB` and the like."""
    if not isinstance(value, str):
        return value
    text = value.lower().strip()
    return _quantity(text, BYTE_UNITS, "a size in GiB") / 2**30 if text[-1:].isalpha() else value


def parse_seconds(value: object) -> object:
    """Seconds, from `100ms` and the like."""
    return _quantity(value.lower(), TIME_UNITS, "a duration in seconds") if isinstance(value, str) else value


def parse_count(value: object) -> object:
    """A whole number, from `32k` and the like."""
    return _whole(_quantity(value, COUNT_UNITS, "a count")) if isinstance(value, str) else value


def show_bytes(count: float) -> str:
    """`512 B`, `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def show_seconds(seconds: float) -> str:
    """`8.1 ms`, `120 ms`, `1.40 s`, `12.5 s`, `5 min`, `3 h 20 min`, `2 d 4 h`."""
    if seconds < 0.9995:
        return f"{seconds * 1e3:.{1 if seconds < 0.01 else 0}f} ms"
    if seconds < 100:
        return f"{seconds:.{2 if seconds < 10 else 1}f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
