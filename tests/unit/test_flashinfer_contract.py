"""FlashInferAttention over stand-ins for FlashInfer and CUDA, and its calls against the real module's signatures."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from server.kernels import flashinfer as kernels
from server.kernels.attention import AttentionBatch
from server.kernels.flashinfer import GraphAttention, Operations, obstacle, workspace_bytes
from tests.numeric.flashinfer_fake import FakedFlashInfer, FakeFlashInfer, windows_planned
from tests.numeric.oracle import Scene, geometry, scene

TOLERANCE = 2e-6
DECODE = [(5, 1), (0, 1), (16, 1), (15, 1), (64, 1), (33, 1), (7, 1), (8, 1)]


def with_spare_frame(it: Scene) -> Scene:
    """The arena has one frame more than there are to be had, poisoned like the others."""
    it.arena = torch.cat((it.arena, torch.full_like(it.arena[:1], float("nan"))))
    return it


def rows_of(it: Scene, rows: Sequence[int]) -> AttentionBatch:
    """Some decode rows of a scene, in any order."""
    starts = it.batch.starts[list(rows)]
    return AttentionBatch(
        np.arange(len(rows) + 1, dtype=np.int32), starts, starts + 1, [it.batch.frames[row] for row in rows]
    )


@dataclass
class Captured:
    """A decode graph, captured once over static inputs. `step` replays it."""

    backend: FakedFlashInfer
    graph: GraphAttention
    it: Scene
    rows: int

    def __post_init__(self) -> None:
        g, n = self.it.geometry, self.rows
        self.q = torch.zeros(n, g.heads, g.head_dim)
        self.k, self.v = (torch.zeros(g.layers, n, g.kv_heads, g.head_dim) for _ in range(2))
        with self.backend.flashinfer.capture() as self.kernels:
            self.out = [self.graph.run(layer, self.q, self.k[layer], self.v[layer]) for layer in range(g.layers)]

    def step(self, rows: Sequence[int]) -> Tensor:
        """[layers, rows, heads * head_dim] of these rows of the scene."""
        for static, source in ((self.q, self.it.q), (self.k[0], self.it.k[0]), (self.v[0], self.it.v[0])):
            static[: len(rows)] = source[list(rows)]
        for layer in range(1, self.it.geometry.layers):
            self.k[layer, : len(rows)] = self.it.k[layer, list(rows)]
            self.v[layer, : len(rows)] = self.it.v[layer, list(rows)]
        self.graph.plan(rows_of(self.it, rows))
        for kernel in self.kernels:
            kernel()
        return torch.stack(self.out)[:, : len(rows)]


def captured(it: Scene, *sizes: int) -> list[Captured]:
    backend = FakedFlashInfer(it.arena, it.geometry)
    return [Captured(backend, backend.graph(rows), it, rows) for rows in sizes]


@settings(max_examples=30)
@given(
    steps=st.lists(st.lists(st.sampled_from(range(8)), min_size=1, max_size=8, unique=True), min_size=1, max_size=5),
    windows=st.sampled_from([(None, None), (None, 12), (12, 1)]),
)
def test_replays_attend_as_planned(steps: list[list[int]], windows: tuple[int | None, ...]) -> None:
    """Graphs captured once give exact attention for any 1 to `rows` decode rows, in turn and sharing their memory."""
    it = with_spare_frame(scene(geometry(windows=windows), DECODE))
    graphs = captured(it, 8, 4, 1)
    for rows in steps:
        fitting = min((graph for graph in graphs if graph.rows >= len(rows)), key=lambda graph: graph.rows)
        error = (fitting.step(rows).double() - it.expected[:, rows]).abs().max().item()
        assert error <= TOLERANCE


def test_padding_touches_the_last_frame_only() -> None:
    """Padding rows write no byte outside the arena's last frame."""
    it = with_spare_frame(scene(geometry(), DECODE))
    (graph,) = captured(it, 8)
    graph.step([3])
    before = it.arena.clone()
    graph.step([3])
    assert torch.equal(it.arena[:-1].view(torch.int32), before[:-1].view(torch.int32))
    assert it.arena[-1, :, :, :, 0].isfinite().all()
    assert it.arena[-1, :, :, :, 1:].isnan().all()


def test_graph_steps_and_other_steps_alternate() -> None:
    """A prefill step between two replays leaves the graph's plan and memory alone."""
    it = with_spare_frame(scene(geometry(windows=(None, 12)), [*DECODE, (3, 40)]))
    graph = captured(it, 4)[0]
    for _ in range(2):
        assert (graph.step([4, 1]).double() - it.expected[:, [4, 1]]).abs().max() <= TOLERANCE
        graph.backend.plan(it.batch)
        for layer in range(it.geometry.layers):
            out = graph.backend.run(layer, it.q, it.k[layer], it.v[layer])
            assert (out.double() - it.expected[layer]).abs().max() <= TOLERANCE


