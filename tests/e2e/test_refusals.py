"""`terrace serve` that cannot work: one line with what is needed, what there is and what would fit; exit 2."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.daemon import write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


def refused(*arguments: str) -> str:
    """What `terrace serve` says, which must be one line, without a traceback, at exit code 2."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TERRACE_")}
    environ |= {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "server", "serve", *arguments]
    found = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=120, check=False)
    lines = found.stderr.splitlines()
    assert (found.returncode, len(lines), found.stdout) == (2, 1, ""), found.stderr
    assert lines[0].startswith("terrace: error: ")
    return lines[0].removeprefix("terrace: error: ")


def test_a_model_that_does_not_fit(folder: Path) -> None:
    """Needed and available GiB, and the size of the tier that would fit, all of one sum."""
    flags = ("--load-format=dummy", "--port=0", "--device-gib=1", "--dram-gib=100000")
    said = refused(str(folder), *flags)
    numbers = re.search(r"= ([\d.]+) GiB needed, ([\d.]+) GiB available; --dram-gib ([\d.]+) fits", said)
    assert numbers, said
    needed, available, fits = map(float, numbers.groups())
    assert needed == pytest.approx(100001.25, abs=1)
    assert 0 < fits < available < needed
    assert fits == pytest.approx(available - 1.25, abs=0.2)


def test_a_bad_key(tmp_path: Path) -> None:
    """The file, the key and the one that was meant."""
    file = tmp_path / "terrace.toml"
    file.write_text("[kv]\ndevise_gib = 3\n")
    assert refused("demo", "--config", str(file)) == (
        f"unknown key 'kv.devise_gib' in {file}; did you mean 'kv.device_gib'?"
    )


def test_a_busy_port(folder: Path) -> None:
    """Whose address it is, why not, and a port that is free."""
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        said = refused(str(folder), "--load-format=dummy", f"--port={port}")
    found = re.fullmatch(rf"cannot listen on 127\.0\.0\.1:{port}: Address already in use; --port (\d+) is free", said)
    assert found, said
    assert int(found[1]) > port


def test_an_unwritable_ssd_path(tmp_path: Path, folder: Path) -> None:
    """The path, why not, and as whom; known before weights are read."""
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "kv"
    flags = ("--port=0", "--device-gib=0.01", "--dram-gib=0.01", "--ssd-gib=0.1", f"--ssd-path={path}")
    said = refused(str(folder), "--load-format=dummy", *flags)
    assert said == (
        f"cannot write to {path} for the SSD tier: Not a directory; give user {os.geteuid()} a directory that it may "
        "write, or name another --ssd-path"
    )


def test_a_missing_model(folder: Path) -> None:
    """What is not there, and what may have been meant; a hub id says how to fetch it."""
    near = folder.parent / "tinny"
    assert refused(str(near), "--port=0") == (
        f"model '{near}' is neither a folder nor a hub id of the form owner/name; did you mean '{folder}'?"
    )
    assert "hf download nobody/nothing" in refused("nobody/nothing", "--port=0")
