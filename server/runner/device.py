"""The seam between the CUDA runner and the device: what goes up, what comes down, when that is over, and graphs.

Knows streams, events and pinned memory; refuses to know plans, models and tokens. Tests put a device in its place whose
downloads end when the test says so.

**Order.** All work of a step is on one stream, in the order in which it was given; nothing on the host waits for it but
who asks (`Download.wait`, `synchronise`). Downloads have a stream of their own, behind what they read: a copy that has
to queue for the copy engine, behind blocks on their way to DRAM, does not hold up the step after it.

**What goes up** has a stream of its own, too, ahead of the step that reads it (`server.kernels.uploads`): between two
steps, the device would else wait for each small copy, and that for blocks on their way from DRAM.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from server.kernels.uploads import Uploads


class Download(Protocol):
    """Copies of tensors on their way to the host."""

    def wait(self) -> Sequence[npt.NDArray[Any]]:
        """The arrays, once they have come; any thread, more than once, without the interpreter lock. Raises what the
        device found wrong meanwhile."""
        ...

    def busy_s(self) -> float:
        """After `wait`: seconds from the mark to where the tensors were ready, as the device measured them."""
        ...


class Device(Protocol):
    """One device. All but `Download.wait` and `synchronise` belong to the thread that called `adopt`. Only
    `synchronise`, `adopt` and `capture` wait for the device."""

    def adopt(self) -> None:
        """The calling thread is the one whose work, from now on, goes to this device. Waits for what others gave it."""
        ...

    def put(self, *arrays: npt.NDArray[Any]) -> list[Tensor]:
        """The arrays on the device, for the work up to the next `download`: who wants them longer makes a copy. They
        are given away: they may be read until that work is over, so nobody writes to them any more."""
        ...

    def mark(self) -> Any:
        """This point of the work, for `download` to measure from."""
        ...

    def download(self, tensors: Sequence[Tensor], since: Any) -> Download:
        """Start to copy to the host what the tensors hold at this point of the work. Keeps them until that is done. The
        end of a step."""
        ...

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """A graph of what `work` does on the device; calling it does that again, on the same memory: what is returned
        keeps `work`, which keeps that. `work` runs at least once before. All graphs share the memory of what lives only
        while they run: one at a time, in order."""
        ...

    def synchronise(self) -> None:
        """Wait until nothing is left to do. Raises what went wrong."""
        ...

    def used_bytes(self) -> int:
        """Memory of the device that is not free, whoever has it."""
        ...


class CudaDevice:
    """See `Device`; device number `index`."""

    def __init__(self, index: int = 0) -> None:
        self._device = torch.device("cuda", index)
        self._compute = torch.cuda.Stream(self._device)
        self._readback = torch.cuda.Stream(self._device)
        self._reading = torch.cuda.stream(self._readback)  # made once: it takes several microseconds
        self._uploads = Uploads(self._device)
        self._graphs: list[torch.cuda.CUDAGraph] = []

    def adopt(self) -> None:
        torch.cuda.set_device(self._device)
        torch.cuda.set_stream(self._compute)
        self.synchronise()  # weights and arena were filled on other streams

    def put(self, *arrays: npt.NDArray[Any]) -> list[Tensor]:
        return self._uploads.send(arrays)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._compute)
        return event

    def download(self, tensors: Sequence[Tensor], since: torch.cuda.Event) -> CudaDownload:
        ready = self.mark()
        self._readback.wait_event(ready)
        with self._reading:
            arrays = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True) for x in tensors]
            # Blocking: the waiting thread sleeps. Spinning it would wake 20 us sooner, and take a core for that.
            copied = torch.cuda.Event(blocking=True)
            copied.record(self._readback)
        self._uploads.turn()
        return CudaDownload(tensors, arrays, since, ready, copied)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        work()  # libraries load kernels and take workspaces when they are first called, which no graph may hold
        self.synchronise()
        graph = torch.cuda.CUDAGraph()
        pool = self._graphs[0].pool() if self._graphs else None
        # Other threads may meanwhile do what must not happen while their own work is captured.
        with torch.cuda.graph(graph, pool=pool, stream=self._compute, capture_error_mode="thread_local"):
            work()
        self._graphs.append(graph)
        return _Replay(graph, work)

    def synchronise(self) -> None:
        torch.cuda.synchronize(self._device)

    def used_bytes(self) -> int:
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free


@dataclass(frozen=True, slots=True)
class _Replay:
    """A graph knows addresses: the tensors that lie there live as long as the work that reads and writes them."""

    graph: torch.cuda.CUDAGraph
    work: Callable[[], None]

    def __call__(self) -> None:
        self.graph.replay()


class CudaDownload:
    """See `Download`. Keeps the tensors until they were copied: their memory belongs to the other stream, which could
    use it again."""

    def __init__(
        self,
        tensors: Sequence[Tensor],
        arrays: Sequence[Tensor],
        since: torch.cuda.Event,
        ready: torch.cuda.Event,
        copied: torch.cuda.Event,
    ) -> None:
        self._tensors, self._arrays = tensors, arrays
        self._since, self._ready, self._copied = since, ready, copied

    def wait(self) -> list[npt.NDArray[Any]]:
        self._copied.synchronize()
        self._tensors = ()
        return [np.asarray(array) for array in self._arrays]

    def busy_s(self) -> float:
        return self._since.elapsed_time(self._ready) / 1e3
