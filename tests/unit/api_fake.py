"""A scripted engine and a byte-level tokenizer: the two seams under the HTTP surface, small enough to read at once."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

import httpx
import numpy as np
from fastapi import FastAPI

from server.api.app import create_app
from server.api.dialects.dialect import NO_DIALECT, Dialect
from server.api.service import Service, hash_keys
from server.api.status.status import Status
from server.api.status.warnings import WarningLog
from server.api.tenancy import Tenants
from server.batches.vault import Vault
from server.config import ServerConfig
from server.engine import GenerateSpec
from server.errors import InvalidRequest, TerraceError
from server.explain import Explanations
from server.metrics import Facts, Metrics
from server.runner.grammar import Grammars, Vocabulary
from server.types import (
    NO_TARGETS,
    BlockLayout,
    FinishReason,
    HopReport,
    KvReport,
    SpanReport,
    Targets,
    TierReport,
    TokenEvent,
    TokenLogprobs,
)

BOS, EOS = 256, 257
VOCAB = 258
SPECIAL = {BOS: "<s>", EOS: "</s>"}


def byte_grammars() -> Grammars:
    """Compiles constraints for the vocabulary of `ByteTokenizer`."""
    return Grammars(Vocabulary([bytes([byte]) for byte in range(256)] + [b""] * 2, {n: i for i, n in SPECIAL.items()}))


class ByteTokenizer:
    """Token = byte of UTF-8, so that every character beyond ASCII spans several tokens."""

    eos_token_ids = frozenset({EOS})
    bos_token_id = BOS
    vocab_size = VOCAB
    has_chat_template = True
    chat_template = ""
    special_tokens: ClassVar[Mapping[str, int]] = {name: token for token, name in SPECIAL.items()}
    generation_defaults: ClassVar[Mapping[str, Any]] = {}
    is_byte_level = True
    strips_leading_space = False

    def encode(self, text: str, *, add_special_tokens: bool = True, param: str = "prompt") -> list[int]:
        return [BOS] * add_special_tokens + list(text.encode())

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        parts = (b"" if skip_special_tokens and i in SPECIAL else self.token_bytes(i) for i in ids)
        return b"".join(parts).decode(errors="replace")

    def is_special(self, token: int) -> bool:
        return token in SPECIAL

    def byte_piece(self, token: int) -> bytes:
        return SPECIAL[token].encode() if token in SPECIAL else bytes([token])

    token_bytes = byte_piece

    def token_text(self, token: int) -> str:
        return self.token_bytes(token).decode(errors="backslashreplace")

    def render_chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool, **more: Any) -> str:
        if more["continue_final_message"] and add_generation_prompt:
            raise InvalidRequest("'continue_final_message' excludes it", param="continue_final_message")
        if more.get("fail"):
            raise InvalidRequest("the chat template refuses these messages: no", param="messages")
        turns = "".join(f"<{m['role']}>{m['content']}\n" for m in messages)
        return turns + ("<assistant>" if add_generation_prompt else "")


@dataclass
class FakeStream:
    """One scripted sequence. Delivers `burst` events at a time, when `gate` is open."""

    engine: FakeEngine
    spec: GenerateSpec
    request_id: int
    cached_tokens: int | None = None
    closed: bool = False
    phase: str = "decode"
    generated: int = 0
    _events: Iterator[TokenEvent] = field(init=False)

    def __post_init__(self) -> None:
        self._events = self._script()

    @property
    def cached_by_tier(self) -> dict[str, int]:
        return {"device": self.cached_tokens or 0}

    def __aiter__(self) -> FakeStream:
        return self

    async def __anext__(self) -> Sequence[TokenEvent]:
        await self.engine.gate.wait()
        await asyncio.sleep(0)
        if self.closed:
            raise StopAsyncIteration
        batch = []
        for event in self._events:
            batch.append(event)
            self.generated += event.token is not None
            if len(batch) == self.engine.burst or event.finish:
                break
        if not batch:
            raise StopAsyncIteration
        self.cached_tokens = self.engine.cached_tokens
        if batch[-1].finish:
            self.engine.open.pop(self.request_id, None)
        return batch

    def close(self, reason: FinishReason = FinishReason.ABORT) -> None:
        self.closed = True
        if self.engine.open.pop(self.request_id, None) is not None:
            self.engine.aborted += 1

    def _script(self) -> Iterator[TokenEvent]:
        params, prompt = self.spec.params, self.spec.prompt
        if params.pooling is not None:
            vector = np.array([len(prompt), prompt[0], 4, 0], np.float32)
            yield TokenEvent(self.request_id, None, finish=FinishReason.LENGTH, pooled=vector)
            return
        known = None
        if params.prompt_logprobs is not None:
            known = [self._logprobs(token, params.prompt_logprobs) for token in prompt[1:]]
        for count, token in enumerate(self.engine.reply(self.spec), start=1):
            if self.engine.failure is not None and count == 3:
                yield TokenEvent(self.request_id, None, finish=self.engine.failure, error="it broke")
                return
            stop = token in params.stop_token_ids and count > params.min_tokens
            finish = FinishReason.STOP if stop else FinishReason.LENGTH if count >= params.max_tokens else None
            shown = None if params.logprobs is None else self._logprobs(token, params.logprobs)
            yield TokenEvent(self.request_id, token, shown, known if count == 1 else None, finish)
            if finish:
                return
        raise AssertionError("a reply must end with a stop token or be as long as max_tokens")

    def _logprobs(self, token: int, count: int) -> TokenLogprobs:
        mean = -1.0 - self.spec.params.seed % 7
        top = [((token + k) % VOCAB, mean - 0.5 * k) for k in range(count)]
        return TokenLogprobs(token, mean, 1, top)


def echo_reply(spec: GenerateSpec) -> Iterator[int]:
    """Says the prompt backwards, for ever."""
    text = [token for token in spec.prompt if token < 128] or [ord("x")]
    while True:
        yield from reversed(text)


@dataclass
class Gauges:
    state: str
    running: int
    waiting: int = 0
    loading: int = 0
    waiting_by_reason: Mapping[str, int] = field(
        default_factory=lambda: {"capacity": 0, "shared_prefix": 0, "background": 0}
    )
    preemptions: Mapping[str, int] = field(default_factory=lambda: {"spill": 0, "recompute": 0})
    kv: KvReport = field(default_factory=lambda: a_report(("device", 8, 8, 0, 0)))


def a_report(*tiers: tuple[str, int, int, int, int]) -> KvReport:
    """A cache of these tiers: name, blocks in all, free, cached, referenced."""
    reports = [
        TierReport(name, True, total, free, cached, used, 0, {"capacity": 0}, {"disabled": 0}, 0)
        for name, total, free, cached, used in tiers
    ]
    names = [tier[0] for tier in tiers]
    hops = [
        HopReport(source, target, 3, 0, 0, 0.5, 0.1, {"io": 0, "corrupt": 0})
        for above, below in itertools.pairwise(names)
        for source, target in ((above, below), (below, above))
    ]
    admissions = {tier[0]: {"admit": 0} for tier in tiers[1:]}
    return KvReport(1024, 16, reports, hops, admissions, 0, 0)


class FakeEngine:
    """Implements the engine's seam: submit, snapshot, state, and the cache's commands, which note what they are
    told."""

    def __init__(self, reply: Callable[[GenerateSpec], Iterator[int]] = echo_reply, max_model_len: int = 512) -> None:
        self.state = "ready"
        self.max_model_len = max_model_len
        self.reply = reply
        self.gate = asyncio.Event()
        self.gate.set()
        self.burst = 1
        self.cached_tokens = 0
        self.failure: FinishReason | None = None
        self.refuse: TerraceError | None = None
        self.refuse_after = 0
        self.submitted: list[GenerateSpec] = []
        self.open: dict[int, FakeStream] = {}
        self.aborted = 0
        self.kv = SimpleNamespace(layout=BlockLayout(1, 1, 1, 4, 4))
        self.told: list[tuple[object, ...]] = []
        self.stuck_for_s = 0.0
        self.explanations = Explanations(100, 0.0)

    def stuck_s(self) -> float:
        return self.stuck_for_s

    def chain(self, tokens: Sequence[int], cache_salt: str) -> list[bytes]:
        self.told.append(("chain", list(tokens), cache_salt))
        return [bytes([number]) for number in range(len(tokens) // 4)]

    def cache_lookup(self, hashes: Sequence[bytes]) -> list[SpanReport]:
        found = SpanReport("ssd", len(hashes) - 1, "load", "loading is faster", 0.1, 0.5)
        return [found, SpanReport(None, 1, "compute", "not cached", 0.0, 0.2)]

    def cache_pin(self, hashes: Sequence[bytes], ttl_s: float) -> int:
        self.told.append(("pin", len(hashes), ttl_s))
        return len(hashes)

    def cache_unpin(self, hashes: Sequence[bytes]) -> int:
        return 1

    def cache_prefetch(self, hashes: Sequence[bytes]) -> int:
        return len(hashes)

    def cache_evict(self, hashes: Sequence[bytes]) -> int:
        return len(hashes)

    def cache_clear(self) -> int:
        return 7

    def submit(self, spec: GenerateSpec) -> FakeStream:
        if self.refuse is not None and len(self.submitted) >= self.refuse_after:
            raise self.refuse
        assert len(spec.prompt) + spec.params.max_tokens <= self.max_model_len, "the API checks lengths first"
        self.submitted.append(spec)
        stream = FakeStream(self, spec, len(self.submitted))
        self.open[stream.request_id] = stream
        return stream

    def snapshot(self) -> Gauges:
        return Gauges(self.state, len(self.open))


def text_reply(text: str) -> Callable[[GenerateSpec], Iterator[int]]:
    """Says `text`, then end of sequence, for ever."""

    def reply(spec: GenerateSpec) -> Iterator[int]:
        while True:
            yield from text.encode()
            yield EOS

    return reply


def make_service(
    engine: FakeEngine,
    *,
    keys: Sequence[str] = (),
    admin_keys: Sequence[str] = (),
    tenants: Tenants | None = None,
    default_targets: Targets = NO_TARGETS,
    vault: Vault | None = None,
    tokenizer: Any = None,
    dialect: Dialect = NO_DIALECT,
    grammars: Grammars | None = None,
    warnings: WarningLog | None = None,
    **limits: Any,
) -> Service:
    """What the routes need, over `engine`, with a byte-level tokenizer unless another is given."""
    metrics = Metrics("fake", Facts(version="1.2.3", max_model_len=engine.max_model_len))
    metrics.bind(engine.snapshot)
    if vault is not None:
        metrics.bind_batches(vault)
    shown = ServerConfig(**limits)
    status = Status(metrics, "fake", time.monotonic, time.time, max_watchers=shown.max_watchers, warnings=warnings)
    tenants = tenants or Tenants(hash_keys(keys))
    tenants.admins = hash_keys(admin_keys)
    return Service(
        engine=engine,  # type: ignore[arg-type]
        tokenizer=tokenizer or ByteTokenizer(),
        dialect=dialect,
        grammars=grammars,
        metrics=metrics,
        model_name="fake",
        version="1.2.3",
        wall_clock=lambda: 1_700_000_000.5,
        limits=shown,
        status=status,
        tenants=tenants,
        default_targets=default_targets,
        vault=vault,
        embedding_dimensions=4,
    )


def make_app(engine: FakeEngine, **more: Any) -> FastAPI:
    """The application over `make_service`."""
    return create_app(make_service(engine, **more))


def client(app: FastAPI, **kwargs: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=True)
    return httpx.AsyncClient(transport=transport, base_url="http://terrace", **kwargs)
