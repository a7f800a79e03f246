"""The free frames of one tier. Knows numbers only; which block owns a frame is the books' business."""

from __future__ import annotations

from collections.abc import Iterable

from server.types import FrameId


class FramePool:
    """Hands out frames in ascending runs where it can: neighbouring blocks then lie side by side, and a reader may take
    them in one go. Frames that were never used come last, so that a file grows only when it must. Loop thread only."""

    def __init__(self, frames: int) -> None:
        assert frames > 0, f"a tier needs at least one frame, got {frames}"
        self.capacity = frames
        self.withheld: list[FrameId] = []
        self._returned: list[FrameId] = []
        self._fresh = 0
        self._ceiling = frames
        self._taken = bytearray(frames)

    @property
    def free(self) -> int:
        return len(self._returned) + self._ceiling - self._fresh

    def take(self, count: int) -> list[FrameId]:
        """`count` frames; the caller has checked that as many are free."""
        assert 0 <= count <= self.free, f"took {count} of {self.free} free frames"
        again = min(count, len(self._returned))
        frames = self._returned[len(self._returned) - again :][::-1]
        del self._returned[len(self._returned) - again :]
        frames.extend(range(self._fresh, self._fresh + count - again))
        self._fresh += count - again
        for frame in frames:
            self._taken[frame] = 1
        return frames

    def give_back(self, frames: Iterable[FrameId]) -> None:
        returned = list(frames)
        for frame in returned:
            assert self._taken[frame], f"frame {frame} given back twice"
            self._taken[frame] = 0
        self._returned.extend(reversed(returned))

    def withhold(self, frame: FrameId) -> None:
        """The medium has no place for this frame, the last one given back, nor for any that was never used: none of
        them is handed out until `thaw`."""
        assert self._returned[-1] == frame, f"frame {frame} is withheld before it was given back"
        self.withheld.append(self._returned.pop())
        self._ceiling = self._fresh

    def thaw(self) -> None:
        """Try again what was withheld."""
        self._returned[:0] = self.withheld
        self.withheld = []
        self._ceiling = self.capacity

    def occupy(self, frames: Iterable[FrameId]) -> None:
        """These are in use already, in a tier that outlived its process. Only for a pool that nobody used yet."""
        assert self._fresh == 0, "frames are occupied before any is taken"
        for frame in frames:
            self._taken[frame] = 1
        self._fresh = self._taken.rfind(1) + 1
        self._returned = [frame for frame in range(self._fresh - 1, -1, -1) if not self._taken[frame]]

    def free_frames(self) -> frozenset[FrameId]:
        """For the audit."""
        return frozenset(self._returned) | frozenset(range(self._fresh, self._ceiling))

    def unusable(self) -> int:
        """For the audit: frames that are neither free nor owned while the medium is full."""
        return len(self.withheld) + self.capacity - self._ceiling
