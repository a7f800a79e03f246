"""From a generation to a response: output items that open, grow and close, as one object or as the events that say so.

Both are made by the same steps: an answer that does not stream takes them with nobody listening.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple
from uuid import uuid4

from server.api import response_schema as wire
from server.api.dialects.parts import Arguments, CallStart, Content, Part, Thought
from server.api.generate import Choice, Generation, Piece, Shown, Whole
from server.api.openai import told
from server.api.render import chat_logprobs
from server.api.service import Service
from server.errors import Overloaded, TerraceError
from server.types import FinishReason

JsonDict = dict[str, Any]


class Event(NamedTuple):
    """What a client of a stream is told, but for the number. `name` lacks its `response.`."""

    name: str
    fields: JsonDict


class ResponseAnswer:
    """One answer: the whole of it, or its events. `whole` or `events`, once."""

    def __init__(self, service: Service, request: wire.ResponseRequest, generation: Generation) -> None:
        self._service = service
        self._request = request
        self._generation = generation
        self._id = f"resp_{uuid4().hex}"
        self._created = int(service.wall_clock())
        self._sequence = 0
        self._items = _Items()
        self._waiting: list[Shown] = []
        self._passed = 0
        """Tokens that do not wait any more for the text that they belong to."""
        wanted = None if request.text is None else request.text.format
        self._format = {"type": "text"} if wanted is None else wanted.model_dump(by_alias=True)
        if isinstance(wanted, wire.SchemaFormat):
            self._format["schema"] = json.loads(wanted.schema_)

    def whole(self, wholes: Sequence[Whole]) -> bytes:
        """The answer of a request that does not stream."""
        [whole] = wholes
        for _ in self._grow(whole.choice, whole):
            pass
        for _ in self._items.finish(_status(whole.choice)):
            pass
        return json.dumps(self._finished(whole.choice), separators=(",", ":")).encode()

    async def events(self, request_id: str) -> AsyncGenerator[bytes, None]:
        """The stream. An error after the first byte is a last event `response.failed`."""
        try:
            for name in ("created", "in_progress"):
                yield self._encoded(Event(name, {"response": self._response("in_progress")}))
            async with aclosing(self._generation.pieces()) as pieces:
                async for choice, piece in pieces:
                    for event in self._grow(choice, piece):
                        yield self._encoded(event)
                    if piece.finish is not None:
                        for event in self._items.finish(_status(choice)):
                            yield self._encoded(event)
                        response = self._finished(choice)
                        yield self._encoded(Event(response["status"], {"response": response}))
        except Exception as error:  # noqa: BLE001 - the answer has begun, so the error goes into it
            failure = told(error, request_id)
            yield self._encoded(Event("failed", {"response": self._response("failed", error=_fault(failure))}))

    def _encoded(self, event: Event) -> bytes:
        kind = f"response.{event.name}"
        data = json.dumps({"type": kind, "sequence_number": self._sequence, **event.fields}, separators=(",", ":"))
        self._sequence += 1
        return f"event: {kind}\ndata: {data}\n\n".encode()

    def _grow(self, choice: Choice, said: Whole | Piece) -> Iterator[Event]:
        """What `said` adds to the items."""
        self._waiting += said.tokens
        parts: Sequence[Part] = said.parts
        if self._generation.plan.outline is None:
            parts = [Content(said.text)] if said.text else []
        for part in parts:
            yield from self._items.add(part, self._logprobs(choice) if isinstance(part, Content) else [])
        if self._waiting and self._items.in_text:
            yield from self._items.add(Content(""), self._logprobs(choice))

    def _logprobs(self, choice: Choice) -> list[JsonDict]:
        """Of the tokens that wait, but for those of thoughts; these are over where there is text."""
        thoughts = max(0, choice.thought_tokens - self._passed)
        shown = self._waiting[thoughts:]
        self._passed += len(self._waiting)
        self._waiting.clear()
        content: list[JsonDict] = chat_logprobs(self._service.tokenizer, shown)["content"]
        return content

    def _finished(self, choice: Choice) -> JsonDict:
        status = _status(choice)
        return self._response(
            status,
            output=self._items.closed,
            incomplete_details={"reason": "max_output_tokens"} if status == "incomplete" else None,
            completed_at=int(self._service.wall_clock()) if status == "completed" else None,
            usage=self._usage(),
        )

    def _usage(self) -> JsonDict:
        usage = self._generation.usage()
        return {
            "input_tokens": usage["prompt_tokens"],
            # Nothing here is charged for writing, so nothing counts as written.
            "input_tokens_details": usage["prompt_tokens_details"] | {"cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": usage.get("completion_tokens_details", {"reasoning_tokens": 0}),
            "total_tokens": usage["total_tokens"],
        }

    def _response(self, status: str, **outcome: Any) -> JsonDict:
        """The response object: what the client asked for, as it was understood, and what came of it so far."""
        request, params = self._request, self._generation.plan.specs[0][0].params
        choice = request.tool_choice or "auto"
        empty: JsonDict = {
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            "output": [],
            "usage": None,
        }
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            **(empty | outcome),
            "background": False,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "max_tool_calls": request.max_tool_calls,
            "metadata": request.metadata or {},
            "model": self._service.model_name,
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "prompt_cache_key": request.prompt_cache_key,
            "prompt_cache_retention": request.prompt_cache_retention,
            "reasoning": {"effort": request.reasoning.effort if request.reasoning else None, "summary": None},
            "safety_identifier": request.safety_identifier,
            "service_tier": "flex" if request.service_tier == "flex" else "default",
            "store": False,
            "temperature": params.temperature if request.temperature is None else request.temperature,
            "text": {"format": self._format, "verbosity": "medium"},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [_tool(tool) for tool in request.tools or ()],
            "top_logprobs": request.top_logprobs or 0,
            "top_p": params.top_p if request.top_p is None else request.top_p,
            "truncation": request.truncation or "disabled",
            "user": request.user,
        }


class _Items:
    """The output items of one answer, one open at a time. What each method yields tells a client of what it did."""

    def __init__(self) -> None:
        self.closed: list[JsonDict] = []
        self._open: _Text | _Call | None = None
        self._silent = True
        """Nothing but thoughts so far."""

    @property
    def in_text(self) -> bool:
        """The open item is a message."""
        return isinstance(self._open, _Text) and self._open.kind is Content

    def add(self, part: Part, logprobs: Sequence[JsonDict] = ()) -> Iterator[Event]:
        """`logprobs` of tokens whose text `part` is, if it is content."""
        match part:
            case CallStart():
                yield from self._begin(_Call(part))
            case Arguments(text):
                assert isinstance(self._open, _Call), "arguments follow the beginning of their call"
                yield from self._told(self._open.add(text))
            case Content() | Thought():
                if not (isinstance(self._open, _Text) and isinstance(part, self._open.kind)):
                    yield from self._begin(_Text(type(part)))
                assert isinstance(self._open, _Text), "just begun"
                yield from self._told(self._open.add(part.text, logprobs))

    def finish(self, status: str) -> Iterator[Event]:
        """Closes the item that is open; `status` is its own. An answer that said and called nothing is one message."""
        if self._silent:
            yield from self._begin(_Text(Content), status)
        yield from self._close(status)

    def _begin(self, item: _Text | _Call, last: str = "completed") -> Iterator[Event]:
        """`last`: the status of the item in front of it."""
        yield from self._close(last)
        self._open = item
        self._silent = self._silent and isinstance(item, _Text) and item.kind is Thought
        yield from self._told(item.opening())

    def _close(self, status: str) -> Iterator[Event]:
        if self._open is not None:
            yield from self._told(self._open.closing(status))
            self.closed.append(self._open.item(status))
            self._open = None

    def _told(self, events: Iterator[Event]) -> Iterator[Event]:
        """`events` of the open item, with its place among the others."""
        for name, fields in events:
            yield Event(name, {"output_index": len(self.closed), **fields})


class _Text:
    """A message, or, of thoughts, a reasoning item; with one part of content."""

    def __init__(self, kind: type[Content] | type[Thought]) -> None:
        self.kind = kind
        self._id = f"{'msg' if kind is Content else 'rs'}_{uuid4().hex}"
        self._name = "output_text" if kind is Content else "reasoning_text"
        self._texts: list[str] = []
        self._logprobs: list[JsonDict] = []

    def opening(self) -> Iterator[Event]:
        yield Event("output_item.added", {"item": self.item("in_progress", [])})
        yield Event("content_part.added", {**self._place(), "part": self._part()})

    def add(self, text: str, logprobs: Sequence[JsonDict]) -> Iterator[Event]:
        self._texts.append(text)
        self._logprobs += logprobs
        more = {"logprobs": logprobs} if self.kind is Content else {}
        yield Event(f"{self._name}.delta", {**self._place(), "delta": text, **more})

    def closing(self, status: str) -> Iterator[Event]:
        part = self._part()
        more = {"logprobs": part["logprobs"]} if self.kind is Content else {}
        yield Event(f"{self._name}.done", {**self._place(), "text": part["text"], **more})
        yield Event("content_part.done", {**self._place(), "part": part})
        yield Event("output_item.done", {"item": self.item(status)})

    def item(self, status: str, content: list[JsonDict] | None = None) -> JsonDict:
        content = [self._part()] if content is None else content
        if self.kind is Content:
            return {"id": self._id, "type": "message", "status": status, "role": "assistant", "content": content}
        return {"id": self._id, "type": "reasoning", "status": status, "summary": [], "content": content}

    def _part(self) -> JsonDict:
        part: JsonDict = {"type": self._name, "text": "".join(self._texts)}
        return part | ({"annotations": [], "logprobs": self._logprobs} if self.kind is Content else {})

    def _place(self) -> JsonDict:
        return {"item_id": self._id, "content_index": 0}


class _Call:
    """A call of a function."""

    def __init__(self, start: CallStart) -> None:
        self._id = f"fc_{uuid4().hex}"
        self._start = start
        self._texts: list[str] = []

    def opening(self) -> Iterator[Event]:
        yield Event("output_item.added", {"item": self.item("in_progress")})

    def add(self, text: str) -> Iterator[Event]:
        self._texts.append(text)
        yield Event("function_call_arguments.delta", {"item_id": self._id, "delta": text})

    def closing(self, status: str) -> Iterator[Event]:
        item = self.item(status)
        done = {"item_id": self._id, "name": item["name"], "arguments": item["arguments"]}
        yield Event("function_call_arguments.done", done)
        yield Event("output_item.done", {"item": item})

    def item(self, status: str) -> JsonDict:
        return {
            "id": self._id,
            "type": "function_call",
            "status": status,
            "call_id": self._start.id,
            "name": self._start.name,
            "arguments": "".join(self._texts),
        }


def _status(choice: Choice) -> str:
    return "incomplete" if choice.finish is FinishReason.LENGTH else "completed"


def _tool(tool: wire.FunctionTool) -> JsonDict:
    """`tool` as it was understood: strict only if that was said."""
    return {
        "type": "function",
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
        "strict": bool(tool.strict),
    }


def _fault(error: TerraceError) -> dict[str, str]:
    """The two codes that clients of this route know."""
    return {
        "code": "rate_limit_exceeded" if isinstance(error, Overloaded) else "server_error",
        "message": error.message,
    }
