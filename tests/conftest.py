"""What every test shares: hypothesis profiles, and an environment without network and operator's settings."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():  # before Triton is imported, which is when it decides: its kernels are interpreted
    os.environ["TRITON_INTERPRET"] = "1"

# On a busy two-core machine a slow example says nothing about the code, hence no deadlines.
_QUIET = (HealthCheck.too_slow, HealthCheck.filter_too_much)
settings.register_profile("default", deadline=None, suppress_health_check=_QUIET)
settings.register_profile("ci", parent=settings.get_profile("default"), derandomize=True, print_blob=True)


def pytest_configure() -> None:
    """Hub look-ups fail at once rather than wait for a network, and the operator's TERRACE_ settings do not leak in."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in [name for name in os.environ if name.startswith("TERRACE_")]:
        del os.environ[name]
    settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped, with a reason, where there is no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
