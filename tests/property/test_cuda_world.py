"""The device tier of a CUDA device keeps its promises on the worst legal device; and the net is known to catch."""

from __future__ import annotations

import asyncio
import ctypes
import shutil
import subprocess
from pathlib import Path
from random import Random
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.kernels import copy, native
from server.kvcache.tiers import cuda
from tests.property.cuda_world import Act, CudaWorld, Step
from tests.sim.planted import Bug, plant
from tests.system.ssd_store import BLOCK_BYTES

STEPS = st.lists(
    st.tuples(st.sampled_from(get_args(Act)), st.integers(1, 5), st.integers(0, 2**16)), min_size=10, max_size=50
)
SIZES = ((4, 3.0), (4, 1.0), (1, 2.0), (4, 0.4))
"""Blocks of a job and of a burst: several bursts of several blocks, of one, half empty ones, a block in pieces."""
FEW, SEARCH = 60, 40
WORLD = "cuda world"
TIER = "kvcache.tiers.cuda:CudaTier"
BUGS = [
    Bug(
        "the label is not looked at",
        f"{TIER}._onboard",
        "self._host.digest_of(move.host, move.hash)",
        "(self._host._labels[move.host] or (b'', bytes(16)))[1]",
        (WORLD,),
    ),
    Bug(
        "a refused block counts as landed",
        f"{TIER}._onboard",
        'self._host.refuse("payload", moves[i].host)',
        "None",
        (WORLD,),
    ),
    Bug(
        "states go to other blocks than those that have a label",
        f"{TIER}._onboard",
        "zip(known, moved.states, strict=True)",
        "enumerate(moved.states)",
        (WORLD,),
    ),
    Bug(
        "a block is labelled before it came",
        f"{TIER}._spill",
        "self._host.expect_nothing(move.host)",
        "self._host.label(move.host, move.hash)",
        (WORLD,),
    ),
    Bug("what was left behind is labelled", f"{TIER}._spill", "if state == MOVED:", "if True:", (WORLD,)),
    Bug("all blocks have the checksum of the first", f"{TIER}._spill", "digest(i)", "digest(0)", (WORLD,)),
    Bug("a failed onboard counts as landed", f"{TIER}._onboard", 'TierFault("io", str(moved.error))', "None", (WORLD,)),
    Bug("a failed spill counts as landed", f"{TIER}._spill", 'TierFault("io", str(moved.error))', "None", (WORLD,)),
    Bug(
        "a refused block takes its neighbours' outcomes",
        f"{TIER}._onboard",
        "return outcomes",
        "return sorted(outcomes, key=bool)",
        (WORLD,),
    ),
    Bug(
        "device frames are as far apart as host frames",
        f"{TIER}._device_ends",
        "self._host.block_bytes",
        "self._host.stride",
        (WORLD,),
    ),
    Bug("memory stays pinned", f"{TIER}._close", "self._host.unregister()", "pass", (WORLD,)),
]
SOURCE = Path(native.__file__).parent / "transfer.c"
NATIVE_BUGS: dict[str, list[tuple[str, str]]] = {
    "blocks are not checked": [("memcmp(digest, job->digests + i * DIGEST, DIGEST)", "0")],
    "a refused block is copied": [("                continue;\n", "")],
    "a refused block shifts the targets of others": [("= job->targets[i];", "= job->targets[first + good];")],
    "nobody waits for the copies": [("code = link->wait(link->events[lane]);", "code = 0;")],
    "the wait is for what was recorded before": [
        ("code = link->record(link->events[lane], link->stream);", "code = 0;")
    ],
    "an error is swallowed": [("lock);\n    return code;", "lock);\n    return 0;")],
    "nobody waits after an error": [("if (code) link->sync(link->stream);", "")],
    "more bursts are in flight than lanes": [
        ("if (!pthread_mutex_trylock(&link->locks[i].lock)) return i;", "return i;"),
        ("pthread_mutex_unlock(&link->locks[lane].lock);", ""),
    ],
    "all pieces of a block go to its start": [("*targets + (uint64_t)at", "*targets")],
    "the last piece is as long as the others": [("least(job->burst, job->bytes - at)", "job->burst")],
    "what went up before an error is not told from the rest": [("i < end && !code; i++)", "i < end; i++)")],
    "what came down before an error is not told from the rest": [("i < first + count && !code;", "i < first + count;")],
    "checksums are taken before the copies": [
        ("terrace_sum((const void *)(uintptr_t)job->targets[i], job->bytes, job->digests + i * DIGEST);", ""),
        (
            "        code = carry_blocks(link, job, job->targets + first",
            "        for (int64_t i = first; i < first + count; i++)\n"
            "            terrace_sum((const void *)job->targets[i], job->bytes, job->digests + i * DIGEST);\n"
            "        code = carry_blocks(link, job, job->targets + first",
        ),
    ],
}
"""Name -> what is right in transfer.c, and what is wrong; in place of all that is so."""


