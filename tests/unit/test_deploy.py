"""What deploy/ and the Dockerfile say agrees with what the daemon does."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from server.cli import main
from server.config import OPTIONS, Config, load_config
from server.metrics.families import FAMILIES, FAULTS, PREFIX, REJECTIONS, STALLS, STARTUP
from server.process import END_MARGIN_S

ROOT = Path(__file__).resolve().parents[2]
FILES = ("Dockerfile", "deploy/compose.yaml", "deploy/terrace.service", "deploy/kubernetes/base/statefulset.yaml")
HADOLINT = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))


def _text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", FILES)
def test_every_variable_is_one_that_the_daemon_reads(name):
    """No file sets a TERRACE_ variable that would stop the daemon as unknown."""
    found = set(re.findall(r"TERRACE_[A-Z_]+", (ROOT / name).read_text(encoding="utf-8")))
    assert found
    load_config(environ=dict.fromkeys(found - {"TERRACE_CONFIG"}, "1"))


def test_supervisors_wait_longer_than_the_drain():
    """Compose and systemd leave the daemon more time to stop than it takes by default, flush and closing included."""
    compose = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text(encoding="utf-8"))
    grace = re.fullmatch(r"(\d+)s", compose["services"]["terrace"]["stop_grace_period"])
    unit = re.search(r"^TimeoutStopSec=(\d+)$", (ROOT / "deploy/terrace.service").read_text(encoding="utf-8"), re.M)
    assert grace
    assert unit
    settings = Config()
    longest_s = settings.server.shutdown_timeout_s + settings.kv.drain_flush_s + END_MARGIN_S
    assert min(int(grace[1]), int(unit[1])) > longest_s


def test_every_command_line_parses(capsys):
    """The commands in the unit file and in the image are ones that the command line knows."""
    unit = (ROOT / "deploy/terrace.service").read_text(encoding="utf-8")
    commands = re.findall(r"^Exec\w+=\S+/terrace (.+)$", unit, re.M)
    assert len(commands) == 2
    for command in commands:
        verb = command.split()[0]
        arguments = command.replace("/etc/terrace/terrace.toml", str(ROOT / "deploy/config.example.toml")).split()
        shown = ["config", "check", *arguments[1:]] if verb == "serve" else arguments
        assert main(shown) == 0, command
    assert 'CMD ["serve", "demo"]' in (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert capsys.readouterr().err == ""


def test_systemd_is_told_and_feeds_the_watchdog():
    """The unit says what the daemon does: it notifies, is watched, may pin memory, and writes only where it may."""
    unit = dict(
        line.split("=", 1) for line in _text("deploy/terrace.service").splitlines() if "=" in line and line[0] != "#"
    )
    assert (unit["Type"], unit["NotifyAccess"], unit["Restart"]) == ("notify", "main", "on-failure")
    assert (unit["LimitMEMLOCK"], unit["ProtectSystem"]) == ("infinity", "strict")
    assert {"WatchdogSec", "StateDirectory", "CacheDirectory", "IOWeight", "TimeoutStopSec"} <= unit.keys()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze")
def test_systemd_knows_every_line_of_the_unit(tmp_path):
    """`systemd-analyze verify` has nothing to say of the unit, but that the command is not installed here."""
    unit = tmp_path / "terrace.service"
    unit.write_text(_text("deploy/terrace.service").replace("/opt/terrace/bin/terrace", "/bin/true"))
    found = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    said = [line for line in found.stderr.splitlines() if "terrace" in line]
    assert said == []


# --- the image -------------------------------------------------------------------------------------------------------


def _stages() -> dict[str, list[str]]:
    """Instructions of the Dockerfile by stage, continued lines joined, comments left out."""
    lines = [line for line in _text("Dockerfile").splitlines() if not line.lstrip().startswith("#")]
    text = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    stages: dict[str, list[str]] = {}
    for line in filter(None, text.splitlines()):
        if line.startswith("FROM "):
            stages[line.split()[-1]] = []
        list(stages.values())[-1].append(line)
    return stages


def test_the_image_runs_as_somebody_who_is_not_root():
    """A numbered user with a name and a home that it may write; both images are that, and the default is the CPU's."""
    stages = _stages()
    runtime = "\n".join(stages["runtime"])
    assert re.search(r"useradd --uid 10001 .*--home-dir /var/lib/terrace --create-home", runtime)
    assert "\nUSER 10001:10001\n" in runtime
    assert "HOME=/var/lib/terrace" in runtime
    assert list(stages)[-1] == "cpu"
    for name in ("cpu", "cuda"):
        assert stages[name][0] == f"FROM runtime AS {name}"
        assert f"COPY --from=build-{name} /opt/terrace /opt/terrace" in stages[name]
        assert not any(line.startswith("USER") for line in stages[name])


