"""Promise 1, never wrong: which tier a block came from never shows in what a request says.

The production daemon but for its sockets, over real files. Every test first proves by the count of blocks served that
the tier in question was used; the truth is what each prompt gives alone, computed from nothing.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest

import server.demo
from server.bench.placing import prefer_loading
from server.build import Daemon, build
from server.config import load_config
from server.engine import GenerateSpec
from server.errors import ConfigError
from server.kvcache.tiers.index import RECORD
from server.kvcache.tiers.slots import HEADER_BYTES
from server.kvcache.tiers.ssd import SsdTier
from server.types import DEVICE, DRAM, SSD, SamplingParams
from tests.e2e.daemon import write_model
from tests.numeric.families import make_reference, save
from tests.system.harness import GREEDY, ask, complete, complete_all, running, settled

FOLDER = Path(server.demo.__file__).parent / "model"
SMALL, AMPLE = "3MiB", "24MiB"
"""64 and 512 of the demo model's blocks; the prompts below take about 90."""
DEMO: dict[str, Any] = {"model__dtype": "float32", "kv__device_gib": AMPLE}
BLOCK_TOKENS = 16


def on_ssd(path: Path, **changes: Any) -> dict[str, Any]:
    """The demo model on three tiers, all of them ample but for what `changes` says."""
    tiers = {
        "kv__dram_gib": AMPLE,
        "kv__ssd_gib": "200MiB",
        "kv__ssd_path": path,
        "kv__ssd_min_free_gib": 0,
    }
    return DEMO | tiers | changes


def ssd_of(daemon: Daemon) -> SsdTier:
    tier = daemon.tiers[SSD]
    assert isinstance(tier, SsdTier)
    return tier


async def indexed(daemon: Daemon, rows: int) -> None:
    """Until the files of the index hold at least so many rows: new ones wait in memory for a while."""
    files = [ssd_of(daemon).directory / name for name in ("checkpoint", "journal")]
    for _ in range(10_000):
        if sum(file.stat().st_size for file in files if file.exists()) > rows * RECORD.itemsize:
            return
        await asyncio.sleep(0.002)
    raise AssertionError("the index was not written")


def moved_up(daemon: Daemon) -> int:
    """Blocks that came from DRAM to the device."""
    return sum(h.moved_blocks for h in daemon.engine.snapshot().kv.hops if (h.source, h.target) == (DRAM, DEVICE))


@pytest.fixture(scope="module")
def alone(prompts: list[list[int]]) -> list[list[int]]:
    """What each prompt gives alone, computed from nothing."""

    async def generate() -> list[list[int]]:
        async with running(**DEMO, kv__prefix_caching=False) as daemon:
            return [await complete(daemon, prompt, GREEDY) for prompt in prompts]

    return asyncio.run(generate())


