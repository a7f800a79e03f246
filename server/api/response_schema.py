"""The wire formats of /v1/responses: what a request may say, item by item, and what an answer looks like.

Everything that a chat request may say of sampling, urgency and the cache may be said here too, under the same names.
Nothing is stored: whatever refers to an earlier answer is refused, with the advice to send the whole conversation.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    AliasChoices,
    BeforeValidator,
    Discriminator,
    Field,
    JsonValue,
    PlainValidator,
    Tag,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from server.api.messages import (
    MAX_TOOLS,
    FunctionDefinition,
    FunctionReference,
    ReasoningEffort,
    tool_choice_tag,
)
from server.api.schema import (
    INT31,
    MAX_LOGPROBS,
    MAX_MESSAGES,
    CachedTokensByTier,
    ChatLogprob,
    GenerationRequest,
    NoneOnly,
    ShortText,
    StreamOptions,
    TemplateVariables,
    _Response,
)
from server.api.structured import JsonSchemaFormat, Strict

LOGPROBS = "message.output_text.logprobs"
"""What `include` names to get log-probabilities."""
MAX_PARTS = 1024
ItemStatus = Literal["in_progress", "completed", "incomplete"]
_WHOLE = "nothing is stored here; send the whole conversation as input"


def _stateless(value: Any) -> None:
    if value is not None:
        raise PydanticCustomError("stateless", f"must be absent or null: {_WHOLE}")


def _foreground(value: bool) -> bool:
    if value:
        raise PydanticCustomError("stateless", f"must be false: {_WHOLE}, and wait or stream")
    return value


Stateless = Annotated[
    None,
    PlainValidator(_stateless),
    WithJsonSchema({"type": "null"}),
    Field(description="Not supported: nothing is stored; send the whole conversation."),
]


def _known_item(value: Any) -> Any:
    if value == "item_reference":
        raise PydanticCustomError("stateless", f"must not be 'item_reference': {_WHOLE}")
    if value not in (None, *_ITEM_TAGS):
        raise PydanticCustomError("item", f"must be one of {', '.join(map(repr, _ITEM_TAGS))}")
    return value


class InputPart(Strict):
    """A piece of a message: of the client's (input_text), or of an earlier answer (output_text, refusal)."""

    type: Literal["input_text", "output_text", "refusal"]
    text: str | None = None
    refusal: str | None = None
    annotations: list[JsonValue] | None = Field(default=None, description="Accepted as earlier answers hold them.")
    logprobs: list[JsonValue] | None = Field(default=None, description="Accepted as earlier answers hold them.")
    prompt_cache_breakpoint: NoneOnly = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        field = "refusal" if self.type == "refusal" else "text"
        if getattr(self, field) is None:
            raise PydanticCustomError("part", f"must have '{field}'")
        return self

    @property
    def said(self) -> str:
        return self.text or self.refusal or ""


def _content_tag(value: Any) -> str:
    return "~text" if isinstance(value, str) else "~parts"


class InputMessage(Strict):
    """One turn, as a client writes it or as the output of an earlier answer holds it."""

    type: Annotated[Literal["message"] | None, BeforeValidator(_known_item)] = None
    role: Literal["user", "assistant", "system", "developer"]
    content: Annotated[
        Annotated[str, Tag("~text")]
        | Annotated[list[InputPart], Field(min_length=1, max_length=MAX_PARTS), Tag("~parts")],
        Discriminator(_content_tag),
    ]
    id: ShortText | None = None
    status: ItemStatus | None = None
    phase: Literal["commentary", "final_answer"] | None = None

    @property
    def said(self) -> str:
        return self.content if isinstance(self.content, str) else "\n".join(part.said for part in self.content)


class InputCall(Strict):
    """A call that an earlier answer made."""

    type: Literal["function_call"]
    call_id: ShortText
    name: ShortText
    arguments: str = Field(description="JSON, as the model wrote it.")
    id: ShortText | None = None
    status: ItemStatus | None = None
    namespace: NoneOnly = None
    caller: NoneOnly = None
    async_: NoneOnly = Field(default=None, validation_alias=AliasChoices("async", "async_"))


class ResultPart(Strict):
    type: Literal["input_text"] = Field(description="Only text.")
    text: str
    prompt_cache_breakpoint: NoneOnly = None


