"""The daemon as its supervisors see it: systemd's socket, signals, files that change under it, a step that hangs."""

from __future__ import annotations

import json
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import numpy as np
import pytest
from safetensors.numpy import save_file

from server.kvcache.tiers.check import list_caches
from tests.e2e.daemon import NAME, ServeProcess, Wait, write_model

LONG = {"prompt": "hello", "max_tokens": 4000, "ignore_eos": True, "stream": True}
SMALL = ("--device-gib=0.01", "--threads=1", f"--served-model-name={NAME}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "tiny", context=8192)


def test_a_life_from_ready_over_reloads_to_two_sigterms(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """READY when requests are taken, and the watchdog fed from then on. After SIGHUP a new key works and an old one
    does not, admin keys too; the log says more; a bad file changes nothing, what needs a restart is named, and no
    reload opens the daemon to all. A SIGTERM lets a stream go on, the second ends it with an error event, exit 0."""
    keys, file = tmp_path / "keys", tmp_path / "terrace.toml"
    keys.write_text("old-key\n")
    file.write_text(f'[server]\napi_key_file = "{keys}"\nlog_level = "info"\nadmin_keys = ["old-admin"]\n')
    arguments = (str(folder), "--load-format=dummy", *SMALL, "--config", str(file))
    with (
        systemd(tmp_path, monkeypatch) as heard,
        ServeProcess(tmp_path / "log", *arguments) as daemon,
        daemon.client() as http,
    ):
        Wait().until(lambda: any("READY=1" in text for text in heard), "READY")
        assert http.get("/readyz").status_code == 200
        assert heard[0].startswith("EXTEND_TIMEOUT_USEC=")
        Wait().until(lambda: sum("WATCHDOG=1" in text for text in heard) > 2, "the watchdog is fed")
        reload_keys(daemon, http, keys, file)
        headers = {"authorization": "Bearer new-key"}
        with http.stream("POST", "/v1/completions", json=LONG, headers=headers) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            daemon.process.send_signal(signal.SIGTERM)
            Wait().until(lambda: http.get("/readyz").status_code == 503, "it drains")
            body = http.get("/readyz").json()
            assert (body["status"], body["progress"]["running"]) == ("draining", 1)
            assert http.get("/livez").status_code == 200
            daemon.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line.startswith("data: ")]
        assert json.loads(rest[-1][6:])["error"]["code"] == "not_ready"
        assert daemon.process.wait(60) == 0
        assert "stopping now" in daemon.said()
        assert any(text.startswith("STOPPING=1\n") for text in heard)


def reload_keys(daemon: ServeProcess, http: httpx.Client, keys: Path, file: Path) -> None:
    """Change keys and log level under `daemon`."""

    def status(key: str, path: str = "/v1/models") -> int:
        return http.get(path, headers={"authorization": f"Bearer {key}"}).status_code

    def reload(said: str) -> None:
        before = daemon.said().count(said)
        daemon.process.send_signal(signal.SIGHUP)
        Wait().until(lambda: daemon.said().count(said) > before, said)

    assert (status("old-key"), status("new-key"), status("old-admin", "/v1/cache/stats")) == (200, 401, 200)
    keys.write_text("new-key\n")
    text = file.read_text().replace("info", "debug").replace("old-admin", "new-admin")
    file.write_text(text + "[kv]\nblock_size = 32\n")
    reload("reloaded: 0 tenants with 0 keys, 1 keys of nobody's name, 1 admin keys, log level debug")
    assert (status("old-key"), status("new-key")) == (401, 200)
    assert (status("old-admin", "/v1/cache/stats"), status("new-admin", "/v1/cache/stats")) == (401, 200)
    Wait().until(lambda: "holds after a restart only: kv.block_size" in daemon.said(), "what needs a restart")
    Wait().until(lambda: '"level": "debug"' in daemon.said(), "the level holds")
    file.write_text(text.replace("log_level", "log_levle"))
    reload("nothing was reloaded: unknown key 'server.log_levle'")
    file.write_text('[server]\nlog_level = "info"\n')
    reload("nothing was reloaded: no key is left")
    assert (status("new-key"), status("guess")) == (200, 401)


def test_weights_that_change_are_noticed_and_never_meet_old_blocks(tmp_path: Path, folder: Path) -> None:
    """Over a running daemon it warns and serves on what it loaded; the next start has another fingerprint and finds
    none of the old blocks."""
    save_weights(folder, seed=1)
    ssd = tmp_path / "ssd"
    tiers = ("--dram-gib=0.01", "--ssd-gib=0.1", f"--ssd-path={ssd}", "--ssd-min-free-gib=0")
    ask = {"prompt": "the quick brown fox jumps over the lazy dog " * 8, "max_tokens": 4, "temperature": 0}

    def run(*, change: bool = False) -> int:
        flags, module = (str(folder), *SMALL, *tiers), ("tests.e2e.planted", "watchful")
        with ServeProcess(tmp_path / "log", *flags, module=module) as daemon, daemon.client() as http:
            daemon.ready()
            if change:
                first = http.post("/v1/completions", json=ask).json()["choices"][0]["text"]
                save_weights(folder, seed=2)
                Wait().until(lambda: "files of the model changed (" in daemon.said(), "it warns")
                assert http.post("/v1/completions", json=ask).json()["choices"][0]["text"] == first
            usage = http.post("/v1/completions", json=ask).json()["usage"]
            assert daemon.stop(signal.SIGTERM) == 0
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert run(change=True) > 0
    (before,) = list_caches(ssd)
    assert run() == 0
    assert {info.fingerprint for info in list_caches(ssd)} - {before.fingerprint}


def test_a_hung_step_fails_liveness_and_starves_the_watchdog(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that never ends: after stuck_after_s /livez and /readyz are 503, the state and the stack of the device
    thread are in the log once, without a word of the prompt, systemd's watchdog starves, and a third signal ends it."""
    flags = (str(folder), "--load-format=dummy", *SMALL, "--stuck-after-s=1", "--shutdown-timeout-s=60")
    with (
        systemd(tmp_path, monkeypatch) as heard,
        ServeProcess(tmp_path / "log", *flags, module=("tests.e2e.planted", "hang")) as daemon,
        daemon.client() as http,
    ):
        daemon.ready()
        asking = threading.Thread(target=ask_in_vain, args=(daemon.url,))
        asking.start()
        Wait().until(lambda: http.get("/livez").status_code == 503, "it is not alive")
        assert http.get("/livez").json()["error"]["code"] == "engine_stuck"
        assert http.get("/readyz").json()["status"] == "stuck"
        Wait().until(lambda: " in hang\n" in daemon.said(), "the stacks are written")
        message = next(json.loads(line)["message"] for line in daemon.said().splitlines() if '"stuck: ' in line)
        assert json.loads(message.split("; ", 1)[1])["running_count"] == 1
        fed = len(heard)
        threading.Event().wait(2.5)
        assert len(heard) == fed
        assert daemon.said().count('"stuck: ') == 1
        assert "secret" not in daemon.said()
        for said in ("stopping: ", "stopping now: "):
            daemon.process.send_signal(signal.SIGTERM)
            Wait().until(lambda said=said: said in daemon.said(), said)
        assert daemon.stop(signal.SIGTERM) == 1
        asking.join(60)


# --- helpers ---------------------------------------------------------------------------------------------------------


def ask_in_vain(url: str) -> None:
    with suppress(httpx.TransportError):
        httpx.post(f"{url}/v1/completions", json={"prompt": "my secret", "max_tokens": 4}, timeout=60, trust_env=False)


@contextmanager
def systemd(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What a daemon started meanwhile says to systemd, which wants to hear of it every 0.6 s."""
    heard: list[str] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(folder / "notify"))
        listener.settimeout(0.1)
        over = threading.Event()

        def listen() -> None:
            while not over.is_set():
                with suppress(TimeoutError):
                    heard.append(listener.recv(4096).decode())

        thread = threading.Thread(target=listen)
        thread.start()
        monkeypatch.setenv("NOTIFY_SOCKET", str(folder / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "600000")
        monkeypatch.delenv("WATCHDOG_PID", raising=False)
        yield heard
        over.set()
        thread.join()


def save_weights(folder: Path, seed: int) -> None:
    """Weights in place for the model of `write_model`: another content for another seed, of the same size."""
    config = json.loads((folder / "config.json").read_text())
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    kv, head = config["num_key_value_heads"], config["head_dim"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for layer in range(config["num_hidden_layers"]):
        for name, shape in {
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (heads * head, hidden), "self_attn.k_proj": (kv * head, hidden),
            "self_attn.v_proj": (kv * head, hidden), "self_attn.o_proj": (hidden, heads * head),
            "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
        }.items():  # fmt: skip
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    random = np.random.default_rng(seed)
    tensors = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
