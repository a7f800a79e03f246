"""`python -m tests.clients [NAME ...]`: clients that others wrote, against a daemon, each in an environment of its own.

Every client gets an answer, a stream, a call of a tool and an answer that a JSON schema holds; load testers run a short
load. What each does is in its own file, which knows nothing but the address. The environments are kept under
`.clients/`. The model is random, so tools must be required and schemas enforced. Exit code 1 if a client failed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

from tests.e2e.daemon import HERMES_TEMPLATE, NAME, ServeProcess, write_model

HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parents[1] / ".clients"
CONTEXT = 8192
TIMEOUT_S = 300
CLIENTS = {
    "langchain": ("langchain-openai", ["{python}", "langchain_client.py", "{url}"]),
    "llama_index": ("llama-index-llms-openai-like", ["{python}", "llama_index_client.py", "{url}"]),
    "litellm": ("litellm", ["{python}", "litellm_client.py", "{url}"]),
    "guidellm": (
        "guidellm",
        ["{bin}/guidellm", "run", "--backend", "kind=openai_http,target={url},model=" + NAME,
         "--tokenizer", "kind=huggingface_auto,model={folder}", "--profile", "kind=concurrent,streams=4",
         "--constraint", "kind=max_requests,count=24", "--constraint", "kind=max_errors,count=1",
         "--data", "kind=synthetic_text,prompt_tokens=64,output_tokens=16",
         "--output", "kind=json,path={folder}/out.json",
         "--disable-console-interactive"],
    ),
    "aiperf": ("aiperf", ["{python}", "aiperf_client.py", "{url}", "{folder}", NAME]),
}  # fmt: skip
"""By name: what is installed, and the command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the named clients, all by default."""
    parser = argparse.ArgumentParser(prog="python -m tests.clients", description="Clients that others wrote.")
    parser.add_argument("names", nargs="*", choices=[[], *CLIENTS], metavar="NAME", help=", ".join(CLIENTS))
    names = parser.parse_args(argv).names or list(CLIENTS)
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_model(Path(scratch) / "model", CONTEXT, HERMES_TEMPLATE)
        arguments = (str(folder), "--load-format", "dummy", "--served-model-name", NAME, "--device-gib", "64MiB")
        with ServeProcess(Path(scratch) / "log", *arguments) as server:
            server.ready()
            for name in names:
                done = _run(name, server.url, folder)
                failed += done.returncode != 0
                print(f"{name:12} {'ok' if done.returncode == 0 else 'FAILED'}", flush=True)
                if done.returncode:
                    print(done.stdout[-3000:])
    return int(failed > 0)


def _run(name: str, url: str, folder: Path) -> subprocess.CompletedProcess[str]:
    requirement, command = CLIENTS[name]
    place = ENVIRONMENTS / name
    python = place / "bin" / "python"
    if not (place / ".installed").exists():
        venv.create(place, with_pip=True)
        subprocess.run([python, "-m", "pip", "-q", "install", requirement], check=True)
        (place / ".installed").touch()
    words = {"python": str(python), "bin": str(python.parent), "url": url, "folder": str(folder)}
    return subprocess.run(
        [word.format(**words) for word in command], cwd=HERE, text=True, timeout=TIMEOUT_S,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
