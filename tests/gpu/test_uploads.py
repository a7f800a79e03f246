"""What a step is sent arrives ahead of it, whole, and stays until it was read."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from server.kernels.uploads import SLOT_BYTES, SLOTS, Uploads

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def busy(matrix: torch.Tensor) -> None:
    """Some milliseconds of work."""
    for _ in range(20):
        matrix @ matrix


def test_what_was_sent_is_read_by_its_step() -> None:
    """With the device far behind the host, each step of many reads its own arrays, of any type, in one piece."""
    uploads, matrix = Uploads(torch.device("cuda")), torch.ones(4096, 4096, device="cuda")
    random, found = np.random.default_rng(0), []
    for step in range(3 * SLOTS):
        uploads.turn()
        arrays = [
            random.integers(0, 9, random.integers(0, 1000)).astype(dtype)
            for dtype in (np.int32, np.int64, np.float32, np.float64, np.bool_)
        ] + [np.full((3, 5), step)]
        busy(matrix)
        found.append(([array.copy() for array in arrays], [sent.clone() for sent in uploads.send(arrays)]))
        for array in arrays:
            array[...] = 0  # what was given away may be overwritten by us, who are not to be copied from any more
    for arrays, copies in found:
        for array, copy in zip(arrays, copies, strict=True):
            assert np.array_equal(copy.cpu().numpy(), array)
            assert copy.cpu().numpy().dtype == array.dtype


def test_what_does_not_fit_arrives_as_well() -> None:
    """More than a slot holds, in one piece or in many, and small ones behind it."""
    uploads = Uploads(torch.device("cuda"))
    large, small = np.arange(SLOT_BYTES // 4 + 1, dtype=np.int32), np.arange(7, dtype=np.int32)
    sent = [*uploads.send([large]), *uploads.send([small]), *uploads.send([large[: SLOT_BYTES // 8]]),
            *uploads.send([large[: SLOT_BYTES // 8]])]  # fmt: skip
    wanted = [large, small, large[: SLOT_BYTES // 8], large[: SLOT_BYTES // 8]]
    assert all(np.array_equal(got.cpu().numpy(), array) for got, array in zip(sent, wanted, strict=True))
