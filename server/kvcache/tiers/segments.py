"""Segment files: fixed slots, allocated as they are needed, inside a byte cap and above a free-space floor.

One directory per fingerprint below one root, and one owner per directory. Directories of other fingerprints that nobody
owns (models that are not served any more) count against the cap and go whole, least recently used first, when room is
needed; those that another daemon owns are its own business.
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

import numpy as np
import numpy.typing as npt

from server.errors import ConfigError
from server.kvcache.tiers.files import ALIGNMENT, OsIo
from server.ownership import DirectoryLock
from server.types import FrameId

log = logging.getLogger("terrace.ssd")

SEGMENT_BYTES = 2**30
"""Nominal size of a segment file; it holds as many whole slots as fit."""
GROW_BYTES = 64 * 2**20
"""A segment is allocated in steps of about this size, so that a small disk is used to its end."""
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_SEGMENT = re.compile(r"segment-(\d{5,})\.kv")


def slots_per_segment(slot_bytes: int) -> int:
    return max(1, SEGMENT_BYTES // slot_bytes)


def segment_numbers(directory: Path) -> list[tuple[int, Path]]:
    """The segment files of one directory. Raises OSError."""
    matches = ((_SEGMENT.fullmatch(path.name), path) for path in directory.iterdir())
    return sorted((int(match[1]), path) for match, path in matches if match)


@dataclass(frozen=True, slots=True)
class DirectoryInfo:
    """One fingerprint directory. `used_s`: Unix time of the last change of any file in it."""

    path: Path
    bytes: int
    used_s: float
    owned: bool


def list_directories(root: Path) -> list[DirectoryInfo]:
    """Every fingerprint directory below `root`, least recently used first. Reads no file."""
    found = []
    for path in root.iterdir() if root.is_dir() else ():
        if _FINGERPRINT.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            stats = _stat_files(path)
            used_s = max((stat.st_mtime for stat in stats), default=0.0)
            found.append(DirectoryInfo(path, sum(stat.st_blocks * 512 for stat in stats), used_s, _owned(path)))
    return sorted(found, key=lambda info: info.used_s)


def disk_bytes(directory: Path) -> int:
    """What the files of one directory take."""
    return sum(stat.st_blocks * 512 for stat in _stat_files(directory))


def _stat_files(directory: Path) -> list[os.stat_result]:
    stats = []
    with contextlib.suppress(FileNotFoundError):
        for path in list(directory.iterdir()):
            with contextlib.suppress(FileNotFoundError):  # its owner is at work
                stats.append(path.lstat())
    return stats


def _owned(directory: Path) -> bool:
    try:
        fd = os.open(directory / "LOCK", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


@dataclass(frozen=True, slots=True)
class Limits:
    """`cap_bytes` for everything below the root that nobody else owns; `index_bytes` of it are not for segments."""

    cap_bytes: int
    index_bytes: int
    min_free_bytes: int


class Segments:
    """The slots of one directory: `slots` of `slot_bytes` bytes. Any thread; growing is serialised."""

    def __init__(self, directory: Path, slots: int, slot_bytes: int, limits: Limits, io: OsIo) -> None:
        assert slot_bytes % ALIGNMENT == 0, f"slots of {slot_bytes} bytes are not aligned"
        self.direct = False
        self._directory = directory
        self._slots = slots
        self._slot_bytes = slot_bytes
        self._per_segment = slots_per_segment(slot_bytes)
        self._limits = limits
        self._io = io
        self._growing = threading.Lock()
        self._files: dict[int, tuple[int, int]] = {}
        """Segment -> (file descriptor, slots allocated)."""

    def open(self) -> None:
        """Probe O_DIRECT; open the segments that exist, cut to what this cap allows. Raises OSError."""
        self.direct = self._probe()
        for number, path in segment_numbers(self._directory):
            room = min(self._per_segment, self._slots - number * self._per_segment)
            if room <= 0:
                path.unlink()
                continue
            try:
                fd = self._open(number)
            except OSError as error:
                log.warning("%s cannot be opened (%s): its blocks are lost", path, error)
                continue
            if os.fstat(fd).st_size > room * self._slot_bytes:
                os.ftruncate(fd, room * self._slot_bytes)
            self._files[number] = (fd, os.fstat(fd).st_size // self._slot_bytes)
        self._remove_others(0)

    def close(self) -> None:
        """The caller guarantees that no thread is in a read or write."""
        for fd, _ in self._files.values():
            os.close(fd)
        self._files = {}

    @property
    def count(self) -> int:
        return len(self._files)

    @property
    def bytes(self) -> int:
        """Of all segment files."""
        return sum(os.fstat(fd).st_size for fd, _ in list(self._files.values()))

    def present(self, frames: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which of these frames have a place on disk?"""
        allocated = np.zeros(-(-self._slots // self._per_segment) + 1, np.int64)
        for number, (_, slots) in self._files.items():
            allocated[number] = slots
        return frames % self._per_segment < allocated[frames // self._per_segment]

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
            assert wanted <= room, f"frames up to {first + count} of {self._slots}: the tier is smaller"
            target = min(room, -(-wanted // step) * step)
            self._remove_others((target - have) * self._slot_bytes)
            free = self._io.free_bytes(self._directory)
            affordable = have + max(0, free - self._limits.min_free_bytes) // self._slot_bytes
            target = max(wanted, min(target, affordable))  # a small disk is used to its end
            length = (target - have) * self._slot_bytes
            if free - length < self._limits.min_free_bytes:
                raise OSError(errno.ENOSPC, f"{free} bytes free, {self._limits.min_free_bytes} must stay free")
            if fd < 0:
                fd = self._open(number)
                self._files[number] = (fd, 0)
            self._io.fallocate(fd, have * self._slot_bytes, length)
            self._files[number] = (fd, target)

    def _remove_others(self, length: int) -> None:
        """Make room for `length` more bytes at the cost of models that nobody serves."""
        others = [info for info in list_directories(self._directory.parent) if not info.owned]
        others = [info for info in others if info.path != self._directory]
        for i, info in enumerate(others):
            mine = self.bytes + length + self._limits.index_bytes
            over = mine + sum(other.bytes for other in others[i:]) > self._limits.cap_bytes
            low = self._io.free_bytes(self._directory) - length < self._limits.min_free_bytes
            if not over and not low:
                break
            _remove(info.path)

    def _open(self, number: int) -> int:
        flags = os.O_RDWR | os.O_CREAT | (os.O_DIRECT if self.direct else 0)
        return self._io.open(self._directory / f"segment-{number:05d}.kv", flags)

    def _probe(self) -> bool:
        """Does this file system take O_DIRECT with our alignment?"""
        path = self._directory / "probe"
        try:
            with self._scratch(path) as fd:
                page = memoryview(mmap.mmap(-1, ALIGNMENT))
                self._io.pwritev(fd, [page], 0)
                self._io.preadv(fd, [page], 0)
        except OSError as error:
            log.warning("no O_DIRECT in %s (%s): the SSD tier goes through the page cache", path.parent, error)
            return False
        return True

    @contextlib.contextmanager
    def _scratch(self, path: Path) -> Iterator[int]:
        fd = self._io.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
        try:
            yield fd
        finally:
            os.close(fd)
            path.unlink(missing_ok=True)


def _remove(directory: Path) -> None:
    """Delete a directory unless somebody owns it by now."""
    try:
        lock = DirectoryLock(directory, "kv.ssd_path", tries=1)
    except (ConfigError, OSError):
        return
    log.info("removing the cache of a model that is not served any more: %s", directory.name)
    shutil.rmtree(directory, ignore_errors=True)
    lock.release()
