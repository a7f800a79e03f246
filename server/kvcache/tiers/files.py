"""The few system calls that the SSD tier makes, behind one small class so that tests can make each of them fail."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

ALIGNMENT = 4096
"""Of every address, offset and length that O_DIRECT sees."""

Buffers = Sequence[memoryview]
"""As `os.preadv` and `os.pwritev` take them."""


class OsIo:
    """Straight to the operating system. Any thread. All of it raises OSError."""

    def open(self, path: Path, flags: int) -> int:
        """For the owner only; never through a symbolic link, never inherited."""
        return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)

    def preadv(self, fd: int, buffers: Buffers, offset: int) -> int:
        return os.preadv(fd, buffers, offset)

    def pwritev(self, fd: int, buffers: Buffers, offset: int) -> int:
        return os.pwritev(fd, buffers, offset)

    def write(self, fd: int, data: bytes) -> int:
        return os.write(fd, data)

    def fallocate(self, fd: int, offset: int, length: int) -> None:
        os.posix_fallocate(fd, offset, length)

    def fdatasync(self, fd: int) -> None:
        os.fdatasync(fd)

    def free_bytes(self, directory: Path) -> int:
        """What an unprivileged user could still write to the file system of `directory`."""
        stat = os.statvfs(directory)
        return stat.f_bavail * stat.f_frsize


def move_all(call: Callable[[int, Buffers, int], int], fd: int, buffers: Buffers, offset: int) -> int:
    """`call`, which may move less than asked, until all is moved or it moves nothing more; bytes moved.

    Goes on at whole multiples of ALIGNMENT, because O_DIRECT could not go on anywhere else.
    """
    done = 0
    rest = list(buffers)
    while rest:
        moved = call(fd, rest, offset + done)
        moved -= moved % ALIGNMENT
        if moved <= 0:
            break
        done += moved
        while rest and moved >= len(rest[0]):
            moved -= len(rest.pop(0))
        if moved:
            rest[0] = rest[0][moved:]
    return done
