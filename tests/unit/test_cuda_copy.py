"""Copies by the CUDA driver's functions, over a driver that is a small C library without a device."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.errors import ConfigError
from server.kernels import copy
from server.kernels.copy import CudaCopyStream, Driver, merged

SOURCE = Path(__file__).parent / "fake_cuda.c"
HEADERS = [Path("/usr/local/cuda/include")]
SIZE = 4096


def compile_with(source: Path, target: Path, *flags: str) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    headers = [f"-I{folder}" for folder in HEADERS if folder.is_dir()]
    subprocess.run([compiler, "-Wall", "-Werror", *headers, *flags, "-o", target, source], check=True)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    target = tmp_path_factory.mktemp("cuda") / "libfakecuda.so"
    compile_with(SOURCE, target, "-shared", "-fPIC")
    return str(target)


@pytest.fixture
def fake(library: str) -> Iterator[Any]:
    """The same library, to make functions fail and to look at what was called; nothing may be left alive in it."""
    fake = ctypes.CDLL(library)
    fake.fake_reset()
    yield fake
    assert number(fake, "fake_live") == 0


@pytest.fixture
def driver(fake: Any, library: str) -> Driver:
    return Driver(library=library)


def number(fake: Any, name: str) -> int:
    return ctypes.c_int.in_dll(fake, name).value


class Memory:
    """Two ranges of `blocks` blocks, and which block goes where."""

    def __init__(self, blocks: int) -> None:
        self.source = np.random.default_rng(1).integers(0, 256, blocks * SIZE, np.uint8)
        self.target = np.zeros(blocks * SIZE, np.uint8)
        self.order = np.random.default_rng(2).permutation(blocks).tolist()

    def addresses(self, memory: np.ndarray) -> list[int]:
        return [memory.ctypes.data + block * SIZE for block in self.order]

    def arrived(self) -> bool:
        return bool((self.source == self.target).all())


@pytest.mark.parametrize("version", [13000, 12060])
@pytest.mark.parametrize(("direction", "order"), [("up", 3), ("down", 1)])
def test_copies_arrive_by_the_time_of_their_mark(fake: Any, library: str, version: int, direction: Any, order: int):
    """Nothing has moved when `enqueue` returns and all has when `wait` does; also with a driver before 12.8."""
    ctypes.c_int.in_dll(fake, "fake_version").value = version
    driver, memory = Driver(library=library), Memory(50)
    stream = CudaCopyStream(driver, direction)
    mark = stream.enqueue(memory.addresses(memory.target), memory.addresses(memory.source), SIZE)
    assert not memory.target.any()
    mark.wait()
    assert memory.arrived()
    stream.close()
    if version == 13000:
        assert (fake.fake_calls(b"cuMemcpyBatchAsync"), fake.fake_calls(b"cuMemcpyAsync")) == (1, 0)
        assert number(fake, "fake_order") == order
    else:
        assert fake.fake_calls(b"cuMemcpyBatchAsync") == 0
        assert 1 < fake.fake_calls(b"cuMemcpyAsync") <= 50


def test_a_driver_without_batches_is_told_of_once(fake: Any, library: str, caplog: pytest.LogCaptureFixture):
    """One line in the log says why each copy takes a call of its own."""
    ctypes.c_int.in_dll(fake, "fake_version").value = 12060
    Driver(library=library)
    assert ["cuMemcpyBatchAsync" in record.message for record in caplog.records] == [True]


def test_any_thread_may_enqueue(driver: Driver):
    """A thread that never used the device enters its context, and waits for its own copies."""
    stream, memories = CudaCopyStream(driver, "up"), [Memory(8) for _ in range(4)]
    errors: list[BaseException] = []

    def run(memory: Memory) -> None:
        try:
            stream.enqueue(memory.addresses(memory.target), memory.addresses(memory.source), SIZE).wait()
        except OSError as error:
            errors.append(error)

    for memory in memories:  # one after the other: the fake's queues are for one thread
        thread = threading.Thread(target=run, args=(memory,))
        thread.start()
        thread.join()
    stream.close()
    assert errors == []
    assert all(memory.arrived() for memory in memories)


@pytest.mark.parametrize("function", ["cuEventCreate", "cuMemcpyBatchAsync", "cuEventRecord", "cuEventSynchronize"])
def test_an_error_of_the_device_is_an_os_error(fake: Any, driver: Driver, function: str):
    """Whichever call fails, the error names it, nothing of the batch is left to move, and the stream goes on."""
    stream, memory = CudaCopyStream(driver, "up"), Memory(9)
    fake.fake_fail(function.encode(), 0, 2)
    with pytest.raises(OSError, match=rf"{function}.*CUDA_ERROR_OUT_OF_MEMORY \(2\)"):
        stream.enqueue(memory.addresses(memory.target), memory.addresses(memory.source), SIZE).wait()
    if function != "cuEventSynchronize":  # there the context would be lost
        memory.target[:] = 0
        fake.fake_fail(function.encode(), 10**6, 0)
        stream.enqueue([memory.target.ctypes.data], [memory.source.ctypes.data], SIZE).wait()
        assert np.flatnonzero(memory.target).max() < SIZE
    stream.close()


def test_a_copy_that_fails_half_way_leaves_nothing_behind(fake: Any, library: str):
    """Copies before the one that could not be enqueued are waited for before the error is told."""
    ctypes.c_int.in_dll(fake, "fake_version").value = 12060
    driver, memory = Driver(library=library), Memory(50)
    stream = CudaCopyStream(driver, "down")
    fake.fake_fail(b"cuMemcpyAsync", 3, 2)
    with pytest.raises(OSError, match="cuMemcpyAsync"):
        stream.enqueue(memory.addresses(memory.target), memory.addresses(memory.source), SIZE)
    assert fake.fake_calls(b"cuStreamSynchronize") == 1
    stream.close()


def test_a_misuse_is_no_os_error(fake: Any, driver: Driver):
    """What only a bug of ours can cause is not taken for a sick device."""
    stream, memory = CudaCopyStream(driver, "up"), Memory(1)
    fake.fake_fail(b"cuMemcpyBatchAsync", 0, 1)
    with pytest.raises(RuntimeError, match="cuMemcpyBatchAsync of 1 copies: CUDA error"):
        stream.enqueue([memory.target.ctypes.data], [memory.source.ctypes.data], SIZE)
    stream.close()


def test_memory_is_pinned_and_unpinned(fake: Any, driver: Driver):
    """Both go to the driver, and what it refuses is an OSError."""
    driver.pin(2**20, 2**16)
    driver.unpin(2**20)
    assert [fake.fake_calls(name) for name in (b"cuMemHostRegister_v2", b"cuMemHostUnregister")] == [1, 1]
    fake.fake_fail(b"cuMemHostRegister_v2", 0, 2)
    with pytest.raises(OSError, match="cuMemHostRegister_v2: CUDA_ERROR_OUT_OF_MEMORY"):
        driver.pin(2**20, 2**16)


def test_without_a_device_the_operator_is_told(fake: Any, library: str, tmp_path: Path):
    """No library, a library that is no driver, and a device that is not there are each one line, no traceback."""
    with pytest.raises(ConfigError, match=r"cannot use CUDA device 0: .*nothing\.so"):
        Driver(library=str(tmp_path / "nothing.so"))
    with pytest.raises(ConfigError, match=r"cannot use CUDA device 0: .*cu[A-Z]"):
        Driver(library="libc.so.6")
    with pytest.raises(ConfigError, match="cannot use CUDA device 3: cuDeviceGet"):
        Driver(3, library)


@pytest.mark.parametrize(
    ("targets", "sources", "edges", "runs"),
    [
        ([0, 10, 20], [100, 110, 120], [], [(0, 100, 30)]),
        ([0, 10, 20], [100, 112, 124], [], [(0, 100, 10), (10, 112, 10), (20, 124, 10)]),
        ([0, 10, 30], [100, 110, 120], [], [(0, 100, 20), (30, 120, 10)]),
        ([20, 10, 0], [120, 110, 100], [], [(20, 120, 10), (10, 110, 10), (0, 100, 10)]),
        ([0, 10, 20], [100, 110, 120], [100, 110], [(0, 100, 10), (10, 110, 20)]),
        ([0, 10, 20], [100, 110, 120], [20], [(0, 100, 20), (20, 120, 10)]),
    ],
)
def test_neighbours_are_one_copy(targets: list[int], sources: list[int], edges: list[int], runs: list[Any]):
    """Blocks that are neighbours at both ends, in this order, go as one, but not across an edge of pinned memory."""
    assert merged(targets, sources, 10, edges) == runs


def test_structures_are_those_of_the_header(tmp_path: Path):
    """Sizes, offsets and constants are what cuda.h says."""
    folder = next((folder for folder in HEADERS if (folder / "cuda.h").is_file()), None)
    if folder is None:
        pytest.skip("needs cuda.h")
    facts = {
        "CU_STREAM_NON_BLOCKING": copy.STREAM_NON_BLOCKING,
        "CU_EVENT_BLOCKING_SYNC": copy.EVENT_SLEEPS,
        "CU_EVENT_DISABLE_TIMING": copy.EVENT_UNTIMED,
        "CU_MEMCPY_SRC_ACCESS_ORDER_STREAM": copy.SOURCE_IN_STREAM_ORDER,
        "CU_MEMCPY_SRC_ACCESS_ORDER_ANY": copy.SOURCE_ANY_ORDER,
        "sizeof(CUdeviceptr)": 8,
    }
    for name, structure in (("CUmemLocation", copy.Location), ("CUmemcpyAttributes", copy.Attributes)):
        facts[f"sizeof({name})"] = ctypes.sizeof(structure)
        for field, *_ in structure._fields_:
            facts[f"offsetof({name}, {field})"] = getattr(structure, field).offset
            facts[f"sizeof((({name} *)0)->{field})"] = getattr(structure, field).size
    lines = [f'_Static_assert({fact} == {value}, "{fact}");' for fact, value in facts.items()]
    misuses = "VALUE", "CONTEXT", "HANDLE"
    names = {*(f"CUDA_ERROR_INVALID_{misuse}" for misuse in misuses), "CUDA_ERROR_NOT_INITIALIZED"}
    cases = " || ".join(f"{name} == {code}" for name in sorted(names) for code in sorted(copy.MISUSE))
    assert len(names) == len(copy.MISUSE)
    lines += [f'_Static_assert({cases}, "misuse");']
    source = tmp_path / "facts.c"
    source.write_text("\n".join(["#include <cuda.h>", "#include <stddef.h>", *lines, ""]))
    compile_with(source, Path(os.devnull), "-c")


@pytest.mark.gpu
@pytest.mark.parametrize("batches", [True, False])
def test_a_round_trip_over_a_device_changes_nothing(batches: bool):
    """64 MiB go up and come down bit for bit, in one call for all copies and in one for each."""
    import torch

    from server.kvcache.host import HostArena

    blocks, size = 32, 2 * 2**20
    host = HostArena(2 * blocks, size)
    host.prefault()
    driver = Driver()
    if not batches:
        driver.batch = None
    host.register(driver)
    arena = torch.zeros(blocks, size, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    up, down = (CudaCopyStream(driver, direction, host.edges) for direction in ("up", "down"))
    device = [arena.data_ptr() + (5 * block % blocks) * size for block in range(blocks)]
    data = np.random.default_rng(1).integers(0, 256, (blocks, size), np.uint8)
    for block in range(blocks):
        host.view(block)[:] = data[block].tobytes()
    up.enqueue(device, [host.frame_address(block) for block in range(blocks)], size).wait()
    down.enqueue([host.frame_address(blocks + block) for block in range(blocks)], device, size).wait()
    assert all(bytes(host.view(blocks + block)) == data[block].tobytes() for block in range(blocks))
    up.close()
    down.close()
    host.unregister()
