"""An HTTP/1.1 client for streamed completions, so lean that it is not what a load test measures.

One event loop, one asyncio protocol per connection, httptools' parser; a chunk costs about 10 us. The arrival time of a
chunk is taken when the loop hands its bytes over, before anything is parsed. Connections are kept and used again, the
last one first.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import urlsplit

import httptools

from loadgen.errors import UsageError
from loadgen.prompts import joined
from loadgen.records import Outcome, Prompt

Clock = Callable[[], float]
MAX_DETAIL = 300
"""Characters kept of an error's text."""


@dataclass(frozen=True)
class Target:
    """Where requests go and what all of them have in common."""

    base_url: str
    model: str
    chat: bool = False
    api_key: str | None = None
    ignore_eos: bool = True
    body: Mapping[str, object] = field(default_factory=dict)
    timeout_s: float = 600.0

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.chat else "/v1/completions"


class Connector(Protocol):
    """Opens a connection for `protocol`; tests put a server in memory here."""

    async def __call__(self, protocol: Callable[[], Stream]) -> Stream: ...


class Stream(asyncio.Protocol):
    """One connection; one request on it at a time. Loop thread."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._outcome: Outcome | None = None
        self._done: asyncio.Future[None] | None = None
        self._now = 0.0
        self._keep_answer = False
        self.closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    async def ask(self, head: bytes, body: bytes, outcome: Outcome, *, keep_answer: bool) -> None:
        """Send one request and fill in `outcome` until its stream is over. ConnectionError when the connection closed
        before a byte of the answer came; whatever else goes wrong is in `outcome`."""
        assert self._transport is not None
        self._outcome, self._keep_answer = outcome, keep_answer
        self._parser = httptools.HttpResponseParser(self)
        self._status, self._rest, self._ended, self._answered = 0, b"", False, False
        self._tail: list[bytes] = []
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(head + body)
        try:
            await self._done
        finally:
            if not self._done.done() or self._done.cancelled():
                self.close()
            self._outcome = None

    def close(self) -> None:
        self.closed = True
        if self._transport is not None:
            self._transport.close()

    # --- asyncio -----------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        self._now = self._clock()
        self._answered = True
        if self._outcome is None or self._parser is None:
            return self.close()  # nobody asked
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail("broken_stream", f"not HTTP: {error}")
            self.close()
        return None

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        if self._done is None or self._done.done():
            return
        if self._answered:
            self._now = self._clock()
            self._fail("broken_stream", "the connection closed in the middle")
        else:
            self._done.set_exception(ConnectionResetError("closed before an answer"))

    # --- httptools ---------------------------------------------------------------------------------------------------

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        self._status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if self._status != 200:
            self._tail.append(body)
            return
        lines = (self._rest + body).split(b"\n") if self._rest else body.split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip())

    def on_message_complete(self) -> None:
        assert self._parser is not None
        assert self._outcome is not None
        if not self._parser.should_keep_alive():
            self.close()
        outcome = self._outcome
        if self._status != 200:
            self._fail(*refusal(self._status, b"".join(self._tail)))
        elif outcome.error is None and not self._ended:
            self._fail("broken_stream", "the stream ended without [DONE]")
        elif outcome.error is None and not outcome.chunk_s:
            self._fail("empty", "the stream ended without any output")
        else:
            self._finish()

    # --- events ------------------------------------------------------------------------------------------------------

    def _event(self, data: bytes) -> None:
        outcome = self._outcome
        assert outcome is not None
        if data == b"[DONE]":
            self._ended = True
            return
        try:
            event = json.loads(data)
            if "error" in event:
                outcome.error, outcome.detail = "stream_error", error_text(event)
                return
            for choice in event["choices"]:
                text = output_of(choice)
                if text is not None:
                    outcome.chunk_s.append(self._now)
                    if self._keep_answer:
                        outcome.answer += text
            if event.get("usage"):
                read_usage(outcome, event["usage"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            outcome.error, outcome.detail = "stream_error", f"not an event of a completion: {error!r}"[:MAX_DETAIL]

    def _fail(self, kind: str, detail: str) -> None:
        if self._outcome is not None and self._outcome.error is None:
            self._outcome.error, self._outcome.detail = kind, detail[:MAX_DETAIL]
        self._finish()

    def _finish(self) -> None:
        if self._outcome is not None and self._done is not None and not self._done.done():
            self._outcome.end_s = self._now
            self._done.set_result(None)


def output_of(choice: Mapping[str, Any]) -> str | None:
    """The text that one choice of an event adds; None when the event announces or ends and carries no token.

    A token may have no text of its own yet (half a character): an empty piece in the middle counts.
    """
    delta = choice.get("delta")
    if delta is None:
        text = choice.get("text") or ""
        return None if not text and choice.get("finish_reason") else text
    text = delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning") or ""
    if text or delta.get("tool_calls"):
        return text
    return None if "role" in delta or choice.get("finish_reason") else ""


def read_usage(outcome: Outcome, usage: Mapping[str, Any]) -> None:
    """Token counts, and where the server says so how many came from its cache and from which tier."""
    outcome.prompt_tokens = int(usage.get("prompt_tokens") or 0)
    outcome.output_tokens = int(usage.get("completion_tokens") or 0)
    details = usage.get("prompt_tokens_details") or {}
    outcome.cached_tokens = int(details.get("cached_tokens") or 0)
    outcome.cached_by_tier = {str(k): int(v) for k, v in (details.get("cached_tokens_by_tier") or {}).items()}


def refusal(status: int, body: bytes) -> tuple[str, str]:
    """(kind of error, text) of an answer that is not 200."""
    kind = "http_429" if status == 429 else "http_5xx" if status >= 500 else "http_4xx"
    try:
        text = error_text(json.loads(body))
    except ValueError:
        text = body.decode(errors="replace")
    return kind, f"{status}: {text}"


def error_text(event: Any) -> str:
    """The message of an OpenAI-style error object, whatever its shape."""
    error = event.get("error", event) if isinstance(event, dict) else event
    message = error.get("message", error) if isinstance(error, dict) else error
    return str(message)[:MAX_DETAIL]


class Client:
    """Sends requests of one target and keeps its connections. Loop thread."""

    def __init__(self, target: Target, clock: Clock, connect: Connector | None = None) -> None:
        parts = urlsplit(target.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"--base-url {target.base_url}: must look like http://127.0.0.1:8000")
        self.target = target
        self._clock = clock
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._host, self._port = parts.hostname, parts.port or (443 if self._tls else 80)
        self._connect = connect or self._open
        self._idle: list[Stream] = []
        key = f"Authorization: Bearer {target.api_key}\r\n" if target.api_key else ""
        path = parts.path.rstrip("/").removesuffix("/v1") + target.path
        self._head = f"POST {path} HTTP/1.1\r\nHost: {parts.netloc}\r\n{key}Content-Type: application/json\r\n"

    async def complete(
        self, history: list[tuple[str, Prompt]], outcome: Outcome, extra: Mapping[str, object] | None = None,
        *, keep_answer: bool = False,
    ) -> None:  # fmt: skip
        """Send the prompt that `history` makes, a list of (role, what was said), and fill in `outcome`."""
        body = json.dumps(self._body(history, outcome.asked_tokens, extra)).encode()
        head = f"{self._head}Content-Length: {len(body)}\r\n\r\n".encode()
        outcome.sent_s = self._clock()
        try:
            async with asyncio.timeout(self.target.timeout_s):
                await self._send(head, body, outcome, keep_answer)
        except TimeoutError:
            outcome.error, outcome.detail = "timeout", f"no end after {self.target.timeout_s:g} s"
        except OSError as error:
            outcome.error, outcome.detail = "connect", (str(error) or type(error).__name__)[:MAX_DETAIL]
        if outcome.error is not None:
            outcome.end_s = self._clock()

    def _body(
        self, history: list[tuple[str, Prompt]], tokens: int, extra: Mapping[str, object] | None
    ) -> dict[str, object]:
        target = self.target
        body: dict[str, object] = {"model": target.model, "stream": True, "stream_options": {"include_usage": True},
                                   "max_tokens": tokens, "temperature": 0.0}  # fmt: skip
        if target.chat:
            body["messages"] = [{"role": role, "content": said} for role, said in history]
        else:
            body["prompt"] = joined([said for _, said in history])
        if target.ignore_eos:
            body["ignore_eos"] = True
        return {**body, **target.body, **(extra or {})}

    async def _send(self, head: bytes, body: bytes, outcome: Outcome, keep_answer: bool) -> None:
        while self._idle:
            stream = self._idle.pop()
            if stream.closed:
                continue
            try:
                await stream.ask(head, body, outcome, keep_answer=keep_answer)
            except ConnectionError:
                continue  # the server had given up this one while it was idle
            return self._give_back(stream)
        stream = await self._connect(lambda: Stream(self._clock))
        await stream.ask(head, body, outcome, keep_answer=keep_answer)
        return self._give_back(stream)

    def _give_back(self, stream: Stream) -> None:
        if not stream.closed:
            self._idle.append(stream)

    async def _open(self, protocol: Callable[[], Stream]) -> Stream:
        loop = asyncio.get_running_loop()
        _, stream = await loop.create_connection(protocol, self._host, self._port, ssl=self._tls)
        return stream

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()
