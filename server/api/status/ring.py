"""The last quarter of an hour as columns of plain numbers. Loop thread, but for what `columns` returned."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from math import nan

TIME = "time"


class Ring:
    """The newest `length` points of named columns, 8 bytes a number: NaN where a point had none."""

    def __init__(self, names: Iterable[str], length: int) -> None:
        self._columns = {name: array("d", [nan]) * length for name in (TIME, *names)}
        self._length = length
        self._added = 0

    def add(self, time_s: float, point: Mapping[str, float | None]) -> None:
        """One point of all columns, later than those before."""
        place = self._added % self._length
        self._added += 1
        for name, column in self._columns.items():
            value = time_s if name == TIME else point[name]
            column[place] = nan if value is None else value

    def sum(self, name: str) -> float:
        """Of all that is there."""
        return sum(value for value in self._columns[name] if value == value)

    def last(self) -> dict[str, float | None]:
        """The newest point."""
        place = (self._added - 1) % self._length
        values = {name: column[place] for name, column in self._columns.items()}
        return {name: None if value != value else value for name, value in values.items()}

    def columns(self) -> dict[str, array[float]]:
        """A copy, oldest first."""
        if self._added < self._length:
            return {name: column[: self._added] for name, column in self._columns.items()}
        place = self._added % self._length
        return {name: column[place:] + column[:place] for name, column in self._columns.items()}
