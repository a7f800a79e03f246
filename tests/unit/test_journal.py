"""The index of the SSD tier: what it remembers, in which order, and what is left of it after damage."""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest

from server.kvcache.tiers import index, journal
from server.kvcache.tiers.base import Move, Recovered
from server.kvcache.tiers.files import OsIo
from server.kvcache.tiers.index import DROP, MARK, PIN, PUT, RECORD, TOUCH, Identity, batch, fold, pack, recover
from server.kvcache.tiers.journal import Journal, bytes_needed, read_index
from server.types import Note
from tests.system.ssd_store import Block

IDENTITY = Identity(bytes(range(32)), 4096)
CAPACITY = 64


def record(op: int, frame: int, block: Block, sequence: int, until_s: float = 0.0) -> bytes:
    return pack(op, frame, block.hash, block.parent, block.depth, until_s, "", sequence)


def table_of(*records: bytes, capacity: int = CAPACITY) -> np.ndarray:
    table = np.zeros(capacity, RECORD)
    fold(table, np.frombuffer(b"".join(records), RECORD))
    return table


def recovered(*records: bytes, wall_s: float = 0.0) -> Recovered:
    return recover(table_of(*records), everywhere, wall_s)


def everywhere(frames: np.ndarray) -> np.ndarray:
    return np.ones(len(frames), bool)


def reopen(folder: Path, wall_s: float = 0.0) -> tuple[Journal, Recovered]:
    opened = Journal(folder, IDENTITY, CAPACITY, OsIo())
    found, _ = opened.open(everywhere, wall_s)
    return opened, found


def put(target: Journal, frame: int, block: Block, tenant: str = "") -> None:
    target.put([Move(block.hash, block.parent, block.depth, 0, frame, tenant)])


def write_journal(folder: Path, *batches: bytes) -> None:
    (folder / "journal").write_bytes(IDENTITY.header() + b"".join(map(batch, batches)))


# --- what is remembered ----------------------------------------------------------------------------------------------


def test_what_was_put_is_there_after_a_restart(tmp_path: Path):
    """Frames, hashes, parents' frames and depths come back; what was dropped does not."""
    first, _ = reopen(tmp_path)
    for depth in range(4):
        put(first, 10 - depth, Block(0, depth))
    put(first, 20, Block(1, 0))
    first.note([Note("drop", Block(1, 0).hash, 20)])
    assert first.close(5)
    second, found = reopen(tmp_path)
    assert found.frames == [7, 8, 9, 10]
    assert found.above == [8, 9, 10, -1]
    assert found.depths == [3, 2, 1, 0]
    assert found.hashes == [Block(0, depth).hash for depth in (3, 2, 1, 0)]
    assert second.close(5)


def test_whose_blocks_they_are_is_remembered(tmp_path: Path):
    """Chains come back with their tenants, also after the journal became a checkpoint; those of nobody are nobody's."""
    first, _ = reopen(tmp_path)
    for depth in range(3):
        put(first, depth, Block(0, depth), "a" * 32)
        put(first, 10 + depth, Block(1, depth), "b")
        put(first, 20 + depth, Block(2, depth))
    put(first, 30, Block(3, 0), "b")
    for _ in range(2):
        assert first.close(5)
        first, found = reopen(tmp_path)
        assert {tenant: sorted(frames) for tenant, frames in found.owners.items()} == {
            "a" * 32: [0, 1, 2],
            "b": [10, 11, 12, 30],
        }
        assert len(found.frames) == 10
    assert first.close(5)


def test_order_is_recency_of_the_chain_with_children_first():
    """A touched block makes all above it as recent as itself; the rest of its chain goes before it."""
    records = [record(PUT, depth, Block(0, depth), depth + 1) for depth in range(3)]
    records += [record(PUT, 10 + depth, Block(1, depth), 10 + depth) for depth in range(2)]
    records += [record(TOUCH, 1, Block(0, 1), 20)]
    assert recovered(*records).frames == [2, 11, 10, 1, 0]


