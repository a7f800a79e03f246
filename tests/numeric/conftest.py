"""Tiny checkpoints, written once a session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tests.numeric.families import make_reference, save


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Operations this small gain nothing from a second thread, and wait for it long where cores are contended."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


Checkpoint = Callable[[str], tuple[Path, PreTrainedModel]]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """`checkpoint(name)`: the folder of a saved tiny model, and the transformers model itself."""

    @cache
    def make(name: str) -> tuple[Path, PreTrainedModel]:
        model = make_reference(name)
        return save(model, tmp_path_factory.mktemp("checkpoints") / name.replace(" ", "-")), model

    return make
