"""The CUDA runner, on a device of the worst kind: it gives what the CPU's gives, two steps deep, and never waits."""

from __future__ import annotations

import asyncio
import random
from array import array
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from server.errors import DeviceLost, StepFailed
from server.kernels.attention import AttentionBackend, AttentionBatch
from server.kernels.cpu import CpuAttention
from server.kernels.reference import ReferenceAttention
from server.kvcache.arena import allocate_arena
from server.kvcache.manager import KVManager, TierSpec
from server.models.base import Parts
from server.models.layers import Linear, TorchParts
from server.models.llama import Llama
from server.runner import sampling
from server.runner.cuda import CudaRunner, Launched, WarmUp
from server.runner.device import CudaDevice
from server.runner.grammar import Vocabulary, compile_grammar
from server.runner.graphs import buckets
from server.runner.runner import TorchRunner
from server.runner.sampling import BlindSampler, Sampler
from server.scheduler.limits import Limits
from server.scheduler.policy import make_policy
from server.scheduler.request import request_from
from server.scheduler.scheduler import Scheduler
from server.types import (
    DEVICE,
    BlockLayout,
    Choice,
    Regex,
    SampleSpec,
    SamplingParams,
    StepPlan,
    StepResult,
    StepRow,
)
from tests.unit.drawing import sample
from tests.unit.late_device import LateDevice, LateDownload, unwatched

VOCAB, FRAMES, BLOCK_TOKENS, END = 256, 48, 4, 255


class RowLinear(Linear):
    """A row at a time, so that a row's bits are the same in every batch: padding cannot be seen in them."""

    __slots__ = ()

    def __call__(self, x: Tensor) -> Tensor:
        rows = [super(RowLinear, self).__call__(row) for row in x.split(1)]
        return torch.cat(rows) if len(x) else super().__call__(x)


class RowParts(TorchParts):
    def linear(self, inputs: int, outputs: int, bias: bool = False) -> Linear:
        return RowLinear(inputs, outputs, bias, self.dtype, self.device)


def tiny_model(parts: Parts) -> Llama:
    """The same weights, of whatever it is made."""
    config = SimpleNamespace(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, max_position_embeddings=512, rms_norm_eps=1e-5, tie_word_embeddings=False,
        rope_theta=1e4,
    )  # fmt: skip
    model = Llama.build(config, parts)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters().values():
        values = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(values * 3 / parameter.shape[1] ** 0.5 if len(parameter.shape) == 2 else 1 + values * 0.3)
    return model


MODEL = tiny_model(RowParts(torch.float32, "cpu"))


def arena() -> Tensor:
    """One frame more than there are to be had."""
    g = MODEL.geometry
    layout = BlockLayout(g.layers, g.kv_heads, g.head_dim, 4, BLOCK_TOKENS)
    return allocate_arena(FRAMES + 1, layout, torch.float32)


class Eager:
    """A backend without graphs, whose own reads are not counted."""

    def __init__(self, kind: type[AttentionBackend]) -> None:
        self._inner = kind(arena(), MODEL.geometry)
        self.fails: Exception | None = None

    def plan(self, batch: AttentionBatch) -> None:
        if self.fails is not None:
            raise self.fails
        with unwatched():
            self._inner.plan(batch)

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with unwatched():
            return self._inner.run(layer, q, k, v)


class Graphed(Eager):
    """A backend with graphs."""

    def graph(self, rows: int) -> Padded:
        return Padded(self, rows)


class Padded:
    """Decode steps of exactly `rows` rows; the last frame is nobody's."""

    def __init__(self, backend: Eager, rows: int) -> None:
        self._backend, self._rows = backend, rows
        self.run = backend.run

    def plan(self, batch: AttentionBatch) -> None:
        spare = self._rows - batch.rows
        assert 0 <= spare < self._rows
        none, frame = np.zeros(spare, np.int32), np.array([FRAMES], np.int32)
        self._backend.plan(
            AttentionBatch(
                np.arange(self._rows + 1, dtype=np.int32),
                np.concatenate((batch.starts, none)),
                np.concatenate((batch.context_lens, none + 1)),
                [*batch.frames, *[frame] * spare],
            )
        )


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Operations this small gain nothing from a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- what to run -----------------------------------------------------------------------------------------------------

