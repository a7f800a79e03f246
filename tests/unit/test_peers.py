"""Servers side by side: checkpoints and their conversion, who takes part, figures, ratios, tables, goals."""

from __future__ import annotations

import io
import json
import socket
import sys
import threading
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from safetensors import safe_open
from tokenizers import Tokenizer

from loadgen.bench import Result
from loadgen.daemon import Server, free_port
from loadgen.errors import UsageError
from loadgen.peers import __main__ as command
from loadgen.peers import front, gguf_file, install, servers, shapes, side_by_side
from loadgen.peers.loads import DRAWN, LOADS, Figure, Load, figures_of
from loadgen.peers.servers import CONTENDERS, PRECISIONS, Contender, Model, Start
from loadgen.peers.shapes import SHAPES, Shape
from loadgen.records import Outcome

TINY = SHAPES["tiny"]
QUIET = Console(file=io.StringIO())
RATE = Figure("rate", "rate", "tok/s", lambda outcomes: 0.0, goal=1.2, more_is_better=True)
WAIT = Figure("wait", "wait", "ms", lambda outcomes: 0.0, goal=2.0)
LOAD = Load("some", "says", LOADS[0].settings, (RATE, WAIT))


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return shapes.write(TINY, tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.mark.parametrize(("name", "millions"), [("125m", 125), ("0.6b", 596)])
def test_shapes_are_as_large_as_they_are_called(name, millions):
    """Parameters of the shapes, in millions."""
    assert round(sum(int(np.prod(size)) for _, size in SHAPES[name].tensors()) / 1e6) == millions


def test_a_checkpoint_holds_what_its_shape_says(checkpoint):
    """Names and sizes are the shape's, norms are near one, and a second writing changes nothing."""
    with safe_open(checkpoint / "model.safetensors", "numpy") as tensors:
        found = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    assert {name: value.shape for name, value in found.items()} == dict(TINY.tensors())
    assert found["model.norm.weight"].mean() == pytest.approx(1, abs=0.02)
    assert found["model.layers.1.mlp.up_proj.weight"].std() == pytest.approx(shapes.STD, rel=0.05)
    assert all((found[name] == again).all() for name, again in shapes.weights(TINY))
    stamp = (checkpoint / "model.safetensors").stat().st_mtime_ns
    shapes.write(TINY, checkpoint)
    assert (checkpoint / "model.safetensors").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("size", [2048, 151_936])
def test_a_tokenizer_has_the_size_that_is_asked_for(size, tmp_path):
    """Every id that prompts are made of has a text of its own; the specials are the last two."""
    shapes.write_tokenizer(size, tmp_path)
    made = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert made.get_vocab_size() == size
    assert made.token_to_id("<|eos|>") == size - 1
    ids = range(shapes.BYTES, size - 2, 7)
    texts = {made.decode([token]) for token in ids}
    assert len(texts) == len(ids)
    assert max(map(len, texts)) <= 3


def test_eight_bits_are_near_the_weights(checkpoint, tmp_path):
    """Rows times their scales are the weights, within half a step; what is not a projection stays as it is."""
    folder = shapes.write_int8(TINY, checkpoint, tmp_path / "int8")
    first = dict(shapes.weights(TINY))
    with safe_open(folder / "model.safetensors", "numpy") as tensors:
        name = "model.layers.0.mlp.down_proj.weight"
        packed, scale = tensors.get_tensor(name), tensors.get_tensor(name + "_scale")
        assert (tensors.get_tensor("lm_head.weight") == first["lm_head.weight"]).all()
    assert packed.dtype == np.int8
    assert (np.abs(packed * scale - first[name]) <= scale * 0.501).all()
    assert (
        json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == "compressed-tensors"
    )
    assert (folder / "tokenizer.json").exists()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=str)
def test_every_tensor_has_one_name_in_gguf(shape: Shape):
    """No two share one, layers keep their number, and none is without."""
    names = {name: gguf_file.gguf_name(name) for name, _ in shape.tensors()}
    assert len(set(names.values())) == len(names)
    for name, there in names.items():
        layer = name.split(".")[2] if ".layers." in name else None
        assert there.startswith(f"blk.{layer}.") == (layer is not None)
    assert names["model.layers.1.self_attn.o_proj.weight"] == "blk.1.attn_output.weight"
    assert set(gguf_file.PRECISIONS) == set(PRECISIONS)


def test_rows_are_put_where_llama_cpp_rotates_them():
    """Row i of the first half of a head and row i of the second become neighbours; heads stay apart."""
    weight = np.arange(16).reshape(16, 1)
    assert gguf_file.interleaved(weight, 2)[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]


