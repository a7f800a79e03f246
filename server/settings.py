"""The sections of the configuration: every knob, with its unit, its default, its range and what it is for.

Knows what a value may be; how values are found, and which source wins, is `config.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from server.quantities import parse_bytes, parse_count, parse_gib, parse_seconds

_DTYPE_ALIASES = {"float": "float32", "fp32": "float32", "half": "float16", "fp16": "float16", "bf16": "bfloat16"}


def _parse_list(value: object) -> object:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _parse_dtype(value: object) -> object:
    return _DTYPE_ALIASES.get(value, value) if isinstance(value, str) else value


def _power_of_two(value: int) -> int:
    if value & (value - 1):
        raise ValueError("is not a power of two")
    return value


def _no_blank(keys: tuple[str, ...]) -> tuple[str, ...]:
    if any(not key or key != key.strip() for key in keys):
        raise ValueError("holds an empty key or one with blanks around it")
    return keys


def key_weights(keys: Iterable[str]) -> dict[str, float]:
    """Every key with its weight, from entries like `KEY` and `KEY WEIGHT`. Raises ValueError, and shows no key."""
    found: dict[str, float] = {}
    for entry in keys:
        try:
            key, weight = (entry, "1") if len(entry.split()) == 1 else entry.split()
            value = float(weight)
        except ValueError:
            raise ValueError("holds an entry that is neither KEY nor KEY WEIGHT") from None
        if not 0.001 <= value <= 1000:
            raise ValueError("holds a weight that is not between 0.001 and 1000")
        if found.setdefault(key, value) != value:
            raise ValueError("holds a key twice, with different weights")
    return found


def _weighted(keys: tuple[str, ...]) -> tuple[str, ...]:
    key_weights(keys)
    return keys


@dataclass(frozen=True)
class Flag:
    """How a field looks on the command line, when that is not simply `--field-name`."""

    names: tuple[str, ...] = ()
    """Replaces `--field-name`; the first one is shown."""
    common: bool = False
    """Listed by `terrace serve --help`; the others need `--help-all`."""
    positional: bool = False


COMMON = Flag(common=True)
Bytes = Annotated[int, BeforeValidator(parse_bytes)]
Gib = Annotated[float, BeforeValidator(parse_gib)]
Seconds = Annotated[float, BeforeValidator(parse_seconds)]
Count = Annotated[int, BeforeValidator(parse_count)]
Dtype = Annotated[Literal["auto", "float32", "bfloat16", "float16"], BeforeValidator(_parse_dtype)]
Quantization = Literal["none", "int8", "w8a8", "int8-g32", "int4-g32", "w4a8", "fp8"]
KvDtype = Annotated[Literal["auto", "float32", "bfloat16", "float16", "int8", "fp8"], BeforeValidator(_parse_dtype)]
AdminKeys = Annotated[tuple[str, ...], BeforeValidator(_parse_list), AfterValidator(_no_blank)]
ApiKeys = Annotated[AdminKeys, AfterValidator(_weighted)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=False, allow_inf_nan=False)


class ModelConfig(Section):
    """Which model, in which precision, on which device."""

    model: Annotated[str, Flag(positional=True, common=True)] = Field(
        default="demo",
        min_length=1,
        description="Folder in Hugging Face format, hub id, or `demo` for the packaged demo model.",
    )
    served_model_name: Annotated[str | None, COMMON] = Field(
        default=None, description="Name that clients use; default: the folder's or the hub id's own."
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit of a hub model.")
    dtype: Annotated[Dtype, COMMON] = Field(
        default="auto",
        description="Precision of weights; auto: the checkpoint's own, but float32 where torch computes on a CPU.",
    )
    load_format: Literal["auto", "dummy"] = Field(
        default="auto",
        description="auto: read the weights; dummy: random weights from config.json, for tests of capacity and speed.",
    )
    max_model_len: Annotated[Count | None, COMMON] = Field(
        default=None,
        ge=1,
        description="Longest prompt plus output, in tokens (32k: 32000, 32K: 32768); default: the model's own limit.",
    )
    chat_template: Path | None = Field(
        default=None, description="Jinja file to use in place of the model's own chat template."
    )
    embedding_pooling: Literal["mean", "last"] = Field(
        default="last",
        description="Embeddings: the last token's hidden state, or the mean over all; only the former uses the cache.",
    )
    tool_call_parser: str = Field(
        default="auto",
        description="How the model writes calls of tools: hermes, llama3, mistral or pythonic; auto: by its chat "
        "template; none: requests with tools are refused.",
    )
    reasoning_parser: str = Field(
        default="auto",
        description="How the model marks its thoughts: qwen3, deepseek_r1 or mistral; auto: by its chat template; "
        "none: they stay in the text.",
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        default=0, description="Seeds dummy weights and the sampling of requests that name no seed of their own."
    )
    quantization: Annotated[Quantization, COMMON] = Field(
        default="none",
        description="Weights of linear layers, made at load from any checkpoint. On a CPU, by the native kernels: int8 "
        "with a scale for each output, int8-g32 and int4-g32 with one for each 32 weights; w8a8: int8, and what they "
        "are multiplied with is rounded to int8, too, row by row: quicker for prompts and many requests; w4a8: four "
        "bits with a scale for each 32 weights, and what they are multiplied with as int8 likewise: the quickest with "
        "AVX2. On a GPU from Hopper on: fp8, where inputs are rounded likewise.",
    )
    device: Annotated[Literal["cpu", "cuda"], COMMON] = Field(default="cpu", description="Where the model runs.")
    kernels: Literal["auto", "native", "torch"] = Field(
        default="auto",
        description="What computes on a CPU: the native kernels, or torch; auto: native where they were built.",
    )
    attention: str = Field(default="auto", description="Attention backend; auto: the best one for the device.")
    threads: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="CPU threads for arithmetic; default: torch's own choice, one per physical core.",
    )


class KvConfig(Section):
    """The KV cache: how much of it there is, and in what pieces."""

    device_gib: Annotated[Gib, COMMON] = Field(
        default=0.0,
        ge=0,
        description="Device tier in GiB (RAM on a CPU-only machine); also takes units, e.g. 512MiB. 0: 1 GiB on a CPU, "
        "on a GPU what weights leave of 90 % of its memory.",
    )
    block_size: Annotated[int, AfterValidator(_power_of_two), Field(ge=1, le=1024)] = Field(
        default=16, description="Tokens per block: the unit of sharing, eviction and transfer. A power of two."
    )
    kv_dtype: Annotated[KvDtype, Flag(names=("--kv-dtype", "--kv-cache-dtype"))] = Field(
        default="auto",
        description="Precision of cached keys and values; auto: the same as the model's. int8: a fourth of float32's "
        "memory, each vector with a scale; fp8: on a GPU, half of bfloat16's. Answers change a little with both.",
    )
    prefix_caching: Annotated[bool, Flag(names=("--prefix-caching", "--enable-prefix-caching"))] = Field(
        default=True, description="Reuse the cached blocks of a prompt's longest known prefix."
    )
    dram_gib: Annotated[Gib, COMMON] = Field(
        default=0.0, ge=0, description="DRAM tier in GiB, below the device; 0: none. Pinned on a GPU machine."
    )
    ssd_gib: Annotated[Gib, COMMON] = Field(
        default=0.0, ge=0, description="SSD tier in GiB: a hard cap on the bytes on disk, index included; 0: none."
    )
    ssd_path: Annotated[Path | None, COMMON] = Field(
        default=None, description="Directory of the SSD tier. It survives restarts; each model has its own part of it."
    )
    ssd_min_free_gib: Gib = Field(
        default=10.0, ge=0, description="Free space that the SSD tier leaves on its file system, in GiB."
    )
    ssd_write_gib_per_day: Gib = Field(
        default=0.0, ge=0, description="Endurance budget: most GiB written to the SSD tier per day; 0: no limit."
    )
    ssd_write_share: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Of the blocks that come down to a full SSD tier, the share to write: those likeliest to be used.",
    )
    eviction: str = Field(default="learned", description="Policy that picks which unused cached blocks go first.")
    dram_eviction: str = Field(default="learned", description="The same for the DRAM tier.")
    ssd_eviction: str = Field(default="learned", description="The same for the SSD tier.")
    pin_ratio: float = Field(
        default=0.25, ge=0, le=1, description="Largest share of the lowest tier that pins and retention may hold."
    )
    prefetch: bool = Field(
        default=True, description="Fetch a request's blocks from SSD to DRAM as soon as it is received."
    )
    drain_flush_s: Seconds = Field(
        default=10.0, ge=0, description="After SIGTERM, how long the cache may take to be written to the SSD tier."
    )

    @model_validator(mode="after")
    def _tiers_rest_on_each_other(self) -> KvConfig:
        if self.ssd_gib and self.ssd_path is None:
            raise ValueError("ssd_gib needs a directory: set --ssd-path")
        if self.ssd_gib and not self.dram_gib:
            raise ValueError(
                "ssd_gib needs a DRAM tier, blocks pass through it on their way to and from SSD: set --dram-gib, e.g. 1"
            )
        if self.ssd_path is not None and not self.ssd_gib:
            raise ValueError("ssd_path needs a size: set --ssd-gib")
        return self


class SchedulerConfig(Section):
    """How much work runs at once and how much may wait."""

    policy: Annotated[str, Flag(names=("--policy", "--scheduling-policy"))] = Field(
        default="fcfs",
        description="Who goes first: fcfs; priority (the lower `priority`); spf (the shorter uncached prompt); "
        "deadline (by ttft_target_ms); fair (between API keys, by weight); prefix (those that share one together).",
    )
    max_num_seqs: Annotated[Count, COMMON] = Field(default=256, ge=1, description="Requests running at once.")
    max_num_batched_tokens: Count = Field(
        default=2048, ge=1, description="Tokens computed per step over all requests: decode first, the rest is prefill."
    )
    prefill_chunk_tokens: Count | None = Field(
        default=None,
        ge=1,
        description="Most prompt tokens of one request per step; default: the whole budget of the step.",
    )
    max_queued_requests: Count = Field(
        default=2048, ge=1, description="Requests waiting; beyond that 429 with Retry-After."
    )
    max_queued_tokens: Count = Field(
        default=2_000_000, ge=1, description="Prompt tokens waiting; beyond that the same."
    )
    ttft_target_ms: Annotated[float, COMMON] = Field(
        default=0.0, ge=0, description="Time to the first token that a request wants if it names none; 0: any."
    )
    tpot_target_ms: Annotated[float, COMMON] = Field(
        default=0.0, ge=0, description="Time per later token, the same; prompt chunks are cut to hold it; 0: any."
    )
    refuse_late: bool = Field(
        default=False, description="Answer 429 at once to whom ttft_target_ms is not expected to be met for."
    )
    background_step_ms: float = Field(
        default=20.0, gt=0, description="Longest step for background requests (service_tier: flex) alone."
    )
    background_slack: float = Field(
        default=0.05, ge=0, le=1, description="Share by which background requests may lengthen a step of others."
    )
    background_kv_share: float = Field(
        default=0.25, gt=0, le=1, description="Share of the device tier that running background requests may hold."
    )


class ServerConfig(Section):
    """The HTTP front and the process."""

    host: Annotated[str, COMMON] = Field(default="127.0.0.1", min_length=1, description="Address to listen on.")
    port: Annotated[int, COMMON] = Field(
        default=8000, ge=0, le=65535, description="Port to listen on; 0: any free one."
    )
    api_keys: Annotated[ApiKeys, Flag(names=("--api-key",), common=True)] = Field(
        default=(),
        repr=False,
        description="Bearer keys that clients must present (repeat the flag for several), each KEY or 'KEY WEIGHT' for "
        "the policy `fair`; none: open to all.",
    )
    tenants_file: Path | None = Field(
        default=None,
        description="File of tenants in TOML: digests of their keys, rate limits, shares of the cache. "
        "`terrace keys add` writes one; on SIGHUP it is read again.",
    )
    api_key_file: Path | None = Field(
        default=None, description="File with one KEY or KEY WEIGHT per line, added to api_keys; # starts a comment."
    )
    admin_keys: Annotated[AdminKeys, Flag(names=("--admin-key",))] = Field(
        default=(),
        repr=False,
        description="Bearer keys of the cache admin API; none: it is off unless there are no api_keys either.",
    )
    admin_key_file: Path | None = Field(
        default=None, description="File with one admin key per line, added to admin_keys; # starts a comment."
    )
    max_body_bytes: Bytes = Field(
        default=8 * 2**20, ge=1024, description="Largest request body in bytes, e.g. 8MiB; beyond it 413."
    )
    max_body_values: Count = Field(
        default=0,
        ge=0,
        description="JSON values in a body; beyond it 413. 0: 32768, or twice the model's length if that is more.",
    )
    max_connections: Count = Field(
        default=4096,
        ge=1,
        description="Open connections; beyond it the one idle longest is closed, or with none idle the new one (429).",
    )
    max_header_bytes: Bytes = Field(
        default=32 * 2**10, ge=1024, description="Largest request line and headers in bytes; beyond it 431."
    )
    header_timeout_s: Seconds = Field(
        default=10.0, gt=0, description="How long a new connection or a begun request may take to send its headers."
    )
    refusal_delay_s: Seconds = Field(
        default=0.05,
        ge=0,
        le=10,
        description="A bad body that comes as the first request of a connection is refused so much later: whoever "
        "makes a connection for each one sends fewer of them.",
    )
    max_prompts_per_request: Count = Field(default=64, ge=1, description="Prompts in one /v1/completions request.")
    max_embedding_inputs: Count = Field(default=1024, ge=1, description="Inputs in one /v1/embeddings request.")
    max_choices: Count = Field(default=16, ge=1, description="Largest `n` and `best_of`, per prompt.")
    max_stop_strings: Count = Field(default=16, ge=0, description="Stop strings per request.")
    max_constraint_bytes: Bytes = Field(
        default=64 * 2**10, ge=64, description="Largest JSON schema, regular expression, grammar or list of choices."
    )
    max_logprobs: Count = Field(default=20, ge=0, description="Largest number of alternatives per token in logprobs.")
    sse_keepalive_s: Seconds = Field(
        default=15.0,
        ge=0,
        description="Silence on a stream before a comment line keeps proxies from closing it; 0: never.",
    )
    shutdown_timeout_s: Seconds = Field(
        default=30.0,
        ge=0,
        description="After SIGTERM, how long running requests may take to finish before they are aborted.",
    )
    stuck_after_s: Seconds = Field(
        default=120.0,
        ge=1,
        description="Work, and no step that ends for so long: the daemon is stuck. /livez fails, systemd's watchdog is "
        "not fed, the state is logged. Longer than the longest step.",
    )
    switch_interval_s: Seconds = Field(
        default=0.001,
        gt=0,
        le=1,
        description="Longest wait of the event loop for the interpreter lock while the device thread computes.",
    )
    log_level: Annotated[Literal["debug", "info", "warning", "error"], COMMON] = Field(
        default="info", description="Least severe event that is logged."
    )
    log_format: Literal["auto", "console", "json"] = Field(
        default="auto", description="auto: coloured lines on a terminal, else one JSON object per line."
    )
    ui: bool = Field(default=True, description="Show at /ui what the daemon does, live; /status is there in any case.")
    max_watchers: Count = Field(
        default=16, ge=1, description="Live pages and `terrace top` open at once; beyond it 429."
    )
    explained_requests: Count = Field(
        default=500, ge=0, description="Requests of which /v1/cache/explain can say why they took as long; 0: none."
    )
    otlp_endpoint: str | None = Field(
        default=None,
        description="Where to send a trace of each request by OTLP, as http://collector:4318; needs the extra `otel`.",
    )
    record_path: Path | None = Field(
        default=None,
        description="File to record requests in, for replay: times, lengths, keyed block hashes; no text, no token.",
    )
    record_max_bytes: Bytes = Field(
        default=64 * 2**20, ge=2**16, description="At this size the recording moves to PATH.1 and begins anew."
    )


class BatchConfig(Section):
    """What /v1/files and /v1/batches may keep and do."""

    data_path: Path | None = Field(
        default=None,
        description="Directory of uploaded files and batches, which survive restarts; none: /v1/files and /v1/batches "
        "are off.",
    )
    data_min_free_gib: Gib = Field(
        default=1.0, ge=0, description="Free space that files and batches leave on their file system, in GiB."
    )
    max_file_bytes: Bytes = Field(default=200 * 2**20, ge=1, description="Largest uploaded file; beyond it 413.")
    max_files_per_tenant: Count = Field(
        default=1000, ge=3, description="Files of one API key, two of each batch in work included; beyond it 403."
    )
    max_bytes_per_tenant: Bytes = Field(
        default=10 * 2**30,
        ge=1,
        description="Bytes of all files of one API key; beyond it uploads and new batches get 403, running ones wait.",
    )
    max_batch_lines: Count = Field(default=50_000, ge=1, description="Requests in one batch; beyond it 413.")
    max_batch_line_bytes: Bytes = Field(default=2**20, ge=64, description="Longest line of a batch; beyond it 413.")
    max_batches_per_tenant: Count = Field(
        default=16, ge=1, description="Batches of one API key in work at once; beyond it 429."
    )
    max_ended_batches: Count = Field(
        default=1000, ge=1, description="Ended batches of one API key that are remembered; the oldest are forgotten."
    )
    batch_lines_in_flight: Count = Field(
        default=64, ge=1, description="Lines of all batches that run at once, shared by API keys and their batches."
    )
