"""Measure recall: the share of held-out questions that are answered with exactly the stated fact.

``python -m server.demo.recall`` runs the model with transformers and its own full cache;
``--url http://127.0.0.1:8000`` asks the same questions of a running OpenAI-compatible server.  Prints a
table of context length by format; the exit code is 1 if any cell lies below ``--floor``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

from server.demo import corpus

MODEL = Path(__file__).parent / "model"
MAX_NEW_TOKENS = 40
# format -> kind and number of questions; the last question is the one measured
FORMATS = {"completion": ("completion", 1), "chat": ("chat", 1), "turns": ("chat", 4)}

Answerer = Callable[[list[corpus.Example]], list[str]]


def local_answerer(folder: Path, threads: int, batch: int) -> Answerer:
    """Answers by transformers' greedy ``generate``; an answer that does not end is marked as wrong."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if threads:
        torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def prompt(example: corpus.Example) -> str:
        if example.kind == "completion":
            return example.prompt
        return str(tokenizer.apply_chat_template(example.messages, tokenize=False, add_generation_prompt=True))

    def answer(examples: list[corpus.Example]) -> list[str]:
        answers: list[str] = []
        for start in range(0, len(examples), batch):
            texts = [prompt(e) for e in examples[start : start + batch]]
            inputs = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
            with torch.inference_mode():
                out = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
            for row in out[:, inputs["input_ids"].shape[1] :]:
                ended = bool((row == tokenizer.eos_token_id).any())
                text = str(tokenizer.decode(row, skip_special_tokens=True))
                answers.append(text if ended else text + " ...")
        return answers

    return answer


def url_answerer(url: str, model: str, key: str | None) -> Answerer:
    """Answers by a server's /v1/completions and /v1/chat/completions at temperature 0."""
    import httpx

    client = httpx.Client(
        base_url=url.rstrip("/").removesuffix("/v1"),
        timeout=300,
        headers={"Authorization": f"Bearer {key}"} if key else {},
    )

    def answer_one(example: corpus.Example) -> str:
        body = {"model": model, "temperature": 0, "max_tokens": MAX_NEW_TOKENS}
        if example.kind == "completion":
            reply = client.post("/v1/completions", json={**body, "prompt": example.prompt})
        else:
            reply = client.post("/v1/chat/completions", json={**body, "messages": example.messages})
        reply.raise_for_status()
        choice = reply.json()["choices"][0]
        text = choice["text"] if example.kind == "completion" else choice["message"]["content"]
        return str(text) + ("" if choice["finish_reason"] == "stop" else " ...")

    def answer(examples: list[corpus.Example]) -> list[str]:
        return [answer_one(example) for example in examples]

    return answer


def served_model(url: str, key: str | None) -> str:
    """The first model that the server lists."""
    import httpx

    headers = {"Authorization": f"Bearer {key}"} if key else {}
    reply = httpx.get(url.rstrip("/").removesuffix("/v1") + "/v1/models", headers=headers, timeout=60)
    reply.raise_for_status()
    return str(reply.json()["data"][0]["id"])


def measure(answerer: Answerer, length: int, form: str, count: int, within: float = 1.0, show: int = 0) -> float:
    """Recall over ``count`` held-out questions of one length and format; prints the first ``show`` misses."""
    kind, questions = FORMATS[form]
    tasks = [corpus.example(seed, length, kind, questions, within=within) for seed in range(count)]
    answers = answerer(tasks)
    wrong = [(t, a) for t, a in zip(tasks, answers, strict=True) if a.strip() != t.answer]
    for task, got in wrong[:show]:
        print(f"  {length} {form}: {task.question}\n    expected {task.answer}\n    got      {got.strip()}")
    return 1 - len(wrong) / count


def main() -> int:
    """Measure every cell, print the table, and judge it by the floor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL), help="model folder, or with --url the served model's name")
    parser.add_argument("--url", help="measure this OpenAI-compatible server")
    parser.add_argument("--key", help="API key for --url")
    parser.add_argument("--lengths", default="128,256,512,1024,2048")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--examples", type=int, default=100, help="questions per cell")
    parser.add_argument("--within", type=float, default=1.0, help="ask about this first share of the document")
    parser.add_argument("--floor", type=float, default=0.99)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--show", type=int, default=0, help="print this many misses per cell")
    args = parser.parse_args()
    if args.url:
        name = served_model(args.url, args.key) if args.model == str(MODEL) else args.model
        answerer = url_answerer(args.url, name, args.key)
    else:
        answerer = local_answerer(Path(args.model), args.threads, args.batch)
    forms = args.formats.split(",")
    print("length  " + "  ".join(f"{form:>10}" for form in forms) + f"   (n = {args.examples} each)", flush=True)
    worst = 1.0
    for length in (int(n) for n in args.lengths.split(",")):
        started = time.time()
        cells = [measure(answerer, length, form, args.examples, args.within, args.show) for form in forms]
        worst = min(worst, *cells)
        row = "  ".join(f"{cell:>10.4f}" for cell in cells)
        print(f"{length:>6}  {row}   ({time.time() - started:.0f} s)", flush=True)
    print(f"lowest {worst:.4f}, floor {args.floor}")
    return 0 if worst >= args.floor else 1


if __name__ == "__main__":
    sys.exit(main())
