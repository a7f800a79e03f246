"""The tenants file: what it may say, how errors are told, and how keys get into it."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from server.cli import main
from server.errors import ConfigError
from server.tenants import FLOORS_SHARE_MAX, Tenant, cache_limits, digest_of, parse_tenants, read_tenants
from server.types import CacheLimit

ONE, TWO = (f"sha256:{digest_of(key).hex()}" for key in ("one", "two"))
FILE = f"""
cache_secret = "sixteen characters at least"

[tenants.acme]
keys = [
    "{ONE}",
    "{TWO}",
]
weight = 2
requests_per_minute = 60
tokens_per_minute = 1000
max_concurrent = 3
most_urgent_priority = -1

[tenants.acme.cache]
device = {{ floor = "25%", quota = 0.5 }}
dram.quota = "1MiB"

[tenants.bob]
keys = ["sha256:{"0" * 64}"]
"""


def parse(text: str) -> dict[str, Tenant]:
    return {tenant.name: tenant for tenant in parse_tenants(text, "tenants.toml")}


def test_a_file_says_who_and_how_much() -> None:
    """Names, digests, limits and shares come through; what is not said is no limit."""
    found = parse(FILE)
    acme, bob = found["acme"], found["bob"]
    assert acme.keys == (digest_of("one"), digest_of("two"))
    assert acme.limits.model_dump() == {
        "weight": 2.0, "requests_per_minute": 60, "tokens_per_minute": 1000, "max_concurrent": 3,
        "most_urgent_priority": -1,
    }  # fmt: skip
    assert bob.limits.model_dump(exclude_none=True) == {"weight": 1.0}
    limits = cache_limits(found.values(), {"device": 100, "dram": 400}, 4096, 10)
    assert limits == {acme.id: {"device": CacheLimit(25, 50), "dram": CacheLimit(0, 256)}, bob.id: {}}


def test_the_salt_comes_from_name_and_secret_alone() -> None:
    """Keys rotate, limits change, others come and go: the cache stays warm; another secret or name starts anew."""
    before = parse(FILE)["acme"].id
    rotated = FILE.replace(ONE, f"sha256:{'1' * 64}").replace("weight = 2", "weight = 5").split("[tenants.bob]")[0]
    assert parse(rotated)["acme"].id == before
    assert parse(FILE.replace("sixteen characters", "other characters"))["acme"].id != before
    assert parse(FILE)["bob"].id != before
    assert len(before.encode("ascii")) == 32, "the SSD tier's index has room for as much"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("weight = 2", "wieght = 2", "line 9: tenants.acme.wieght is not known here; did you mean 'weight'?"),
        ("weight = 2", "weight = 0", "line 9: tenants.acme.weight should be greater than or equal to 0.001"),
        ("weight = 2", 'weight = "2"', "line 9: tenants.acme.weight should be a valid number"),
        (ONE, "one", "line 5: tenants.acme.keys[0] is not sha256: and 64 hexadecimal digits"),
        (TWO, ONE, "line 5: tenants.acme.keys[1] is a key of tenant 'acme' already"),
        (f'"{ONE}",\n    "{TWO}",', "", "line 5: tenants.acme.keys should have at least 1 item"),
        ("0" * 64, ONE[7:], "line 20: tenants.bob.keys[0] is a key of tenant 'acme' already"),
        ("25%", "125%", "line 16: tenants.acme.cache.device.floor is neither a share"),
        ("0.5", "2", "line 16: tenants.acme.cache.device.quota is neither a share"),
        ("quota = 0.5", "quote = 0.5", "tenants.acme.cache.device.quote is not known here; did you mean 'quota'?"),
        ("1MiB", "1 lot", "line 17: tenants.acme.cache.dram.quota is not a size in bytes"),
        ("tenants.bob", "tenants.Bob", "line 19: tenants.Bob is not a name for a tenant"),
        ("tenants.bob", "tenants.other", "line 19: tenants.other is not a name for a tenant"),
        ("sixteen characters at least", "short", "line 2: cache_secret must be a string of at least 16 characters"),
        ("cache_secret", "cache_secrets", "line 2: cache_secrets is not known here; did you mean 'cache_secret'?"),
        ("[tenants.bob]", "[tenants.bob", "is not valid TOML: Expected ']' at the end of a table declaration (at line"),
        (FILE, "", "tenants.toml: tenants must hold 1 to 1000 tables"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_its_place(old: str, new: str, said: str) -> None:
    """Unknown, missing, double or impossible: one line with file, line and field."""
    assert FILE.count(old) == 1
    with pytest.raises(ConfigError) as refusal:
        parse(FILE.replace(old, new))
    assert said in refusal.value.message
    assert refusal.value.message.startswith("tenants.toml")
    assert "\n" not in refusal.value.message


def shares(**tiers: str) -> str:
    return f"[tenants.a]\nkeys = ['{ONE}']\n[tenants.a.cache]\n" + "\n".join(f"{k} = {v}" for k, v in tiers.items())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (shares(device="{floor=0.86}"), "keep 86 of the 100 blocks of the device tier; at most 85 can be kept"),
        (shares(dram="{floor=0.96}"), "keep 384 of the 400 blocks of the dram tier; at most 380 can be kept"),
        (shares(dram='{floor="4GiB"}'), "lower tenants.*.cache.dram.floor"),
        (shares(ssd="{quota=0.5}"), "tenants.a.cache.ssd: there is no such tier here; there are: device, dram"),
        (shares(dram="{floor=0.5, quota=0.4}"), "tenants.a.cache.dram: the quota is less than the floor"),
    ],
)
def test_shares_that_no_tier_can_give_are_refused(text: str, said: str) -> None:
    """Floors leave room for what comes, in the device for the longest request; tiers exist; quotas hold the floor."""
    with pytest.raises(ConfigError) as refusal:
        cache_limits(parse(text).values(), {"device": 100, "dram": 400}, 4096, 10)
    assert said in refusal.value.message


def test_the_largest_floors_are_allowed() -> None:
    """What the refusal says can be kept can be kept."""
    assert FLOORS_SHARE_MAX == 0.95
    both = shares(device="{floor=0.85}", dram="{floor=0.95}")
    assert cache_limits(parse(both).values(), {"device": 100, "dram": 400}, 4096, 10)


def test_keys_add_prints_a_key_once_and_keeps_its_digest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A new file, a new tenant with limits, a second key for it: each key is printed, none is in the file, which only
    its owner can read, and comments stay."""
    file = tmp_path / "tenants.toml"
    assert main(["keys", "add", str(file), "acme", "--tokens-per-minute", "1000", "--weight", "2.5"]) == 0
    file.write_text(f"# who may call\n{file.read_text()}")
    assert main(["keys", "add", str(file), "bob"]) == 0
    assert main(["keys", "add", str(file), "acme"]) == 0
    keys = capsys.readouterr().out.split()
    found = {tenant.name: tenant for tenant in read_tenants(file)}
    assert found["acme"].keys == (digest_of(keys[2]), digest_of(keys[0]))
    assert found["bob"].keys == (digest_of(keys[1]),)
    assert (found["acme"].limits.tokens_per_minute, found["acme"].limits.weight) == (1000, 2.5)
    assert len(set(keys)) == 3
    assert all(len(key) > 40 and key not in file.read_text() for key in keys)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.read_text().startswith("# who may call\n")
    assert [path.name for path in tmp_path.iterdir()] == ["tenants.toml"]
    assert main(["keys", "check", str(file)]) == 0
    assert capsys.readouterr().out == "2 tenants with 3 keys\n"


@pytest.mark.parametrize(
    ("text", "arguments", "said"),
    [
        (FILE, ["bob", "--max-concurrent", "2"], "tenant 'bob' is in"),
        (FILE, ["Eve"], "tenants.Eve is not a name for a tenant"),
        (FILE, ["eve", "--max-concurrent", "0"], "tenants.eve.max_concurrent should be greater than or equal to 1"),
        (FILE.replace("[tenants.acme]", "[tenants.acme"), ["bob"], "is not valid TOML"),
        (f'tenants.bob = {{ keys = ["{ONE}"] }}', ["bob"], "cannot tell where"),
    ],
)
def test_keys_add_changes_nothing_when_it_cannot(
    text: str, arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file stays as it was, no key is printed, and one line says why."""
    file = tmp_path / "tenants.toml"
    file.write_text(text)
    assert main(["keys", "add", str(file), *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert said in shown.err
    assert file.read_text() == text
