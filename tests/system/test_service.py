"""Whose a request is and how urgent, from the HTTP field to the step: the demo model behind its real surface."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

import server.demo
from server.api.app import create_app
from server.api.service import hash_keys
from server.api.tenancy import tenant_of
from server.build import Daemon, service_of
from server.demo.corpus import example
from server.engine import GenerateSpec
from server.tenants import add_key, digest_of
from server.text import Tokenizer
from server.types import SamplingParams, ServiceClass
from tests.system.harness import complete, complete_all, running, settled

FOLDER = Path(server.demo.__file__).parent / "model"
FEW = {"model__dtype": "float32", "kv__device_gib": "64MiB"}
TEXT = {"model": "demo", "prompt": "Mira keeps coins in Lisbon.", "max_tokens": 2}


def documents(count: int) -> list[list[int]]:
    tokenizer = Tokenizer.load(FOLDER)
    texts = [example(seed=i, target_tokens=200 + 50 * i, kind="completion").prompt for i in range(count)]
    return [tokenizer.encode(text) for text in texts]


@asynccontextmanager
async def served(**settings: Any) -> AsyncIterator[tuple[Daemon, httpx.AsyncClient]]:
    """A daemon and a client of its HTTP surface."""
    async with running(**FEW, **settings) as daemon:
        transport = httpx.ASGITransport(create_app(service_of(daemon)))
        async with httpx.AsyncClient(transport=transport, base_url="http://terrace") as http:
            yield daemon, http


async def test_a_flex_request_says_what_it_says_alone() -> None:
    """One that gives its only place to online requests again and again, or computes beside them, answers the same."""
    prompts = documents(5)
    long, short = SamplingParams(max_tokens=120, temperature=0), SamplingParams(max_tokens=8, temperature=0)
    async with running(**FEW, kv__prefix_caching=False) as daemon:
        expected = await complete(daemon, prompts[0], long)
        others = [await complete(daemon, prompt, short) for prompt in prompts[1:]]
    async with running(**FEW, scheduler__max_num_seqs=1) as daemon:
        flex = daemon.engine.submit(GenerateSpec(prompts[0], long, service=ServiceClass(background=True)))
        found: list[int] = []

        async def some(count: int) -> None:
            while len(found) < count:
                found.extend(event.token for event in await anext(flex) if event.token is not None)

        try:
            for turn, prompt in enumerate(prompts[1:], start=1):
                await some(10 * turn)
                assert await complete(daemon, prompt, short) == others[turn - 1]
            await some(120)
        finally:
            flex.close()
        assert flex.request.preemptions == 4
        assert found == expected
    async with running(**FEW, scheduler__background_slack=1.0) as daemon:
        flex = daemon.engine.submit(GenerateSpec(prompts[0], long, service=ServiceClass(background=True)))
        found = []
        assert await complete_all(daemon, prompts[1:], short) == others
        await some(120)
        assert found == expected


async def test_too_late_is_a_429_that_metrics_count() -> None:
    """With refuse_late a target that nobody could meet is refused at once, in OpenAI's shape, and counted by reason."""
    async with served(scheduler__refuse_late=True) as (daemon, http):
        assert (await http.post("/v1/completions", json=TEXT)).status_code == 200  # now it knows what a step takes
        answer = await http.post("/v1/completions", json=TEXT | {"ttft_target_ms": 0.000001})
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        error = answer.json()["error"]
        assert (error["type"], error["code"], error["param"]) == ("rate_limit_error", "too_late", None)
        assert daemon.engine.scheduler.idle
        assert (await http.post("/v1/completions", json=TEXT | {"ttft_target_ms": 3_600_000})).status_code == 200
        counted = 'terrace_admission_rejections_total{model_name="demo",reason="too_late"} 1.0'
        assert counted in (await http.get("/metrics")).text


async def test_a_default_target_is_for_online_requests() -> None:
    """ttft_target_ms of the configuration holds for who names none, and not for the background, which has time."""
    async with served(scheduler__refuse_late=True, scheduler__ttft_target_ms=0.000001) as (_, http):
        assert (await http.post("/v1/completions", json=TEXT)).status_code == 200
        assert (await http.post("/v1/completions", json=TEXT)).status_code == 429
        assert (await http.post("/v1/completions", json=TEXT | {"service_tier": "flex"})).status_code == 200


async def test_the_weight_of_a_key_reaches_the_policy() -> None:
    """KEY WEIGHT: the client presents KEY alone, and its tenant weighs WEIGHT where the scheduler shares."""
    settings = {"scheduler__policy": "fair", "server__api_keys": "light,heavy 3"}
    async with served(**settings) as (daemon, http):
        light, heavy = (tenant_of(digest) for digest in hash_keys(["light", "heavy"]))
        policy = daemon.engine.scheduler.policy
        assert policy.weights == {light: 1.0, heavy: 3.0}
        for key, status in (("light", 200), ("heavy", 200), ("heavy 3", 401)):
            answer = await http.post("/v1/completions", json=TEXT, headers={"authorization": f"Bearer {key}"})
            assert answer.status_code == status


async def test_a_rotated_key_and_a_restart_leave_the_cache_warm(tmp_path: Path) -> None:
    """Salt and floors are the tenant's: with another key, in another process, its blocks on SSD are found and are its
    own; another tenant finds nothing."""
    file = tmp_path / "tenants.toml"
    alice, mallory = (add_key(file, name, {}) for name in ("alice", "mallory"))
    settings = {
        "kv__dram_gib": "4MiB", "kv__ssd_gib": "64MiB", "kv__ssd_path": str(tmp_path / "kv"), "kv__ssd_min_free_gib": 0,
        "server__tenants_file": str(file), "server__admin_keys": "boss",
    }  # fmt: skip
    body = {"model": "demo", "prompt": "Mira keeps coins in Lisbon. " * 12, "max_tokens": 1}

    async def found(http: httpx.AsyncClient, **whose: str) -> int:
        asked = {"prompt": body["prompt"]} | whose
        answer = await http.post("/v1/cache/lookup", json=asked, headers={"authorization": "Bearer boss"})
        return int(answer.json()["cached_tokens"])

    async with served(**settings) as (daemon, http):
        assert (await http.post("/v1/completions", json=body, headers={"authorization": f"Bearer {alice}"})).is_success
        await settled(daemon)
        before = daemon.engine.snapshot().kv.owned
    newer = add_key(file, "alice", {})
    file.write_text(file.read_text().replace(f', "sha256:{digest_of(alice).hex()}"', ""))
    with file.open("a") as more:
        more.write("cache.ssd.floor = 0.1\n")  # in the table of the last tenant, mallory
    async with served(**settings) as (daemon, http):
        (after, others) = (
            daemon.engine.snapshot().kv.owned[daemon.tenants.id_of(name)] for name in ("alice", "mallory")
        )
        assert after["ssd"] == before[daemon.tenants.id_of("alice")]["ssd"] > 0
        assert set(others.values()) == {0}
        assert await found(http, api_key=newer) == await found(http, tenant="alice") == after["ssd"] * 16
        assert await found(http, tenant="mallory") == 0
        for key, status in ((newer, 200), (alice, 401), (mallory, 200)):
            answer = await http.post("/v1/completions", json=body, headers={"authorization": f"Bearer {key}"})
            assert answer.status_code == status
            if key == mallory:
                assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
