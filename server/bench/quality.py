"""What lower precision costs in quality: perplexity and recall of the demo model, beside full precision.

The same held-out documents go through a daemon's engine in this process once per precision. Perplexity is of the
document's and the answer's tokens, by the log-probabilities that clients get; recall is the share of questions that are
answered with exactly the stated fact. A loss is relative to float32 weights and a float32 cache.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass

from server.bench.report import Report
from server.build import Daemon, build
from server.config import Config
from server.demo import corpus
from server.demo.recall import MAX_NEW_TOKENS
from server.engine import GenerateSpec
from server.types import SamplingParams

LENGTHS = (256, 1024)
COUNT, QUICK_COUNT = 100, 4


@dataclass(frozen=True)
class Precision:
    """Flags of `terrace serve`, and how much worse perplexity may be, as a share. Recall may lose a hundredth."""

    dtype: str = "float32"
    quantization: str = "none"
    kv_dtype: str = "float32"
    loss: float = 0.0

    @property
    def name(self) -> str:
        weights = self.dtype if self.quantization == "none" else self.quantization
        return f"{weights} weights, {self.kv_dtype} KV"


PRECISIONS = (
    Precision(),
    Precision(dtype="bfloat16", loss=0.005),
    Precision(quantization="int8", loss=0.005),
    Precision(quantization="w8a8", loss=0.005),
    Precision(quantization="int8-g32", loss=0.005),
    Precision(quantization="int4-g32", loss=0.02),
    Precision(quantization="w4a8", loss=0.02),
    Precision(kv_dtype="bfloat16", loss=0.005),
    Precision(kv_dtype="int8", loss=0.01),
)
RECALL_LOSS = 0.01


def run(*, quick: bool) -> Report:
    """Measure every precision; see the module's docstring."""
    report = Report("quality", quick=quick)
    report.header("precision", "perplexity", "loss", *(f"recall {length}" for length in LENGTHS))
    tasks = {length: list(corpus.examples(QUICK_COUNT if quick else COUNT, length)) for length in LENGTHS}
    first: tuple[float, list[float]] | None = None
    for precision in PRECISIONS:
        perplexity, recalls = asyncio.run(_measure(precision, tasks))
        first = first or (perplexity, recalls)
        loss = perplexity / first[0] - 1
        report.row(precision.name, f"{perplexity:.4f}", f"{loss:+.2%}", *(f"{recall:.1%}" for recall in recalls))
        report.keep(precision=precision.name, perplexity=perplexity, loss=loss, recall=recalls)
        if precision is not PRECISIONS[0]:
            words = f"{precision.name}: perplexity {loss:+.2%}, goal at most {precision.loss:.1%}"
            report.goal(words, met=loss <= precision.loss)
            lost = max(full - now for full, now in zip(first[1], recalls, strict=True))
            report.goal(f"{precision.name}: recall {-lost:+.1%}, goal within 1 %", met=lost <= RECALL_LOSS)
    return report


async def _measure(precision: Precision, tasks: dict[int, list[corpus.Example]]) -> tuple[float, list[float]]:
    model = {"dtype": precision.dtype, "quantization": precision.quantization}
    daemon = build(Config.model_validate({"model": model, "kv": {"device_gib": 0.5, "kv_dtype": precision.kv_dtype}}))
    serving = asyncio.create_task(daemon.engine.run())
    scores: list[float] = []
    recalls = []
    for examples in tasks.values():
        done = await asyncio.gather(*(_one(daemon, example) for example in examples))
        scores += [score for found, _ in done for score in found]
        recalls.append(sum(right for _, right in done) / len(done))
    await daemon.engine.drain(30)
    await serving
    await daemon.aclose()
    return math.exp(-sum(scores) / len(scores)), recalls


async def _one(daemon: Daemon, example: corpus.Example) -> tuple[list[float], bool]:
    """Log-probabilities of a prompt and its right answer, and whether the prompt alone leads to it."""
    asked, whole = (daemon.tokenizer.encode(text) for text in (example.prompt, f"{example.prompt} {example.answer}"))
    scored = await _generate(daemon, whole, SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0))
    ends = daemon.tokenizer.eos_token_ids
    answer = SamplingParams(max_tokens=MAX_NEW_TOKENS, temperature=0.0, stop_token_ids=ends)
    said = await _generate(daemon, asked, answer)
    return scored[1], daemon.tokenizer.decode(said[0]).strip() == example.answer


async def _generate(daemon: Daemon, prompt: Sequence[int], params: SamplingParams) -> tuple[list[int], list[float]]:
    """The new tokens, and log-probabilities of the prompt's where they are asked for."""
    stream = daemon.engine.submit(GenerateSpec(prompt, params))
    tokens: list[int] = []
    scores: list[float] = []
    async for events in stream:
        for event in events:
            scores += [entry.logprob for entry in event.prompt_logprobs or ()]
            tokens += [event.token] if event.token is not None else []
    stream.close()
    return tokens, scores
