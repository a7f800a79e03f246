"""The device under measurement: everything that needs CUDA, in one class, and a CPU that stands in for it.

Knows how time is taken on a device, how work is captured, and what the parts of a daemon are made of there; refuses to
know what is measured. The stand-in does all of it at once and in order: it shows that a benchmark runs, not how fast.
"""

from __future__ import annotations

import ctypes
import gc
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from typing import Any, Protocol, cast

import numpy.typing as npt
import torch
from torch import Tensor

from server.config import Config
from server.kernels.attention import AttentionBackend
from server.kernels.copy import CudaCopyStream, Driver
from server.kernels.cpu import CpuAttention
from server.kvcache.host import HostArena, checksum
from server.kvcache.tiers.base import Tier
from server.kvcache.tiers.cuda import CopyStream, CudaTier
from server.models.base import Model, Parts
from server.models.layers import TorchParts
from server.models.weights import torch_parts
from server.place import Cpu, Place, place_of
from server.runner.cuda import CudaRunner
from server.runner.device import CudaDevice
from server.types import DIGEST_BYTES, MOVED, REFUSED, ModelGeometry, Moved, StepRunner

Work = Callable[[], Any]


class BareStream(CopyStream, Protocol):
    """Also without checksums."""

    def copy(self, targets: Sequence[int], sources: Sequence[int], size: int) -> None:
        """Copy `size` bytes from each address of `sources` to that of `targets`, all in flight at once."""
        ...


class Chip(Protocol):
    """Main thread. `device`, `dtype`: where tensors go, and of what models and caches are."""

    device: str
    dtype: torch.dtype

    def facts(self) -> dict[str, Any]:
        """What it is: `name`, memory, versions."""
        ...

    def seconds(self, work: Work, times: int) -> list[float]:
        """Of each of `times` calls, after one that does not count, as the device measures them."""
        ...

    def attention(
        self, arena: Tensor, geometry: ModelGeometry, rows: int, *, prefill: Any = "auto", decode: Any = "auto"
    ) -> AttentionBackend:
        """The daemon's backend, with these kernels. `rows`: of the largest decode step that is captured."""
        ...

    def graph(self, attention: AttentionBackend, rows: int) -> AttentionBackend:
        """Of `attention`: for decode steps of `rows` rows that are captured."""
        ...

    def capture(self, work: Work) -> Work:
        """Calling what this gives does `work` again, with a single launch."""
        ...

    def copies(self, host: HostArena) -> tuple[BareStream, BareStream]:
        """Streams up to the device and down from it; pins `host`."""
        ...

    def parts(self, quantization: str) -> Parts:
        """Of models with these weights, "none" or "fp8"; the stand-in has none but plain ones."""
        ...

    def runner(self, model: Model, attention: AttentionBackend, rows: int) -> CudaRunner: ...
    def place(self, config: Config) -> Place: ...
    def synchronise(self) -> None:
        """Wait for the device: what was given to it by torch is there for others from now on."""
        ...

    def release(self) -> None:
        """Give back what is kept of tensors that are gone."""
        ...


class Gpu:
    """See `Chip`. The first CUDA device."""

    device = "cuda"
    dtype = torch.bfloat16

    def __init__(self) -> None:
        self._cuda = CudaDevice()
        self._cuda.adopt()

    def facts(self) -> dict[str, Any]:
        of = torch.cuda.get_device_properties(0)
        return {
            "name": of.name,
            "memory_bytes": of.total_memory,
            "capability": f"{of.major}.{of.minor}",
            "multiprocessors": of.multi_processor_count,
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "flashinfer": _version("flashinfer-python"),
        }

    def seconds(self, work: Work, times: int) -> list[float]:
        work()
        marks = [self._cuda.mark()]
        for _ in range(times):
            work()
            marks.append(self._cuda.mark())
        self._cuda.synchronise()
        return [first.elapsed_time(last) / 1e3 for first, last in pairwise(marks)]

    def attention(
        self, arena: Tensor, geometry: ModelGeometry, rows: int, *, prefill: Any = "auto", decode: Any = "auto"
    ) -> AttentionBackend:
        from server.kernels.flashinfer import FlashInferAttention

        return FlashInferAttention(arena, geometry, max_rows=rows, prefill=prefill, decode=decode)

    def graph(self, attention: AttentionBackend, rows: int) -> AttentionBackend:
        return cast(Any, attention).graph(rows)

    def capture(self, work: Work) -> Work:
        return self._cuda.capture(work)

    def copies(self, host: HostArena) -> tuple[BareStream, BareStream]:
        driver = Driver()
        host.register(driver)
        return CudaCopyStream(driver, "up"), CudaCopyStream(driver, "down")

    def parts(self, quantization: str) -> Parts:
        return torch_parts(self.dtype, self.device, quantization)

    def runner(self, model: Model, attention: AttentionBackend, rows: int) -> CudaRunner:
        return CudaRunner(model, attention, CudaDevice(), time.monotonic, graph_rows=rows)

    def place(self, config: Config) -> Place:
        return place_of(config)

    def synchronise(self) -> None:
        self._cuda.synchronise()

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


