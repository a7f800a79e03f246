"""The conversation's side of requests: messages, calls, tools and the choice among them, as strict pydantic models.

Shapes and static bounds only; what depends on the model is checked in `chat.py`.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, JsonValue, PlainValidator, Tag, WithJsonSchema
from pydantic_core import PydanticCustomError

from server.api.structured import Strict

MAX_NAME_CHARS = 256
MAX_TOOLS = 128
MAX_TOOL_CALLS = 128
"""In one message of the conversation."""
MAX_DESCRIPTION_CHARS = 32_768
MAX_TOOL_SCHEMA_BYTES = 65_536
MAX_TOOL_SCHEMA_DEPTH = 32
MAX_DOCUMENTS = 256


def _json_object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise PydanticCustomError("json_object", "must be a JSON object")
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise PydanticCustomError("json_object", "must hold no number that JSON lacks or that is endless") from None
    # In this order: a body is 8 MiB, and only a small object may be looked at one value after the other.
    if len(text.encode("utf-8", "surrogatepass")) > MAX_TOOL_SCHEMA_BYTES:
        raise PydanticCustomError("json_object", f"must have at most {MAX_TOOL_SCHEMA_BYTES} bytes")
    level: list[Any] = [value]
    for _ in range(MAX_TOOL_SCHEMA_DEPTH):
        inner = (item.values() if isinstance(item, dict) else item for item in level)
        level = [item for items in inner for item in items if isinstance(item, dict | list)]
    if level:
        raise PydanticCustomError("json_object", f"must be nested at most {MAX_TOOL_SCHEMA_DEPTH} deep")
    return value


def replaced(newer: str, *neutral: Any) -> PlainValidator:
    """For a field that clients used to send: only values that ask for nothing."""

    def check(value: Any) -> Any:
        if value not in neutral:
            raise PydanticCustomError("replaced", f"must be sent as '{newer}', which replaces it")
        return None

    return PlainValidator(check)


NoneOnly = Annotated[None, Field(description="Not supported: must be null or absent.")]
NoneOrEmpty = Annotated[
    list[JsonValue], Field(max_length=0, description="Not supported: must be null, absent or empty.")
]
ShortText = Annotated[str, Field(max_length=MAX_NAME_CHARS)]
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
JsonObject = Annotated[dict[str, Any], PlainValidator(_json_object), WithJsonSchema({"type": "object"})]


class TextPart(Strict):
    type: Literal["text"]
    text: str


def _content_tag(value: Any) -> str:
    return "~text" if isinstance(value, str) else "~parts"


Content = Annotated[
    Annotated[str, Tag("~text")] | Annotated[list[TextPart], Field(min_length=1, max_length=1024), Tag("~parts")],
    Discriminator(_content_tag),
]


class CalledFunction(Strict):
    name: ShortText
    arguments: str = Field(description="JSON, as the model wrote it.")


class MessageToolCall(Strict):
    """A call that the assistant made in an earlier answer."""

    id: ShortText
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = Field(default=None, description="Accepted; the order of the list counts.")


class Message(Strict):
    """One turn. What an earlier answer carried may be sent back as it was."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = Field(default=None, description="Required, but of an assistant that called tools.")
    name: ShortText | None = None
    tool_calls: list[MessageToolCall] | None = Field(
        default=None, max_length=MAX_TOOL_CALLS, description="The assistant's."
    )
    tool_call_id: ShortText | None = Field(default=None, description="Which call a message of role `tool` answers.")
    reasoning_content: str | None = Field(
        default=None, description="The assistant's thoughts, for chat templates that want them back."
    )
    reasoning: str | None = Field(default=None, description="Another name of reasoning_content.")
    refusal: NoneOnly = None
    annotations: NoneOrEmpty | None = None
    audio: NoneOnly = None
    function_call: Annotated[None, replaced("tool_calls", None)] = Field(
        default=None, description="Must be null or absent; tool_calls replace it."
    )

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content or ())


class FunctionDefinition(Strict):
    name: FunctionName
    description: Annotated[str, Field(max_length=MAX_DESCRIPTION_CHARS)] | None = None
    parameters: JsonObject | None = Field(default=None, description="JSON Schema of the arguments; absent: none.")
    strict: bool | None = Field(default=None, description="Hold the arguments to the schema, to the letter.")


class Tool(Strict):
    type: Literal["function"] = Field(description="Only functions; custom tools are not supported.")
    function: FunctionDefinition


class FunctionReference(Strict):
    name: FunctionName


class ToolReference(Strict):
    """Names one of the tools."""

    type: Literal["function"]
    function: FunctionReference


class AllowedToolList(Strict):
    mode: Literal["auto", "required"]
    tools: list[ToolReference] = Field(min_length=1, max_length=MAX_TOOLS)


class AllowedTools(Strict):
    """Only these of the tools may be called; the prompt, and so the cache, still knows all."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedToolList


def tool_choice_tag(value: Any) -> str:
    """Which of the three forms of a choice `value` has."""
    if isinstance(value, dict):
        return "~allowed" if value.get("type") == "allowed_tools" else "~named"
    return "~mode"


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("~mode")]
    | Annotated[ToolReference, Tag("~named")]
    | Annotated[AllowedTools, Tag("~allowed")],
    Discriminator(tool_choice_tag),
]
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class Conversation(Strict):
    """What a chat says beside its messages and its sampling."""

    tools: list[Tool] | None = Field(
        default=None, max_length=MAX_TOOLS, description="Functions that the model may call."
    )
    tool_choice: ToolChoice | None = Field(
        default=None, description="none, auto (the default), required, one function by name, or allowed_tools."
    )
    parallel_tool_calls: bool | None = Field(default=None, description="false: at most one call per answer.")
    reasoning_effort: ReasoningEffort | None = Field(
        default=None, description="Handed to the chat template if it knows it; `none`: no thoughts, likewise."
    )
    include_reasoning: bool | None = Field(
        default=None, description="false: the model's thoughts are counted but not sent."
    )
    add_generation_prompt: bool | None = Field(
        default=None, description="Begin the assistant's turn; default true, but false with continue_final_message."
    )
    continue_final_message: bool | None = Field(default=None, description="Go on with the last message's text.")
    add_special_tokens: bool | None = Field(
        default=None, description="Let the tokenizer add its own, e.g. a beginning of sequence; templates have theirs."
    )
    documents: list[JsonObject] | None = Field(
        default=None, max_length=MAX_DOCUMENTS, description="For chat templates that take documents."
    )
    functions: Annotated[None, replaced("tools", None, [])] = Field(
        default=None, description="Must be null, absent or empty; tools replace it."
    )
    function_call: Annotated[None, replaced("tool_choice", None, "none", "auto")] = Field(
        default=None, description="Must be null or absent; tool_choice replaces it."
    )
