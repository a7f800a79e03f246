"""The configuration tree and its command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from server.cli import main
from server.config import OPTIONS, Config, Option, example_toml, key_weights, load_config
from server.errors import ConfigError


def load(overrides: dict | None = None, file: Path | None = None, **environ: str) -> Config:
    return load_config(overrides, file, environ)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_bare_config_equals_load_of_nothing():
    """Without file, environment and flags every field has its default, and says so."""
    config = load()
    assert config == Config()
    assert {source for _, _, source in config.rows()} == {"default"}


def test_precedence(tmp_path):
    """Flags win over the environment, the environment over the file, the file over defaults; each names its source."""
    file = write(tmp_path / "t.toml", "[kv]\ndevice_gib = 2\nblock_size = 32\neviction = 'slru'\n")
    config = load({"kv.device_gib": "4"}, file, TERRACE_KV__DEVICE_GIB="3", TERRACE_KV__BLOCK_SIZE="64")
    assert (config.kv.device_gib, config.kv.block_size, config.kv.eviction) == (4.0, 64, "slru")
    assert config.source("kv.device_gib") == "flag --device-gib"
    assert config.source("kv.block_size") == "env TERRACE_KV__BLOCK_SIZE"
    assert config.source("kv.eviction") == f"file {file}"
    assert config.source("server.port") == "default"


def test_file_named_by_environment(tmp_path):
    """TERRACE_CONFIG names the file when no flag does."""
    file = write(tmp_path / "t.toml", "[server]\nport = 9\n")
    assert load(TERRACE_CONFIG=str(file)).server.port == 9


def test_frozen():
    """A loaded configuration cannot be changed."""
    with pytest.raises(ValidationError):
        load().kv.block_size = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("kv.device_gib", "512MiB", 0.5),
        ("kv.device_gib", "1.5", 1.5),
        ("kv.device_gib", "2GiB", 2.0),
        ("server.max_body_bytes", "8MiB", 8 * 2**20),
        ("server.max_body_bytes", "1_000_000", 1_000_000),
        ("server.max_body_bytes", "2MB", 2_000_000),
        ("server.shutdown_timeout_s", "1.5m", 90.0),
        ("server.shutdown_timeout_s", "250ms", 0.25),
        ("model.max_model_len", "32k", 32_000),
        ("model.max_model_len", "32K", 32_768),
        ("model.dtype", "bf16", "bfloat16"),
        ("model.dtype", "half", "float16"),
        ("server.api_keys", "a, b", ("a", "b")),
        ("server.api_keys", ["a"], ("a",)),
        ("kv.prefix_caching", "false", False),
    ],
)
def test_units(name, text, value):
    """Sizes, durations, counts and dtypes take the forms that operators write."""
    section, field = name.split(".")
    assert getattr(getattr(load({name: text}), section), field) == value


@pytest.mark.parametrize(
    ("overrides", "environ", "message"),
    [
        ({"kv.block_size": "12"}, {}, "kv.block_size = '12' (flag --block-size): is not a power of two"),
        ({"kv.block_siz": "16"}, {}, "unknown setting 'kv.block_siz'; did you mean 'kv.block_size'?"),
        ({"kv.port": "1"}, {}, "did you mean 'server.port'?"),
        ({"kv.device_gib": "much"}, {}, "is not a size in GiB"),
        ({"kv.device_gib": "-1"}, {}, "greater than or equal to 0"),
        ({"kv.device_gib": "nan"}, {}, "kv.device_gib"),
        ({"scheduler.ttft_target_ms": "-1"}, {}, "scheduler.ttft_target_ms = '-1' (flag --ttft-target-ms)"),
        ({"scheduler.tpot_target_ms": "inf"}, {}, "scheduler.tpot_target_ms"),
        ({"scheduler.background_step_ms": "0"}, {}, "greater than 0"),
        ({"scheduler.background_slack": "1.5"}, {}, "less than or equal to 1"),
        ({"scheduler.background_kv_share": "0"}, {}, "greater than 0"),
        ({"scheduler.refuse_late": "perhaps"}, {}, "scheduler.refuse_late"),
        ({"server.port": "70000"}, {}, "less than or equal to 65535"),
        ({"server.max_body_bytes": "1.5"}, {}, "not a whole number"),
        ({"model.dtype": "int3"}, {}, "'float32', 'bfloat16' or 'float16'"),
        ({}, {"TERRACE_KV__DEVICE_GB": "1"}, "did you mean TERRACE_KV__DEVICE_GIB?"),
        ({}, {"TERRACE_DEVICE_GIB": "1"}, "did you mean TERRACE_KV__DEVICE_GIB?"),
        ({}, {"TERRACE_API_KEYS": "a", "TERRACE_SERVER__API_KEYS": "b"}, "keep one"),
        ({}, {"TERRACE_SERVER__PORT": "http"}, "(env TERRACE_SERVER__PORT)"),
    ],
)
def test_errors_are_one_line_naming_field_and_source(overrides, environ, message):
    """A bad or misspelt setting is a ConfigError of one line that names it, its source and the remedy."""
    with pytest.raises(ConfigError) as caught:
        load(overrides, **environ)
    assert message in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[kv]\ndevice_gig = 1\n", "unknown key 'kv.device_gig' in {file}; did you mean 'kv.device_gib'?"),
        ("[kv_cache]\n", "unknown section 'kv_cache'"),
        ("port = 1\n", "unknown key 'port' in {file}; did you mean 'server.port'?"),
        ("kv = 1\n", "must be a section"),
        ("[kv\n", "is not valid TOML"),
    ],
)
def test_file_errors(tmp_path, text, message):
    """A configuration file with an unknown key or bad syntax is refused, with the file's name and a suggestion."""
    file = write(tmp_path / "t.toml", text)
    with pytest.raises(ConfigError) as caught:
        load(file=file)
    assert message.format(file=file) in caught.value.message


