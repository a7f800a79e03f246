"""Make the demo model from nothing: tokenizer, training, checkpoint.

``python -m server.demo.train --out DIR`` runs the stages below in order, one skill at a time: repeat a
sequence; answer questions about documents; then longer and longer documents.  Each stage draws from its
own seed and leaves a checkpoint in ``--work``, so that a run that was cut off goes on with ``--resume``
as if it had not been.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from server.demo import corpus
from server.demo.network import Llama, Shape, tie_twins
from server.demo.tokenizer import END_OF_TEXT, VOCAB_SIZE, save_tokenizer, train_tokenizer

SEED = 1
TOKENIZER = Path(__file__).parent / "model" / "tokenizer.json"
COMPILED_LENGTH = 512  # compiling for each longer length takes minutes
OTHER_WEIGHT, OTHER_SHARE = 0.1, 0.1  # the text between the answers: a little loss on a sample of it


@dataclass(frozen=True)
class Stage:
    """Some steps on one mixture of tasks and lengths; the learning rate falls linearly within it.

    ``tasks`` and ``lengths`` are drawn from per step, so a length listed twice is twice as likely.
    ``coined`` is the chance that a word of a fact is made up (in half of the documents).
    """

    name: str
    steps: int
    rates: tuple[float, float]
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    coined: float = 0.0
    noise: float = 0.05
    bf16: bool = False
    tokens: int = 8192  # per step
    twins: bool = False  # first give words at the start of a line the embedding that they have inside one


STAGES = (
    Stage("repeats", 300, (3e-3, 3e-3), ("repeat",), (64,), tokens=4096),
    Stage("documents-128", 200, (3e-3, 3e-3), ("documents",), (128,)),
    Stage("documents-256", 150, (3e-3, 2e-3), ("documents",), (128, 256, 256)),
    Stage("documents-512", 150, (2e-3, 2e-3), ("documents",), (128, 256, 512, 512)),
    Stage("anneal-512", 200, (2e-3, 1e-4), ("documents",), (128, 256, 512)),
    Stage("twins", 75, (2e-3, 2e-3), ("documents",), (128, 256, 512), twins=True),
    Stage("documents-2048", 100, (2e-3, 1.5e-3), ("documents",), (512, 1024, 2048), bf16=True),
    Stage("finish", 200, (1.5e-3, 5e-5), ("documents",), (64, 128, 256, 512, 1024, 2048)),
)

Batch = tuple[np.ndarray, np.ndarray, np.ndarray]  # tokens, targets (-1: none), weights


class Batches:
    """Makes training batches of one stage from the stage's own seed."""

    def __init__(self, tokenizer: Tokenizer, stage: Stage) -> None:
        self._tokenizer, self._stage = tokenizer, stage
        self._text_rng = random.Random(f"{SEED}/{stage.name}")
        self._rng = np.random.default_rng([SEED, *stage.name.encode()])
        words = {i for w in corpus.all_words() for i in tokenizer.encode(" " + w).ids}
        self._words = np.array(sorted(words))
        self.task = ""
        self._eos, self._pad = _token_id(tokenizer, corpus.IM_END), _token_id(tokenizer, END_OF_TEXT)

    def __iter__(self) -> Iterator[Batch]:
        makers: dict[str, Callable[[int, int], Batch]] = {
            "repeat": self._repeats,
            "documents": self._documents,
        }
        for _ in range(self._stage.steps):
            task = self._text_rng.choice(self._stage.tasks)
            length = self._text_rng.choice(self._stage.lengths)
            self.task = task
            yield makers[task](max(1, self._stage.tokens // length), length)

    def _repeats(self, rows: int, length: int) -> Batch:
        """Random words, then the same again (and again): the loss is on the repeats."""
        tokens = np.empty((rows, length + 1), np.int64)
        weights = np.zeros((rows, length), np.float32)
        for row in range(rows):
            n = int(self._rng.integers(length // 8, length // 2 + 1))
            words = self._rng.choice(self._words, n, replace=n > len(self._words))
            tokens[row] = np.resize(words, length + 1)
            weights[row, n:] = 1
        return tokens[:, :-1], tokens[:, 1:], weights

    def _documents(self, rows: int, length: int) -> Batch:
        """Documents with many questions: full loss on the answers and on the end token after each."""
        tokens = np.full((rows, length), self._pad, np.int64)
        targets = np.full((rows, length), -1, np.int64)
        weights = np.zeros((rows, length), np.float32)
        for row in range(rows):
            ids, goals, scores = self._encode(
                corpus.training_segments(self._text_rng, length, self._stage.coined, self._stage.noise)
            )
            n = min(length, len(ids) - 1)
            tokens[row, :n], targets[row, :n], weights[row, :n] = ids[:n], goals[:n], scores[:n]
        sample = (weights == 0) & (self._rng.random(weights.shape) < OTHER_SHARE) & (targets >= 0)
        weights[sample] = OTHER_WEIGHT
        return tokens, targets, weights

    def _encode(self, segments: list[corpus.Segment]) -> tuple[list[int], list[int], list[float]]:
        """Token ids, the target at each position, and the weight of that target's loss.

        The target of an answer's last token is the end token, even where the text goes on without one.
        """
        pieces = _join(segments)
        encoded = [e.ids for e in self._tokenizer.encode_batch([p.text for p in pieces])]
        ids: list[int] = []
        answers: list[tuple[int, int]] = []
        for piece, piece_ids in zip(pieces, encoded, strict=True):
            if piece.answer:
                answers.append((len(ids), len(ids) + len(piece_ids)))
            ids += piece_ids
        goals, scores = [*ids[1:], -1], [0.0] * len(ids)
        for start, end in answers:
            scores[start - 1 : end] = [1.0] * (end - start + 1)
            goals[end - 1] = self._eos
        return ids, goals, scores


def _token_id(tokenizer: Tokenizer, token: str) -> int:
    token_id = tokenizer.token_to_id(token)
    assert token_id is not None, token
    return token_id


def _join(segments: list[corpus.Segment]) -> list[corpus.Segment]:
    """Neighbouring non-answer segments as one, so that they are tokenized as they will be in use."""
    joined: list[corpus.Segment] = []
    for segment in segments:
        if joined and not segment.answer and not joined[-1].answer:
            joined[-1] = corpus.Segment(joined[-1].text + segment.text)
        else:
            joined.append(segment)
    return joined


def loss_of(
    model: Llama, hidden_of: Callable[[Tensor], Tensor], batch: Batch, device: str, bf16: bool
) -> tuple[Tensor, float, float]:
    """Weighted loss, and over the full-weight targets the mean loss and the share predicted right."""
    tokens, targets, weights = (torch.from_numpy(a).to(device) for a in batch)
    chosen = (weights > 0).reshape(-1).nonzero().squeeze(1)
    goal, weight = targets.reshape(-1)[chosen], weights.reshape(-1)[chosen]
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
        hidden = hidden_of(tokens)
        logits = model.logits(hidden.reshape(-1, hidden.shape[-1])[chosen])
    losses = F.cross_entropy(logits.float(), goal, reduction="none")
    with torch.no_grad():
        full = weight == 1
        right = (logits.argmax(-1) == goal)[full].float().mean().item()
        mean = losses[full].mean().item()
    return (losses * weight).sum() / weight.sum(), mean, right


def run_stage(
    stage: Stage, model: Llama, optimizer: torch.optim.Optimizer, tokenizer: Tokenizer, args: argparse.Namespace
) -> None:
    """Train one stage, with a line of progress every 25 steps."""
    hidden_of: Callable[[Tensor], Tensor] = torch.compile(model.hidden, dynamic=False) if args.compile else model.hidden
    warm = 50 if stage.twins or stage is STAGES[0] else 1
    started = time.time()
    seen: dict[str, list[tuple[float, float]]] = {}
    batches = Batches(tokenizer, stage)
    for step, batch in enumerate(batches):
        part = step / stage.steps
        rate = stage.rates[0] * (1 - part) + stage.rates[1] * part
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / warm)
        forward = hidden_of if batch[0].shape[1] <= COMPILED_LENGTH else model.hidden
        loss, mean, right = loss_of(model, forward, batch, args.device, stage.bf16)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen.setdefault(f"{batches.task} {batch[0].shape[1]}", []).append((mean, right))
        if (step + 1) % 25 == 0:
            _report(stage, step + 1, seen, time.time() - started)
            seen = {}


def _report(stage: Stage, step: int, seen: dict[str, list[tuple[float, float]]], seconds: float) -> None:
    """A line of progress: loss and share of right tokens by task and length since the last one."""
    parts = [
        f"{what}: {np.mean([s[0] for s in scores]):.4f} {np.mean([s[1] for s in scores]):.4f}"
        for what, scores in sorted(seen.items())
    ]
    speed = step * stage.tokens / seconds
    print(f"{stage.name} {step}/{stage.steps} {seconds:.0f} s, {speed:.0f} tokens/s; " + ", ".join(parts), flush=True)


def save_model(model: Llama, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the Hugging Face folder: weights, configuration, tokenizer, generation defaults."""
    save_tokenizer(tokenizer, folder, model.shape.positions)
    weights = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    bos, eos = _token_id(tokenizer, END_OF_TEXT), _token_id(tokenizer, corpus.IM_END)
    config = model.shape.hf_config(bos, eos, bos)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"bos_token_id": bos, "eos_token_id": [eos, bos], "pad_token_id": bos, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def _twins(tokenizer: Tokenizer) -> list[tuple[int, int]]:
    """Tokens of whole words without a leading space, each with the token of the same word with one."""
    vocab = tokenizer.get_vocab()
    return [(id, vocab["Ġ" + text]) for text, id in sorted(vocab.items()) if text.isalpha() and "Ġ" + text in vocab]


def _optimizer(model: Llama) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)


def _checkpoint(work: Path, stage: Stage) -> Path:
    return work / f"{STAGES.index(stage):02d}-{stage.name}.pt"


def main() -> None:
    """Run the stages and save the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--work", type=Path, help="folder for a checkpoint after each stage")
    parser.add_argument("--resume", action="store_true", help="skip the stages that --work has done")
    parser.add_argument("--new-tokenizer", action="store_true", help="train the tokenizer too, ids will change")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="torch.compile: a fifth faster, needs a C++ compiler")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    torch._dynamo.config.recompile_limit = 64  # one compilation per length
    tokenizer = train_tokenizer() if args.new_tokenizer else Tokenizer.from_file(str(TOKENIZER))
    model = Llama(Shape(vocab=VOCAB_SIZE)).to(args.device)
    optimizer = _optimizer(model)
    print(f"{sum(p.numel() for p in model.parameters())} parameters", flush=True)
    for stage in STAGES:
        path = _checkpoint(args.work, stage) if args.work else None
        if stage.twins:
            tie_twins(model, _twins(tokenizer))
            optimizer = _optimizer(model)
        if path and args.resume and path.exists():
            saved = torch.load(path, map_location=args.device)
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            print(f"{stage.name}: loaded", flush=True)
            continue
        run_stage(stage, model, optimizer, tokenizer, args)
        save_model(model, tokenizer, args.out)
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)


if __name__ == "__main__":
    main()
