"""Sessions out of files: Mooncake's trace format, which the daemon records too, and JSON lines of one's own.

Beside Mooncake's fields a line may say of what class its request was: `tenant` (any name), `priority`, `background`,
`ttft_target_ms`, `tpot_target_ms`.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from loadgen.errors import UsageError
from loadgen.prompts import Prompter, joined
from loadgen.records import Prompt, Session, Turn

MOONCAKE_BLOCK_TOKENS = 512
TARGETS = ("ttft_target_ms", "tpot_target_ms")


@dataclass(frozen=True, slots=True)
class Recorded:
    """One request of a trace in Mooncake's format."""

    at_ms: float
    input_tokens: int
    output_tokens: int
    blocks: list[int]
    """A number per block of the prompt, the same for the same prefix; the last may be a part of a block."""
    block_tokens: int
    tenant: str = ""
    priority: int = 0
    background: bool = False
    ttft_target_ms: float | None = None
    tpot_target_ms: float | None = None

    @property
    def extra(self) -> dict[str, object]:
        """Fields of the request body that say of what class it is, but for whose."""
        fields: dict[str, object] = {}
        if self.priority:
            fields["priority"] = self.priority
        if self.background:
            fields["service_tier"] = "flex"
        for name in ("ttft_target_ms", "tpot_target_ms"):
            if getattr(self, name) is not None:
                fields[name] = getattr(self, name)
        return fields


def read_mooncake(path: str) -> list[Recorded]:
    """All requests of a trace, in the order in which they came: a daemon records them in the order in which they ended.
    UsageError names the line that is none."""
    found = []
    for line, row in _rows(path):
        try:
            found.append(_recorded(row))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UsageError(f"{path}, line {line}: not of the Mooncake format: {error!r}") from None
    return sorted(found, key=lambda one: one.at_ms)


def _recorded(row: dict[str, Any]) -> Recorded:
    blocks = [int(value) for value in row["hash_ids"]]
    block_tokens = int(row.get("block_tokens", MOONCAKE_BLOCK_TOKENS))
    targets = {name: None if row.get(name) is None else float(row[name]) for name in TARGETS}
    one = Recorded(float(row["timestamp"]), int(row["input_length"]), int(row["output_length"]), blocks, block_tokens,
                   str(row.get("tenant", "")), int(row.get("priority", 0)), bool(row.get("background", False)),
                   **targets)  # fmt: skip
    if not math.isfinite(one.at_ms):
        raise ValueError("timestamp is not a time")
    if one.input_tokens < 1 or one.output_tokens < 0 or block_tokens < 1:
        raise ValueError("a length is below what it can be")
    if not all(target is None or 0 < target < math.inf for target in targets.values()):
        raise ValueError("a target is not a time above 0")
    return one


@dataclass(frozen=True)
class Mooncake:
    """Requests at the times and with the shared prefixes of a trace. `scale` shrinks all lengths for a small model;
    `speedup` shrinks the time between requests; `limit` takes the first so many requests only."""

    path: str
    speedup: float = 1.0
    scale: float = 1.0
    limit: int = 1_000_000_000
    max_input: int = 1_000_000_000
    max_output: int = 1_000_000_000

    def sessions(self, make: Prompter, seed: int) -> Iterator[Session]:
        """Requests that are longer than `max_input` are left out, answers are cut to `max_output`."""
        recorded = read_mooncake(self.path)[: self.limit]
        for one in recorded:
            length = max(1, round(one.input_tokens * self.scale))
            if length > self.max_input:
                continue
            prompt = self._prompt(make, seed, one.blocks, max(1, round(one.block_tokens * self.scale)), length)
            output = min(self.max_output, max(1, round(one.output_tokens * self.scale)))
            yield Session(
                (Turn(prompt, output, extra=one.extra or None),), (one.at_ms - recorded[0].at_ms) / 1000 / self.speedup
            )

    def _prompt(self, make: Prompter, seed: int, blocks: list[int], block_tokens: int, length: int) -> Prompt:
        """One piece a block, the same for the same id; the last is cut to what is left."""
        parts: list[Prompt] = []
        for block in blocks:
            left = length - block_tokens * len(parts)
            if left <= 0:
                break
            parts.append(make.make(f"block {seed} {block}", min(left, block_tokens)))
        return joined(parts) if parts else make.make(f"block {seed} none", length)


@dataclass(frozen=True)
class Jsonl:
    """One request a line: `prompt` (text or token ids), `output_tokens`, and optionally `timestamp` (ms), `session`
    (lines of the same follow each other), `pause_s`, `body` (more fields of the request)."""

    path: str
    output: int = 64
    speedup: float = 1.0

    def sessions(self, make: Prompter, seed: int) -> Iterator[Session]:
        """A session starts where its first line stands."""
        turns: dict[str, list[Turn]] = {}
        starts: dict[str, float | None] = {}
        for line, row in _rows(self.path):
            if not isinstance(row.get("prompt"), str | list) or not row["prompt"]:
                raise UsageError(f"{self.path}, line {line}: `prompt` must be text or a list of token ids")
            name = str(row.get("session", f"line {line}"))
            at = row.get("timestamp")
            starts.setdefault(name, None if at is None else float(at) / 1000 / self.speedup)
            turn = Turn(row["prompt"], int(row.get("output_tokens", self.output)), float(row.get("pause_s", 0)),
                        row.get("body"))  # fmt: skip
            turns.setdefault(name, []).append(turn)
        timed = [start is not None for start in starts.values()]
        if any(timed) and not all(timed):
            raise UsageError(f"{self.path}: either every session has a `timestamp` or none")
        for name in sorted(turns, key=lambda name: starts[name] or 0.0):
            yield Session(tuple(turns[name]), starts[name])


def _rows(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of a file of JSON lines, gzipped or not."""
    try:
        opened = gzip.open if path.endswith(".gz") else open
        with opened(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _object(path, number, line)
    except (OSError, EOFError, zlib.error) as error:  # the last two: a damaged .gz
        raise UsageError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not text") from None


def _object(path: str, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{path}, line {number}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise UsageError(f"{path}, line {number}: not an object")
    return row
