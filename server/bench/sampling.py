"""The native choice of tokens beside torch's, both as the sampler asks for them, in turns.

Logits of a model that is sure of itself and of one that is not: of the first a few tokens hold nearly all of the mass,
of the second thousands do.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from statistics import median

import torch
from torch import Tensor

from server.bench.report import Report
from server.runner.sampling import Sampler
from server.types import SampleSpec, SamplingParams

ROUNDS = 15
VOCABS = (32_000, 151_936)
ROWS = (1, 16)
SPREADS = {"sure": 4.0, "unsure": 1.0}
"""Standard deviations of random logits."""
WAYS: dict[str, dict[str, float]] = {
    "temperature": {"temperature": 1.0},
    "top_p": {"temperature": 0.7, "top_p": 0.95},
    "top_k": {"temperature": 0.7, "top_k": 40},
    "all": {"temperature": 0.7, "top_k": 40, "top_p": 0.95, "min_p": 0.05},
}


def run(*, quick: bool = False) -> Report:
    report = Report("sampling", quick=quick)
    report.header("vocabulary", "rows", "logits", "way", "native ms", "torch ms", "torch/native", "the same tokens")
    for vocab in VOCABS[:1] if quick else VOCABS:
        for rows in ROWS:
            for name, spread in SPREADS.items():
                logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(rows)) * spread
                for way, params in WAYS.items():
                    _measure(report, logits, name, way, params, 1 if quick else ROUNDS)
    return report


def _measure(report: Report, logits: Tensor, spread: str, way: str, params: Mapping[str, float], rounds: int) -> None:
    rows, vocab = logits.shape
    native, plain = Sampler(vocab), Sampler(vocab)
    plain.use_torch()
    turns, same = [], 0
    for number in range(rounds + 1):
        specs = [SampleSpec(SamplingParams(9, seed=number, **params), row, 0, range(row)) for row in range(rows)]  # type: ignore[arg-type]
        (native_s, ours), (torch_s, theirs) = (_timed(sampler, logits, specs) for sampler in (native, plain))
        if number:  # the first one warms up
            turns.append((native_s, torch_s))
            same += sum(a == b for a, b in zip(ours, theirs, strict=True))
    native_s, torch_s = (median(times) for times in zip(*turns, strict=True))
    ratio = median(b / a for a, b in turns)
    times = (f"{native_s * 1e3:.2f}", f"{torch_s * 1e3:.2f}", f"{ratio:.1f}")
    report.row(f"{vocab:,}", str(rows), spread, way, *times, f"{same / rows / rounds:.0%}")
    report.keep(vocab=vocab, rows=rows, logits=spread, way=way, turns_s=turns, same=same)
    if rounds > 1:
        report.goal(f"{vocab} tokens, {rows} rows, {spread}, {way}: no slower than torch", met=ratio >= 1)


def _timed(sampler: Sampler, logits: Tensor, specs: list[SampleSpec]) -> tuple[float, list[int]]:
    began_s = time.perf_counter()
    tokens = sampler.choose(logits, range(len(specs)), specs)
    return time.perf_counter() - began_s, tokens.tolist()