def test_a_broken_chain_goes_as_a_whole():
    """Blocks behind a missing one are not recovered, and leave the table."""
    table = table_of(
        *(record(PUT, depth, Block(0, depth), depth + 1) for depth in (0, 1, 3, 4)), record(PUT, 9, Block(1, 2), 9)
    )
    assert recover(table, everywhere, 0.0).frames == [1, 0]
    assert np.flatnonzero(table["op"]).tolist() == [0, 1]


def test_one_block_in_two_frames_is_in_the_later():
    """Of two rows with one hash the later counts, also for those that hang on it."""
    found = recovered(
        record(PUT, 5, Block(0, 0), 1), record(PUT, 6, Block(0, 0), 2), record(PUT, 7, Block(0, 1), 3)
    )  # fmt: skip
    assert (found.frames, found.above) == ([7, 6], [6, -1])


def test_frames_without_a_place_take_their_followers_along():
    """What the segment files do not have is dropped, and what hangs on it."""
    table = table_of(*(record(PUT, 10 * depth, Block(0, depth), depth + 1) for depth in range(4)))
    assert recover(table, lambda frames: frames != 20, 0.0).frames == [10, 0]


def test_pins_live_until_their_time():
    """A pin is there until it ends, is taken back, or its block is gone."""
    chains = [record(PUT, chain, Block(chain, 0), chain + 1) for chain in range(5)]
    pins = [record(PIN, chain, Block(chain, 0), 10 + chain, until_s=until_s) for chain, until_s in
            ((0, 100.0), (1, 50.0), (2, 100.0), (3, 100.0))]  # fmt: skip
    ends = [record(PIN, 2, Block(2, 0), 20), record(DROP, 3, Block(3, 0), 21)]
    assert recovered(*chains, *pins, *ends, wall_s=60.0).pins == {Block(0, 0).hash: 100.0}


def test_a_record_counts_only_for_the_block_it_names():
    """A drop or touch of what was in the frame before is no drop of what is there now."""
    found = recovered(record(PUT, 1, Block(0, 0), 1), record(PUT, 1, Block(1, 0), 2), record(DROP, 1, Block(0, 0), 3))
    assert found.hashes == [Block(1, 0).hash]
    found = recovered(record(PUT, 1, Block(0, 0), 1), record(DROP, 1, Block(0, 0), 2), record(PUT, 1, Block(0, 0), 3))
    assert found.hashes == [Block(0, 0).hash]


@pytest.mark.parametrize("seed", range(30))
def test_folding_and_linking_agree_with_the_obvious_way(seed: int):
    """Random records, cut into random batches, give what a loop over dicts gives."""
    rng = Random(seed)
    blocks = [Block(chain, depth) for chain in range(4) for depth in range(6)]
    raw = []
    for sequence in range(1, rng.randint(2, 120)):
        op = rng.choice((PUT, PUT, PUT, DROP, TOUCH, PIN))
        raw.append((op, rng.randrange(20), rng.choice(blocks), sequence, rng.choice((0.0, 5.0, 50.0)) * (op == PIN)))
    rows: dict[int, list] = {}
    for op, frame, block, sequence, until_s in raw:
        if op == PUT:
            rows[frame] = [block, sequence, 0.0]
        elif frame in rows and rows[frame][0] == block:
            if op == DROP:
                del rows[frame]
            elif op == TOUCH:
                rows[frame][1] = sequence
            else:
                rows[frame][2] = until_s
    place: dict[Block, int] = {}
    for frame, (block, _, _) in sorted(rows.items(), key=lambda item: item[1][1]):
        place[block] = frame
    kept = {b: f for b, f in place.items() if all(Block(b.chain, depth) in place for depth in range(b.depth))}
    table = np.zeros(CAPACITY, RECORD)
    data = [record(*fields) for fields in raw]
    while data:
        size = rng.randint(1, len(data))
        fold(table, np.frombuffer(b"".join(data[:size]), RECORD))
        data = data[size:]
    found = recover(table, everywhere, 10.0)
    assert dict(zip(found.hashes, found.frames, strict=True)) == {b.hash: f for b, f in kept.items()}
    assert found.pins == {b.hash: rows[f][2] for b, f in kept.items() if rows[f][2] > 10}
    recency = {b: max(rows[f][1] for o, f in kept.items() if o.chain == b.chain and o.depth >= b.depth) for b in kept}
    assert found.hashes == [b.hash for b in sorted(kept, key=lambda b: (recency[b], -b.depth))]


