"""Memory of the device tier: one tensor, block-major, so that one block is one contiguous range of bytes.

Knows shapes and addresses; refuses to know who owns a frame. The only file of this package that imports torch.
"""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

from server.types import BlockLayout, FrameId


def allocate_arena(frames: int, layout: BlockLayout, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """A zeroed arena `[frames, layers, 2, kv_heads, block_tokens, head_dim]` (2: K, then V) on `device`; where the
    layout has scales the last axis is longer by what they take.

    On a CPU it is a page-aligned anonymous mapping: address space is taken now, memory only as frames are first
    touched, so a 10 GiB arena costs nothing until it is used (torch.zeros writes every page).
    """
    assert frames > 0, f"an arena needs at least one frame, got {frames}"
    assert dtype.itemsize == layout.dtype_bytes, f"{dtype} is not {layout.dtype_bytes} bytes wide"
    vector = layout.head_dim + layout.scale_bytes // layout.dtype_bytes
    shape = (frames, layout.layers, 2, layout.kv_heads, layout.block_tokens, vector)
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, frames * layout.block_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # a gather reads 4 KiB here and 4 KiB there: fewer TLB misses
        with contextlib.suppress(OSError):  # a kernel built without huge pages
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def block_bytes_view(arena: Tensor, frame: FrameId) -> Tensor:
    """The bytes of one frame as a flat uint8 tensor `[block_bytes]` that shares the arena's memory."""
    assert 0 <= frame < arena.shape[0], f"frame {frame} outside an arena of {arena.shape[0]}"
    return arena[frame].view(-1).view(torch.uint8)
