"""`terrace top`: the live page in a terminal, over the same stream. Knows how to ask a daemon and how to print."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from server.errors import TerraceError
from server.quantities import show_bytes, show_seconds

SIGNS = {"good": ("✓", "green"), "watch": ("▲", "yellow"), "bad": ("✕", "red"), "idle": ("–", "dim")}
PATH_STATUS, PATH_STREAM = "/status", "/status/stream"
CONNECT_S, SILENT_S = 5.0, 15.0
"""How long to wait for an answer, and for the next second's numbers."""
BAR_CELLS, SPARK_CELLS = 16, 48
PLAIN_COLUMNS = 140
"""Width of what goes to a file or a pipe."""
SPARKS = "▁▂▃▄▅▆▇█"
SHOWN_REQUESTS, SHOWN_WARNINGS = 12, 5


class Unreachable(TerraceError):
    """The daemon cannot be asked, or says no; `message` says what to do."""


def top(url: str, key: str | None, *, once: bool) -> int:
    """Show the daemon at `url` until interrupted, or `once` as plain text. Raises Unreachable."""
    base = url if "://" in url else f"http://{url}"
    base = base.rstrip("/").removesuffix("/v1").removesuffix("/ui")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    timeout = httpx.Timeout(CONNECT_S, read=SILENT_S)
    try:
        with httpx.Client(base_url=base, headers=headers, timeout=timeout, trust_env=False) as http:
            if once:
                answer = http.get(PATH_STATUS)
                _check(answer, base)
                plain = Console(color_system=None, highlight=False, markup=False)
                if not plain.is_terminal:
                    plain.width = PLAIN_COLUMNS
                plain.print(_view(answer.json(), []))
            else:
                _follow(http, base)
    except httpx.InvalidURL as error:
        raise Unreachable(f"{url!r} is no URL of a daemon: {error}") from error
    except (httpx.HTTPError, json.JSONDecodeError) as error:
        reason = str(error) or type(error).__name__
        raise Unreachable(f"no status from {base} ({reason}); is `terrace serve` running there?") from error
    except KeyboardInterrupt:
        pass
    return 0


def _follow(http: httpx.Client, base: str) -> None:
    with http.stream("GET", PATH_STREAM) as answer:
        if answer.status_code != httpx.codes.OK:
            answer.read()
        _check(answer, base)
        generated: list[float] = []
        status: dict[str, Any] = {}
        with Live(console=Console(highlight=False, markup=False), screen=True, auto_refresh=False) as live:
            for name, data in _events(answer):
                if name == "history":
                    generated = [value or 0.0 for value in data["generated"]]
                elif name == "status":
                    status = data
                    generated = [*generated, data["point"]["generated"] or 0.0][-SPARK_CELLS:]
                else:
                    live.update(_view(status | {"live": data}, generated), refresh=True)
    raise Unreachable(f"the daemon at {base} has stopped")


def _events(answer: httpx.Response) -> Iterator[tuple[str, Any]]:
    name = ""
    for line in answer.iter_lines():
        field, _, value = line.partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            yield name, json.loads(value)


def _check(answer: httpx.Response, base: str) -> None:
    if answer.status_code == httpx.codes.UNAUTHORIZED:
        raise Unreachable(f"{base} wants a key that it knows: set TERRACE_KEY, or pass --key")
    if answer.status_code == httpx.codes.NOT_FOUND:
        raise Unreachable(f"{base} has no {answer.url.path}: it is no Terrace daemon, or an older one")
    if answer.status_code != httpx.codes.OK:
        try:
            reason = answer.json()["error"]["message"]
        except (json.JSONDecodeError, KeyError, TypeError):
            reason = "no reason given"
        raise Unreachable(f"{base} answers {answer.status_code}: {reason}")


# --- what is shown ---------------------------------------------------------------------------------------------------


def _view(status: dict[str, Any], generated: list[float]) -> RenderableType:
    """Everything, in the order of the page."""
    live = status["live"]
    parts: list[RenderableType] = [_head(status), Text(), *map(_verdict, status["verdicts"]), Text(), _work(status)]
    if len(generated) > 1:
        parts.append(Text.assemble(("tokens/s  ", "dim"), _spark(generated)))
    parts += [Text(), _tiers(status)]
    if status["hops"]:
        parts += [Text(), _hops(status)]
    if status["ssd"]:
        parts += [Text(), _ssd(status["ssd"])]
    parts += [Text(), _requests(live)]
    if live["warnings"]:
        parts += [Text(), *map(_warning, live["warnings"][:SHOWN_WARNINGS])]
    return Group(*parts)


def _head(status: dict[str, Any]) -> Text:
    colour = {"ready": "green", "failed": "red"}.get(status["state"], "yellow")
    return Text.assemble(
        ("Terrace ", "bold"), status["model"], "   ", (f"● {status['state']}", colour),
        f"   up {show_seconds(status['uptime_s'])}   version {status['version']}",
    )  # fmt: skip


