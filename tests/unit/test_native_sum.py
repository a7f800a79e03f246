"""The native library's checksum is XXH3-128: bit for bit that of xxhash, in every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from server.kernels.native import load
from tests.unit.native import instruction_sets, selected

pytestmark = pytest.mark.skipif(load() is None, reason="the native kernels were not built")

ROUND = 1024
"""Bytes after which the sums are scrambled."""
LENGTHS = st.one_of(
    st.integers(241, 5000),
    st.builds(lambda rounds, more: rounds * ROUND + more, st.integers(1, 64), st.integers(-65, 65)),
    st.sampled_from([48 * 1024, 2 * 2**20, 2 * 2**20 + 1]),
)
EDGE = 64


def ours(data: np.ndarray) -> bytes:
    library, digest = load(), np.zeros(16 + 2, np.uint8)
    assert library is not None
    library.terrace_sum(data.ctypes.data, data.nbytes, digest.ctypes.data + 1)
    assert digest[0] == digest[-1] == 0, "more than 16 bytes were written"
    return digest[1:-1].tobytes()


@pytest.mark.parametrize("isa", instruction_sets())
@settings(max_examples=200, deadline=None)
@given(length=LENGTHS, offset=st.integers(0, EDGE), seed=st.integers(0, 99))
def test_sums_are_those_of_xxhash(isa: str, length: int, offset: int, seed: int) -> None:
    """Of any length that blocks may have, wherever they begin."""
    data = np.random.default_rng(seed).integers(0, 256, EDGE + length, np.uint8)[offset : offset + length]
    with selected(isa):
        assert ours(data) == xxhash.xxh3_128_digest(np.ascontiguousarray(data))


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("byte", [0, 1, 0xFF])
def test_sums_of_what_is_all_the_same(isa: str, byte: int) -> None:
    """Where carries are likeliest and unlikeliest."""
    with selected(isa):
        for length in (241, 1024, 1025, 4096, 5000):
            data = np.full(length, byte, np.uint8)
            assert ours(data) == xxhash.xxh3_128_digest(data)


@pytest.mark.parametrize("isa", instruction_sets())
@settings(max_examples=50)
@given(length=st.integers(241, 3000), data=st.data())
def test_every_bit_counts(isa: str, length: int, data: st.DataObject) -> None:
    """A bit that flips anywhere gives another sum."""
    block = np.random.default_rng(length).integers(0, 256, length, np.uint8)
    with selected(isa):
        before = ours(block)
        block[data.draw(st.integers(0, length - 1))] ^= 1 << data.draw(st.integers(0, 7))
        assert ours(block) != before


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("lines", [1, 3, 4, 5, 27, 1001])
def test_what_measures_memory_reads_all_of_it(isa: str, threads: int, lines: int) -> None:
    """Every line once, wherever it lies: a limit that leaves bytes out would flatter no one but the limit."""
    library, found = load(), np.zeros(2, np.uint64)
    assert library is not None
    data = np.random.default_rng(lines).integers(0, 2**63, lines * 8, np.uint64)
    order = np.random.default_rng(lines).permutation(lines).astype(np.int64)
    with selected(isa):
        library.terrace_read(data.ctypes.data, data.nbytes, found.ctypes.data, threads)
        library.terrace_read_pieces(data.ctypes.data, 64, order.ctypes.data, lines, found.ctypes.data + 8, threads)
    assert list(found) == [data.sum(dtype=np.uint64)] * 2
