"""What clients may send and what they get back: the wire formats of every route, as strict pydantic models.

This module knows shapes, static bounds and words for what is wrong; it knows neither the vocabulary nor the configured
limits (`requests.py` checks those). Strict on purpose: an unknown field, a string for a number, NaN or Infinity is a
400 that names the field, because a parameter that is silently ignored is an answer the client did not ask for. Known
OpenAI fields that this daemon does not implement are declared with the only values that change nothing (null, or the
default).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

from server.api.messages import MAX_NAME_CHARS, MAX_TOOLS, Conversation, Message, NoneOnly, ShortText, Tool
from server.api.parsing import parse as parse
from server.api.structured import Strict, StructuredRequest

MAX_CHOICES = 128
"""Static ceiling of `n` and `best_of`; the configured limit is usually lower."""
MAX_STOPS = 128
MAX_STOP_CHARS = 1024
"""A stop string is searched for at every delivery and holds back that much text: it must stay short."""
MAX_STOP_TOKENS = 128
MAX_ALLOWED_TOKENS = 1024
MAX_BAD_WORDS = 128
MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 1024
MAX_MESSAGES = 4096
MAX_PROMPTS = 4096
MAX_PIN_S = 30 * 86_400
"""Longest pin: a month."""
MAX_TARGET_MS = 86_400_000.0
INT31 = 2**31 - 1
INT63 = 2**63 - 1


class _Response(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


def _one_or_many_strings(value: Any) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise PydanticCustomError("stop", "must be a string or a list of strings")
    if len(items) > MAX_STOPS:
        raise PydanticCustomError("stop", f"must hold at most {MAX_STOPS} strings, got {len(items)}")
    for item in items:
        if not 0 < len(item) <= MAX_STOP_CHARS:
            raise PydanticCustomError(
                "stop", f"each string must have 1 to {MAX_STOP_CHARS} characters, got {len(item)}"
            )
    return tuple(dict.fromkeys(items))


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _prompts(value: Any) -> tuple[str | list[int], ...]:
    """One entry per prompt, text or token ids. A flat list of integers is one prompt, not many."""
    if isinstance(value, str):
        items: list[Any] = [value]
    elif isinstance(value, list):
        items = [value] if value and _is_ids(value) else value
    else:
        raise PydanticCustomError("prompt", "must be a string, a list of strings, token ids or lists of token ids")
    if not items:
        raise PydanticCustomError("prompt", "must not be empty")
    if len(items) > MAX_PROMPTS:
        raise PydanticCustomError("prompt", f"must hold at most {MAX_PROMPTS} prompts, got {len(items)}")
    if not (all(isinstance(item, str) for item in items) or all(_is_ids(item) for item in items)):
        raise PydanticCustomError("prompt", "must be a string, a list of strings, token ids or lists of token ids")
    return tuple(items)


def _biases(value: Any) -> dict[int, float]:
    if not isinstance(value, dict):
        raise PydanticCustomError("logit_bias", "must be an object that maps token ids to biases")
    if len(value) > MAX_LOGIT_BIAS:
        raise PydanticCustomError("logit_bias", f"must hold at most {MAX_LOGIT_BIAS} tokens, got {len(value)}")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if not (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 10):
            raise PydanticCustomError("logit_bias", "keys must be token ids in decimal digits")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise PydanticCustomError("logit_bias", f"the bias of token {key} must be a number from -100 to 100")
        biases[int(key)] = float(bias)
    return biases


def _scalar(value: Any) -> Any:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | float) and -1e18 <= value <= 1e18:
        return value
    raise PydanticCustomError("scalar", "must be a string, a boolean, null or a number of ordinary size")


_TOKEN = {"type": "integer", "minimum": 0, "maximum": INT31}
_IDS = {"type": "array", "items": _TOKEN, "minItems": 1}
Prompts = Annotated[
    tuple[str | list[int], ...],
    PlainValidator(_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1, "maxItems": MAX_PROMPTS},
                _IDS,
                {"type": "array", "items": _IDS, "minItems": 1, "maxItems": MAX_PROMPTS},
            ]
        }
    ),
]
_STOP_STRING = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
Stops = Annotated[
    tuple[str, ...],
    PlainValidator(_one_or_many_strings),
    WithJsonSchema({"anyOf": [_STOP_STRING, {"type": "array", "items": _STOP_STRING, "maxItems": MAX_STOPS}]}),
]
LogitBias = Annotated[
    dict[int, float],
    PlainValidator(_biases),
    WithJsonSchema(
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,10}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "maxProperties": MAX_LOGIT_BIAS,
        }
    ),
]
TokenId = Annotated[int, Field(ge=0, le=INT31)]
Scalar = Annotated[
    Any,
    PlainValidator(_scalar),
    WithJsonSchema({"type": ["string", "boolean", "number", "null"], "minimum": -1e18, "maximum": 1e18}),
]
TemplateVariables = Annotated[
    dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")], Scalar], Field(max_length=32)
]
Metadata = Annotated[dict[str, str], Field(max_length=64)]


REQUEST_ID_PATTERN = r"^[A-Za-z0-9._:/+=-]{1,128}$"
UsageIn = Literal["none", "last", "all"]


class StreamOptions(Strict):
    include_usage: bool | None = Field(default=None, description="Send one last chunk that carries the usage.")
    continuous_usage_stats: bool | None = Field(
        default=None, description="With include_usage: every chunk carries the usage so far."
    )
    include_obfuscation: bool | None = Field(default=None, description="Accepted; no padding is ever sent.")


class GenerationRequest(StructuredRequest):
    """What /v1/completions and /v1/chat/completions have in common. Null means absent, everywhere."""

    model: ShortText | None = Field(default=None, description="A name from /v1/models; absent: the model served.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES, description="Choices per prompt.")
    max_tokens: int | None = Field(default=None, ge=0, le=INT31, description="Most tokens to generate per choice.")
    min_tokens: int | None = Field(default=None, ge=0, le=INT31, description="No stop before that many tokens.")
    temperature: float | None = Field(default=None, ge=0, le=10, description="0: always the likeliest token.")
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, le=INT31, description="0 or -1: off.")
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: LogitBias | None = None
    prompt_logprobs: int | None = Field(
        default=None, ge=0, le=MAX_LOGPROBS, description="Alternatives per prompt token; not with stream."
    )
    stop: Stops | None = Field(default=None, description="Text that ends a choice; may straddle tokens.")
    stop_token_ids: list[TokenId] | None = Field(default=None, max_length=MAX_STOP_TOKENS)
    include_stop_str_in_output: bool | None = Field(default=None, description="Keep the text that ended the choice.")
    ignore_eos: bool | None = Field(default=None, description="Go on after the model's end-of-sequence tokens.")
    skip_special_tokens: bool | None = Field(
        default=None, description="Leave special tokens out of the text; default true."
    )
    seed: int | None = Field(default=None, ge=-INT63 - 1, le=INT63, description="Same seed, same output.")
    allowed_token_ids: list[TokenId] | None = Field(
        default=None, min_length=1, max_length=MAX_ALLOWED_TOKENS, description="Nothing else is generated."
    )
    bad_words: list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]] | None = Field(
        default=None,
        max_length=MAX_BAD_WORDS,
        description="Not generated, as the tokenizer writes them: alone or after a space.",
    )
    add_special_tokens: bool | None = Field(
        default=None, description="Let the tokenizer add its own, e.g. BOS; default: true for a prompt, not for a chat."
    )
    truncate_prompt_tokens: int | None = Field(
        default=None, ge=-1, le=INT31, description="Keep the prompt's last so many tokens; -1: as many as fit."
    )
    return_token_ids: bool | None = Field(
        default=None, description="Answer with `token_ids` and `prompt_token_ids` too; the latter in the first chunk."
    )
    return_tokens_as_token_ids: bool | None = Field(
        default=None, description="Log-probabilities name tokens `token_id:NUMBER`."
    )
    request_id: str | None = Field(
        default=None, pattern=REQUEST_ID_PATTERN, description="X-Request-Id of the answer, where no header gives one."
    )
    spaces_between_special_tokens: Literal[True] | None = Field(default=None, description="Only true.")
    use_beam_search: Literal[False] | None = Field(default=None, description="Only false: there is no beam search.")
    length_penalty: float | None = Field(default=None, ge=1, le=1, description="Only 1: there is no beam search.")
    stream_interval: Literal[1] | None = Field(default=None, description="Only 1: chunks go out as tokens come.")
    priority: int | None = Field(
        default=None, ge=-1000, le=1000, description="Lower runs sooner, where the scheduling policy is `priority`."
    )
    service_tier: Literal["auto", "default", "flex", "priority", "fast"] | None = Field(
        default=None, description="flex: in the background, on what other requests leave idle; all others are alike."
    )
    ttft_target_ms: float | None = Field(
        default=None, gt=0, le=MAX_TARGET_MS, description="Wanted time to the first token, in milliseconds."
    )
    tpot_target_ms: float | None = Field(
        default=None, gt=0, le=MAX_TARGET_MS, description="Wanted time per token after the first, in milliseconds."
    )
    cache_salt: Annotated[str, Field(max_length=MAX_NAME_CHARS)] | None = Field(
        default=None, description="Requests share cached prefixes only with requests of the same salt and API key."
    )
    prompt_cache_key: ShortText | None = Field(
        default=None, description="Names a session that goes on: its blocks are kept as if they had been used twice."
    )
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = Field(
        default=None,
        description="in_memory: never written to SSD; 24h: kept for a day in the lowest tier, as far as pins may.",
    )
    user: ShortText | None = Field(default=None, description="Accepted; has no effect.")

    @property
    def usage_in(self) -> UsageIn:
        """Which chunks of a stream carry the usage."""
        options = self.stream_options
        if options is None or not options.include_usage:
            return "none"
        return "all" if options.continuous_usage_stats else "last"


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions."""

    prompt: Prompts
    echo: bool | None = Field(default=None, description="Put the prompt in front of the text.")
    best_of: int | None = Field(
        default=None, ge=1, le=MAX_CHOICES, description="Generate that many, answer the n likeliest; not with stream."
    )
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS, description="Alternatives per token.")
    suffix: NoneOnly = None


