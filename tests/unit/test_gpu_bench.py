"""The benchmark of a GPU, run dry on a CPU: every line, goals, budgets, failures, the kept result and its table."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loadgen import gpu_table
from server.bench.gpu import __main__ as command
from server.bench.gpu import kernels, lines, parts
from server.bench.gpu.chip import StandIn
from server.bench.gpu.lines import Goal, Line, Outcome
from server.bench.gpu.sizes import DRY, FULL, LLAMA_8B
from server.bench.gpu.steps import WARM_STEPS
from tests.gpu import prepare

ROOT = Path(__file__).resolve().parents[2]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def found() -> tuple[list[Line], list[Outcome]]:
    """All parts in this process, on the stand-in."""
    chip = StandIn()

    def launch(part: parts.Part, budget_s: float, known: parts.Known, take: parts.Take) -> str:
        return parts.here(chip, DRY, part, known, take)

    return parts.measure(parts.PARTS, launch, Clock(), lambda line: None, lambda outcome: None)


# --- a dry run -------------------------------------------------------------------------------------------------------


def test_a_dry_run_has_every_line(found: tuple[list[Line], list[Outcome]]) -> None:
    """Every part ends well, every goal has its line, every line a value and a name of its own, and every variation of
    attention is there."""
    measured, outcomes = found
    assert [(outcome.part, outcome.problem) for outcome in outcomes] == [(part.name, "") for part in parts.PARTS]
    keys = [line.key for line in measured]
    assert len(set(keys)) == len(keys)
    assert {goal.key for goal in lines.goals(DRY)} <= set(keys)
    assert {case.key for case in kernels.decodes(DRY)} <= set(keys)
    unknown = [line for line in measured if line.value is None and not line.key.startswith("break-even")]
    assert unknown == []
    others = {"memory", "matmul", "h2d", "d2h", "both", "pinned.touch", "pinned.pin", "disk.write", "disk.read",
              "tier.down", "load.terrace", "load.transformers", "engine", "break-even.dram", "break-even.ssd",
              "graphs"}  # fmt: skip
    assert others <= set(keys)


def test_shares_are_of_what_was_measured_before(found: tuple[list[Line], list[Outcome]]) -> None:
    """Attention, decode and prefill state their figures as shares of this run's own ceilings."""
    by_key = {line.key: line for line in found[0]}
    rows = DRY.rows[-1]
    size = DRY.shape.decode_bytes(rows, DRY.contexts[0] + WARM_STEPS + DRY.steps // 2, 4)
    least_ms = size / (by_key["memory"].value * 1e9) * 1e3
    assert by_key[f"decode.{rows}"].share == pytest.approx(least_ms / by_key[f"decode.{rows}"].value)
    case = next(kernels.decodes(DRY)).key
    assert by_key[case].share == pytest.approx(by_key[case].value / by_key["memory"].value)
    prompt = DRY.prompts[0]
    rate = DRY.shape.prefill_flops(prompt) / (by_key[f"prefill.{prompt}"].value / 1e3) / 1e12
    assert by_key[f"prefill.{prompt}"].share == pytest.approx(rate / by_key["matmul"].value)


def test_a_result_is_complete_and_makes_a_table(
    found: tuple[list[Line], list[Outcome]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The kept JSON has device, versions, commit, parts, lines and judged goals; its table has a row for each line; the
    documentation shows no dry run."""
    measured, outcomes = found
    facts = StandIn().facts() | {"driver": "1.2", "cuda": "13.0", "flashinfer": "0.6.16"}
    path = lines.save(lines.document(facts, lines.goals(DRY), measured, outcomes, dry=True, commit="abc"), tmp_path)
    assert path.name == "gpu-dry-run.json"
    result = json.loads(path.read_text())
    assert result["environment"]["commit"] == "abc"
    assert {"torch", "transformers"} <= result["environment"]["versions"].keys()
    assert [goal["key"] for goal in result["goals"]] == [goal.key for goal in lines.goals(DRY)]
    assert len(result["lines"]) == len(measured)
    table = gpu_table.markdown([result])
    assert all(line.what.replace("|", "/") in table for line in measured)
    assert "driver 1.2, CUDA 13.0" in table
    assert gpu_table.kept(tmp_path) == []
    shown = lines.Table(dry=True)
    shown.line(measured[0])
    missed = shown.verdict(lines.goals(DRY), measured)
    said = capsys.readouterr().out
    assert said.count("GOAL MISSED") == missed
    assert said.count("goal met") == len(lines.goals(DRY)) - missed


# --- goals and sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("goal", "line", "met"),
    [
        (Goal("a", "a", 0.8), Line("a", "a", 5.0, "ms", 0.81), True),
        (Goal("a", "a", 0.8), Line("a", "a", 5.0, "ms", 0.79), False),
        (Goal("a", "a", 1.0, least=False), Line("a", "a", 0.9, "ms"), True),
        (Goal("a", "a", 1.0, least=False), Line("a", "a", None, "ms"), False),
        (Goal("a", "a", 1.0, least=False), None, False),
    ],
)
def test_goals_judge_shares_else_values(goal: Goal, line: Line | None, met: bool) -> None:
    """A share is judged where there is one, else the value; what was not measured is not met, and says so."""
    assert goal.met(line) is met
    assert ("not measured" in goal.statement(line)) == (line is None or line.value is None)


def test_the_shape_is_that_of_llama_3_8b() -> None:
    """8.03 billion weights, 2 MiB of cache in a block of bfloat16, 15.3 GB read for a token behind 2k others, and the
    figures that a sum by hand gives for prefill."""
    assert LLAMA_8B.matrix_values + 2 * LLAMA_8B.head_values == pytest.approx(8.03e9, rel=1e-3)
    assert LLAMA_8B.layout(32, 16, 2).block_bytes == 2 * 2**20
    assert LLAMA_8B.decode_bytes(1, 2048, 2) == pytest.approx(15.28e9, rel=1e-2)
    assert LLAMA_8B.prefill_flops(2048) == pytest.approx(29.7e12, rel=2e-2)
    assert LLAMA_8B.prefill_flops(4096) > 2 * LLAMA_8B.prefill_flops(2048)
    assert {goal.key for goal in lines.goals(FULL)} >= {"decode.128", "prefill.32768", "tier.up", "http"}


# --- budgets and failures --------------------------------------------------------------------------------------------

THREE = tuple(parts.Part(name, "tests.unit.test_gpu_bench:none", 100, 30) for name in "abc")


def test_budgets_fit_the_time_that_is_left() -> None:
    """Each part gets its own budget or what is left of the whole; with less than it needs it is left out, and told."""
    clock, budgets = Clock(), []

    def launch(part: parts.Part, budget_s: float, known: parts.Known, take: parts.Take) -> str:
        budgets.append(budget_s)
        clock.now += 80
        return ""

    _, outcomes = parts.measure(THREE, launch, clock, lambda line: None, lambda outcome: None, limit_s=185)
    assert budgets == [100, 100]
    assert [outcome.seconds for outcome in outcomes] == [80, 80, 0]
    assert outcomes[2].problem == "left out: it takes 30 s at least, 25 s are left"
    budgets.clear()
    parts.measure(THREE, launch, clock, lambda line: None, lambda outcome: None, limit_s=120)
    assert budgets == [100, 40]


def failing(chip: Any, sizes: Any, known: Any) -> Iterator[Line]:
    """A part that has one line, and then an error."""
    yield Line("half", "half", 1.0, "s")
    raise RuntimeError("an illegal memory access was encountered")


def knowing(chip: Any, sizes: Any, known: Any) -> Iterator[Line]:
    yield Line("known", "known", known["half"] + 1, "s")


def test_a_part_that_fails_is_told_and_the_others_go_on() -> None:
    """Its lines so far are kept, and known to the parts behind it."""
    two = [parts.Part(name, f"{__name__}:{name}", 9, 1) for name in ("failing", "knowing")]
    ended: list[Outcome] = []

    def launch(part: parts.Part, budget_s: float, known: parts.Known, take: parts.Take) -> str:
        return parts.here(StandIn(), DRY, part, known, take)

    measured, outcomes = parts.measure(two, launch, Clock(), lambda line: None, ended.append)
    assert [(line.key, line.value) for line in measured] == [("half", 1.0), ("known", 2.0)]
    assert outcomes == ended
    assert outcomes[0].problem == "failed: RuntimeError: an illegal memory access was encountered"
    assert outcomes[1].problem == ""


CHILD = """
import json, sys, time
known = json.load(sys.stdin)
print("noise of a library", flush=True)
print('line {"key": "x", "what": "x", "value": %s, "unit": "s"}' % known["a"], flush=True)
"""


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ("", ""),
        ("time.sleep(60)", "out of time after 1 s"),
        (
            "raise SystemExit('CUDA error: unspecified launch failure')",
            "failed: CUDA error: unspecified launch failure",
        ),
        ("import os; os.kill(os.getpid(), 9)", "failed: exit code -9"),
    ],
)
def test_a_part_in_a_process_of_its_own(more: str, problem: str) -> None:
    """It gets what is known and gives lines between whatever else is printed; one that hangs is killed when its time is
    over, one that dies is told with its last words; both keep their lines."""
    taken: list[Line] = []
    budget_s = 1.0 if "sleep" in more else 60.0
    assert parts.apart([sys.executable, "-c", CHILD + more], budget_s, {"a": 4.5}, taken.append) == problem
    if budget_s == 60.0:
        assert [(line.key, line.value) for line in taken] == [("x", 4.5)]


def test_without_a_gpu_the_command_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is measured where torch sees no device, and no part is run that there is not."""
    import torch

    if not torch.cuda.is_available():
        assert command.main([]) == 2
        assert "--dry" in capsys.readouterr().err
    assert command.main(["nothing", "--dry"]) == 2
    assert "unknown part 'nothing'" in capsys.readouterr().err


def test_the_command_runs_parts_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One part of a dry run, through its own process, to a kept result; a dry run misses no goal."""
    assert command.main(["attention", "--dry", "--save", "--output", str(tmp_path), "--commit", "abc"]) == 0
    result = json.loads((tmp_path / "gpu-dry-run.json").read_text())
    assert result["dry"] is True
    assert {case.key for case in kernels.decodes(DRY)} <= {line["key"] for line in result["lines"]}
    assert "not measured" in capsys.readouterr().out


# --- documentation and wheels ----------------------------------------------------------------------------------------


def test_the_readme_has_the_kept_results() -> None:
    """The table in the benchmarks' README is what the kept results give, or says that there are none."""
    assert gpu_table.markdown(gpu_table.kept()) in (ROOT / "server/bench/README.md").read_text(encoding="utf-8")


def test_what_did_not_work_is_in_the_table() -> None:
    """A goal without a line is a row that is missed, and a part's trouble stands below."""
    goal = {"key": "a", "says": "speed", "limit": 0.8, "least": True, "value": None, "met": False}
    result = {
        "device": {"name": "H"}, "environment": {"versions": {"torch": "2"}, "commit": "c"}, "lines": [],
        "goals": [goal], "parts": [{"part": "steps", "seconds": 1.0, "problem": "out of time after 9 s"}],
    }  # fmt: skip
    table = gpu_table.markdown([result])
    assert "| speed | not measured |  | >= 0.8: **missed** |  |" in table
    assert "- steps: out of time after 9 s" in table


def test_wheels_are_those_that_the_project_asks_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Versions come from pyproject.toml, for another Python than this one; too much is an error."""
    names = [*prepare.ALONE, *prepare.WHOLE]
    assert [prepare.requirement(name).startswith(name) for name in names] == [True] * len(names)
    asked = prepare.command(tmp_path, "3.12", ["x"], ["--no-deps"])
    assert asked[asked.index("--python-version") + 1] == "3.12"
    assert asked[-1] == "x"
    with (tmp_path / "large.whl").open("wb") as file:
        file.truncate((prepare.LIMIT_MIB + 1) * 2**20)
    assert prepare.report(tmp_path) == 1
    assert "large.whl" in capsys.readouterr().out
