"""What the scheduler may take on at once, and how far the background may go."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Named bounds of the scheduler; every one is in the configuration."""

    max_running: int
    max_step_tokens: int
    max_chunk_tokens: int
    max_queued_requests: int
    max_queued_tokens: int
    max_model_len: int
    refuse_late: bool = False
    """Refuse who is not expected to get the first token in the time that was asked for."""
    background_step_s: float = 0.02
    """How long a step may take that only background requests are in, as far as that can be told."""
    background_slack: float = 0.05
    """By what share they may lengthen a step of others."""
    background_kv_share: float = 0.25
    """Of the device's frames, how many they may hold."""
