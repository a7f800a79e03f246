"""The cache admin API: who may use it, what it is told, what it answers."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.api_fake import FakeEngine, client, make_app

PROMPT = {"prompt": [1, 2, 3, 4, 5, 6, 7, 8, 9]}


async def post(
    engine: FakeEngine, name: str, body: dict[str, Any] | None = None, key: str | None = None, **app: Any
) -> tuple[int, dict[str, Any]]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with client(make_app(engine, **app)) as http:
        answer = await http.post(f"/v1/cache/{name}", json=body, headers=headers)
        return answer.status_code, answer.json()


async def test_lookup_says_where_and_why() -> None:
    """Each part of a prompt: its tier, its tokens, what a request would do, and the reason."""
    status, answer = await post(FakeEngine(), "lookup", PROMPT)
    assert status == 200
    assert answer["prompt_tokens"] == 9
    assert answer["cached_tokens"] == 4
    assert answer["spans"][0] == {
        "tier": "ssd", "tokens": 4, "decision": "load", "reason": "loading is faster", "load_s": 0.1, "compute_s": 0.5,
    }  # fmt: skip
    assert answer["spans"][1]["tier"] is None


async def test_a_pin_has_a_time() -> None:
    """Blocks are kept for as long as was asked, which must be said and be sensible."""
    engine = FakeEngine()
    assert await post(engine, "pin", PROMPT | {"ttl_s": 60}) == (200, {"blocks": 2, "tokens": 8})
    assert ("pin", 2, 60.0) in engine.told
    for bad in ({}, {"ttl_s": 0}, {"ttl_s": 1e9}):
        status, answer = await post(engine, "pin", PROMPT | bad)
        assert status == 400
        assert answer["error"]["param"] == "ttl_s"


@pytest.mark.parametrize(("name", "blocks"), [("unpin", 1), ("prefetch", 2), ("evict", 2)])
async def test_what_was_done_is_counted(name: str, blocks: int) -> None:
    """Every command says how many blocks it concerned."""
    assert await post(FakeEngine(), name, PROMPT) == (200, {"blocks": blocks, "tokens": 4 * blocks})


async def test_clear_needs_no_body() -> None:
    """Clearing concerns everything."""
    assert await post(FakeEngine(), "clear") == (200, {"blocks": 7, "tokens": 28})


async def test_stats_show_every_tier() -> None:
    """Sizes in bytes, hops with their measured rate."""
    async with client(make_app(FakeEngine())) as http:
        answer = (await http.get("/v1/cache/stats")).json()
    assert answer["tiers"][0]["name"] == "device"
    assert answer["tiers"][0]["capacity_bytes"] == 8 * answer["block_bytes"]


async def test_a_prompt_or_messages() -> None:
    """A chain is named by exactly one of them, as a request would name it; a chat goes through the template."""
    engine = FakeEngine()
    for bad in ({}, PROMPT | {"messages": [{"role": "user", "content": "hi"}]}):
        status, answer = await post(engine, "lookup", bad)
        assert status == 400
        assert answer["error"]["param"] == "prompt"
    status, _ = await post(engine, "lookup", {"messages": [{"role": "user", "content": "hi, how are you"}]})
    assert status == 200
    assert bytes(engine.told[-1][1]) == b"<user>hi, how are you\n<assistant>"


async def test_it_has_its_own_key() -> None:
    """An API key opens the model, not the cache; without an admin key the API is off where keys are needed at all."""
    engine = FakeEngine()
    status, answer = await post(engine, "clear", key="user", keys=["user"])
    assert (status, answer["error"]["code"]) == (404, "admin_api_off")
    both = {"keys": ["user"], "admin_keys": ["boss"]}
    assert (await post(engine, "clear", key="user", **both))[0] == 401
    assert (await post(engine, "clear", **both))[0] == 401
    assert (await post(engine, "clear", key="boss", **both))[0] == 200
    async with client(make_app(engine, **both)) as http:
        refused = await http.get("/v1/models", headers={"Authorization": "Bearer boss"})
        assert refused.status_code == 401, "an admin key is no API key"


async def test_an_admin_says_whose_blocks() -> None:
    """Tenants are separate: the API key in the body chooses one, by the same salt that its requests have."""
    engine, both = FakeEngine(), {"keys": ["user"], "admin_keys": ["boss"]}
    for bad in ({}, {"api_key": "nobody"}):
        status, answer = await post(engine, "lookup", PROMPT | bad, key="boss", **both)
        assert status == 400
        assert answer["error"]["param"] == "api_key"
    assert (await post(engine, "lookup", PROMPT | {"api_key": "user", "cache_salt": "s"}, key="boss", **both))[0] == 200
    salt = engine.told[-1][2]
    async with client(make_app(engine, **both)) as http:
        body = {"prompt": "x", "max_tokens": 1, "cache_salt": "s"}
        await http.post("/v1/completions", json=body, headers={"Authorization": "Bearer user"})
    assert engine.submitted[-1].cache_salt == salt


async def test_retention_hints_reach_the_engine() -> None:
    """The fields of OpenAI's API become what the cache understands; anything else is refused by name."""
    engine = FakeEngine()
    async with client(make_app(engine)) as http:
        for hint, expected in (
            ({"prompt_cache_key": "me"}, (False, True, 0.0)),
            ({"prompt_cache_retention": "in_memory"}, (True, False, 0.0)),
            ({"prompt_cache_retention": "24h"}, (False, False, 86_400.0)),
        ):
            await http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1} | hint)
            said = engine.submitted[-1].retention
            assert (said.transient, said.session, said.keep_s) == expected
        bad = await http.post("/v1/completions", json={"prompt": "x", "prompt_cache_retention": "for ever"})
        assert bad.status_code == 400
        assert bad.json()["error"]["param"] == "prompt_cache_retention"
