"""From a validated body to what the engine is asked for: everything that depends on the vocabulary, the model's length
and the configured limits is checked here, once, with a sentence that names the field and the fix.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

from server.api.chat import calls_of, constrained, outline_of, render_chat, template_variables
from server.api.dialects.answer import Outline
from server.api.embedding_schema import EmbeddingRequest
from server.api.schema import ChatRequest, CompletionRequest, GenerationRequest
from server.api.service import Service
from server.engine import GenerateSpec
from server.errors import InvalidRequest, ModelNotFound, Overloaded
from server.text import Tokenizer
from server.types import NO_TARGETS, Constraint, Grammar, Retention, SamplingParams, ServiceClass, Targets

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
    token_ids: bool = False
    tokens_as_ids: bool = False
    """Log-probabilities name a token by its number."""
    outline: Outline | None = None
    """What the answers' texts are made of, where they are more than text."""


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
    special = request.add_special_tokens is not False
    prompts = [await _prompt(service, encoder, item, index, echo, special) for index, item in enumerate(request.prompt)]
    keep_tokens, room = request.truncate_prompt_tokens, request.max_tokens or 1
    prompts = [_last_tokens(service, prompt, keep_tokens, room) for prompt in prompts]
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
        grammar=await _compiled(service, request.constraint(service.limits.max_constraint_bytes), tenant),
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
    calls = calls_of(service, request)
    text = render_chat(
        service,
        request.messages,
        request.add_generation_prompt,
        template_variables(service, request),
        continue_final_message=request.continue_final_message,
        tools=calls.tools,
        documents=request.documents,
    )
    prompt = Prompt(await encoder.encode(text, add_special_tokens=bool(request.add_special_tokens)), "")
    prompt = _last_tokens(service, prompt, request.truncate_prompt_tokens, max_tokens or 1)
    if not prompt.ids:
        raise InvalidRequest("'messages' render to an empty prompt", param="messages")
    _check_fits(service, len(prompt.ids), 1, "messages")
    outline = outline_of(service, request, calls, text)
    wanted = request.constraint(service.limits.max_constraint_bytes)
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
        grammar=await _compiled(service, constrained(service, calls, outline, wanted), tenant),
        outline=outline,
    )


async def plan_embeddings(service: Service, encoder: Encoder, request: EmbeddingRequest, tenant: str) -> Plan:
    """One sequence per input, which ends with its prompt. Raises TerraceError for what cannot be served."""
    check_model(service, request.model)
    inputs, limit = request.input, service.limits.max_embedding_inputs
    if len(inputs) > limit:
        raise InvalidRequest(f"'input': at most {limit} inputs per request, got {len(inputs)}", param="input")
    if (request.dimensions or 0) > service.embedding_dimensions:
        raise InvalidRequest(
            f"'dimensions' must be at most {service.embedding_dimensions} with this model, got {request.dimensions}",
            param="dimensions",
        )
    _check_truncation(request)
    special = request.add_special_tokens is not False
    prompts = []
    for index, item in enumerate(inputs):
        prompt = await _prompt(service, encoder, item, index, False, special, "input")
        prompts.append(_last_tokens(service, prompt, request.truncate_prompt_tokens, 0))
        _check_fits(service, len(prompts[-1].ids), 0, "input")
        await asyncio.sleep(0)  # a thousand inputs of a millisecond each must not hold the loop up
    urgency = ServiceClass(
        tenant, service.tenants.priority(tenant, request.priority), background=request.service_tier == "flex"
    )
    params = SamplingParams(max_tokens=0, pooling=service.pooling)
    salt = cache_salt(tenant, request.cache_salt)
    return Plan(
        prompts=prompts,
        specs=[[GenerateSpec(prompt.ids, params, salt, urgency)] for prompt in prompts],
        keep=1,
        logprobs=None,
        prompt_logprobs=None,
        echo=False,
        stops=(),
        include_stop=False,
        skip_special_tokens=True,
        client_stop_ids=frozenset(),
        score_only=True,
    )


