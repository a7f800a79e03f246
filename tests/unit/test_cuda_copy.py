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
from server.kernels import copy, native
from server.kernels.copy import CudaCopyStream, Driver
from server.kvcache.host import checksum
from server.types import LEFT, MOVED, REFUSED, Moved

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
        self.digests = [checksum(memoryview(self.source[block * SIZE : (block + 1) * SIZE])) for block in self.order]

    def addresses(self, memory: np.ndarray) -> list[int]:
        return [memory.ctypes.data + block * SIZE for block in self.order]

    def move(self, stream: CudaCopyStream, direction: str = "up", burst: int = 4 * SIZE) -> Moved:
        ends = self.addresses(self.target), self.addresses(self.source), SIZE, burst
        return stream.up(*ends, b"".join(self.digests)) if direction == "up" else stream.down(*ends)

    def arrived(self) -> bool:
        return bool((self.source == self.target).all())


@pytest.mark.parametrize("version", [13000, 12060])
@pytest.mark.parametrize(("direction", "order"), [("up", 3), ("down", 1)])
def test_copies_have_arrived_when_a_call_returns(fake: Any, library: str, version: int, direction: Any, order: int):
    """Burst by burst, each waited for, and with their checksums; also with a driver before 12.8."""
    ctypes.c_int.in_dll(fake, "fake_version").value = version
    driver, memory = Driver(library=library), Memory(50)
    stream = CudaCopyStream(driver, direction)
    moved = memory.move(stream, direction)
    assert memory.arrived()
    assert moved == (bytes([MOVED]) * 50, b"".join(memory.digests), None)
    assert [moved.digest(i) for i in range(50)] == memory.digests
    stream.close()
    assert (fake.fake_calls(b"cuEventRecord"), fake.fake_calls(b"cuEventSynchronize")) == (13, 13)
    if version == 13000:
        assert (fake.fake_calls(b"cuMemcpyBatchAsync"), fake.fake_calls(b"cuMemcpyAsync")) == (13, 0)
        assert number(fake, "fake_order") == order
    else:
        assert (fake.fake_calls(b"cuMemcpyBatchAsync"), fake.fake_calls(b"cuMemcpyAsync")) == (0, 50)


def test_a_block_that_is_not_what_it_should_be_stays(driver: Driver):
    """It alone; a burst of nothing else is not copied at all."""
    stream, memory = CudaCopyStream(driver, "up"), Memory(9)
    bad = [1, 4, 5, 6, 7]
    for i in bad:
        memory.digests[i] = bytes(16)
    moved = memory.move(stream)
    assert moved.states == bytes(REFUSED if i in bad else MOVED for i in range(9))
    for i, block in enumerate(memory.order):
        part = slice(block * SIZE, (block + 1) * SIZE)
        right = np.zeros_like(memory.source[part]) if i in bad else memory.source[part]
        assert (memory.target[part] == right).all()
    stream.close()


def test_what_the_link_can_do_is_measured_with_all_in_flight(fake: Any, driver: Driver):
    """Copies without checksums are enqueued together and waited for once; what fails is an OSError."""
    stream, memory = CudaCopyStream(driver, "down"), Memory(300)
    stream.copy(memory.addresses(memory.target), memory.addresses(memory.source), SIZE)
    assert memory.arrived()
    assert (fake.fake_calls(b"cuMemcpyBatchAsync"), fake.fake_calls(b"cuEventSynchronize")) == (2, 1)
    fake.fake_fail(b"cuMemcpyBatchAsync", 0, 2)
    with pytest.raises(OSError, match=r"cuMemcpyBatchAsync: CUDA_ERROR_OUT_OF_MEMORY \(2\)"):
        stream.copy(memory.addresses(memory.target), memory.addresses(memory.source), SIZE)
    stream.close()


def test_a_driver_without_batches_is_told_of_once(fake: Any, library: str, caplog: pytest.LogCaptureFixture):
    """One line in the log says why each copy takes a call of its own."""
    ctypes.c_int.in_dll(fake, "fake_version").value = 12060
    Driver(library=library)
    assert ["cuMemcpyBatchAsync" in record.message for record in caplog.records] == [True]


def test_any_thread_may_copy(driver: Driver):
    """Threads that never used the device enter its context, and share a stream at once."""
    stream, memories = CudaCopyStream(driver, "up"), [Memory(200) for _ in range(4)]
    found: list[Moved] = []
    threads = [threading.Thread(target=lambda memory=memory: found.append(memory.move(stream))) for memory in memories]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stream.close()
    assert [moved.states for moved in found] == [bytes([MOVED]) * 200] * 4
    assert all(memory.arrived() for memory in memories)


@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize(("function", "calls"), [
    ("cuCtxSetCurrent", 0), ("cuMemcpyBatchAsync", 1), ("cuEventRecord", 1), ("cuEventSynchronize", 1),
])  # fmt: skip
def test_an_error_of_the_device_is_told(fake: Any, driver: Driver, direction: Any, function: str, calls: int):
    """Whichever call fails, the error names it; what came before counts, the rest is not tried, nothing is left to
    move, and the stream goes on."""
    stream, memory = CudaCopyStream(driver, direction), Memory(9)
    fake.fake_fail(function.encode(), calls, 2)
    moved = memory.move(stream, direction)
    assert str(moved.error) == f"{function}: CUDA_ERROR_OUT_OF_MEMORY (2)"
    assert moved.states == bytes([MOVED] * 4 * calls + [LEFT] * (9 - 4 * calls))
    assert fake.fake_calls(b"cuStreamSynchronize") == (function != "cuCtxSetCurrent")
    fake.fake_fail(function.encode(), 10**6, 0)
    memory.target[:] = 0
    moved = memory.move(stream, direction)
    assert (moved.error, memory.arrived()) == (None, True)
    stream.close()


