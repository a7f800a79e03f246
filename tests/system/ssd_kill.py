"""kill -9 in the middle of a write load: `python -m tests.system.ssd_kill --count 50`.

A child process writes, reads, drops and touches blocks of an SSD tier until it is killed at a random moment. Then the
tier is opened here: every row that is recovered either reads back exactly or is reported as corrupt, the cap holds, and
nobody is left holding the lock. Rows that were recovered and are good are kept for the next child, so that a directory
lives through many crashes.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from random import Random

from server.kvcache.host import HostArena
from server.types import Note
from tests.system.ssd_store import BLOCK_BYTES, Block, fill, holds, make_store, small_segments

CAP_BYTES = 2**20
CHAINS, DEPTH = 20, 10
HOST_FRAMES = 16


async def load(root: Path, seed: int) -> None:
    """Work until killed. Says `ready` once it is at it."""
    rng = Random(seed)
    host = HostArena(HOST_FRAMES, BLOCK_BYTES)
    tier = make_store(root, host, capacity_bytes=CAP_BYTES)
    await tier.open()
    print("ready", flush=True)
    while True:
        start = rng.randrange(tier.capacity_blocks - HOST_FRAMES)
        chain = Block(rng.randrange(CHAINS), 0).chain
        blocks = [Block(chain, depth) for depth in range(DEPTH)]
        for host_frame, block in enumerate(blocks):
            fill(host, host_frame, block)
        await tier.write([block.move(i, start + i) for i, block in enumerate(blocks)])
        if rng.random() < 0.3:
            tier.note([Note(rng.choice(("drop", "touch")), blocks[-1].hash, start + DEPTH - 1)])


async def examine(root: Path) -> tuple[int, int, list[str]]:
    """Blocks that were recovered and good, those reported as corrupt, and what is wrong."""
    host = HostArena(HOST_FRAMES, BLOCK_BYTES)
    tier = make_store(root, host, capacity_bytes=CAP_BYTES)  # raises if the lock is left over
    found = await tier.open()
    known = {Block(c, d).hash: Block(c, d) for c in range(CHAINS) for d in range(DEPTH)}
    good, corrupt, problems = 0, 0, []
    for frame, value in zip(found.frames, found.hashes, strict=True):
        (fault,) = await tier.read([known[value].move(0, frame)])
        if fault is None and holds(host, 0, known[value]):
            good += 1
        elif fault is not None and fault.reason == "corrupt":
            corrupt += 1
            tier.note([Note("drop", value, frame)])
        else:
            problems.append(f"frame {frame}: {fault or 'WRONG BYTES as success'}")
    if tier.disk_bytes > CAP_BYTES:
        problems.append(f"{tier.disk_bytes} bytes on disk, over the cap")
    await tier.aclose()
    return good, corrupt, problems


def kill_once(root: Path, rng: Random) -> tuple[int, int, list[str]]:
    """One child, killed up to a second after it began to work."""
    command = [sys.executable, "-m", "tests.system.ssd_kill", "--load", str(root), "--seed", str(rng.randrange(2**32))]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n", "the load did not start"
    try:
        child.wait(rng.random() ** 2)
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGKILL)
    child.stdout.close()
    assert child.wait() == -signal.SIGKILL, "the load ended by itself"
    return asyncio.run(examine(root))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.system.ssd_kill", allow_abbrev=False)
    parser.add_argument("--count", type=int, default=50, help="how many times to kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="where to put the store; default: a temporary folder")
    parser.add_argument("--load", metavar="ROOT", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    small_segments()
    if args.load:
        asyncio.run(load(Path(args.load), args.seed))
    rng = Random(args.seed)
    total = [0, 0, 0]
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for turn in range(args.count):
            good, corrupt, problems = kill_once(Path(folder), rng)
            total = [total[0] + good, total[1] + corrupt, total[2] + len(problems)]
            print(f"kill {turn + 1}: {good} blocks good, {corrupt} refused", *problems, sep="\n  " if problems else "")
    print(f"{args.count} kills: {total[0]} blocks good, {total[1]} refused, {total[2]} problems")
    return 1 if total[2] else 0


if __name__ == "__main__":
    sys.exit(main())
