"""The composition root: the only place that names concrete classes together, and the life of the daemon.

Order at start: load the model, allocate the arena, recover the SSD tier. What the process does around that (port,
signals, supervisors) is `process.py`'s.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import platform
import secrets
import sys
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from server.api.dialects.dialect import NO_DIALECT, Dialect, dialect_of
from server.api.service import Service, hash_keys
from server.api.status.status import Status
from server.api.status.warnings import WarningLog
from server.api.tenancy import Tenants, tenant_of
from server.batches.vault import Vault
from server.config import Config, ServerConfig, key_weights
from server.engine import Engine
from server.errors import ConfigError
from server.explain import Explanations
from server.kernels.int8 import SCALE_BYTES
from server.kvcache.host import HostArena
from server.kvcache.manager import KVManager, TierSpec
from server.kvcache.mover import Mover
from server.kvcache.step_cost import StepWork
from server.kvcache.tiers.base import Tier
from server.kvcache.tiers.drive import drive_written_bytes
from server.kvcache.tiers.files import OsIo
from server.kvcache.tiers.ssd import SsdTier
from server.metrics import Facts, Metrics
from server.models.base import Model
from server.models.fingerprint import changed_files, file_stats, fingerprint, random_digest, weights_digest
from server.models.weights import (
    DTypeName,
    checkpoint_files,
    load_config,
    load_model,
    resolve_folder,
    weights_bytes,
)
from server.place import Place, place_of
from server.recorder import Recorder
from server.room import check_disk, disk_gib, taking, unusable
from server.runner import grammar
from server.scheduler.limits import Limits
from server.scheduler.policy import make_policy
from server.scheduler.scheduler import Scheduler
from server.startup import Startup
from server.tenants import Tenant, cache_limits, read_tenants
from server.text import Tokenizer
from server.tracing import Tracer, otlp_exporter
from server.types import (
    DEVICE,
    DRAM,
    SSD,
    BlockLayout,
    SampleSpec,
    SamplingParams,
    StepPlan,
    StepRow,
    StepRunner,
    Targets,
    TierName,
)

log = logging.getLogger("terrace")

DEMO_MODEL = Path(__file__).parent / "demo" / "model"
KV_DTYPES = {name: name for name in ("float32", "bfloat16", "float16", "int8")} | {"fp8": "float8_e4m3fn"}
"""Setting -> torch's name."""
MIN_BLOCKS = 8
"""A device tier with fewer blocks than this serves nobody."""
FIRST_GUESSES = ((4e9, 0.0005), (1e9, 0.002))
"""Bytes per second and latency of the two hops below the device, until they are measured."""
MIN_IN_FLIGHT, MAX_IN_FLIGHT = 8, 256
"""Blocks moving at once between two tiers, per direction: as many bytes as the place allows, within these bounds."""
CALIBRATION_TOKENS = 64
RELOADED = frozenset(
    f"server.{field}" for field in ("api_keys", "api_key_file", "admin_keys", "admin_key_file", "log_level")
)
"""Settings that SIGHUP reads again."""


