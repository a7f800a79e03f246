"""From a response to the chat that says the same: items become turns, refusals are reworded.

A response is planned as that chat, so that whatever chats learn, responses can do: `_as_chat` is the one place where
the two meet.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from server.api import response_schema as wire
from server.api import schema
from server.api.messages import (
    AllowedToolList,
    AllowedTools,
    CalledFunction,
    MessageToolCall,
    Tool,
    ToolChoice,
    ToolReference,
)
from server.api.requests import Encoder, Plan, plan_chat
from server.api.service import Service
from server.api.structured import JsonSchemaFormat, ResponseFormat
from server.errors import InvalidRequest

TRUNCATED_ROOM_RATIO = 0.25
"""Share of the context that `truncation: auto` leaves for the output of a request that does not limit it."""


async def plan_response(service: Service, encoder: Encoder, request: wire.ResponseRequest, tenant: str) -> Plan:
    """Raises TerraceError for whatever of `request` cannot be served, in its own words."""
    if request.top_logprobs and not request.shows_logprobs:
        raise InvalidRequest(f"'top_logprobs' needs include: ['{wire.LOGPROBS}']", param="top_logprobs")
    turns = _turns(request)
    if request.truncation == "auto":
        turns = await _newest_that_fit(service, encoder, request, turns, tenant)
    plan = await _plan(service, encoder, request, turns, tenant)
    if request.shows_logprobs and plan.outline is not None and plan.outline.tools is not None:
        raise InvalidRequest(
            f"'include': '{wire.LOGPROBS}' cannot be had beside tools, whose calls are no text; leave one of them out",
            param="include",
        )
    return plan


async def _plan(
    service: Service, encoder: Encoder, request: wire.ResponseRequest, turns: Sequence[_Turn], tenant: str
) -> Plan:
    try:
        return await plan_chat(service, encoder, _as_chat(service, request, turns), tenant)
    except InvalidRequest as error:
        instructions = [] if request.instructions is None else [None]
        raise _reworded(error, [*instructions, *turns]) from None


# --- items to turns --------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Turn:
    """One message of the chat. `item`: index of the first item that it was made of, None of a text.

    The assistant's is put together from thoughts, texts and calls, as its answer had been taken apart.
    """

    role: str
    item: int | None
    texts: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: list[wire.InputCall] = field(default_factory=list)
    result: wire.InputResult | None = None

    def takes(self, item: wire.Item) -> bool:
        """Whether `item` goes on with this turn: it is of the same answer."""
        if self.role != "assistant":
            return False
        match item:
            case wire.InputReasoning():  # an answer begins with its thoughts
                return not (self.texts or self.calls)
            case wire.InputMessage(role="assistant"):  # text may follow calls, but two messages are two answers
                return not self.texts or bool(self.calls)
            case wire.InputCall():
                return True
            case _:
                return False

    def add(self, item: wire.Item) -> None:
        match item:
            case wire.InputReasoning():
                self.thoughts.append(item.said)
            case wire.InputCall():
                self.calls.append(item)
            case wire.InputResult():
                self.texts.append(item.said)
                self.result = item
            case _:
                self.texts.append(item.said)

    @property
    def message(self) -> schema.Message:
        calls = [
            MessageToolCall(id=call.call_id, function=CalledFunction(name=call.name, arguments=call.arguments))
            for call in self.calls
        ]
        return schema.Message.model_construct(
            role=self.role,
            content=None if calls and not self.texts else "\n".join(self.texts),
            tool_calls=calls or None,
            reasoning_content="\n".join(self.thoughts) or None,
            tool_call_id=self.result.call_id if self.result else None,
            name=self.result.name if self.result else None,
        )


def _turns(request: wire.ResponseRequest) -> list[_Turn]:
    """The input as the turns of a chat. Raises InvalidRequest for the output of a call that is not there."""
    if isinstance(request.input, str):
        return [_Turn("user", None, [request.input])]
    turns: list[_Turn] = []
    called: set[str] = set()
    for index, item in enumerate(request.input):
        if isinstance(item, wire.InputCall):
            called.add(item.call_id)
        elif isinstance(item, wire.InputResult) and item.call_id not in called:
            where = f"input[{index}].call_id"
            raise InvalidRequest(f"'{where}' is of no function_call in front of it", param=where)
        if not (turns and turns[-1].takes(item)):
            turns.append(_Turn(_role(item), index))
        turns[-1].add(item)
    return turns


def _role(item: wire.Item) -> str:
    if isinstance(item, wire.InputMessage):
        return item.role
    return "tool" if isinstance(item, wire.InputResult) else "assistant"


async def _newest_that_fit(
    service: Service, encoder: Encoder, request: wire.ResponseRequest, turns: list[_Turn], tenant: str
) -> list[_Turn]:
    """`turns` without as many of the oldest as it takes to leave room for the output. What is left begins with the
    system's voice, if the input does, and then with a user's turn; a last turn that is too long by itself stays."""
    voice = next((i for i, turn in enumerate(turns) if turn.role not in ("system", "developer")), len(turns))
    starts = [voice, *(i for i in range(voice + 1, len(turns)) if turns[i].role == "user")]
    room = min(
        request.max_output_tokens or int(service.max_model_len * TRUNCATED_ROOM_RATIO), service.max_model_len - 1
    )

    async def fits(start: int) -> bool:
        try:
            plan = await _plan(service, encoder, request, turns[:voice] + turns[start:], tenant)
        except InvalidRequest as error:
            if error.code != "context_length_exceeded":
                raise
            return False
        return len(plan.prompts[0].ids) + room <= service.max_model_len

    low, high = 0, len(starts) - 1  # the later the start the shorter the prompt
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if await fits(starts[middle]) else (middle + 1, high)
    return turns[:voice] + turns[starts[low] :]


# --- the request -----------------------------------------------------------------------------------------------------


def _as_chat(service: Service, request: wire.ResponseRequest, turns: Sequence[_Turn]) -> schema.ChatRequest:
    """The chat request that asks for the same: what both may say is copied, what has other names is renamed."""
    shared = {
        name: getattr(request, name) for name in schema.GenerationRequest.model_fields if name != "stream_options"
    }
    shared["response_format"] = _format_of(request)
    first = [] if request.instructions is None else [schema.Message(role="system", content=request.instructions)]
    return schema.ChatRequest.model_construct(
        **shared,
        messages=[*first, *(turn.message for turn in turns)],
        max_completion_tokens=request.max_output_tokens,
        logprobs=request.shows_logprobs,
        top_logprobs=request.top_logprobs if request.shows_logprobs else None,
        chat_template_kwargs=request.chat_template_kwargs,
        tools=[Tool.model_construct(type="function", function=tool) for tool in request.tools or ()],
        tool_choice=_choice_of(request),
        parallel_tool_calls=request.parallel_tool_calls,
        reasoning_effort=_effort_of(service, request),
        include_reasoning=request.include_reasoning,
    )


def _format_of(request: wire.ResponseRequest) -> ResponseFormat | None:
    """`text.format` as a chat names it."""
    wanted = None if request.text is None else request.text.format
    if not isinstance(wanted, wire.SchemaFormat):
        return None if wanted is None else ResponseFormat(type=wanted.type)
    schema_ = JsonSchemaFormat.model_construct(**wanted.model_dump(exclude={"type"}))
    return ResponseFormat.model_construct(type="json_schema", json_schema=schema_)


def _choice_of(request: wire.ResponseRequest) -> ToolChoice | None:
    choice = request.tool_choice
    if isinstance(choice, wire.FunctionChoice):
        return _reference(choice)
    if isinstance(choice, wire.AllowedFunctions):
        tools = [_reference(tool) for tool in choice.tools]
        return AllowedTools(type="allowed_tools", allowed_tools=AllowedToolList(mode=choice.mode, tools=tools))
    return choice


def _reference(choice: wire.FunctionChoice) -> ToolReference:
    return ToolReference(type="function", function=choice)


def _effort_of(service: Service, request: wire.ResponseRequest) -> wire.ReasoningEffort | None:
    """How much to think, as a chat says it. No thoughts of a model that has none: nothing that it must be told."""
    effort = None if request.reasoning is None else request.reasoning.effort
    dialect = service.dialect
    if effort == "none" and dialect.thoughts is None and not _EFFORT_NAMES & dialect.template_names:
        return None
    return effort


_EFFORT_NAMES = {"reasoning_effort", "enable_thinking"}
_WORDS = (
    (re.compile(r"^messages"), "input"),
    (re.compile(r"^max_(completion_)?tokens$"), "max_output_tokens"),
    (re.compile(r"^response_format(\.json_schema)?"), "text.format"),
    (re.compile(r"^reasoning_effort$"), "reasoning.effort"),
    (re.compile(r"^tool_choice\.allowed_tools"), "tool_choice"),
    (re.compile(r"^(tools\[\d+\]|tool_choice)\.function"), r"\1"),
)
"""What chats call what is called otherwise here."""


def _reworded(error: InvalidRequest, turns: Sequence[_Turn | None]) -> InvalidRequest:
    """The refusal of a chat in the words of the response that it was made of. `turns`: of its messages, in order; None
    for the instructions."""
    old = error.param or ""
    if found := re.match(r"messages\[(\d+)\]", old):
        turn = turns[int(found[1])]
        new = "instructions" if turn is None else "input" if turn.item is None else f"input[{turn.item}]"
    else:
        new = old
        for pattern, word in _WORDS:
            new = pattern.sub(word, new)
    message = error.message.replace(f"'{old}'", f"'{new}'").replace(f"in the {old}", f"in the {new}")
    reworded = InvalidRequest(message, param=new or None, code=error.code)
    reworded.status = error.status
    return reworded
