"""What one request was and what came of it. Seconds are on the run's own clock: 0 is its start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Prompt = str | list[int]
"""Text, or token ids."""

ERRORS = ("connect", "timeout", "http_4xx", "http_429", "http_5xx", "stream_error", "broken_stream", "empty")
"""Kinds of failure: no connection; no end in time; the three kinds of refusal; an error event inside a stream; a stream
that ended without its end; one that ended well without any output."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of a session. `pause_s` passes between the end of the turn before it and its scheduled time."""

    prompt: Prompt
    output_tokens: int
    pause_s: float = 0.0
    extra: Mapping[str, object] | None = None
    """More fields of the request body."""


@dataclass(frozen=True, slots=True)
class Session:
    """Requests that follow each other. Where there are several, each sends all that was said before, and more."""

    turns: tuple[Turn, ...]
    start_s: float | None = None
    """When the first is due; None: the arrival process says."""


@dataclass(slots=True)
class Outcome:
    """One request, as the client saw it."""

    session: int
    turn: int
    scheduled_s: float
    """When it was due. Latency counts from here: waiting inside the client is waiting."""
    asked_tokens: int
    sent_s: float = 0.0
    """When the client began to send it."""
    chunk_s: list[float] = field(default_factory=list)
    """When each chunk with output arrived."""
    end_s: float = 0.0
    """When the stream was over, or failed."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    cached_by_tier: dict[str, int] = field(default_factory=dict)
    error: str | None = None
    """One of ERRORS."""
    detail: str = ""
    answer: str = ""
    """What was generated; kept only until the session's next turn needs it."""

    @property
    def first_s(self) -> float:
        return self.chunk_s[0]

    @property
    def last_s(self) -> float:
        return self.chunk_s[-1]