def sample(option: Option) -> str:
    """Some valid value of an option that is not its default, as text."""
    if option.choices:
        return next(choice for choice in option.choices if choice != option.default)
    if option.kind == "bool":
        return str(not option.default).lower()
    if option.field in ("pin_ratio", "ssd_write_share"):
        return "0.5"
    if isinstance(option.default, int | float):
        return (
            str(type(option.default)(option.default * 2 or 3)) if option.name != "server.switch_interval_s" else "0.5"
        )
    return "64" if option.field in ("max_model_len", "threads", "prefill_chunk_tokens") else "text"


READ_AT_ONCE = {"api_key_file", "admin_key_file"}
COMPANY = {
    "kv.ssd_gib": {"kv.dram_gib": "1", "kv.ssd_path": "somewhere"},
    "kv.ssd_path": {"kv.dram_gib": "1", "kv.ssd_gib": "1"},
}
"""Settings that make sense only with others."""


@pytest.mark.parametrize("option", [o for o in OPTIONS if o.field not in READ_AT_ONCE], ids=lambda option: option.name)
def test_every_setting_can_be_set_everywhere(option, tmp_path):
    """File, environment and command line set each field to the same value, and each is named as its source."""
    text, company = sample(option), COMPANY.get(option.name, {})
    quoted = not (option.kind == "bool" or text.replace(".", "").isdigit())
    file = write(tmp_path / "t.toml", f"[{option.section}]\n{option.field} = {json.dumps(text) if quoted else text}\n")
    loaded = [load(company, file), load(company, **{option.env: text}), load(company | {option.name: text})]
    values = [getattr(getattr(config, option.section), option.field) for config in loaded]
    assert values[0] != option.default
    assert values == [values[0]] * 3
    assert [config.source(option.name) for config in loaded] == [f"file {file}", f"env {option.env}", option.typed]


def test_missing_file(tmp_path):
    """A configuration file that was asked for and is not there is an error."""
    with pytest.raises(ConfigError, match="cannot read"):
        load(file=tmp_path / "none.toml")


def test_kubernetes_service_variables_are_not_ours():
    """Variables that Kubernetes injects for a Service named terrace or terrace-x change nothing and are no error."""
    injected = {
        "TERRACE_SERVICE_HOST": "10.0.0.1",
        "TERRACE_SERVICE_PORT": "8000",
        "TERRACE_SERVICE_PORT_HTTP": "8000",
        "TERRACE_PORT": "tcp://10.0.0.1:8000",
        "TERRACE_PORT_8000_TCP_ADDR": "10.0.0.1",
        "TERRACE_CANARY_SERVICE_HOST": "10.0.0.2",
    }
    assert load(**injected) == Config()


def test_empty_variable_is_unset():
    """An empty environment variable counts as not set, as in compose files."""
    assert load(TERRACE_MODEL="", TERRACE_KV__DEVICE_GIB="") == Config()


