"""The device thread of a GPU: launches steps and waits for none of them. Another thread reads what they sampled.

Knows plans, tensors and the order of steps; refuses to know requests, blocks and how a device is driven. Two steps may
be under way: a row that follows the step before takes its token from where that step left it, on the device, so step
n + 1 is launched while n computes, and the device goes from one to the next without the host.

| thread | does |
|---|---|
| loop | `run`: hands a plan over, and awaits its result |
| device | `launch`: flattens, uploads, launches the pass and the sampling, starts the read-back; waits for nothing |
| read-back | `finish`: sleeps until the tokens have come, makes the result |

Only a step with a grammar waits on the device thread: its tokens move the grammar on, which decides what the next step
may draw. Such a step has no follower.

**Errors.** What a launch or the device raises ends the step, and the step that follows it, with StepFailed, once the
device has nothing left to do, so that no frame is written to after that. If the device does not even answer that, it is
`DeviceLost`, for this step and all to come, which ends the engine.

**Time.** `finished_s` is when the read-back thread woke up; `started_s` lies before it by what the device was busy with
the step, by its own clock: from where its stream came to the step, which is after the step before, to the last sampled
token. Time that the device waited for a late launch in between counts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from server.errors import DeviceLost, StepFailed, TerraceError
from server.kernels.attention import AttentionBackend, AttentionBatch
from server.models.base import Model
from server.runner.device import Device
from server.runner.graphs import DecodeGraph, DecodeGraphs
from server.runner.sampling import BlindSampler
from server.runner.step import Ends, Flat, Launched, Readout, fed, flatten
from server.types import StepPlan, StepResult


@dataclass(slots=True)
class HostWork:
    """What the steps cost the device thread, since the start. Written by it alone, read by anybody."""

    launch_s: float = 0.0
    graph_steps: int = 0
    eager_steps: int = 0


@dataclass(frozen=True, slots=True)
class WarmUp:
    """Device memory, in bytes: what the largest step takes beside weights, cache and workspaces, which torch's
    allocator keeps for the steps to come, and what the decode graphs take, 0 where the attention backend has none."""

    step: int
    graphs: int


class CudaRunner:
    """A StepRunner over a torch model on a GPU. `clock` is monotonic seconds; `graph_rows`: of the largest decode step
    that is captured, if `warm_up` is called and the backend has graphs; others are launched kernel by kernel."""

    def __init__(
        self,
        model: Model,
        attention: AttentionBackend,
        device: Device,
        clock: Callable[[], float],
        *,
        graph_rows: int,
    ) -> None:
        self.host_work = HostWork()
        self._model = model
        self._attention = attention
        self._device = device
        self._clock = clock
        self._readout = Readout(model, BlindSampler(model.geometry.vocab, self._put), self._put)
        self._graph_rows = graph_rows
        self._graphs = DecodeGraphs(device, model, graph_rows)
        self._before: Launched | None = None
        """The step before this one; None if it failed. Device thread."""
        self._failed = False
        """Whether the step before this one failed after its launch. Read-back thread."""
        self._lost: DeviceLost | None = None
        self._launcher = ThreadPoolExecutor(1, "terrace-device", initializer=device.adopt)
        self._reader = ThreadPoolExecutor(1, "terrace-readback")

    async def warm_up(self, progress: Callable[[int, int], None], tokens: int) -> WarmUp:
        """Run a prompt of `tokens` tokens, as many as a step may have, and capture the decode graphs; before the first
        `run`, while the cache is empty. `progress(done, of)` is called on the device thread. Raises what torch raises
        where memory does not suffice."""
        return await asyncio.get_running_loop().run_in_executor(self._launcher, self._warm_up, progress, tokens)

    def run(self, plan: StepPlan) -> Awaitable[StepResult]:
        return self._read(asyncio.get_running_loop().run_in_executor(self._launcher, self._begin, plan))

    async def _read(self, begun: Awaitable[Future[StepResult]]) -> StepResult:
        return await asyncio.wrap_future(await begun)

    async def aclose(self) -> None:
        await asyncio.to_thread(self._launcher.shutdown)
        await asyncio.to_thread(self._reader.shutdown)

    # --- device thread -----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _warm_up(self, progress: Callable[[int, int], None], tokens: int) -> WarmUp:
        before = self._device.used_bytes()
        flat = np.arange(tokens)
        fed, none = np.array([0, tokens], np.int32), np.zeros(1, np.int32)
        # Every block of the prompt is frame 0: what ends up there is of no consequence.
        self._attention.plan(AttentionBatch(fed, none, fed[1:], [np.zeros(tokens, np.int32)]))
        wanted = flat[: max(self._graph_rows, 1)]
        ids, positions, last = self._device.put(np.zeros_like(flat), flat, wanted)
        self._model.logits(self._model.forward(ids, positions, self._attention, last))
        self._device.synchronise()
        step = self._device.used_bytes() - before
        graph: Callable[[int], AttentionBackend] | None = getattr(self._attention, "graph", None)
        return WarmUp(step, 0 if graph is None else self._graphs.capture(graph, progress))

    def _begin(self, plan: StepPlan) -> Future[StepResult]:
        return self._reader.submit(self.finish, self.launch(plan))

    def launch(self, plan: StepPlan) -> Launched:
        """Give the device a step. Raises StepFailed or DeviceLost; then it has nothing left of the step to do."""
        started_s = self._clock()
        before, self._before = self._before, None
        if self._lost is not None:
            raise self._lost
        try:
            self._before = self._launch(plan, before)
        except Exception as error:
            raise self._failure(error) from error
        self.host_work.launch_s += self._clock() - started_s
        return self._before

    @torch.inference_mode()
    def _launch(self, plan: StepPlan, before: Launched | None) -> Launched:
        self._readout.forget(plan.retired)
        flat = flatten(plan.rows)
        followed = fed(plan.rows, flat, {} if before is None else before.places())
        since = self._device.mark()
        graph = self._graphs.fitting(len(plan.rows)) if flat.decodes else None
        if graph is not None:
            self._replay(graph, flat, followed, before)
            outputs = self._readout.of_logits(plan, flat, graph.logits[: len(plan.rows)], {})
            self.host_work.graph_steps += 1
        else:
            outputs = self._readout.of_states(plan, flat, self._forward(flat, followed, before))
            self.host_work.eager_steps += 1
        download = self._device.download(outputs.tensors(), since)
        ends: Ends = {}
        if any(spec.params.grammar is not None for spec in flat.specs):
            ends = self._readout.advance(flat, download.wait()[0].tolist())
        return Launched(outputs, download, ends, bool(followed))

    def _forward(self, flat: Flat, followed: list[tuple[int, int]], before: Launched | None) -> Tensor:
        """The wanted states [m, hidden], kernel by kernel."""
        self._attention.plan(flat.batch)
        arrays = flat.tokens, flat.positions, flat.wanted, _sources(len(flat.tokens), followed)
        tokens, positions, wanted, sources = self._device.put(*arrays)
        if before is not None and followed:
            tokens = torch.cat((tokens, before.outputs.chosen)).index_select(0, sources)
        return self._model.forward(tokens, positions, self._attention, wanted)

    def _replay(self, graph: DecodeGraph, flat: Flat, followed: list[tuple[int, int]], before: Launched | None) -> None:
        graph.attention.plan(flat.batch)
        rows = len(flat.tokens)
        inputs = np.zeros(2 * graph.rows, np.int64)
        inputs[:rows] = flat.tokens
        inputs[graph.rows : graph.rows + rows] = flat.positions
        values, sources = self._device.put(inputs, _sources(len(inputs), followed))
        if before is not None and followed:
            torch.index_select(torch.cat((values, before.outputs.chosen)), 0, sources, out=graph.inputs)
        else:
            graph.inputs.copy_(values)
        graph.replay()

    def _put(self, array: npt.NDArray[Any]) -> Tensor:
        return self._device.put(array)[0]

    def _failure(self, error: Exception) -> TerraceError:
        """What to raise for an error of a step, once the device has nothing left to do. Any thread but the loop's."""
        if isinstance(error, StepFailed | DeviceLost):
            return error
        try:
            self._device.synchronise()
        except Exception as lost:  # noqa: BLE001 - drivers raise what they like
            self._lost = DeviceLost(f"the device is lost: {lost}")
            return self._lost
        return StepFailed(f"the step failed: {type(error).__name__}")

    # --- read-back thread --------------------------------------------------------------------------------------------

    def finish(self, launched: Launched) -> StepResult:
        """Wait for the step and make its result. Steps come in the order of their launches. Raises as `launch` does."""
        before_failed, self._failed = self._failed, True
        try:
            arrays = launched.download.wait()
            if launched.follows and before_failed:
                raise StepFailed("the step before it failed")
            result = launched.result(arrays, self._clock())
        except Exception as error:
            raise self._failure(error) from error
        self._failed = False
        return result


def _sources(count: int, followed: Sequence[tuple[int, int]]) -> npt.NDArray[np.int64]:
    """Where each of `count` values is, int64 [count], if what the step before sampled is appended to them: `followed`
    are the places that have theirs there, with where."""
    sources = np.arange(count)
    if followed:
        places, indices = zip(*followed, strict=True)
        sources[list(places)] = np.add(indices, count)
    return sources
