"""Speed of the whole engine on a CPU, side by side with transformers on the same weights in the same run.

A Llama of 125M random parameters in float32; prompts of 128 tokens, 64 new ones, greedy, at 1, 16 and 64 requests at
once. Machines drift by a quarter from minute to minute, so the contenders take turns and what counts is the ratio
within one turn. Contenders: Terrace's engine in this process (no HTTP), `generate` with all prompts in one batch (which
knows all requests from the start and lets nobody in later), and transformers' own continuous batching.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

from server.bench.report import Report, quantile
from server.build import Daemon, build
from server.config import Config, KvConfig, ModelConfig
from server.engine import GenerateSpec
from server.types import SamplingParams

Prompts = list[list[int]]


@dataclass(frozen=True)
class Workload:
    """Shape of the model and of the load. Lengths in tokens."""

    layers: int
    hidden: int
    vocab: int
    prompt: int
    output: int
    concurrency: tuple[int, ...]
    repeats: int
    kv_heads: int = 4
    """Of 12 heads."""
    positions: int = 2048


FULL = Workload(layers=12, hidden=768, vocab=32_000, prompt=128, output=64, concurrency=(1, 16, 64), repeats=3)
QUICK = Workload(layers=2, hidden=192, vocab=2_000, prompt=32, output=8, concurrency=(1, 4), repeats=1)


@dataclass(frozen=True)
class Outcome:
    """One contender's turn: seconds from the start to the end and to each request's first token, and all tokens."""

    seconds: float
    first_s: list[float]
    tokens: list[list[int]]

    @property
    def tokens_per_s(self) -> float:
        return sum(len(tokens) for tokens in self.tokens) / self.seconds


Contender = Callable[[Prompts, int], Awaitable[Outcome]]


def run(*, quick: bool) -> Report:
    """Make the weights, load them on both sides, let the contenders take turns; see the module's docstring."""
    report = Report("model", quick=quick)
    workload = QUICK if quick else FULL
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        theirs = make_model(workload, Path(folder))
        ours = build(_config(workload, folder))
        asyncio.run(_compete(report, workload, ours, theirs))
    return report


