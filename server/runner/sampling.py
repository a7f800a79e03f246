"""The next token: from logits and sampling parameters to one token id per row, in few tensor operations.

Knows tensors and `SampleSpec`; refuses to know requests, text, frames and the scheduler. Device thread only.

**Same seed, same token.** A row's result depends on its logits and its spec alone, bit for bit, whatever else is in the
batch. Floating-point sums would break that (their order follows the batch shape and the thread count), so nothing here
adds floats along the vocabulary to make a decision: probabilities relative to the most likely token become integers of
`WEIGHT_BITS` bits, and integer sums are the same in every order. 40 bits keep every token down to 1e-12 of the best
one, below the 24-bit mantissa of the logits' own exponential. Sums fit: 2^40 weight * 2^22 tokens < 2^63.

**Order of effects** (as OpenAI and the field): log-probabilities are of the raw distribution; then allowed tokens, the
grammar's mask, logit_bias, min_tokens, bad words, repetition penalty (prompt and output), presence and frequency
penalty (output), temperature, top_k, top_p (of what top_k left), min_p; then one uniform draw, named by (seed,
position), through the inverse CDF. Where logits are equal the lowest id goes first, everywhere.

**Cost.** On a CPU the native kernels choose (`rows.choose`): with 152k tokens 0.6 ms a row for a plain draw, 1.1 ms
with filters, however wide. They make the edits as well, all but a grammar's, in a copy of the row: what a few tensor
operations take is little beside a large step, but the event loop wants the interpreter's lock between any two of them.
In torch rows are grouped by need, so a plain row never pays for another's features: all-greedy is one argmax; a drawn
row without top_k/top_p has no sort; one with them ranks 512 tokens, and more only where those do not hold `top_p` of
the mass. Penalties touch the tokens a request has seen, not the vocabulary.

**No look at the device.** `choose` and `describe` give tensors and leave it to the caller when to read them. What goes
up from the host goes through `put`, which need not wait; a `BlindSampler` lets nothing that was computed decide what is
computed next, so that the host runs ahead of its device.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import inf
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from server.kernels.native import load
from server.kernels.native.rows import DRAWING, EDIT, Edits, argmax, choose, describe
from server.runner.grammar import Matchers
from server.types import FinishReason, RequestId, SampleSpec, SamplingParams, TokenLogprobs

GREEDY_BELOW = 1e-5
"""Temperatures below this choose the most likely token: dividing by them leaves nothing else in fp32 anyway."""
WEIGHT_BITS = 40
NO_WEIGHT = -80.0
"""Logits this far below the best one have a weight of 0. Below -87, and at -inf, `exp` takes three times as long."""
INDEX_BITS = 22
"""Token ids inside an order key; 4M tokens is 15 times the largest vocabulary in use."""
CANDIDATES = (512, 8192)
"""Tokens ranked, in turn, before a full sort. 512 hold 0.95 of the mass of nearly every real distribution; a ranking of
512 among 152k takes 0.9 ms on a CPU core, of 8192 3 ms, a full sort 16 ms."""
CHUNK_ELEMENTS = 1 << 22
"""Logits worked on at once (int64 temporaries of 32 MiB each): bounds memory at any batch size."""
LOWEST_ALLOWED = -1e30
"""Logit of what a grammar allows and the model rules out: above what the grammar bars, whatever penalties follow."""
LOWEST_LOGPROB = -9999.0
"""Stands for log(0), which JSON cannot carry."""

Put = Callable[[npt.NDArray[Any]], Tensor]
"""From the host to where the logits are, without waiting. The array is given away: nobody uses it afterwards."""
Way = Callable[[Tensor, Sequence[SampleSpec], Put], Tensor]
"""How tokens are chosen: (logits [rows, vocab], which may be written to, specs, put) -> tokens int64 [rows]."""

_INDEX_MASK = (1 << INDEX_BITS) - 1
_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _mix64(z: int) -> int:
    """The finaliser of splitmix64: a bijection of 64-bit integers in which every input bit moves every output bit."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def uniform(seed: int, position: int) -> float:
    """The draw in [0, 1) of the token at `position` under `seed`: a pure function, so preemption cannot change it.

    The seed is mixed before the counter is added: neighbouring seeds do not share a shifted stream.
    """
    stream = _mix64((seed + _GOLDEN) & _MASK64)
    return (_mix64((stream + (position + 1) * _GOLDEN) & _MASK64) >> 11) * 2.0**-53


