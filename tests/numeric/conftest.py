"""Tiny checkpoints, written once a session."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tests.numeric.families import make_reference, save

Checkpoint = Callable[[str], tuple[Path, PreTrainedModel]]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """`checkpoint(name)`: the folder of a saved tiny model, and the transformers model itself."""
    torch.set_num_threads(min(2, torch.get_num_threads()))

    @cache
    def make(name: str) -> tuple[Path, PreTrainedModel]:
        model = make_reference(name)
        return save(model, tmp_path_factory.mktemp("checkpoints") / name.replace(" ", "-")), model

    return make
