"""What deploy/ and the Dockerfile say agrees with what the daemon does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from server.cli import main
from server.config import Config, load_config

ROOT = Path(__file__).resolve().parents[2]
FILES = ("Dockerfile", "deploy/compose.yaml", "deploy/terrace.service")


@pytest.mark.parametrize("name", FILES)
def test_every_variable_is_one_that_the_daemon_reads(name):
    """No file sets a TERRACE_ variable that would stop the daemon as unknown."""
    found = set(re.findall(r"TERRACE_[A-Z_]+", (ROOT / name).read_text(encoding="utf-8")))
    assert found
    load_config(environ=dict.fromkeys(found - {"TERRACE_CONFIG"}, "1"))


def test_supervisors_wait_longer_than_the_drain():
    """Compose and systemd leave the daemon more time to stop than it takes by default."""
    compose = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text(encoding="utf-8"))
    grace = re.fullmatch(r"(\d+)s", compose["services"]["terrace"]["stop_grace_period"])
    unit = re.search(r"^TimeoutStopSec=(\d+)$", (ROOT / "deploy/terrace.service").read_text(encoding="utf-8"), re.M)
    assert grace
    assert unit
    assert min(int(grace[1]), int(unit[1])) > Config().server.shutdown_timeout_s


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
