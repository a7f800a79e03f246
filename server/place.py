"""Where the model runs: all that differs between a CPU and a GPU, decided once, at start.

A place knows what computes there, where device memory comes from, and how blocks leave it; it refuses to know what is
served to whom. `place_of` picks one, and says in one line what stands in the way.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from server.config import Config
from server.errors import ConfigError
from server.kernels.attention import BACKENDS, AttentionBackend
from server.kernels.choice import choose_backend, computed_by, use_native
from server.kvcache.arena import allocate_arena
from server.kvcache.host import HostArena
from server.kvcache.tiers.base import Tier
from server.models.base import Model
from server.models.weights import CUDA_QUANTIZATIONS, NATIVE_QUANTIZATIONS, DTypeName
from server.registry import resolve
from server.room import GIB, SPARE_BYTES, available_bytes, check_dram, check_memory
from server.types import BlockLayout, ModelGeometry, StepRunner

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("terrace")

CPU_DEVICE_GIB = 1.0
"""Device tier of a CPU, unless it is told: memory there is everybody's."""
GPU_SHARE = 0.9
"""Of a GPU's memory, what the daemon takes unless it is told: others, a desktop say, have the rest."""
GPU_WORK_BYTES = 2 * GIB
"""On a GPU beside weights and cache: activations and logits of a step, workspaces of kernels, captured graphs."""
GRAPH_ROWS = 256
"""Of the largest decode step that is captured. A step of more is launched kernel by kernel, which then costs little."""
FP8_CAPABILITY = (9, 0)
"""From which on torch multiplies fp8 with a scale for each row and each output."""
RUN_BYTES, GPU_RUN_BYTES = 2**20, 64 * 2**20
"""Neighbouring blocks that go in one call to a tier. A link to a GPU takes a block in less time than a call, and the
threads of its tier share the blocks of one."""
IN_FLIGHT_BYTES, GPU_IN_FLIGHT_BYTES = 64 * 2**20, 256 * 2**20
"""Blocks moving at once between two tiers, per direction: a few calls."""


class Place(Protocol):
    """`dtype`: of weights where none is asked for. `quantizations`: what can be made of them. `native`: the native CPU
    kernels compute. `computed_by`: what does, in a word or two. `run_bytes`: of neighbouring blocks, what goes in one
    call to a tier. `in_flight_bytes`: of blocks that move at once between two tiers, per direction."""

    device: str
    dtype: DTypeName
    quantizations: Sequence[str]
    native: bool
    computed_by: str
    run_bytes: int
    in_flight_bytes: int

    def fit(self, name: str, weights: Mapping[str, int], precision: str) -> float:
        """GiB of the device tier. Raises ConfigError unless model `name` with its tiers fits; see
        `room.check_memory`."""
        ...

    def backend(self, geometry: ModelGeometry, kv_dtype: Any) -> str:
        """Name of what attends over KV of this torch dtype. Raises ConfigError where nothing can."""
        ...

    def arena(self, frames: int, layout: BlockLayout, kv_dtype: Any) -> Tensor:
        """Memory of `frames` blocks, and what the backends need beside them."""
        ...

    def attention(self, backend: str, arena: Tensor, model: Model) -> AttentionBackend: ...
    def device_tier(self, arena: Tensor, host: HostArena) -> Tier: ...
    def runner(self, model: Model, attention: AttentionBackend) -> StepRunner: ...
    async def warm_up(self, runner: Any, moved: Callable[[int, int], None]) -> None:
        """Before the first step: what the runner prepares. `moved` is told how far it is."""
        ...


def place_of(config: Config) -> Place:
    """Raises ConfigError where the device that is asked for is not there."""
    return Cuda(config) if config.model.device == "cuda" else Cpu(config)


class Cpu:
    """All tiers are in the same memory; the device tier is a part of it of its own, that kernels read."""

    device = "cpu"
    run_bytes, in_flight_bytes = RUN_BYTES, IN_FLIGHT_BYTES

    def __init__(self, config: Config) -> None:
        self._config = config
        self.native = use_native(config.model)
        self.quantizations: Sequence[str] = NATIVE_QUANTIZATIONS if self.native else ()
        self.computed_by = computed_by(config.model)
        # Half precision is many times slower where torch computes on a CPU.
        self.dtype: DTypeName = "auto" if self.native else "float32"

    def fit(self, name: str, weights: Mapping[str, int], precision: str) -> float:
        device_gib = self._config.kv.device_gib or CPU_DEVICE_GIB
        tiers = {"--device-gib": device_gib, "--dram-gib": self._config.kv.dram_gib}
        check_memory(name, weights, precision, tiers, available_bytes(), SPARE_BYTES)
        return device_gib

    def backend(self, geometry: ModelGeometry, kv_dtype: Any) -> str:
        return choose_backend(self._config.model.attention, self._config.kv.kv_dtype, native=self.native)

    def arena(self, frames: int, layout: BlockLayout, kv_dtype: Any) -> Tensor:
        return allocate_arena(frames, layout, kv_dtype)

    def attention(self, backend: str, arena: Tensor, model: Model) -> AttentionBackend:
        made: AttentionBackend = resolve("attention", BACKENDS, backend)(arena, model.geometry)
        return made

    def device_tier(self, arena: Tensor, host: HostArena) -> Tier:
        from server.kvcache.tiers.device import DeviceTier

        return DeviceTier(arena, host)

    def runner(self, model: Model, attention: AttentionBackend) -> StepRunner:
        from server.runner.runner import TorchRunner

        return TorchRunner(model, attention, time.monotonic, threads=self._config.model.threads)

    async def warm_up(self, runner: Any, moved: Callable[[int, int], None]) -> None:
        """Nothing is prepared: the first steps are as quick as others."""