def test_a_changed_layout_is_not_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that lays its memory out otherwise than the captured one is an error before anything is replayed."""
    it = with_spare_frame(scene(geometry(), DECODE))
    (graph,) = captured(it, 4)
    real = FakeFlashInfer.fast_decode_plan

    def other_layout(self: FakeFlashInfer, wrapper: Any, **kwargs: Any) -> None:
        real(self, wrapper, **kwargs)
        wrapper._wrapper._plan_info = [99]

    monkeypatch.setattr(FakeFlashInfer, "fast_decode_plan", other_layout)
    with pytest.raises(AssertionError, match="laid out"):
        graph.step([0])


def test_a_graph_refuses_what_it_was_not_captured_for() -> None:
    """More rows than captured, a row of several tokens, and more rows than there is memory for are errors."""
    it = with_spare_frame(scene(geometry(), [*DECODE[:2], (3, 4)]))
    backend = FakedFlashInfer(it.arena, it.geometry, max_rows=4)
    with pytest.raises(AssertionError, match="3 rows in a decode graph of 2"):
        backend.graph(2).plan(it.batch)
    with pytest.raises(AssertionError, match="rows of one token"):
        backend.graph(3).plan(it.batch)
    with pytest.raises(AssertionError, match="at most 4"):
        backend.graph(5)


def test_rows_out_of_order_are_permuted_only_then() -> None:
    """Decode rows that precede the prefill chunks keep their places: queries are gathered only in a mixed order."""
    ordered, mixed = [(5, 1), (9, 1), (0, 4)], [(5, 1), (0, 4), (9, 1)]
    for rows, permuted in ((ordered, False), (mixed, True)):
        it = scene(geometry(), rows)
        backend = FakedFlashInfer(it.arena, it.geometry)
        backend.plan(it.batch)
        q = it.q.clone()
        out = backend.run(0, q, it.k[0], it.v[0])
        run = next(call for call in backend.flashinfer.calls if call[0].endswith("DecodeWithPagedKVCacheWrapper.run"))
        assert (run[1][1].data_ptr() != q.data_ptr()) == permuted
        assert (out.double() - it.expected[0]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("windows", [(None, None), (12, None), (3, 12)], ids=str)
def test_one_plan_for_each_window(windows: tuple[int | None, ...]) -> None:
    """Layers of another window length have a plan of their own, and no others are made."""
    it = scene(geometry(windows=windows), [(5, 1), (3, 9)])
    backend = FakedFlashInfer(it.arena, it.geometry)
    backend.plan(it.batch)
    assert windows_planned(backend.flashinfer) == set(windows)
    assert sum(name.endswith("plan") for name, _, _ in backend.flashinfer.calls) == 2 * len(set(windows))


def test_fp8_values_are_capped_not_lost() -> None:
    """What an fp8 arena cannot hold becomes its largest value; the rest is rounded, and attention sees the rounded."""
    shape = geometry(layers=1, heads=2, kv_heads=1)
    it = scene(shape, [(0, 3)], dtype=torch.bfloat16)
    arena = torch.zeros(it.arena.shape).to(torch.float8_e4m3fn)
    k, v = it.k[0].bfloat16(), it.v[0].bfloat16()
    k[0, 0, 0], v[1, 0, 0] = 1e4, -1e4
    backend = FakedFlashInfer(arena, shape)
    backend.plan(it.batch)
    out = backend.run(0, it.q, k, v)
    frame = int(it.batch.frames[0][0])
    for plane, new in enumerate((k, v)):
        stored = arena[frame, 0, plane, 0, :3].float()
        assert torch.equal(stored, new[:, 0].float().clamp(-448, 448).to(torch.float8_e4m3fn).float())
    assert out.isfinite().all()
    assert torch.equal(out[0].view(2, -1), v[0].float().to(torch.float8_e4m3fn).float().expand(2, -1))  # sees itself


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dtype", "decode", "tensor_cores"),
    [
        (8, 2, torch.bfloat16, "auto", True),
        (8, 4, torch.bfloat16, "auto", False),
        (8, 4, torch.float8_e4m3fn, "auto", True),
        (8, 4, torch.bfloat16, "tensor-cores", True),
        (8, 2, torch.bfloat16, "cuda-cores", False),
    ],
)
def test_decode_kernels(heads: int, kv_heads: int, dtype: torch.dtype, decode: str, tensor_cores: bool) -> None:
    """Tensor cores decode where a KV head has four query heads or is fp8, unless a kernel is asked for."""
    shape = geometry(heads=heads, kv_heads=kv_heads)
    backend = FakedFlashInfer(torch.zeros(3, 2, 2, kv_heads, 8, 16, dtype=dtype), shape, decode=decode)
    backend.graph(2)
    made = {name: kwargs for name, _, kwargs in backend.flashinfer.calls if "Decode" in name and "." not in name}
    assert {kwargs["use_tensor_cores"] for kwargs in made.values()} == {tensor_cores}
    assert len(made) == 2


def test_nothing_is_where_it_should_not_be() -> None:
    """Sizes of plans are on the host, all else that FlashInfer gets is on the arena's device, and so are results."""
    it = scene(geometry(windows=(None, 12)), [(5, 1), (0, 4), (9, 1)])
    backend = FakedFlashInfer(it.arena.to("meta"), it.geometry)
    q, k, v = (tensor.to("meta") for tensor in (it.q, it.k, it.v))
    backend.plan(it.batch)
    out = [backend.run(layer, q, k[layer], v[layer]) for layer in range(2)]
    graph = backend.graph(2)
    graph.plan(rows_of(it, [0]))
    out.append(graph.run(0, q[:2], k[0, :2], v[0, :2]))
    assert {tensor.device.type for tensor in out} == {"meta"}


