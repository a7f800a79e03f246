"""Decode steps as graphs: a step of few rows is hundreds of kernels, each of which takes longer to launch than to run.

Knows buckets of rows and the memory that captured steps read and write; refuses to know requests, sampling and what a
graph is. Device thread only.

**Cost.** A launch takes the host about 5 us; 32 layers make some 400 of them, 2 ms, where reading 16 GB of weights
takes 3.5. A replay is one launch. In return a graph reads fixed memory: a step is padded to the next bucket, by up to 7
rows of one token each, and logits are copied once (0.1 ms for 256 rows of 128k tokens). On an H200 the 19 graphs of up
to 128 rows of an 8B model take 1.3 s and 0.04 GiB.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from server.kernels.attention import AttentionBackend, AttentionBatch
from server.models.base import Model
from server.runner.device import Device

BUCKET_ROWS = 8
"""Distance of the buckets above 8 rows: up to where tensor cores work on as many rows at once anyway."""


def buckets(most: int) -> list[int]:
    """Numbers of rows that get a graph, up to `most`, which is the last: 1, 2, 4, 8, 16, 24, 32 and so on."""
    return [rows for rows in (1, 2, 4, *range(BUCKET_ROWS, most, BUCKET_ROWS)) if rows < most] + [most]


@dataclass(frozen=True, slots=True)
class DecodeGraph:
    """One captured step: `inputs` and `attention.plan`, then `replay`, then `logits`."""

    rows: int
    attention: AttentionBackend
    inputs: Tensor  # int64 [2 * rows]: tokens, then positions; of padding both are 0
    logits: Tensor  # fp32 [rows, vocab]; overwritten by the next replay of any graph
    replay: Callable[[], None]


class DecodeGraphs:
    """The graphs for steps of up to `most` rows."""

    def __init__(self, device: Device, model: Model, most: int) -> None:
        self._device = device
        self._model = model
        self._buckets = buckets(most)
        self._graphs: dict[int, DecodeGraph] = {}

    def capture(self, attention: Callable[[int], AttentionBackend], progress: Callable[[int, int], None]) -> int:
        """Capture all, before the first step, while the cache is empty: frame 0 is written to. `progress(done, of)`
        is told after each. Returns the device memory that it took, in bytes.

        `attention(rows)` is a backend for captured decode steps of exactly `rows` rows. Its `plan` takes 1 to `rows` of
        them, before each replay, and makes up for the rest, which feed token 0 at position 0: into a frame that is
        nobody's.

        The largest comes first, so that what the others need in passing fits into what it has left. All share one
        place for inputs and one for logits, as they never run at the same time.
        """
        before, most = self._device.used_bytes(), self._buckets[-1]
        inputs, wanted = (sent.clone() for sent in self._device.put(np.zeros(2 * most, np.int64), np.arange(most)))
        logits = torch.empty(most, self._model.geometry.vocab, dtype=torch.float32, device=inputs.device)
        none = np.zeros(1, np.int32)
        first_token = AttentionBatch(np.arange(2, dtype=np.int32), none, none + 1, [none])
        for done, rows in enumerate(reversed(self._buckets), start=1):
            backend = attention(rows)
            backend.plan(first_token)
            work = _step(self._model, backend, inputs[: 2 * rows], wanted[:rows], logits[:rows])
            replay = self._device.capture(work)
            self._graphs[rows] = DecodeGraph(rows, backend, inputs[: 2 * rows], logits[:rows], replay)
            progress(done, len(self._buckets))
        return self._device.used_bytes() - before

    def fitting(self, rows: int) -> DecodeGraph | None:
        """The smallest graph for so many rows; None where none was captured."""
        bucket = next((bucket for bucket in self._buckets if bucket >= rows), 0)
        return self._graphs.get(bucket)


def _step(
    model: Model, attention: AttentionBackend, inputs: Tensor, wanted: Tensor, logits: Tensor
) -> Callable[[], None]:
    tokens, positions = inputs.chunk(2)

    def work() -> None:
        # Into memory of its own: what a graph returns would have to be kept by each of them.
        logits.copy_(model.logits(model.forward(tokens, positions, attention, wanted)))

    return work
