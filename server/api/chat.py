"""What a chat says beside its sampling: turns for the chat template, tools that may be called, thoughts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from server.api.dialects.answer import Outline
from server.api.messages import AllowedTools, Message, Tool, ToolReference
from server.api.schema import ChatRequest
from server.api.service import Service
from server.api.structured import ANY_OBJECT
from server.errors import InvalidRequest
from server.runner.json_schema import enforceable
from server.runner.refusal import Refused
from server.text import RESERVED_TEMPLATE_ARGUMENTS
from server.types import Behind, Constraint, Either, TaggedJson

NO_PARAMETERS = {"type": "object", "properties": {}}


def render_chat(
    service: Service,
    messages: Sequence[Message],
    add_generation_prompt: bool | None,
    variables: dict[str, Any],
    *,
    continue_final_message: bool | None = None,
    tools: Sequence[Tool] | None = None,
    documents: Sequence[dict[str, Any]] | None = None,
) -> str:
    """The prompt that the model's chat template makes of `messages`. Raises InvalidRequest when it cannot."""
    reserved = RESERVED_TEMPLATE_ARGUMENTS & variables.keys()
    if reserved:
        # Checked here as well: some of these are parameters of render_chat itself.
        raise InvalidRequest(f"'chat_template_kwargs.{min(reserved)}' cannot be set", param="chat_template_kwargs")
    if tools:
        _check_known(service, "tools", "tools")
        _check_names(tools)
    if documents:
        _check_known(service, "documents", "documents")
    going_on = bool(continue_final_message)
    if going_on and messages[-1].tool_calls:
        raise InvalidRequest("'continue_final_message' needs a last message without calls", param="messages")
    return service.tokenizer.render_chat(
        turns(service, messages),
        add_generation_prompt=not going_on if add_generation_prompt is None else add_generation_prompt,
        continue_final_message=going_on,
        tools=[_for_template(tool) for tool in tools or ()],
        documents=documents,
        **variables,
    )


def turns(service: Service, messages: Sequence[Message]) -> list[dict[str, Any]]:
    """`messages` as chat templates take them. Raises InvalidRequest naming the message and its field."""
    called: dict[str, str] = {}
    found = []
    for index, message in enumerate(messages):
        _check_message(service, message, f"messages[{index}]")
        # Templates know three roles and `tool`; `developer` is what newer clients call the system's voice.
        turn: dict[str, Any] = {
            "role": "system" if message.role == "developer" else message.role,
            "content": message.text,
        }
        name = message.name or called.get(message.tool_call_id or "")
        if name:
            turn["name"] = name
        if message.tool_calls:
            called.update((call.id, call.function.name) for call in message.tool_calls)
            turn["tool_calls"] = [
                {
                    "id": _template_id(service, call.id),
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": _parsed(call.function.arguments)},
                }
                for call in message.tool_calls
            ]
        if message.tool_call_id is not None:
            turn["tool_call_id"] = _template_id(service, message.tool_call_id)
        thoughts = message.reasoning_content or message.reasoning
        if thoughts:
            turn["reasoning_content"] = turn["reasoning"] = thoughts
        found.append(turn)
    return found


def _check_message(service: Service, message: Message, where: str) -> None:
    role = message.role
    if message.content is None and not (role == "assistant" and message.tool_calls):
        raise InvalidRequest(f"'{where}.content' is required", param=f"{where}.content")
    if role == "tool" and message.tool_call_id is None:
        raise InvalidRequest(f"'{where}.tool_call_id' is required", param=f"{where}.tool_call_id")
    if role != "tool" and message.tool_call_id is not None:
        raise InvalidRequest(f"'{where}.tool_call_id' is for the role `tool` only", param=f"{where}.tool_call_id")
    if role == "assistant":
        if message.tool_calls:
            _check_known(service, "tool_calls", f"{where}.tool_calls")
        return
    for name in ("tool_calls", "reasoning_content", "reasoning"):
        if getattr(message, name):
            raise InvalidRequest(f"'{where}.{name}' is for the role `assistant` only", param=f"{where}.{name}")


