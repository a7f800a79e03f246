"""The bodies of requests: read within limits of bytes, of JSON values and of time, and no further.

Parsing holds up the loop, by what there is to build rather than by bytes: 1 ms for a prompt of 8 MiB, 300 ms for as
many bytes of small objects. So values are counted as the bytes come, which is quicker by far.
"""

from __future__ import annotations

import asyncio
from typing import NamedTuple

import numpy as np
from starlette.datastructures import Headers
from starlette.types import Receive, Scope

from server.api.errors import BodyTimeout, UnsupportedMediaType
from server.errors import BodyTooLarge, InvalidRequest

BODY_TIMEOUT_S = 60.0
"""A body that takes longer is a stuck or hostile client; 8 MiB in a minute is 1.1 Mbit/s."""
UNPACED_BYTES = 64 * 2**10
"""Of a body, read as fast as it comes: prompts of some 15,000 tokens."""
PACE_S = 0.006
"""Between two later pieces of it, of 64 KiB or a few times that. Each holds up the loop a little: whoever sends much
must not take every turn of it."""
DISCARD_BYTES = 64 * 2**20
"""How much of an over-long body is read and dropped, so that the client sees the 413 and not a reset connection."""
DISCARD_TIMEOUT_S = 10.0
DISCARD_PACE_S = 0.005
"""Between two pieces that are dropped, of 64 KiB or a few times that: whoever sends what nobody wants can wait, and
others need the loop."""
SLICE_BYTES = 2**15
"""Of a piece, counted at a time."""
_QUOTE = ord('"')
_NO_MARKS = bytes(set(range(256)) - set(b'",{['))


class BodyLimits(NamedTuple):
    """`values`: JSON values in a body, see `ValueCount`."""

    bytes: int
    values: int


class ValueCount:
    """JSON values in a body, about: its commas and opening brackets outside strings, as the pieces come."""

    def __init__(self) -> None:
        self.values = 0
        self._inside = np.False_
        self._held = b""
        """A backslash at the end of a piece, which belongs to the next."""

    def add_until(self, enough: int, piece: bytes) -> None:
        """Counts on until there are more than `enough`: the rest of a hostile body is not worth the time."""
        for start in range(0, len(piece), SLICE_BYTES):
            if self.values <= enough:
                self.add(piece[start : start + SLICE_BYTES])

    def add(self, piece: bytes) -> None:
        """64 KiB of small objects take 0.1 ms."""
        if self._held or b"\\" in piece:
            piece = self._held + piece
            self._held = b"\\" * ((len(piece) - len(piece.rstrip(b"\\"))) % 2)
            piece = piece[: len(piece) - len(self._held)].replace(b"\\\\", b"").replace(b'\\"', b"")
        marks = piece.translate(None, _NO_MARKS)
        if not marks:
            return
        quotes = np.frombuffer(marks, np.uint8) == _QUOTE
        inside = np.logical_xor.accumulate(quotes) ^ self._inside
        self.values += len(marks) - int(np.count_nonzero(quotes | inside))
        self._inside = inside[-1]


async def read_json_body(scope: Scope, receive: Receive, limits: BodyLimits) -> bytes:
    """The body, never holding more than `limits.bytes` of it. Raises BodyTooLarge and its like."""
    headers = Headers(scope=scope)
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Besides being clearer, this keeps web pages from posting to a local daemon: a browser asks first.
        raise UnsupportedMediaType(f"Content-Type must be application/json, got {kind[:100]!r}", param="content-type")
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedMediaType("compressed bodies are not supported", param="content-encoding")
    declared = headers.get("content-length", "")
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            if declared.isdigit() and int(declared[:20]) > limits.bytes:
                await discard(receive, 0, more=True)
                raise _too_many_bytes(limits)
            return await _read(receive, limits)
    except TimeoutError:
        raise BodyTimeout(f"the body did not arrive within {BODY_TIMEOUT_S:.0f} s") from None


async def _read(receive: Receive, limits: BodyLimits) -> bytes:
    parts: list[bytes] = []
    count, counted, size, more = ValueCount(), 0, 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise InvalidRequest("the client left before its body was complete", code="incomplete_body")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        more = message.get("more_body", False)
        while size > limits.values and counted < len(parts):  # a shorter body cannot have as many
            count.add_until(limits.values, parts[counted])
            counted += 1
        if size > limits.bytes or count.values > limits.values:
            parts.clear()
            await discard(receive, size, more=more)
            raise _too_many_bytes(limits) if size > limits.bytes else _too_many_values(limits)
        if more and size > UNPACED_BYTES:
            await asyncio.sleep(PACE_S)
    return b"".join(parts)


def _too_many_bytes(limits: BodyLimits) -> BodyTooLarge:
    return BodyTooLarge(f"the body is larger than the limit of {limits.bytes} bytes; send a shorter prompt")


def _too_many_values(limits: BodyLimits) -> BodyTooLarge:
    return BodyTooLarge(f"the body has more than the limit of {limits.values} JSON values", code="too_many_values")


async def discard(receive: Receive, size: int, *, more: bool) -> None:
    """Drops what is still to come of a body of which `size` bytes came, within reason."""
    try:
        async with asyncio.timeout(DISCARD_TIMEOUT_S):
            while more and size < DISCARD_BYTES:
                message = await receive()
                size += len(message.get("body", b""))
                more = message.get("more_body", False)
                await asyncio.sleep(DISCARD_PACE_S)
    except TimeoutError:
        pass
