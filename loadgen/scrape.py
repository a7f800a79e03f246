"""What the server counted during a run: its Prometheus metrics before and after.

Any server with a /metrics page will do; of Terrace's names a summary is made: hits by tier, bytes moved, stalls, SSD.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

Sample = tuple[str, tuple[tuple[str, str], ...]]
Scrape = dict[Sample, float]

REMARKED_BLOCKS = 8
"""Fewer that were computed although a tier had them are worth no remark: near break-even either is right."""


async def scrape(base_url: str, api_key: str | None = None) -> Scrape | None:
    """All counters, histogram sums and counts of the server, and its gauges; None when it shows no metrics."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    url = base_url.rstrip("/").removesuffix("/v1") + "/metrics"
    try:
        async with httpx.AsyncClient(timeout=10) as http:
            answer = await http.get(url, headers=headers)
            answer.raise_for_status()
        return await asyncio.to_thread(parse, answer.text)
    except (httpx.HTTPError, ValueError):
        return None


def parse(text: str) -> Scrape:
    """ValueError when it is not the exposition format."""
    found: Scrape = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if not sample.name.endswith(("_created", "_bucket")):
                found[sample.name, tuple(sorted(sample.labels.items()))] = float(sample.value)
    return found


def difference(before: Scrape, after: Scrape) -> Scrape:
    """What was added between the two. A counter that fell was restarted: it counts from zero."""
    return {
        key: value - before.get(key, 0.0) if value >= before.get(key, 0.0) else value
        for key, value in after.items()
        if key[0].endswith(("_total", "_sum", "_count"))
    }


def total(scrape: Mapping[Sample, float], name: str, **labels: str) -> float:
    """The sum of `name` over all its children with these labels."""
    return sum(value for (found, has), value in scrape.items() if found == name and labels.items() <= dict(has).items())


def by_label(scrape: Mapping[Sample, float], name: str, *labels: str) -> dict[str, float]:
    """`name` summed by the values of `labels`, joined by ` to ` as in `device to dram`."""
    sums: dict[str, float] = {}
    for (found, has), value in scrape.items():
        if found == name:
            key = " to ".join(dict(has).get(label, "") for label in labels)
            sums[key] = sums.get(key, 0.0) + value
    return sums


def server_section(before: Scrape | None, after: Scrape | None, seconds: float) -> dict[str, Any] | None:
    """Terrace's own summary, and every counter that moved in the `seconds` between the two; None when there was nothing
    to read."""
    if before is None or after is None:
        return None
    moved = difference(before, after)
    section: dict[str, Any] = {
        "counters": {_shown(key): value for key, value in sorted(moved.items()) if value},
    }
    if any(name.startswith("terrace_") for name, _ in after):
        computed = total(moved, "terrace_prompt_tokens_by_source_total", source="computed")
        section |= {
            "seconds": seconds,
            "busy_ratio": total(moved, "terrace_engine_busy_seconds_total") / seconds,
            "tokens_per_s": (computed + total(moved, "terrace_generation_tokens_total")) / seconds,
            "prompt_tokens_by_source": by_label(moved, "terrace_prompt_tokens_by_source_total", "source"),
            "moved_bytes": by_label(moved, "terrace_kv_transfer_bytes_total", "src", "dst"),
            "moved_busy_s": by_label(moved, "terrace_kv_transfer_busy_seconds_total", "src", "dst"),
            "moves_failed": total(moved, "terrace_kv_transfer_failures_total"),
            "ssd_read_bytes": total(moved, "terrace_ssd_read_bytes_total"),
            "ssd_written_bytes": total(moved, "terrace_ssd_written_bytes_total"),
            "declined_blocks": by_label(moved, "terrace_kv_restore_declined_blocks_total", "tier", "reason"),
            "evicted_blocks": by_label(moved, "terrace_kv_evicted_blocks_total", "tier", "reason"),
            "tier_trips": by_label(moved, "terrace_kv_tier_trips_total", "tier"),
            "tiers_down": _down(after),
            "integrity_failures": total(moved, "terrace_kv_integrity_failures_total"),
            "preemptions": total(moved, "terrace_preemptions_total"),
            "rejections": by_label(moved, "terrace_admission_rejections_total", "reason"),
        }
        section["remarks"] = remarks(section)
    return section


def remarks(server: Mapping[str, Any]) -> list[str]:
    """What an operator should be told about the tiers: those that were off, failed, or were too slow to be used."""
    said = [f"the {tier} tier is switched off: it failed or stalled" for tier in server["tiers_down"]]
    said += [f"the {tier} tier was switched off {n:.0f} times" for tier, n in server["tier_trips"].items() if n]
    reasons = {"slower_than_recompute": "it was too slow", "deadline": "it missed its deadline"}
    for key, blocks in server["declined_blocks"].items():
        tier, reason = key.split(" to ", 1)
        if blocks >= REMARKED_BLOCKS:
            why = reasons.get(reason, reason.replace("_", " "))
            said.append(f"{blocks:.0f} blocks that the {tier} tier had were computed all the same: {why}")
    if server["moves_failed"]:
        said.append(f"{server['moves_failed']:.0f} moves between tiers failed")
    if server["integrity_failures"]:
        said.append(f"{server['integrity_failures']:.0f} blocks were refused: their bytes did not verify")
    return said


def _down(after: Mapping[Sample, float]) -> list[str]:
    return [dict(has)["tier"] for (name, has), value in after.items() if name == "terrace_kv_tier_up" and not value]


def _shown(key: Sample) -> str:
    name, labels = key
    inside = ",".join(f'{label}="{value}"' for label, value in _without_model(labels))
    return f"{name}{{{inside}}}" if inside else name


def _without_model(labels: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(label, value) for label, value in labels if label != "model_name"]
