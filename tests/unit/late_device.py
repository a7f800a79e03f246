"""A `Device` on CPU tensors at its worst: what goes up is spoilt behind the caller, what comes down comes when told.

Work itself is done at once, so that tensors hold what a stream in order would give. What a runner could get wrong shows
nevertheless: an array used after it was given away is spoilt, a host array read before its copy has come holds rubbish,
and whatever would make the device thread wait for the device is counted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

ANSWER_S = 30.0
"""How long a download waits for the test to release it, before it fails."""


def unwatched() -> Any:
    """In it, nothing is counted: what is done on the device's own behalf, or by what is not under test."""
    return torch._C.DisableTorchFunction()


class Looks(TorchFunctionMode):
    """Counts calls of torch, in one thread, that on a GPU wait for it: reading a value, a size that depends on values,
    and going up from memory that is not pinned."""

    READS = frozenset(
        "tolist item numpy cpu nonzero masked_select unique equal allclose is_nonzero __bool__ __int__ __float__ "
        "__index__ __contains__ __array__ tensor as_tensor from_numpy".split()
    )

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in self.READS or (name in ("__getitem__", "__setitem__") and _goes_up(args[1])):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def _goes_up(index: Any) -> bool:
    """Whether to index with it copies an index to the device, or counts what is true."""
    parts = index if isinstance(index, tuple) else (index,)
    return any(
        isinstance(part, list | np.ndarray) or (isinstance(part, Tensor) and part.dtype == torch.bool) for part in parts
    )


class LateDownload:
    """Comes when it is released, or fails when it is told to."""

    def __init__(self, device: LateDevice, tensors: Sequence[Tensor]) -> None:
        self._device = device
        self._held = [tensor.numpy().copy() for tensor in tensors]
        self._arrays = [np.full_like(held, 77) for held in self._held]
        self._come = threading.Event()
        self._error: Exception | None = None

    def release(self, error: Exception | None = None) -> None:
        for array, held in zip(self._arrays, self._held, strict=True):
            array[...] = held
        self._error = error
        self._come.set()

    def wait(self) -> list[npt.NDArray[Any]]:
        if threading.get_ident() == self._device.thread:
            self._device.looks.seen.append("wait")
        assert self._come.wait(ANSWER_S), "nobody released the download"
        if self._error is not None:
            raise self._error
        return self._arrays

    def busy_s(self) -> float:
        assert self._come.is_set(), "asked before it was over"
        return self._device.busy_s


class LateDevice:
    """See the module. `hold`: downloads wait to be released by the test; else they come at once. `busy_s`: how long
    each step took, as it says."""

    def __init__(self, *, hold: bool = False, busy_s: float = 0.25) -> None:
        self.hold = hold
        self.busy_s = busy_s
        self.downloads: list[LateDownload] = []
        self.looks = Looks()
        self.thread = 0
        self.captured = 0
        self.most_put = 0
        self.replays = 0
        self.lost = False
        self._sent: list[Tensor] = []

    def adopt(self) -> None:
        self.thread = threading.get_ident()
        self.looks.__enter__()  # for as long as the thread lives

    def leave(self) -> None:
        """For a test that adopted it in the thread of all tests."""
        self.looks.__exit__(None, None, None)

    def put(self, *arrays: npt.NDArray[Any]) -> list[Tensor]:
        self.most_put = max(self.most_put, sum(array.nbytes for array in arrays))
        with unwatched():
            sent = [torch.from_numpy(array.copy()) for array in arrays]
            for array in arrays:
                array[...] = 1 if array.dtype == np.bool_ else 10**8
            self._sent += sent
        return sent

    def mark(self) -> None:
        return None

    def download(self, tensors: Sequence[Tensor], since: Any) -> LateDownload:
        with unwatched():
            found = LateDownload(self, tensors)
            for tensor in self._sent:
                tensor.fill_(1 if tensor.dtype == torch.bool else 10**8)
            self._sent = []
        if not self.hold:
            found.release()
        self.downloads.append(found)
        return found

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        work()
        self.captured += 1

        def replay() -> None:
            self.replays += 1
            work()

        return replay

    def synchronise(self) -> None:
        self.looks.seen.append("synchronise")
        if self.lost:
            raise RuntimeError("an illegal memory access was encountered")

    def used_bytes(self) -> int:
        """Of graphs, and of the largest array that went up: as torch's allocator, it keeps what it once had."""
        return 1000 * self.captured + self.most_put
