"""Limits of tenants through the HTTP surface, over a scripted engine and a clock that is set by hand."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import httpx
import pytest

from server.api.tenancy import Bucket, Tenants
from server.errors import ConfigError, Overloaded
from server.tenants import Limits, Tenant, digest_of
from tests.unit.api_fake import FakeEngine, client, make_app, text_reply

BODY = {"prompt": [65] * 20, "max_tokens": 5}


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def tenant(name: str, **limits: Any) -> Tenant:
    """Its key is its name."""
    return Tenant(name, f"id of {name}", (digest_of(name),), Limits(**limits), {})


class Shop:
    """Tenants, an engine and a connection for each key."""

    def __init__(self, *named: Tenant, plain: tuple[str, ...] = (), admin: tuple[str, ...] = ()) -> None:
        self.clock = Clock()
        self.rejected: list[str] = []
        self.engine = FakeEngine()
        self.tenants = Tenants([digest_of(key) for key in plain], self.clock, self.rejected.append)
        self.tenants.replace(named)
        self.http = client(make_app(self.engine, tenants=self.tenants, admin_keys=admin))

    async def ask(self, key: str, **more: Any) -> httpx.Response:
        return await self.http.post("/v1/completions", json=BODY | more, headers=bearer(key))


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_a_bucket_fills_evenly_and_is_never_fuller_than_full() -> None:
    """A minute's worth at first; overdrawn it takes as long as it takes; more than it holds waits until it is full."""
    bucket = Bucket(60, 0.0)
    assert bucket.wait_s(60, 0.0) == bucket.wait_s(1000, 0.0) == 0
    bucket.add(-90, 0.0)
    assert (bucket.level(0.0), bucket.wait_s(1, 0.0), bucket.wait_s(1000, 10.0)) == (-30, 31, 80)
    assert bucket.level(1000.0) == 60
    bucket.add(-30, 1000.0)
    assert bucket.resized(120, 1000.0).level(1000.0) == 60


async def test_requests_per_minute() -> None:
    """So many at once, then 429 with the time to wait, which is enough; the headers say what is left all along."""
    shop = Shop(tenant("a", requests_per_minute=2), tenant("b"))
    first, second, third = [await shop.ask("a") for _ in range(3)]
    assert (first.status_code, second.status_code, third.status_code) == (200, 200, 429)
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    left = [answer.headers["x-ratelimit-remaining-requests"] for answer in (first, second, third)]
    assert left == ["1", "0", "0"]
    assert first.headers["x-ratelimit-reset-requests"] == "30s"
    assert third.headers["x-ratelimit-reset-requests"] == "1m0s"
    assert "x-ratelimit-limit-tokens" not in first.headers
    assert third.json()["error"]["code"] == "rate_limit_exceeded"
    assert third.headers["retry-after"] == "30"
    assert shop.rejected == ["rate_limit"]
    assert (await shop.ask("b")).status_code == 200, "another tenant has nothing to do with it"
    assert not any(name.startswith("x-ratelimit") for name in (await shop.ask("b")).headers)
    shop.clock.now += 29.9
    assert (await shop.ask("a")).status_code == 429
    shop.clock.now += 0.1
    assert (await shop.ask("a")).status_code == 200


async def test_a_body_that_cannot_be_served_is_not_read() -> None:
    """Whose limit is used up is refused before anything is done for it: even a body that is no JSON gets the 429."""
    shop = Shop(tenant("a", requests_per_minute=1))
    headers = bearer("a") | {"content-type": "application/json"}
    assert (await shop.http.post("/v1/completions", content=b"{", headers=headers)).status_code == 400
    assert (await shop.ask("a")).status_code == 200, "what was not served costs nothing"
    for path in ("/v1/completions", "/v1/chat/completions"):
        assert (await shop.http.post(path, content=b"{", headers=headers)).status_code == 429
    assert (await shop.http.get("/v1/models", headers=headers)).status_code == 200


