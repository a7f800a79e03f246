"""The native choice of tokens, on every instruction set, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.kernels.native import load
from server.kernels.native.rows import DRAWING, choose
from tests.unit.native import instruction_sets, selected

pytestmark = pytest.mark.skipif(load() is None, reason="the native kernels were not built: no C compiler")

SLACK = 1e-6
"""Of a mass of 1: how far exponentials in fp32 may move a sum."""
Logits = npt.NDArray[np.float32]

WAYS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.01, 0.7, 1.0, 50.0]),
        "draw": st.one_of(st.floats(0.0, 1.0, exclude_max=True), st.sampled_from([0.0, 1 - 2.0**-53])),
        "top_k": st.sampled_from([0, 0, 1, 3, 40, 700]),
        "top_p": st.one_of(st.just(1.0), st.floats(1e-9, 1.0)),
        "min_p": st.one_of(st.just(0.0), st.floats(0.0, 1.0)),
    }
)
ODD = st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from([np.nan, np.inf, -np.inf, -0.0, 3e38])), max_size=3)


def drawings(*ways: dict[str, Any]) -> npt.NDArray[Any]:
    how = np.zeros(len(ways), DRAWING)
    for row, way in enumerate(ways):
        how[row] = tuple(way[name] for name in DRAWING.names or ())
    return how


def may_be_chosen(logits: Logits, way: dict[str, Any], token: int) -> bool:
    """Whether the draw hits the token, within SLACK, by a full sort and sums in float64."""
    x = np.nan_to_num(logits, nan=-np.inf, posinf=np.finfo(np.float32).max, neginf=-np.inf)
    if way["temperature"] == 0 or x.max() == -np.inf:
        return token == int(np.argmax(x))
    with np.errstate(over="ignore"):
        depths = (x.max() - x) / np.float32(way["temperature"])
    weights = np.exp(-depths.astype(np.float64))
    ranked = way["top_k"] or way["top_p"] < 1
    ids = np.lexsort((np.arange(len(x)), depths)) if ranked else np.arange(len(x))
    weights = weights[ids]
    limit = way["top_k"] if 0 < way["top_k"] < len(x) else len(x)
    before = np.cumsum(weights[:limit]) - weights[:limit]
    share = way["top_p"] * weights[:limit].sum() if way["top_p"] < 1 else np.inf
    slack = SLACK * weights.sum()
    for edge in (-slack, slack):  # the token at the very edge of the nucleus may be in it or not
        kept = np.zeros(len(x), bool)
        kept[:limit] = before < share + edge
        kept[0] |= bool(ranked)
        for least in (way["min_p"] * (1 - SLACK), way["min_p"] * (1 + SLACK)):
            left = np.where(kept & (weights >= min(least, 1.0)), weights, 0.0)
            ends = np.cumsum(left)
            place, aim = int(np.flatnonzero(ids == token)[0]), way["draw"] * ends[-1]
            if left[place] and ends[place] - left[place] - slack <= aim <= ends[place] + slack:
                return True
    return False


@pytest.mark.parametrize("isa", instruction_sets())
@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32), size=st.integers(1, 5000), scale=st.sampled_from([0.0, 1e-3, 1.0, 5.0, 60.0]),
    grid=st.sampled_from([None, 4.0]), odd=ODD, ways=st.lists(WAYS, min_size=1, max_size=5),
)  # fmt: skip
def test_a_draw_hits_its_token(
    isa: str, seed: int, size: int, scale: float, grid: float | None, odd: list[tuple[int, float]],
    ways: list[dict[str, Any]],
) -> None:  # fmt: skip
    """Any logits, many ties, numbers that are none: the token that the inverse CDF names, in the order of ids or, where
    there is a top_k or top_p, from the likeliest down."""
    logits = torch.randn(len(ways), size, generator=torch.Generator().manual_seed(seed)) * scale
    if grid is not None:
        logits = (logits * grid).round() / grid
    for place, value in odd:
        logits[place % len(ways), place % size] = value
    with selected(isa):
        tokens = choose(logits, drawings(*ways)).tolist()
    for row, way, token in zip(logits.numpy(), ways, tokens, strict=True):
        assert may_be_chosen(row, way, token), f"{token} for {way}"


@pytest.mark.parametrize("isa", instruction_sets())
def test_a_choice_does_not_depend_on_the_others(isa: str) -> None:
    """One row at a time or all together, with any number of threads."""
    logits = torch.randn(40, 3001, generator=torch.Generator().manual_seed(2)) * 2
    ways = [
        {
            "temperature": 0.5 + row / 20,
            "draw": row / 40,
            "top_k": row % 3 * 50,
            "top_p": 1 - row % 2 / 10,
            "min_p": 0.0,
        }
        for row in range(40)
    ]
    threads = torch.get_num_threads()
    with selected(isa):
        alone = [int(choose(logits[row : row + 1], drawings(way))[0]) for row, way in enumerate(ways)]
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert choose(logits, drawings(*ways)).tolist() == alone
    torch.set_num_threads(threads)
    assert len(set(alone)) > 20


@pytest.mark.parametrize("isa", instruction_sets())
def test_where_nothing_is_left(isa: str) -> None:
    """No finite logit: token 0, drawn or not."""
    ways = [
        {"temperature": t, "draw": 0.5, "top_k": k, "top_p": p, "min_p": 0.1}
        for t in (0.0, 1.0) for k in (0, 5) for p in (0.5, 1.0)
    ]  # fmt: skip
    for nothing in (-np.inf, np.nan):
        with selected(isa):
            assert not choose(torch.full((len(ways), 100), nothing), drawings(*ways)).any()
