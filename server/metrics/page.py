"""What one scrape shows: values by family, copied on the loop thread at one moment, and made into text by any other.

Text is written here and not by prometheus-client: everything but the numbers is the same at every scrape, so it is kept
in front of them. 1,000 lines take 1 ms instead of 30.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from server.histogram import Histogram
from server.metrics.families import FAMILIES, MODEL, PREFIX, Family

Labels = tuple[str, ...]
Rows = Sequence[tuple[Labels, Any]]
"""Label values in the order of the family's labels, and a number or a Histogram."""


class Series:
    """What stands before the numbers of every series that was shown, by family and labels. Any thread: two that meet
    make the same."""

    def __init__(self, common: Mapping[str, str]) -> None:
        """`common`: labels in front of all others, of families that are `of_model`."""
        self._common = dict(common)
        self._heads: dict[tuple[str, Labels], list[str]] = {}

    def write(self, name: str, family: Family, rows: Rows, edges: Sequence[float]) -> str:
        """`family` under this name, with help and type. `edges`: of its buckets."""
        lines = [f"# HELP {name} {_escaped(family.help)}\n# TYPE {name} {family.kind}\n"]
        for labels, value in rows:
            heads = self._heads.get((name, labels))
            if heads is None:
                heads = self._heads[name, labels] = self._make(name, family, labels, edges)
            if isinstance(value, Histogram):
                counts = at_most(value, edges)
                lines += [f"{head}{count}.0\n" for head, count in zip(heads, counts, strict=False)]
                lines += (f"{heads[-2]}{counts[-1]}.0\n", f"{heads[-1]}{float(value.total)!r}\n")
            else:
                lines.append(f"{heads[0]}{float(value)!r}\n")
        return "".join(lines)

    def _make(self, name: str, family: Family, labels: Labels, edges: Sequence[float]) -> list[str]:
        pairs = (*(self._common.items() if family.of_model else ()), *zip(family.labels, labels, strict=True))
        shown = [f'{label}="{_escaped(value, quoted=True)}"' for label, value in sorted(pairs)]
        if family.kind != "histogram":
            return [f"{name}{_braces(shown)} "]
        ends = [*map(repr, map(float, edges)), "+Inf"]
        heads = [f"{name}_bucket{_braces([*shown, _le(end)])} " for end in ends]
        return [*heads, f"{name}_count{_braces(shown)} ", f"{name}_sum{_braces(shown)} "]


def _le(edge: str) -> str:
    return f'le="{edge}"'


def _braces(shown: Sequence[str]) -> str:
    return f"{{{','.join(shown)}}}" if shown else ""


def _escaped(text: str, *, quoted: bool = False) -> str:
    text = text.replace("\\", "\\\\").replace("\n", "\\n")
    return text.replace('"', '\\"') if quoted else text


def at_most(histogram: Histogram, edges: Sequence[float]) -> list[int]:
    """How many values are at most each of `edges`, all of which are bounds of the histogram; and how many there are."""
    counts = list(accumulate(histogram.counts))
    bounds = histogram.bounds
    if len(edges) == len(bounds):
        return counts
    return [counts[bisect_left(bounds, edge)] for edge in edges] + [counts[-1]]


def merged(histograms: Iterable[Histogram]) -> Histogram:
    """All values of some histograms with the same bounds."""
    first, *others = histograms
    whole = first.copy()
    for other in others:
        assert other.bounds == whole.bounds, "histograms of other bounds are not added up"
        whole.counts = [a + b for a, b in zip(whole.counts, other.counts, strict=True)]
        whole.total += other.total
    return whole


class Page:
    """One moment. `put` on the loop thread; what may take a system call is `put_later`, and asked for by `finish`."""

    def __init__(self) -> None:
        self._rows: dict[str, list[tuple[Labels, Any]]] = {}
        self._later: list[tuple[str, Callable[[], float | None]]] = []

    def put(self, name: str, value: float | Histogram, *labels: str) -> None:
        """One child of a family of FAMILIES. Histograms are copied."""
        shown = value.copy() if isinstance(value, Histogram) else value
        self._rows.setdefault(name, []).append((labels, shown))

    def put_all(self, name: str, values: Mapping[str, float | Histogram], *labels: str) -> None:
        """Children that differ in the last label."""
        for label, value in values.items():
            self.put(name, value, *labels, label)

    def put_later(self, name: str, value: Callable[[], float | None]) -> None:
        """The only child of a family, or no family if that gives None."""
        self._later.append((name, value))

    def rows(self, name: str) -> Rows:
        """Of a family; empty where it is not shown."""
        return self._rows.get(name, ())

    def value(self, name: str, *labels: str) -> Any:
        """Of one child; 0 where it is not there."""
        return next((value for found, value in self.rows(name) if found == labels), 0)

    def sum(self, name: str) -> float:
        """Of all children of a family of numbers."""
        return sum(value for _, value in self.rows(name))

    def text(self, series: Series, edges: Mapping[str, Sequence[float]]) -> str:
        """All families in the order of FAMILIES. Any thread, once."""
        for name, value in self._later:
            found = value()
            if found is not None:
                self.put(name, found)
        return "".join(
            series.write(PREFIX + name, family, self._rows[name], edges.get(family.buckets, ()))
            for name, family in FAMILIES.items()
            if name in self._rows
        )


def series_of(model_name: str, **more: str) -> Series:
    """Series that carry the model's name, and `more`."""
    return Series({MODEL: model_name} | more)