@dataclass
class Daemon:
    """Everything that runs, put together. `open` it before the engine runs, `aclose` it after. `config`: what was asked
    for. `checkpoint`: what the files of `folder` were when they were read."""

    config: Config
    place: Place
    engine: Engine
    runner: StepRunner
    tiers: dict[TierName, Tier]
    tokenizer: Tokenizer
    metrics: Metrics
    model_name: str
    summary: str
    embedding_dimensions: int
    tenants: Tenants
    folder: Path
    checkpoint: Mapping[str, list[int]]
    startup: Startup
    tracer: Tracer | None = None
    recorder: Recorder | None = None
    vault: Vault | None = None
    dialect: Dialect = NO_DIALECT
    grammars: grammar.Grammars | None = None

    async def open(self) -> None:
        """Take over what the SSD tier still holds, and measure what a step costs."""
        gc.disable()  # a million fresh objects, none of them garbage
        try:
            with self.startup.timed("index_recovery"):
                await self._recover()
        finally:
            gc.enable()
        with self.startup.timed("warmup"):
            await self.place.warm_up(self.runner, self.startup.moved)
            if self.tiers:
                await _calibrate(self)
        self.metrics.startup_s.update(self.startup.seconds)

    async def _recover(self) -> None:
        for tier in self.tiers.values():
            found = await tier.open()
            if found.frames:
                self.engine.kv.recover(found)
                log.info("%d blocks of the %s tier are warm", len(found.frames), tier.name)

    def changed_files(self) -> list[str]:
        """Files of the model that are not what was loaded. Blocking."""
        return changed_files(self.folder, self.checkpoint)

    def admit(self, named: Sequence[Tenant], server: ServerConfig) -> None:
        """These are the tenants from now on, and these the keys of nobody's name and of whoever runs the server. Raises
        ConfigError, and nothing is changed, where that cannot be."""
        if self.tenants.guarded and not server.api_keys and not any(tenant.keys for tenant in named):
            raise ConfigError("no key is left: that would open the server to all; restart it to mean that")
        kv = self.engine.kv
        frames = {books.name: books.pool.capacity for books in kv.levels}
        room = kv.layout.blocks_for(self.engine.max_model_len) + 1
        if len(kv.levels) == 1:
            room += kv.pin_blocks_max
        limits = cache_limits(named, frames, kv.layout.block_bytes, room)
        self.tenants.replace(named, hash_keys(key_weights(server.api_keys)))
        self.tenants.admins = hash_keys(server.admin_keys)
        if self.config.server.tenants_file is not None:
            kv.share(limits)
        self.engine.scheduler.policy.weights = _weights_of(server, named)

    async def reload(self, again: Callable[[], Config]) -> None:
        """Read the configuration with `again`, its files of keys, and the tenants file: keys, tenants and log level
        hold from now on. What is wrong is one line in the log, and all stays as it was."""
        try:
            fresh = await asyncio.to_thread(again)
            named = await asyncio.to_thread(_tenants_of, self.config)
            self.admit(named, fresh.server)
        except ConfigError as error:
            log.error("nothing was reloaded: %s", error.message)
            return
        self.config, others = self.config.taking(fresh, RELOADED)
        log.info(
            "reloaded: %d tenants with %d keys, %d keys of nobody's name, %d admin keys, log level %s",
            len(named), sum(len(tenant.keys) for tenant in named), len(fresh.server.api_keys),
            len(fresh.server.admin_keys), fresh.server.log_level,
        )  # fmt: skip
        if others:
            log.warning("changed, and holds after a restart only: %s", ", ".join(others))

    async def aclose(self) -> None:
        """After the engine: no step and no transfer runs any more, or none that anybody waits for."""
        if self.recorder is not None:
            await asyncio.to_thread(self.recorder.close)
        if self.tracer is not None:
            await asyncio.to_thread(self.tracer.close)
        if self.vault is not None:
            await self.vault.aclose()
        if self.grammars is not None:
            self.grammars.close()
        await self.runner.aclose()
        for tier in self.tiers.values():
            await tier.aclose()


