"""The KV manager keeps its books and its bytes right under any order of calls, faults included."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from tests.property.kv_machine import KVMachine

FEW = settings(max_examples=300, stateful_step_count=40)


def test_any_order_of_calls_keeps_books_and_bytes():
    """Admissions, steps, seals, releases, transfers and faults in any order break no invariant and no byte."""
    run_state_machine_as_test(KVMachine, settings=FEW)


@pytest.mark.nightly
def test_any_order_of_calls_keeps_books_and_bytes_for_long():
    """The same with many more and longer histories."""
    run_state_machine_as_test(KVMachine, settings=settings(max_examples=4000, stateful_step_count=80))