VOCABULARY = Vocabulary([bytes([i]) for i in range(END)] + [b""], {"<end>": END})
GRAMMARS = [
    compile_grammar(VOCABULARY, constraint)
    for constraint in (Regex("[a-d]{3,9}"), Choice(("yes", "no")), Regex("(ab|cd)+"))
]


def random_params(rng: random.Random) -> SamplingParams:
    """Of every kind: greedy, drawn, filtered, edited, with a history, constrained; or a prompt to be pooled."""
    if rng.random() < 0.12:
        return SamplingParams(0, pooling=rng.choice(("mean", "last")))
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {},
        {"top_p": 0.9},
        {"top_k": 5, "top_p": 0.8},
        {"top_p": 0.3, "min_p": 0.05},
        {"logit_bias": {3: 4.0, 9: -5.0}, "min_tokens": 3, "stop_token_ids": frozenset(range(60))},
        {"allowed_token_ids": list(range(40, 90))},
    ]
    params = rng.choice(kinds) | {"seed": rng.randrange(2**32)}
    if rng.random() < 0.3:
        params["logprobs"] = rng.choice((0, 1, 4))
    if rng.random() < 0.2:
        params["prompt_logprobs"] = rng.choice((0, 3))
    if rng.random() < 0.1:
        params |= rng.choice(({"presence_penalty": 0.7, "repetition_penalty": 1.2}, {"bad_sequences": [(5, 6), (7,)]}))
    if rng.random() < 0.12:
        params |= {"grammar": rng.choice(GRAMMARS), "stop_token_ids": frozenset({END}), "allowed_token_ids": ()}
    return SamplingParams(rng.randint(1, 12), **params)


class Line:
    """Scheduler and requests, as the engine would drive them, but without clock and loop."""

    def __init__(self, seed: int, requests: int, *, frames: int = FRAMES) -> None:
        g = MODEL.geometry
        kv = KVManager(
            BlockLayout(g.layers, g.kv_heads, g.head_dim, 4, BLOCK_TOKENS), [TierSpec(DEVICE, frames, "lru")], b""
        )
        self.scheduler = Scheduler(kv, make_policy("fcfs"), Limits(6, 40, 16, 100, 10**6, 100))
        self._rng = random.Random(seed)
        self._left = requests
        self._ids = 0

    def submit(self) -> None:
        """Some of the requests that are left, now and then."""
        if self._rng.random() < 0.7 and not self.scheduler.idle:
            return
        for _ in range(min(self._left, self._rng.randint(1, 4))):
            self._left -= 1
            self._ids += 1
            prompt = [self._rng.randrange(VOCAB) for _ in range(self._rng.randint(1, 30))]
            params = random_params(self._rng)
            self.scheduler.submit(request_from(self._ids, prompt, params, self.scheduler.kv.root(""), now=0.0))

    @property
    def over(self) -> bool:
        return self._left == 0 and self.scheduler.idle


class Rig:
    """A runner on the late device, driven in this thread, so that the test decides what happens when."""

    def __init__(self, attention: Eager, *, graph_rows: int = 0) -> None:
        self.device = LateDevice(hold=True)
        self.followed = 0
        self.attention = attention
        self.runner = CudaRunner(MODEL, attention, self.device, lambda: 10.0, graph_rows=max(1, graph_rows))
        self.device.adopt()
        if graph_rows:
            self.runner._warm_up(lambda done, of: None, 8)

    def launch(self, plan: StepPlan) -> tuple[Launched, LateDownload]:
        """Also asserts that nothing was waited for, unless a grammar needs it; then its tokens come at once."""
        self.followed += any(row.follows for row in plan.rows)
        needed = any(row.sample is not None and row.sample.params.grammar is not None for row in plan.rows)
        self.device.looks.seen.clear()
        self.device.hold = not needed
        launched = self.runner.launch(plan)
        assert self.device.looks.seen == (["wait"] if needed else [])
        return launched, self.device.downloads[-1]

    def step(self, plan: StepPlan) -> StepResult:
        launched, down = self.launch(plan)
        down.release()
        return self.runner.finish(launched)

    def close(self) -> None:
        self.device.leave()


