"""`terrace cache`: look at, check and empty the caches below an --ssd-path, whether or not a daemon runs.

Knows directories and how to print; which bytes make a block valid is the SSD tier's business. What concerns the memory
of a running daemon (lookup, pins, eviction by prompt) is the HTTP API under /v1/cache.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from server.errors import ConfigError
from server.kvcache.tiers.check import CacheInfo, list_caches, verify_cache
from server.ownership import DirectoryLock
from server.quantities import show_bytes

SHOWN_FAULTS = 20
"""Faulty blocks that `verify` names; the others are counted."""


def list_all(root: Path) -> int:
    """Print every cache below `root`, least recently used first."""
    table = Table(box=None, pad_edge=False)
    for column in ("FINGERPRINT", "BLOCKS", "SIZE", "BLOCK", "LAST USED", "STATE"):
        table.add_column(column, justify="right" if column in ("BLOCKS", "SIZE", "BLOCK") else "left", no_wrap=True)
    for info in _caches(root):
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(info.used_s))
        state = "in use" if info.owned else "idle"
        name, block = info.fingerprint.hex()[:16], show_bytes(info.block_bytes)
        table.add_row(name, f"{info.blocks:,}", show_bytes(info.bytes), block, used, state)
    Console(soft_wrap=True).print(table)
    return 0


def verify(root: Path, wanted: str | None) -> int:
    """Read and check every block of the caches that match; 1 when any does not verify."""
    bad = 0
    for info in _matching(root, wanted):
        count, faulty = 0, 0
        for verdict in verify_cache(info.path):
            count += 1
            if verdict.fault:
                faulty += 1
                if faulty <= SHOWN_FAULTS:
                    print(f"block {verdict.hash.hex()[:16]} in frame {verdict.frame}: {verdict.fault}")
        note = "; a running daemon writes meanwhile" if info.owned and faulty else ""
        print(f"{info.fingerprint.hex()[:16]}: {count - faulty} of {count} blocks verify{note}")
        bad += faulty
    return 1 if bad else 0


def clear(root: Path, wanted: str | None) -> int:
    """Delete the caches that match and that no daemon uses."""
    skipped = 0
    for info in _matching(root, wanted):
        try:
            lock = DirectoryLock(info.path, "kv.ssd_path")
        except ConfigError:
            print(f"{info.fingerprint.hex()[:16]}: in use by a daemon; stop it, or POST /v1/cache/clear to it")
            skipped += 1
            continue
        shutil.rmtree(info.path)
        lock.release()
        print(f"{info.fingerprint.hex()[:16]}: deleted, {show_bytes(info.bytes)} freed")
    return 1 if skipped else 0


def _caches(root: Path) -> list[CacheInfo]:
    if not root.is_dir():
        raise ConfigError(f"{root} is not a directory; pass the daemon's --ssd-path", param="ssd_path")
    try:
        return list_caches(root)
    except OSError as error:
        raise ConfigError(f"cannot read {root}: {error.strerror}", param="ssd_path") from error


def _matching(root: Path, wanted: str | None) -> list[CacheInfo]:
    caches = _caches(root)
    found = [info for info in caches if wanted is None or info.fingerprint.hex().startswith(wanted)]
    if wanted is not None and not found:
        raise ConfigError(f"no cache below {root} begins with {wanted!r}; `terrace cache list` shows them")
    return found
