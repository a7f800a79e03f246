"""One daemon for all tests that do not need their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.daemon import Served, ServerThread, tiny_config, write_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def served(model_folder: Path) -> Iterator[Served]:
    """A daemon with ample limits. Tests leave it idle."""
    with ServerThread(tiny_config(model_folder)) as running:
        yield running
