"""transformers' own continuous batching on the same shape and load, where this machine's transformers has it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from server.bench.gpu.chip import Chip
from server.bench.gpu.daemon import load_says
from server.bench.gpu.lines import Line
from server.bench.gpu.sizes import Sizes

PAGE_TOKENS = 32


def run(chip: Chip, sizes: Sizes, known: Mapping[str, float]) -> Iterator[Line]:
    what = f"transformers: {load_says(sizes)}"
    model = _model(chip, sizes)
    settings = _settings(sizes)
    if settings is None or not hasattr(model, "generate_batch"):
        yield Line("load.transformers", what, None, "tok/s", note="missing: it has no continuous batching")
        return
    prompts = [[3 + row] * sizes.peer_prompt for row in range(sizes.peer_requests)]
    _batch(model, settings, prompts[:1], 2)
    rate = _batch(model, settings, prompts, sizes.peer_output)
    ours = known.get("load.terrace")
    note = f"Terrace has {ours / rate:.2f} x as much" if ours else ""
    yield Line("load.transformers", what, rate, "tok/s", note=note)


def _model(chip: Chip, sizes: Sizes) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        sizes.shape.write(Path(folder), str(chip.dtype).removeprefix("torch."))
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device(chip.device):
        return AutoModelForCausalLM.from_config(config, dtype=chip.dtype).eval()


def _settings(sizes: Sizes) -> Any:
    """Room for all requests at once, and steps of as many tokens as ours, as far as this version has such settings;
    None where it has none."""
    try:
        from transformers import ContinuousBatchingConfig
    except ImportError:
        return None
    pages = -(-(sizes.peer_prompt + sizes.peer_output) // PAGE_TOKENS)
    wanted: dict[str, Any] = {
        "page_size": PAGE_TOKENS,
        "num_blocks": 2 * sizes.peer_requests * pages,
        "max_batch_tokens": max(sizes.chunks[0], sizes.peer_requests),
    }
    known = {field.name for field in fields(ContinuousBatchingConfig)}
    return ContinuousBatchingConfig(**{name: value for name, value in wanted.items() if name in known})


def _batch(model: Any, settings: Any, prompts: list[list[int]], output: int) -> float:
    """Tokens per second, from the first request's arrival to the last token; its start-up does not count where it keeps
    the times, which newer ones do."""
    from transformers import GenerationConfig

    wanted = GenerationConfig(max_new_tokens=output, do_sample=False, eos_token_id=-1, pad_token_id=0)
    started_s = time.perf_counter()
    found = model.generate_batch(
        prompts, generation_config=wanted, continuous_batching_config=settings, record_timestamps=True
    )
    done = list(found.values())
    seconds = time.perf_counter() - started_s
    if all(getattr(result, "timestamps", None) for result in done):
        seconds = max(result.timestamps[-1] for result in done) - min(result.created_time for result in done)
    return sum(len(result.generated_tokens) for result in done) / seconds