@pytest.mark.parametrize("kind", ["api_key", "admin_key"])
def test_key_file(kind, tmp_path):
    """Keys come from the file too, without comments and duplicates; a file without keys must not open the daemon."""
    file = write(tmp_path / "keys", "# ours\nalpha # comment\n\nbeta\n")
    config = load({f"server.{kind}_file": str(file), f"server.{kind}s": "alpha"})
    other = {"api_key": "admin_keys", "admin_key": "api_keys"}[kind]
    assert getattr(config.server, f"{kind}s") == ("alpha", "beta")
    assert getattr(config.server, other) == ()
    write(file, "# nobody yet\n")
    with pytest.raises(ConfigError, match=f"server.{kind}_file .* holds no key"):
        load({f"server.{kind}_file": str(file)})


@pytest.mark.parametrize("flag", ["--api-key", "--admin-key"])
def test_keys_are_never_shown(flag, capsys):
    """Neither `config show` nor repr nor an error message prints an API key or an admin key."""
    assert main(["config", "show", flag, "sesame"]) == 0
    assert main(["config", "show", flag, " sesame"]) == 2
    captured = capsys.readouterr()
    field = f"server.{flag[2:].replace('-', '_')}s"
    assert "<1 set>" in captured.out
    assert "sesame" not in captured.out + captured.err + repr(load({field: "sesame"}))


def test_keys_have_weights():
    """An API key weighs 1 unless its entry says otherwise; all sources take KEY and KEY WEIGHT."""
    assert key_weights(load(TERRACE_API_KEYS="a, b 3,c 0.5").server.api_keys) == {"a": 1, "b": 3, "c": 0.5}
    assert key_weights(load({"server.api_keys": ["a  2", "b"]}).server.api_keys) == {"a": 2, "b": 1}
    assert key_weights(["a 2", "a 2.0"]) == {"a": 2}


def test_a_key_file_has_weights(tmp_path):
    """In a key file a weight follows its key after blanks or a tab, before any comment; it joins those of the flags."""
    file = write(tmp_path / "keys", "alpha 3 # paid\nbeta\ngamma\t0.5\n")
    config = load({"server.api_key_file": str(file), "server.api_keys": "delta 2"})
    assert key_weights(config.server.api_keys) == {"alpha": 3, "beta": 1, "gamma": 0.5, "delta": 2}


@pytest.mark.parametrize("source", ["flag", "file"])
@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["sesame x"], "holds an entry that is neither KEY nor KEY WEIGHT"),
        (["sesame 1 2"], "holds an entry that is neither KEY nor KEY WEIGHT"),
        (["sesame 0"], "holds a weight that is not between 0.001 and 1000"),
        (["sesame -1"], "holds a weight that is not between 0.001 and 1000"),
        (["sesame nan"], "holds a weight that is not between 0.001 and 1000"),
        (["sesame inf"], "holds a weight that is not between 0.001 and 1000"),
        (["sesame 2", "other", "sesame 3"], "holds a key twice, with different weights"),
        (["sesame", "sesame 3"], "holds a key twice, with different weights"),
    ],
)
def test_bad_key_weights_are_refused_without_the_key(source, entries, message, tmp_path):
    """A weight that is none is an error at once that says what is wrong and where, and shows no key."""
    file = write(tmp_path / "keys", "\n".join(entries))
    overrides = {"server.api_keys": entries} if source == "flag" else {"server.api_key_file": str(file)}
    with pytest.raises(ConfigError) as caught:
        load(overrides)
    assert message in caught.value.message
    assert caught.value.message.startswith("server.api_key")
    assert "sesame" not in caught.value.message


def test_a_key_has_one_weight_in_all_sources(tmp_path):
    """A key that a flag and the file give different weights is an error, not a guess."""
    file = write(tmp_path / "keys", "sesame 3\n")
    with pytest.raises(ConfigError, match="holds a key twice") as caught:
        load({"server.api_key_file": str(file), "server.api_keys": "sesame"})
    assert "sesame" not in caught.value.message


