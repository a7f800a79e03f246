"""Three questions and one answer each, by rules that a person can check: is it serving well, is tiering paying, what is
wrong. Plain functions of a moment; the thresholds stand here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf
from typing import Literal

from server.api.status.counters import quantile
from server.api.status.moment import Moment
from server.metrics import Facts
from server.quantities import show_bytes, show_seconds

Level = Literal["good", "watch", "bad", "idle"]

STALLED_SHARE = 0.1
"""Of the last minute: more, and something below the device holds the work up."""
NET_LOSS_S = 0.5
"""That a tier may cost in a minute beyond what it saves: estimates and measurements differ a little."""
NEARLY_FULL_BUDGET = 0.9
DAY_S = 86400


@dataclass(frozen=True, slots=True)
class Verdict:
    """`answer`: a few words. `why`: the numbers behind them, one sentence each."""

    question: str
    level: Level
    answer: str
    why: Sequence[str]


def verdicts(now: Moment, facts: Facts) -> list[Verdict]:
    """In the order in which they are read."""
    return [_serving(now, facts), _tiering(now), _trouble(now, facts)]


def _serving(now: Moment, facts: Facts) -> Verdict:
    question = "Is it serving well?"
    if now.state != "ready":
        level: Level = "bad" if now.state == "failed" else "watch"
        return Verdict(question, level, f"No: {now.state}", ["It takes no new requests."])
    late = list(_late(now, facts, 0.99, "p99"))
    very_late = list(_late(now, facts, 0.5, "the median"))
    refused = sum(now.minute.rejected.values())
    if refused:
        named = ", ".join(f"{name} {count:.0f}" for name, count in now.minute.rejected.items() if count)
        late.append(f"{refused:,.0f} requests were turned away in the last minute ({named}).")
    made = now.recent.per_s(now.recent.generated)
    work = f"{now.running} running, {now.waiting + now.loading} waiting, {made:,.0f} tokens a second."
    if very_late:
        return Verdict(question, "bad", "No", [*very_late, *late, work])
    if late:
        return Verdict(question, "watch", "Not quite", [*late, work])
    ttft_s = quantile(now.minute.ttft_s, 0.99)
    if ttft_s is None:
        busy = now.running + now.loading + now.waiting
        return Verdict(question, "idle", "Busy with long ones" if busy else "Nobody asks anything", [work])
    first = f"99 of 100 first tokens came within {show_seconds(ttft_s)}"
    tpot_s = quantile(now.minute.tpot_s, 0.99)
    if tpot_s is not None:
        first += f", later ones every {show_seconds(tpot_s)}"
    if facts.targets.ttft_s < inf or facts.targets.tpot_s < inf:
        first += "; targets met"
    return Verdict(question, "good", "Yes", [f"{first}.", work])


def _late(now: Moment, facts: Facts, share: float, name: str) -> Iterator[str]:
    for what, found, target_s in (
        ("first token", now.minute.ttft_s, facts.targets.ttft_s),
        ("time per token", now.minute.tpot_s, facts.targets.tpot_s),
    ):
        taken_s = quantile(found, share)
        if taken_s is not None and taken_s > target_s:
            yield f"The {what} takes {show_seconds(taken_s)} ({name}), the target is {show_seconds(target_s)}."


def _tiering(now: Moment) -> Verdict:
    question = "Is tiering paying?"
    lossy = [tier.name for tier in now.tiers if now.minute.net_s(tier.name) < -NET_LOSS_S]
    if lossy:
        why = [f"{name} costs {show_seconds(-now.minute.net_s(name))} a minute more than it saves." for name in lossy]
        return Verdict(question, "watch", "No", why)
    if not sum(now.minute.sources.values()):
        return Verdict(question, "idle", "Nothing to go by", ["No prompt was computed in the last minute."])
    tokens = now.minute.sources
    parts = ", ".join(f"{tier.name} {_percent(tokens.get(tier.name, 0) / sum(tokens.values()))}" for tier in now.tiers)
    if now.from_cache < 0.005:
        return Verdict(question, "idle", "Not now", ["No prompt of the last minute was known already."])
    saved_s = sum(now.minute.net_s(tier.name) for tier in now.tiers)
    why = [
        f"{show_seconds(saved_s)} of computing saved in the last minute.",
        f"{_percent(now.from_cache)} of prompt tokens came from the cache ({parts}).",
    ]
    if len(now.tiers) == 1:
        why.append("There is no tier below the device.")
    return Verdict(question, "good", "Yes", why)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _trouble(now: Moment, facts: Facts) -> Verdict:
    question = "What is wrong?"
    grave, slight = list(_grave(now)), list(_slight(now, facts))
    found = grave + slight
    if not found:
        return Verdict(question, "good", "Nothing", ["No tier is off, nothing failed, nothing stalls."])
    answer = "1 thing" if len(found) == 1 else f"{len(found)} things"
    return Verdict(question, "bad" if grave else "watch", answer, found)


def _grave(now: Moment) -> Iterator[str]:
    if now.state == "failed":
        yield "The engine has failed; only a restart helps."
    for tier in now.tiers:
        if not tier.up:
            yield f"{tier.name} is switched off: it failed or stalled. It is tried again by itself."
    errors = now.minute.finished.get("error", 0)
    if errors:
        yield f"{errors:,.0f} requests ended with an error in the last minute."


def _slight(now: Moment, facts: Facts) -> Iterator[str]:
    if now.faults:
        yield f"{now.faults:,.0f} moves failed or blocks did not verify in the last 15 minutes; all were computed anew."
    stalled_s = sum(now.minute.stalled_s.values())
    if now.minute.per_s(stalled_s) > STALLED_SHARE:
        cause = max(now.minute.stalled_s, key=lambda cause: now.minute.stalled_s[cause])
        yield f"Work stood still for {_percent(now.minute.per_s(stalled_s))} of the last minute ({cause})."
    if now.minute.unwritten:
        yield f"{now.minute.unwritten:,.0f} blocks of the last minute were not written to SSD: beyond the write budget."
    budget = facts.write_bytes_per_day
    if budget and now.today_bytes > NEARLY_FULL_BUDGET * budget:
        yield f"{show_bytes(now.today_bytes)} of the {show_bytes(budget)} a day were written to SSD already."
