"""From a validated body to what the engine is asked for: everything that depends on the vocabulary, the model's length
and the configured limits is checked here, once, with a sentence that names the field and the fix.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from server.api.schema import ChatRequest, CompletionRequest, GenerationRequest, Message
from server.api.service import Service
from server.engine import GenerateSpec
from server.errors import InvalidRequest, ModelNotFound, Overloaded
from server.text import RESERVED_TEMPLATE_ARGUMENTS, Tokenizer
from server.types import NO_TARGETS, Retention, SamplingParams, ServiceClass, Targets

DAY_S = 86_400.0
DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default for /v1/completions."""
GREEDY_BELOW = 1e-3
"""Smaller temperatures are greedy: the likeliest token's share differs from 1 by nothing, and logits / T overflow."""
INLINE_CHARS = 4096
"""Texts up to this are encoded on the loop thread: 1 to 3 ms at most, and no wait behind somebody's novel."""
ENCODE_THREADS = 2
MAX_QUEUED_ENCODES = 64
MASK63 = 2**63 - 1


class Encoder:
    """Encodes text without holding up the loop: long texts go to a small pool, and only so many may wait for it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pool = ThreadPoolExecutor(ENCODE_THREADS, thread_name_prefix="tokenizer")
        self._open: set[Future[list[int]]] = set()

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`. Loop thread. Raises Overloaded when too many long texts wait."""
        if len(text) <= INLINE_CHARS:
            return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))
        self._open = {future for future in self._open if not future.done()}
        if len(self._open) >= MAX_QUEUED_ENCODES:
            raise Overloaded("too many long prompts are waiting to be tokenized", retry_after_s=1)
        future = self._pool.submit(lambda: list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens)))
        self._open.add(future)
        return await asyncio.wrap_future(future)


@dataclass(frozen=True, slots=True)
class Prompt:
    ids: Sequence[int]
    text: str
    """As the client wrote it, or decoded from its ids; only filled where it is echoed."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One HTTP request as a table of generations: `specs[prompt][choice]`, and what of each is shown."""

    prompts: Sequence[Prompt]
    specs: Sequence[Sequence[GenerateSpec]]
    keep: int
    """Choices per prompt in the answer; fewer than generated with best_of."""
    logprobs: int | None
    prompt_logprobs: int | None
    echo: bool
    stops: Sequence[str]
    include_stop: bool
    skip_special_tokens: bool
    client_stop_ids: frozenset[int]
    score_only: bool
    """max_tokens was 0: the engine makes one token, which nobody sees."""


def check_model(service: Service, name: str | None) -> None:
    if name is not None and name != service.model_name:
        raise ModelNotFound(
            f"the model {name[:200]!r} does not exist here; this server has {service.model_name!r}", param="model"
        )


async def plan_completion(service: Service, encoder: Encoder, request: CompletionRequest, tenant: str) -> Plan:
    """Raises TerraceError for whatever of `request` cannot be served."""
    _check_common(service, request)
    limit = service.limits.max_prompts_per_request
    if len(request.prompt) > limit:
        raise InvalidRequest(
            f"'prompt': at most {limit} prompts per request, got {len(request.prompt)}", param="prompt"
        )
    keep = request.n or 1
    generate = request.best_of or keep
    _at_most(service.limits.max_choices, generate, "best_of" if request.best_of else "n")
    if generate < keep:
        raise InvalidRequest(f"'best_of' must be at least n = {keep}, got {generate}", param="best_of")
    if request.stream and generate > keep:
        raise InvalidRequest("'best_of' larger than n cannot be streamed; set stream to false", param="best_of")
    if request.logprobs is not None:
        _at_most(service.limits.max_logprobs, request.logprobs, "logprobs")
    if request.max_tokens == 0 and not (request.echo or request.prompt_logprobs is not None):
        raise InvalidRequest("'max_tokens' 0 generates nothing; use at least 1, or set echo", param="max_tokens")
    echo = bool(request.echo)
    prompts = [await _prompt(service, encoder, item, index, echo) for index, item in enumerate(request.prompt)]
    for prompt in prompts:
        _check_fits(service, len(prompt.ids), request.max_tokens or 1, "prompt")
    return _plan(
        service,
        request,
        prompts,
        [_left(service, prompt, request.max_tokens, DEFAULT_COMPLETION_TOKENS) for prompt in prompts],
        tenant,
        keep=keep,
        generate=generate,
        logprobs=request.logprobs,
        echo=echo,
    )