# --- the stand-in ----------------------------------------------------------------------------------------------------


class StandIn:
    """See `Chip`. Torch on a CPU, in float32; the runner and the tier are those of a GPU."""

    device = "cpu"
    dtype = torch.float32

    def facts(self) -> dict[str, Any]:
        return {"name": "dry run"}

    def seconds(self, work: Work, times: int) -> list[float]:
        found = []
        for _ in range(times):
            started_s = time.perf_counter()
            work()
            found.append(time.perf_counter() - started_s)
        return found

    def attention(
        self, arena: Tensor, geometry: ModelGeometry, rows: int, *, prefill: Any = "auto", decode: Any = "auto"
    ) -> AttentionBackend:
        return CpuAttention(arena, geometry)

    def graph(self, attention: AttentionBackend, rows: int) -> AttentionBackend:
        return attention

    def capture(self, work: Work) -> Work:
        return work

    def copies(self, host: HostArena) -> tuple[BareStream, BareStream]:
        host.register(_NoPins())
        return _Memmove(), _Memmove()

    def parts(self, quantization: str) -> Parts:
        return TorchParts(self.dtype, self.device)

    def runner(self, model: Model, attention: AttentionBackend, rows: int) -> CudaRunner:
        return CudaRunner(model, attention, _HostDevice(), time.monotonic, graph_rows=rows)

    def place(self, config: Config) -> Place:
        return _StandInPlace(config, self)

    def synchronise(self) -> None:
        """All work is over when its call returns."""

    def release(self) -> None:
        """Nothing is kept."""


class _StandInPlace(Cpu):
    """A CPU whose blocks leave by the tier of a GPU, and whose steps go two deep."""

    def __init__(self, config: Config, chip: StandIn) -> None:
        super().__init__(config)
        self._chip = chip

    def device_tier(self, arena: Tensor, host: HostArena) -> Tier:
        return CudaTier(arena, host, *self._chip.copies(host), time.monotonic)

    def runner(self, model: Model, attention: AttentionBackend) -> StepRunner:
        return self._chip.runner(model, attention, 1)


class _NoPins:
    """See `server.kvcache.host.Pins`."""

    def pin(self, address: int, size: int) -> None: ...
    def unpin(self, address: int) -> None: ...


class _Memmove:
    """See `BareStream`: blocks of plain memory, one after the other."""

    def up(self, targets: Sequence[int], sources: Sequence[int], size: int, burst: int, digests: bytes) -> Moved:
        states = bytearray()
        for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
            good = _checksum(source, size) == digests[i * DIGEST_BYTES : (i + 1) * DIGEST_BYTES]
            if good:
                ctypes.memmove(target, source, size)
            states.append(MOVED if good else REFUSED)
        return Moved(bytes(states), digests, None)

    def down(self, targets: Sequence[int], sources: Sequence[int], size: int, burst: int) -> Moved:
        self.copy(targets, sources, size)
        digests = b"".join(_checksum(target, size) for target in targets)
        return Moved(bytes([MOVED]) * len(targets), digests, None)

    def copy(self, targets: Sequence[int], sources: Sequence[int], size: int) -> None:
        for target, source in zip(targets, sources, strict=True):
            ctypes.memmove(target, source, size)

    def close(self) -> None: ...


def _checksum(address: int, size: int) -> bytes:
    return checksum(memoryview((ctypes.c_uint8 * size).from_address(address)))


class _HostDevice:
    """See `server.runner.device.Device`."""

    def adopt(self) -> None: ...
    def synchronise(self) -> None: ...
    def used_bytes(self) -> int:
        return 0

    def put(self, *arrays: npt.NDArray[Any]) -> list[Tensor]:
        return [torch.from_numpy(array) for array in arrays]

    def mark(self) -> float:
        return time.monotonic()

    def download(self, tensors: Sequence[Tensor], since: float) -> _HostDownload:
        return _HostDownload(tensors, time.monotonic() - since)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        return work


class _HostDownload:
    def __init__(self, tensors: Sequence[Tensor], busy_s: float) -> None:
        self._arrays, self._busy_s = [tensor.numpy().copy() for tensor in tensors], busy_s

    def wait(self) -> Sequence[npt.NDArray[Any]]:
        return self._arrays

    def busy_s(self) -> float:
        return self._busy_s
