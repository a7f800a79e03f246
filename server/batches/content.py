"""Content of files: one file per id in one directory, written once, then only read. Loop thread; I/O by aiofiles.

It knows bytes and ids; that a file exists is said by its row in the store alone. Content is complete and on disk before
its row is committed, so a crash leaves content without a row at worst, which the next start removes.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Literal, Protocol

import aiofiles
import aiofiles.os

from server.errors import StorageFull

CHUNK_BYTES = 256 * 2**10
"""One hop to a thread (about 0.1 ms) and one system call per that many bytes, both ways."""
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class Handle(Protocol):
    """An open file of aiofiles, as far as it is used here."""

    async def write(self, data: bytes, /) -> int: ...
    async def read(self, size: int, /) -> bytes: ...
    async def flush(self) -> None: ...
    async def close(self) -> None: ...
    def fileno(self) -> int: ...


def _owner_only(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


Mode = Literal["rb", "xb"]


async def _open_file(path: Path, mode: Mode) -> Handle:
    """For the owner only, never through a symbolic link. Raises OSError."""
    return await aiofiles.open(path, mode, buffering=0, opener=_owner_only)


Open = Callable[[Path, Mode], Awaitable[Handle]]


class ContentWriter:
    """Content that is being written. `seal` it, or `discard` it; a row may name it once it is sealed."""

    def __init__(self, directory: ContentDirectory, file_id: str, handle: Handle) -> None:
        self.id = file_id
        self.bytes = 0
        self._directory = directory
        self._handle = handle
        self._pending = bytearray()

    async def write(self, data: bytes) -> None:
        """Raises StorageFull, OSError."""
        self._pending += data
        self.bytes += len(data)
        if len(self._pending) >= CHUNK_BYTES:
            await self._flush()

    async def seal(self) -> None:
        """All of it is on disk, and so is its name. Raises StorageFull, OSError."""
        await self._flush()
        with _full_is_named():
            await asyncio.to_thread(os.fsync, self._handle.fileno())
            await self._handle.close()
            await asyncio.to_thread(self._directory.sync)

    async def discard(self) -> None:
        """It is gone. What is left of it after an error here goes at the next start."""
        with suppress(OSError):
            await self._handle.close()
        await self._directory.remove(self.id)

    async def _flush(self) -> None:
        await self._directory.check_room(len(self._pending))
        with _full_is_named():
            rest = memoryview(bytes(self._pending))
            while rest:
                rest = rest[await self._handle.write(rest.tobytes()) :]
        self._pending.clear()


class ContentDirectory:
    def __init__(
        self,
        path: Path,
        min_free_bytes: int,
        open_file: Open | None = None,
        free_bytes: Callable[[Path], int] | None = None,
    ) -> None:
        """Makes the directory if need be. `open_file` and `free_bytes` stand for the operating system, for tests."""
        path.mkdir(mode=0o700, exist_ok=True)
        self._path = path
        self._min_free_bytes = min_free_bytes
        self._open = open_file or _open_file
        self._free_bytes = free_bytes or _free_bytes

    def sweep(self, known: Collection[str]) -> int:
        """Removes what none of `known` names: what crashes left. Any thread, before anything is written."""
        gone = [name for name in os.listdir(self._path) if name not in known]
        for name in gone:
            (self._path / name).unlink()
        return len(gone)

    def sync(self) -> None:
        """The names in it are on disk. Any thread. Raises OSError."""
        fd = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    async def check_room(self, wanted_bytes: int) -> None:
        """Raises StorageFull when that many bytes would leave less than is to stay free."""
        free = await asyncio.to_thread(self._free_bytes, self._path)
        if free - wanted_bytes < self._min_free_bytes:
            raise StorageFull(
                f"the disk of files and batches has {free} bytes free, of which data_min_free_gib leaves "
                f"{self._min_free_bytes}"
            )

    async def create(self, file_id: str) -> ContentWriter:
        """Raises StorageFull, OSError."""
        with _full_is_named():
            return ContentWriter(self, file_id, await self._open(self._path / file_id, "xb"))

    @asynccontextmanager
    async def reading(self, file_id: str) -> AsyncIterator[Handle]:
        """Open content, readable to its end also when it is removed meanwhile. Raises OSError."""
        handle = await self._open(self._path / file_id, "rb")
        try:
            yield handle
        finally:
            await handle.close()

    async def remove(self, file_id: str) -> None:
        """It is gone, or goes at the next start."""
        with suppress(OSError):
            await aiofiles.os.unlink(self._path / file_id)


def _free_bytes(path: Path) -> int:
    stat = os.statvfs(path)
    return stat.f_bavail * stat.f_frsize


@contextmanager
def _full_is_named() -> Iterator[None]:
    """An OSError that says that the disk is full becomes StorageFull."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StorageFull("the disk of files and batches is full") from error
        raise


async def lines_of(handle: Handle, limit_bytes: int) -> AsyncGenerator[tuple[int, bytes], None]:
    """(number from 1, line without its newline) of every line that is not blank. Of a longer line than `limit_bytes`
    only the first `limit_bytes` + 1 are kept, so that whoever looks sees that it is too long."""
    number, start = 0, b""
    while True:
        chunk = await handle.read(CHUNK_BYTES)
        pieces = chunk.split(b"\n")
        pieces[0] = start + pieces[0]
        # At the end of the file what is left is a line too.
        start = pieces.pop()[: limit_bytes + 1] if chunk else b""
        for piece in pieces:
            number += 1
            if piece.strip():
                yield number, piece[: limit_bytes + 1].rstrip(b"\r")
        if not chunk:
            return