@pytest.fixture(scope="module")
def blocks(prompts: list[list[int]]) -> int:
    """Blocks of all prompts that can be served: all full ones but for the last token's."""
    return sum((len(prompt) - 1) // BLOCK_TOKENS for prompt in prompts)


# --- the four ways to be warm ----------------------------------------------------------------------------------------


async def test_cold_device_warm_and_restarted(
    tmp_path: Path, prompts: list[list[int]], alone: list[list[int]], blocks: int
) -> None:
    """Cold with all tiers on, warm from the device, and warm from SSD after a clean restart: the same answers."""
    async with running(**on_ssd(tmp_path)) as daemon:
        assert await ask(prefer_loading(daemon), prompts) == (alone, Counter())
        assert await ask(daemon, prompts) == (alone, Counter({DEVICE: blocks}))
    async with running(**on_ssd(tmp_path)) as daemon:
        assert await ask(prefer_loading(daemon), prompts) == (alone, Counter({SSD: blocks}))
        assert await ask(daemon, prompts) == (alone, Counter({DEVICE: blocks}))
        assert not ssd_of(daemon).stats.corrupt


async def test_dram_warm(prompts: list[list[int]], alone: list[list[int]]) -> None:
    """What the device had no room for comes back from DRAM: the same answers."""
    async with running(**DEMO | {"kv__device_gib": SMALL, "kv__dram_gib": AMPLE}) as daemon:
        assert await ask(prefer_loading(daemon), prompts) == (alone, Counter())
        await settled(daemon)
        answers, served = await ask(prefer_loading(daemon), prompts)
        assert answers == alone
        assert served[DRAM] > 20
        assert set(served) <= {DEVICE, DRAM}


async def test_ssd_warm(tmp_path: Path, prompts: list[list[int]], alone: list[list[int]]) -> None:
    """What neither device nor DRAM had room for comes back from SSD: the same answers, also asked all at once."""
    async with running(**on_ssd(tmp_path, kv__device_gib=SMALL, kv__dram_gib=SMALL)) as daemon:
        assert await ask(prefer_loading(daemon), prompts) == (alone, Counter())
        await settled(daemon)
        answers, served = await ask(prefer_loading(daemon), prompts)
        assert answers == alone
        assert served[SSD] > 20
        assert await complete_all(daemon, [*prompts, *prompts], GREEDY) == [*alone, *alone]


async def test_warm_without_a_drain(tmp_path: Path, prompts: list[list[int]], alone: list[list[int]]) -> None:
    """A copy of the directory, taken in the middle of a load as a kill would leave it, is warm and says the same."""
    first, left = tmp_path / "first", tmp_path / "left"
    async with running(**on_ssd(first)) as daemon:
        assert (await ask(prefer_loading(daemon), prompts[:4]))[0] == alone[:4]
        await indexed(daemon, rows=20)
        load = asyncio.create_task(complete_all(daemon, prompts[4:], GREEDY))
        await anext(daemon.engine.submit(GenerateSpec(prompts[4], GREEDY)))
        shutil.copytree(first, left)
        assert await load == alone[4:]
    async with running(**on_ssd(left)) as daemon:
        answers, served = await ask(prefer_loading(daemon), prompts)
        assert answers == alone
        assert set(served) == {SSD}
        assert daemon.engine.snapshot().kv.recovered_blocks >= served[SSD] > 0


async def test_preempted_requests_come_back_by_loading(tmp_path: Path, prompts: list[list[int]]) -> None:
    """Requests that lose their blocks in the middle of an answer load them again, and their answers do not change."""
    long = replace(GREEDY, max_tokens=100)
    async with running(**DEMO, kv__prefix_caching=False) as daemon:
        expected = [await complete(daemon, prompt, long) for prompt in prompts]
    tight = on_ssd(tmp_path, kv__device_gib=SMALL, scheduler__max_num_batched_tokens=128, scheduler__max_num_seqs=8)
    async with running(**tight) as daemon:
        assert await complete_all(prefer_loading(daemon), prompts, long) == expected
        assert daemon.engine.scheduler.preemptions > 0
        assert moved_up(daemon) > 0, "no two prompts begin alike: what came up belonged to a preempted request"


async def test_seeded_sampling_warm_and_cold(tmp_path: Path, prompts: list[list[int]]) -> None:
    """Same seed, same output: computed, from DRAM and, after a restart, from SSD."""
    drawn = [SamplingParams(max_tokens=16, temperature=0.8, top_p=0.95, seed=i) for i in range(len(prompts))]
    settings = on_ssd(tmp_path, kv__device_gib=SMALL)

    async def each(daemon: Daemon, served: Counter[str]) -> list[list[int]]:
        pairs = zip(prompts, drawn, strict=True)
        return [await complete(daemon, prompt, params, served=served) for prompt, params in pairs]

    cold: Counter[str] = Counter()
    dram: Counter[str] = Counter()
    ssd: Counter[str] = Counter()
    async with running(**settings) as daemon:
        expected = await each(prefer_loading(daemon), cold)
        await settled(daemon)
        assert await each(daemon, dram) == expected
    async with running(**settings) as daemon:
        assert await each(prefer_loading(daemon), ssd) == expected
    assert (cold.total(), dram[DRAM] > 0, ssd[SSD] > 0) == (0, True, True)


@pytest.mark.parametrize("family", ["llama3.1", "mistral", "qwen2.5"])
async def test_every_family_of_models(tmp_path: Path, family: str) -> None:
    """Random models, windowed attention and scaled RoPE included: cold, from DRAM and from SSD the same answers."""
    settings = {"model__model": str(random_model(family, tmp_path / "model")), "kv__device_gib": "320KiB"}
    tiers = on_ssd(tmp_path / "ssd", **settings, kv__block_size=8, kv__ssd_gib="80MiB")
    rng = Random(1)
    prompts = [[rng.randrange(256) for _ in range(80 + 20 * i)] for i in range(5)]
    async with running(**DEMO | settings, kv__block_size=8, kv__prefix_caching=False) as daemon:
        expected = [await complete(daemon, prompt, GREEDY) for prompt in prompts]
        assert len({tuple(answer) for answer in expected}) > 1, "the model says the same to everything"
    async with running(**tiers) as daemon:
        assert await ask(prefer_loading(daemon), prompts) == (expected, Counter())
        answers, served = await ask(daemon, prompts)
        assert (answers, served[DRAM] > 0) == (expected, True)
    async with running(**tiers) as daemon:
        answers, served = await ask(prefer_loading(daemon), prompts)
        assert (answers, served[SSD] > 0) == (expected, True)


def random_model(family: str, folder: Path) -> Path:
    """A small random model of `family` with one token per byte."""
    write_model(folder)
    save(make_reference(family), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    return folder


# --- what must not be found ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [{"model__seed": 1}, {"model__dtype": "bfloat16"}, {"kv__block_size": 32}, {"kv__kv_dtype": "bfloat16"}],
    ids=lambda change: next(iter(change)),
)
async def test_another_model_in_the_same_directory(
    tmp_path: Path, prompts: list[list[int]], change: dict[str, Any]
) -> None:
    """Other weights, precision or block size find nothing, and leave what is there to whom it belongs."""
    settings = on_ssd(tmp_path, model__load_format="dummy")
    asked = prompts[:3]
    async with running(**settings) as daemon:
        first, served = await ask(prefer_loading(daemon), asked)
        assert not served
    async with running(**settings | change) as daemon:
        assert (await ask(prefer_loading(daemon), asked))[1] == Counter()
    assert len(os.listdir(tmp_path)) == 2
    async with running(**settings) as daemon:
        answers, served = await ask(prefer_loading(daemon), asked)
        assert (answers, served[SSD] > 0) == (first, True)


async def test_a_directory_has_one_owner(tmp_path: Path, prompts: list[list[int]], alone: list[list[int]]) -> None:
    """The second daemon is told which directory is taken and what to do; the first one does not notice."""
    settings = on_ssd(tmp_path)
    async with running(**settings) as daemon:
        assert (await ask(prefer_loading(daemon), prompts[:2]))[0] == alone[:2]
        with pytest.raises(ConfigError, match="--ssd-path") as refused:
            build(load_config({name.replace("__", "."): value for name, value in settings.items()}, environ={}))
        assert str(tmp_path) in refused.value.message
        assert (await ask(daemon, prompts[:2]))[0] == alone[:2]
    async with running(**settings) as daemon:
        assert (await ask(prefer_loading(daemon), prompts[:2]))[1][SSD] > 0


async def test_without_prefix_caching(tmp_path: Path, prompts: list[list[int]], alone: list[list[int]]) -> None:
    """Switched off, nothing is served from any tier: neither the request before nor what an earlier daemon left."""
    async with running(**on_ssd(tmp_path)) as daemon:
        await ask(prefer_loading(daemon), prompts[:2])
    off = on_ssd(tmp_path, kv__prefix_caching=False)
    for _ in range(2):
        async with running(**off) as daemon:
            assert await ask(prefer_loading(daemon), prompts[:4] * 2) == (alone[:4] * 2, Counter())
    async with running(**on_ssd(tmp_path)) as daemon:
        answers, served = await ask(prefer_loading(daemon), prompts[:4])
        assert (answers, set(served)) == (alone[:4], {SSD})
        assert served[SSD] == sum((len(prompt) - 1) // BLOCK_TOKENS for prompt in prompts[:2])


async def test_the_endurance_budget_holds(tmp_path: Path, prompts: list[list[int]], alone: list[list[int]]) -> None:
    """With 100 kB a day next to nothing is written, not at the drain either, and the answers are right."""
    settings = on_ssd(tmp_path, kv__ssd_write_gib_per_day=0.0001, kv__device_gib=SMALL)
    for _ in range(2):
        async with running(**settings) as daemon:
            for _ in range(2):
                assert (await ask(prefer_loading(daemon), prompts))[0] == alone
        assert ssd_of(daemon).stats.bytes_written <= 0.0001 * 2**30
        assert daemon.engine.snapshot().kv.admissions[SSD]["reject_wear"] > 0


# --- damage ----------------------------------------------------------------------------------------------------------


def flip(offset: int) -> Callable[..., None]:
    """Changes the byte at `offset` of every slot."""

    def damage(path: Path, slot_bytes: int) -> None:
        data = bytearray(path.read_bytes())
        for start in range(0, len(data), slot_bytes):
            data[start + offset] ^= 0x10
        path.write_bytes(data)

    return damage


def misdirect(path: Path, slot_bytes: int) -> None:
    """Every slot holds what belongs into the next one."""
    data = path.read_bytes()
    path.write_bytes(data[slot_bytes:] + data[:slot_bytes])


def truncate(path: Path, slot_bytes: int) -> None:
    """Only half of the first slot is left."""
    path.write_bytes(path.read_bytes()[: slot_bytes // 2])


def damage_all(root: Path, damage: Callable[[Path], None]) -> None:
    files = list(root.glob("*/segment-*"))
    assert files, "nothing was written"
    for path in files:
        damage(path)


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (flip(HEADER_BYTES + 4321), "payload"),
        (flip(50), "header"),
        (misdirect, "stale"),
        (truncate, None),
    ],
    ids=["payload", "header", "misdirected", "truncated"],
)
async def test_damaged_files(
    tmp_path: Path,
    prompts: list[list[int]],
    alone: list[list[int]],
    damage: Callable[..., None],
    kind: str | None,
) -> None:
    """With every slot on disk damaged nothing is served from there, every refusal is counted, the answers are right,
    and what is computed instead is stored and found again."""
    async with running(**on_ssd(tmp_path)) as daemon:
        await ask(prefer_loading(daemon), prompts[:3])
        slot_bytes = HEADER_BYTES + -(-daemon.engine.kv.layout.block_bytes // 4096) * 4096
    damage_all(tmp_path, partial(damage, slot_bytes=slot_bytes))
    async with running(**on_ssd(tmp_path)) as daemon:
        answers, served = await ask(prefer_loading(daemon), prompts[:3])
        assert (answers, served) == (alone[:3], Counter())
        stats = ssd_of(daemon).stats
        if kind is None:
            assert stats.dropped_at_recovery > 0
        else:
            assert set(stats.corrupt) == {kind}
            assert stats.corrupt[kind] >= 3, "at least one for each prompt"
    async with running(**on_ssd(tmp_path)) as daemon:
        answers, served = await ask(prefer_loading(daemon), prompts[:3])
        assert (answers, served[SSD] > 0) == (alone[:3], True)