async def plan_chat(service: Service, encoder: Encoder, request: ChatRequest, tenant: str) -> Plan:
    """Raises TerraceError for whatever of `request` cannot be served."""
    _check_common(service, request)
    keep = request.n or 1
    _at_most(service.limits.max_choices, keep, "n")
    max_tokens = _chat_max_tokens(request)
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidRequest("'top_logprobs' needs logprobs: true", param="top_logprobs")
    _at_most(service.limits.max_logprobs, request.top_logprobs or 0, "top_logprobs")
    text = render_chat(service, request.messages, True, request.chat_template_kwargs or {})
    prompt = Prompt(await encoder.encode(text, add_special_tokens=False), "")
    if not prompt.ids:
        raise InvalidRequest("'messages' render to an empty prompt", param="messages")
    _check_fits(service, len(prompt.ids), 1, "messages")
    return _plan(
        service,
        request,
        [prompt],
        [_left(service, prompt, max_tokens, service.max_model_len)],
        tenant,
        keep=keep,
        generate=keep,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        echo=False,
    )


def render_chat(
    service: Service, messages: Sequence[Message], add_generation_prompt: bool, variables: dict[str, Any]
) -> str:
    """The prompt that the model's chat template makes of `messages`. Raises InvalidRequest when it cannot."""
    reserved = RESERVED_TEMPLATE_ARGUMENTS & variables.keys()
    if reserved:
        # Checked here as well: some of these are parameters of render_chat itself.
        raise InvalidRequest(f"'chat_template_kwargs.{min(reserved)}' cannot be set", param="chat_template_kwargs")
    turns = [
        # Templates know three roles; `developer` is what newer clients call the system's voice.
        {"role": "system" if message.role == "developer" else message.role, "content": message.text}
        | ({"name": message.name} if message.name else {})
        for message in messages
    ]
    return service.tokenizer.render_chat(turns, add_generation_prompt=add_generation_prompt, **variables)


def check_ids(service: Service, ids: Sequence[int], param: str) -> None:
    """Raises InvalidRequest naming the first id that is not in the vocabulary."""
    vocab = service.tokenizer.vocab_size
    if not ids or (min(ids) >= 0 and max(ids) < vocab):
        return
    index = next(i for i, token in enumerate(ids) if not 0 <= token < vocab)
    shown = ids[index] if abs(ids[index]) < 10**20 else "a huge number"
    raise InvalidRequest(
        f"'{param}[{index}]' is not a token of this model: {shown} (ids go from 0 to {vocab - 1})", param=param
    )


def _check_common(service: Service, request: GenerationRequest) -> None:
    check_model(service, request.model)
    limits = service.limits
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("'stream_options' needs stream: true", param="stream_options")
    if request.prompt_logprobs is not None:
        _at_most(limits.max_logprobs, request.prompt_logprobs, "prompt_logprobs")
        if request.stream:
            raise InvalidRequest("'prompt_logprobs' cannot be streamed; set stream to false", param="prompt_logprobs")
    if request.stop and len(request.stop) > limits.max_stop_strings:
        raise InvalidRequest(
            f"'stop': at most {limits.max_stop_strings} strings, got {len(request.stop)}", param="stop"
        )
    check_ids(service, sorted(request.logit_bias or ()), "logit_bias")
    check_ids(service, request.stop_token_ids or (), "stop_token_ids")


def _at_most(limit: int, value: int, param: str) -> None:
    if value > limit:
        raise InvalidRequest(f"'{param}' must be at most {limit} on this server, got {value}", param=param)


async def _prompt(service: Service, encoder: Encoder, item: str | list[int], index: int, echo: bool) -> Prompt:
    where = f"prompt[{index}]" if index else "prompt"
    if isinstance(item, str):
        ids = await encoder.encode(item, add_special_tokens=True)
        if not item or not ids:
            raise InvalidRequest(f"'{where}' must not be empty", param="prompt")
        return Prompt(ids, item)
    if not item:
        raise InvalidRequest(f"'{where}' must not be empty", param="prompt")
    check_ids(service, item, where)
    return Prompt(item, service.tokenizer.decode(item, skip_special_tokens=False) if echo else "")


def _check_fits(service: Service, prompt_tokens: int, output_tokens: int, param: str) -> None:
    limit = service.max_model_len
    if prompt_tokens + output_tokens <= limit:
        return
    raise InvalidRequest(
        f"This model's maximum context length is {limit} tokens. However, you requested "
        f"{prompt_tokens + output_tokens} tokens ({prompt_tokens} in the {param}, {output_tokens} for the completion). "
        "Please reduce your prompt or completion length.",
        param=param,
        code="context_length_exceeded",
    )


def _left(service: Service, prompt: Prompt, wanted: int | None, default: int) -> int:
    """Output tokens to ask for: what was wanted, else the default, but never past the model's length."""
    left = service.max_model_len - len(prompt.ids)
    return min(default if wanted is None else max(wanted, 1), left)