def _verdict(verdict: dict[str, Any]) -> Text:
    sign, colour = SIGNS[verdict["level"]]
    question, answer = f"{verdict['question']:20} ", f"{sign} {verdict['answer']}"
    return Text.assemble((question, "dim"), (answer, f"bold {colour}"), f"  {' '.join(verdict['why'])}")


def _table(*columns: str, left: int = 1) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place < left else "right", no_wrap=True)
    return table


def _work(status: dict[str, Any]) -> Table:
    table = _table("LAST MINUTE", "P50", "P99", "TARGET", "   RUNNING", "WAITING", "TOKENS/S")
    requests, made = status["requests"], status["tokens"]["generated_per_s"]
    rest = [str(requests["running"]), str(requests["waiting"] + requests["loading"]), f"{made:,.0f}"]
    for name, what in (("ttft", "first token"), ("tpot", "per later token")):
        found = status["latency_last_minute"][name]
        table.add_row(what, *(_seconds(found[column]) for column in ("p50_s", "p99_s", "target_s")), *rest)
        rest = []
    return table


def _tiers(status: dict[str, Any]) -> Table:
    table = _table("TIER", "", "USED", "OF", "BLOCKS", "PROMPTS", "SAVED", left=2)
    tokens = status["tokens"]["prompt_last_minute"]
    for tier in status["tiers"]:
        share = tier["used_bytes"] / tier["capacity_bytes"]
        bar = "█" * round(share * BAR_CELLS)
        shown = Text(f"{bar:░<{BAR_CELLS}}") if tier["up"] else Text(f"{'off':{BAR_CELLS}}", "red")
        table.add_row(
            tier["name"],
            shown,
            show_bytes(tier["used_bytes"]),
            show_bytes(tier["capacity_bytes"]),
            f"{tier['used_blocks']:,.0f}",
            _of(tokens.get(tier["name"], 0), tokens),
            _seconds(tier["saved_last_minute_s"] - tier["cost_last_minute_s"]),
        )
    table.add_row("computed", "", "", "", "", _of(tokens.get("computed", 0), tokens), "")
    return table


def _hops(status: dict[str, Any]) -> Table:
    table = _table("HOP", "PER SECOND", "BLOCKS IN FLIGHT", "WAITING")
    for hop in status["hops"]:
        way = f"{hop['source']} → {hop['target']}"
        moved, waiting = show_bytes(hop["bytes_per_s"]), show_bytes(hop["waiting_bytes"])
        table.add_row(way, moved, f"{hop['in_flight_blocks']:.0f}", waiting)
    return table


def _ssd(ssd: dict[str, Any]) -> Text:
    budget = ssd["budget_bytes_per_day"]
    limit = f"of {show_bytes(budget)} a day" if budget else "today, no budget set"
    written, now = show_bytes(ssd["written_today_bytes"]), show_bytes(ssd["written_bytes_per_s"])
    return Text(f"SSD: {written} written {limit}, {now}/s now")


def _requests(live: dict[str, Any]) -> RenderableType:
    if live["sees"] == "none":
        return Text("Requests: only an admin key shows them.", "dim")
    if not live["requests"]:
        return Text("No requests now.", "dim")
    table = _table("REQUEST", "TENANT", "PHASE", "AGE", "PROMPT", "FROM CACHE", "GENERATED", left=3)
    for one in live["requests"][:SHOWN_REQUESTS]:
        cached = [f"{tier} {count:,}" for tier, count in one["cached_tokens_by_tier"].items() if count]
        table.add_row(
            one["id"], one.get("tenant") or "", one["phase"], _seconds(one["age_s"]), f"{one['prompt_tokens']:,}",
            ", ".join(cached) or "0", f"{one['generated_tokens']:,}",
        )  # fmt: skip
    more = live["count"] - min(len(live["requests"]), SHOWN_REQUESTS)
    return Group(table, Text(f"and {more} more", "dim")) if more else table


def _warning(entry: dict[str, Any]) -> Text:
    times = f" ({entry['count']} times)" if entry["count"] > 1 else ""
    message = "".join(letter if letter.isprintable() else "?" for letter in entry["message"])
    return Text.assemble((f"{entry['level']}: ", "yellow"), message + times)


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    return show_seconds(value) if value >= 0 else f"−{show_seconds(-value)}"


def _of(part: float, whole: dict[str, float]) -> str:
    total = sum(whole.values())
    return f"{100 * part / total:.0f} %" if total else "–"


def _spark(values: list[float]) -> Text:
    most = max(values) or 1.0
    line = "".join(SPARKS[min(len(SPARKS) - 1, int(value / most * len(SPARKS)))] for value in values)
    return Text.assemble((line, "cyan"), f"  {values[-1]:,.0f}, at most {most:,.0f}")