def facts(result: StepResult) -> tuple[Any, ...]:
    """All but the times, in a form that compares bit by bit."""
    pooled = {place: vector.tobytes() for place, vector in result.pooled.items()}
    scores = [None if entries is None else list(entries) for entries in result.prompt_logprobs]
    return result.id, list(result.tokens), list(result.logprobs), scores, pooled, dict(result.ends)


def assert_aligned(plan: StepPlan, result: StepResult) -> None:
    """Each entry describes the token of its own row, with as many alternatives as that asked for."""
    for place, row in enumerate(plan.rows):
        entry, scores = result.logprobs[place], result.prompt_logprobs[place]
        top = None if row.sample is None else row.sample.params.logprobs
        assert (entry is None) == (top is None or result.tokens[place] is None)
        if entry is not None:
            assert (entry.token, len(entry.top)) == (result.tokens[place], top)
        assert (scores is None) == (row.targets is None)
        assert [score.token for score in scores or ()] == list(row.targets or ())
        assert (place in result.pooled) == (row.pool is not None and row.pool.ends)


def run_plain(seed: int, requests: int, kind: type[AttentionBackend]) -> dict[int, tuple[Any, ...]]:
    """What `TorchRunner` makes of the line's steps in torch, by plan."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "load", lambda: None)
        runner = TorchRunner(MODEL, Eager(kind), lambda: 0.0)
    line, found = Line(seed, requests), {}
    while not line.over:
        line.submit()
        plan = line.scheduler.plan(0.0)
        while plan is not None:
            ahead = line.scheduler.plan_ahead()
            result = runner.step(plan)
            assert_aligned(plan, result)
            found[plan.id] = facts(result)
            line.scheduler.commit(plan, result, 0.0)
            plan = ahead
    return found


def run_deep(rig: Rig, seed: int, requests: int) -> dict[int, tuple[Any, ...]]:
    """The same steps, each launched before the one before it is read; which of the two comes first is up to chance."""
    line, found, order = Line(seed, requests), {}, random.Random(seed)
    while not line.over:
        line.submit()
        plan = line.scheduler.plan(0.0)
        going = None if plan is None else rig.launch(plan)
        while plan is not None and going is not None:
            ahead = line.scheduler.plan_ahead()
            next_going = None if ahead is None else rig.launch(ahead)
            if next_going is not None and order.random() < 0.5:
                next_going[1].release()
            going[1].release()
            result = rig.runner.finish(going[0])
            found[plan.id] = facts(result)
            line.scheduler.commit(plan, result, 0.0)
            plan, going = ahead, next_going
    return found


def decode(id: int, position: int, params: SamplingParams, *, follows: bool = False) -> StepRow:
    """A row that feeds the token at `position` of a request that has frames 8 * id up to 8 * id + 7 to itself."""
    frames = np.arange(8 * id, 8 * id + 8, dtype=np.int32)
    spec = SampleSpec(params, position + 1, 1, range(position + 1))
    return StepRow(id, array("i", (0 if follows else position,)), position, frames, spec, follows=follows)


Rigs = Callable[..., Rig]


@pytest.fixture
def rigs() -> Iterator[Rigs]:
    made: list[Rig] = []

    def make(*args: Any, **options: Any) -> Rig:
        made.append(Rig(*args, **options))
        return made[-1]

    yield make
    for rig in reversed(made):
        rig.close()


# --- the same results ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "graph_rows"),
    [(ReferenceAttention, 0), (CpuAttention, 0), (ReferenceAttention, 4), (ReferenceAttention, 9)],
)
def test_results_are_those_of_the_cpu(rigs: Rigs, kind: type[AttentionBackend], graph_rows: int) -> None:
    """Any mix of requests gives what `TorchRunner` gives, bit for bit: two steps deep, whichever read-back comes first,
    kernel by kernel or by graphs with padding. Nothing but a grammar makes a launch wait."""
    rig = rigs((Graphed if graph_rows else Eager)(kind), graph_rows=graph_rows)
    steps = 0
    for seed in range(12):
        expected = run_plain(seed, 14, kind)
        assert run_deep(rig, seed, 14) == expected
        steps += len(expected)
    work = rig.runner.host_work
    assert work.graph_steps + work.eager_steps == steps
    assert rig.followed > steps / 5
    assert (work.graph_steps > steps / 5) == (graph_rows > 0)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([0.1, 1.0, 4.0]))
def test_a_blind_sampler_draws_the_same(seed: int, scale: float) -> None:
    """Without a look at what was ranked, tokens are those that stepwise ranking finds, in wide and narrow nuclei."""
    rng, vocab = random.Random(seed), 1500
    logits = torch.randn(8, vocab, generator=torch.Generator().manual_seed(seed)).mul(8).round().div(8) * scale
    filters = [{"top_k": rng.choice((0, 1, 40, 600, 5000)), "top_p": rng.choice((0.05, 0.9, 0.9999))} for _ in range(8)]
    params = [SamplingParams(9, seed=row, min_p=rng.choice((0.0, 0.1)), **kept) for row, kept in enumerate(filters)]
    specs = [SampleSpec(one, 5, 1, range(5)) for one in params]
    blind, stepwise = BlindSampler(vocab, torch.from_numpy), Sampler(vocab)
    stepwise.use_torch()
    assert sample(blind, logits, range(8), specs) == sample(stepwise, logits, range(8), specs)


# --- without waiting -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("graph_rows", [0, 8])
def test_a_decode_step_waits_for_nothing(rigs: Rigs, graph_rows: int) -> None:
    """Whatever its rows ask for, but grammars, a step is launched without one look at the device; so is the step that
    follows it, before anything of the first has come back."""
    rig = rigs(Graphed(ReferenceAttention), graph_rows=graph_rows)
    asked: list[dict[str, Any]] = [
        {"temperature": 0.0, "logprobs": 3},
        {"top_p": 0.9},
        {"top_k": 20, "logit_bias": {3: 1.0}, "logprobs": 0},
        {"allowed_token_ids": [1, 2, 3], "min_p": 0.1, "min_tokens": 9, "stop_token_ids": frozenset({2})},
    ]
    params = [SamplingParams(50, **one) for one in asked]
    rig.device.looks.seen.clear()
    rig.runner.launch(StepPlan(1, [decode(id, 6, one) for id, one in enumerate(params)]))
    rig.runner.launch(StepPlan(2, [decode(id, 7, one, follows=True) for id, one in enumerate(params)]))
    edited = SamplingParams(50, presence_penalty=1.0, repetition_penalty=1.1, bad_sequences=[(1, 2)])
    rig.runner.launch(StepPlan(3, [decode(0, 8, edited), decode(1, 8, params[0])]))
    assert rig.device.looks.seen == []
    assert rig.device.replays == (3 if graph_rows else 0)


def test_the_count_of_looks_counts(rigs: Rigs) -> None:
    """What would wait is seen: a sampler that looks, and a grammar, for which the device thread has to wait."""
    rig = rigs(Eager(ReferenceAttention))
    seen = rig.device.looks.seen
    logits = torch.randn(2, VOCAB)
    specs = [SampleSpec(SamplingParams(9, top_p=0.9), 5, 1, range(5))] * 2
    looking = Sampler(VOCAB, lambda array: rig.device.put(array)[0])
    looking.use_torch()
    looking.choose(logits, range(2), specs)
    assert "tolist" in seen
    seen.clear()
    BlindSampler(VOCAB, lambda array: rig.device.put(array)[0]).choose(logits, range(2), specs)
    assert seen == []
    rig.device.hold = False
    params = SamplingParams(9, grammar=GRAMMARS[0])
    rig.runner.launch(StepPlan(1, [decode(0, 0, params)]))
    assert seen == ["wait"]


async def test_two_steps_are_under_way() -> None:
    """By its own threads: the second step is launched while the first has not come back, the results come in order, and
    with the times of the device's clock."""
    device = LateDevice(hold=True)
    runner = CudaRunner(MODEL, Eager(ReferenceAttention), device, lambda: 10.0, graph_rows=0)
    params = SamplingParams(50, temperature=0.0)
    first = asyncio.ensure_future(runner.run(StepPlan(1, [decode(0, 6, params)])))
    await until(lambda: len(device.downloads) == 1)
    second = asyncio.ensure_future(runner.run(StepPlan(2, [decode(0, 7, params, follows=True)])))
    await until(lambda: len(device.downloads) == 2)
    device.downloads[1].release()
    await asyncio.sleep(0.02)
    assert not first.done()
    assert not second.done()
    device.downloads[0].release()
    results = [await first, await second]
    plain = TorchRunner(MODEL, Eager(ReferenceAttention), lambda: 0.0)
    plans = [StepPlan(1, [decode(0, 6, params)]), StepPlan(2, [decode(0, 7, params, follows=True)])]
    assert [facts(result) for result in results] == [facts(plain.step(plan)) for plan in plans]
    assert (results[1].started_s, results[1].finished_s) == (9.75, 10.0)
    await runner.aclose()
    await plain.aclose()