def _order_keys(x: Tensor) -> Tensor:
    """int64 keys [rows, vocab], distinct in a row: greater for a greater logit, and for a lower id among equals."""
    bits = (x + 0.0).view(torch.int32)  # + 0.0 makes -0.0 equal 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # floats' order as signed integers' order
    descending = torch.arange(_INDEX_MASK, _INDEX_MASK - x.shape[1], -1, device=x.device)
    return ordered.to(torch.int64) * (1 << INDEX_BITS) + descending


def _best(x: Tensor, count: int) -> Tensor:
    """Ids int64 [rows, count] of the greatest of x [rows, vocab], in order."""
    return _order_keys(x).topk(count, sorted=True).indices


def _weights(x: Tensor) -> Tensor:
    """int64 weights [rows, vocab] proportional to exp(x), the greatest 2^40; x has its maximum at 0."""
    return (x.clamp(min=NO_WEIGHT).exp() * float(1 << WEIGHT_BITS)).to(torch.int64)


def _invert(weights: Tensor, draws: Tensor) -> Tensor:
    """Inverse CDF: per row the first index whose running sum exceeds draw * total. [rows, n], [rows] -> [rows]."""
    running = weights.cumsum(-1)
    total = running[:, -1]
    threshold = (draws * total.to(torch.float64)).to(torch.int64)
    # The product may round up to the total itself when the draw is within 2^-53 of 1.
    threshold = torch.minimum(threshold, total - 1)
    return torch.searchsorted(running, threshold.unsqueeze(-1), right=True).squeeze(-1)


