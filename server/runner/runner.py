"""The device thread of a CPU: turns a StepPlan into tokens. Sees plans, tensors and frames; never requests or blocks.

One thread owns model, attention backend and sampler, so that none of them needs a lock. Between two steps it does as
little as can be, since nothing computes then:

| thread | does |
|---|---|
| loop | `run`: flattens the rows and joins their block tables, while the step before computes; awaits the result |
| device | feeds the tokens of the step before, computes, chooses tokens |
| read-back | makes the result and wakes the loop, while the next step computes |
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from server.kernels.attention import AttentionBackend
from server.models.base import Model
from server.runner.sampling import Sampler, drawings, is_unedited
from server.runner.step import Ends, Flat, Outputs, Readout, fed, flatten
from server.types import RequestId, StepPlan, StepResult

_Done = asyncio.Future[StepResult]


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What can be made of a plan before the step before it has ended. The tensors are the arrays of `flat`; `tables`
    are its batch's, which keeps them for the attention backend."""

    flat: Flat
    tokens: Tensor
    positions: Tensor
    wanted: Tensor
    tables: tuple[Any, ...]
    how: npt.NDArray[Any] | None
    """How tokens are chosen (`rows.DRAWING`), if all that is wanted are tokens, by the logits as they are."""

    @classmethod
    def of(cls, plan: StepPlan, vocab: int) -> _Inputs:
        flat = flatten(plan.rows)
        tokens, positions, wanted = map(torch.from_numpy, (flat.tokens, flat.positions, flat.wanted))
        alone = not (flat.spans or flat.pools) and all(spec.params.logprobs is None for spec in flat.specs)
        how = drawings(flat.specs, vocab) if alone and all(map(is_unedited, flat.specs)) else None
        return cls(flat, tokens, positions, wanted, flat.batch.shared, how)


@dataclass(frozen=True, slots=True)
class _Computed:
    """A step whose tokens are known. `inputs` are let go by the read-back thread: torch gives up the interpreter's lock
    to free a tensor, and the device thread would wait for the others before it had begun with the next step."""

    inputs: _Inputs
    outputs: Outputs
    ends: Ends
    started_s: float
    finished_s: float

    def result(self) -> StepResult:
        arrays = [tensor.numpy() for tensor in self.outputs.tensors()]
        return self.outputs.read(arrays, self.ends, self.started_s, self.finished_s)


class TorchRunner:
    """A StepRunner over a torch model. `clock` is monotonic seconds; `threads` torch's arithmetic threads, or None."""

    def __init__(
        self, model: Model, attention: AttentionBackend, clock: Callable[[], float], *, threads: int | None = None
    ) -> None:
        self._model = model
        self._attention = attention
        self._vocab = model.geometry.vocab
        self._readout = Readout(model, Sampler(self._vocab), torch.from_numpy)
        self._sampled: Mapping[RequestId, int | None] = {}
        """What the step before this one sampled; nothing if it failed."""
        self._clock = clock
        self._torch_threads = threads
        self._jobs: SimpleQueue[tuple[StepPlan, _Inputs | None, _Done] | None] = SimpleQueue()
        self._computed: SimpleQueue[tuple[_Computed | BaseException, _Done] | None] = SimpleQueue()
        self._threads: list[Thread] = []

    def run(self, plan: StepPlan) -> Awaitable[StepResult]:
        if not self._threads:
            for name, target in (("device", self._compute_all), ("readback", self._finish_all)):
                self._threads.append(Thread(target=target, name=f"terrace-{name}", daemon=True))
                self._threads[-1].start()
        done: _Done = asyncio.get_running_loop().create_future()
        inputs = None
        with suppress(Exception):  # the device thread meets it again, in its turn: what follows the step fails, too
            inputs = _Inputs.of(plan, self._vocab)
        self._jobs.put((plan, inputs, done))
        return done

    async def aclose(self) -> None:
        self._jobs.put(None)
        for thread in self._threads:
            await asyncio.to_thread(thread.join)

    @torch.inference_mode()
    def step(self, plan: StepPlan) -> StepResult:
        """One forward pass and the sampling after it, here and now. Device thread."""
        return self._compute(plan, _Inputs.of(plan, self._vocab)).result()

    # --- device thread -----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _compute_all(self) -> None:
        if self._torch_threads is not None:
            torch.set_num_threads(self._torch_threads)
        while (job := self._jobs.get()) is not None:
            plan, inputs, done = job
            try:
                self._computed.put((self._compute(plan, inputs or _Inputs.of(plan, self._vocab)), done))
            except BaseException as error:  # noqa: BLE001 - whoever waits for the step is told
                self._sampled = {}
                self._computed.put((error, done))
        self._computed.put(None)

    def _compute(self, plan: StepPlan, inputs: _Inputs) -> _Computed:
        started_s, flat = self._clock(), inputs.flat
        before, self._sampled = self._sampled, {}
        self._readout.forget(plan.retired)
        for place, token in fed(plan.rows, flat, before):
            flat.tokens[place] = token
        self._attention.plan(flat.batch)
        outputs = self._outputs(plan, inputs)
        chosen: list[int] = outputs.chosen.tolist()
        ends = {} if inputs.how is not None else self._readout.advance(flat, chosen)
        self._sampled = dict(zip(flat.ids, chosen, strict=True))
        self._sampled.update((plan.rows[place].request_id, None) for place, (_, counts) in ends.items() if not counts)
        return _Computed(inputs, outputs, ends, started_s, self._clock())

    def _outputs(self, plan: StepPlan, inputs: _Inputs) -> Outputs:
        flat, step = inputs.flat, (inputs.tokens, inputs.positions, self._attention, inputs.wanted)
        if flat.pools:
            return self._readout.of_states(plan, flat, self._model.forward(*step))
        logits, chosen = self._model.scores(*step, how=inputs.how)
        if chosen is not None:
            return Outputs(plan, flat, chosen, (), (), (), (), {})
        return self._readout.of_logits(plan, flat, logits, {})

    # --- read-back thread --------------------------------------------------------------------------------------------

    def _finish_all(self) -> None:
        while (job := self._computed.get()) is not None:
            computed, done = job
            try:
                ended = partial(_end, done, computed if isinstance(computed, BaseException) else computed.result())
            except Exception as error:  # noqa: BLE001 - whoever waits for the step is told
                ended = partial(_end, done, error)
            done.get_loop().call_soon_threadsafe(ended)


def _end(done: _Done, result: StepResult | BaseException) -> None:
    if done.cancelled():
        return
    if isinstance(result, BaseException):
        done.set_exception(result)
    else:
        done.set_result(result)
