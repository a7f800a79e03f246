"""The servers that are compared: how each is started at a precision, and what it makes of the checkpoint for that.

All cores for each, the same number of tokens of KV in its first tier, which is fp32 where the weights are; its own
defaults for everything else. What a server does not offer at a precision does not stand in its `kv`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from loadgen.daemon import Server, free_port
from loadgen.errors import UsageError
from loadgen.peers import shapes
from loadgen.peers.install import ENVIRONMENTS, ROOT, installed
from loadgen.peers.shapes import CONTEXT, Shape
from loadgen.report import terrace_version

MODELS = ENVIRONMENTS / "models"
HERE = Path(__file__).parent
PRECISIONS = ("fp32", "bf16", "int8", "int4")
"""Of the weights."""
KV_TOKENS = 8192
"""In the first tier, of every server."""
THREADS = os.cpu_count() or 1
SEQUENCES = 16
INT4_GROUP = 32
"""Weights that share a scale, of all that have int4."""
READY_S = 600.0
"""vLLM compiles at its first start."""
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
NICE = ("nice", "-n", "5")
"""The client shares the cores with the server: it must not wait for it."""

TERRACE_FLAGS = {
    "fp32": ("--dtype", "float32"),
    "bf16": ("--dtype", "bfloat16"),
    "int8": ("--dtype", "bfloat16", "--quantization", "w8a8"),
    "int4": ("--dtype", "bfloat16", "--quantization", "w4a8"),
}
TERRACE_KV_BYTES = {"fp32": 4, "bf16": 2, "int8": 2, "int4": 2}
"""Of one value, with these flags."""
LOWER_TIERS = {"dram": 1, "ssd": 4}
"""As multiples of the first."""


def with_environment(more: Mapping[str, str]) -> list[str]:
    """What to write before a command."""
    return ["env", *(f"{name}={value}" for name, value in more.items())]


@dataclass(frozen=True)
class Model:
    """A shape at a precision; the files that are made of it are kept."""

    shape: Shape
    precision: str

    @property
    def folder(self) -> Path:
        return MODELS / self.shape.name

    def checkpoint(self) -> Path:
        return shapes.write(self.shape, self.folder / "checkpoint")

    def made(self, name: str, command: Sequence[str | Path]) -> Path:
        """`command` with `{checkpoint}` and `{target}` in it makes the file or folder `name`, whole or not at all."""
        target = self.folder / name
        if not target.exists():
            partial = target.with_name(f"partial-{name}")
            words = {"checkpoint": str(self.checkpoint()), "target": str(partial)}
            filled = [str(word).format(**words) for word in command]
            done = subprocess.run([*with_environment(OFFLINE), *filled], capture_output=True, text=True, check=False)
            if done.returncode:
                raise UsageError(f"{name} could not be made: {done.stderr[-800:]}")
            partial.rename(target)
        return target


@dataclass(frozen=True)
class Start:
    """A command, with `{port}` and `{disk}` (an empty folder) in it."""

    command: Sequence[str | Path]
    ready: str
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Contender:
    """One server."""

    name: str
    kv: Mapping[str, str]
    """What it keeps KV in, by precision of the weights; those that are not there are not offered."""
    start: Callable[[Model], Start]
    version: Callable[[], str | None]
    """None: it is missing."""

    def served(self, model: Model, stack: ExitStack) -> Server:
        """Its server, running, until the end of `stack`. UsageError when it does not start."""
        start, port = self.start(model), free_port()
        disk = stack.enter_context(tempfile.TemporaryDirectory(dir=MODELS, prefix="ssd-"))
        words = [*with_environment({**OFFLINE, **start.environment}), *NICE, *start.command]
        command = [str(word).format(port=port, disk=disk) for word in words]
        return stack.enter_context(Server(command, port, ready=start.ready, ready_s=READY_S))

    def shown(self, model: Model) -> list[str]:
        """The command for the result: no path of this machine."""
        words = [str(word) for word in self.start(model).command]
        places = {f"{ROOT}/": "", sys.executable: "python"}
        for place, short in sorted(places.items(), key=lambda item: -len(item[0])):
            words = [word.replace(place, short) for word in words]
        return words


def terrace(model: Model) -> Start:
    block = model.shape.kv_values_per_token * TERRACE_KV_BYTES[model.precision] * KV_TOKENS
    mib = -(-block // 2**20)
    lower = [f"--{tier}-gib={times * mib}MiB" for tier, times in LOWER_TIERS.items()]
    return Start(
        [sys.executable, "-m", "server", "serve", model.checkpoint(), "--port={port}", "--log-level=warning",
         *TERRACE_FLAGS[model.precision], f"--device-gib={mib}MiB", *lower, "--ssd-path={disk}",
         f"--threads={THREADS}", f"--max-model-len={CONTEXT}"],
        "/readyz",
    )  # fmt: skip


def llama_cpp(model: Model) -> Start:
    """Without its flash attention: on a CPU it takes ten times as long for a short prompt behind a long prefix, and
    is no faster at decoding."""
    built = ENVIRONMENTS / "llama.cpp" / "build" / "bin" / "llama-server"
    script = [ENVIRONMENTS / "llama.cpp" / "bin" / "python", HERE / "gguf_file.py"]
    weights = model.made(f"{model.precision}.gguf", [*script, "{checkpoint}", "{target}", model.precision])
    kv = ["--cache-type-k", "f32", "--cache-type-v", "f32"] if model.precision == "fp32" else []
    return Start(
        [built if built.exists() else shutil.which("llama-server") or built, "--model", weights, "--host", "127.0.0.1",
         "--port", "{port}", "--ctx-size", str(KV_TOKENS), "--parallel", str(SEQUENCES), "--kv-unified",
         "--threads", str(THREADS), "--flash-attn", "off", "--no-ui", *kv],
        "/health",
    )  # fmt: skip


def openvino(model: Model) -> Start:
    place = ENVIRONMENTS / "openvino" / "bin"
    stored, computed = {"fp32": ("fp32", "f32"), "bf16": ("fp16", "bf16")}.get(model.precision, (model.precision, ""))
    groups = ["--group-size", str(INT4_GROUP), "--ratio", "1", "--sym"] if stored == "int4" else []
    ir = model.made(f"openvino-{stored}", [
        place / "optimum-cli", "export", "openvino", "--model", "{checkpoint}", "--task", "text-generation-with-past",
        "--weight-format", stored, *groups, "{target}",
    ])  # fmt: skip
    hint = ["--precision", computed] if computed else []
    hint += ["--kv-precision", computed] if model.precision == "fp32" else []
    return Start([place / "python", HERE / "front.py", "openvino", "--model", ir, *_front(model), *hint], "/v1/models")


def transformers(model: Model) -> Start:
    kind = {"fp32": "float32", "bf16": "bfloat16"}[model.precision]
    python = ENVIRONMENTS / "transformers" / "bin" / "python"
    return Start(
        [python, HERE / "front.py", "transformers", "--model", model.checkpoint(), *_front(model), "--precision", kind],
        "/v1/models",
    )


def _front(model: Model) -> list[str | Path]:
    return ["--tokenizer", model.checkpoint() / "tokenizer.json", "--port", "{port}", "--threads", str(THREADS),
            "--kv-tokens", str(KV_TOKENS)]  # fmt: skip


def vllm(model: Model) -> Start:
    place = ENVIRONMENTS / "vllm"
    folder = model.checkpoint()
    if model.precision == "int8":
        folder = shapes.write_int8(model.shape, folder, model.folder / "int8")
    preload = [path for path in (place / "lib" / "libiomp5.so", *TCMALLOC) if path.exists()]
    return Start(
        [place / "bin" / "python", "-m", "vllm.entrypoints.cli.main", "serve", folder, "--served-model-name", "model",
         "--host", "127.0.0.1", "--port", "{port}", "--max-model-len", str(CONTEXT), "--block-size", "32",
         "--dtype", "float32" if model.precision == "fp32" else "bfloat16",
         "--num-gpu-blocks-override", str(KV_TOKENS // 32), "--enable-prompt-tokens-details"],
        "/health",
        {"VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_HOST_IP": "127.0.0.1",
         "VLLM_CPU_OMP_THREADS_BIND": f"0-{THREADS - 1}", "VLLM_CACHE_ROOT": str(place / "cache"),
         "LD_PRELOAD": ":".join(map(str, preload))},
    )  # fmt: skip


TCMALLOC = (Path("/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4"),)
"""Where Debian puts it: vLLM advises it."""


def _kv(narrow: str) -> dict[str, str]:
    return {precision: "float32" if precision == "fp32" else narrow for precision in PRECISIONS}


CONTENDERS = (
    Contender("Terrace", _kv("bfloat16"), terrace, terrace_version),
    Contender("llama.cpp", _kv("float16"), llama_cpp, lambda: installed("llama.cpp")),
    Contender("openvino", _kv("uint8"), openvino, lambda: installed("openvino")),
    Contender("vllm", {"fp32": "float32", "bf16": "bfloat16", "int8": "bfloat16"}, vllm, lambda: installed("vllm")),
    Contender("transformers", {"fp32": "float32", "bf16": "bfloat16"}, transformers, lambda: installed("transformers")),
)
"""The first is ours."""
