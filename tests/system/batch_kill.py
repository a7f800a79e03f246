"""kill -9 in the middle of a batch: `python -m tests.system.batch_kill --lines 2000 --kills 20`.

A real daemon on the demo model works on one batch and is killed at random moments, each time after it has begun to
serve and after some more lines were committed; in the end it is left to finish. Then every line must be exactly once in
the output, none in an error file, and each answer the one that its own prompt gets.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import httpx
import openai
from openai.types import Batch

from tests.e2e.daemon import ServeProcess, Wait

FACTS = (("Mira", "coins", "Lisbon"), ("Tom", "stamps", "Oslo"), ("Anna", "hats", "Rome"))
STEP_S = 0.1
"""Longest pause between a moment that is waited for and the kill."""


@dataclass
class Report:
    """What came of it. `problems` is empty when all is well; `resumed` is how many lines each start found done."""

    problems: list[str] = field(default_factory=list)
    resumed: list[int] = field(default_factory=list)
    completed: int = 0


def question(number: int) -> dict[str, object]:
    """Line `number`: its own custom_id, and one of three questions whose answers differ."""
    name, thing, _ = FACTS[number % len(FACTS)]
    facts = " ".join(f"{who} keeps {what} in {where}." for who, what, where in FACTS)
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": f"{facts} Where does {name} keep {thing}?"}],
        "temperature": 0,
    }
    return {"custom_id": f"line-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}


def run(folder: Path, lines: int, kills: int, seed: int) -> Report:
    """One batch of `lines` lines among `kills` kills."""
    rng = Random(seed)
    report = Report()
    # A small window spreads the lines over the kills; the disk's floor is not what is tested.
    flags = ("demo", "--threads", "1", "--device-gib", "64MiB", "--data-path", str(folder / "data"))
    flags += ("--batch-lines-in-flight", "4", "--data-min-free-gib", "0")
    batch_id = ""
    # Kills are spread over the first two thirds; a moment that is over already is a kill at once.
    moments = sorted(rng.randrange(lines * 2 // 3) for _ in range(kills))
    for turn, moment in enumerate([*moments, None]):
        with ServeProcess(folder / f"log-{turn}", *flags) as daemon:
            daemon.ready()
            client = openai.OpenAI(
                base_url=f"{daemon.url}/v1", api_key="none", http_client=httpx.Client(trust_env=False)
            )
            if not batch_id:
                content = "".join(json.dumps(question(number)) + "\n" for number in range(lines)).encode()
                file = client.files.create(file=("in.jsonl", content), purpose="batch")
                batch_id = client.batches.create(
                    input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
                ).id
            report.resumed.append(_counts(client, batch_id)[0])
            if moment is None:
                _finish(client, batch_id, lines, report)
                if daemon.stop(signal.SIGTERM) != 0:
                    report.problems.append("the last daemon did not exit with 0")
                continue
            _wait(client, batch_id, moment)
            time.sleep(rng.random() ** 2 * STEP_S)
            if _counts(client, batch_id)[1]:
                report.problems.append(f"the batch had ended before kill {turn + 1}")
            daemon.process.kill()
            daemon.process.wait()
    if sorted(report.resumed) != report.resumed:
        report.problems.append(f"lines that were done came undone: {report.resumed}")
    return report


def _wait(client: openai.OpenAI, batch_id: str, lines: int) -> None:
    Wait(300).until(lambda: _counts(client, batch_id)[0] >= lines, f"{lines} lines are done")


def _counts(client: openai.OpenAI, batch_id: str) -> tuple[int, bool]:
    """Lines that are done, and whether the batch has ended."""
    batch = client.batches.retrieve(batch_id)
    counts = batch.request_counts
    assert counts is not None
    return counts.completed + counts.failed, batch.status == "completed"


def _finish(client: openai.OpenAI, batch_id: str, lines: int, report: Report) -> None:
    """Waits for the end, and compares the output with what it must be."""
    Wait(600).until(lambda: _counts(client, batch_id)[1], "the batch is completed")
    batch: Batch = client.batches.retrieve(batch_id)
    if batch.error_file_id is not None or batch.output_file_id is None:
        report.problems.append(f"not all lines succeeded: {batch.request_counts}")
        return
    output = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    report.completed = len(output)
    times = Counter(line["custom_id"] for line in output)
    report.problems += [f"{name} is {count} times in the output" for name, count in times.items() if count != 1]
    report.problems += [f"line-{n} is not in the output" for n in range(lines) if not times[f"line-{n}"]]
    for line in output:
        _, _, place = FACTS[int(line["custom_id"].removeprefix("line-")) % len(FACTS)]
        said = line["response"]["body"]["choices"][0]["message"]["content"]
        if place not in said:
            report.problems.append(f"{line['custom_id']} says {said!r}, which is not of {place}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.system.batch_kill", allow_abbrev=False)
    parser.add_argument("--lines", type=int, default=2000, help="lines of the batch")
    parser.add_argument("--kills", type=int, default=20, help="how many times to kill")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        report = run(Path(folder), args.lines, args.kills, args.seed)
    print(f"{args.kills} kills, {report.completed} of {args.lines} lines in the output; done at each start:")
    print(" ", *report.resumed)
    print(*report.problems[:20], f"{len(report.problems)} problems", sep="\n")
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
