"""Tenants over a real socket: the `openai` client with several keys, SIGHUP, and what one may learn of another."""

from __future__ import annotations

import itertools
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.api.tenancy import tenant_of
from server.tenants import add_key, digest_of, read_tenants
from tests.e2e.daemon import NAME, Served, ServeProcess, ServerThread, Wait, tiny_config, write_model

NUMBERS = itertools.count(1000)
ASK: dict[str, Any] = {"model": NAME, "max_tokens": 4, "extra_body": {"ignore_eos": True}}


class Keys(dict[str, str]):
    """A tenants file and one key of each tenant in it."""

    def __init__(self, file: Path, **tenants: dict[str, Any]) -> None:
        super().__init__({name: add_key(file, name, limits) for name, limits in tenants.items()})
        self.file = file


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    limits = {"requests_per_minute": 3, "tokens_per_minute": 2000}
    made = Keys(tmp_path_factory.mktemp("tenants") / "tenants.toml", alice={}, mallory={}, small=limits)
    with made.file.open("a") as file:
        file.write('cache = { device = { floor = "20%", quota = "50%" } }\n')
    return made


@pytest.fixture(scope="module")
def shop(model_folder: Path, keys: Keys) -> Iterator[Served]:
    """Three tenants in a file, one plain key, one admin."""
    config = {"server.tenants_file": str(keys.file), "server.api_keys": ("plain",), "server.admin_keys": ("boss",)}
    with ServerThread(tiny_config(model_folder, **config)) as running:
        yield running


def as_tenant(served: Served | ServeProcess, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def clients(shop: Served, keys: Keys) -> Iterator[dict[str, openai.OpenAI]]:
    """One for every tenant, by name."""
    made = {name: as_tenant(shop, key) for name, key in (*keys.items(), ("plain", "plain"))}
    yield made
    for client in made.values():
        client.close()


def cached(client: openai.OpenAI, prompt: str, **more: Any) -> int:
    answer = client.completions.create(prompt=prompt, **(ASK | {"extra_body": ASK["extra_body"] | more}))
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    return answer.usage.prompt_tokens_details.cached_tokens or 0


def test_limits_as_the_client_knows_them(shop: Served, keys: Keys) -> None:
    """Raw answers carry the headers; beyond the limit RateLimitError with Retry-After; metrics count by name."""
    with as_tenant(shop, keys["small"]) as client:
        left = []
        for _ in range(3):
            raw = client.completions.with_raw_response.create(prompt="x" * 40, **ASK)
            left.append((raw.headers["x-ratelimit-remaining-requests"], raw.headers["x-ratelimit-limit-tokens"]))
        assert left == [("2", "2000"), ("1", "2000"), ("0", "2000")]
        with pytest.raises(openai.RateLimitError) as refusal:
            client.completions.create(prompt="x" * 40, **ASK)
    assert refusal.value.code == "rate_limit_exceeded"
    assert 1 <= int(refusal.value.response.headers["retry-after"]) <= 20
    with shop.client() as http:
        metrics = http.get("/metrics").text
    for line in (
        'terrace_tenant_requests_total{model_name="tiny",outcome="served",tenant="small"} 3.0',
        'terrace_tenant_requests_total{model_name="tiny",outcome="rate_limit",tenant="small"} 1.0',
        'terrace_tenant_tokens_total{kind="prompt",model_name="tiny",tenant="small"} 120.0',
        'terrace_tenant_tokens_total{kind="generated",model_name="tiny",tenant="small"} 12.0',
        'terrace_tenant_kv_blocks{model_name="tiny",tenant="small",tier="device"} 2.0',
        'terrace_tenant_requests_open{model_name="tiny",tenant="small"} 0.0',
        'terrace_admission_rejections_total{model_name="tiny",reason="rate_limit"} 1.0',
    ):
        assert line in metrics
    labels = {line.split('tenant="')[1].split('"')[0] for line in metrics.splitlines() if 'tenant="' in line}
    assert labels == {"alice", "mallory", "small", "other"}


def test_floor_and_quota_are_those_of_the_file(shop: Served) -> None:
    """512 blocks: a floor of 20 % and a quota of 50 % are 102 and 256 of them."""
    kv, ids = shop.daemon.engine.kv, {tenant.name: tenant.id for tenant in read_tenants_of(shop)}
    shares = kv.device.shares
    assert shares is not None
    line = shares._lines[kv.owners.number(ids["small"])]
    assert (line.limit.floor, line.limit.quota) == (102, 256)


def read_tenants_of(served: Served) -> Any:
    path = served.daemon.config.server.tenants_file
    assert path is not None
    return read_tenants(path)


# What an attacker may try: salts and keys that look like what the server makes of alice's.
def guesses(keys: Keys) -> list[str]:
    alice = next(tenant for tenant in read_tenants(keys.file) if tenant.name == "alice")
    digest = digest_of(keys["alice"])
    return ["", "alice", "\x1f", alice.id, f"{alice.id}\x1f", f"{alice.id}\x1fs", digest.hex(), tenant_of(digest), "s"]


texts = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=48, max_size=160)


