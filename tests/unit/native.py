"""Choosing among the instruction sets of the native kernels in tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from server.kernels.native import ISAS, load, select


def instruction_sets() -> list[str]:
    """Those of this machine; none where the kernels were not built."""
    library, found = load(), []
    if library is None:
        return ["none"]
    for isa in ISAS:
        with suppress(ValueError):
            found.append(select(library, isa))
    select(library, "auto")
    return found


@contextmanager
def selected(isa: str) -> Iterator[None]:
    library = load()
    assert library is not None
    select(library, isa)
    try:
        yield
    finally:
        select(library, "auto")
