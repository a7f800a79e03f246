"""Small arrays on their way to a CUDA device, ahead of the step that reads them.

A step reads a few kilobytes from the host: tokens, positions, block tables. Copied in the stream that computes, each
of these copies comes after the step before, and may find the copy engine at work on blocks of the cache, while nothing
computes. Here they have a stream of their own and come while the step before computes; the computing stream waits for
them once.

Arrays lie in slots of pinned memory, each with as much on the device, which are used in turn. A slot is written to
again when all work is over that was given to the device in its turn: with more slots than steps under way, nobody
waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from server.kernels.copy import Driver

SLOTS = 4
"""Two steps may be under way; the third is being prepared."""
SLOT_BYTES = 4 * 2**20
"""Block tables of 256 rows of 64k tokens. What does not fit takes pinned memory of torch's and the computing stream."""
ALIGNMENT = 16

DTYPES = {np.dtype(name): getattr(torch, name) for name in ("int32", "int64", "float32", "float64")} | {
    np.dtype(np.bool_): torch.bool
}
"""Of the arrays."""

Array = npt.NDArray[Any]


class _Slot:
    def __init__(self, device: torch.device) -> None:
        self._pinned = torch.zeros(SLOT_BYTES, dtype=torch.uint8, pin_memory=True)
        memory = torch.zeros(SLOT_BYTES, dtype=torch.uint8, device=device)
        self.host: Array = self._pinned.numpy()
        self.device = {dtype: memory.view(of) for dtype, of in DTYPES.items()}  # all of it as each of them
        self.ends = self._pinned.data_ptr(), memory.data_ptr()
        self.over = torch.cuda.Event()
        """All work of its last turn."""


class Uploads:
    """One thread, the one that launches; its current stream is the one that computes. Each call of torch for a stream
    or an event costs it microseconds, so the copies are the driver's."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.ahead = torch.cuda.stream(self.stream)
        """In it, `stream` is the current one; made once, as making it takes several microseconds."""
        self._device = device
        self._driver = Driver(self.stream.device_index)
        self._slots = [_Slot(device) for _ in range(SLOTS)]
        self._arrived = torch.cuda.Event()
        self._computing: torch.cuda.Stream | None = None
        self._turn = self._used = 0

    @property
    def slot(self) -> int:
        """Whose turn it is, of SLOTS: for others who have something in SLOTS copies for the same reason."""
        return self._turn % SLOTS

    def turn(self) -> None:
        """A step begins. What was sent for the step before is lost when SLOTS more have begun, and not before the
        device has done all it was given until now."""
        self._computing = torch.cuda.current_stream(self._device)
        self._slots[self.slot].over.record(self._computing)
        self._turn += 1
        self._slots[self.slot].over.synchronize()
        self._used = 0

    def send(self, arrays: Sequence[Array]) -> list[Tensor]:
        """The arrays on the device, for this turn, together in one copy. Work given to the current stream from now on
        finds them there."""
        offsets, end = [], self._used
        for array in arrays:
            offsets.append(end)
            end += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        if end > SLOT_BYTES:
            return [torch.from_numpy(array).pin_memory().to(self._device, non_blocking=True) for array in arrays]
        slot, first, self._used = self._slots[self.slot], self._used, end
        for array, at in zip(arrays, offsets, strict=True):
            slot.host[at : at + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        if end > first:
            source, target = slot.ends
            self._driver.call("cuMemcpyAsync", target + first, source + first, end - first, self.stream.cuda_stream)
        self.arrive()
        return [_view(slot, at, array) for array, at in zip(arrays, offsets, strict=True)]

    def arrive(self) -> None:
        """Have the stream that computes wait for all that was given to `stream`."""
        self._arrived.record(self.stream)
        self._arrived.wait(self._computing or torch.cuda.current_stream(self._device))


def _view(slot: _Slot, at: int, array: Array) -> Tensor:
    """What of the slot's memory on the device, bytes from `at` on, is the array."""
    first = at // array.itemsize
    found = slot.device[array.dtype][first : first + array.size]
    return found if array.ndim == 1 else found.view(array.shape)
