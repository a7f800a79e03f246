"""The device tier of a CUDA device keeps its promises on the worst legal device; and the net is known to catch."""

from __future__ import annotations

import asyncio
from random import Random
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.kvcache.tiers import cuda
from tests.property.cuda_world import Act, CudaWorld, Step
from tests.sim.planted import Bug, plant
from tests.system.ssd_store import BLOCK_BYTES

STEPS = st.lists(
    st.tuples(st.sampled_from(get_args(Act)), st.integers(1, 5), st.integers(0, 2**16)), min_size=10, max_size=50
)
JOB_BYTES = (4 * BLOCK_BYTES, BLOCK_BYTES, 1600)
"""Several blocks go as one, or one, or a block in pieces."""
FEW, SEARCH = 60, 40
WORLD = "cuda world"
TIER = "kvcache.tiers.cuda:CudaTier"
BUGS = [
    Bug("an onboard returns when its copies are enqueued", f"{TIER}._onboard", ".wait()", "", (WORLD,)),
    Bug("a spill returns when its copies are enqueued", f"{TIER}._spill", ".wait()", "", (WORLD,)),
    Bug(
        "host bytes are not verified",
        f"{TIER}._onboard",
        "self._host.verify(move.host, move.hash)",
        "None",
        (WORLD,),
    ),
    Bug(
        "only the label is verified",
        "kvcache.host:HostArena.verify",
        "checksum(self.view(frame)) == digest",
        "True",
        (WORLD,),
    ),
    Bug(
        "a block is labelled before it came",
        f"{TIER}._spill",
        "self._host.expect_nothing(move.host)",
        "self._host.label(move.host, move.hash)",
        (WORLD,),
    ),
    Bug("a failed onboard counts as landed", f"{TIER}._onboard", 'TierFault("io", str(error))', "None", (WORLD,)),
    Bug("a failed spill counts as landed", f"{TIER}._spill", 'TierFault("io", str(error))', "None", (WORLD,)),
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
    Bug("the pieces of a block all go to its start", f"{TIER}._host_ends", " + start", "", (WORLD,)),
    Bug("spills are not throttled", f"{TIER}._spill", "with self._one_spill:", "if True:", (WORLD,)),
    Bug("memory stays pinned", f"{TIER}._close", "self._host.unregister()", "pass", (WORLD,)),
]


def play(job_bytes: int, steps: list[Step]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "JOB_BYTES", job_bytes)
        asyncio.run(CudaWorld(job_bytes).run(steps))


@settings(max_examples=FEW)
@given(st.sampled_from(JOB_BYTES), STEPS)
def test_every_success_is_true_and_nothing_moves_after_a_call(job_bytes: int, steps: list[Step]):
    """Calls, cancellations, copies in any order, failures and spoilt blocks: no wrong byte is trusted, none is late."""
    play(job_bytes, steps)


@pytest.mark.nightly
@settings(max_examples=3000)
@given(st.sampled_from(JOB_BYTES), STEPS)
def test_every_success_is_true_for_long(job_bytes: int, steps: list[Step]):
    """The same with many more histories."""
    play(job_bytes, steps)


def promise_broken() -> bool:
    """Does a fixed search find acts after which the tier broke a promise?"""
    for seed in range(SEARCH):
        random = Random(seed)
        acts = random.choices(get_args(Act), (6, 2, 1, 6, 6, 1, 6, 1, 1, 2), k=40)
        steps = [(act, random.randint(1, 5), random.randrange(2**16)) for act in acts]
        try:
            play(JOB_BYTES[seed % len(JOB_BYTES)], steps)
        except AssertionError:
            return True
    return False


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_planted_bug_is_caught(bug: Bug, monkeypatch: pytest.MonkeyPatch):
    """With one line of the tier wrong, the promise that it breaks is seen to be broken."""
    plant(bug, monkeypatch)
    assert promise_broken(), f"nobody notices that {bug.name}"


def test_the_fixed_search_passes_without_a_bug():
    """What is caught is the bug and not the search."""
    assert not promise_broken()