class ChatRequest(Conversation, GenerationRequest):
    """Body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=INT31, description="The newer name of max_tokens.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS, description="Needs logprobs: true.")
    chat_template_kwargs: TemplateVariables | None = Field(
        default=None, description="Variables for the model's chat template, e.g. enable_thinking."
    )
    # Known to OpenAI clients; these values change nothing.
    store: bool | None = Field(default=None, description="Accepted; nothing is ever stored.")
    metadata: Metadata | None = Field(default=None, description="Accepted; has no effect.")
    safety_identifier: ShortText | None = Field(default=None, description="Accepted; has no effect.")
    modalities: list[Literal["text"]] | None = Field(
        default=None, min_length=1, max_length=1, description='Only ["text"].'
    )
    verbosity: Literal["medium"] | None = Field(default=None, description="Only medium.")
    audio: NoneOnly = None
    prediction: NoneOnly = None
    web_search_options: NoneOnly = None
    moderation: NoneOnly = None
    prompt_cache_options: NoneOnly = None


class TokenizeRequest(Strict):
    """Body of POST /tokenize: either a prompt or messages."""

    model: ShortText | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(default=None, min_length=1, max_length=MAX_MESSAGES)
    add_special_tokens: bool | None = Field(default=None, description="Default: true for a prompt, false for messages.")
    add_generation_prompt: bool | None = Field(default=None, description="With messages; default true.")
    continue_final_message: bool | None = Field(default=None, description="With messages; as in a chat.")
    chat_template_kwargs: TemplateVariables | None = None
    tools: list[Tool] | None = Field(default=None, max_length=MAX_TOOLS, description="With messages; as in a chat.")
    return_token_strs: bool | None = None


class DetokenizeRequest(Strict):
    """Body of POST /detokenize."""

    model: ShortText | None = None
    tokens: list[TokenId]


class CacheRequest(Strict):
    """Body of the /v1/cache routes: which chain of blocks is meant, given as a request would give it."""

    model: ShortText | None = None
    prompt: str | list[TokenId] | None = None
    messages: list[Message] | None = Field(default=None, min_length=1, max_length=MAX_MESSAGES)
    tools: list[Tool] | None = Field(default=None, max_length=MAX_TOOLS, description="With messages; as in a chat.")
    cache_salt: ShortText | None = None
    api_key: ShortText | None = Field(default=None, description="The tenant whose blocks are meant, by its API key.")
    tenant: ShortText | None = Field(default=None, description="The same, by its name in the tenants file.")


class CachePinRequest(CacheRequest):
    """Body of POST /v1/cache/pin."""

    ttl_s: float = Field(gt=0, le=MAX_PIN_S, description="For how long, in seconds.")


class CacheSpan(_Response):
    tier: str | None
    tokens: int
    decision: Literal["use", "load", "split", "compute"]
    reason: str
    load_s: float
    compute_s: float


class CacheLookup(_Response):
    """What a request with this prompt would find now, from its beginning on."""

    prompt_tokens: int
    cached_tokens: int
    spans: list[CacheSpan]


class CacheCount(_Response):
    blocks: int
    tokens: int


class CacheHop(_Response):
    source: str
    target: str
    moved_bytes: int
    bytes_per_s: float
    in_flight_blocks: int
    waiting_blocks: int
    failed: dict[str, int]


class CacheTier(_Response):
    name: str
    up: bool
    capacity_bytes: int
    used_bytes: int
    evicted_blocks: dict[str, int]
    declined_blocks: dict[str, int]


class CacheStats(_Response):
    """The whole cache at one moment."""

    block_bytes: int
    block_tokens: int
    tiers: list[CacheTier]
    hops: list[CacheHop]
    recovered_blocks: int
    pinned_blocks: int


class KvDecision(_Response):
    """What was to become of blocks that lay below the device when a request was admitted, and by what estimates."""

    tier: str
    tokens: int
    decision: Literal["use", "load", "compute"]
    reason: str
    load_s: float
    compute_s: float


class Explained(_Response):
    """Why one sequence went as it did."""

    request_id: str
    sequence: int
    tenant: str
    arrived_at: float
    finish_reason: str
    background: bool
    preemptions: int
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_by_source: dict[str, int]
    cached_but_computed_tokens: dict[str, int]
    decisions: list[KvDecision]
    phases_s: dict[str, float]
    ttft_s: float | None
    predicted_ttft_s: float
    total_s: float
    first_block: str
    last_block: str


class Explanations(_Response):
    requests: list[Explained]


class ErrorDetail(_Response):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(_Response):
    """The body of every answer that is not a success."""

    error: ErrorDetail


class CachedTokensByTier(_Response):
    device: int
    dram: int
    ssd: int


class PromptTokensDetails(_Response):
    cached_tokens: int
    cached_tokens_by_tier: CachedTokensByTier


class CompletionTokensDetails(_Response):
    reasoning_tokens: int


class Usage(_Response):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | None = Field(
        default=None, description="Of chats with a model whose thoughts are told apart."
    )


class PromptLogprob(_Response):
    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class CompletionLogprobs(_Response):
    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(_Response):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None
    prompt_logprobs: PromptLogprobs | None
    prompt_token_ids: list[int] = Field(default=[], description="With return_token_ids.")
    token_ids: list[int] = Field(default=[], description="With return_token_ids.")


class CompletionResponse(_Response):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class TopLogprob(_Response):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(_Response):
    content: list[ChatLogprob]
    refusal: None


class FunctionCall(_Response):
    name: str
    arguments: str


class ToolCall(_Response):
    id: str
    type: Literal["function"]
    function: FunctionCall


class ChatMessage(_Response):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] | None = Field(default=None, description="Absent where there are none.")
    reasoning_content: str | None = Field(
        default=None, description="The model's thoughts; absent where there are none."
    )
    reasoning: str | None = Field(default=None, description="The same: clients know it by either name.")


class ChatChoice(_Response):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: str | int | None
    prompt_logprobs: PromptLogprobs | None
    token_ids: list[int] = Field(default=[], description="With return_token_ids.")


class ChatResponse(_Response):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] = Field(default=[], description="With return_token_ids.")


class ModelCard(_Response):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(_Response):
    object: Literal["list"]
    data: list[ModelCard]


class TokenizeResponse(_Response):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeResponse(_Response):
    prompt: str


class StatusResponse(_Response):
    status: str


class NotReadyResponse(ErrorResponse):
    """Why no requests are taken: how far the start is, or what a drain still waits for."""

    status: str
    progress: dict[str, str | float | None]


class VersionResponse(_Response):
    version: str