# --- installing ------------------------------------------------------------------------------------------------------


def test_what_text_does_not_need_is_left_out():
    """Neither torch nor its kin, which the wheel pins, nor extras; names that only begin alike stay."""
    asked = [
        "torch==2.13.0+cpu; platform_machine == 'x'",
        "torchaudio",
        "torchlike>=1",
        "numpy",
        'pandas; extra == "b"',
    ]
    assert install.for_text(asked) == ["torchlike>=1", "numpy"]


def test_a_failed_installation_leaves_no_mark(tmp_path, monkeypatch):
    """What did not come to its end is missing, and is said with the last words of what failed."""
    monkeypatch.setattr(install, "ENVIRONMENTS", tmp_path)
    monkeypatch.setattr(install.Environment, "create", lambda self: self.folder.mkdir(exist_ok=True))

    def fails(place: install.Environment) -> str:
        return place.run(sys.executable, "-c", "raise SystemExit('no such thing')")

    monkeypatch.setitem(install.INSTALLERS, "vllm", fails)
    with pytest.raises(UsageError, match="no such thing"):
        install.install("vllm")
    assert install.installed("vllm") is None
    monkeypatch.setitem(install.INSTALLERS, "vllm", lambda place: "1.2")
    assert install.install("vllm") == install.installed("vllm") == "1.2"


def test_the_repair_of_llama_cpp_is_one_line(tmp_path):
    """A barrier stands before the call that loads the tiles' configuration; nothing else changes."""
    source = tmp_path / "mmq.cpp"
    source.write_text("before\n    _tile_loadconfig(&tc);\nafter\n")
    install.repair(source)
    before, call, after = source.read_text().splitlines()
    assert (before, after) == ("before", "after")
    assert call.endswith('"memory"); _tile_loadconfig(&tc);')


# --- who takes part --------------------------------------------------------------------------------------------------


def _contender(name: str, version: str | None = "1", kv: tuple[str, ...] = PRECISIONS, code: str = "") -> Contender:
    start = Start([sys.executable, "-c", code], "/health")
    return Contender(name, dict.fromkeys(kv, "float32"), lambda model: start, lambda: version)


def test_a_missing_peer_is_reported_as_missing():
    """It is a column of the table with no figure, no error; so is one that lacks the precision."""
    contenders = [_contender("ours", None), _contender("gone", None), _contender("narrow", kv=("fp32",))]
    taking_part = side_by_side.entries(contenders, Model(TINY, "int8"))
    side_by_side.measure(taking_part, [LOAD], 2, QUIET)
    result = side_by_side.document(taking_part, [LOAD], Model(TINY, "int8"), quick=True)
    assert side_by_side.rows(result)[0][2:5] == ["ours (missing)", "gone (missing)", "narrow (not offered)"]
    assert side_by_side.rows(result)[1][2:] == ["-", "-", "-", "-", "1.2 x: **missed**"]
    assert "gone: missing" in side_by_side.markdown(result)
    assert len(side_by_side.missed(result)) == 2


def test_a_server_that_does_not_start_is_left_out(tmp_path, monkeypatch):
    """Its last words are kept, and the table says that it failed."""
    monkeypatch.setattr(servers, "MODELS", tmp_path)
    taking_part = side_by_side.entries([_contender("ours", code="raise SystemExit('no room')")], Model(TINY, "fp32"))
    side_by_side.measure(taking_part, [LOAD], 1, QUIET)
    assert "no room" in str(taking_part[0].problem)
    result = side_by_side.document(taking_part, [LOAD], Model(TINY, "fp32"), quick=True)
    assert side_by_side.rows(result)[0][2] == "ours (failed)"