class InputResult(Strict):
    """What came of a call."""

    type: Literal["function_call_output"]
    call_id: ShortText = Field(description="Of a function_call in front of it.")
    output: Annotated[
        Annotated[str, Tag("~text")] | Annotated[list[ResultPart], Field(max_length=MAX_PARTS), Tag("~parts")],
        Discriminator(_content_tag),
    ]
    id: ShortText | None = None
    name: ShortText | None = None
    status: ItemStatus | None = None
    namespace: NoneOnly = None
    caller: NoneOnly = None

    @property
    def said(self) -> str:
        return self.output if isinstance(self.output, str) else "\n".join(part.text for part in self.output)


class SummaryPart(Strict):
    type: Literal["summary_text"]
    text: str


class ReasoningPart(Strict):
    type: Literal["reasoning_text"]
    text: str


class InputReasoning(Strict):
    """Thoughts of an earlier answer, for chat templates that want them back: the content, else the summary."""

    type: Literal["reasoning"]
    id: ShortText | None = None
    summary: list[SummaryPart] | None = Field(default=None, max_length=MAX_PARTS)
    content: list[ReasoningPart] | None = Field(default=None, max_length=MAX_PARTS)
    encrypted_content: NoneOnly = None
    status: ItemStatus | None = None

    @property
    def said(self) -> str:
        return "\n".join(part.text for part in self.content or self.summary or ())


_ITEM_TAGS = {
    "message": "~message",
    "function_call": "~call",
    "function_call_output": "~result",
    "reasoning": "~reasoning",
}


def _item_tag(value: Any) -> str:
    """What is no item that there is counts as a message, which says so by its type."""
    kind = value.get("type") if isinstance(value, dict) else None
    return _ITEM_TAGS.get(kind, "~message") if isinstance(kind, str) else "~message"


Item = InputMessage | InputCall | InputResult | InputReasoning
InputItem = Annotated[
    Annotated[InputMessage, Tag("~message")]
    | Annotated[InputCall, Tag("~call")]
    | Annotated[InputResult, Tag("~result")]
    | Annotated[InputReasoning, Tag("~reasoning")],
    Discriminator(_item_tag),
]


class FunctionKind(Strict):
    type: Literal["function"] = Field(description="Only functions; this server runs no tools of its own.")


# The kind comes first in both of these, so that tools of another kind are refused by their type.
class FunctionTool(FunctionDefinition, FunctionKind):
    """A chat's tool, one level up."""

    allowed_callers: Annotated[list[Literal["direct"]], Field(max_length=1)] | None = None
    async_: Literal[False] | None = Field(default=None, validation_alias=AliasChoices("async", "async_"))
    defer_loading: Literal[False] | None = None
    output_schema: NoneOnly = None


class FunctionChoice(FunctionReference, FunctionKind):
    """Names one of the tools."""


class AllowedFunctions(Strict):
    """Only these of the tools may be called; the prompt, and so the cache, still knows all."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[FunctionChoice] = Field(min_length=1, max_length=MAX_TOOLS)


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("~mode")]
    | Annotated[FunctionChoice, Tag("~named")]
    | Annotated[AllowedFunctions, Tag("~allowed")],
    Discriminator(tool_choice_tag),
]


class PlainFormat(Strict):
    type: Literal["text", "json_object"]


class SchemaFormat(JsonSchemaFormat):
    """A chat's `json_schema`, one level up."""

    type: Literal["json_schema"]


TextFormat = Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")]


class TextConfig(Strict):
    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = Field(default=None, description="Only medium.")


class Reasoning(Strict):
    """Thoughts are shown as they are; of how to show or keep them otherwise, only what asks for nothing is taken."""

    effort: ReasoningEffort | None = Field(default=None, description="A chat's reasoning_effort.")
    summary: Literal["auto"] | None = None
    generate_summary: Literal["auto"] | None = None
    context: Literal["auto"] | None = None
    mode: Literal["standard"] | None = None


class ResponseStreamOptions(StreamOptions):
    include_usage: NoneOnly = None
    continuous_usage_stats: NoneOnly = None


Includable = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]