async def test_tokens_are_charged_for_what_was_computed() -> None:
    """The prompt when it is admitted; at the end what was generated, less what the cache had."""
    shop = Shop(tenant("a", tokens_per_minute=600))
    gate = shop.tenants.gate("id of a")
    assert gate.tokens is not None
    shop.engine.gate.clear()
    running = asyncio.create_task(shop.ask("a"))
    while not shop.engine.open:  # noqa: ASYNC110 - there is no event for it
        await asyncio.sleep(0)
    assert gate.tokens.level(shop.clock.now) == 580
    shop.engine.gate.set()
    answer = await running
    assert answer.headers["x-ratelimit-remaining-tokens"] == "575"
    assert gate.tokens.level(shop.clock.now) == 575
    shop.engine.cached_tokens = 16
    await shop.ask("a", n=3)
    assert gate.tokens.level(shop.clock.now) == 575 - 20 - 3 * 5 + 16
    assert gate.charged == {"prompt": 40, "cached": 16, "generated": 20}


async def test_tokens_that_nobody_could_foresee_are_paid_off() -> None:
    """A prompt larger than a minute's worth waits for a full bucket; afterwards its tenant waits until that is paid."""
    shop = Shop(tenant("a", tokens_per_minute=15))
    assert (await shop.ask("a")).status_code == 200
    refused = await shop.ask("a", prompt=[1], max_tokens=1)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "44")  # 10 in debt, 1 wanted
    shop.clock.now += 44
    assert (await shop.ask("a")).status_code == 429, "a long one waits for more"
    assert (await shop.ask("a", prompt=[1], max_tokens=1)).status_code == 200


async def test_text_that_a_stop_string_cut_off_is_charged() -> None:
    """What the device generated counts, shown or not."""
    shop = Shop(tenant("a", tokens_per_minute=600))
    shop.engine.reply, shop.engine.burst = text_reply("abcdefgh"), 8
    answer = await shop.ask("a", max_tokens=8, stop="b")
    assert answer.json()["usage"]["completion_tokens"] < 8
    assert shop.tenants.gate("id of a").charged["generated"] == 8


async def test_requests_at_once() -> None:
    """One more than allowed is refused while the others run, streams too, and welcome when one is over or left."""
    shop = Shop(tenant("a", max_concurrent=1))
    shop.engine.gate.clear()
    running = asyncio.create_task(shop.ask("a", stream=True))
    while not shop.engine.open:  # noqa: ASYNC110 - there is no event for it
        await asyncio.sleep(0)
    refused = await shop.ask("a")
    assert refused.json()["error"]["code"] == "concurrency_limit_exceeded"
    assert refused.headers["retry-after"] == "1"
    shop.engine.gate.set()
    assert (await running).status_code == 200
    assert (await shop.ask("a")).status_code == 200
    shop.engine.gate.clear()
    leaving = asyncio.create_task(shop.ask("a"))
    while not shop.engine.open:  # noqa: ASYNC110
        await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    shop.engine.gate.set()
    assert (await shop.ask("a")).status_code == 200
    gate = shop.tenants.gate("id of a")
    assert gate.open == 0
    assert gate.outcomes == {"served": 3, "aborted": 1, "refused": 0, "rate_limit": 0, "concurrency": 1}


async def test_what_the_engine_refuses_costs_nothing() -> None:
    """A full queue, also behind some of several choices, gives all back."""
    shop = Shop(tenant("a", requests_per_minute=5, tokens_per_minute=600))
    shop.engine.refuse, shop.engine.refuse_after = Overloaded("full", retry_after_s=1), 1
    assert (await shop.ask("a", n=2)).status_code == 429
    gate = shop.tenants.gate("id of a")
    assert gate.headers(shop.clock.now)["x-ratelimit-remaining-requests"] == "5"
    assert gate.headers(shop.clock.now)["x-ratelimit-remaining-tokens"] == "600"
    assert (gate.open, gate.outcomes["refused"]) == (0, 1)