def plant_natively(name: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Copies go through a library that is built with this bug; checksums are those of the real one."""
    compiler, library = shutil.which("cc"), native.load()
    if compiler is None or library is None:
        pytest.skip("needs a C compiler")
    text = SOURCE.read_text()
    for right, wrong in NATIVE_BUGS[name]:
        assert right in text, f"{right!r} is not in {SOURCE.name} any more: write the bug anew"
        text = text.replace(right, wrong)
    (folder / SOURCE.name).write_text(text)
    command = [compiler, "-w", "-shared", "-fPIC", f"-I{SOURCE.parent}", "-o", "wrong.so", SOURCE.name, library._name]
    subprocess.run(command, cwd=folder, check=True)
    planted = ctypes.CDLL(str(folder / "wrong.so"))
    for function in ("terrace_up", "terrace_down"):
        getattr(planted, function).argtypes = native.CODES[function]
    planted.terrace_link.argtypes = native.FUNCTIONS["terrace_link"]
    patch.setattr(copy, "load", lambda: planted)


def play(size: tuple[int, float], steps: list[Step]) -> None:
    job_bytes, burst_bytes = (int(blocks * BLOCK_BYTES) for blocks in size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "JOB_BYTES", job_bytes)
        patch.setattr(cuda, "BURST_UP_BYTES", burst_bytes)
        patch.setattr(cuda, "BURST_DOWN_BYTES", burst_bytes)
        asyncio.run(CudaWorld(burst_bytes).run(steps))


@settings(max_examples=FEW)
@given(st.sampled_from(SIZES), STEPS)
def test_every_success_is_true_and_nothing_moves_after_a_call(size: tuple[int, float], steps: list[Step]):
    """Calls, cancellations, copies in any order, failures and spoilt blocks: no wrong byte is trusted, none is late."""
    play(size, steps)


@pytest.mark.nightly
@settings(max_examples=3000)
@given(st.sampled_from(SIZES), STEPS)
def test_every_success_is_true_for_long(size: tuple[int, float], steps: list[Step]):
    """The same with many more histories."""
    play(size, steps)


def promise_broken() -> bool:
    """Does a fixed search find acts after which the tier broke a promise?"""
    for seed in range(SEARCH):
        random = Random(seed)
        acts = random.choices(get_args(Act), (6, 4, 1, 6, 6, 1, 6, 1, 1, 2), k=40)
        steps = [(act, random.randint(1, 5), random.randrange(2**16)) for act in acts]
        try:
            play(SIZES[seed % len(SIZES)], steps)
        except AssertionError:
            return True
    return False


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_planted_bug_is_caught(bug: Bug, monkeypatch: pytest.MonkeyPatch):
    """With one line of the tier wrong, the promise that it breaks is seen to be broken."""
    plant(bug, monkeypatch)
    assert promise_broken(), f"nobody notices that {bug.name}"


@pytest.mark.parametrize("name", NATIVE_BUGS)
def test_native_planted_bug_is_caught(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The same with something wrong in the native library."""
    plant_natively(name, tmp_path, monkeypatch)
    assert promise_broken(), f"nobody notices that {name}"


def test_the_fixed_search_passes_without_a_bug():
    """What is caught is the bug and not the search."""
    assert not promise_broken()