class ResponseRequest(GenerationRequest):
    """Body of POST /v1/responses."""

    input: Annotated[
        Annotated[str, Tag("~text")]
        | Annotated[list[InputItem], Field(min_length=1, max_length=MAX_MESSAGES), Tag("~parts")],
        Discriminator(_content_tag),
    ] = Field(description="Text, or the whole conversation as items: messages, calls and their outputs, reasoning.")
    instructions: str | None = Field(default=None, description="A system message in front of the input.")
    max_output_tokens: int | None = Field(default=None, ge=1, le=INT31, description="Most tokens to generate.")
    include: list[Includable] | None = Field(
        default=None, max_length=16, description=f"`{LOGPROBS}` shows them; the others concern items that never occur."
    )
    top_logprobs: int | None = Field(
        default=None, ge=0, le=MAX_LOGPROBS, description=f"Alternatives per token; needs include: [`{LOGPROBS}`]."
    )
    text: TextConfig | None = Field(default=None, description="Only plain text of medium verbosity.")
    truncation: Literal["auto", "disabled"] | None = Field(
        default=None, description="auto: where the input is too long, its oldest turns are left out."
    )
    reasoning: Reasoning | None = Field(
        default=None, description="effort: as a chat's reasoning_effort; of the others only what changes nothing."
    )
    include_reasoning: bool | None = Field(
        default=None, description="false: the model's thoughts are counted but not sent."
    )
    chat_template_kwargs: TemplateVariables | None = Field(
        default=None, description="Variables for the model's chat template, e.g. enable_thinking."
    )
    store: bool | None = Field(default=None, description="Accepted; nothing is ever stored.")
    metadata: Annotated[dict[str, str], Field(max_length=64)] | None = Field(
        default=None, description="Accepted; the answer repeats it."
    )
    safety_identifier: ShortText | None = Field(default=None, description="Accepted; the answer repeats it.")
    tools: list[FunctionTool] | None = Field(
        default=None, max_length=MAX_TOOLS, description="Functions that the model may call; strict: only if true."
    )
    tool_choice: ToolChoice | None = Field(
        default=None, description="none, auto (the default), required, one function by name, or allowed_tools."
    )
    parallel_tool_calls: bool | None = Field(default=None, description="false: at most one call per answer.")
    max_tool_calls: int | None = Field(
        default=None, ge=1, le=INT31, description="Accepted; it limits built-in tools, of which there are none."
    )
    background: Annotated[bool, AfterValidator(_foreground)] | None = Field(
        default=None, description="Only false: nothing is stored, so there would be nothing to fetch."
    )
    previous_response_id: Stateless = None
    conversation: Stateless = None
    prompt: Stateless = None
    context_management: NoneOnly = None
    access_programs: NoneOnly = None
    background_options: NoneOnly = None
    image: NoneOnly = None
    moderation: NoneOnly = None
    prompt_cache_options: NoneOnly = None
    stream_options: ResponseStreamOptions | None = None
    # Of chats and completions only.
    n: NoneOnly = None
    response_format: NoneOnly = None
    max_tokens: NoneOnly = None
    prompt_logprobs: NoneOnly = None
    return_token_ids: NoneOnly = None
    return_tokens_as_token_ids: NoneOnly = None

    @property
    def shows_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())


class OutputText(_Response):
    type: Literal["output_text"]
    text: str
    annotations: list[JsonValue]
    logprobs: list[ChatLogprob]


class OutputMessage(_Response):
    id: str
    type: Literal["message"]
    status: ItemStatus
    role: Literal["assistant"]
    content: list[OutputText]


class OutputThought(_Response):
    type: Literal["reasoning_text"]
    text: str


class OutputReasoning(_Response):
    id: str
    type: Literal["reasoning"]
    status: ItemStatus
    summary: Annotated[list[JsonValue], Field(max_length=0)]
    content: list[OutputThought]


class OutputCall(_Response):
    id: str
    type: Literal["function_call"]
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


class InputTokensDetails(_Response):
    cached_tokens: int
    cached_tokens_by_tier: CachedTokensByTier
    cache_write_tokens: int


class OutputTokensDetails(_Response):
    reasoning_tokens: int


class ResponseUsage(_Response):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseFault(_Response):
    code: str
    message: str


class IncompleteDetails(_Response):
    reason: Literal["max_output_tokens"]


class ReasoningUsed(_Response):
    effort: ReasoningEffort | None
    summary: None


class ResponseObject(_Response):
    """The answer of POST /v1/responses, and what its stream's first and last events carry."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: Literal[False]
    error: ResponseFault | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputMessage | OutputReasoning | OutputCall]
    parallel_tool_calls: bool
    previous_response_id: None
    prompt_cache_key: str | None
    prompt_cache_retention: str | None
    reasoning: ReasoningUsed
    safety_identifier: str | None
    service_tier: Literal["default", "flex"]
    store: Literal[False]
    temperature: float
    text: dict[str, JsonValue]
    tool_choice: ToolChoice
    tools: list[FunctionTool]
    top_logprobs: int
    top_p: float
    truncation: Literal["auto", "disabled"]
    usage: ResponseUsage | None
    user: str | None


class InputTokens(_Response):
    object: Literal["response.input_tokens"]
    input_tokens: int