def test_a_paused_server_answers_after_it_is_resumed():
    """While it is stopped nothing of it runs, its children included."""
    port = free_port()
    with Server([sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"], port, ready="/") as server:
        server.pause()
        with socket.create_connection(("127.0.0.1", port), timeout=5) as asked:
            asked.sendall(b"GET / HTTP/1.0\r\n\r\n")
            asked.settimeout(0.2)
            with pytest.raises(TimeoutError):
                asked.recv(1)
            server.resume()
            asked.settimeout(10)
            assert asked.recv(5) == b"HTTP/"


def test_commands_name_no_place_of_this_machine(checkpoint, tmp_path, monkeypatch):
    """What is kept of a command is relative to the checkout; flags follow the precision."""
    monkeypatch.setattr(servers, "MODELS", checkpoint.parents[1])
    monkeypatch.setattr(servers.Model, "checkpoint", lambda model: servers.ROOT / ".peers" / "x")
    shown = CONTENDERS[0].shown(Model(TINY, "bf16"))
    assert shown[0] == "python"
    assert str(servers.ROOT) not in " ".join(shown)
    assert shown[shown.index("--dtype") + 1] == "bfloat16"
    assert "--device-gib=4MiB" in shown  # 8,192 tokens of 2 layers, K and V, one head of 64, two bytes


# --- figures, ratios, verdicts ---------------------------------------------------------------------------------------


def _outcome(session: int, turn: int, at_s: float, ttft_s: float, gap_s: float, tokens: int = 5) -> Outcome:
    chunks = [at_s + ttft_s + gap_s * n for n in range(tokens)]
    return Outcome(session, turn, at_s, tokens, at_s, chunks, chunks[-1], 200, tokens)


@pytest.mark.parametrize("load", LOADS, ids=lambda load: load.name)
def test_figures_of_known_requests(load):
    """Each load's figures from requests whose times are known."""
    outcomes = [_outcome(n, n % 6, 0.0, 0.1 * (1 + n % 6), 0.01) for n in range(12)]
    found = figures_of(load, Result({}, outcomes))
    expected = {
        "single": {"decode": 100, "tpot_p50": 10},
        "drawn": {"decode": 100, "tpot_p99": 10},
        "concurrent": {"output": 60 / 0.64, "ttft_p50": 350},
        "prefill": {"prompt": np.median([200 / (0.1 * n) for n in range(1, 7)])},
        "shared": {"ttft_p50": 400},
        "many-shared": {"ttft_p50": 350},
        "multi-turn": {"turn_1": 100, "turn_6": 600, "later_p50": 400},
    }[load.name]
    assert {key: found[key] for key in expected} == pytest.approx(expected)


def test_a_failed_request_spoils_a_load():
    """Figures of the others would be those of another load."""
    outcomes = [_outcome(0, 0, 0.0, 0.1, 0.01), Outcome(1, 0, 0.0, 5, error="http_5xx", detail="no blocks")]
    with pytest.raises(ValueError, match="1 of 2 requests failed: no blocks"):
        figures_of(LOADS[0], Result({}, outcomes))


def _taking_part(figures: dict[str, dict[str, list[float | None]]]) -> list[side_by_side.Entry]:
    made = side_by_side.entries([_contender(name) for name in figures], Model(TINY, "fp32"))
    for entry in made:
        entry.server, entry.text = Server([], 1, ready="/"), "abcd"
        entry.figures = {("some", key): values for key, values in figures[entry.name].items()}
    return made


def test_ratios_are_of_the_best_peer_round_by_round():
    """The best peer is the one with the best median; rounds that either lacks are left out; above one is better."""
    taking_part = _taking_part({
        "ours": {"rate": [30.0, 24.0, None], "wait": [10.0, 10.0, 10.0]},
        "slow": {"rate": [10.0, 10.0, 10.0], "wait": [15.0, 15.0, 15.0]},
        "best": {"rate": [20.0, 20.0, 20.0], "wait": [90.0, 90.0, 90.0]},
    })  # fmt: skip
    result = side_by_side.document(taking_part, [LOAD], Model(TINY, "fp32"), quick=False)
    rate, wait = result["loads"][0]["figures"]
    assert rate["best_peer"] == "best"
    assert rate["ratio"] == pytest.approx({"median": 1.35, "least": 1.2, "most": 1.5})
    assert wait["best_peer"] == "slow"
    assert wait["ratio"]["median"] == 1.5
    assert (rate["met"], wait["met"]) == (True, False)
    assert side_by_side.missed(result) == ["some: wait at least 2 x the best peer's"]
    table = side_by_side.rows(result)
    assert table[1] == ["some", "rate, tok/s", "27.0", "10.0", "20.0", "1.35 x best [1.20-1.50]", "1.2 x: met"]
    assert table[2][-2:] == ["1.50 x slow", "2 x: **missed**"]
    side_by_side.show(result, QUIET)
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_texts_are_compared_from_their_start():
    """How much two servers with the same weights said alike."""
    assert side_by_side.common("abcd", "abxd") == 2
    assert side_by_side.common("ab", "abcd") == 2
    assert side_by_side.common("", "a") == 0


def test_a_long_load_takes_fewer_rounds(monkeypatch):
    """Every server is measured in as many rounds as the load has, in turns from both ends."""
    order: list[str] = []
    [one, two] = _taking_part({"one": {}, "two": {}})
    monkeypatch.setattr(side_by_side, "_started", lambda entry, stack, console: None)
    monkeypatch.setattr(side_by_side, "_awake", lambda entry: nullcontext())
    monkeypatch.setattr(side_by_side, "figures_of", lambda load, result: {"rate": 1.0, "wait": result})
    monkeypatch.setattr(side_by_side, "_aimed", lambda settings, entry, seed: (entry.name, seed))
    monkeypatch.setattr(side_by_side.bench, "run_sync", lambda aimed: order.append(aimed[0]) or aimed[1])
    side_by_side.measure([one, two], [replace(LOAD, most_rounds=2)], 3, QUIET)
    assert order == ["one", "two", "two", "one"]
    assert one.figures["some", "wait"] == [0, 1000]


def test_a_quick_load_is_the_same_but_small():
    """Few sessions and short answers of the same workload, and the loads stay as they are."""
    small = LOADS[0].quick().settings
    assert (small.sessions, small.parameters["output"], small.workload) == (2, "16", "random")
    assert LOADS[0].settings.parameters["output"] == "128"


@pytest.mark.parametrize(
    "arguments", [["--precision", "fp8"], ["--only", "sglang"], ["--loads", "none"], ["install", "nothing"]]
)
def test_what_does_not_exist_is_said(arguments, capsys):
    """Exit code 2, and what there is."""
    assert command.main(arguments) == 2
    assert "there are" in capsys.readouterr().err


# --- the front -------------------------------------------------------------------------------------------------------


class _Counting:
    """An engine that says the number after the last token, two at a time, and draws none."""

    draws = False

    def submit(self, number: int, asked: front.Asked, deliver: front.Deliver) -> None:
        def generate() -> None:
            new = [(asked.tokens[-1] + 1 + n) % 2000 for n in range(asked.count)]
            for at in range(0, asked.count, 2):
                deliver(new[at : at + 2])
            deliver(None)

        threading.Thread(target=generate).start()


def test_the_front_streams_what_the_engine_says(checkpoint, monkeypatch):
    """Our client gets every token and the usage, twice over one connection; what the engine cannot do is refused."""
    import asyncio

    from loadgen.client import Client, Target

    monkeypatch.setitem(front.ENGINES, "openvino", lambda args: _Counting())
    texts = front.texts_of(checkpoint / "tokenizer.json")

    async def asked() -> list[Outcome]:
        made = front.Front(_Counting(), texts)
        server = await asyncio.start_server(made.connection, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        client = Client(Target(f"http://127.0.0.1:{port}", "model"), asyncio.get_running_loop().time)
        found = [Outcome(n, 0, 0.0, 5) for n in range(3)]
        for outcome, extra in zip(found, ({}, {}, DRAWN), strict=True):
            await client.complete([("user", [7, 300])], outcome, extra, keep_answer=True)
        client.close()
        server.close()
        return found

    *found, refused = asyncio.run(asked())
    assert refused.error == "http_4xx"
    for outcome in found:
        assert (outcome.error, outcome.prompt_tokens, outcome.output_tokens) == (None, 2, 5)
        assert outcome.answer == "".join(texts[301:306])


def test_no_stack_is_left_behind(tmp_path, monkeypatch):
    """A server of a contender ends with its block, and its disk goes with it."""
    monkeypatch.setattr(servers, "MODELS", tmp_path)
    start = Start([sys.executable, "-m", "http.server", "{port}", "--bind", "127.0.0.1", "-d", "{disk}"], "/")
    contender = Contender("web", {"fp32": "float32"}, lambda model: start, lambda: "1")
    with ExitStack() as stack:
        running: Any = contender.served(Model(TINY, "fp32"), stack)
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="refused"), socket.create_connection(("127.0.0.1", running.port), timeout=5):
        pass


@pytest.mark.parametrize("folder", [command.RESULTS, command.RESULTS / "avx2"], ids=lambda folder: folder.name)
def test_the_documentation_has_the_tables_of_the_kept_results(folder: Path) -> None:
    """`python -m loadgen.peers table` makes them; every figure with a goal is in them, missed ones too."""
    page = (command.RESULTS.parent / "README.md").read_text(encoding="utf-8")
    results = command.kept(folder)
    table = side_by_side.summary(results)
    assert table in page
    goals = [figure for result in results for load in result["loads"] for figure in load["figures"] if figure["goal"]]
    assert table.count(" x: met") + table.count("**missed**") == len(goals) > 0
