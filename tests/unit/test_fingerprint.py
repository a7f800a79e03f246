"""The identity of a model's KV: what changes it, what does not, and what it costs to know it again."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from server.models.fingerprint import (
    CACHE_NAME,
    CHUNK_BYTES,
    changed_files,
    file_stats,
    fingerprint,
    random_digest,
    weights_digest,
)
from server.types import BlockLayout

LAYOUT = BlockLayout(layers=2, kv_heads=2, head_dim=8, dtype_bytes=2, block_tokens=16)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "rope_theta": 10000.0,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0},
    "transformers_version": "5.0.0",
    "_name_or_path": "somewhere",
}
DTYPES = ("torch.bfloat16", "torch.bfloat16")
WEIGHTS = random_digest(0)


class Reader:
    """`os.pread` that counts the bytes read of weights."""

    def __init__(self) -> None:
        self.read_bytes = 0

    def __call__(self, fd: int, count: int, offset: int) -> bytes:
        chunk = os.pread(fd, count, offset)
        self.read_bytes += len(chunk)
        return chunk


def checkpoint(folder: Path, **contents: bytes) -> list[Path]:
    """Weight files of a model in `folder`, two small shards unless told otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, content in (contents or {"a": b"first shard", "b": b"second shard"}).items():
        files.append(folder / f"{name}.safetensors")
        files[-1].write_bytes(content)
    return files


def read_bytes(files: list[Path], cache_dir: Path | None = None) -> int:
    """How many bytes of weights are read to know their digest."""
    reader = Reader()
    weights_digest(files, cache_dir, read=reader)
    return reader.read_bytes


def identity(**changes: object) -> bytes:
    """A fingerprint with some keys of the config replaced."""
    return fingerprint(WEIGHTS, CONFIG | changes, LAYOUT, dtypes=DTYPES)


# --- weights ----------------------------------------------------------------------------------------------------------