def test_the_image_starts_the_daemon_itself_and_asks_whether_it_lives():
    """No shell between the signal and the daemon; health is liveness, with time for a slow start."""
    (entry,) = (line for line in _stages()["runtime"] if line.startswith("ENTRYPOINT"))
    assert entry == 'ENTRYPOINT ["terrace"]'
    (health,) = (line for line in _stages()["runtime"] if line.startswith("HEALTHCHECK"))
    assert "--start-period=10m" in health
    command = json.loads(health.partition(" CMD ")[2])
    assert command[0] == "python"
    compile(command[2], "HEALTHCHECK", "exec")
    assert "/livez" in command[2]


def test_the_image_is_made_of_files_that_are_there():
    """What is copied exists, and is not left out by .dockerignore."""
    ignored = set(_text(".dockerignore").split())
    for line in (line for lines in _stages().values() for line in lines if line.startswith("COPY ")):
        for source in line.split()[1:-1]:
            if not line.startswith("COPY --from"):
                assert (ROOT / source).exists(), source
                assert source not in ignored


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed: pip install '.[deploy]'")
def test_hadolint_finds_nothing():
    """The Dockerfile is linted."""
    assert HADOLINT is not None
    found = subprocess.run([HADOLINT, str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert (found.stdout, found.returncode) == ("", 0)


# --- the runbook -----------------------------------------------------------------------------------------------------


def test_every_alert_has_its_section_in_the_runbook():
    """One section per alert, no other, each with meaning, place and deed; the anchor that the alert carries leads
    there, and so does every link between sections."""
    text = _text("deploy/RUNBOOK.md")
    sections = dict(re.findall(r"^### (\w+)\n(.*?)(?=^### |\Z)", text, re.M | re.S))
    rules = yaml.safe_load(_text("deploy/prometheus/rules/alerts.yaml"))
    alerts = {rule["alert"]: rule for group in rules["groups"] for rule in group["rules"]}
    assert list(sections) == list(alerts)
    anchors = {name.lower() for name in sections}
    for name, body in sections.items():
        assert re.findall(r"^\*\*(\w[\w ]*)\.\*\*", body, re.M) == ["Means", "Look at", "Do"], name
        file, _, anchor = alerts[name]["annotations"]["runbook"].partition("#")
        assert (ROOT / "deploy" / file).is_file()
        assert anchor == name.lower()
    assert set(re.findall(r"\(#(\w+)\)", text)) <= anchors


def test_the_runbook_names_settings_metrics_and_commands_that_are():
    """Every setting, family and subcommand in it exists."""
    text = _text("deploy/RUNBOOK.md")
    families = {PREFIX + name for name in FAMILIES}
    assert set(re.findall(r"`(terrace_\w+)", text)) <= families
    flags = {flag for option in OPTIONS for flag in option.flags} | {"--all", "--sweep", "--config"}
    assert set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", text)) <= flags
    fields = {option.field for option in OPTIONS}
    words = set(re.findall(r"`(\w+_\w+)(?: = [^`]+)?`", text)) - families
    others = {*STALLS, *REJECTIONS, *STARTUP, *FAULTS, "service_tier", "HF_HOME"}
    assert words - fields - others == set()