def test_a_copy_that_fails_half_way_leaves_nothing_behind(fake: Any, library: str):
    """Copies before the one that could not be enqueued are waited for before the error is told."""
    ctypes.c_int.in_dll(fake, "fake_version").value = 12060
    driver, memory = Driver(library=library), Memory(50)
    stream = CudaCopyStream(driver, "down")
    fake.fake_fail(b"cuMemcpyAsync", 7, 2)
    moved = memory.move(stream, "down")
    assert str(moved.error).startswith("cuMemcpyAsync: ")
    assert moved.states == bytes([MOVED] * 4 + [LEFT] * 46)
    assert fake.fake_calls(b"cuStreamSynchronize") == 1
    stream.close()


def test_a_misuse_is_no_os_error(fake: Any, driver: Driver):
    """What only a bug of ours can cause is not taken for a sick device."""
    stream, memory = CudaCopyStream(driver, "up"), Memory(1)
    fake.fake_fail(b"cuMemcpyBatchAsync", 0, 1)
    with pytest.raises(RuntimeError, match="cuMemcpyBatchAsync: CUDA error"):
        memory.move(stream)
    stream.close()


def test_without_the_native_library_the_operator_is_told(driver: Driver, monkeypatch: pytest.MonkeyPatch):
    """A package that was installed without a compiler says what to do, in one line."""
    monkeypatch.setattr(copy, "load", lambda: None)
    with pytest.raises(ConfigError, match=r"native library.*install a C compiler and reinstall, `pip install") as told:
        CudaCopyStream(driver, "up")
    assert told.value.param == "model.device"
    assert "\n" not in str(told.value)


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


def facts_of(name: str, structure: type[ctypes.Structure]) -> dict[str, int]:
    """C expression -> its value, of a structure `name`: how large it is, and where its fields are."""
    facts = {f"sizeof({name})": ctypes.sizeof(structure)}
    for field, *_ in structure._fields_:
        facts[f"offsetof({name}, {field})"] = getattr(structure, field).offset
        facts[f"sizeof((({name} *)0)->{field})"] = getattr(structure, field).size
    return facts


def assert_facts(header: str, facts: dict[str, int], folder: Path, *flags: str) -> None:
    """The compiler says so with this header."""
    lines = [f'_Static_assert({fact} == {value}, "{fact}");' for fact, value in facts.items()]
    source = folder / "facts.c"
    source.write_text("\n".join([f"#include <{header}>", "#include <stddef.h>", *lines, ""]))
    compile_with(source, Path(os.devnull), "-c", *flags)


def test_structures_are_those_of_the_native_library(tmp_path: Path):
    """Sizes, offsets and numbers are what transfer.h says."""
    facts = facts_of("struct link", copy._Fields) | facts_of("struct job", copy._Job)
    facts |= {"LANES": copy.LANES, "LEFT": LEFT, "MOVED": MOVED, "REFUSED": REFUSED}
    facts |= {step: i for i, step in enumerate(("ENTER", "BATCH", "COPY", "RECORD", "WAIT"))}
    assert_facts("transfer.h", facts, tmp_path, f"-I{Path(native.__file__).parent}")
    assert [copy.NATIVE[step] for step in ("enter", "batch", "copy", "record", "wait")] == list(copy.STEPS)


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
        "CUDA_ERROR_INVALID_VALUE": 1,
        "CUDA_ERROR_NOT_INITIALIZED": 3,
        "CUDA_ERROR_INVALID_CONTEXT": 201,
        "CUDA_ERROR_INVALID_HANDLE": 400,
    }
    assert {value for fact, value in facts.items() if "ERROR" in fact} == copy.MISUSE
    facts |= facts_of("CUmemLocation", copy.Location) | facts_of("CUmemcpyAttributes", copy.Attributes)
    assert_facts("cuda.h", facts, tmp_path)


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
        driver.addresses["batch"] = None
    host.register(driver)
    arena = torch.zeros(blocks, size, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    up, down = CudaCopyStream(driver, "up"), CudaCopyStream(driver, "down")
    device = [arena.data_ptr() + (5 * block % blocks) * size for block in range(blocks)]
    data = np.random.default_rng(1).integers(0, 256, (blocks, size), np.uint8)
    for block in range(blocks):
        host.view(block)[:] = data[block].tobytes()
    digests = b"".join(checksum(host.view(block)) for block in range(blocks))
    went = up.up(device, [host.frame_address(block) for block in range(blocks)], size, 4 * size, digests)
    came = down.down([host.frame_address(blocks + block) for block in range(blocks)], device, size, 4 * size)
    assert went == came == (bytes([MOVED]) * blocks, digests, None)
    assert all(bytes(host.view(blocks + block)) == data[block].tobytes() for block in range(blocks))
    up.close()
    down.close()
    host.unregister()
