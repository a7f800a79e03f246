"""What the kernels do to logits before they choose, and what they tell of tokens, on every instruction set, beside
numpy and torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.kernels.native import load
from server.kernels.native.rows import EDIT, Edits, choose, describe
from server.runner.sampling import LOWEST_LOGPROB, Sampler, logprob_entries
from server.types import SampleSpec, SamplingParams, TokenLogprobs
from tests.unit.native import instruction_sets, selected
from tests.unit.test_choose import ODD, WAYS, drawings
from tests.unit.test_sampling import PARAMS

pytestmark = pytest.mark.skipif(load() is None, reason="the native kernels were not built: no C compiler")

VOCAB = 301
IDS = st.integers(0, VOCAB - 1)
ROW = st.fixed_dictionaries(
    {
        "allowed": st.lists(IDS, max_size=6),
        "moved": st.dictionaries(IDS, st.sampled_from([-np.inf, -100.0, -0.3, 2.5, 100.0]), max_size=6),
        "seen": st.dictionaries(IDS, st.sampled_from([0.0, 1.0, 2.0, 7.0]), max_size=12),
        "penalties": st.tuples(
            st.sampled_from([0.7, 1.0, 1.3]), st.sampled_from([-1.5, 0.0, 0.8]), st.sampled_from([-0.5, 0.0, 0.4])
        ),
    }
)
Row = dict[str, Any]


def edits_of(rows: list[Row]) -> Edits:
    ids: list[int] = []
    values: list[float] = []
    heads = np.zeros(len(rows), EDIT)
    for index, row in enumerate(rows):
        allowed, moved, seen = row["allowed"], row["moved"], row["seen"]
        heads[index] = (len(ids), len(allowed), len(moved), len(seen), *row["penalties"])
        ids += [*allowed, *moved, *seen]
        values += [*(9.0 for _ in allowed), *moved.values(), *seen.values()]
    return Edits(heads, np.array(ids, np.int64), np.array(values, np.float32))


@np.errstate(over="ignore")
def edited(x: npt.NDArray[np.float32], row: Row) -> npt.NDArray[np.float32]:
    """The same one after the other, every step rounded to fp32."""
    x = np.nan_to_num(x, nan=-np.inf, posinf=np.finfo(np.float32).max, neginf=-np.inf)
    if row["allowed"]:
        x = np.where(np.isin(np.arange(VOCAB), row["allowed"]), x, np.float32(-np.inf))
    repetition, presence, frequency = map(np.float32, row["penalties"])
    for token, value in row["moved"].items():
        x[token] += np.float32(value)
    for token, count in row["seen"].items():
        x[token] = x[token] / repetition if x[token] > 0 else x[token] * repetition
        x[token] -= presence * np.float32(count > 0)
        x[token] -= frequency * np.float32(count)
    return x


def logits_of(seed: int, rows: int, odd: list[tuple[int, float]], vocab: int = VOCAB) -> torch.Tensor:
    """With ties, and with numbers that are none."""
    logits = (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 12).round() / 4
    for place, value in odd:
        logits[place % rows, place % vocab] = value
    return logits


@pytest.mark.parametrize("isa", instruction_sets())
@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), odd=ODD, rows=st.lists(st.tuples(ROW, WAYS), min_size=1, max_size=4))
def test_edits_come_before_the_choice(
    isa: str, seed: int, odd: list[tuple[int, float]], rows: list[tuple[Row, dict[str, Any]]]
) -> None:
    """Tokens are those of logits that were edited before; the logits themselves stay as they are, and a row does not
    notice the others."""
    edits, ways = [row for row, _ in rows], drawings(*(way for _, way in rows))
    logits = logits_of(seed, len(rows), odd)
    kept = logits.clone()
    before = torch.from_numpy(np.stack([edited(x, row) for x, row in zip(logits.numpy(), edits, strict=True)]))
    with selected(isa):
        expected = choose(before, ways).tolist()
        assert choose(logits, ways, edits_of(edits)).tolist() == expected
        for row, edit in enumerate(edits):
            alone = choose(logits[row : row + 1], ways[row : row + 1], edits_of([edit]))
            assert alone.tolist() == expected[row : row + 1]
    assert torch.equal(logits.nan_to_num(nan=7.0), kept.nan_to_num(nan=7.0))


@settings(max_examples=250, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32), odd=ODD)
def test_the_kernels_edit_as_torch_does(data: st.DataObject, seed: int, odd: list[tuple[int, float]]) -> None:
    """Any parameters, step by step: the most likely token of what is left is the same."""
    params = [data.draw(PARAMS) | {"temperature": 0.0} for _ in range(3)]
    natively, by_torch = Sampler(32), Sampler(32)
    by_torch.use_torch()
    tokens = st.lists(st.integers(0, 31), min_size=1, max_size=8)
    histories = [data.draw(tokens) for _ in params]
    prompts = [len(history) for history in histories]
    for step in range(4):
        logits = logits_of(seed + step, 3, odd, 32)
        specs = [
            SampleSpec(SamplingParams(9, **one), len(history), prompt, list(history))
            for one, history, prompt in zip(params, histories, prompts, strict=True)
        ]
        chosen = natively.choose(logits, range(3), specs).tolist()
        assert chosen == by_torch.choose(logits, range(3), specs).tolist()
        for history, token in zip(histories, chosen, strict=True):
            history.append(token)


def test_no_known_token_is_allowed() -> None:
    """Where what is allowed is not in the vocabulary nothing is left, which gives token 0."""
    spec = SampleSpec(SamplingParams(9, temperature=0.0, allowed_token_ids=[40, 50]), 1, 1, [3])
    by_torch = Sampler(8)
    by_torch.use_torch()
    for sampler in (Sampler(8), by_torch):
        assert sampler.choose(torch.arange(8.0)[None], [1], [spec]).tolist() == [0]


def test_a_token_that_there_is_not_is_refused() -> None:
    """In a history, say: nothing is written outside of the row."""
    for token in (-1, 8):
        spec = SampleSpec(SamplingParams(9, presence_penalty=1.0), 2, 1, [3, token])
        with pytest.raises(AssertionError, match=f"token {token}"):
            Sampler(8).choose(torch.arange(8.0)[None], [1], [spec])


# --- what is told ----------------------------------------------------------------------------------------------------


def entries(logits: torch.Tensor, tokens: list[int], most: int) -> list[TokenLogprobs]:
    found = describe(logits, torch.tensor(tokens), most)
    return logprob_entries([column.numpy() for column in found], [most] * len(tokens))


@pytest.mark.parametrize("isa", instruction_sets())
@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32), vocab=st.integers(1, 700), most=st.integers(0, 40), odd=ODD,
    places=st.lists(st.integers(0, 10**6), min_size=1, max_size=4),
)  # fmt: skip
def test_what_is_told_is_what_torch_tells(
    isa: str, seed: int, vocab: int, most: int, odd: list[tuple[int, float]], places: list[int]
) -> None:
    """Ranks and alternatives to the letter, log-probabilities within rounding; NaN counts as -inf; alone and in a
    batch the same bits."""
    logits, tokens = logits_of(seed, len(places), odd, vocab), [place % vocab for place in places]
    most = min(most, vocab)
    by_torch = Sampler(vocab)
    by_torch.use_torch()
    clean = logits.nan_to_num(nan=-torch.inf, posinf=torch.finfo(logits.dtype).max, neginf=-torch.inf)
    told = by_torch.describe(clean, torch.tensor(tokens), most)
    expected = logprob_entries([column.numpy() for column in told], [most] * len(tokens))
    with selected(isa):
        found = entries(logits, tokens, most)
        alone = [entries(logits[row : row + 1], [token], most)[0] for row, token in enumerate(tokens)]
    assert found == alone
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.token, ours.rank) == (theirs.token, theirs.rank)
        assert [token for token, _ in ours.top] == [token for token, _ in theirs.top]
        values, others = ([one.logprob, *(value for _, value in one.top)] for one in (ours, theirs))
        assert values == pytest.approx(others, rel=2e-6, abs=2e-6)


@pytest.mark.parametrize("isa", instruction_sets())
def test_a_long_row_is_told_exactly(isa: str) -> None:
    """Sums over 152k tokens lose nothing, whatever the number of threads."""
    logits, tokens = torch.randn(5, 151_937, generator=torch.Generator().manual_seed(3)) * 2, [0, 7, 9000, 151_936, 5]
    exact = logits.double().log_softmax(-1)
    threads = torch.get_num_threads()
    with selected(isa):
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(entries(logits, tokens, 3))
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]
    for row, (token, entry) in enumerate(zip(tokens, found[0], strict=True)):
        assert entry.logprob == pytest.approx(float(exact[row, token]), abs=1e-6 + 2e-7 * abs(float(exact[row, token])))
        assert entry.rank == 1 + int((logits[row] > logits[row, token]).sum())
        assert [id for id, _ in entry.top] == logits[row].topk(3).indices.tolist()


@pytest.mark.parametrize("isa", instruction_sets())
def test_where_nothing_can_be_told(isa: str) -> None:
    """No finite logit: numbers that JSON can carry, and the lowest ids first."""
    with selected(isa):
        for nothing in (-np.inf, np.nan):
            (entry,) = entries(torch.full((1, 100), nothing), [0], 2)
            assert entry == TokenLogprobs(0, LOWEST_LOGPROB, 1, ((0, LOWEST_LOGPROB), (1, LOWEST_LOGPROB)))