def test_targets_and_background_by_default():
    """Nothing is promised and nobody refused unless asked for; the background gets short steps and a quarter."""
    knobs = load().scheduler
    assert (knobs.ttft_target_ms, knobs.tpot_target_ms, knobs.refuse_late) == (0, 0, False)
    assert (knobs.background_step_ms, knobs.background_slack, knobs.background_kv_share) == (20, 0.05, 0.25)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"kv.ssd_gib": "4"}, 'kv.ssd_gib = "4" (flag --ssd-gib): needs a directory: set --ssd-path'),
        (
            {"kv.ssd_gib": "4", "kv.ssd_path": "x"},
            'kv.ssd_gib = "4" (flag --ssd-gib): needs a DRAM tier, blocks pass through it on their way to and '
            "from SSD: set --dram-gib, e.g. 1",
        ),
        ({"kv.ssd_path": "x"}, 'kv.ssd_path = "x" (flag --ssd-path): needs a size: set --ssd-gib'),
    ],
)
def test_tiers_rest_on_each_other(overrides, message):
    """A tier that cannot work without another setting is refused at once, with the setting that is missing."""
    with pytest.raises(ConfigError) as caught:
        load(overrides)
    assert caught.value.message == message


def test_three_dials_make_three_tiers():
    """Sizes of the tiers take units, and by default there is only the device."""
    kv = load({"kv.dram_gib": "512MiB", "kv.ssd_gib": "2TiB", "kv.ssd_path": "cache"}).kv
    assert (kv.dram_gib, kv.ssd_gib, kv.ssd_path) == (0.5, 2048.0, Path("cache"))
    assert (load().kv.dram_gib, load().kv.ssd_gib, load().kv.ssd_path) == (0, 0, None)


def test_every_option_is_described_and_unique():
    """Every field has a description, and no two share a flag or an environment variable."""
    assert all(option.description.endswith(".") for option in OPTIONS)
    flags = [flag for option in OPTIONS for flag in option.flags]
    assert len(flags) == len(set(flags))
    assert len({option.env for option in OPTIONS}) == len(OPTIONS)
    assert len(OPTIONS) <= 90


def test_example_file_is_current_and_valid(tmp_path):
    """deploy/config.example.toml is what `terrace config example` prints: as it stands or uncommented, the defaults."""
    text = example_toml()
    shipped = Path(__file__).parents[2] / "deploy" / "config.example.toml"
    assert shipped.read_text(encoding="utf-8") == text
    assert load(file=shipped) == Config()
    fields = {option.field for option in OPTIONS if option.default is not None}
    lines = [line[2:] if line[2:].partition(" =")[0] in fields else line for line in text.splitlines()]
    uncommented = load(file=write(tmp_path / "t.toml", "\n".join(lines)))
    assert uncommented.model_dump() == Config().model_dump()
    assert sum(not line.startswith(("#", "[")) and line != "" for line in lines) == len(fields)


def test_help_lists_common_flags_only(capsys):
    """`serve --help` shows the common flags, `--help-all` every one."""
    helped = {}
    for form in ("--help", "--help-all", "--help=all"):
        with pytest.raises(SystemExit) as caught:
            main(["serve", form])
        assert caught.value.code == 0
        helped[form] = capsys.readouterr().out
    flagged = [option for option in OPTIONS if option.flags]
    shown = [option for option in flagged if f"{option.flags[0]} " in helped["--help"].replace(",", " ")]
    assert {option.name for option in shown} == {option.name for option in flagged if option.common}
    assert all(option.flags[0] in helped["--help-all"] for option in flagged)
    assert helped["--help-all"] == helped["--help=all"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["serve", "--device-gb", "3"], "unknown argument --device-gb; did you mean --device-gib?"),
        (["serve", "demo", "extra"], "unknown argument extra"),
        (["config", "check", "--block-size", "3"], "kv.block_size = '3'"),
        (["config", "check", "--config", "no-such.toml"], "cannot read the configuration file no-such.toml"),
    ],
)
def test_cli_errors_exit_2_in_one_line(argv, message, capsys):
    """An operator's mistake is one line on stderr and exit code 2, without a traceback."""
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("terrace: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_flags_of_other_servers_are_accepted(capsys):
    """Where the meaning is the same, vLLM's flag names work."""
    argv = [
        "--max-model-len",
        "2K",
        "--kv-cache-dtype",
        "fp16",
        "--no-enable-prefix-caching",
        "--scheduling-policy",
        "x",
    ]
    assert main(["config", "show", *argv]) == 0
    shown = {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines()}
    assert shown["model.max_model_len"] == "2048"
    assert shown["kv.kv_dtype"] == '"float16"'
    assert shown["kv.prefix_caching"] == "false"
    assert shown["scheduler.policy"] == '"x"'


def test_help_needs_no_torch():
    """`--help` and `config` answer without importing torch or the web framework."""
    code = (
        "import sys; from server.cli import main; main(['config', 'check']); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'fastapi', 'uvicorn')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0
