"""What the operating system counts about the drive below a directory. Any thread; a few system calls."""

from __future__ import annotations

import os
from pathlib import Path

SECTOR_BYTES = 512
"""In which the kernel counts, whatever the drive's own sectors are."""
WRITTEN_SECTORS = 6
"""Place of that count in a block device's `stat`, from 0."""


def drive_written_bytes(directory: Path, sysfs: Path = Path("/sys")) -> int | None:
    """Bytes that anybody wrote to the drive which `directory` is on, since it was attached. None where the system does
    not tell: not Linux, no drive of its own (overlay, network, memory), or a kernel that hides it."""
    try:
        number = directory.stat().st_dev
        device = (sysfs / "dev" / "block" / f"{os.major(number)}:{os.minor(number)}").resolve(strict=True)
        if (device / "partition").exists():
            device = device.parent
        fields = (device / "stat").read_text(encoding="ascii").split()
        return int(fields[WRITTEN_SECTORS]) * SECTOR_BYTES
    except (OSError, ValueError, IndexError):
        return None
