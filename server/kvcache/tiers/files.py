"""The few system calls that the SSD tier makes, behind one small class so that tests can make each of them fail."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Buffers = Sequence[Any]
"""Writable buffers, as `os.preadv` takes them."""


class OsIo:
    """Straight to the operating system. Any thread."""

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


def open_private(path: Path, flags: int) -> int:
    """Open for the owner only; never through a symbolic link, never inherited."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