async def compile_constraint(service: Service, constraint: Constraint, tenant: str, param: str) -> Grammar:
    """What `constraint` compiles to. Raises InvalidRequest naming the field `param` if it cannot be enforced."""
    if service.grammars is None:
        raise InvalidRequest(
            f"'{param}' cannot be enforced here: it needs the package llguidance and a model whose tokens are pieces "
            "of text by themselves",
            param=param,
            code="structured_output_unavailable",
        )
    return await service.grammars.compile(constraint, tenant, param)


async def _compiled(service: Service, found: tuple[Constraint, str] | None, tenant: str) -> Grammar | None:
    if found is None:
        return None
    constraint, param = found
    return await compile_constraint(service, constraint, tenant, param)


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
    check_ids(service, request.allowed_token_ids or (), "allowed_token_ids")
    _check_truncation(request)


def _check_truncation(request: GenerationRequest | EmbeddingRequest) -> None:
    if request.truncate_prompt_tokens == 0:
        raise InvalidRequest("'truncate_prompt_tokens' must be -1 or at least 1, got 0", param="truncate_prompt_tokens")


def _at_most(limit: int, value: int, param: str) -> None:
    if value > limit:
        raise InvalidRequest(f"'{param}' must be at most {limit} on this server, got {value}", param=param)


async def _prompt(
    service: Service,
    encoder: Encoder,
    item: str | list[int],
    index: int,
    echo: bool,
    special: bool,
    param: str = "prompt",
) -> Prompt:
    where = f"{param}[{index}]" if index else param
    if isinstance(item, str):
        ids = await encoder.encode(item, add_special_tokens=special)
        if not item or not ids:
            raise InvalidRequest(f"'{where}' must not be empty", param=param)
        return Prompt(ids, item)
    if not item:
        raise InvalidRequest(f"'{where}' must not be empty", param=param)
    check_ids(service, item, where)
    return Prompt(item, service.tokenizer.decode(item, skip_special_tokens=False) if echo else "")


def _last_tokens(service: Service, prompt: Prompt, keep: int | None, output_tokens: int) -> Prompt:
    """The end of `prompt`: `keep` tokens, or for -1 as many as fit beside `output_tokens`."""
    if keep == -1:
        keep = max(1, service.max_model_len - output_tokens)
    if keep is None or len(prompt.ids) <= keep:
        return prompt
    ids = prompt.ids[-keep:]
    return Prompt(ids, service.tokenizer.decode(ids, skip_special_tokens=False) if prompt.text else "")


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
    grammar: Grammar | None,
    outline: Outline | None = None,
) -> Plan:
    shown = request.prompt_logprobs
    asked = max((k for k in (shown, logprobs if echo else None) if k is not None), default=None)
    # best_of ranks by the mean log-probability, so it needs every token's own even where the client sees none.
    internal = 0 if logprobs is None and generate > keep else logprobs
    params = replace(_sampling(service, request), logprobs=internal, prompt_logprobs=asked, grammar=grammar)
    salt = cache_salt(tenant, request.cache_salt)
    urgency = service.tenants.priority(tenant, request.priority)
    targets = _targets(service, request)
    service_class = ServiceClass(tenant, urgency, background=request.service_tier == "flex", targets=targets)
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
        token_ids=bool(request.return_token_ids),
        tokens_as_ids=bool(request.return_tokens_as_token_ids),
        outline=outline,
    )


def _bad_sequences(service: Service, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """The words as the tokenizer writes them, at the start of a text and after a space, where that is other tokens."""
    tokenizer = service.tokenizer
    found = [
        tuple(tokenizer.encode(text, add_special_tokens=False, param="bad_words"))
        for word in words
        for text in (word, f" {word.lstrip()}")
    ]
    return tuple(dict.fromkeys(ids for ids in found if ids))


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
        allowed_token_ids=tuple(dict.fromkeys(request.allowed_token_ids or ())),
        bad_sequences=_bad_sequences(service, request.bad_words or ()),
    )
