"""Pooled prompts are the means and the last of transformers' final hidden states, however their steps are cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from server.kernels.attention import BACKENDS
from server.kvcache.arena import allocate_arena
from server.kvcache.manager import KVManager, TierSpec
from server.models.weights import load_model
from server.registry import resolve
from server.runner.runner import TorchRunner
from server.scheduler.limits import Limits
from server.scheduler.policy import make_policy
from server.scheduler.request import Request, request_from
from server.scheduler.scheduler import Scheduler
from server.types import DEVICE, BlockLayout, Pooling, SamplingParams, Vector
from tests.numeric.conftest import Checkpoint
from tests.numeric.families import FAMILIES
from tests.numeric.test_models import random_tokens

TOLERANCE = 1e-4
"""Greatest absolute difference of a component, relative to the components' standard deviation."""


class Line:
    """Scheduler and runner over a real model, without clock and loop."""

    def __init__(self, checkpoint: Checkpoint, name: str, *, frames: int = 200, chunk: int = 1000) -> None:
        folder, self.reference = checkpoint(name)
        model = load_model(folder)
        g = model.geometry
        layout = BlockLayout(g.layers, g.kv_heads, g.head_dim, 4, 8)
        arena = allocate_arena(frames, layout, torch.float32)
        attention = resolve("attention backend", BACKENDS, "cpu")(arena, g)
        self.runner = TorchRunner(model, attention, lambda: 0.0)
        kv = KVManager(layout, [TierSpec(DEVICE, frames, "lru")], b"test")
        self.scheduler = Scheduler(kv, make_policy("fcfs"), Limits(8, 1000, chunk, 100, 10**6, 400))
        self.found: dict[int, Vector] = {}
        self._ids = 0

    def submit(self, tokens: list[int], params: SamplingParams) -> Request:
        self._ids += 1
        request = request_from(self._ids, tokens, params, self.scheduler.kv.root(""), now=0.0)
        self.scheduler.submit(request)
        return request

    def pool(self, tokens: list[int], pooling: Pooling) -> Request:
        return self.submit(tokens, SamplingParams(0, pooling=pooling))

    def run(self) -> dict[int, Vector]:
        """Steps until nothing is left; the vectors by request."""
        while (plan := self.scheduler.plan(0.0)) is not None:
            for event in self.scheduler.commit(plan, self.runner.step(plan), 0.0):
                if event.pooled is not None:
                    self.found[event.request_id] = event.pooled
        assert self.scheduler.idle
        return self.found

    @torch.inference_mode()
    def expected(self, tokens: list[int], pooling: Pooling) -> Vector:
        states = self.reference.model(torch.tensor([tokens])).last_hidden_state[0]
        vector: Vector = (states.mean(0) if pooling == "mean" else states[-1]).numpy()
        return vector

    def close(self, request: Request, pooling: Pooling) -> bool:
        expected = self.expected(list(request.tokens), pooling)
        return bool(np.abs(self.found[request.id] - expected).max() <= TOLERANCE * expected.std())


@pytest.mark.parametrize("chunk", [1000, 13])
@pytest.mark.parametrize("name", FAMILIES)
def test_pooled_states_are_those_of_transformers(checkpoint: Checkpoint, name: str, chunk: int) -> None:
    """Both ways of pooling, for prompts of several lengths side by side and beside generation, whole or in chunks."""
    line = Line(checkpoint, name, chunk=chunk)
    line.submit(random_tokens(20, seed=1), SamplingParams(12, temperature=0.0))
    asked: list[tuple[Request, Pooling]] = [
        (line.pool(random_tokens(length, seed=length), pooling), pooling)
        for length in (1, 8, 50)
        for pooling in ("mean", "last")
    ]
    line.run()
    assert all(line.close(request, pooling) for request, pooling in asked)


def test_the_cache_helps_the_last_and_never_spoils_the_mean(checkpoint: Checkpoint) -> None:
    """With its prefix cached, `last` computes only the rest and `mean` everything; both are right."""
    line = Line(checkpoint, "llama2")
    tokens = random_tokens(60, seed=2)
    line.pool(tokens, "last")
    line.run()
    last, mean = line.pool(tokens, "last"), line.pool(tokens, "mean")
    line.run()
    assert (last.cached_tokens, mean.cached_tokens) == (56, 0)
    assert line.close(last, "last")
    assert line.close(mean, "mean")


def test_a_preempted_prompt_is_pooled_from_its_beginning(checkpoint: Checkpoint) -> None:
    """A request that grows takes the blocks of one half summed up: that one starts again, and its sum with it."""
    line = Line(checkpoint, "llama2", frames=16, chunk=4)
    line.submit(random_tokens(8, seed=3), SamplingParams(100, temperature=0.0))
    line.pool(random_tokens(5, seed=4), "mean")
    pooled = line.pool(random_tokens(100, seed=5), "mean")
    while pooled.computed_tokens < 60:
        plan = line.scheduler.plan(0.0)
        assert plan is not None
        line.scheduler.commit(plan, line.runner.step(plan), 0.0)
    line.submit(random_tokens(8, seed=6), SamplingParams(4, temperature=0.0))
    line.run()
    assert pooled.preemptions > 0
    assert line.close(pooled, "mean")
