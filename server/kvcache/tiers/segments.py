"""Segment files: fixed slots, grown as they are needed, inside a byte cap and above a free-space floor.

One directory per fingerprint below one root, and one owner per directory. Directories of other fingerprints that nobody
owns (a model that is not served any more) count against the cap and go, least recently used first, when room is needed;
those that another daemon owns are its own business.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import mmap
import os
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from server.errors import ConfigError
from server.kvcache.tiers.files import OsIo, open_private
from server.types import FrameId

log = logging.getLogger("terrace.ssd")

SEGMENT_BYTES = 2**30
"""Nominal size of a segment file; it holds as many whole slots as fit."""
GROW_BYTES = 64 * 2**20
"""A segment is allocated in steps of about this size, so that a small disk is used to its end."""
ALIGNMENT = 4096
_NAME = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class DirectoryInfo:
    """One fingerprint directory, as an operator sees it."""

    path: Path
    bytes: int
    used_s: float
    owned: bool


class DirectoryLock:
    """Exclusive ownership of one directory, for as long as the process lives. Survives no crash, needs no cleaning."""

    def __init__(self, directory: Path) -> None:
        """Raises ConfigError when somebody else owns it."""
        path = directory / "LOCK"
        while True:
            self._fd = open_private(path, os.O_RDWR | os.O_CREAT)
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                owner = os.pread(self._fd, 32, 0).decode(errors="replace").strip() or "unknown"
                os.close(self._fd)
                raise ConfigError(
                    f"{directory} is in use by another daemon (pid {owner}); stop it, or give this one another "
                    "--ssd-path",
                    param="kv.ssd_path",
                ) from None
            with contextlib.suppress(FileNotFoundError):  # removed between our open and our lock: take the new file
                if os.stat(path).st_ino == os.fstat(self._fd).st_ino:
                    break
            os.close(self._fd)
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, str(os.getpid()).encode(), 0)

    def release(self) -> None:
        os.ftruncate(self._fd, 0)
        os.close(self._fd)


def list_directories(root: Path) -> list[DirectoryInfo]:
    """Every fingerprint directory below `root`, least recently used first."""
    found = []
    for path in root.iterdir() if root.is_dir() else ():
        if _NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            files = [entry.stat() for entry in os.scandir(path) if entry.is_file(follow_symlinks=False)]
            size = sum(stat.st_blocks * 512 for stat in files)
            used_s = max((stat.st_mtime for stat in files), default=0.0)
            found.append(DirectoryInfo(path, size, used_s, _owned(path)))
    return sorted(found, key=lambda info: info.used_s)


def _owned(directory: Path) -> bool:
    try:
        fd = os.open(directory / "LOCK", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


class Segments:
    """The slots of one directory: `slots` of `slot_bytes` bytes. Any thread; growing is serialised."""

    def __init__(
        self, directory: Path, slots: int, slot_bytes: int, *, cap_bytes: int, min_free_bytes: int, io: OsIo
    ) -> None:
        assert slot_bytes % ALIGNMENT == 0, f"slots of {slot_bytes} bytes are not aligned"
        self.direct = False
        self._directory = directory
        self._slots = slots
        self._slot_bytes = slot_bytes
        self._per_segment = max(1, SEGMENT_BYTES // slot_bytes)
        self._cap_bytes = cap_bytes
        self._min_free_bytes = min_free_bytes
        self._io = io
        self._growing = threading.Lock()
        self._files: dict[int, tuple[int, int]] = {}
        """Segment -> (file descriptor, slots allocated)."""
        self._others = [info for info in list_directories(directory.parent) if info.path != directory]

    def open(self) -> None:
        """Probe O_DIRECT; open the segments that exist, cut to what this cap allows."""
        self.direct = self._probe()
        for path in sorted(self._directory.glob("segment-*.kv")):
            number = int(path.stem.removeprefix("segment-"))
            room = min(self._per_segment, self._slots - number * self._per_segment)
            if room <= 0:
                path.unlink()
                continue
            fd = self._open(number)
            if os.fstat(fd).st_size > room * self._slot_bytes:
                os.ftruncate(fd, room * self._slot_bytes)
            self._files[number] = (fd, os.fstat(fd).st_size // self._slot_bytes)

    def close(self) -> None:
        for fd, _ in self._files.values():
            os.close(fd)
        self._files = {}

    @property
    def disk_bytes(self) -> int:
        """Bytes of all segment files."""
        return sum(os.fstat(fd).st_size for fd, _ in list(self._files.values()))

    def holds(self, frame: FrameId) -> bool:
        """Does this frame exist on disk?"""
        number, slot = divmod(frame, self._per_segment)
        return number in self._files and slot < self._files[number][1]

    def runs_on(self, frame: FrameId) -> bool:
        """Do `frame` and the next one lie side by side in one file?"""
        return (frame + 1) % self._per_segment != 0

    def place(self, frame: FrameId) -> tuple[int, int]:
        """File descriptor and offset of a frame. Raises OSError when it is not there."""
        number, slot = divmod(frame, self._per_segment)
        if number not in self._files:
            raise OSError(errno.ENODATA, f"segment {number} does not exist")
        return self._files[number][0], slot * self._slot_bytes

    def ensure(self, first: FrameId, count: int) -> None:
        """Make sure that `count` frames of one segment exist. Raises OSError ENOSPC when they may not."""
        number, slot = divmod(first, self._per_segment)
        wanted = slot + count
        if number in self._files and wanted <= self._files[number][1]:
            return
        with self._growing:
            fd, have = self._files.get(number, (-1, 0))
            if wanted <= have:
                return
            step = max(1, GROW_BYTES // self._slot_bytes)
            room = min(self._per_segment, self._slots - number * self._per_segment)
            target = min(room, -(-wanted // step) * step)
            length = (target - have) * self._slot_bytes
            self._make_room(length)
            if fd < 0:
                fd = self._open(number)
            self._io.fallocate(fd, have * self._slot_bytes, length)
            self._files[number] = (fd, target)

    def _make_room(self, length: int) -> None:
        """Within the cap, unowned directories included, and above the floor; else OSError ENOSPC."""
        while self._others and self._too_much(length):
            _remove(self._others.pop(0).path)
        free = self._io.free_bytes(self._directory)
        if free - length < self._min_free_bytes:
            raise OSError(errno.ENOSPC, f"{free} bytes free, {self._min_free_bytes} must stay free")

    def _too_much(self, length: int) -> bool:
        others = sum(info.bytes for info in self._others if not info.owned)
        low = self._io.free_bytes(self._directory) - length < self._min_free_bytes
        return others > 0 and (low or self.disk_bytes + length + others > self._cap_bytes)

    def _open(self, number: int) -> int:
        flags = os.O_RDWR | os.O_CREAT | (os.O_DIRECT if self.direct else 0)
        return open_private(self._directory / f"segment-{number:05d}.kv", flags)

    def _probe(self) -> bool:
        """Does this file system take O_DIRECT with our alignment?"""
        path = self._directory / "probe"
        try:
            with _scratch(path) as fd:
                page = mmap.mmap(-1, ALIGNMENT)
                return os.pwritev(fd, [page], 0) == ALIGNMENT and os.preadv(fd, [page], 0) == ALIGNMENT
        except OSError as error:
            log.warning("no O_DIRECT in %s (%s): the SSD tier goes through the page cache", path.parent, error)
            return False


@contextlib.contextmanager
def _scratch(path: Path) -> Iterator[int]:
    fd = open_private(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    try:
        yield fd
    finally:
        os.close(fd)
        path.unlink(missing_ok=True)


def _remove(directory: Path) -> None:
    """Delete a directory unless somebody owns it by now."""
    try:
        lock = DirectoryLock(directory)
    except (ConfigError, OSError):
        return
    log.info("removing the cache of a model that is not served any more: %s", directory.name)
    shutil.rmtree(directory, ignore_errors=True)
    lock.release()