async def test_how_urgent_a_tenant_may_be() -> None:
    """A more urgent priority is refused by name; who says none gets the most urgent that is not above the ordinary."""
    shop = Shop(tenant("modest", most_urgent_priority=3), tenant("free"), tenant("urgent", most_urgent_priority=-5))
    refused = await shop.ask("modest", priority=2)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "priority")
    for key, wanted, given in (
        ("modest", {"priority": 4}, 4),
        ("modest", {}, 3),
        ("free", {"priority": -9}, -9),
        ("urgent", {"priority": -5}, -5),
        ("urgent", {}, 0),
    ):
        assert (await shop.ask(key, **wanted)).status_code == 200
        assert shop.engine.submitted[-1].service.priority == given
    assert (await shop.ask("urgent", priority=-6)).status_code == 400


async def test_keys_of_one_tenant_share_all_and_others_nothing() -> None:
    """Salt and limits go by the tenant: a rotated key finds what the old one left, whatever salt a client names."""
    both = replace(tenant("a", requests_per_minute=2), keys=(digest_of("old"), digest_of("new")))
    shop = Shop(both, tenant("b"), plain=("plain",))
    for key, salt in (
        ("old", None),
        ("new", None),
        ("b", None),
        ("plain", None),
        ("b", "id of a"),
        ("b", "id of a\x1f"),
    ):
        assert (await shop.ask(key, cache_salt=salt)).status_code == 200
    salts = [spec.cache_salt for spec in shop.engine.submitted]
    assert salts[0] == salts[1]
    assert len(set(salts)) == 5
    assert (await shop.ask("new")).status_code == 429
    assert (await shop.ask("older")).status_code == 401


async def test_other_tenants_from_now_on() -> None:
    """A key that is gone is refused at once, a new one works; what was used stays used, in proportion."""
    shop = Shop(tenant("a", requests_per_minute=2), tenant("b"))
    assert (await shop.ask("a")).status_code == (await shop.ask("b")).status_code == 200
    shop.tenants.replace([tenant("a", requests_per_minute=4), tenant("c")])
    assert (await shop.ask("b")).status_code == 401
    assert (await shop.ask("c")).status_code == 200
    assert (await shop.ask("a")).headers["x-ratelimit-remaining-requests"] == "1"
    assert set(shop.tenants.numbers()) == {"", "id of a", "id of b", "id of c"}, "counters never vanish"


def test_a_key_cannot_be_two_tenants() -> None:
    """A plain key that is in the file as well is refused, and all stays as it was."""
    tenants = Tenants([digest_of("one")])
    tenants.replace([tenant("two")])
    with pytest.raises(ConfigError, match="'one'"):
        tenants.replace([tenant("one"), tenant("three")])
    assert [tenants.find(digest_of(key)) is None for key in ("one", "two", "three")] == [False, False, True]


async def test_an_admin_names_a_tenant() -> None:
    """Whose keys are known as digests only is meant by name, by the same salt that its requests have."""
    shop = Shop(tenant("a"), plain=("plain",), admin=("boss",))
    for bad in ({}, {"tenant": "x"}, {"tenant": "a", "api_key": "a"}, {"api_key": "x"}):
        answer = await shop.http.post("/v1/cache/lookup", json={"prompt": [1] * 9} | bad, headers=bearer("boss"))
        assert answer.status_code == 400
    await shop.ask("a")
    for good in ({"tenant": "a"}, {"api_key": "a"}):
        answer = await shop.http.post("/v1/cache/lookup", json={"prompt": [1] * 9} | good, headers=bearer("boss"))
        assert answer.status_code == 200
        assert shop.engine.told[-1][2] == shop.engine.submitted[-1].cache_salt
    answer = await shop.http.post("/v1/cache/lookup", json={"prompt": [1], "tenant": "a"}, headers=bearer("a"))
    assert answer.status_code == 401, "a tenant's key is no admin key"
