"""The parts in turn: each in a process of its own, with a time that it may take, after which it is killed.

Knows which parts there are, what they may take, and how lines come from them; refuses to know what they measure. A
process for each, because an error of a device is the end of everything in that process, and because nothing else ends a
kernel that hangs. What a part found before it ended is kept.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import IO

from server.bench.gpu.chip import Chip
from server.bench.gpu.lines import Line, Outcome
from server.bench.gpu.sizes import Sizes
from server.registry import resolve

LIMIT_S = 570.0
"""Of all parts together: under ten minutes, with the start of this process and the end of the last one."""
MARK = "line "
"""Before a line of a part's output that is one of ours; libraries may say what they like between."""


@dataclass(frozen=True)
class Part:
    """`budget_s`: what it may take; with less than `least_s` left it is not begun."""

    name: str
    target: str
    budget_s: float
    least_s: float


PARTS = (
    Part("link", "server.bench.gpu.link:run", 75, 15),
    Part("compile", "server.bench.gpu.kernels:first", 240, 15),
    Part("steps", "server.bench.gpu.steps:run", 120, 25),
    Part("daemon", "server.bench.gpu.daemon:run", 200, 60),
    Part("transformers", "server.bench.gpu.peer:run", 60, 25),
    Part("attention", "server.bench.gpu.kernels:run", 75, 15),
)
"""In order: later ones use what earlier ones found."""

Known = Mapping[str, float]
Take = Callable[[Line], None]
Launch = Callable[[Part, float, Known, Take], str]
"""`launch(part, budget_s, known, take)`: gives `take` the part's lines as they come; returns what went wrong, or ""."""


def measure(
    parts: Sequence[Part],
    launch: Launch,
    clock: Callable[[], float],
    show: Take,
    ended: Callable[[Outcome], None],
    limit_s: float = LIMIT_S,
) -> tuple[list[Line], list[Outcome]]:
    """All parts, as far as the time goes: their lines and how each went. `clock`: monotonic seconds."""
    began_s, lines, outcomes = clock(), list[Line](), list[Outcome]()

    def take(line: Line) -> None:
        lines.append(line)
        show(line)

    for part in parts:
        started_s = clock()
        budget_s = min(part.budget_s, began_s + limit_s - started_s)
        if budget_s < part.least_s:
            problem = f"left out: it takes {part.least_s:g} s at least, {max(0.0, budget_s):.0f} s are left"
        else:
            known = {line.key: line.value for line in lines if line.value is not None}
            problem = launch(part, budget_s, known, take)
        outcomes.append(Outcome(part.name, clock() - started_s, problem))
        ended(outcomes[-1])
    return lines, outcomes


def here(chip: Chip, sizes: Sizes, part: Part, known: Known, take: Take) -> str:
    """A part in this process, however long it takes."""
    try:
        for line in resolve("target", {part.name: part.target}, part.name)(chip, sizes, known):
            take(line)
    except Exception as error:  # noqa: BLE001 - one part's trouble is a line of the table, not the end of the others
        return f"failed: {type(error).__name__}: {error}"
    return ""


def apart(command: Sequence[str], budget_s: float, known: Known, take: Take) -> str:
    """`command` in a process of its own, which gets `known` on its standard input and writes lines to its output; it is
    killed with all its children when its time is over."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        )
        late = threading.Event()
        timer = threading.Timer(budget_s, _end, (process, late))
        timer.start()
        try:
            assert process.stdin is not None, "it is a pipe"
            assert process.stdout is not None, "it is a pipe"
            with suppress(BrokenPipeError), process.stdin:  # it ended before it read them: its exit code says so
                process.stdin.write(json.dumps(known))
            for text in process.stdout:
                if text.startswith(MARK):
                    take(Line(**json.loads(text.removeprefix(MARK))))
            code = process.wait()
        finally:
            timer.cancel()
            _end(process, threading.Event())
            process.wait()
        if late.is_set():
            return f"out of time after {budget_s:.0f} s"
        return f"failed: {_last_words(errors) or f'exit code {code}'}" if code else ""


def _end(process: subprocess.Popen[str], late: threading.Event) -> None:
    late.set()
    with suppress(ProcessLookupError):  # all of it has ended by itself
        os.killpg(process.pid, signal.SIGKILL)


def _last_words(errors: IO[str]) -> str:
    errors.seek(0)
    lines = [line.strip() for line in errors if line.strip()]
    return lines[-1][:300] if lines else ""


def say(line: Line) -> None:
    """In the process of a part: hand a line to who started it."""
    sys.stdout.write(f"{MARK}{json.dumps(asdict(line))}\n")
    sys.stdout.flush()