def _chunk_rows(vocab: int) -> int:
    return max(1, CHUNK_ELEMENTS // vocab)


def _row_chunks(rows: Sequence[int], vocab: int) -> Iterator[Sequence[int]]:
    step = _chunk_rows(vocab)
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


def _joined(parts: Sequence[npt.ArrayLike], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    return np.concatenate(parts, dtype=dtype, casting="unsafe")  # a list without anything in it is of floats


def _index(values: Sequence[int], put: Put) -> Tensor:
    return put(np.array(values, np.int64))


def _column(values: Iterable[float], put: Put, dtype: npt.DTypeLike = np.float64) -> Tensor:
    return put(np.array(list(values), dtype)).unsqueeze(-1)


def _drawings(specs: Sequence[SampleSpec], vocab: int) -> npt.NDArray[Any]:
    """DRAWING [rows]: what the specs say of rows that are not edited, or have been."""
    how = np.zeros(len(specs), DRAWING)
    for row, spec in enumerate(specs):
        p = spec.params
        if p.temperature >= GREEDY_BELOW:
            top_k = p.top_k if 0 < p.top_k < vocab else 0
            how[row] = (p.top_p, p.min_p, uniform(p.seed, spec.position), top_k, p.temperature)
    return how


class _SeenTokens:
    """The distinct tokens of one request and how often each was generated, following its history step by step.

    The prompt is counted only if a repetition penalty asks for it. A step costs O(new tokens); a request of 128k tokens
    is read once.
    """

    __slots__ = ("consumed", "counts", "ids", "last", "place", "prompt_tokens", "with_prompt")

    def __init__(self, spec: SampleSpec) -> None:
        self.prompt_tokens = spec.prompt_tokens
        self.with_prompt = spec.params.repetition_penalty != 1.0
        prompt = np.asarray(spec.history[: spec.prompt_tokens] if self.with_prompt else (), dtype=np.int64)
        distinct = np.unique(prompt).tolist()
        self.ids = array("q", distinct)
        self.counts = array("f", bytes(4 * len(distinct)))
        self.place = {token: index for index, token in enumerate(distinct)}
        self.consumed = spec.prompt_tokens
        self.last = spec.history[spec.prompt_tokens - 1] if spec.prompt_tokens else -1
        self.extend(spec)

    def follows(self, spec: SampleSpec) -> bool:
        """Whether `spec.history` still begins with what was counted, as far as lengths and the last token can tell."""
        return (
            self.prompt_tokens == spec.prompt_tokens
            and self.with_prompt == (spec.params.repetition_penalty != 1.0)
            and self.consumed <= len(spec.history)
            and (self.consumed == 0 or spec.history[self.consumed - 1] == self.last)
        )

    def arrays(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Copies of `ids` and `counts`."""
        return np.array(self.ids, np.int64), np.array(self.counts, np.float32)

    def extend(self, spec: SampleSpec) -> None:
        for index in range(self.consumed, len(spec.history)):
            token = spec.history[index]
            place = self.place.get(token)
            if place is None:
                self.place[token] = len(self.ids)
                self.ids.append(token)
                self.counts.append(1.0)
            else:
                self.counts[place] += 1.0
            self.last = token
        self.consumed = len(spec.history)


_NOTHING_SEEN = np.empty(0, np.int64), np.empty(0, np.float32)


class Described(NamedTuple):
    """Of n tokens: their log-probabilities, and so many of the most likely alternatives as any of them asks for."""

    tokens: Tensor  # int64 [n]
    logprobs: Tensor  # fp32 [n]
    ranks: Tensor  # int64 [n]
    best: Tensor  # int64 [n, most]
    best_logprobs: Tensor  # fp32 [n, most]


class Sampler:
    """Device thread only. Keeps the penalty counts and grammar states of live requests, nothing else between calls."""

    def __init__(self, vocab: int, put: Put = torch.from_numpy) -> None:
        assert 0 < vocab < _INDEX_MASK, f"vocabulary of {vocab} tokens does not fit the order key"
        self.vocab = vocab
        self._put = put
        self._seen: dict[RequestId, _SeenTokens] = {}
        self._matchers = Matchers(vocab)
        self._native = load() is not None

    # -- public ---------------------------------------------------------------------------------------------------

    def use_torch(self) -> None:
        """Choose by torch, wherever the logits are."""
        self._native = False

    def choose(self, logits: Tensor, request_ids: Sequence[RequestId], specs: Sequence[SampleSpec]) -> Tensor:
        """One token per row, int64 [rows]. logits: fp32 [rows, vocab], only read.

        Row i belongs to `request_ids[i]` and `specs[i]`; a request appears in at most one row. NaN counts as -inf; a
        row with no finite logit yields token 0.
        """
        rows = len(specs)
        assert logits.shape == (rows, self.vocab), f"logits {tuple(logits.shape)}, wanted {(rows, self.vocab)}"
        assert logits.dtype == torch.float32, f"logits are {logits.dtype}, wanted float32"
        assert len(request_ids) == rows, f"{len(request_ids)} request ids for {rows} rows"
        plain = _is_free if self._native else _is_plain
        worked = [i for i, spec in enumerate(specs) if not plain(spec)]
        if not worked:
            return self._choose_plain(logits, request_ids, specs)
        chosen = torch.empty(rows, dtype=torch.int64, device=logits.device)
        rest = sorted(set(range(rows)).difference(worked))
        if rest:
            places = _index(rest, self._put)
            part = logits.index_select(0, places)
            chosen[places] = self._choose_plain(part, [request_ids[i] for i in rest], [specs[i] for i in rest])
        for chunk in _row_chunks(worked, self.vocab):
            places = _index(chunk, self._put)
            part = logits.index_select(0, places)
            chosen[places] = self._choose(part, [request_ids[i] for i in chunk], [specs[i] for i in chunk])
        return chosen

    def ways(
        self, request_ids: Sequence[RequestId], specs: Sequence[SampleSpec]
    ) -> tuple[npt.NDArray[Any], Edits | None]:
        """How the kernels choose what `choose` does (DRAWING [rows]), and the edits before that, if there are any; of
        rows without a grammar."""
        how = _drawings(specs, self.vocab)
        edited = [i for i, spec in enumerate(specs) if not _is_unedited(spec)]
        if not edited:
            return how, None
        rows, end = np.zeros(len(specs), EDIT), 0
        ids: list[npt.ArrayLike] = []
        values: list[npt.ArrayLike] = []
        for i in edited:
            params = specs[i].params
            allowed, moved = self._allowed(params), self._moved(specs[i])
            seen, counts = self._track(request_ids[i], specs[i]).arrays() if _penalises(params) else _NOTHING_SEEN
            ids += allowed, list(moved), seen
            values += [0.0] * len(allowed), list(moved.values()), counts
            sizes = len(allowed), len(moved), len(seen)
            rows[i] = (end, *sizes, params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
            end += sum(sizes)
        tokens = _joined(ids, np.int64)
        # The kernels write where these say.
        assert tokens.min(initial=0) >= 0, f"token {tokens.min()}"
        assert tokens.max(initial=0) < self.vocab, f"token {tokens.max()} of a vocabulary of {self.vocab}"
        return how, Edits(rows, tokens, _joined(values, np.float32))

    def describe(self, logits: Tensor, tokens: Tensor, most: int) -> Described:
        """Log-probability and rank of token i under row i, and the `most` best alternatives. logits: fp32 [n, vocab],
        only read; tokens: int64 [n], n at least 1."""
        assert logits.shape == (len(tokens), self.vocab), f"logits {tuple(logits.shape)} for {len(tokens)} tokens"
        step, most = _chunk_rows(self.vocab), min(most, self.vocab)
        if self._native:
            return Described(*describe(logits, tokens, most))
        pieces = zip(logits.split(step), tokens.split(step), strict=True)
        parts = [self._describe(raw, chosen, most) for raw, chosen in pieces]
        return parts[0] if len(parts) == 1 else Described(*(torch.cat(columns) for columns in zip(*parts, strict=True)))

    def advance(
        self, request_ids: Sequence[RequestId], specs: Sequence[SampleSpec], tokens: Sequence[int]
    ) -> dict[int, tuple[FinishReason, bool]]:
        """After `sample`, with the tokens it drew: the rows that their grammar ends, as `Matchers.advance` says."""
        return self._matchers.advance(request_ids, specs, tokens)

    def forget(self, request_ids: Sequence[RequestId]) -> None:
        """Drop what is kept for these requests; ids of which nothing is kept are fine."""
        for request_id in request_ids:
            self._seen.pop(request_id, None)
        self._matchers.forget(request_ids)

    # -- choosing -------------------------------------------------------------------------------------------------

    def _choose_plain(self, x: Tensor, request_ids: Sequence[RequestId], specs: Sequence[SampleSpec]) -> Tensor:
        """Tokens [rows] of rows that need no private copy of their logits here. x: only read."""
        return choose(x, *self.ways(request_ids, specs)) if self._native else argmax(x)

    def _choose(self, x: Tensor, request_ids: Sequence[RequestId], specs: Sequence[SampleSpec]) -> Tensor:
        """Tokens [rows] of all others. x: a private copy of their logits."""
        x = x.nan_to_num_(nan=-torch.inf, posinf=torch.finfo(x.dtype).max, neginf=-torch.inf)
        self._edit(x, request_ids, specs)
        return self._pick(x, specs)

    def _pick(self, x: Tensor, specs: Sequence[SampleSpec]) -> Tensor:
        """Tokens [rows] of rows whose logits are as they shall be. In torch x may be written to where it is drawn."""
        if self._native:
            return choose(x, _drawings(specs, self.vocab))
        groups: dict[Way, list[int]] = {}
        for i, spec in enumerate(specs):
            groups.setdefault(self._way(spec.params), []).append(i)
        if len(groups) == 1:
            return next(iter(groups))(x, specs, self._put)
        chosen = torch.empty(len(specs), dtype=torch.int64, device=x.device)
        for way, members in groups.items():
            places = _index(members, self._put)
            chosen[places] = way(x.index_select(0, places), [specs[i] for i in members], self._put)
        return chosen

    def _way(self, params: SamplingParams) -> Way:
        if params.temperature < GREEDY_BELOW:
            return _most_likely
        return self._by_rank(params) if 0 < params.top_k < self.vocab or params.top_p < 1.0 else _draw

    def _by_rank(self, params: SamplingParams) -> Way:
        return _draw_stepwise

    def _edit(self, x: Tensor, request_ids: Sequence[RequestId], specs: Sequence[SampleSpec]) -> None:
        """Apply what is allowed, grammars, then bias, min_tokens and bad sequences, then penalties in place, the last
        two each as one scatter over their tokens. x: [rows, vocab]."""
        for i, spec in enumerate(specs):
            if spec.params.allowed_token_ids:
                allowed = _index(self._allowed(spec.params), self._put)
                kept = x[i, allowed]
                x[i] = -torch.inf
                x[i, allowed] = kept
        complete = self._constrain(x, request_ids, specs)
        moved = [
            (i, token, value)
            for i, spec in enumerate(specs)
            for token, value in self._moved(spec, complete=i in complete).items()
        ]
        if moved:
            rows, tokens, values = zip(*moved, strict=True)
            x[_index(rows, self._put), _index(tokens, self._put)] += self._put(np.array(values, np.float32))
        penalised = [i for i, spec in enumerate(specs) if _penalises(spec.params)]
        if penalised:
            self._penalise(x, penalised, [request_ids[i] for i in penalised], [specs[i] for i in penalised])

    def _constrain(self, x: Tensor, request_ids: Sequence[RequestId], specs: Sequence[SampleSpec]) -> set[int]:
        """Bar in place what the rows' grammars do; the rows whose text can only end. x: [rows, vocab]."""
        rows = [i for i, spec in enumerate(specs) if spec.params.grammar is not None]
        if not rows:
            return set()
        barred, only_end = self._matchers.barred([request_ids[i] for i in rows], [specs[i] for i in rows])
        if len(rows) == len(specs):
            x.clamp_(min=LOWEST_ALLOWED).masked_fill_(self._put(barred), -torch.inf)
        else:
            places = _index(rows, self._put)
            part = x.index_select(0, places).clamp_(min=LOWEST_ALLOWED)
            x[places] = part.masked_fill_(self._put(barred), -torch.inf)
        return {i for i, only in zip(rows, only_end, strict=True) if only}

    def _allowed(self, params: SamplingParams) -> list[int]:
        """Token 0, which is chosen where nothing is left, if no allowed token is in the vocabulary; empty: any."""
        if not params.allowed_token_ids:
            return []
        return [token for token in params.allowed_token_ids if 0 <= token < self.vocab] or [0]

    def _moved(self, spec: SampleSpec, *, complete: bool = False) -> dict[int, float]:
        """What is added to the logits of some tokens, -inf where they are barred. `complete`: the text can only end."""
        params = spec.params
        moved = {token: bias for token, bias in params.logit_bias.items() if 0 <= token < self.vocab}
        if spec.generated < params.min_tokens and not complete:
            moved |= dict.fromkeys(self._stops(params), -inf)
        if params.bad_sequences:
            moved |= {token: -inf for token in _completing(spec) if 0 <= token < self.vocab}
        return moved

    def _stops(self, params: SamplingParams) -> list[int]:
        """The stop ids that can be barred: all, unless that would leave no token to choose."""
        stops = [token for token in params.stop_token_ids if 0 <= token < self.vocab]
        choosable = params.allowed_token_ids or range(self.vocab)
        return stops if len(stops) < len(choosable) or not params.stop_token_ids.issuperset(choosable) else []

    def _penalise(
        self, x: Tensor, rows: Sequence[int], request_ids: Sequence[RequestId], specs: Sequence[SampleSpec]
    ) -> None:
        seen = [self._track(request_id, spec) for request_id, spec in zip(request_ids, specs, strict=True)]
        lengths = [len(s.ids) for s in seen]

        def spread(values: Iterable[float]) -> Tensor:
            return self._put(np.repeat(np.fromiter(values, np.float32, len(lengths)), lengths))

        row = self._put(np.repeat(np.asarray(rows, np.int64), lengths))
        ids, counts = (np.concatenate(arrays) for arrays in zip(*(s.arrays() for s in seen), strict=True))
        column, generated = self._put(ids), self._put(counts)
        repetition = spread(s.params.repetition_penalty for s in specs)
        values = x[row, column]
        values = torch.where(values > 0, values / repetition, values * repetition)
        values -= spread(s.params.presence_penalty for s in specs) * (generated > 0)
        values -= spread(s.params.frequency_penalty for s in specs) * generated
        x[row, column] = values

    def _track(self, request_id: RequestId, spec: SampleSpec) -> _SeenTokens:
        seen = self._seen.get(request_id)
        if seen is None or not seen.follows(spec):
            seen = self._seen[request_id] = _SeenTokens(spec)
        else:
            seen.extend(spec)
        return seen

    # -- log-probabilities ----------------------------------------------------------------------------------------

    def _describe(self, raw: Tensor, tokens: Tensor, most: int) -> Described:
        logprobs = raw.log_softmax(-1)
        column = tokens.unsqueeze(-1)
        own = logprobs.gather(-1, column).squeeze(-1)
        chosen = raw.gather(-1, column)
        before = torch.arange(self.vocab, device=raw.device) < column
        ranks = ((raw > chosen) | ((raw == chosen) & before)).sum(-1).add_(1)
        # Where no alternatives are wanted there is nothing to rank.
        best = _best(raw, most) if most else column[:, :0]
        return Described(tokens, own, ranks, best, logprobs.gather(-1, best))


class BlindSampler(Sampler):
    """A `Sampler` that never looks at what it computed: the same tokens, at the price of ranking the whole vocabulary
    where only a look could tell that less would do. No top_k, or a large one, with top_p: a sort of 152k tokens in each
    row, for which a GPU takes less time than its host takes to ask and be answered."""

    def __init__(self, vocab: int, put: Put = torch.from_numpy) -> None:
        super().__init__(vocab, put)
        self.use_torch()

    def _by_rank(self, params: SamplingParams) -> Way:
        return _draw_few if 0 < params.top_k <= CANDIDATES[0] else _draw_all


def logprob_entries(found: Sequence[npt.NDArray[Any]], tops: Sequence[int]) -> list[TokenLogprobs]:
    """What `found` says, the arrays of a `Described` on the host; the first `tops[i]` alternatives of token i."""
    tokens, logprobs, ranks, best, best_logprobs = found
    logprobs, best_logprobs = (np.fmax(values, LOWEST_LOGPROB) for values in (logprobs, best_logprobs))
    columns = (column.tolist() for column in (tokens, logprobs, ranks, best, best_logprobs))
    return [
        TokenLogprobs(token, logprob, rank, tuple(zip(ids[:top], values[:top], strict=True)))
        for token, logprob, rank, ids, values, top in zip(*columns, tops, strict=True)
    ]


def _penalises(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def _is_free(spec: SampleSpec) -> bool:
    """Whether no grammar constrains it."""
    return spec.params.grammar is None


def _is_plain(spec: SampleSpec) -> bool:
    """Whether its token is the most likely one, by the logits as they are."""
    return spec.params.temperature < GREEDY_BELOW and _is_unedited(spec)


def _is_unedited(spec: SampleSpec) -> bool:
    """Whether its token is chosen by the logits as they are."""
    params = spec.params
    restricts = bool(params.allowed_token_ids or params.bad_sequences) or params.grammar is not None
    early = params.min_tokens > 0 and spec.generated < params.min_tokens
    return not (restricts or params.logit_bias or early or _penalises(params))


def _completing(spec: SampleSpec) -> list[int]:
    """The tokens that would complete a bad sequence now; only what was generated counts as its beginning."""
    longest = max(len(run) for run in spec.params.bad_sequences)
    said = tuple(spec.history[max(spec.prompt_tokens, spec.position - longest + 1) : spec.position])
    return [run[-1] for run in spec.params.bad_sequences if said[max(0, len(said) - len(run) + 1) :] == tuple(run[:-1])]


# -- ways to choose ---------------------------------------------------------------------------------------------------


def _most_likely(x: Tensor, specs: Sequence[SampleSpec], put: Put) -> Tensor:
    return argmax(x)


def _scaled(x: Tensor, specs: Sequence[SampleSpec], put: Put) -> Tensor:
    """Logits over temperature with their maximum at 0, so that a small temperature cannot overflow."""
    top = x.amax(-1, keepdim=True).clamp_(min=torch.finfo(x.dtype).min)
    return (x - top).div_(_column((s.params.temperature for s in specs), put, np.float32))


def _draws(specs: Sequence[SampleSpec], put: Put) -> Tensor:
    return put(np.array([uniform(spec.params.seed, spec.position) for spec in specs]))


def _drop_unlikely(x: Tensor, weights: Tensor, specs: Sequence[SampleSpec], put: Put) -> Tensor:
    """min_p: weights of tokens less likely than min_p times the best (whose exponential is 1) become 0."""
    if all(spec.params.min_p == 0.0 for spec in specs):
        return weights
    return weights * (x.exp().to(torch.float64) >= _column((spec.params.min_p for spec in specs), put))


def _draw(x: Tensor, specs: Sequence[SampleSpec], put: Put) -> Tensor:
    """No top_k, no top_p: the inverse CDF runs in the order of ids and nothing is sorted."""
    x = _scaled(x, specs, put)
    return _invert(_drop_unlikely(x, _weights(x), specs, put), _draws(specs, put))


# top_k, top_p. A row's nucleus is the same prefix of the same order whichever way it was found, so the way cannot be
# seen in the result.


def _draw_stepwise(x: Tensor, specs: Sequence[SampleSpec], put: Put) -> Tensor:
    """Rank a few tokens of every row, look, then rank more of the rows whose nucleus may be wider."""
    x = _scaled(x, specs, put)
    chosen = torch.empty(len(specs), dtype=torch.int64, device=x.device)
    left = list(range(len(specs)))
    for best in (*(n for n in CANDIDATES if n < x.shape[1]), x.shape[1]):
        part = x[left]
        tokens, wide = _draw_from_best(part, _best(part, best), [specs[i] for i in left], put)
        chosen[left] = tokens
        left = [i for i, more in zip(left, wide.tolist(), strict=True) if more]
        if not left:
            break
    return chosen


def _draw_few(x: Tensor, specs: Sequence[SampleSpec], put: Put) -> Tensor:
    """Every row has a top_k: rank as many as the greatest."""
    x, widest = _scaled(x, specs, put), max(spec.params.top_k for spec in specs)
    return _draw_from_best(x, _best(x, min(widest, x.shape[1])), specs, put)[0]


def _draw_all(x: Tensor, specs: Sequence[SampleSpec], put: Put) -> Tensor:
    """Rank the whole vocabulary."""
    x = _scaled(x, specs, put)
    # The order of the keys, without making them. + 0.0 makes -0.0 equal 0.0.
    order = (x + 0.0).sort(dim=-1, descending=True, stable=True).indices
    return _draw_from_best(x, order, specs, put)[0]


def _draw_from_best(x: Tensor, ids: Tensor, specs: Sequence[SampleSpec], put: Put) -> tuple[Tensor, Tensor]:
    """Draw among the most likely tokens, after filters: (tokens, whether the nucleus may be wider), each [rows].

    x: scaled logits [rows, vocab]; ids: the tokens to draw from [rows, best], most likely first. The inverse CDF runs
    from the most likely token down.
    """
    vocab, best = x.shape[1], ids.shape[1]
    ranked = x.gather(-1, ids)
    weights = _weights(ranked)
    running = weights.cumsum(-1)
    limits = [spec.params.top_k if 0 < spec.params.top_k < vocab else vocab for spec in specs]
    limit = _column(limits, put, np.int64)
    # The mass that top_p is a share of: what top_k left, else the whole vocabulary.
    total = running.gather(-1, limit.clamp(max=best) - 1)
    if best < vocab and max(limits) == vocab:
        total = torch.where(limit == vocab, _weights(x).sum(-1, keepdim=True), total)
    share = _column((spec.params.top_p for spec in specs), put)
    needed = torch.where(share >= 1.0, total, (share * total.to(torch.float64)).to(torch.int64))
    kept = (running - weights < needed) & (torch.arange(best, device=x.device) < limit)
    kept[:, 0] = True  # a top_p of next to nothing still keeps the most likely token
    wide = (limit > best) & ((limit < vocab) | (running[:, -1:] < needed))
    places = _invert(_drop_unlikely(ranked, weights * kept, specs, put), _draws(specs, put))
    return ids.gather(-1, places.unsqueeze(-1)).squeeze(-1), wide.squeeze(-1)
