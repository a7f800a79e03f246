"""What a simulation says: the columns of its tables, for the terminal and for the page, and the answer in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from loadgen.report import number
from server.sim.stalls import CAUSES

Row = Mapping[str, Any]

LOAD = ("load", "speedup")
"""Names that change what is asked of the daemon, not the daemon: rows that differ in them are not compared."""
WORTH = 0.98
"""A step that leaves more than so much of the mean TTFT is not called better."""
SECONDS_FROM_MS = 10_000
"""Times are shown in seconds where the longest is at least so long."""


class Column(NamedTuple):
    """Of a table: two lines of heading, and the text of a row's cell."""

    group: str
    name: str
    cell: Callable[[Row], str]


def columns(document: Mapping[str, Any]) -> list[Column]:
    """A row per combination; what would be empty in all rows is left out."""
    rows: Sequence[Row] = document["rows"]
    found = [*_names(document), Column("hits %", "all", _share("hit"))]
    tiers = [tier for tier in ("device", "dram", "ssd") if any(row["blocks"][tier] for row in rows)]
    found += [Column("", tier, _share("hit_by_tier", tier)) for tier in tiers]
    found += [Column("", name, _share("limits", name)) for name in ("optimal", "infinite")]
    unit, scale = time_unit(rows)
    found.append(Column(f"TTFT {unit}", "mean", _number("mean_ttft_ms", scale)))
    found += [Column("", name, _number(f"{name}_ttft_ms", scale)) for name in ("p50", "p99")]
    found.append(Column("TPOT", "p99 ms", _number("p99_tpot_ms")))
    if document["options"]["slo_ms"]:
        found += [Column("SLO", "met %", _share("met")), Column("good", "req/s", _number("goodput"))]
    if "ssd" in tiers:
        found.append(Column("written", "SSD GB", _number("ssd_written_bytes", 1e-9)))
    found.append(Column("device", "busy %", _share("device_busy")))
    if any(row["background"]["requests"] for row in rows):
        found.append(Column("background", "tok/s", lambda row: number(row["background"]["tokens_per_s"])))
    if any(row["refused"] for row in rows):
        found.append(Column("", "refused", lambda row: str(row["refused"])))
    return found


def stall_columns(document: Mapping[str, Any]) -> list[Column]:
    """Where the time to the first token went, a row per combination."""
    unit, scale = time_unit(document["rows"])
    found = [*_names(document), Column("TTFT", f"mean {unit}", _number("mean_ttft_ms", scale))]
    first, *others = CAUSES
    found.append(Column("of which, %", first, _stall(first)))
    found += [Column("", cause, _stall(cause)) for cause in others]
    found.append(Column("device idle", "for loads %", _share("device_idle_loading")))
    return found


def stall_share(row: Row, cause: str) -> float:
    """Of the time to the first token, all requests together."""
    return float(row["stalls_s"][cause] / (sum(row["stalls_s"].values()) or 1.0))


def named(row: Row, names: Sequence[str]) -> str:
    """`dram=512GiB, ssd=4TB`."""
    return ", ".join(f"{name}={_typed(row[name])}" for name in names)


def percent(share: float) -> str:
    """`12.3`, without the sign."""
    return f"{share * 100:.1f}"


def _names(document: Mapping[str, Any]) -> list[Column]:
    return [Column("", name, partial(_name, name)) for name in document["swept"]]


def _name(name: str, row: Row) -> str:
    return _typed(row[name])


def _typed(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _share(*path: str) -> Callable[[Row], str]:
    """The cell of a share, which is found under these keys."""

    def cell(row: Row) -> str:
        value: Any = row
        for key in path:
            value = value[key]
        return percent(value)

    return cell


def _number(key: str, scale: float = 1.0) -> Callable[[Row], str]:
    return lambda row: "0" if row[key] == 0 else number(None if row[key] is None else row[key] * scale)


def _stall(cause: str) -> Callable[[Row], str]:
    return lambda row: percent(stall_share(row, cause))


def time_unit(rows: Sequence[Row]) -> tuple[str, float]:
    """In which times to first token are shown, and how many of it are a millisecond."""
    longest = max((row["p99_ttft_ms"] for row in rows if row["p99_ttft_ms"] is not None), default=0.0)
    return ("s", 1e-3) if longest >= SECONDS_FROM_MS else ("ms", 1.0)


# --- in words --------------------------------------------------------------------------------------------------------


def findings(rows: Sequence[Row], swept: Sequence[str]) -> list[str]:
    """What the steps up from the first combination buy, the best one first; for each load apart."""
    said: list[str] = []
    loads = [name for name in swept if name in LOAD]
    names = [name for name in swept if name not in LOAD]
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in loads), []).append(row)
    for group in groups.values():
        said += _compared(group, names, f"At {named(group[0], loads)}, from" if loads else "From")
    return said


