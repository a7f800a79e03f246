"""Make the demo model from nothing: tokenizer, training, checkpoint.

``python -m server.demo.train --out DIR`` runs the stages below in order, one skill at a time: repeat a
sequence; recall the value that a key had, whatever stands between; answer questions about documents;
then longer and longer documents.  Each stage draws from its own seed and leaves a checkpoint in
``--work``, so that a run that was cut off goes on with ``--resume`` as if it had not been.
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
from server.demo.network import Llama, Shape, widened
from server.demo.tokenizer import END_OF_TEXT, VOCAB_SIZE, save_tokenizer, train_tokenizer

SEED = 1
TOKENIZER = Path(__file__).parent / "model" / "tokenizer.json"
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
    gaps: tuple[int, ...] = (0, 1, 2, 3)  # of the task "gaps": words between key and value
    widen: bool = False  # double the heads' width first


STAGES = (
    Stage("repeats", 300, (3e-3, 3e-3), ("repeat",), (64,), tokens=4096),
    Stage("pairs", 300, (3e-3, 3e-3), ("pairs", "pairs", "repeat"), (96,)),
    Stage("documents", 500, (3e-3, 2e-3), ("documents", "pairs"), (128,)),
    Stage("documents-128", 600, (2e-3, 2e-3), ("documents",), (128,)),
    Stage("wide", 150, (2e-3, 2e-3), ("documents",), (128, 256, 256), widen=True),
    Stage("to-512", 150, (2e-3, 2e-3), ("documents",), (128, 256, 512, 512)),
    Stage("segments", 150, (1.5e-3, 1.5e-3), ("segments", "segments", "documents"), (128, 256, 256)),
    Stage("recitals", 150, (1.5e-3, 1.5e-3), ("recitals", "recitals", "documents"), (128, 256)),
    Stage("gap-1", 75, (2e-3, 2e-3), ("gaps",), (64,), gaps=(1,)),
    Stage("gap-2", 75, (2e-3, 2e-3), ("gaps",), (64,), gaps=(1, 2, 2)),
    Stage("gap-3", 100, (2e-3, 2e-3), ("gaps",), (128,), gaps=(1, 2, 3, 3)),
    Stage("gap-4", 75, (2e-3, 2e-3), ("gaps", "gaps", "recitals"), (128,), gaps=(2, 3, 4, 4)),
    Stage("recitals-2", 75, (2e-3, 2e-3), ("recitals", "recitals", "documents"), (128, 256)),
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
            "pairs": self._pairs,
            "segments": self._segments,
            "gaps": self._gaps,
            "recitals": self._recitals,
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

    def _pairs(self, rows: int, length: int) -> Batch:
        """Records of key, filler, value; then the records again in another order with other fillers."""
        tokens = np.full((rows, length + 1), self._pad, np.int64)
        weights = np.zeros((rows, length), np.float32)
        for row in range(rows):
            record, values = self._record_batch(length)
            tokens[row, : len(record)] = record
            weights[row, : len(record) - 1] = values[1:]
        return tokens[:, :-1], tokens[:, 1:], weights

    def _record_batch(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        rng = self._rng
        key_size, value_size, gap = int(rng.integers(1, 3)), int(rng.integers(1, 3)), int(rng.integers(0, 4))
        size = key_size + gap + value_size
        count = (length + 1) // (2 * size)
        words = rng.permutation(self._words)
        fillers, words = words[:12], words[12:]
        keys = words[: count * key_size].reshape(count, key_size)
        words = words[count * key_size :]
        values = rng.choice(words, (count, value_size))
        order = rng.permutation(count)
        first = np.concatenate([keys, rng.choice(fillers, (count, gap)), values], 1)
        again = np.concatenate([keys, rng.choice(fillers, (count, gap)), values], 1)[order]
        mask = np.zeros((2 * count, size), np.float32)
        mask[count:, key_size + gap :] = 1
        return np.concatenate([first, again]).reshape(-1), mask.reshape(-1)

    def _gaps(self, rows: int, length: int) -> Batch:
        """Records of a key, the same few words each time, and a value; then all in another order.

        Only the key tells the records apart, and it stands ``gap`` words before the value: the model has
        to look that far back, which it learns one distance at a time.
        """
        rng = self._rng
        tokens = np.full((rows, length + 1), self._pad, np.int64)
        weights = np.zeros((rows, length), np.float32)
        for row in range(rows):
            gap = int(rng.choice(self._stage.gaps))
            size = gap + 2
            count = (length + 1) // (2 * size)
            words = rng.permutation(self._words)
            records = np.empty((count, size), np.int64)
            records[:, 0], records[:, 1:-1] = words[gap : gap + count], words[:gap]
            records[:, -1] = rng.choice(words[gap + count :], count)
            both = np.concatenate([records, records[rng.permutation(count)]]).reshape(-1)
            tokens[row, : len(both)] = both
            weights[row, len(both) // 2 + size - 2 : len(both) - 1 : size] = 1
        return tokens[:, :-1], tokens[:, 1:], weights

    def _segments(self, rows: int, length: int) -> Batch:
        """Short random sentences with many words in common, then all again in another order.

        A word alone does not tell what follows, only the four or five before it do: the skill that
        documents need, taught with many times as many targets per token.
        """
        rng = self._rng
        tokens = np.full((rows, length + 1), self._pad, np.int64)
        weights = np.zeros((rows, length), np.float32)
        for row in range(rows):
            size = int(rng.integers(7, 13))
            count = (length + 1) // (2 * size)
            words = rng.permutation(self._words)[: int(rng.choice((32, 80, 400)))]
            segments = rng.choice(words, (count, size))
            common = rng.random((count, size)) < rng.choice((0.2, 0.4, 0.5))
            segments = np.where(common, rng.choice(words[:8], (count, size)), segments)
            both = np.concatenate([segments, segments[rng.permutation(count)]]).reshape(-1)
            mask = np.zeros((2 * count, size), np.float32)
            mask[count:, 4:] = 1
            tokens[row, : len(both)] = both
            weights[row, : len(both) - 1] = mask.reshape(-1)[1:]
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

    def _recitals(self, rows: int, length: int) -> Batch:
        """Facts, then the same facts in another order: the loss is on the last three tokens of each."""
        tokens = np.full((rows, length + 1), self._pad, np.int64)
        weights = np.zeros((rows, length), np.float32)
        for row in range(rows):
            text, again = corpus.recital(self._text_rng, length)
            ids = self._tokenizer.encode(text).ids
            for sentence in self._tokenizer.encode_batch([" " + s for s in again]):
                ids += sentence.ids
                if len(ids) <= length:
                    weights[row, len(ids) - 4 : len(ids) - 1] = 1
            n = min(length + 1, len(ids))
            tokens[row, :n] = ids[:n]
        return tokens[:, :-1], tokens[:, 1:], weights

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
    warm = 50 if stage.widen or stage is STAGES[0] else 1
    started = time.time()
    seen: dict[str, list[tuple[float, float]]] = {}
    batches = Batches(tokenizer, stage)
    for step, batch in enumerate(batches):
        part = step / stage.steps
        rate = stage.rates[0] * (1 - part) + stage.rates[1] * part
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / warm)
        loss, mean, right = loss_of(model, hidden_of, batch, args.device, stage.bf16)
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
        if stage.widen:
            model = widened(model)
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
