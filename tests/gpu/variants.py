"""The kernels of FlashInfer that are proven, each with its arena, and how far it may be from exact attention."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from server.kernels.flashinfer import DecodeKernel, FlashInferAttention, PrefillKernel
from tests.numeric.oracle import Scene, geometry, scene

DEVICE = "cuda"
MIXED = [(5, 1), (0, 9), (16, 8), (15, 1), (7, 30), (0, 1), (64, 1), (31, 2)]
"""Decode rows and prefill chunks, as (tokens cached, tokens fed); contexts end inside, at the end and at the start of a
block of 16."""


@dataclass(frozen=True)
class Variant:
    """`bound`: of the absolute error, for values of order one. Queries, weights and results are rounded to `queries`:
    2^-9 of bfloat16, 2^-12 of float16, each, and a result of up to 4 doubles that twice."""

    name: str
    dtype: torch.dtype = torch.bfloat16
    head_dim: int = 128
    heads: int = 8
    kv_heads: int = 2
    prefill: PrefillKernel = "fa2"
    decode: DecodeKernel = "tensor-cores"
    bound: float = 2e-2

    @property
    def hopper(self) -> bool:
        """It needs a device of compute capability 9."""
        return self.prefill == "fa3"

    def scene(
        self, rows: list[tuple[int, int]], *, windows: tuple[int | None, ...] = (None, None), block_tokens: int = 16,
    ) -> Scene:  # fmt: skip
        """On the device, with one frame more than there are to be had. fp8 holds no infinity: there poison is NaN."""
        shape = geometry(
            layers=len(windows), heads=self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim, windows=windows
        )
        it = scene(shape, rows, block_tokens=block_tokens, dtype=self.dtype)
        spare = torch.full(it.arena[:1].shape, float("nan")).to(self.dtype)
        as_bytes = torch.cat((it.arena.view(torch.uint8), spare.view(torch.uint8)))  # torch joins no fp8
        arena = as_bytes.view(self.dtype).to(DEVICE)
        return replace(it, arena=arena, q=it.q.to(DEVICE), k=it.k.to(DEVICE), v=it.v.to(DEVICE))

    def backend(self, it: Scene) -> FlashInferAttention:
        return FlashInferAttention(it.arena, it.geometry, max_rows=8, prefill=self.prefill, decode=self.decode)

    def attend(self, it: Scene) -> Tensor:
        """All layers of a step, fp64 [layers, tokens, heads * head_dim] on the host."""
        attention = self.backend(it)
        attention.plan(it.batch)
        layers = range(it.geometry.layers)
        return torch.stack([attention.run(layer, it.q, it.k[layer], it.v[layer]) for layer in layers]).double().cpu()


VARIANTS = [
    Variant("bf16, FA2, tensor cores"),
    Variant("bf16, FA3, CUDA cores", prefill="fa3", decode="cuda-cores"),
    Variant("bf16, heads of 64, as the demo model", head_dim=64, heads=4, prefill="auto", decode="auto"),
    Variant("fp16, FA2, tensor cores", dtype=torch.float16, bound=4e-3),
    Variant("fp8, as the daemon has it", dtype=torch.float8_e4m3fn, prefill="auto", decode="auto"),
]
"""Every kernel that the daemon may take, and those that it is compared with."""


def able(variant: Variant) -> bool:
    return not variant.hopper or torch.cuda.get_device_capability() >= (9, 0)