# --- damage ----------------------------------------------------------------------------------------------------------


def test_a_torn_tail_loses_only_itself(tmp_path: Path):
    """However much of the last batch reached the disk, the batches before it count."""
    write_journal(tmp_path, record(PUT, 1, Block(1, 0), 1), record(PUT, 2, Block(2, 0), 2))
    whole = (tmp_path / "journal").read_bytes()
    for size in range(len(whole) - 112, len(whole)):
        for tail in (b"", bytes(len(whole) - size)):
            if whole[:size] + tail == whole:  # the last bytes of a record are zeros
                continue
            (tmp_path / "journal").write_bytes(whole[:size] + tail)
            index = read_index(tmp_path, IDENTITY, CAPACITY)
            assert np.flatnonzero(index.table["op"]).tolist() == [1]
            assert bool(index.damaged) == (size + len(tail) > len(whole) - 112)


def test_a_flipped_bit_loses_one_batch(tmp_path: Path):
    """Wherever it is, no other batch is lost and nothing is invented; in the file's header, all is lost."""
    write_journal(tmp_path, *(record(PUT, frame, Block(frame, 0), frame) for frame in (1, 2, 3)))
    whole = (tmp_path / "journal").read_bytes()
    for byte in range(len(whole)):
        flipped = bytearray(whole)
        flipped[byte] ^= 1 << byte % 8
        (tmp_path / "journal").write_bytes(flipped)
        index = read_index(tmp_path, IDENTITY, CAPACITY)
        left = set(np.flatnonzero(index.table["op"]).tolist())
        assert index.damaged
        assert left == ({1, 2, 3} - {1 + (byte - 64) // 112} if byte >= 64 else set())


@pytest.mark.parametrize("identity", [Identity(bytes(32), 4096), Identity(IDENTITY.fingerprint, 8192)])
def test_an_index_of_another_model_is_not_read(tmp_path: Path, identity: Identity):
    """Another fingerprint or block size: the cache starts empty."""
    write_journal(tmp_path, record(PUT, 1, Block(1, 0), 1))
    index = read_index(tmp_path, identity, CAPACITY)
    assert not index.table["op"].any()
    assert index.damaged


def test_a_crash_before_the_journal_is_cut_brings_nothing_back(tmp_path: Path):
    """Records that the checkpoint covers are not applied to it again."""
    write_journal(tmp_path, record(PUT, 1, Block(1, 0), 1), record(PUT, 2, Block(2, 0), 2))
    mark = pack(MARK, 0, b"", None, 0, 0.0, "", 5)
    live = record(PUT, 1, Block(3, 0), 4)
    (tmp_path / "checkpoint").write_bytes(IDENTITY.header() + batch(mark) + batch(live))
    opened, found = reopen(tmp_path)
    assert found.hashes == [Block(3, 0).hash]
    assert opened.close(5)


def test_a_damaged_index_is_made_whole_by_opening_it(tmp_path: Path):
    """What still verifies is written again; the next start finds no damage."""
    write_journal(tmp_path, record(PUT, 1, Block(1, 0), 1))
    with (tmp_path / "journal").open("ab") as file:
        file.write(b"torn")
    first, _ = reopen(tmp_path)
    assert first.stats.damaged == 1
    assert first.close(5)
    second, found = reopen(tmp_path)
    assert (second.stats.damaged, found.frames) == (0, [1])
    assert second.close(5)


def test_a_whole_journal_is_written_on(tmp_path: Path):
    """After a kill a whole index is not written anew: the journal goes on where it ended, and keeps what was there."""
    folders = [tmp_path / str(number) for number in range(3)]
    folders[0].mkdir()
    size = len(IDENTITY.header())
    for number, folder in enumerate(folders[:2]):
        opened, found = reopen(folder)
        assert found.frames == list(range(number))
        wait_until(lambda path=folder / "journal": path.exists())
        put(opened, number, Block(number, 0))
        wait_until(lambda path=folder / "journal", least=size: path.stat().st_size > least)
        shutil.copytree(folder, folders[number + 1])  # as a kill would leave it
        written = (folder / "journal").read_bytes()
        assert opened.stats.checkpoints == 1 - number
        assert opened.close(5)
        size = len(written)
    opened, found = reopen(folders[2])
    assert found.frames == [0, 1]
    assert opened.close(5)


def test_unreadable_files_are_an_empty_cache(tmp_path: Path):
    """A directory where a file should be is damage, not a crash."""
    (tmp_path / "checkpoint").mkdir()
    damaged = read_index(tmp_path, IDENTITY, CAPACITY).damaged
    assert len(damaged) == 1


# --- bounds ----------------------------------------------------------------------------------------------------------


def test_the_files_never_outgrow_what_is_reserved_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Ten times more records than the journal may hold: the files stay within `bytes_needed`, and nothing is lost."""
    monkeypatch.setattr(journal, "FLUSH_S", 0.001)
    monkeypatch.setattr(journal, "FLUSH_RECORDS", 100)
    opened, _ = reopen(tmp_path)
    for number in range(10_000):
        put(opened, number % CAPACITY, Block(number, 0))
        if number % 97 == 0:
            time.sleep(0.001)
            sizes = [path.stat().st_size for path in (tmp_path / "journal", tmp_path / "checkpoint") if path.exists()]
            assert sum(sizes) <= bytes_needed(CAPACITY)
    assert opened.close(5)
    assert opened.stats.checkpoints > 2
    again, found = reopen(tmp_path)
    assert set(found.hashes) == {Block(number, 0).hash for number in range(10_000 - CAPACITY, 10_000)}
    assert again.close(5)


def test_what_waits_in_memory_is_bounded(tmp_path: Path):
    """Records that nobody writes are lost and counted at a limit."""
    opened = Journal(tmp_path, IDENTITY, CAPACITY, OsIo())  # never opened: its thread does not run
    for _ in range(journal.MAX_PENDING + 10):
        put(opened, 1, Block(0, 0))
    assert opened.stats.lost == 10
    assert opened.close(5)


class FullDisk(OsIo):
    full = False

    def write(self, fd: int, data: bytes) -> int:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(fd, data)


def test_a_journal_that_cannot_be_written_is_whole_again_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    """Failures are counted and said once; when there is room again, nothing is missing."""
    monkeypatch.setattr(journal, "FLUSH_S", 0.001)
    monkeypatch.setattr(journal, "RETRY_FLUSHES", 2)
    io = FullDisk()
    opened = Journal(tmp_path, IDENTITY, CAPACITY, io)
    opened.open(everywhere, 0.0)
    wait_until(lambda: opened.stats.checkpoints > 0)
    io.full = True
    frame = 0
    while opened.stats.failures < 3:
        put(opened, frame % CAPACITY, Block(frame, 0))
        frame += 1
        time.sleep(0.001)
    io.full = False
    wait_until(lambda: opened.stats.checkpoints > 1)
    index = read_index(tmp_path, IDENTITY, CAPACITY)
    assert int((index.table["op"] == PUT).sum()) == min(frame, CAPACITY)
    assert index.damaged == []
    assert opened.close(5)
    assert caplog.text.count("cannot be written") == 1


def wait_until(fact: Callable[[], bool]) -> None:
    for _ in range(10_000):
        if fact():
            return
        time.sleep(0.001)
    raise AssertionError("it never came true")


def test_collisions_of_the_join_key_lose_blocks_but_invent_none(monkeypatch: pytest.MonkeyPatch):
    """If every hash had the same key, a wrong parent would still never be linked."""
    monkeypatch.setattr(index, "_mix", lambda hashes: np.zeros(len(hashes), np.uint64))
    found = recovered(*(record(PUT, depth, Block(0, depth), depth + 1) for depth in range(3)))
    assert set(found.hashes) <= {Block(0, 0).hash}