def _check_known(service: Service, name: str, param: str) -> None:
    """Raises InvalidRequest if the chat template would leave out what `param` says."""
    if name not in service.dialect.template_names:
        raise InvalidRequest(f"'{param}' is not supported: this model's chat template knows no {name}", param=param)


def _check_names(tools: Sequence[Tool]) -> None:
    seen: set[str] = set()
    for index, tool in enumerate(tools):
        if tool.function.name in seen:
            where = f"tools[{index}].function.name"
            raise InvalidRequest(f"'{where}' is the name of an earlier tool too", param=where)
        seen.add(tool.function.name)


def _template_id(service: Service, call_id: str) -> str:
    parser = service.dialect.tools
    return parser.template_id(call_id) if parser else call_id


def _parsed(arguments: str) -> Any:
    """Templates write arguments as JSON themselves; what is none goes to them as it is."""
    try:
        return json.loads(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError):
        return arguments


def _for_template(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.function.name}
    if tool.function.description is not None:
        function["description"] = tool.function.description
    function["parameters"] = NO_PARAMETERS if tool.function.parameters is None else tool.function.parameters
    return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class Calls:
    """Which tools an answer may call."""

    tools: Sequence[Tool]
    """The prompt knows these, ..."""
    allowed: Sequence[Tool]
    """... and these may be called."""
    required: bool = False
    several: bool = True

    @property
    def enforced(self) -> bool:
        """Whether the model must be held to it, rather than asked."""
        return self.required or self.strict is not None or len(self.allowed) < len(self.tools)

    @property
    def strict(self) -> int | None:
        """Index of the first tool that may be called with arguments that fit its schema only."""
        strict = (index for index, tool in enumerate(self.tools) if tool.function.strict and tool in self.allowed)
        return next(strict, None)

    @property
    def param(self) -> str:
        """The field of the request that enforces."""
        by_choice = self.required or self.strict is None
        return "tool_choice" if by_choice else f"tools[{self.strict}].function.strict"


NO_CALLS = Calls((), ())


def calls_of(service: Service, request: ChatRequest) -> Calls:
    """The tools of `request` and its choice among them. Raises InvalidRequest where they do not fit."""
    tools, choice = request.tools or (), request.tool_choice or "auto"
    if not tools:
        if choice not in ("none", "auto"):
            raise InvalidRequest("'tool_choice' needs tools", param="tool_choice")
        return NO_CALLS
    if choice == "none":
        # The surest way to keep a model from calling tools is not to tell it of any.
        return NO_CALLS
    if service.dialect.tools is None:
        raise InvalidRequest(
            "'tools' is not supported: it is not known how this model calls tools; see --tool-call-parser",
            param="tools",
        )
    several = request.parallel_tool_calls is not False
    if isinstance(choice, ToolReference):
        named = _select(tools, [choice], "tool_choice.function.name")
        return Calls(tools, named, required=True, several=False)
    if isinstance(choice, AllowedTools):
        among = choice.allowed_tools
        allowed = _select(tools, among.tools, "tool_choice.allowed_tools.tools")
        return Calls(tools, allowed, among.mode == "required", several)
    return Calls(tools, tools, choice == "required", several)


def _select(tools: Sequence[Tool], wanted: Sequence[ToolReference], param: str) -> list[Tool]:
    known = {tool.function.name: tool for tool in tools}
    for reference in wanted:
        if reference.function.name not in known:
            raise InvalidRequest(f"'{param}': {reference.function.name!r} is not among the tools", param=param)
    return [known[name] for name in dict.fromkeys(reference.function.name for reference in wanted)]


