"""What fits in memory and on disk, and what is said when it does not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from server.errors import ConfigError
from server.room import GIB, SPARE_BYTES, available_bytes, check_disk, check_dram, check_memory, disk_gib, taking

WEIGHTS = {"--dtype float32": 16 * GIB, "--dtype bfloat16": 8 * GIB}


def said(available_gib: float, dtype: str = "--dtype float32", **tiers: float) -> str:
    """What is said of tiers that are asked for; empty where all fits."""
    flags = {f"--{name}-gib": size for name, size in tiers.items()}
    try:
        check_memory("m", WEIGHTS, dtype, flags, int(available_gib * GIB), SPARE_BYTES)
    except ConfigError as error:
        return error.message
    return ""


def test_what_fits_is_let_through() -> None:
    """Up to the last byte, and where nothing is known of memory."""
    spare = SPARE_BYTES / GIB
    assert said(18 + spare, device=1, dram=1) == ""
    assert said(18 + spare - 0.001, device=1, dram=1) != ""
    check_memory("m", WEIGHTS, "--dtype float32", {"--device-gib": 1e6}, None, SPARE_BYTES)


@pytest.mark.parametrize(
    ("available_gib", "tiers", "advice"),
    [
        (20.25, {"device": 2, "dram": 8}, "--dram-gib 2 fits"),
        (17.25, {"device": 2, "dram": 8}, "--device-gib 1 --dram-gib 0 fits"),
        (17.25, {"device": 2, "dram": 0}, "--device-gib 1 fits"),
        (16.0, {"device": 2, "dram": 0}, "--dtype bfloat16 leaves room: 8 GiB of weights"),
        (4.0, {"device": 2, "dram": 0}, "take a smaller model or a larger machine"),
    ],
)
def test_the_nearest_that_fits_is_named_and_fits(available_gib: float, tiers: dict[str, float], advice: str) -> None:
    """DRAM gives way first, then the device tier, then precision; whoever takes the advice is let in."""
    message = said(available_gib, **tiers)
    assert message.endswith(f"{available_gib:.3g} GiB available; {advice}")
    assert f"weights 16 GiB with --dtype float32 + --device-gib {tiers['device']}" in message
    words = advice.split()
    taken = {words[i][2:-4]: float(words[i + 1]) for i in range(0, len(words) - 1, 2) if words[i].endswith("-gib")}
    if taken:
        assert said(available_gib, **(tiers | taken)) == ""
    if words[0] == "--dtype":
        assert said(available_gib, " ".join(words[:2]), device=0.01) == ""


def test_dram_beyond_memory_is_refused() -> None:
    """Where only the DRAM tier is in host memory, what fits is named, and fits."""
    with pytest.raises(ConfigError, match=r"dram_gib 8 does not fit: 4 GiB are available; --dram-gib 4 fits"):
        check_dram(8, 4 * GIB + SPARE_BYTES)
    check_dram(4, 4 * GIB + SPARE_BYTES)
    check_dram(1e6, None)


def test_memory_is_what_machine_and_group_leave(tmp_path: Path) -> None:
    """The lesser of both; cached pages of files count as left, and without a limit only the machine does."""

    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    assert available_bytes(tmp_path) is None
    write("proc/meminfo", "MemTotal: 100 kB\nMemAvailable:   64 kB\nHugePages_Total: 0\n")
    assert available_bytes(tmp_path) == 64 * 1024
    write("proc/self/cgroup", "4:memory:/old\n0::/pods/one\n")
    write("sys/fs/cgroup/pods/one/memory.max", "40000\n")
    write("sys/fs/cgroup/pods/one/memory.current", "30000\n")
    write("sys/fs/cgroup/pods/one/memory.stat", "anon 1\ninactive_file 5000\n")
    assert available_bytes(tmp_path) == 15000
    write("sys/fs/cgroup/pods/one/memory.max", "max\n")
    assert available_bytes(tmp_path) == 64 * 1024
    write("proc/self/cgroup", "0::/elsewhere\n")  # as a container sees it, whose root this is
    write("sys/fs/cgroup/memory.max", "7000")
    write("sys/fs/cgroup/memory.current", "9000")
    assert available_bytes(tmp_path) == 0


def test_memory_is_known_here() -> None:
    """On Linux the daemon knows what it may take."""
    found = available_bytes()
    assert found is not None
    assert 0 < found < 2**50


def test_a_disk_that_is_too_small_is_told_at_the_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Needed, there, and what fits, with what stays free taken off; what it advises is not warned of."""
    size_gib = disk_gib(tmp_path)
    check_disk(tmp_path / "new", size_gib, 1.0)
    found = re.search(r"GiB needed, .* GiB in all; --ssd-gib ([\d.]+) fits", caplog.text)
    assert found
    fits = float(found[1])
    assert fits == pytest.approx(size_gib - 1, abs=0.011)
    caplog.clear()
    check_disk(tmp_path / "new", fits, 1.0)
    assert not caplog.text
    assert list((tmp_path / "new").iterdir()) == []


def test_memory_that_the_system_refuses_is_one_line() -> None:
    """A limit that was not looked at is told by the setting to lower."""
    with (
        pytest.raises(
            ConfigError, match="cannot take the memory of dram_gib 2: Cannot allocate memory; lower --dram-gib"
        ),
        taking("dram_gib", 2),
    ):
        raise OSError(12, "Cannot allocate memory")