@given(prompt=texts, victims_salt=st.sampled_from([None, "s"]), data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nobody_finds_what_another_sent(
    keys: Keys, clients: dict[str, openai.OpenAI], prompt: str, victims_salt: str | None, data: st.DataObject
) -> None:
    """Whatever prompt alice sent under whatever salt, and whatever salt or cache key mallory names: nothing cached, for
    a key from the file or a plain one, at first; at once for alice."""
    hints: dict[str, Any] = {"cache_salt": victims_salt} if victims_salt else {}
    attack = data.draw(
        st.fixed_dictionaries(
            {},
            optional={
                "cache_salt": st.sampled_from(guesses(keys)) | st.text(max_size=40),
                "prompt_cache_key": st.sampled_from(guesses(keys)) | st.text(max_size=40),
                "prompt_cache_retention": st.sampled_from(["in_memory", "24h"]),
                "user": st.sampled_from(["alice"]),
            },
        )
    )
    prompt = f"{next(NUMBERS)} {prompt}"  # no example may be the same twice: one may find what one sent oneself
    alice, attacker = clients["alice"], clients[data.draw(st.sampled_from(["mallory", "plain"]))]
    assert cached(alice, prompt, **hints) == 0
    assert cached(alice, prompt, **hints) > 0
    assert cached(attacker, prompt, **attack) == 0
    assert cached(alice, prompt, **hints) > 0, "and nobody takes it away"


def test_the_routes_beside_tell_nothing_either(shop: Served, keys: Keys) -> None:
    """The cache routes want an admin's key, from all others nothing comes back; tokenizing does not look at the cache;
    neither names, digests nor salts of others are in any answer or header."""
    prompt = "what only alice knows, at some length, so that it fills several blocks"
    with as_tenant(shop, keys["alice"]) as alice:
        cached(alice, prompt)
    known = read_tenants_of(shop)
    secrets = [keys["alice"], *(tenant.id for tenant in known), *(key.hex() for tenant in known for key in tenant.keys)]
    with shop.client(headers={"authorization": f"Bearer {keys['mallory']}"}) as http:
        for name in ("lookup", "pin", "unpin", "prefetch", "evict"):
            answer = http.post(f"/v1/cache/{name}", json={"prompt": prompt, "tenant": "alice", "ttl_s": 1})
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert http.post("/v1/cache/clear").status_code == http.get("/v1/cache/stats").status_code == 401
        answers = [
            http.post("/tokenize", json={"prompt": prompt}),
            http.post("/v1/completions", json={"prompt": prompt, "max_tokens": 1}),
            http.get("/v1/models"),
            http.get("/metrics"),
        ]
        assert [answer.status_code for answer in answers] == [200] * 4
        assert set(answers[0].json()) == {"count", "max_model_len", "tokens", "token_strs"}
        for answer in answers:
            assert not any(secret in f"{answer.headers} {answer.text}" for secret in secrets)
    with shop.client(headers={"authorization": "Bearer boss"}) as http:
        found = {
            name: http.post("/v1/cache/lookup", json={"prompt": prompt, "tenant": name}).json()["cached_tokens"]
            for name in ("alice", "small")
        }
    assert found["alice"] >= 48
    assert found["small"] == 0


def test_sighup_reads_the_file_again(tmp_path: Path) -> None:
    """A new key works, one that is gone does not, a bad file changes nothing and says so once, and a stream that runs
    all the while gets every token. No key is ever in the log."""
    keys = Keys(tmp_path / "tenants.toml", alice={})
    flags = [str(write_model(tmp_path / "tiny", context=4096)), "--load-format=dummy", f"--served-model-name={NAME}"]
    flags += ["--device-gib=0.02", "--threads=1", f"--tenants-file={keys.file}"]
    with ServeProcess(tmp_path / "log", *flags) as process:
        process.ready()
        models = process.client()

        def status(key: str) -> int:
            return models.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code

        def reload(said: str) -> None:
            before = process.said().count(said)
            process.process.send_signal(signal.SIGHUP)
            Wait().until(lambda: process.said().count(said) > before, said)

        body = {"prompt": "hello", "max_tokens": 800, "ignore_eos": True, "stream": True}
        headers = {"authorization": f"Bearer {keys['alice']}"}
        with process.client() as http, http.stream("POST", "/v1/completions", json=body | {
            "stream_options": {"include_usage": True}
        }, headers=headers) as answer:  # fmt: skip
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            newer, bob = add_key(keys.file, "alice", {}), add_key(keys.file, "bob", {"weight": 2})
            assert status(newer) == status(bob) == 401
            reload("reloaded: 2 tenants with 3 keys")
            assert status(keys["alice"]) == status(newer) == status(bob) == 200
            good = keys.file.read_text()
            for bad in (good.replace("weight", "wait"), good + "[tenants", good.replace("keys = ", "key = ")):
                keys.file.write_text(bad)
                reload("nothing was reloaded: ")
                assert status(keys["alice"]) == status(bob) == 200
            keys.file.write_text(
                good + '\n[tenants.greedy]\nkeys = ["sha256:' + "0" * 64 + '"]\ncache.device.floor = 1\n'
            )
            reload("nothing was reloaded: the floors of all tenants keep ")
            keys.file.write_text(good.replace(f'"sha256:{digest_of(keys["alice"]).hex()}"', ""))
            reload("reloaded: 2 tenants with 2 keys")
            assert status(keys["alice"]) == 401
            assert status(newer) == 200
            rest = [line for line in lines if line.startswith("data: ")]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2][6:])["usage"]["completion_tokens"] == 800
        assert process.stop(signal.SIGTERM) == 0
        models.close()
        log = process.said()
    for key in (keys["alice"], newer, bob):
        assert key not in log
        assert digest_of(key).hex() not in log