def _compared(rows: Sequence[Row], names: Sequence[str], start: str) -> list[str]:
    """Sentences about rows that are asked the same. A step differs from the first row in one name."""
    base = rows[0]
    served = [row for row in rows[1:] if row["mean_ttft_ms"] is not None]
    if base["mean_ttft_ms"] is None or not served:
        return []
    served.sort(key=lambda row: row["mean_ttft_ms"])
    changed = {id(row): [name for name in names if row[name] != base[name]] for row in served}
    steps = [row for row in served if len(changed[id(row)]) == 1]
    told = {id(row): f"{_step(row, base, changed[id(row)])}." for row in served}
    start = f"{start} {named(base, names)}"
    if not steps or steps[0]["mean_ttft_ms"] > WORTH * base["mean_ttft_ms"]:
        said = [f"{start} no single step shortens the mean TTFT by {1 - WORTH:.0%} or more."]
        said += [told[id(row)] for row in steps]
    else:
        said = [f"{start} the best single step is {told[id(steps[0])]}", *(told[id(row)] for row in steps[1:])]
    nearest = steps[0]["mean_ttft_ms"] if steps else base["mean_ttft_ms"]
    if len(changed[id(served[0])]) > 1 and served[0]["mean_ttft_ms"] <= WORTH * nearest:
        said.append(f"The best of all is {told[id(served[0])]}")
    return said


def _step(row: Row, base: Row, names: Sequence[str]) -> str:
    """`dram=512GiB: mean TTFT 0.61 x (7.4 s instead of 12.1 s), p99 0.70 x, 1.9 x the hits (...), ...`."""
    ratio, tail = (row[key] / base[key] for key in ("mean_ttft_ms", "p99_ttft_ms"))
    times = f"{_time(row['mean_ttft_ms'])} instead of {_time(base['mean_ttft_ms'])}"
    parts = [f"mean TTFT {ratio:.2f} x ({times}), p99 {tail:.2f} x"]
    now, before = percent(row["hit"]), percent(base["hit"])
    if now == before:
        parts.append(f"as many hits ({now} %)")
    else:
        factor = f"{row['hit'] / base['hit']:.2g} x the hits" if base["hit"] else "hits"
        parts.append(f"{factor} ({now} % instead of {before} %)")
    if row["met"] != base["met"]:
        parts.append(f"SLO met by {percent(row['met'])} % instead of {percent(base['met'])} %")
    written = (row["ssd_written_bytes"] - base["ssd_written_bytes"]) / 1e9
    if abs(written) >= 1:
        parts.append(f"{number(abs(written))} GB {'more' if written > 0 else 'less'} written to SSD")
    if row["refused"] != base["refused"]:
        parts.append(f"{row['refused']} refused instead of {base['refused']}")
    return f"{named(row, names)}: " + ", ".join(parts)


def _time(ms: float) -> str:
    return f"{number(ms / 1e3)} s" if ms >= 1e3 else f"{number(ms)} ms"


def remarks(document: Mapping[str, Any]) -> list[str]:
    """What must be known to read the tables."""
    said = ["Hits are shares of the prompt tokens that were served. Optimal: what a single cache as large as all tiers "
            "together finds on this trace if it knows the future; infinite: one that forgets nothing."]  # fmt: skip
    reasons = {reason for row in document["rows"] for reason in row["refused_because"]}
    if reasons:
        said.append(f"Refused: {', '.join(sorted(reasons))}.")
    if document["left_out"]:
        said.append(f"Left out: {'; '.join(document['left_out'])}: blocks go to SSD by way of DRAM.")
    rates = {number(row["capacity_requests_per_s"]) for row in document["rows"] if row["capacity_requests_per_s"]}
    if rates:
        said.append(f"Load 1 is {' or '.join(sorted(rates, key=float))} requests/s.")
    return said


# --- the terminal ----------------------------------------------------------------------------------------------------


def show(document: Mapping[str, Any], console: Console) -> None:
    """Both tables, and the answer."""
    trace = document["trace"]
    counts = f"{trace['requests']:,} requests, {trace['prompt_tokens'] / 1e6:,.1f} M prompt tokens"
    blocks = f"{trace['distinct_blocks']:,} distinct blocks of {trace['block_tokens']} tokens"
    console.print(f"{trace['name']}: {counts}, {blocks}")
    for chosen in (columns(document), stall_columns(document)):
        console.print()
        console.print(_table(chosen, document["rows"]))
    console.print()
    for sentence in (*document["findings"], *remarks(document)):
        console.print(sentence)


def _table(chosen: Sequence[Column], rows: Sequence[Row]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for column in chosen:
        table.add_column(f"{column.group}\n{column.name}", justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(column.cell(row) for column in chosen))
    return table
