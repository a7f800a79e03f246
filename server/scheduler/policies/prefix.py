"""Requests that share a prefix go one after the other, while it is on the device.

Those that came within one window of time are ordered like a trie of their prompts, the oldest branch first: by their
chain hashes at depths 1, 2, 4, ... blocks, of which each stands for all blocks before it. Windows go in order of time,
so nobody waits for longer than for those of his own window.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile

from server.scheduler.policy import EVEN, Rank, SchedulingPolicy
from server.scheduler.request import Request
from server.types import BlockHash

WINDOW_S = 5.0
DEPTHS = tuple(1 << level for level in range(24))
"""In blocks."""


class SharedPrefixTogether(SchedulingPolicy):
    def __init__(self, weights: Mapping[str, float] = EVEN) -> None:
        super().__init__(weights)
        self._window = 0.0
        self._first: dict[BlockHash, int] = {}
        """Who came first with this prefix, in the present window."""

    def rank(self, request: Request) -> Rank:
        window = request.arrival_s // WINDOW_S
        first = self._first if window == self._window else {}
        return window, tuple(first.get(value, request.id) for value in _path(request)), request.arrival_s, request.id

    def queued(self, request: Request) -> None:
        window = request.arrival_s // WINDOW_S
        if window != self._window:
            self._window = window
            self._first.clear()
        for value in _path(request):
            self._first.setdefault(value, request.id)


def _path(request: Request) -> list[BlockHash]:
    return [request.hashes[depth - 1] for depth in takewhile(len(request.hashes).__ge__, DEPTHS)]
