"""`python -m tests.e2e.planted hang|watchful serve ...`: the daemon with a step that never ends, or with a quick eye on
its files."""

from __future__ import annotations

import sys
import threading

from server import process
from server.cli import main
from server.runner.runner import TorchRunner


def hang(runner: TorchRunner, *step: object) -> None:
    """A forward pass that never comes back, as on a device that does not answer."""
    threading.Event().wait()


if __name__ == "__main__":
    if sys.argv[1] == "hang":
        TorchRunner._compute = hang  # type: ignore[method-assign, assignment]
        TorchRunner._launches = lambda runner, inputs: False  # type: ignore[method-assign]
    process.FILES_PROBE_S = 0.2
    sys.exit(main(sys.argv[2:]))
