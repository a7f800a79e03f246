"""A whole daemon over a real socket on a model made in a second: random weights, one token per byte."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
import uvicorn
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from server.api.app import create_app
from server.build import Daemon, build, service_of
from server.config import Config, load_config
from server.engine import EngineSnapshot
from server.process import http_config, run_batches

NAME = "tiny"
HERMES_TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""Tools and calls as models of that family get and write them."""
CONTEXT = 512
SPECIALS = ("<|bos|>", "<|eos|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
T = TypeVar("T")


def write_model(folder: Path, context: int = CONTEXT, template: str = CHAT_TEMPLATE) -> Path:
    """A Llama of two layers as Hugging Face writes it, without weights: serve it with `load_format=dummy`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE(vocab={_byte_name(byte): byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIALS])
    tokenizer.save(str(folder / "tokenizer.json"))
    bos, eos = SPECIALS
    files: dict[str, Any] = {
        "config.json": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "vocab_size": tokenizer.get_vocab_size(),
            "max_position_embeddings": context,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "torch_dtype": "float32",
            "bos_token_id": tokenizer.token_to_id(bos),
            "eos_token_id": tokenizer.token_to_id(eos),
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": bos,
            "eos_token": eos,
            "chat_template": template,
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def tiny_config(folder: Path, **overrides: Any) -> Config:
    """Configuration for `folder`; 2 MiB of KV is 512 blocks, 8,192 tokens."""
    settings = {
        "model.model": str(folder),
        "model.served_model_name": NAME,
        "model.load_format": "dummy",
        "model.threads": 1,
        "kv.device_gib": 2 / 1024,
    }
    return load_config(settings | overrides, environ={})


def _byte_name(byte: int) -> str:
    """How byte-level tokenizers write `byte`: printable ones as themselves, the others from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return chr(byte) if byte in plain else chr(0x100 + [b for b in range(256) if b not in plain].index(byte))


def fuzz_config(folder: Path) -> Config:
    """Short contexts and few choices, so that a valid request is soon done; files and batches are on."""
    limits = {"model.max_model_len": 96, "server.max_choices": 4, "server.max_prompts_per_request": 4}
    kept = {"batch.data_path": str(folder / "data"), "batch.data_min_free_gib": 0}
    return tiny_config(folder, **limits, **kept)


@dataclass(frozen=True)
class Served:
    """A running daemon and how to reach it. `call` runs a function on its loop thread, where its state may be read."""

    url: str
    daemon: Daemon
    loop: asyncio.AbstractEventLoop

    def call(self, function: Callable[[], T]) -> T:
        async def run() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(30)

    def snapshot(self) -> EngineSnapshot:
        return self.call(self.daemon.engine.snapshot)

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, trust_env=False, **options)


class ServerThread:
    """Runs a daemon's loop in a thread of its own until the context ends, then drains it."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._up = threading.Event()
        self._stop: asyncio.Event | None = None
        self._served: Served | None = None
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="daemon")

    def __enter__(self) -> Served:
        self._thread.start()
        self._up.wait(120)
        if self._failure is not None:
            raise self._failure
        assert self._served is not None, "the daemon did not come up"
        return self._served

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        assert self._served is not None, "entered before left"
        assert self._stop is not None, "entered before left"
        self._served.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(60)
        assert not self._thread.is_alive(), "the daemon did not stop"
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits
            self._failure = error
        finally:
            self._up.set()

    async def _serve(self) -> None:
        daemon = build(self._config)
        service = service_of(daemon)
        http = uvicorn.Server(http_config(create_app(service), self._config))
        listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self._stop = asyncio.Event()
        engine = asyncio.create_task(daemon.engine.run())
        batches = asyncio.create_task(run_batches(service))
        status = asyncio.create_task(service.status.run())
        # serve() would take over the process's signals, which belong to the test run.
        serving = asyncio.create_task(http._serve([listener]))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        while not http.started or daemon.engine.state == "starting":  # noqa: ASYNC110 - neither has an event
            await asyncio.sleep(0.01)
        self._served = Served(url, daemon, asyncio.get_running_loop())
        self._up.set()
        await self._stop.wait()
        batches.cancel()
        await asyncio.gather(batches, return_exceptions=True)
        await daemon.engine.drain(30)
        status.cancel()
        http.should_exit = True
        await serving
        await engine
        await daemon.aclose()


class Wait:
    """Repeats a check until it holds; the bound only keeps a broken daemon from hanging the test run."""

    def __init__(self, seconds: float = 60.0) -> None:
        self._event = threading.Event()
        self._left = int(seconds / 0.02)

    def until(self, check: Callable[[], bool], what: str) -> Self:
        while not check():
            self._left -= 1
            assert self._left > 0, f"never happened: {what}"
            self._event.wait(0.02)
        return self


class ServeProcess:
    """`terrace serve` as a process of its own. It starts when entered; what still runs at the end is killed."""

    def __init__(self, log: Path, *arguments: str, module: Sequence[str] = ("server",)) -> None:
        """`log` gets what it says on stderr. `module`: what is run in place of the command, and what it wants first."""
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        self._command = [sys.executable, "-m", *module, "serve", *arguments, "--port", str(port)]

    def __enter__(self) -> Self:
        environ = {name: value for name, value in os.environ.items() if not name.startswith("TERRACE_")}
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=log, env=environ)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.process.kill()
        self.process.wait()

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    def ready(self) -> Self:
        """Returns at the first 200 of /readyz; until then it answers with 503 or not at all."""

        def answers() -> bool:
            assert self.process.poll() is None, f"the daemon ended before it was ready: {self.said()}"
            try:
                return httpx.get(f"{self.url}/readyz", trust_env=False).status_code == 200
            except httpx.TransportError:
                return False

        Wait().until(answers, "the daemon is ready")
        return self

    def said(self) -> str:
        return self._log.read_text()

    def stop(self, number: int) -> int:
        """Send a signal and wait for the end; the exit code."""
        self.process.send_signal(number)
        return self.process.wait(60)

    def metric(self, name: str) -> float:
        """The sum of one metric over its labels."""
        with self.client() as http:
            lines = http.get("/metrics").text.splitlines()
        values = [float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name}{{", f"{name} "))]
        assert values, f"no metric is called {name}"
        return sum(values)


def start(folder: Path, *flags: str) -> tuple[subprocess.Popen[str], str]:
    """`terrace serve` on a free port, ready; the process and its URL."""
    command = [sys.executable, "-m", "server", "serve", str(folder), "--load-format", "dummy", "--port", "0"]
    command += ["--served-model-name", NAME, "--device-gib", "0.01", "--threads", "1", *flags]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TERRACE_")}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environ)
    assert process.stdout is not None
    for line in process.stdout:
        if match := re.search(r"curl -s (http://[^/]+)/v1", line):
            url = match[1]
            break
    else:
        raise AssertionError(f"the daemon ended with {process.wait()} before it was ready")

    def ready() -> bool:
        try:
            return httpx.get(f"{url}/readyz", trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    Wait().until(ready, "the daemon is ready")
    return process, url
