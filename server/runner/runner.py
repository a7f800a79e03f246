"""The device thread of a CPU: turns a StepPlan into tokens. Sees plans, tensors and frames; never requests or blocks.

One thread owns model, attention backend and sampler, so that none of them needs a lock. `run` may be awaited from the
loop thread only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch

from server.kernels.attention import AttentionBackend
from server.models.base import Model
from server.runner.sampling import Sampler
from server.runner.step import Readout, fed, flatten
from server.types import RequestId, StepPlan, StepResult


class TorchRunner:
    """A StepRunner over a torch model. `clock` is monotonic seconds; `threads` torch's arithmetic threads, or None."""

    def __init__(
        self, model: Model, attention: AttentionBackend, clock: Callable[[], float], *, threads: int | None = None
    ) -> None:
        self._model = model
        self._attention = attention
        self._readout = Readout(model, Sampler(model.geometry.vocab), torch.from_numpy)
        self._sampled: Mapping[RequestId, int | None] = {}
        """What the step before this one sampled; nothing if it failed."""
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, "terrace-device", initializer=_set_threads, initargs=(threads,))

    def run(self, plan: StepPlan) -> Awaitable[StepResult]:
        return asyncio.get_running_loop().run_in_executor(self._thread, self.step, plan)

    async def aclose(self) -> None:
        await asyncio.to_thread(self._thread.shutdown)

    @torch.inference_mode()
    def step(self, plan: StepPlan) -> StepResult:
        """One forward pass and the sampling after it. Device thread."""
        started_s = self._clock()
        before, self._sampled = self._sampled, {}
        self._readout.forget(plan.retired)
        flat = flatten(plan.rows)
        for place, token in fed(plan.rows, flat, before):
            flat.tokens[place] = token
        self._attention.plan(flat.batch)
        tokens, positions, wanted = (torch.from_numpy(part) for part in (flat.tokens, flat.positions, flat.wanted))
        states = self._model.forward(tokens, positions, self._attention, wanted)
        outputs = self._readout.of_states(plan, flat, states)
        ends = self._readout.advance(flat, outputs.chosen.tolist())
        arrays = [tensor.numpy() for tensor in outputs.tensors()]
        result = outputs.read(arrays, ends, started_s, self._clock())
        self._sampled = {row.request_id: token for row, token in zip(plan.rows, result.tokens, strict=True)}
        return result


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
