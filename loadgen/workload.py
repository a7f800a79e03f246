"""What clients ask for: the workloads, each a frozen dataclass of its parameters that makes sessions, seeded.

A new one is a dataclass with `sessions` in this file or in `traces.py`, and an entry in WORKLOADS. Lengths are tokens;
`LOW-HIGH` means evenly spread between the two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from random import Random
from typing import Any, Protocol, get_type_hints

from loadgen import traces
from loadgen.errors import UsageError
from loadgen.prompts import Prompter, joined
from loadgen.records import Prompt, Session, Turn
from loadgen.spread import Spread


class Workload(Protocol):
    """Sessions without end, or until a trace is over; the same ones for the same seed."""

    def sessions(self, make: Prompter, seed: int) -> Iterator[Session]: ...


@dataclass(frozen=True)
class RandomLengths:
    """Prompts that share nothing: no cache can help, and none may hurt."""

    input: Spread = Spread(512)
    output: Spread = Spread(64)

    def sessions(self, make: Prompter, seed: int) -> Iterator[Session]:
        for number in count():
            rng = Random(f"random {seed} {number}")
            yield _single(make.make(f"random {seed} {number}", self.input.draw(rng)), self.output.draw(rng))


@dataclass(frozen=True)
class SharedPrefix:
    """`groups` of prompts that begin alike, such as system prompts; a group is drawn for each."""

    groups: int = 8
    prefix: int = 1024
    question: Spread = Spread(64)
    output: Spread = Spread(64)

    def sessions(self, make: Prompter, seed: int) -> Iterator[Session]:
        for number in count():
            rng = Random(f"shared {seed} {number}")
            prefix = make.make(f"shared {seed} prefix {rng.randrange(self.groups)}", self.prefix)
            own = make.make(f"shared {seed} {number}", self.question.draw(rng))
            yield _single(joined([prefix, own]), self.output.draw(rng))


@dataclass(frozen=True)
class MultiTurn:
    """Conversations: every turn sends all that was said before. People think in between."""

    turns: int = 6
    first: Spread = Spread(512)
    question: Spread = Spread(64)
    output: Spread = Spread(64)
    think_s: Spread = Spread(1)

    def sessions(self, make: Prompter, seed: int) -> Iterator[Session]:
        for number in count():
            rng = Random(f"turns {seed} {number}")
            first = Turn(make.make(f"turns {seed} {number} 0", self.first.draw(rng)), self.output.draw(rng))
            later = (
                Turn(make.make(f"turns {seed} {number} {turn}", self.question.draw(rng)), self.output.draw(rng),
                     self.think_s.draw_float(rng))
                for turn in range(1, self.turns)
            )  # fmt: skip
            yield Session((first, *later))


@dataclass(frozen=True)
class IdleResume:
    """Long conversations that rest until the device tier must have forgotten them, and then go on."""

    history: Spread = Spread(2048)
    question: Spread = Spread(32)
    output: Spread = Spread(32)
    idle_s: Spread = Spread(60)

    def sessions(self, make: Prompter, seed: int) -> Iterator[Session]:
        return MultiTurn(2, self.history, self.question, self.output, self.idle_s).sessions(make, seed)


@dataclass(frozen=True)
class LongDocuments:
    """`documents` long texts; each request asks a short question about one of them."""

    documents: int = 8
    document: int = 4096
    question: Spread = Spread(32)
    output: Spread = Spread(64)

    def sessions(self, make: Prompter, seed: int) -> Iterator[Session]:
        return SharedPrefix(self.documents, self.document, self.question, self.output).sessions(make, seed)


@dataclass(frozen=True)
class Agents:
    """Agents: one set of tool descriptions for all, then many short steps with the tool's answer in between."""

    steps: int = 10
    tools: int = 1024
    task: Spread = Spread(128)
    result: Spread = Spread(32, 256)
    output: Spread = Spread(16, 64)
    tool_s: Spread = Spread(0.1, 2)

    def sessions(self, make: Prompter, seed: int) -> Iterator[Session]:
        for number in count():
            rng = Random(f"agents {seed} {number}")
            task = make.make(f"agents {seed} {number} 0", self.task.draw(rng))
            first = Turn(joined([make.make(f"agents {seed} tools", self.tools), task]), self.output.draw(rng))
            later = (
                Turn(make.make(f"agents {seed} {number} {step}", self.result.draw(rng)), self.output.draw(rng),
                     self.tool_s.draw_float(rng))
                for step in range(1, self.steps)
            )  # fmt: skip
            yield Session((first, *later))


@dataclass(frozen=True)
class Reasoning:
    """Short questions with long answers: decoding is the work."""

    input: Spread = Spread(64, 256)
    output: Spread = Spread(512, 1024)

    def sessions(self, make: Prompter, seed: int) -> Iterator[Session]:
        return RandomLengths(self.input, self.output).sessions(make, seed)


@dataclass(frozen=True)
class ControlNoReuse:
    """Control: nothing is ever asked twice. Tiers must show no gain, and no loss."""

    input: Spread = Spread(1024)
    output: Spread = Spread(32)

    def sessions(self, make: Prompter, seed: int) -> Iterator[Session]:
        return RandomLengths(self.input, self.output).sessions(make, seed)


@dataclass(frozen=True)
class ControlFits:
    """Control: two prefixes that any device tier holds. Lower tiers must show no gain, and no loss."""

    prefix: int = 512
    question: Spread = Spread(32)
    output: Spread = Spread(32)

    def sessions(self, make: Prompter, seed: int) -> Iterator[Session]:
        return SharedPrefix(2, self.prefix, self.question, self.output).sessions(make, seed)


WORKLOADS: dict[str, type[Any]] = {
    "random": RandomLengths,
    "shared-prefix": SharedPrefix,
    "multi-turn": MultiTurn,
    "idle-resume": IdleResume,
    "long-documents": LongDocuments,
    "agents": Agents,
    "reasoning": Reasoning,
    "mooncake": traces.Mooncake,
    "jsonl": traces.Jsonl,
    "control-no-reuse": ControlNoReuse,
    "control-fits": ControlFits,
}
CONTROLS = ("control-no-reuse", "control-fits")


def make_workload(name: str, parameters: Mapping[str, str]) -> Workload:
    """The workload `name` with `parameters` as typed. UsageError names what is not known and what is."""
    if name not in WORKLOADS:
        raise UsageError(f"--workload {name}: there are {', '.join(WORKLOADS)}")
    kind = WORKLOADS[name]
    types = get_type_hints(kind)
    fields = {field.name: types[field.name] for field in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for key, text in parameters.items():
        if key not in fields:
            raise UsageError(f"-P {key}={text}: {name} has {', '.join(fields)}")
        values[key] = _parse(fields[key], text, f"-P {key}={text}")
    missing = [f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING and f.name not in values]
    if missing:
        raise UsageError(f"--workload {name} needs -P {missing[0]}=...")
    workload: Workload = kind(**values)
    return workload


def described(workload: Workload) -> dict[str, str]:
    """Its parameters as they would be typed."""
    return {field.name: str(getattr(workload, field.name)) for field in dataclasses.fields(workload)}  # type: ignore[arg-type]


def _parse(kind: Any, text: str, where: str) -> Any:
    try:
        value = Spread.parse(text) if kind is Spread else kind(text)
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from None
    if isinstance(value, int | float) and value <= 0:
        raise UsageError(f"{where}: must be above 0")
    return value


def _single(prompt: Prompt, output_tokens: int) -> Session:
    return Session((Turn(prompt, output_tokens),))
