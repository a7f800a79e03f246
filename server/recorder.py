"""Writes down what was asked when, without a word of it: a trace in Mooncake's format that a load test can replay.

A line per request, in the order in which they ended: `timestamp` (ms since the start), `input_length`, `output_length`,
`hash_ids` (one number per block of the prompt, the same for the same prefix; the last one may be a part of a block),
`block_tokens`, and where they are not as usual `tenant`, `priority`, `background` and targets. The numbers of blocks
and tenants are keyed with a secret that only this process knows, so that nobody can test a guess against them; for the
same reason a start begins a new file.

The loop thread only hands requests over; a thread of its own hashes and writes, so that a slow disk delays nobody.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import queue
import secrets
import stat
import threading
from array import array
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from math import isfinite
from pathlib import Path

from server.types import ONLINE, ServiceClass

log = logging.getLogger("terrace.recorder")

QUEUED_MAX = 1024
"""Requests that wait to be written; beyond it they are left out, and counted."""
CLOSE_S = 5.0
"""How long the end of the process waits for the disk."""
ID_BITS = 53
"""What every JSON reader takes for an exact integer."""


@dataclass(frozen=True, slots=True)
class Ended:
    """One request: when it arrived (seconds, the daemon's clock), `prompt` of token ids, how many it got in answer.
    `root` tells apart what must not share a prefix."""

    arrival_s: float
    root: bytes
    prompt: array[int]
    generated: int
    service: ServiceClass = ONLINE


class Recorder:
    """`record` on the loop thread; `close` after the last one. At most twice `max_bytes` on disk: PATH and PATH.1."""

    def __init__(self, path: Path, max_bytes: int, block_tokens: int, start_s: float) -> None:
        """Moves what an earlier run recorded to PATH.1. Raises OSError when the file cannot be made."""
        self.outcomes = {"written": 0, "dropped": 0}
        self._path, self._max_bytes = path, max_bytes
        self._block_tokens, self._start_s = block_tokens, start_s
        self._key = secrets.token_bytes(16)
        self._queue: queue.Queue[Ended | None] = queue.Queue(QUEUED_MAX)
        self._file = self._fresh()
        self._size = 0
        self._failing = False
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self._thread.start()

    def record(self, ended: Ended) -> None:
        """Have `ended` written, unless too many wait already."""
        try:
            self._queue.put_nowait(ended)
        except queue.Full:
            self.outcomes["dropped"] += 1

    def close(self) -> None:
        """Write what waits, for CLOSE_S at most."""
        try:
            self._queue.put(None, timeout=CLOSE_S)
        except queue.Full:
            return
        self._thread.join(CLOSE_S)

    # --- the recorder's thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (ended := self._queue.get()) is not None:
            try:
                self._write(self._line(ended))
                self.outcomes["written"] += 1
                self._failing = False
            except OSError as error:
                self.outcomes["dropped"] += 1
                if not self._failing:  # a full disk must not fill the log as well
                    log.warning("cannot record to %s: %s", self._path, error.strerror)
                self._failing = True
        os.close(self._file)

    def _line(self, ended: Ended) -> bytes:
        row = {
            "timestamp": round((ended.arrival_s - self._start_s) * 1e3),
            "input_length": len(ended.prompt),
            "output_length": ended.generated,
            "hash_ids": self._ids(ended),
            "block_tokens": self._block_tokens,
            **self._class(ended.service),
        }
        return json.dumps(row, separators=(",", ":")).encode() + b"\n"

    def _class(self, service: ServiceClass) -> dict[str, object]:
        targets = {"ttft_target_ms": service.targets.ttft_s * 1e3, "tpot_target_ms": service.targets.tpot_s * 1e3}
        said: dict[str, object] = {name: ms for name, ms in targets.items() if isfinite(ms)}
        if service.tenant:
            said["tenant"] = blake2b(service.tenant.encode(), digest_size=4, key=self._key).hexdigest()
        if service.priority:
            said["priority"] = service.priority
        if service.background:
            said["background"] = True
        return said

    def _ids(self, ended: Ended) -> list[int]:
        above, ids = ended.root, []
        for start in range(0, len(ended.prompt), self._block_tokens):
            tokens = ended.prompt[start : start + self._block_tokens].tobytes()
            above = blake2b(above + tokens, digest_size=16, key=self._key).digest()
            ids.append(int.from_bytes(above) >> (128 - ID_BITS))
        return ids

    def _write(self, line: bytes) -> None:
        if self._size + len(line) > self._max_bytes:
            if len(line) > self._max_bytes:
                raise OSError(errno.EFBIG, "one line is longer than the whole file may be")
            self._file, old = self._fresh(), self._file
            os.close(old)
            self._size = 0
        written = os.write(self._file, line)
        if written < len(line):  # no half lines
            os.ftruncate(self._file, self._size)
            os.lseek(self._file, self._size, os.SEEK_SET)
            raise OSError(errno.ENOSPC, "no space for a whole line")
        self._size += written

    def _fresh(self) -> int:
        """A new file; what was recorded before moves aside, but nothing does not move aside something."""
        with suppress(FileNotFoundError):
            known = self._path.lstat()
            if not stat.S_ISREG(known.st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
            if known.st_size:
                self._path.replace(f"{self._path}.1")
            else:
                self._path.unlink()
        return os.open(self._path, os.O_CREAT | os.O_WRONLY | os.O_EXCL | os.O_CLOEXEC, 0o600)