def template_variables(service: Service, request: ChatRequest) -> dict[str, Any]:
    """What the chat template gets beside the messages. Raises InvalidRequest for what it has no use for."""
    variables = dict(request.chat_template_kwargs or {})
    effort, known = request.reasoning_effort, service.dialect.template_names
    if effort is None:
        return variables
    if effort == "none" and "enable_thinking" in known:
        asked: tuple[str, Any] = "enable_thinking", False
    elif "reasoning_effort" in known:
        asked = "reasoning_effort", effort
    else:
        raise InvalidRequest(
            "'reasoning_effort' is not supported: this model's chat template does not know it", param="reasoning_effort"
        )
    if variables.setdefault(*asked) != asked[1]:
        raise InvalidRequest(
            f"'reasoning_effort' and 'chat_template_kwargs.{asked[0]}' contradict each other", param="reasoning_effort"
        )
    return variables


def outline_of(service: Service, request: ChatRequest, calls: Calls, prompt: str) -> Outline | None:
    """How the answers are to be read; None where they are just text. `prompt`: the rendered one."""
    dialect = service.dialect
    if dialect.thoughts is None and not calls.allowed:
        return None
    said = request.messages[-1].text if request.continue_final_message else None
    return Outline(
        tools=dialect.tools if calls.allowed else None,
        names=frozenset(tool.function.name for tool in calls.allowed),
        several_calls=calls.several,
        thoughts=dialect.thoughts,
        inside=dialect.thoughts is not None and dialect.thoughts.inside(prompt, said),
        show_thoughts=request.include_reasoning is not False,
        special=dialect.special,
        hide_special=request.skip_special_tokens is not False,
    )


def constrained(
    service: Service, calls: Calls, outline: Outline | None, wanted: tuple[Constraint, str] | None
) -> tuple[Constraint, str] | None:
    """What the answer must be, and the field that says so: by its calls, by the format `wanted`, behind its thoughts.

    An answer calls tools or has the format; which of the two is the model's choice, if nothing is required.
    """
    found = wanted
    if calls.required or (calls.allowed and wanted is not None):
        demanded = _calls_constraint(service, calls, free=False)
        found = demanded, calls.param
        if not calls.required and wanted is not None:
            found = Either((demanded, wanted[0])), wanted[1]
    elif calls.enforced:
        found = _calls_constraint(service, calls, free=True), calls.param
    if found is None or outline is None or outline.thoughts is None:
        return found
    tags = outline.thoughts
    return Behind(found[0], "" if outline.inside else tags.open, tags.close), found[1]


def _calls_constraint(service: Service, calls: Calls, *, free: bool) -> TaggedJson:
    parser = service.dialect.tools
    frame = parser.frame(service.tokenizer.special_tokens) if parser else None
    if frame is None:
        raise InvalidRequest(
            f"'{calls.param}' cannot be enforced: this model does not write calls as JSON; leave the choice to it, and "
            "ask for no format",
            param=calls.param,
        )
    schemas = []
    left_bytes = service.limits.max_constraint_bytes
    for index, tool in enumerate(calls.tools):
        if tool in calls.allowed:
            schema = _arguments_schema(tool, f"tools[{index}].function.parameters", left_bytes)
            left_bytes -= len(schema.encode("utf-8", "surrogatepass"))
            schemas.append((tool.function.name, schema))
    return frame.constraint(schemas, free=free, several=calls.several)


def _arguments_schema(tool: Tool, where: str, left_bytes: int) -> str:
    """The schema that the arguments are held to: the tool's own, or if that cannot be and need not, any object."""
    schema = tool.function.parameters
    if schema is None:
        schema = NO_PARAMETERS | {"additionalProperties": False}
    text = json.dumps({"type": "object"} | schema, ensure_ascii=False)
    try:
        if schema.get("type", "object") != "object":
            raise Refused("the arguments must be of type object")
        if len(text.encode("utf-8", "surrogatepass")) > left_bytes:
            raise Refused("the schemas of all tools together are larger than max_constraint_bytes of this server")
        enforceable(text)
    except Refused as refused:
        if tool.function.strict:
            raise InvalidRequest(f"'{where}' cannot be enforced: {refused}", param=where) from None
        return ANY_OBJECT.text
    return text