def test_memory_grows_with_the_model() -> None:
    """The workspace is what FlashInfer recommends for 8B models, and larger where splits of larger ones need it."""
    llama_8b = geometry(layers=1, heads=32, kv_heads=8, head_dim=128)
    llama_70b = geometry(layers=1, heads=64, kv_heads=8, head_dim=128)
    assert workspace_bytes(llama_8b, 256) == 128 * 2**20
    # A graph's 64 query heads x (256 rows * 8 / 16 + 255) tiles x 16 queries x (128 values and a weight) x 4 bytes.
    assert workspace_bytes(llama_70b, 256) >= 64 * (128 + 255) * 16 * 129 * 4


def test_obstacles_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether FlashInfer can serve is said in one line: no device, no kernel, or no module."""

    def broken() -> ModuleType:
        raise OSError("libcudart.so.13: cannot open shared object file")

    shape = geometry(head_dim=128)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert obstacle(shape, torch.bfloat16) == "there is no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert obstacle(shape, torch.float32) == "it has no kernel for KV of float32"
    assert obstacle(geometry(head_dim=80), torch.float16) == "it has no kernel for head_dim 80"
    monkeypatch.setattr(kernels, "load", broken)
    assert obstacle(shape, torch.float16) == (
        "flashinfer cannot be imported: libcudart.so.13: cannot open shared object file"
    )
    monkeypatch.setattr(kernels, "load", lambda: None)
    assert obstacle(shape, torch.float8_e4m3fn) is None


def every_call() -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """All calls that Terrace makes of FlashInfer."""
    it = with_spare_frame(scene(geometry(windows=(None, 12)), [(5, 1), (0, 4)]))
    backend = FakedFlashInfer(it.arena, it.geometry)
    backend.plan(it.batch)
    backend.run(0, it.q, it.k[0], it.v[0])
    graph = backend.graph(2)
    graph.plan(rows_of(it, [0]))
    graph.run(0, it.q[:2], it.k[0, :2], it.v[0, :2])
    operations = Operations(backend.flashinfer)
    x = torch.ones(3, 16)
    operations.rms_norm(x, torch.ones(16), 1e-6)
    operations.rms_norm_heads_(x.view(3, 2, 8), torch.ones(8), 1e-6)
    operations.silu_mul(x)
    q, k = x.view(3, 2, 8), torch.ones(3, 1, 8)
    operations.rotate_(q, k, torch.ones(3, 8), torch.arange(3, dtype=torch.int32))
    return backend.flashinfer.calls


def real(module: ModuleType, name: str) -> Callable[..., Any]:
    cls, _, method = name.partition(".")
    found = getattr(module, cls)
    if method == "plan":  # takes any keywords and hands them to this, where it is there
        return getattr(found, "_plan_impl", found.plan)
    return getattr(found, method) if method else found


def test_calls_fit_the_real_signatures() -> None:
    """Every call binds to the signature of the installed FlashInfer, keywords and all."""
    module = pytest.importorskip("flashinfer", reason="flashinfer is not installed", exc_type=ImportError)
    calls = every_call()
    assert len({name for name, _, _ in calls}) == 15
    for name, args, kwargs in calls:
        function = real(module, name)
        inspect.signature(function.__init__ if inspect.isclass(function) else function).bind(*args, **kwargs)