async def until(done: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not done():  # noqa: ASYNC110 - what other threads do sets no event
            await asyncio.sleep(0.001)


# --- graphs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("most", "expected"),
    [(1, [1]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (20, [1, 2, 4, 8, 16, 20]), (24, [1, 2, 4, 8, 16, 24])],
)
def test_buckets(most: int, expected: list[int]) -> None:
    """Every number of rows up to the greatest has a bucket that is at most 7 rows larger."""
    assert buckets(most) == expected


async def test_warming_up_captures_and_says_so() -> None:
    """The largest step is run, and all buckets are captured, the largest first; progress is told, and the memory that
    each took is returned."""
    device, told, rows = LateDevice(), [], []

    class Noting(Graphed):
        def graph(self, count: int) -> Padded:
            rows.append(count)
            return super().graph(count)

    runner = CudaRunner(MODEL, Noting(ReferenceAttention), device, lambda: 0.0, graph_rows=10)
    taken = await runner.warm_up(lambda done, of: told.append((done, of)), 64)
    assert taken == WarmUp(step=(2 * 64 + 10) * 8, graphs=5000)
    assert rows == [10, 8, 4, 2, 1]
    assert told == [(done, 5) for done in range(1, 6)]
    await runner.aclose()


async def test_a_backend_without_graphs_is_run_kernel_by_kernel() -> None:
    """Warming up captures nothing then, and decode steps are launched all the same."""
    device = LateDevice()
    runner = CudaRunner(MODEL, Eager(ReferenceAttention), device, lambda: 0.0, graph_rows=0)
    assert (await runner.warm_up(lambda done, of: None, 16)).graphs == 0
    await runner.run(StepPlan(1, [decode(0, 6, SamplingParams(9))]))
    assert (runner.host_work.graph_steps, runner.host_work.eager_steps, device.captured) == (0, 1, 0)
    await runner.aclose()


def test_more_rows_than_the_largest_graph(rigs: Rigs) -> None:
    """A decode step beyond the largest graph, and one that wants more than tokens, are launched kernel by kernel."""
    rig = rigs(Graphed(ReferenceAttention), graph_rows=2)
    params = SamplingParams(9)
    for rows in (1, 2, 3):
        rig.step(StepPlan(rows, [decode(id, 6, params) for id in range(rows)]))
    row = decode(0, 6, params)
    row.prompt_logprobs, row.targets = 1, array("i", (5,))
    rig.step(StepPlan(4, [row]))
    assert (rig.runner.host_work.graph_steps, rig.runner.host_work.eager_steps) == (2, 2)


def test_host_time_is_counted(rigs: Rigs) -> None:
    """`launch_s` adds up what launches took of the device thread, by the runner's clock."""
    rig = rigs(Eager(ReferenceAttention))
    ticks = iter(range(100))
    rig.runner._clock = lambda: float(next(ticks))
    rig.runner.launch(StepPlan(1, [decode(0, 6, SamplingParams(9))]))
    rig.runner.launch(StepPlan(2, [decode(0, 6, SamplingParams(9))]))
    assert rig.runner.host_work.launch_s == 2.0


# --- errors ----------------------------------------------------------------------------------------------------------


def test_a_failed_launch_fails_what_follows(rigs: Rigs) -> None:
    """A step that cannot be launched fails, so does the one that follows it, and the next works; the device was idle
    before anybody was told."""
    rig, params = rigs(Eager(ReferenceAttention)), SamplingParams(50, temperature=0.0)
    rig.step(StepPlan(0, [decode(0, 5, params)]))
    rig.device.looks.seen.clear()
    rig.attention.fails = RuntimeError("no memory")
    with pytest.raises(StepFailed, match="RuntimeError"):
        rig.runner.launch(StepPlan(1, [decode(0, 6, params)]))
    assert rig.device.looks.seen == ["synchronise"]
    rig.attention.fails = None
    with pytest.raises(StepFailed, match="before it"):
        rig.runner.launch(StepPlan(2, [decode(0, 7, params, follows=True)]))
    assert rig.step(StepPlan(3, [decode(1, 6, params)])).tokens[0] is not None


def test_a_step_that_fails_on_the_device_fails_what_follows(rigs: Rigs) -> None:
    """When the error shows only as the tokens are read, the step that was launched meanwhile fails as well, after it
    has come back, and one that follows neither does not."""
    rig, params = rigs(Eager(ReferenceAttention)), SamplingParams(50, temperature=0.0)
    plans = [StepPlan(1, [decode(0, 6, params)]), StepPlan(2, [decode(0, 7, params, follows=True)])]
    (first, first_down), (second, second_down) = (rig.launch(plan) for plan in plans)
    first_down.release(RuntimeError("misaligned"))
    with pytest.raises(StepFailed, match="RuntimeError"):
        rig.runner.finish(first)
    second_down.release()
    with pytest.raises(StepFailed, match="before it"):
        rig.runner.finish(second)
    assert rig.step(StepPlan(3, [decode(0, 6, params)])).tokens[0] is not None


@pytest.mark.parametrize("launching", [True, False])
def test_a_lost_device_is_the_end(rigs: Rigs, launching: bool) -> None:
    """A device that does not even answer a synchronisation is lost, for that step and for all to come."""
    rig, params = rigs(Eager(ReferenceAttention)), SamplingParams(50)
    rig.device.lost = True
    if launching:
        rig.attention.fails = RuntimeError("an illegal memory access was encountered")
        with pytest.raises(DeviceLost, match="illegal"):
            rig.runner.launch(StepPlan(1, [decode(0, 6, params)]))
        rig.attention.fails = None
    else:
        launched, down = rig.launch(StepPlan(1, [decode(0, 6, params)]))
        down.release(RuntimeError("an illegal memory access was encountered"))
        with pytest.raises(DeviceLost, match="illegal"):
            rig.runner.finish(launched)
    with pytest.raises(DeviceLost):
        rig.runner.launch(StepPlan(2, [decode(1, 6, params)]))


async def test_a_lost_device_reaches_who_awaits_the_step() -> None:
    """Through threads and tasks, `run` raises DeviceLost."""
    device = LateDevice(hold=True)
    runner = CudaRunner(MODEL, Eager(ReferenceAttention), device, lambda: 0.0, graph_rows=0)
    work = asyncio.ensure_future(runner.run(StepPlan(1, [decode(0, 6, SamplingParams(9))])))
    await until(lambda: len(device.downloads) == 1)
    device.lost = True
    device.downloads[0].release(RuntimeError("unspecified launch failure"))
    with pytest.raises(DeviceLost):
        await work
    await runner.aclose()


# --- with a GPU ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_nothing_waits_and_graphs_replay() -> None:
    """On CUDA the blind sampler never synchronises, what is put and downloaded is whole, and a graph does its work
    again on what its memory holds then."""
    device = CudaDevice()
    device.adopt()
    logits = torch.randn(4, 152_064, device="cuda")
    asked: list[dict[str, Any]] = [{"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 50, "min_p": 0.1}, {"min_p": 0.5}]
    specs = [SampleSpec(SamplingParams(9, seed=row, **one), 5, 1, range(5)) for row, one in enumerate(asked)]
    sampler = BlindSampler(152_064, lambda array: device.put(array)[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        since = device.mark()
        chosen = sampler.choose(logits, range(4), specs)
        download = device.download([chosen, *sampler.describe(logits, chosen, 3)], since)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    on_host = Sampler(152_064).choose(logits.cpu(), range(4), specs)
    assert download.wait()[0].tolist()[0] == on_host.tolist()[0]
    assert download.busy_s() > 0
    numbers, doubled = device.put(np.arange(8))[0].clone(), torch.zeros(8, dtype=torch.int64, device="cuda")
    replay = device.capture(lambda: doubled.copy_(numbers * 2))
    numbers.copy_(device.put(np.arange(8) + 100)[0])
    replay()
    assert device.download([doubled], device.mark()).wait()[0].tolist() == list(range(200, 216, 2))
