"""What a daemon with all tiers shows: numbers of real work that agree with each other and with what clients saw."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from server.bench.placing import prefer_loading
from server.build import Daemon
from server.engine import GenerateSpec
from server.kvcache.tiers.drive import drive_written_bytes
from server.metrics.families import FAMILIES, PREFIX
from server.metrics.page import Page
from server.sim.numbers import contradictions
from server.types import DEVICE, DRAM, SSD, SamplingParams, ServiceClass, Targets
from tests.system.harness import complete, complete_all, running, settled
from tests.system.test_tiers import BLOCK_TOKENS, DEMO, GREEDY, SMALL, on_ssd

EASY, HARD = Targets(600.0, 600.0), Targets(1e-9, 600.0)


async def ask(daemon: Daemon, prompt: list[int], targets: Targets, *, background: bool = False) -> None:
    service = ServiceClass(targets=targets, background=background)
    stream = daemon.engine.submit(GenerateSpec(prompt, GREEDY, service=service))
    async for _ in stream:
        pass
    stream.close()


def hits(page: Page) -> dict[str, float]:
    return {tier: value for (tier,), value in page.rows("kv_hit_tokens_total")}


async def test_numbers_of_three_tiers_agree(tmp_path: Path, prompts: list[list[int]]) -> None:
    """Cold, from DRAM and SSD, all at once, with targets, in the background and aborted: every sum holds, each tier's
    hits are those that the requests had, and what the tiers spared and cost is there."""
    served: Counter[str] = Counter()
    settings = on_ssd(tmp_path, kv__device_gib=SMALL, kv__dram_gib=SMALL, kv__ssd_write_gib_per_day=100)
    async with running(**settings) as daemon:
        prefer_loading(daemon)
        for _ in range(2):
            for prompt in prompts:
                await complete(daemon, prompt, GREEDY, served=served)
                await settled(daemon)
        page = daemon.metrics.page()
        assert hits(page) == {tier: served[tier] * BLOCK_TOKENS for tier in (DEVICE, DRAM, SSD)}
        assert served[SSD] > 20
        assert page.value("kv_recompute_avoided_seconds_total", SSD) > 0
        assert page.value("kv_restore_cost_seconds_total", SSD) > 0
        assert sum(page.value("kv_restore_seconds", SSD).counts) > 0
        assert sum(page.value("ssd_io_seconds", "read").counts) > 0

        await complete_all(daemon, prompts, GREEDY)
        await ask(daemon, prompts[0], EASY)
        await ask(daemon, prompts[1], HARD)
        await ask(daemon, prompts[2], HARD, background=True)
        gone = daemon.engine.submit(GenerateSpec(prompts[3], GREEDY, service=ServiceClass(targets=EASY)))
        await asyncio.sleep(0)
        gone.close()
        await settled(daemon)
        page = daemon.metrics.page()
        assert contradictions(page, targeted=3) == []
        found_slo = {labels: value for labels, value in page.rows("slo_requests_total") if labels[0] == "all"}
        assert found_slo == {("all", "good"): 2, ("all", "bad"): 1}
        assert page.value("ssd_write_budget_bytes_per_day") == 100 * 2**30


async def test_a_warm_start_is_shown(tmp_path: Path, prompts: list[list[int]]) -> None:
    """After a restart: blocks recovered, how long each part of the start took, what is served and what runs."""
    settings = on_ssd(tmp_path)
    async with running(**settings) as daemon:
        for prompt in prompts[:2]:
            await complete(daemon, prompt, GREEDY)
        await settled(daemon)
    async with running(**settings) as daemon:
        page = daemon.metrics.page()
        assert page.value("kv_recovered_blocks_total", SSD) >= 10
        assert page.value("kv_recovery_seconds", SSD) > 0
        phases = {phase: seconds for (phase,), seconds in page.rows("startup_phase_seconds")}
        assert all(seconds > 0 for seconds in phases.values()), phases
        [(model, _)] = page.rows("model_info")
        assert model[0] == "float32"
        assert int(model[1]) > 100_000
        weights, kv = (page.value("device_memory_bytes", kind) for kind in ("weights", "kv"))
        assert 1 <= weights / (4 * int(model[1])) < 1.02  # packed weights are filled up to whole panels
        assert kv == page.value("kv_capacity_bytes", DEVICE)


async def test_prompts_that_may_not_be_served_are_not_looked_up(prompts: list[list[int]]) -> None:
    """Scored prompts are computed whatever is cached: they are no misses. Nor is anything without prefix caching."""
    scored = SamplingParams(max_tokens=2, temperature=0, prompt_logprobs=0)
    async with running(**DEMO) as daemon:
        await complete(daemon, prompts[0], scored)
        page = daemon.metrics.page()
        assert page.value("prompt_tokens_total") == len(prompts[0])
        assert page.value("kv_lookup_tokens_total") == 0
    async with running(**DEMO, kv__prefix_caching=False) as daemon:
        await complete(daemon, prompts[0], GREEDY)
        assert daemon.metrics.page().value("kv_lookup_tokens_total") == 0


async def test_the_text_is_what_prometheus_reads(tmp_path: Path, prompts: list[list[int]]) -> None:
    """A real daemon's pages parse, name no family that is not declared, and count generated tokens as they come."""
    async with running(**on_ssd(tmp_path)) as daemon:
        stream = daemon.engine.submit(GenerateSpec(prompts[0], GREEDY))
        await anext(stream)
        assert daemon.metrics.page().value("generation_tokens_total") >= 1
        assert daemon.metrics.page().value("requests_running") == 1
        stream.close()
        names = set()
        for family in text_string_to_metric_families(daemon.metrics.render().decode()):
            if family.name.startswith(PREFIX):
                names.add(family.name.removeprefix(PREFIX) + "_total" * (family.type == "counter"))
        assert names <= FAMILIES.keys()
        assert names >= {"kv_ghost_hit_tokens_total", "ssd_io_seconds", "kv_prefetch_blocks_total"}
        absent = FAMILIES.keys() - names
        optional = ("tenant_", "batch", "recorded", "http_", "ssd_device_written")
        assert [name for name in absent if not name.startswith(optional)] == []


