"""What the bytes of KV depend on, as one number: the weights themselves, the effective config, and the layout.

A name is no identity: the same name with other weights, another RoPE scaling or another dtype gives other KV. So the
fingerprint covers the bytes of every weight file. Reading 16 GB takes seconds; the result is kept beside the checkpoint
(or in the user's cache, where that cannot be written) and trusted while size, times and inode of every file are what
they were. The same tells a running daemon that its checkpoint is not what it loaded any more.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

import xxhash

from server.types import BlockLayout

FORMAT = "terrace-kv-1"
"""Changes whenever equal inputs would give other KV bytes: a new layout of blocks, or a corrected kernel."""
CACHE_NAME = ".terrace-digest.json"
CHUNK_BYTES = 16 * 2**20
THREADS = 4
IRRELEVANT = frozenset({"_name_or_path", "transformers_version", "_commit_hash", "_attn_implementation"})
"""Keys of a config that say where it came from, not what is computed."""

ReadChunk = Callable[[int, int, int], bytes]
"""`pread(fd, count, offset)`."""


def weights_digest(files: Sequence[Path], cache_dir: Path | None = None, *, read: ReadChunk = os.pread) -> bytes:
    """32 bytes over name, size and content of every weight file; from the cache if no file has changed since.

    Where the files lie does not matter. Raises OSError when one cannot be read. Blocking: up to a second per GB.
    """
    folder = Path(os.path.commonpath([path.parent for path in files]))
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(files)}
    stats = {name: _stat(path) for name, path in paths.items()}
    places = [folder / CACHE_NAME]
    if cache_dir is not None:
        places.append(cache_dir / f"{blake2b(str(folder.resolve()).encode(), digest_size=16).hexdigest()}.json")
    for place in places:
        known = _cached(place, stats)
        if known is not None:
            return known
    with ThreadPoolExecutor(THREADS) as pool:
        sums = list(pool.map(lambda path: _content(path, read), paths.values()))
    total = blake2b(digest_size=32)
    for name, content in zip(paths, sums, strict=True):
        total.update(f"{name}\0{stats[name][0]}\0".encode() + content)
    if {name: _stat(path) for name, path in paths.items()} == stats:  # nobody wrote to them meanwhile
        _remember(places, stats, total.digest())
    return total.digest()


def file_stats(folder: Path) -> dict[str, list[int]]:
    """Of every file of a checkpoint: what changes when it is written to or replaced. Raises OSError."""
    found = {}
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # a link to nowhere, or gone this moment
            if _counts(path):
                found[path.name] = _stat(path)
    return found


def changed_files(folder: Path, before: Mapping[str, list[int]]) -> list[str]:
    """What was written, replaced, added or removed since `before` was taken, by name. Blocking."""
    try:
        now = file_stats(folder)
    except OSError:  # of a file that was there a moment ago, or of the folder: it is being replaced
        return sorted(before)
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def _counts(path: Path) -> bool:
    return path.suffix in (".safetensors", ".json", ".jinja", ".model", ".txt") and not path.name.startswith(".")


def random_digest(seed: int) -> bytes:
    """The same for random weights, which depend on the seed alone."""
    return blake2b(f"random weights {seed}".encode(), digest_size=32).digest()


def fingerprint(
    weights: bytes, config: Mapping[str, Any], layout: BlockLayout, *, dtypes: Sequence[str], codec: str = "raw"
) -> bytes:
    """32 bytes: root of all block hashes and name of the cache's directory. `dtypes`: of the model and of its KV,
    and whatever else decides how they are rounded."""
    relevant = {key: value for key, value in config.items() if key not in IRRELEVANT}
    canonical = json.dumps(relevant, sort_keys=True, default=str)
    parts = (FORMAT, weights.hex(), canonical, repr(layout), *dtypes, codec)
    return blake2b("\0".join(parts).encode(), digest_size=32).digest()


def _stat(path: Path) -> list[int]:
    stat = path.stat()
    # The time of the last change of any kind: what unpacks or copies files can set the others, but not this.
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _content(path: Path, read: ReadChunk) -> bytes:
    state = xxhash.xxh3_128()
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        offset = 0
        while chunk := read(fd, CHUNK_BYTES, offset):
            state.update(chunk)
            offset += len(chunk)
    finally:
        os.close(fd)
    return state.digest()


def _cached(place: Path, stats: Mapping[str, list[int]]) -> bytes | None:
    try:
        entry = json.loads(place.read_text(encoding="utf-8"))
        if entry["files"] == stats:
            digest = bytes.fromhex(entry["digest"])
            return digest if len(digest) == 32 else None
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none yet, or none that can be read: made anew
    return None


def _remember(places: Sequence[Path], stats: Mapping[str, list[int]], digest: bytes) -> None:
    """Write the cache in the first place that takes it; that none does only costs the next start some time."""
    text = json.dumps({"files": dict(stats), "digest": digest.hex()})
    for place in places:
        fresh = place.with_suffix(f".{os.getpid()}")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "w") as file:
                file.write(text)
            fresh.replace(place)
            return
        except OSError:
            with suppress(OSError):
                fresh.unlink()