def _chat_max_tokens(request: ChatRequest) -> int | None:
    old, new = request.max_tokens, request.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise InvalidRequest(
            "'max_tokens' and 'max_completion_tokens' differ; send only the latter", param="max_tokens"
        )
    if old == 0:
        raise InvalidRequest("'max_tokens' must be at least 1, got 0", param="max_tokens")
    return old if new is None else new


def _plan(
    service: Service,
    request: GenerationRequest,
    prompts: Sequence[Prompt],
    max_tokens: Sequence[int],
    tenant: str,
    *,
    keep: int,
    generate: int,
    logprobs: int | None,
    echo: bool,
) -> Plan:
    shown = request.prompt_logprobs
    asked = max((k for k in (shown, logprobs if echo else None) if k is not None), default=None)
    # best_of ranks by the mean log-probability, so it needs every token's own even where the client sees none.
    internal = 0 if logprobs is None and generate > keep else logprobs
    params = replace(_sampling(service, request), logprobs=internal, prompt_logprobs=asked)
    salt = cache_salt(tenant, request.cache_salt)
    service_class = ServiceClass(
        tenant,
        service.tenants.priority(tenant, request.priority),
        background=request.service_tier == "flex",
        targets=_targets(service, request),
    )
    retention = Retention(
        transient=request.prompt_cache_retention in ("in_memory", "in-memory"),
        session=request.prompt_cache_key is not None,
        keep_s=DAY_S if request.prompt_cache_retention == "24h" else 0.0,
    )
    specs = []
    for prompt, count in zip(prompts, max_tokens, strict=True):
        if params.min_tokens > count:
            raise InvalidRequest(f"'min_tokens' must be at most max_tokens = {count}", param="min_tokens")
        # The same prompt sent twice in one request without a seed must give two different draws.
        first = secrets.randbits(62) if request.seed is None else request.seed
        specs.append(
            [
                GenerateSpec(
                    prompt=prompt.ids,
                    params=replace(
                        params,
                        max_tokens=count,
                        seed=(first + choice) & MASK63,
                        # The prompt's own log-probabilities are the same for every choice: ask once.
                        prompt_logprobs=asked if choice == 0 or echo else None,
                    ),
                    cache_salt=salt,
                    service=service_class,
                    retention=retention,
                )
                for choice in range(generate)
            ]
        )
    return Plan(
        prompts=prompts,
        specs=specs,
        keep=keep,
        logprobs=logprobs,
        prompt_logprobs=shown,
        echo=echo,
        stops=request.stop or (),
        include_stop=bool(request.include_stop_str_in_output),
        skip_special_tokens=request.skip_special_tokens is not False,
        client_stop_ids=frozenset(request.stop_token_ids or ()),
        score_only=request.max_tokens == 0,
    )


def _targets(service: Service, request: GenerationRequest) -> Targets:
    """What the request wants, else what is wanted for all; who is in the background wants only what it says."""
    defaults = NO_TARGETS if request.service_tier == "flex" else service.default_targets
    ttft_ms, tpot_ms = request.ttft_target_ms, request.tpot_target_ms
    return Targets(
        defaults.ttft_s if ttft_ms is None else ttft_ms / 1e3,
        defaults.tpot_s if tpot_ms is None else tpot_ms / 1e3,
    )


def cache_salt(tenant: str, wanted: str | None) -> str:
    """What separates cached prefixes: the API key's own name first, so that no client can choose another's."""
    return f"{tenant}\x1f{wanted or ''}" if tenant else wanted or ""


def _sampling(service: Service, request: GenerationRequest) -> SamplingParams:
    """Sampling without length and seed: what the client said, else the model's own defaults, else neutral."""
    defaults = service.tokenizer.generation_defaults

    def value(name: str, neutral: float) -> float:
        given = getattr(request, name)
        if given is None:
            given = defaults.get(name)
        return neutral if given is None else given

    temperature, top_p, top_k = value("temperature", 1.0), value("top_p", 1.0), int(value("top_k", 0))
    if top_p == 0:
        # An empty nucleus still holds the likeliest token.
        top_p, top_k = 1.0, 1
    stops = frozenset(request.stop_token_ids or ())
    return SamplingParams(
        max_tokens=1,
        temperature=0.0 if temperature < GREEDY_BELOW else temperature,
        top_p=top_p,
        top_k=max(0, min(top_k, service.tokenizer.vocab_size)),
        min_p=value("min_p", 0.0),
        repetition_penalty=value("repetition_penalty", 1.0),
        presence_penalty=value("presence_penalty", 0.0),
        frequency_penalty=value("frequency_penalty", 0.0),
        logit_bias=request.logit_bias or {},
        min_tokens=request.min_tokens or 0,
        stop_token_ids=stops if request.ignore_eos else stops | frozenset(service.tokenizer.eos_token_ids),
    )
