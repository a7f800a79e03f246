"""The device arena: block-major, contiguous, and free of charge until touched."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from server.kvcache.arena import allocate_arena, block_bytes_view
from server.types import BlockLayout

LAYOUT = BlockLayout(layers=3, kv_heads=2, head_dim=8, dtype_bytes=2, block_tokens=4)


def test_a_block_is_one_contiguous_range() -> None:
    """A frame's bytes are `block_bytes` long, share the arena's memory and touch no neighbour."""
    arena = allocate_arena(5, LAYOUT, torch.bfloat16)
    assert arena.shape == (5, 3, 2, 2, 4, 8)
    block = block_bytes_view(arena, 2)
    assert block.shape == (LAYOUT.block_bytes,)
    block.fill_(0xFF)
    assert torch.equal(block_bytes_view(arena, 2), torch.full((LAYOUT.block_bytes,), 0xFF, dtype=torch.uint8))
    for neighbour in (0, 1, 3, 4):
        assert not block_bytes_view(arena, neighbour).any()
    assert arena[2].isnan().all()
    assert arena.data_ptr() % 4096 == 0


def test_memory_is_resident_only_when_touched() -> None:
    """Allocating 2 GiB of frames takes address space, not memory."""
    big = BlockLayout(layers=32, kv_heads=8, head_dim=128, dtype_bytes=2, block_tokens=16)
    before = _resident_bytes()
    arena = allocate_arena(1024, big, torch.bfloat16)
    arena[7].fill_(1)
    assert arena.nbytes == 2 << 30
    assert _resident_bytes() - before < 256 << 20


def test_a_dtype_that_contradicts_the_layout_is_refused() -> None:
    """The layout's width and the arena's dtype must agree, or block_bytes would lie."""
    with pytest.raises(AssertionError, match="2 bytes"):
        allocate_arena(1, LAYOUT, torch.float32)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