class Cuda:
    """A GPU by CUDA: FlashInfer's kernels where it can be used, else torch's; blocks go to pinned memory by DMA."""

    device = "cuda"
    dtype: DTypeName = "auto"
    native = False
    computed_by = "cuda"
    run_bytes, in_flight_bytes = GPU_RUN_BYTES, GPU_IN_FLIGHT_BYTES

    def __init__(self, config: Config) -> None:
        import torch

        use_native(config.model)  # raises where native kernels, or weights that need them, are asked for
        if not torch.cuda.is_available():
            why = "no CUDA device is visible" if torch.version.cuda else f"torch {torch.__version__} has no CUDA"
            raise ConfigError(f"device 'cuda': {why}; use --device cpu", param="model.device")
        capability = torch.cuda.get_device_capability()
        self.quantizations: Sequence[str] = CUDA_QUANTIZATIONS if capability >= FP8_CAPABILITY else ()
        if config.model.quantization == "fp8" and not self.quantizations:
            message = "quantization 'fp8' needs a GPU of compute capability 9.0 (Hopper) or later; this one has "
            raise ConfigError(f"{message}{capability[0]}.{capability[1]}: leave it out", param="model.quantization")
        self._config = config
        self._rows = min(config.scheduler.max_num_seqs, GRAPH_ROWS)

    def fit(self, name: str, weights: Mapping[str, int], precision: str) -> float:
        import torch

        check_dram(self._config.kv.dram_gib, available_bytes())
        free, total = torch.cuda.mem_get_info()
        left = GPU_SHARE * total - (total - free) - weights[precision] - GPU_WORK_BYTES
        device_gib = self._config.kv.device_gib or max(0.0, left) / GIB
        check_memory(name, weights, precision, {"--device-gib": device_gib}, free, GPU_WORK_BYTES)
        return device_gib

    def backend(self, geometry: ModelGeometry, kv_dtype: Any) -> str:
        from server.kernels.flashinfer import obstacle

        asked = self._config.model.attention
        why = obstacle(geometry, kv_dtype)
        if asked == "flashinfer" and why is not None:
            raise ConfigError(f"attention 'flashinfer' cannot serve this model: {why}", param="model.attention")
        if asked == "auto" and why is not None:
            log.warning("attention is torch's, which is several times slower than FlashInfer: %s", why)
            asked = "sdpa"
        elif asked == "auto":
            asked = "flashinfer"
        if kv_dtype.itemsize == 1 and asked != "flashinfer":
            raise ConfigError(
                f"kv_dtype {self._config.kv.kv_dtype!r} is not what attention {asked!r} can read on a GPU; use "
                "--kv-dtype bfloat16, or fp8 with FlashInfer",
                param="kv.kv_dtype",
            )
        return asked

    def arena(self, frames: int, layout: BlockLayout, kv_dtype: Any) -> Tensor:
        """One frame more than there are blocks, the last: rows that fill up a captured step write there."""
        return allocate_arena(frames + 1, layout, kv_dtype, self.device)

    def attention(self, backend: str, arena: Tensor, model: Model) -> AttentionBackend:
        made: AttentionBackend
        if backend == "flashinfer":
            from server.kernels.flashinfer import FlashInferAttention

            made = FlashInferAttention(arena, model.geometry, query_dtype=model.dtype, max_rows=self._rows)
        else:
            made = resolve("attention", BACKENDS, backend)(arena, model.geometry)
        return made

    def device_tier(self, arena: Tensor, host: HostArena) -> Tier:
        from server.kernels.copy import CudaCopyStream, Driver
        from server.kvcache.tiers.cuda import CudaTier

        driver = Driver(arena.device.index or 0)
        up, down = CudaCopyStream(driver, "up"), CudaCopyStream(driver, "down")
        host.register(driver)
        return CudaTier(arena, host, up, down, time.monotonic)

    def runner(self, model: Model, attention: AttentionBackend) -> StepRunner:
        from server.runner.cuda import CudaRunner
        from server.runner.device import CudaDevice

        return CudaRunner(model, attention, CudaDevice(), time.monotonic, graph_rows=self._rows)

    async def warm_up(self, runner: Any, moved: Callable[[int, int], None]) -> None:
        import torch

        tokens = self._config.scheduler.max_num_batched_tokens
        try:
            taken = await runner.warm_up(moved, tokens)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"the GPU has no memory left for a step of {tokens} tokens beside weights and cache: lower "
                "--device-gib or --max-num-batched-tokens",
                param="kv.device_gib",
            ) from error
        free, total = torch.cuda.mem_get_info()
        log.info("GPU memory, measured: a step of %d tokens takes %.2f GiB, captured decode steps of up to %d rows "
                 "%.2f; %.2f of %.2f GiB are free", tokens, taken.step / GIB, self._rows, taken.graphs / GIB,
                 free / GIB, total / GIB)  # fmt: skip
