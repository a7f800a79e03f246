"""`python front.py ENGINE --model FOLDER --port PORT ...`: /v1/completions over an engine without an HTTP server that
takes token ids. Runs in the peer's environment and knows nothing of ours.

It is thin on purpose: what it costs would be held against the peer. One thread steps the engine; the event loop writes
what comes out. Only what the benchmark asks is there: a prompt of token ids, `max_tokens`, `temperature`, `top_p`,
streamed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import queue
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Deliver = Callable[[list[int] | None], object]
"""Gets new tokens, and None after the last ones. Called on the engine's thread."""


@dataclass(frozen=True)
class Asked:
    """One request; a temperature of 0 is greedy."""

    tokens: list[int]
    count: int
    temperature: float
    top_p: float


class Engine(Protocol):
    """Generates, many requests at once."""

    draws: bool
    """Whether it can do so by a temperature of the request."""

    def submit(self, number: int, asked: Asked, deliver: Deliver) -> None:
        """Start a request; from any thread."""


class OpenVino:
    """The continuous batching pipeline of OpenVINO GenAI; one thread steps it."""

    draws = True

    def __init__(self, args: argparse.Namespace) -> None:
        import openvino_genai as genai

        scheduler = genai.SchedulerConfig()
        scheduler.num_kv_blocks = args.kv_tokens // 32  # its block size on a CPU
        scheduler.max_num_batched_tokens = args.batch_tokens
        scheduler.enable_prefix_caching = True
        properties: dict[str, object] = {"INFERENCE_NUM_THREADS": args.threads}
        if args.precision:
            properties["INFERENCE_PRECISION_HINT"] = args.precision
        if args.kv_precision:
            properties["KV_CACHE_PRECISION"] = args.kv_precision
        self._genai = genai
        self._pipeline = genai.ContinuousBatchingPipeline(args.model, scheduler, "CPU", properties)
        self._new: queue.SimpleQueue[tuple[int, Asked, Deliver]] = queue.SimpleQueue()
        threading.Thread(target=self._loop, daemon=True).start()

    def submit(self, number: int, asked: Asked, deliver: Deliver) -> None:
        self._new.put((number, asked, deliver))

    def _loop(self) -> None:
        open_: dict[Any, Deliver] = {}
        while True:
            while not open_ or not self._new.empty():
                self._add(open_, *self._new.get())
            self._pipeline.step()
            for handle, deliver in list(open_.items()):
                while handle.can_read():
                    for output in handle.read().values():
                        deliver(list(output.generated_ids))
                if handle.get_status() != self._genai.GenerationStatus.RUNNING and not handle.can_read():
                    deliver(None)
                    del open_[handle]

    def _add(self, open_: dict[Any, Deliver], number: int, asked: Asked, deliver: Deliver) -> None:
        import numpy as np
        import openvino

        config = self._genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = asked.count
        config.ignore_eos = True
        config.do_sample = asked.temperature > 0
        if config.do_sample:
            config.temperature, config.top_p = asked.temperature, asked.top_p
        ids = openvino.Tensor(np.array([asked.tokens], np.int64))
        open_[self._pipeline.add_request(number, ids, config)] = deliver


class Transformers:
    """The continuous batching of transformers, which has a thread of its own; one way to choose for all requests."""

    draws = False

    def __init__(self, args: argparse.Namespace) -> None:
        import torch
        from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

        torch.set_num_threads(args.threads)
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.precision))
        page = 256
        batching = ContinuousBatchingConfig(
            page_size=page, num_blocks=args.kv_tokens // page, max_batch_tokens=args.batch_tokens
        )
        generation = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=16)
        self._manager = model.init_continuous_batching(generation, batching)
        self._manager.start()

    def submit(self, number: int, asked: Asked, deliver: Deliver) -> None:
        name, sent = str(number), 0

        def give(output: Any) -> None:
            nonlocal sent
            deliver(list(output.generated_tokens[sent:]))
            sent = len(output.generated_tokens)
            if output.is_finished() or output.error is not None:
                deliver(None)

        self._manager.register_result_handler(name, give)
        self._manager.add_request(asked.tokens, request_id=name, max_new_tokens=asked.count, streaming=True)


ENGINES: dict[str, Callable[[argparse.Namespace], Engine]] = {"openvino": OpenVino, "transformers": Transformers}


@dataclass
class Front:
    """HTTP/1.1 with kept connections, chunked answers. Loop thread."""

    engine: Engine
    texts: list[str]
    numbers: int = 0

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while (head := await reader.readuntil(b"\r\n\r\n")) and await self._answer(head, reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        request, *lines = head.decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines if line)
        if request.startswith("GET"):
            body = json.dumps({"object": "list", "data": [{"id": "model", "object": "model"}]}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        else:
            body = json.loads(await reader.readexactly(int(headers["content-length"])))
            asked = Asked(body["prompt"], body["max_tokens"], body.get("temperature", 1.0), body.get("top_p", 1.0))
            if asked.temperature and not self.engine.draws:
                writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
                await writer.drain()
                return True
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
            await self._stream(asked, writer)
        await writer.drain()
        return True

    async def _stream(self, asked: Asked, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[list[int] | None] = asyncio.Queue()
        self.numbers += 1
        self.engine.submit(self.numbers, asked, lambda new: loop.call_soon_threadsafe(pieces.put_nowait, new))
        sent = 0
        while (new := await pieces.get()) is not None:
            sent += len(new)
            if new:
                _event(writer, [{"index": 0, "text": "".join(self.texts[token] for token in new)}])
        prompt = len(asked.tokens)
        usage = {"prompt_tokens": prompt, "completion_tokens": sent, "total_tokens": prompt + sent}
        _event(writer, [], usage)
        _chunk(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")


def _event(writer: asyncio.StreamWriter, choices: list[dict[str, object]], usage: dict[str, int] | None = None) -> None:
    _chunk(writer, b"data: " + json.dumps({"choices": choices, "usage": usage}).encode() + b"\n\n")


def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(b"%x\r\n%s\r\n" % (len(data), data))


def texts_of(tokenizer: Path) -> list[str]:
    """The text of every token, by id."""
    import tokenizers

    known = tokenizers.Tokenizer.from_file(str(tokenizer))
    return [known.decode([token]) for token in range(known.get_vocab_size())]


async def serve(args: argparse.Namespace) -> None:
    front = Front(ENGINES[args.engine](args), texts_of(args.tokenizer))
    server = await asyncio.start_server(front.connection, "127.0.0.1", args.port, limit=1 << 24)
    await server.serve_forever()


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--precision", default="")
    parser.add_argument("--kv-precision", default="")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--kv-tokens", type=int, required=True)
    parser.add_argument("--batch-tokens", type=int, default=512)
    asyncio.run(serve(parser.parse_args(argv)))


if __name__ == "__main__":
    main(sys.argv[1:])
