"""The device of a CPU: turns a StepPlan into tokens. Sees plans, tensors and frames; never requests or blocks.

A step of which nothing but tokens is wanted, and what is to be told of them, is handed to the kernels, which have a
thread of their own: while the one before it is computed, so that the cores go from one to the next without the host.
Any other step (a grammar's, one that scores a prompt or pools it) is computed by the device thread when those before it
have ended: between two calls it needs the interpreter's lock, which the loop wants as well.

| thread | does |
|---|---|
| loop | `run`: flattens the rows, hands the step to the kernels or to the device thread; makes the kernels' results |
| device | feeds the tokens of the step before, computes, chooses tokens, makes the result |

Model, attention backend and sampler belong to the device thread while it has something to do, else to the loop's, so
that none of them needs a lock.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from server.kernels.attention import AttentionBackend
from server.kernels.native.decoder import Follow
from server.models.base import Model
from server.runner.sampling import Sampler
from server.runner.step import Flat, Launched, Outputs, Readout, fed, flatten
from server.types import StepPlan, StepResult

_Done = asyncio.Future[StepResult]


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What can be made of a plan before the step before it has ended. `flat.batch` has its addresses laid out."""

    flat: Flat
    alone: bool
    """All that is wanted are tokens and what is told of them, and their choice can be left to the kernels."""

    @classmethod
    def of(cls, plan: StepPlan) -> _Inputs:
        flat = flatten(plan.rows)
        assert flat.batch.shared, "laid out when first asked for"
        free = all(spec.params.grammar is None for spec in flat.specs)
        return cls(flat, free and not (flat.spans or flat.pools))


@dataclass(frozen=True, slots=True)
class _Computed:
    """The tensors of a step that has ended; a `Download`."""

    tensors: Sequence[Tensor]
    seconds: float

    def wait(self) -> list[npt.NDArray[Any]]:
        return [tensor.numpy() for tensor in self.tensors]

    def busy_s(self) -> float:
        return self.seconds


