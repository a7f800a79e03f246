"""Who owns a directory that outlives the process. Any thread."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
from pathlib import Path

from server.errors import ConfigError

LOCK_TRIES = 10
LOCK_WAIT_S = 0.02
"""Another daemon that looks whether a directory is owned holds its lock for microseconds."""


class DirectoryLock:
    """Exclusive ownership of one directory, for as long as the process lives. Survives no crash, needs no cleaning."""

    def __init__(self, directory: Path, setting: str, tries: int = LOCK_TRIES) -> None:
        """Makes the directory if need be. Raises ConfigError that names `setting` (`section.field`) when it has another
        owner, OSError when it is unusable."""
        path = directory / "LOCK"
        while True:
            directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            directory.mkdir(mode=0o700, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # removed while we were opening it: make it again
                self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
                self._acquire(directory, setting, tries)
                with contextlib.suppress(FileNotFoundError):
                    if os.stat(path).st_ino == os.fstat(self._fd).st_ino:
                        break
                os.close(self._fd)
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, str(os.getpid()).encode(), 0)

    def _acquire(self, directory: Path, setting: str, tries: int) -> None:
        for left in reversed(range(tries)):
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError as error:
                if left and error.errno == errno.EWOULDBLOCK:
                    threading.Event().wait(LOCK_WAIT_S)
                    continue
                owner = os.pread(self._fd, 32, 0).decode(errors="replace").strip() or "unknown"
                os.close(self._fd)
                if error.errno != errno.EWOULDBLOCK:
                    raise
                flag = setting.rpartition(".")[2].replace("_", "-")
                raise ConfigError(
                    f"{directory} is in use by another daemon (pid {owner}); stop it, or give this one another "
                    f"--{flag}",
                    param=setting,
                ) from None

    def release(self) -> None:
        os.ftruncate(self._fd, 0)
        os.close(self._fd)
