"""The free frames of one tier. Knows numbers only; which block owns a frame is the manager's business."""

from __future__ import annotations

from collections.abc import Iterable

from server.types import FrameId


class FramePool:
    """Hands out frames in ascending runs where it can: neighbouring blocks then lie side by side in the arena, and a
    reader may take them as one strided view. Loop thread only."""

    def __init__(self, frames: int) -> None:
        assert frames > 0, f"a tier needs at least one frame, got {frames}"
        self.capacity = frames
        self._free: list[FrameId] = list(range(frames - 1, -1, -1))
        self._taken = bytearray(frames)

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[FrameId]:
        """`count` frames; the caller has checked that as many are free."""
        assert 0 <= count <= len(self._free), f"took {count} of {len(self._free)} free frames"
        if count == 0:
            return []
        frames = self._free[-count:][::-1]
        del self._free[-count:]
        for frame in frames:
            self._taken[frame] = 1
        return frames

    def give_back(self, frames: Iterable[FrameId]) -> None:
        returned = list(frames)
        for frame in returned:
            assert self._taken[frame], f"frame {frame} given back twice"
            self._taken[frame] = 0
        self._free.extend(reversed(returned))

    def free_frames(self) -> frozenset[FrameId]:
        """For the audit."""
        return frozenset(self._free)