def build(
    config: Config, disk: OsIo | None = None, startup: Startup | None = None, place: Place | None = None
) -> Daemon:
    """Load the model and wire the daemon up; nothing runs yet. Raises ConfigError with one line to act on.

    `disk` stands in for the operating system below the SSD tier, `place` for the device, for tests and measurements.
    `startup` is told how far it is. Blocking, for minutes perhaps; any thread.
    """
    import torch

    startup = startup or Startup(time.monotonic)
    place = place or place_of(config)
    vault = _vault(config)
    with startup.timed("download"):
        folder = _folder(config)
    checkpoint = file_stats(folder)
    tokenizer = Tokenizer.load(folder, _chat_template(config))
    dialect = dialect_of(tokenizer, config.model.tool_call_parser, config.model.reasoning_parser)
    asked, config = config, _fitted(config, place, folder)
    with startup.timed("weights"):
        model, weights = _load(config, place, folder, startup.moved), _weights(config, folder)
    if changed := changed_files(folder, checkpoint):
        raise ConfigError(f"{folder / changed[0]} changed while it was read; start again when it is whole")
    kv_dtype = model.dtype if config.kv.kv_dtype == "auto" else getattr(torch, KV_DTYPES[config.kv.kv_dtype])
    backend = place.backend(model.geometry, kv_dtype)
    layout = _layout(config, model, kv_dtype)
    frames = int(config.kv.device_gib * 2**30) // layout.block_bytes
    max_model_len = _max_model_len(config, model, layout, frames)
    with startup.timed("kv_alloc"), taking("device_gib", config.kv.device_gib):
        arena = place.arena(frames, layout, kv_dtype)
    attention = place.attention(backend, arena, model)
    name = model_name(config)
    metrics = Metrics(name, _facts(config, model, kv_dtype, max_model_len))
    kinds = [str(model.dtype), str(kv_dtype), config.model.quantization, place.computed_by, backend]
    identity = fingerprint(weights, load_config(folder).to_dict(), layout, dtypes=kinds)
    with startup.timed("host_alloc"):
        tiers, specs = _lower_tiers(config, layout, place, arena, identity, metrics, disk)
    kv = _kv(config, layout, [TierSpec(DEVICE, frames, config.kv.eviction), *specs], identity)
    recorder = _recorder(config)
    if recorder is not None:
        metrics.bind_recorder(recorder.outcomes)
    if vault is not None:
        metrics.bind_batches(vault)
    tracer = _tracer(config)
    policy = make_policy(config.scheduler.policy, _weights_of(config.server, ()))
    scheduler = Scheduler(kv, policy, _limits(config, max_model_len))
    runner = place.runner(model, attention)
    engine = Engine(
        scheduler,
        runner,
        Mover(tiers, run_blocks=max(1, place.run_bytes // layout.block_bytes)),
        metrics,
        time.monotonic,
        prefix_caching=config.kv.prefix_caching,
        prefetch=config.kv.prefetch,
        flush_s=config.kv.drain_flush_s if SSD in tiers else 0.0,
        nonce=secrets.token_hex(8),
        recorder=recorder,
        explanations=Explanations(config.server.explained_requests, _wall_offset_s(), tracer),
    )
    sizes = {DEVICE: frames} | {spec.name: spec.frames for spec in specs}
    summary = _in_words(name, model, layout, max_model_len, sizes) + f"; attention {backend}"
    grammars = _grammars(tokenizer, model.geometry.vocab)
    tenants = Tenants(hash_keys(key_weights(config.server.api_keys)), time.monotonic, metrics.rejected)
    parts = (asked, place, engine, runner, tiers, tokenizer, metrics, name, summary, model.geometry.hidden, tenants)
    daemon = Daemon(*parts, folder, checkpoint, startup, tracer, recorder, vault, dialect, grammars)
    daemon.admit(_tenants_of(config), config.server)
    if config.server.tenants_file is not None:
        metrics.bind_tenants(tenants.numbers)
    return daemon


def service_of(daemon: Daemon, warnings: WarningLog | None = None) -> Service:
    """What the HTTP routes get to see of the daemon. `warnings`: the log's last ones."""
    limits = daemon.config.server
    status = Status(
        daemon.metrics,
        daemon.model_name,
        time.monotonic,
        time.time,
        max_watchers=limits.max_watchers,
        warnings=warnings,
    )
    return Service(
        engine=daemon.engine,
        tokenizer=daemon.tokenizer,
        metrics=daemon.metrics,
        model_name=daemon.model_name,
        version=version(),
        wall_clock=time.time,
        limits=limits,
        status=status,
        tenants=daemon.tenants,
        default_targets=_targets(daemon.config),
        vault=daemon.vault,
        pooling=daemon.config.model.embedding_pooling,
        embedding_dimensions=daemon.embedding_dimensions,
        dialect=daemon.dialect,
        grammars=daemon.grammars,
    )


def version() -> str:
    """The installed distribution's version, or `unknown` when run from a bare tree."""
    try:
        return metadata.version("terrace")
    except metadata.PackageNotFoundError:
        return "unknown"


# --- parts -----------------------------------------------------------------------------------------------------------


def _in_words(name: str, model: Model, layout: BlockLayout, max_model_len: int, sizes: Mapping[str, int]) -> str:
    """What is served, from what: for the log. `sizes`: blocks by tier."""
    what = f"model {name}: {model.geometry.layers} layers, {_name_of(model.dtype)}, context {max_model_len} tokens"
    size = f"blocks of {layout.block_tokens} tokens, {layout.block_bytes / 2**20:.3g} MiB"
    tiers = (f"{tier} {count} blocks ({count * layout.block_tokens} tokens)" for tier, count in sizes.items())
    return f"{what}; {size}; {', '.join(tiers)}"


def _folder(config: Config) -> Path:
    return DEMO_MODEL if config.model.model == "demo" else resolve_folder(config.model.model, config.model.revision)


def _tenants_of(config: Config) -> Sequence[Tenant]:
    path = config.server.tenants_file
    return () if path is None else read_tenants(path)


def _name_of(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _facts(config: Config, model: Model, kv_dtype: Any, max_model_len: int) -> Facts:
    weights = model.parameters().values()
    return Facts(
        version=version(),
        python=platform.python_version(),
        torch=metadata.version("torch"),
        dtype=_name_of(model.dtype),
        kv_dtype=_name_of(kv_dtype),
        parameters=sum(weight.numel() for weight in weights),
        max_model_len=max_model_len,
        weights_bytes=sum(weight.nbytes for weight in weights),
        targets=_targets(config),
        write_bytes_per_day=config.kv.ssd_write_gib_per_day * 2**30,
    )


def _fitted(config: Config, place: Place, folder: Path) -> Config:
    """Before anything slow: is there memory for what is asked for, and a disk? With the size of the device tier, where
    that was left open. Raises ConfigError."""
    m = config.model
    precision, weights = weights_bytes(
        folder, _dtype(config, place), m.load_format, m.quantization, place.quantizations, place.native
    )
    device_gib = place.fit(model_name(config), weights, precision)
    if config.kv.ssd_path is not None:
        check_disk(config.kv.ssd_path, config.kv.ssd_gib, config.kv.ssd_min_free_gib)
    return config.model_copy(update={"kv": config.kv.model_copy(update={"device_gib": device_gib})})


def _dtype(config: Config, place: Place) -> DTypeName:
    return place.dtype if config.model.dtype == "auto" else config.model.dtype


def _load(config: Config, place: Place, folder: Path, moved: Callable[[int, int], None]) -> Model:
    """The model, with a progress bar on a terminal. `moved` is told what was read, of how many bytes."""

    def progress(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total)
        moved(done, total)

    with Progress(
        TextColumn("loading {task.fields[name]}"), BarColumn(), DownloadColumn(), TimeRemainingColumn(),
        disable=not sys.stderr.isatty(), transient=True,
    ) as bar:  # fmt: skip
        task = bar.add_task("load", name=folder.name)
        return load_model(
            folder,
            dtype=_dtype(config, place),
            device=place.device,
            load_format=config.model.load_format,
            seed=config.model.seed,
            progress=progress,
            quantization=config.model.quantization,
            native=place.native,
        )


def _layout(config: Config, model: Model, kv_dtype: Any) -> BlockLayout:
    g = model.geometry
    scale_bytes = SCALE_BYTES if config.kv.kv_dtype == "int8" else 0
    return BlockLayout(g.layers, g.kv_heads, g.head_dim, kv_dtype.itemsize, config.kv.block_size, scale_bytes)


def _max_model_len(config: Config, model: Model, layout: BlockLayout, frames: int) -> int:
    """The longest request that always fits. Raises ConfigError with the numbers when it would be none at all."""
    own = model.geometry.max_positions
    wanted = config.model.max_model_len or own
    if wanted > own:
        raise ConfigError(
            f"max_model_len {wanted} exceeds the model's {own} positions; lower it", param="model.max_model_len"
        )
    fits = (frames - 1) * layout.block_tokens
    if frames < MIN_BLOCKS or (config.model.max_model_len is not None and wanted > fits):
        needed = max(MIN_BLOCKS, layout.blocks_for(wanted) + 1) * layout.block_bytes / 2**30
        raise ConfigError(
            f"device_gib {config.kv.device_gib:g} holds {max(0, fits)} tokens, one request of max_model_len {wanted} "
            f"needs {needed:.3g} GiB; raise --device-gib or lower --max-model-len to {max(1, fits)}",
            param="kv.device_gib",
        )
    return min(wanted, fits)


def _limits(config: Config, max_model_len: int) -> Limits:
    knobs = config.scheduler
    if knobs.max_num_seqs > knobs.max_num_batched_tokens:
        raise ConfigError(
            f"max_num_seqs {knobs.max_num_seqs} exceeds max_num_batched_tokens {knobs.max_num_batched_tokens}: every "
            "running request takes a token of each step; raise the latter or lower the former",
            param="scheduler.max_num_seqs",
        )
    return Limits(
        max_running=knobs.max_num_seqs,
        max_step_tokens=knobs.max_num_batched_tokens,
        max_chunk_tokens=knobs.prefill_chunk_tokens or knobs.max_num_batched_tokens,
        max_queued_requests=knobs.max_queued_requests,
        max_queued_tokens=knobs.max_queued_tokens,
        max_model_len=max_model_len,
        refuse_late=knobs.refuse_late,
        background_step_s=knobs.background_step_ms / 1e3,
        background_slack=knobs.background_slack,
        background_kv_share=knobs.background_kv_share,
    )


def _targets(config: Config) -> Targets:
    """What is wanted for requests that say nothing."""
    ttft_ms, tpot_ms = config.scheduler.ttft_target_ms, config.scheduler.tpot_target_ms
    return Targets(ttft_ms / 1e3 if ttft_ms else inf, tpot_ms / 1e3 if tpot_ms else inf)


def _weights_of(server: ServerConfig, named: Sequence[Tenant]) -> dict[str, float]:
    """What tenants weigh, by the ids that the API gives them."""
    weights = key_weights(server.api_keys)
    plain = zip(map(tenant_of, hash_keys(weights)), weights.values(), strict=True)
    return dict(plain) | {tenant.id: tenant.limits.weight for tenant in named}


def _weights(config: Config, folder: Path) -> bytes:
    """Identity of the weights: of their bytes, or of the seed that they come from."""
    if config.model.load_format == "dummy":
        return random_digest(config.model.seed)
    return weights_digest(checkpoint_files(folder), Path.home() / ".cache" / "terrace")


def _kv(config: Config, layout: BlockLayout, specs: Sequence[TierSpec], identity: bytes) -> KVManager:
    return KVManager(
        layout,
        specs,
        identity,
        guesses=[(layout.block_bytes / bytes_s, latency_s) for bytes_s, latency_s in FIRST_GUESSES[: len(specs) - 1]],
        write_bytes_per_day=config.kv.ssd_write_gib_per_day * 2**30,
        write_share=config.kv.ssd_write_share,
        pin_ratio=config.kv.pin_ratio,
        wall_offset_s=_wall_offset_s(),
        shared=config.server.tenants_file is not None,
    )


def _lower_tiers(
    config: Config,
    layout: BlockLayout,
    place: Place,
    arena: Any,
    identity: bytes,
    metrics: Metrics,
    disk: OsIo | None,
) -> tuple[dict[TierName, Tier], list[TierSpec]]:
    """What moves blocks between the device and the tiers below, and those tiers as the KV manager sees them."""
    knobs = config.kv
    if not knobs.dram_gib:
        return {}, []
    in_flight = min(MAX_IN_FLIGHT, max(MIN_IN_FLIGHT, place.in_flight_bytes // layout.block_bytes))
    frames = int(knobs.dram_gib * 2**30) // layout.block_bytes
    if frames < MIN_BLOCKS:
        raise ConfigError(
            f"dram_gib {knobs.dram_gib:g} holds {frames} blocks of {layout.block_bytes} bytes; raise --dram-gib",
            param="kv.dram_gib",
        )
    with taking("dram_gib", knobs.dram_gib):
        host = HostArena(frames, layout.block_bytes)
        host.prefault()
    metrics.bind_host(host)
    tiers: dict[TierName, Tier] = {DEVICE: place.device_tier(arena, host)}
    specs = [TierSpec(DRAM, frames, knobs.dram_eviction, in_flight)]
    if knobs.ssd_path is not None:
        ssd = _ssd(config, host, identity, knobs.ssd_path, disk)
        tiers[SSD] = ssd
        metrics.bind_ssd(ssd.stats, lambda: ssd.disk_bytes, partial(drive_written_bytes, ssd.directory))
        specs.append(TierSpec(SSD, ssd.capacity_blocks, knobs.ssd_eviction, in_flight))
    return tiers, specs


def _ssd(config: Config, host: HostArena, identity: bytes, path: Path, disk: OsIo | None) -> SsdTier:
    knobs = config.kv
    try:
        ssd = SsdTier(
            path,
            identity,
            host,
            capacity_bytes=int(min(knobs.ssd_gib, disk_gib(path)) * 2**30),
            min_free_bytes=int(knobs.ssd_min_free_gib * 2**30),
            clock=time.monotonic,
            wall_clock=time.time,
            io=disk,
        )
    except OSError as error:
        raise unusable(path, error) from error
    if ssd.capacity_blocks < MIN_BLOCKS:
        raise ConfigError(
            f"ssd_gib {knobs.ssd_gib:g} holds {ssd.capacity_blocks} blocks; raise --ssd-gib", param="kv.ssd_gib"
        )
    return ssd


def _vault(config: Config) -> Vault | None:
    path = config.batch.data_path
    return None if path is None else Vault(config.batch, path, time.time)


def _grammars(tokenizer: Tokenizer, vocab: int) -> grammar.Grammars | None:
    """What compiles constraints for this model; None, and a warning, where texts cannot be constrained."""
    if not grammar.available():
        log.warning("no structured output: the package llguidance is not installed")
        return None
    if not tokenizer.writes_pieces():
        log.warning("no structured output: this model's tokens are not pieces of text by themselves")
        return None
    return grammar.Grammars(grammar.Vocabulary(tokenizer.vocabulary(vocab), tokenizer.special_tokens))


def _wall_offset_s() -> float:
    """From the engine's clock to Unix time."""
    return time.time() - time.monotonic()


def _tracer(config: Config) -> Tracer | None:
    endpoint = config.server.otlp_endpoint
    if endpoint is None:
        return None
    return Tracer(otlp_exporter(endpoint), model_name(config), version(), _wall_offset_s())


def _recorder(config: Config) -> Recorder | None:
    path = config.server.record_path
    if path is None:
        return None
    try:
        return Recorder(path, config.server.record_max_bytes, config.kv.block_size, time.monotonic())
    except OSError as error:
        raise ConfigError(f"cannot record to {path}: {error.strerror}", param="server.record_path") from error


async def _calibrate(daemon: Daemon) -> None:
    """Run a few steps on frames that are still free: the planner knows what computing costs before the first request,
    and the first request does not pay for what is only slow once."""
    kv, block_tokens = daemon.engine.kv, daemon.engine.kv.layout.block_tokens
    longest = min(CALIBRATION_TOKENS, daemon.engine.max_model_len - 1, daemon.config.scheduler.max_num_batched_tokens)
    for tokens in (longest, max(1, longest // 4), longest):
        frames = np.arange(kv.layout.blocks_for(tokens + block_tokens), dtype=np.int32)
        fed = array("i", bytes(4 * tokens))
        row = StepRow(0, fed, 0, frames, SampleSpec(SamplingParams(1, temperature=0.0), tokens, tokens, fed))
        result = await daemon.runner.run(StepPlan(0, [row], [0]))
        kv.planner.step.observe(StepWork.of([row]), result.finished_s - result.started_s)


def _chat_template(config: Config) -> str | None:
    path = config.model.chat_template
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the chat template {path}: {error}", param="model.chat_template") from error


def model_name(config: Config) -> str:
    """What clients call the model."""
    path = Path(config.model.model).expanduser()
    return config.model.served_model_name or (path.absolute().name if path.is_dir() else config.model.model)
