"""A vault below a scripted answerer or a scripted engine, and what must hold of a batch that has ended."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server.batches.records import ENDED, Answer, BatchRecord, Tokens
from server.batches.runner import Runner
from server.batches.vault import Upload, Vault
from server.config import BatchConfig
from server.errors import InvalidRequest

ENDPOINT = "/v1/completions"
START = 1_700_000_000


@dataclass
class Clock:
    """Unix seconds that only a test moves."""

    now: float = START

    def __call__(self) -> float:
        return self.now


def line(number: int, **more: Any) -> bytes:
    request = {"custom_id": f"line-{number}", "method": "POST", "url": ENDPOINT, "body": {"prompt": f"{number}"}}
    return json.dumps(request | more).encode()


def lines(count: int) -> bytes:
    return b"".join(line(number) + b"\n" for number in range(1, count + 1))


@dataclass
class FakeAnswerer:
    """Says what was asked, once `gate` is open; `fail` may raise first. Notes what began and what runs."""

    gate: asyncio.Event = field(default_factory=asyncio.Event)
    fail: Callable[[str], None] = lambda name: None
    running: list[tuple[str, str]] = field(default_factory=list)
    begun: list[tuple[str, str]] = field(default_factory=list)
    most: int = 0

    def check(self, endpoint: str, text: bytes) -> str:
        try:
            parsed = json.loads(text)
        except ValueError:
            raise InvalidRequest("the body is not valid JSON", code="invalid_json") from None
        if parsed["url"] != endpoint:
            raise InvalidRequest("'url' must be the batch's endpoint", param="url")
        return str(parsed["custom_id"])

    async def answer(self, endpoint: str, text: bytes, tenant: str) -> Answer:
        name = self.check(endpoint, text)
        self.begun.append((tenant, name))
        self.running.append((tenant, name))
        self.most = max(self.most, len(self.running))
        try:
            await self.gate.wait()
            await asyncio.sleep(0)
            self.fail(name)
            return Answer(json.dumps({"said": name}).encode(), Tokens(3, 2, 1))
        finally:
            self.running.remove((tenant, name))


def open_vault(path: Path, clock: Clock | None = None, below: dict[str, Any] | None = None, **limits: Any) -> Vault:
    settings = {"data_min_free_gib": 0.0} | limits
    return Vault(BatchConfig(**settings), path, clock or Clock(), **(below or {}))


async def upload(vault: Vault, content: bytes, tenant: str = "") -> str:
    async def receive(into: Upload) -> tuple[str, int]:
        await into.write(content)
        return "input.jsonl", 3600

    return (await vault.upload(tenant, receive)).id


async def start(vault: Vault, content: bytes, tenant: str = "") -> str:
    """A new batch over `content`; its id."""
    file_id = await upload(vault, content, tenant)
    return (await vault.create_batch(tenant, ENDPOINT, file_id, "fake", None, None)).id


@asynccontextmanager
async def running(vault: Vault, answerer: Any) -> Any:
    """A runner at work, cancelled at the end as a shutdown does it. What it raises is raised here."""
    task = asyncio.create_task(Runner(vault, answerer, lambda tries: 0.0).run())
    try:
        yield task
    finally:
        task.cancel()
        (ended,) = await asyncio.gather(task, return_exceptions=True)
        if not isinstance(ended, asyncio.CancelledError):
            raise ended


async def until(check: Callable[[], bool]) -> None:
    """Returns when `check` holds; other tasks and threads run meanwhile."""
    async with asyncio.timeout(30):
        while not check():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.001)


async def becomes(vault: Vault, batch_id: str, check: Callable[[BatchRecord], bool], poke: bool = False) -> BatchRecord:
    """The batch once `check` holds of it. `poke`: meanwhile the runner looks all the time, and not once a minute."""
    async with asyncio.timeout(30):
        while not check(record := await vault.batch(batch_id)):
            if poke:
                vault.changed.set()
            await asyncio.sleep(0.001)
    return record


async def ended(vault: Vault, batch_id: str, poke: bool = False) -> BatchRecord:
    return await becomes(vault, batch_id, lambda record: record.status in ENDED, poke)


async def content_of(vault: Vault, file_id: str | None) -> list[dict[str, Any]]:
    """The JSON lines of a file; none where there is no file."""
    if file_id is None:
        return []
    async with vault.reading(file_id) as handle:
        data = b""
        while chunk := await handle.read(1 << 20):
            data += chunk
    assert data.endswith(b"\n")
    return [json.loads(text) for text in data.splitlines()]


async def outcome(vault: Vault, record: BatchRecord) -> tuple[list[str], list[str]]:
    """Names in the output and in the error file, in their order."""
    output = await content_of(vault, record.output_file_id)
    error = await content_of(vault, record.error_file_id)
    assert all(entry["error"] is None and entry["response"]["status_code"] == 200 for entry in output)
    assert len({entry["id"] for entry in output + error}) == len(output) + len(error)
    return [entry["custom_id"] for entry in output], [entry["custom_id"] for entry in error]


def names(*numbers: int) -> list[str]:
    return [f"line-{number}" for number in numbers]


class Faulty(sqlite3.Connection):
    """A connection that lets `watch` see every statement before it is executed, and raise instead of it."""

    watch: Callable[[str], None] = staticmethod(lambda statement: None)

    def execute(self, statement: str, *arguments: Any) -> sqlite3.Cursor:
        type(self).watch(statement)
        return super().execute(statement, *arguments)


def watched(watch: Callable[[str], None]) -> Callable[..., sqlite3.Connection]:
    """A `connect` for a vault whose statements `watch` sees."""
    kind = type("Watched", (Faulty,), {"watch": staticmethod(watch)})
    return lambda path, **more: sqlite3.connect(path, factory=kind, **more)