def test_any_byte_of_any_file_counts(tmp_path):
    """One flipped bit in one weight file, wherever it lies, is another model."""
    size = CHUNK_BYTES + 1000
    digests = set()
    for place in (None, 0, size // 2, CHUNK_BYTES - 1, CHUNK_BYTES, size - 1):
        content = bytearray(size)
        if place is not None:
            content[place] ^= 1
        digests.add(weights_digest(checkpoint(tmp_path / str(place), a=bytes(content), b=b"same")))
    assert len(digests) == 6


@pytest.mark.parametrize(
    "other",
    [
        {"a": b"first shard", "c": b"second shard"},
        {"a": b"second shard", "b": b"first shard"},
        {"a": b"first shardsecond shard", "b": b""},
        {"a": b"first shard"},
    ],
)
def test_names_and_borders_of_files_count(tmp_path, other):
    """The same bytes under other names, in another order or cut elsewhere are another model."""
    assert weights_digest(checkpoint(tmp_path / "x")) != weights_digest(checkpoint(tmp_path / "y", **other))


def test_files_of_the_same_name_in_two_folders_are_two(tmp_path):
    """Shards in subfolders are told apart, by the cache too."""
    files = checkpoint(tmp_path / "m" / "one", x=b"1") + checkpoint(tmp_path / "m" / "two", x=b"2")
    before = weights_digest(files)
    assert (tmp_path / "m" / CACHE_NAME).is_file()
    for file in files:
        content = file.read_bytes()
        file.write_bytes(b"3")
        assert weights_digest(files) != before
        file.write_bytes(content)
    assert weights_digest(files[::-1]) == before


def test_where_the_files_lie_and_when_they_were_written_does_not_count(tmp_path):
    """A renamed or copied folder and touched files are the same model: at most the bytes are read again."""
    files = checkpoint(tmp_path / "before")
    digest = weights_digest(files)
    (tmp_path / "before").rename(tmp_path / "after")
    moved = [tmp_path / "after" / file.name for file in files]
    assert weights_digest(moved) == digest
    os.utime(moved[0], ns=(1, 1))
    assert read_bytes(moved) > 0
    assert weights_digest(moved) == digest
    assert weights_digest(checkpoint(tmp_path / "copy")) == digest


def test_random_weights_are_known_by_their_seed():
    """Dummy weights of another seed are another model."""
    assert random_digest(1) == random_digest(1)
    assert random_digest(1) != random_digest(2)
    assert len(random_digest(1)) == 32


# --- the cache of digests ---------------------------------------------------------------------------------------------


def test_the_second_start_reads_no_weights(tmp_path):
    """The digest is kept beside the checkpoint, for the owner only, and believed while the files are what they were."""
    files = checkpoint(tmp_path / "m")
    digest = weights_digest(files)
    assert stat.S_IMODE((tmp_path / "m" / CACHE_NAME).stat().st_mode) == 0o600
    assert read_bytes(files) == 0
    assert weights_digest(files) == digest
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == [CACHE_NAME, "a.safetensors", "b.safetensors"]


@pytest.mark.parametrize("change", ["size", "mtime", "inode", "more", "fewer"])
def test_a_file_that_changed_is_read_again(tmp_path, change):
    """Another size, modification time or inode of one file, or one file more or less, and the cache is not believed."""
    files = checkpoint(tmp_path / "m")
    before, digest = files[0].stat(), weights_digest(files)
    same_bytes = change in ("mtime", "inode")
    if change == "size":
        files[0].write_bytes(b"longer first shard")
    elif change == "mtime":
        os.utime(files[0], ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    elif change == "inode":
        files[0].rename(tmp_path / "old")
        checkpoint(tmp_path / "m", a=b"first shard")
        os.utime(files[0], ns=(before.st_atime_ns, before.st_mtime_ns))
    elif change == "more":
        files += checkpoint(tmp_path / "m", c=b"third")
    else:
        files.pop()
    assert read_bytes(files) == sum(file.stat().st_size for file in files)
    assert (weights_digest(files) == digest) is same_bytes
    assert read_bytes(files) == 0


DAMAGED = ["", "{", "[]", "null", '{"files": {}}', '{"files": FILES, "digest": "00"}', '{"files": FILES, "digest": 7}']


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_cache_is_ignored_and_replaced(tmp_path, text):
    """A cut, foreign or empty cache file costs a second reading, nothing else."""
    files = checkpoint(tmp_path / "m")
    digest = weights_digest(files)
    place = tmp_path / "m" / CACHE_NAME
    known = json.dumps(json.loads(place.read_text())["files"])
    place.write_text(text.replace("FILES", known))
    assert read_bytes(files) > 0
    assert weights_digest(files) == digest
    assert read_bytes(files) == 0


def test_a_checkpoint_that_cannot_be_written_is_remembered_elsewhere(tmp_path):
    """Where the folder takes no file the digest is kept in the user's cache, apart for each folder."""
    one, two = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two", a=b"other", b=b"weights")
    for files in (one, two):
        (files[0].parent / CACHE_NAME).mkdir()  # whoever runs this, root too, cannot replace it by a file
    digests = [weights_digest(files, tmp_path / "cache") for files in (one, two)]
    assert digests[0] != digests[1]
    assert [read_bytes(files, tmp_path / "cache") for files in (one, two)] == [0, 0]
    assert [weights_digest(files, tmp_path / "cache") for files in (one, two)] == digests
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "cache").iterdir()} == {0o600}
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert len(list((tmp_path / "one").iterdir())) == 3


def test_nowhere_to_remember_is_no_error(tmp_path):
    """With no place that takes the cache each start reads the weights, and works."""
    files = checkpoint(tmp_path / "m")
    (tmp_path / "m" / CACHE_NAME).mkdir()
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert weights_digest(files, tmp_path / "cache") == weights_digest(files)
    assert read_bytes(files, tmp_path / "cache") > 0
    assert len(list((tmp_path / "m").iterdir())) == 3


def test_files_that_change_while_they_are_read_are_not_remembered(tmp_path):
    """A digest of bytes that were being written is not believed at the next start."""
    files = checkpoint(tmp_path / "m")

    def pread(fd: int, count: int, offset: int) -> bytes:
        os.utime(files[0], ns=(1, offset + 1))
        return os.pread(fd, count, offset)

    weights_digest(files, read=pread)
    assert not (tmp_path / "m" / CACHE_NAME).exists()


