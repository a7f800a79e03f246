"""The nets are known to catch: each planted bug is found by those that must find it, within a bounded search.

That the same seeds and machines pass without a planted bug is what `test_simulation.py` and `tests/property` show.
"""

from __future__ import annotations

import contextlib
import io

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from server.sim.clock import SimFailure, cpu_limit
from server.sim.scenario import run_seed
from tests.property.kv_machine import KVMachine
from tests.property.scheduler_machine import SchedulerMachine
from tests.sim.planted import BUGS, KV, SIM, STEPS, Bug, plant
from tests.sim.test_simulation import SEEDS

SEARCH = settings(
    max_examples=400,
    stateful_step_count=40,
    phases=(Phase.generate,),
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
"""A fixed search that stops at the first failure and does not shrink it."""


def simulation_passes() -> bool:
    for seed in SEEDS:
        try:
            run_seed(seed, cpu_limit_s=1.0)
        except SimFailure:
            return False
    return True


def machine_passes(machine: type[RuleBasedStateMachine]) -> bool:
    try:
        with contextlib.redirect_stdout(io.StringIO()), cpu_limit(60):
            run_state_machine_as_test(machine, settings=SEARCH)
    except Exception:  # noqa: BLE001 - any error of any kind is the net's answer
        return False
    return True


NETS = {
    SIM: simulation_passes,
    KV: lambda: machine_passes(KVMachine),
    STEPS: lambda: machine_passes(SchedulerMachine),
}


@pytest.mark.parametrize(
    ("bug", "net"), [(bug, net) for bug in BUGS for net in bug.nets], ids=lambda v: getattr(v, "name", v)
)
def test_planted_bug_is_caught(bug: Bug, net: str, monkeypatch: pytest.MonkeyPatch):
    """With one line of the core wrong, the net that must see it does."""
    plant(bug, monkeypatch)
    assert not NETS[net](), f"{net} does not notice that {bug.name}"


@pytest.mark.parametrize("net", [KV, STEPS])
def test_the_fixed_search_passes_without_a_bug(net: str):
    """What the machines catch is the bug and not the search."""
    assert NETS[net]()


def test_there_are_bugs_enough():
    """Each net is tried by several, all different."""
    assert len({bug.name for bug in BUGS}) == len(BUGS) >= 20
    assert all(sum(net in bug.nets for bug in BUGS) >= 5 for net in NETS)
