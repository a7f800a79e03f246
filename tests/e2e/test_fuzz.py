"""Bad input is answered, never obeyed and never fatal: random bodies, and the OpenAPI document taken at its word."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.e2e.daemon import Served, ServerThread, fuzz_config
from tests.e2e.fuzz import storm, storms

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
BOUNDED = settings(
    max_examples=40,
    derandomize=True,
    deadline=None,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def target(model_folder: Path) -> Iterator[Served]:
    """A daemon with short contexts: what is valid is soon done."""
    with ServerThread(fuzz_config(model_folder)) as running:
        yield running


@pytest.fixture(scope="module")
def document(target: Served) -> Any:
    return schemathesis.openapi.from_url(f"{target.url}/openapi.json")


def test_random_bodies_are_answered_200_or_4xx(target: Served) -> None:
    """Several hundred random bodies: no 5xx, no broken stream, every error of one shape, nothing held after."""
    outcome = asyncio.run(storm(target.url, 600, seed=1))
    assert outcome.faults == []
    assert outcome.statuses[200] > 50
    assert outcome.statuses[400] > 50
    assert target.snapshot().kv.tiers[0].referenced_blocks == 0


@pytest.mark.nightly
def test_fifty_thousand_random_bodies_are_answered(target: Served) -> None:
    """The same at length, and memory does not grow for ever."""
    outcome = asyncio.run(storms(target.url, 50_000, seed=2, console=sys.stdout))
    assert outcome.faults == []


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_the_openapi_document_is_true(document: Any, mode: GenerationMode) -> None:
    """Whatever the document allows or forbids, answers are documented, of the documented shape, and never a 5xx."""
    tried = 0
    for operation in (result.ok() for result in document.get_all_operations()):
        tried += 1
        if mode is GenerationMode.NEGATIVE and not operation.body:
            continue  # a request without a body has nothing that could be wrong

        @BOUNDED
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case: schemathesis.Case) -> None:
            case.call_and_validate(checks=CHECKS, timeout=60)

        check()
    assert tried == sum(len(methods) for methods in document.raw_schema["paths"].values()) > 30
