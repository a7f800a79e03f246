"""The whole daemon on virtual time: many seeds with faults pass, and the simulation is what it claims to be."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from server.sim.clock import SimFailure, VirtualLoop, run_virtual
from server.sim.oracle import Reference
from server.sim.scenario import Outcome, run_seed
from server.sim.soak import SLACK, run_soak
from server.sim.tiers import KINDS
from server.types import SamplingParams

KEPT = [
    int(line.split()[0]) for line in (Path(__file__).parent / "seeds.txt").read_text().splitlines() if line[0] != "#"
]
SEEDS = range(300)
"""The share that every run of the tests does; `make sim` does more."""


@pytest.fixture(scope="module")
def outcomes() -> dict[int, Outcome | SimFailure]:
    """Every seed's outcome; a failure is kept, so that one bad seed does not hide the others."""
    results: dict[int, Outcome | SimFailure] = {}
    for seed in sorted({*SEEDS, *KEPT}):
        try:
            results[seed] = run_seed(seed)
        except SimFailure as failure:
            results[seed] = failure
    return results


def test_all_seeds_pass(outcomes: dict[int, Outcome | SimFailure]):
    """Whatever fails, stalls, leaves or drains: every answer is that of the request alone, and the books add up."""
    assert [str(outcome) for outcome in outcomes.values() if isinstance(outcome, SimFailure)] == []


def test_seeds_reach_what_they_are_meant_to_reach(outcomes: dict[int, Outcome | SimFailure]):
    """The scenarios are no sunny days: each thing that can go wrong does so in several of them."""
    reached: Counter[str] = Counter()
    for outcome in outcomes.values():
        if isinstance(outcome, Outcome):
            reached.update(name for name, count in outcome.counts.items() if count)
    wanted = [
        "preemptions",
        "evicted_device",
        "evicted_dram",
        "evicted_ssd",
        "device_to_dram",
        "dram_to_ssd",
        "ssd_to_dram",
        "dram_to_device",
        "recovered",
        "kills",
        "restarts",
        "declined_disabled",
        "declined_slower_than_recompute",
        "reported_io",
        "reported_corrupt",
        "reported_no_space",
        "hit_tokens",
        "step_failures",
        "overloaded",
        "not_ready",
    ]
    wanted += ["impatient", "ended_stop", "ended_length", "ended_abort", "ended_error", "ended_closed"]
    wanted += [f"fault_{kind}" for kind in (*KINDS, "rotten")]
    assert {name: reached[name] for name in wanted if reached[name] < 6} == {}


@pytest.mark.parametrize("seed", KEPT[:2])
def test_a_seed_replays_exactly(seed: int):
    """The same seed gives the same scenario to the last count and the last virtual microsecond."""
    assert str(run_seed(seed)) == str(run_seed(seed))


def run(main, cpu_limit_s: float = 1.0):
    return run_virtual(main, VirtualLoop(), cpu_limit_s=cpu_limit_s)


def test_an_hour_without_end_of_clients_and_faults():
    """Nothing grows, and the soak would see what does: ten things held per sample are too many."""
    soak = run_soak(1.0)
    assert soak.outcome.counts["ended_length"] > 500
    assert sum(count for name, count in soak.outcome.counts.items() if name.startswith("fault_")) > 100
    soak.samples = [{"held": 10 * at} for at in range(len(soak.samples))]
    (size,) = soak.sizes()
    assert size.grew
    assert size.largest[1] - size.largest[0] > SLACK


def test_sleeping_costs_no_time():
    """A virtual hour is over at once, and the clock shows it."""

    async def main() -> float:
        await asyncio.sleep(3600)
        return asyncio.get_running_loop().time()

    assert run(main()) == 3600


def test_a_deadlock_is_found_and_named():
    """Nothing ready and no timer: the failure says who waits where."""

    async def main() -> None:
        await asyncio.Event().wait()

    with pytest.raises(SimFailure, match=r"deadlock.*\n.*main"):
        run(main())


def test_an_endless_loop_of_tasks_is_found():
    """Callbacks that call for each other without end are not taken for work."""

    async def main() -> None:
        loop = asyncio.get_running_loop()

        def again() -> None:
            loop.call_soon(again)

        again()
        await asyncio.Event().wait()

    with pytest.raises(SimFailure, match="livelock"):
        run(main(), cpu_limit_s=20)


def test_an_endless_loop_in_one_callback_is_found():
    """Code that never gives the loop back is ended by its CPU time."""

    async def main() -> None:
        while True:
            pass

    with pytest.raises(SimFailure, match="hang"):
        run(main(), cpu_limit_s=0.05)


def test_the_reference_depends_on_everything_before():
    """Change the tenant or any one token, and the answer of the reference model changes."""
    reference, params = Reference(vocab=1_000_000), SamplingParams(max_tokens=3)
    changed = [[9, 2, 3, 4], [1, 9, 3, 4], [1, 2, 9, 4], [1, 2, 3, 9]]
    base = reference.generate("", [1, 2, 3, 4], params).tokens
    others = [
        reference.generate("tenant", [1, 2, 3, 4], params).tokens,
        *(reference.generate("", prompt, params).tokens for prompt in changed),
    ]
    assert base not in others
