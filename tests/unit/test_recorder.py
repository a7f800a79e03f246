"""The recording of requests: what it tells, what it does not, how large it gets, and what a bad disk does to it."""

from __future__ import annotations

import json
import os
import stat
from array import array
from pathlib import Path
from typing import Any

import pytest

from loadgen.prompts import IdPrompter
from loadgen.workload import make_workload
from server import recorder as recording
from server.recorder import Ended, Recorder

ROOM = 2**20


def _ended(prompt: list[int], at_s: float = 1.0, generated: int = 3, root: bytes = b"root") -> Ended:
    return Ended(at_s, root, array("i", prompt), generated)


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _recorded(path: Path, *requests: Ended, room: int = ROOM) -> Recorder:
    recorder = Recorder(path, room, 4, 0.5)
    for ended in requests:
        recorder.record(ended)
    recorder.close()
    return recorder


def test_a_line_has_times_lengths_and_a_number_per_block(tmp_path: Path):
    """Equal prefixes have equal numbers, up to where they differ; a part of a block counts as one."""
    path = tmp_path / "trace"
    _recorded(path, _ended([*range(10)], 1.25), _ended([*range(8), 99], 2.0, 0))
    first, second = _rows(path)
    assert {key: first[key] for key in first if key != "hash_ids"} == {
        "timestamp": 750, "input_length": 10, "output_length": 3, "block_tokens": 4,
    }  # fmt: skip
    assert len(first["hash_ids"]) == len(second["hash_ids"]) == 3
    assert first["hash_ids"][:2] == second["hash_ids"][:2]
    assert first["hash_ids"][2] != second["hash_ids"][2]
    assert len({*first["hash_ids"]}) == 3
    assert second["output_length"] == 0


def test_numbers_tell_nobody_what_was_asked(tmp_path: Path):
    """A prompt has other numbers in another tenant's requests and in another process; only the owner may read."""
    paths = [tmp_path / name for name in "ab"]
    for path in paths:
        _recorded(path, _ended([1, 2, 3, 4]), _ended([1, 2, 3, 4], root=b"another"))
    ids = [row["hash_ids"][0] for path in paths for row in _rows(path)]
    assert len(set(ids)) == 4
    assert all(0 <= value < 2**53 for value in ids)
    assert stat.S_IMODE(paths[0].stat().st_mode) == 0o600


def test_a_full_file_moves_aside_and_no_more_than_two_stay(tmp_path: Path):
    """Never more than twice the limit; the newest requests are kept, and every line is whole."""
    path, room = tmp_path / "trace", 1000
    _recorded(path, *(_ended([n, n], at_s=float(n)) for n in range(100)), room=room)
    assert {entry.name for entry in tmp_path.iterdir()} == {"trace", "trace.1"}
    assert all(entry.stat().st_size <= room for entry in tmp_path.iterdir())
    times = [row["timestamp"] for name in ("trace.1", "trace") for row in _rows(tmp_path / name)]
    assert times[-1] == 98_500
    assert times == list(range(times[0], 99_000, 1000))


def test_a_start_keeps_what_the_run_before_recorded(tmp_path: Path):
    """It moves aside; starts that record nothing do not push it out."""
    path = tmp_path / "trace"
    _recorded(path, _ended([1]))
    for _ in range(3):
        _recorded(path)
    assert len(_rows(tmp_path / "trace.1")) == 1
    assert path.read_text() == ""


def test_what_cannot_be_written_is_counted_and_leaves_no_half_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """A disk that takes half a line, then nothing, then recovers: two are left out, one warning, all lines whole."""
    real, fates = os.write, iter([None, "half", "full", None])

    def write(file: int, data: bytes) -> int:
        fate = next(fates)
        if fate == "full":
            raise OSError(28, "No space left on device")
        return real(file, data[: len(data) // 2] if fate == "half" else data)

    recorder = Recorder(tmp_path / "trace", ROOM, 4, 0.0)
    monkeypatch.setattr(recording.os, "write", write)
    for n in range(4):
        recorder.record(_ended([n], at_s=float(n)))
    recorder.close()
    assert [row["timestamp"] for row in _rows(tmp_path / "trace")] == [0, 3000]
    assert recorder.outcomes == {"written": 2, "dropped": 2}
    assert len(caplog.records) == 1


def test_a_disk_that_does_not_answer_delays_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Beyond QUEUED_MAX requests are dropped at once; the end of the process waits a bounded time."""
    import threading

    stalled = threading.Event()
    recorder = Recorder(tmp_path / "trace", ROOM, 4, 0.0)
    monkeypatch.setattr(recording, "CLOSE_S", 0.05)
    monkeypatch.setattr(recording.os, "write", lambda file, data: stalled.wait() and len(data))
    for n in range(recording.QUEUED_MAX + 10):
        recorder.record(_ended([n]))
    assert 9 <= recorder.outcomes["dropped"] <= 10
    recorder.close()
    stalled.set()


@pytest.mark.parametrize("kind", ["folder", "link", "nowhere"])
def test_only_a_regular_file_is_recorded_to(tmp_path: Path, kind: str):
    """A folder, a link or a missing folder is refused before anything is moved."""
    path = tmp_path / "trace"
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("/dev/null")
    else:
        path = tmp_path / "nowhere" / "trace"
    with pytest.raises(OSError, match=r"."):
        Recorder(path, ROOM, 4, 0.0)


def test_a_recording_is_replayed_in_the_order_of_arrival(tmp_path: Path):
    """The load generator reads it as a trace: lengths, gaps and shared prefixes as recorded, sorted by arrival."""
    path = tmp_path / "trace"
    _recorded(path, _ended([*range(10)], 5.0), _ended([*range(8), 99], 2.0, 0), _ended([7] * 5, 3.0))
    sessions = list(make_workload("mooncake", {"path": str(path)}).sessions(IdPrompter(0, 1000), 0))
    assert [session.start_s for session in sessions] == [0.0, 1.0, 3.0]
    prompts = [session.turns[0].prompt for session in sessions]
    assert [len(prompt) for prompt in prompts] == [9, 5, 10]
    assert prompts[0][:8] == prompts[2][:8]
    assert [session.turns[0].output_tokens for session in sessions] == [1, 3, 3]