class TorchRunner:
    """A StepRunner over a torch model. `clock` is monotonic seconds; `threads` torch's arithmetic threads, or None."""

    def __init__(
        self, model: Model, attention: AttentionBackend, clock: Callable[[], float], *, threads: int | None = None
    ) -> None:
        self._model = model
        self._attention = attention
        self._readout = Readout(model, Sampler(model.geometry.vocab), torch.from_numpy)
        self._before: tuple[Launched, ...] = ()
        """The two steps before this one, the last one last; none behind one that failed."""
        self._clock = clock
        self._torch_threads = threads
        self._under_way: deque[tuple[Launched, _Done]] = deque()
        """Steps that were handed to the kernels. Loop thread."""
        self._wakes = self._woken = -1
        """The ends of a pipe that gets a byte for each of them that ends."""
        self._jobs: SimpleQueue[tuple[StepPlan, _Inputs | None, _Done] | None] = SimpleQueue()
        self._given = 0
        """Jobs that the device thread has not done, as far as the loop knows: until then all belongs to that thread."""
        self._thread: Thread | None = None

    def run(self, plan: StepPlan) -> Awaitable[StepResult]:
        if self._thread is None:
            self._thread = self._open()
        done: _Done = asyncio.get_running_loop().create_future()
        inputs = None
        with suppress(Exception):  # the device thread meets it again, in its turn: what follows the step fails, too
            inputs = _Inputs.of(plan)
        if self._given or inputs is None or not self._launches(inputs):
            self._given += 1
            self._jobs.put((plan, inputs, done))
            return done
        try:
            self._under_way.append((self._begin(plan, inputs, self._wakes), done))
        except Exception as error:  # noqa: BLE001 - whoever waits for the step is told
            self._forget()
            done.set_exception(error)
        return done

    async def aclose(self) -> None:
        if self._thread is None:
            return
        self._jobs.put(None)
        await asyncio.to_thread(self._thread.join)
        await asyncio.gather(*(done for _, done in self._under_way), return_exceptions=True)
        asyncio.get_running_loop().remove_reader(self._woken)
        os.close(self._woken)
        os.close(self._wakes)

    @torch.inference_mode()
    def step(self, plan: StepPlan) -> StepResult:
        """One forward pass and the sampling after it, here and now; before the first `run`, or on the device thread."""
        return self._compute(plan, _Inputs.of(plan))

    # --- loop thread -------------------------------------------------------------------------------------------------

    def _open(self) -> Thread:
        self._woken, self._wakes = os.pipe()
        os.set_blocking(self._woken, False)
        os.set_blocking(self._wakes, False)
        asyncio.get_running_loop().add_reader(self._woken, self._arrived)
        if self._torch_threads is not None:
            torch.set_num_threads(self._torch_threads)
        thread = Thread(target=self._compute_all, name="terrace-device", daemon=True)
        thread.start()
        return thread

    def _arrived(self) -> None:
        ended = b""
        with suppress(BlockingIOError):
            ended = os.read(self._woken, 64)
        for _ in ended:
            launched, done = self._under_way.popleft()
            _end(done, self._result(launched))

    def _over(self, done: _Done, result: StepResult | BaseException) -> None:
        """The device thread has done a job."""
        self._given -= 1
        _end(done, result)

    # --- device thread -----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _compute_all(self) -> None:
        if self._torch_threads is not None:
            torch.set_num_threads(self._torch_threads)
        while (job := self._jobs.get()) is not None:
            plan, inputs, done = job
            result: StepResult | BaseException
            try:
                result = self._compute(plan, inputs or _Inputs.of(plan))
            except BaseException as error:  # noqa: BLE001 - whoever waits for the step is told
                self._forget()
                result = error
            done.get_loop().call_soon_threadsafe(self._over, done, result)

    def _compute(self, plan: StepPlan, inputs: _Inputs) -> StepResult:
        if self._launches(inputs):
            return self._result(self._begin(plan, inputs, -1))
        last, followed = self._plan(plan, inputs)
        flat = inputs.flat
        if last is not None:
            sampled = last.download.wait()[0]
            for place, source in followed:
                flat.tokens[place] = sampled[source]
        started_s = self._clock()
        tokens, positions, wanted = map(torch.from_numpy, (flat.tokens, flat.positions, flat.wanted))
        step = tokens, positions, self._attention, wanted
        if flat.pools:
            outputs = self._readout.of_states(plan, flat, self._model.forward(*step))
        else:
            outputs = self._readout.of_logits(plan, flat, self._model.scores(*step), {})
        ends = self._readout.advance(flat, outputs.chosen.tolist())
        launched = Launched(outputs, _Computed(outputs.tensors(), self._clock() - started_s), ends, bool(followed))
        self._before = (*self._before[-1:], launched)
        return self._result(launched)

    # --- whichever thread has the model ------------------------------------------------------------------------------

    def _launches(self, inputs: _Inputs) -> bool:
        """Whether the kernels can compute it by themselves."""
        return inputs.alone and self._model.launches(self._attention)

    def _begin(self, plan: StepPlan, inputs: _Inputs, wakes: int) -> Launched:
        """Hands it to the kernels: it is computed when those before it have been."""
        last, followed = self._plan(plan, inputs)
        assert inputs.alone, "more than tokens is wanted"
        follow = None
        if last is not None and followed:
            places, sources = (np.array(column, np.int64) for column in zip(*followed, strict=True))
            follow = Follow(last.outputs.chosen.numpy(), places, sources)
        flat = inputs.flat
        step = flat.tokens, flat.positions, self._attention, flat.wanted
        begun = self._model.launch(*step, self._readout.choice(flat), follow, wakes)
        asking, tops = [flat.sampled[i] for i in flat.asking], [list(flat.asking.values())] if flat.asking else []
        outputs = Outputs(plan, flat, torch.from_numpy(begun.chosen), asking, (), (), tops, {})
        launched = Launched(outputs, begun, {}, bool(followed))
        self._before = (*self._before[-1:], launched)
        return launched

    def _plan(self, plan: StepPlan, inputs: _Inputs) -> tuple[Launched | None, list[tuple[int, int]]]:
        """The step before this one, and what is fed from it, as `fed` has it. The backend has planned this one."""
        self._readout.forget(plan.retired)
        last = self._before[-1] if self._before else None
        followed = fed(plan.rows, inputs.flat, last.places() if last else {})
        if len(self._before) > 1:
            self._before[0].download.wait()  # this one takes its place in the backend
        self._attention.plan(inputs.flat.batch)
        return last, followed

    def _forget(self) -> None:
        """Nothing goes on from the steps so far, and none of them is under way any more."""
        for launched in self._before:
            launched.download.wait()
        self._before = ()

    def _result(self, launched: Launched) -> StepResult:
        return launched.result(launched.download.wait(), self._clock())


def _end(done: _Done, result: StepResult | BaseException) -> None:
    if done.cancelled():
        return
    if isinstance(result, BaseException):
        done.set_exception(result)
    else:
        done.set_result(result)