def test_a_file_that_is_gone_is_an_error(tmp_path):
    """Weights that cannot be read have no identity."""
    files = checkpoint(tmp_path / "m")
    files[1].unlink()
    with pytest.raises(OSError, match=r"b\.safetensors"):
        weights_digest(files)


# --- the whole fingerprint --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 500000.0},
        {"rope_scaling": None},
        {"rope_scaling": CONFIG["rope_scaling"] | {"factor": 4.0}},  # type: ignore[operator]
        {"architectures": ["MistralForCausalLM"]},
        {"sliding_window": 4096},
        {"rms_norm_eps": 1e-6},
    ],
)
def test_the_effective_config_counts(changes):
    """Another RoPE base or scaling, architecture, window or whatever else decides the bytes of KV is another cache."""
    assert identity(**changes) != identity()


@pytest.mark.parametrize("field", ["layers", "kv_heads", "head_dim", "dtype_bytes", "block_tokens"])
def test_the_layout_counts(field):
    """Another shape of a block, or another number of tokens in it, is another cache."""
    other = replace(LAYOUT, **{field: 2 * getattr(LAYOUT, field)})
    assert fingerprint(WEIGHTS, CONFIG, other, dtypes=DTYPES) != identity()


def test_weights_dtypes_and_codec_count():
    """Other weights, another precision of weights or of KV, or another codec is another cache."""
    prints = {
        identity(),
        fingerprint(random_digest(1), CONFIG, LAYOUT, dtypes=DTYPES),
        fingerprint(WEIGHTS, CONFIG, LAYOUT, dtypes=("torch.float16", "torch.bfloat16")),
        fingerprint(WEIGHTS, CONFIG, LAYOUT, dtypes=("torch.bfloat16", "torch.float16")),
        fingerprint(WEIGHTS, CONFIG, LAYOUT, dtypes=DTYPES, codec="int8"),
    }
    assert len(prints) == 5
    assert {len(value) for value in prints} == {32}


def test_where_a_config_came_from_does_not_count():
    """The folder's name, the library's version and the order of the keys change nothing."""
    assert identity(_name_or_path="elsewhere", transformers_version="6.0.0", _commit_hash="abc") == identity()
    assert fingerprint(WEIGHTS, dict(reversed(CONFIG.items())), LAYOUT, dtypes=DTYPES) == identity()


# --- a checkpoint that changes ----------------------------------------------------------------------------------------


def test_whatever_happens_to_a_checkpoint_is_noticed(tmp_path):
    """A file written, replaced, added or removed is named; other files, links to nowhere and our own cache are not."""
    folder = tmp_path / "m"
    files = checkpoint(folder)
    (folder / "config.json").write_text("{}")
    (folder / "notes.md").write_text("old")
    (folder / "lost.json").symlink_to(folder / "nowhere")
    before = file_stats(folder)
    assert set(before) == {"a.safetensors", "b.safetensors", "config.json"}
    weights_digest(files)
    (folder / "notes.md").write_text("new")
    assert changed_files(folder, before) == []
    fresh = folder / "fresh"
    fresh.write_bytes(files[0].read_bytes())
    fresh.replace(files[0])
    files[1].unlink()
    (folder / "tokenizer.json").write_text("{}")
    assert changed_files(folder, before) == ["a.safetensors", "b.safetensors", "tokenizer.json"]
    folder.rename(tmp_path / "gone")
    assert changed_files(folder, before) == sorted(before)


def test_weights_of_the_same_size_and_time_in_the_same_file_are_other_weights(tmp_path):
    """Whoever writes in place and sets the time back, as archives and copies do, is not believed to have changed
    nothing."""
    files = checkpoint(tmp_path / "m")
    before, stats = weights_digest(files), file_stats(tmp_path / "m")
    stat = files[0].stat()
    with files[0].open("r+b") as file:
        file.write(b"F")
    os.utime(files[0], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert files[0].stat().st_mtime_ns == stat.st_mtime_ns
    assert changed_files(tmp_path / "m", stats) == ["a.safetensors"]
    assert weights_digest(files) != before