def make_model(workload: Workload, folder: Path) -> Any:
    """A random Llama in Hugging Face format in `folder`, and the same one loaded."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=workload.vocab,
        hidden_size=workload.hidden,
        intermediate_size=workload.hidden * 8 // 3,
        num_hidden_layers=workload.layers,
        num_attention_heads=12,
        num_key_value_heads=workload.kv_heads,
        max_position_embeddings=workload.positions,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    words = HuggingFaceTokenizer(WordLevel({f"w{number}": number for number in range(workload.vocab)}, "w0"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return model


def _config(workload: Workload, folder: str) -> Config:
    requests = max(workload.concurrency)
    token_bytes = workload.layers * 2 * 4 * (workload.hidden // 12) * 4
    gib = 2 * requests * (workload.prompt + workload.output + 16) * token_bytes / 2**30
    return Config(model=ModelConfig(model=folder, dtype="float32"), kv=KvConfig(device_gib=max(gib, 0.1)))


async def _compete(report: Report, workload: Workload, ours: Daemon, theirs: Any) -> None:
    thread = ThreadPoolExecutor(1, "transformers")
    serving = asyncio.create_task(ours.engine.run())
    await asyncio.sleep(0)
    contenders: dict[str, Contender] = {
        "terrace": lambda prompts, output: terrace(ours, prompts, output),
        "generate": lambda prompts, output: _in(thread, generate, theirs, prompts, output),
        "continuous": lambda prompts, output: _in(thread, continuous, theirs, prompts, output),
    }
    columns = [f"{name} {what}" for name in contenders for what in ("tok/s", "TTFT ms")]
    report.header("requests", *(f"{column:>20}" for column in columns), "/ generate", "/ continuous", "same tokens")
    random = torch.Generator().manual_seed(1)
    for concurrency in workload.concurrency:
        turns = []
        for repeat in range(-1, workload.repeats):  # the first turn is short, warms up and does not count
            shape = (concurrency, workload.prompt)
            prompts = torch.randint(0, workload.vocab, shape, generator=random).tolist()
            output = workload.output if repeat >= 0 else min(8, workload.output)
            turn = await _turn(contenders, prompts, output, reverse=repeat % 2 == 1)
            if repeat >= 0:
                turns.append(turn)
                _keep(report, concurrency, repeat, turn)
        _show(report, concurrency, turns)
    await ours.engine.drain(30)
    await serving
    await ours.runner.aclose()
    thread.shutdown()


async def _in(thread: ThreadPoolExecutor, function: Callable[..., Outcome], *arguments: Any) -> Outcome:
    return await asyncio.get_running_loop().run_in_executor(thread, function, *arguments)


async def _turn(
    contenders: dict[str, Contender], prompts: Prompts, output: int, *, reverse: bool
) -> dict[str, Outcome]:
    names = list(contenders)
    return {name: await contenders[name](prompts, output) for name in (reversed(names) if reverse else names)}


async def terrace(daemon: Daemon, prompts: Prompts, output: int) -> Outcome:
    """All prompts at once through the engine."""
    params = SamplingParams(max_tokens=output, temperature=0.0)
    started = time.perf_counter()

    async def one(prompt: Sequence[int]) -> tuple[float, list[int]]:
        stream = daemon.engine.submit(GenerateSpec(prompt, params))
        first_s, tokens = 0.0, []
        async for events in stream:
            first_s = first_s or time.perf_counter() - started
            tokens += [event.token for event in events if event.token is not None]
        stream.close()
        return first_s, tokens

    done = await asyncio.gather(*(one(prompt) for prompt in prompts))
    seconds = time.perf_counter() - started
    return Outcome(seconds, [first_s for first_s, _ in done], [tokens for _, tokens in done])


class _FirstToken(LogitsProcessor):
    """Notes when the logits of the first new token were there."""

    at: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.at = self.at or time.perf_counter()
        return scores


@torch.inference_mode()
def generate(model: Any, prompts: Prompts, output: int) -> Outcome:
    """All prompts as one batch of `generate`; they are equally long, so that nothing is padded."""
    first = _FirstToken()
    ids = torch.tensor(prompts)
    started = time.perf_counter()
    result = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_config=GenerationConfig(max_new_tokens=output, do_sample=False, pad_token_id=0),
        logits_processor=LogitsProcessorList([first]),
    )
    seconds = time.perf_counter() - started
    assert first.at is not None
    return Outcome(seconds, [first.at - started] * len(prompts), result[:, ids.shape[1] :].tolist())


def continuous(model: Any, prompts: Prompts, output: int) -> Outcome:
    """All prompts at once through transformers' continuous batching; its start-up does not count."""
    sizes = ContinuousBatchingConfig(page_size=32, num_blocks=64 * 16, max_batch_tokens=2048, use_cuda_graph=False)
    chosen = GenerationConfig(max_new_tokens=output, do_sample=False, eos_token_id=-1, pad_token_id=0)
    done: dict[str, Any] = model.generate_batch(
        prompts,
        generation_config=chosen,
        continuous_batching_config=sizes,
        record_timestamps=True,
        warmup=False,
    )
    started = min(result.created_time for result in done.values())
    ended = max(result.timestamps[-1] for result in done.values())
    first_s = [result.timestamps[0] - started for result in done.values()]
    return Outcome(ended - started, first_s, [list(result.generated_tokens) for result in done.values()])


def _keep(report: Report, concurrency: int, repeat: int, turn: dict[str, Outcome]) -> None:
    for name, outcome in turn.items():
        report.keep(
            contender=name,
            requests=concurrency,
            repeat=repeat,
            seconds=outcome.seconds,
            tokens_per_s=outcome.tokens_per_s,
            first_s=outcome.first_s,
        )


def _show(report: Report, concurrency: int, turns: list[dict[str, Outcome]]) -> None:
    cells = []
    for name in turns[0]:
        cells.append(_spread([turn[name].tokens_per_s for turn in turns]))
        cells.append(_spread([quantile(turn[name].first_s, 0.5) * 1e3 for turn in turns]))
    for rival in ("generate", "continuous"):
        ratios = [turn["terrace"].tokens_per_s / turn[rival].tokens_per_s for turn in turns]
        cells.append(f"{median(ratios):.2f} x")
    pairs = [pair for turn in turns for pair in zip(turn["terrace"].tokens, turn["generate"].tokens, strict=True)]
    same = sum(ours == theirs for ours, theirs in pairs) / len(pairs)
    report.row(concurrency, *(f"{cell:>20}" for cell in cells[:6]), *cells[6:], f"{same:.0%}")


def _spread(samples: list[float]) -> str:
    return f"{median(samples):.0f} [{min(samples):.0f}-{max(samples):.0f}]"
