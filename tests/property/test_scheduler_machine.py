"""The scheduler keeps its promises under any order of calls: budget, one place each, progress, honest refusals."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from tests.property.scheduler_machine import SchedulerMachine

FEW = settings(max_examples=300, stateful_step_count=40)


def test_any_order_of_calls_keeps_the_promises():
    """Submits, aborts, steps, failed steps and transfers in any order break no invariant, and every request ends."""
    run_state_machine_as_test(SchedulerMachine, settings=FEW)


@pytest.mark.nightly
def test_any_order_of_calls_keeps_the_promises_for_long():
    """The same with many more and longer histories."""
    run_state_machine_as_test(SchedulerMachine, settings=settings(max_examples=4000, stateful_step_count=80))