def test_what_the_drive_wrote(tmp_path: Path) -> None:
    """Sectors written by anybody, of the whole drive where the directory is on a partition; None where nothing is
    known."""
    number = tmp_path.stat().st_dev
    drive = tmp_path / "sys" / "devices" / "nvme0n1"
    part = drive / "nvme0n1p1"
    part.mkdir(parents=True)
    (part / "partition").write_text("1\n")
    (part / "stat").write_text("1 2 3 4 5 6 7 8 9 10 11\n")
    (drive / "stat").write_text("   10 0 20 0 30 0 4000 0 0 0 0\n")
    links = tmp_path / "sys" / "dev" / "block"
    links.mkdir(parents=True)
    assert drive_written_bytes(tmp_path, tmp_path / "sys") is None
    (links / f"{os.major(number)}:{os.minor(number)}").symlink_to(part)
    assert drive_written_bytes(tmp_path, tmp_path / "sys") == 4000 * 512
    (drive / "stat").write_text("odd\n")
    assert drive_written_bytes(tmp_path, tmp_path / "sys") is None


async def test_a_contradiction_is_found(prompts: list[list[int]]) -> None:
    """A page whose sums do not hold, or that counts backwards, is told; a good one is not."""
    async with running(**DEMO) as daemon:
        await complete(daemon, prompts[0], GREEDY)
        page = daemon.metrics.page()
    assert contradictions(page, targeted=0) == []
    assert contradictions(page, targeted=1) == ["good and bad are those with a target"]
    page.put("kv_miss_tokens_total", -1, "late")
    assert contradictions(page, targeted=0) == [
        "hits and misses are what was looked up",
        "kv_miss_tokens_total('late',) is -1",
    ]
