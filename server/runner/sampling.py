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

**Cost.** Rows are grouped by need, so a plain row never pays for another's features: all-greedy is one argmax; a drawn
row without top_k/top_p has no sort; one with them ranks 512 tokens, and more only where those do not hold `top_p` of
the mass. Penalties touch the tokens a request has seen, not the vocabulary. With 152k tokens on one CPU core, per row:
argmax 0.4 ms, plain draw 1.3 ms, top_p within the first 512 tokens 2.5 ms.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from server.kernels.native.rows import argmax
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


def _row_chunks(rows: Sequence[int], vocab: int) -> Iterator[Sequence[int]]:
    step = max(1, CHUNK_ELEMENTS // vocab)
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


def _column(values: Iterable[float], like: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(list(values), dtype=dtype, device=like.device).unsqueeze(-1)


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


class Sampler:
    """Device thread only. Keeps the penalty counts and grammar states of live requests, nothing else between calls."""

    def __init__(self, vocab: int) -> None:
        assert 0 < vocab < _INDEX_MASK, f"vocabulary of {vocab} tokens does not fit the order key"
        self.vocab = vocab
        self._seen: dict[RequestId, _SeenTokens] = {}
        self._matchers = Matchers(vocab)

    # -- public ---------------------------------------------------------------------------------------------------

    def sample(
        self, logits: Tensor, request_ids: Sequence[RequestId], specs: Sequence[SampleSpec]
    ) -> list[tuple[int, TokenLogprobs | None]]:
        """One token per row, with its log-probabilities where the spec asks. logits: fp32 [rows, vocab], only read.

        Row i belongs to `request_ids[i]` and `specs[i]`; a request appears in at most one row. NaN counts as -inf; a
        row with no finite logit yields token 0.
        """
        rows = len(specs)
        assert logits.shape == (rows, self.vocab), f"logits {tuple(logits.shape)}, wanted {(rows, self.vocab)}"
        assert logits.dtype == torch.float32, f"logits are {logits.dtype}, wanted float32"
        assert len(request_ids) == rows, f"{len(request_ids)} request ids for {rows} rows"
        if rows == 0:
            return []
        worked = [i for i, spec in enumerate(specs) if spec.params.temperature >= GREEDY_BELOW or _edits(spec)]
        if not worked:
            chosen = argmax(logits)
        else:
            chosen = torch.empty(rows, dtype=torch.int64, device=logits.device)
            plain = sorted(set(range(rows)).difference(worked))
            if plain:
                chosen[plain] = argmax(logits[plain])
            for chunk in _row_chunks(worked, self.vocab):
                chosen[chunk] = self._choose(logits[chunk], [request_ids[i] for i in chunk], [specs[i] for i in chunk])
        tokens: list[int] = chosen.tolist()
        found: list[TokenLogprobs | None] = [None] * rows
        wanting = [i for i, spec in enumerate(specs) if spec.params.logprobs is not None]
        if wanting:
            tops = [specs[i].params.logprobs or 0 for i in wanting]
            entries = self._logprobs(logits, wanting, [tokens[i] for i in wanting], tops)
            for i, entry in zip(wanting, entries, strict=True):
                found[i] = entry
        return list(zip(tokens, found, strict=True))

    def prompt_logprobs(self, logits: Tensor, targets: Sequence[int], top: int) -> list[TokenLogprobs]:
        """Log-probability, rank and `top` best alternatives of `targets[i]` under row i. logits: fp32 [n, vocab]."""
        assert logits.shape == (len(targets), self.vocab), f"logits {tuple(logits.shape)} for {len(targets)} targets"
        return self._logprobs(logits, range(len(targets)), targets, [top] * len(targets))

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

    def _choose(self, x: Tensor, request_ids: Sequence[RequestId], specs: Sequence[SampleSpec]) -> Tensor:
        """Tokens [rows] of rows that need more than an argmax. x: a private copy of their logits."""
        x = x.nan_to_num_(nan=-torch.inf, posinf=torch.finfo(x.dtype).max, neginf=-torch.inf)
        self._edit(x, request_ids, specs)
        chosen = torch.empty(len(specs), dtype=torch.int64, device=x.device)
        groups: dict[Callable[[Tensor, Sequence[SampleSpec]], Tensor], list[int]] = {}
        for i, spec in enumerate(specs):
            groups.setdefault(self._way(spec.params), []).append(i)
        for way, members in groups.items():
            part = x if len(members) == len(specs) else x[members]
            chosen[members] = way(part, [specs[i] for i in members])
        return chosen

    def _way(self, params: SamplingParams) -> Callable[[Tensor, Sequence[SampleSpec]], Tensor]:
        if params.temperature < GREEDY_BELOW:
            return _most_likely
        return _draw_ranked if 0 < params.top_k < self.vocab or params.top_p < 1.0 else _draw

    def _edit(self, x: Tensor, request_ids: Sequence[RequestId], specs: Sequence[SampleSpec]) -> None:
        """Apply what is allowed, grammars, bias, min_tokens, bad sequences and penalties in place, from bias on each as
        one scatter over its tokens. x: [rows, vocab]."""
        for i, spec in enumerate(specs):
            if spec.params.allowed_token_ids:
                allowed = _index([token for token in spec.params.allowed_token_ids if token < self.vocab], x)
                kept = x[i, allowed]
                x[i] = -torch.inf
                x[i, allowed] = kept
        complete = self._constrain(x, request_ids, specs)
        biased = [(i, t, b) for i, s in enumerate(specs) for t, b in s.params.logit_bias.items() if 0 <= t < self.vocab]
        if biased:
            rows, tokens, values = zip(*biased, strict=True)
            x[_index(rows, x), _index(tokens, x)] += torch.tensor(values, dtype=x.dtype, device=x.device)
        barred = [
            (i, t)
            for i, s in enumerate(specs)
            if s.generated < s.params.min_tokens and i not in complete
            for t in self._stops(s.params)
        ]
        barred += [
            (i, t) for i, s in enumerate(specs) if s.params.bad_sequences for t in _completing(s) if t < self.vocab
        ]
        if barred:
            rows, tokens = zip(*barred, strict=True)
            x[_index(rows, x), _index(tokens, x)] = -torch.inf
        penalised = [i for i, spec in enumerate(specs) if _penalises(spec.params)]
        if penalised:
            self._penalise(x, penalised, [request_ids[i] for i in penalised], [specs[i] for i in penalised])

    def _constrain(self, x: Tensor, request_ids: Sequence[RequestId], specs: Sequence[SampleSpec]) -> set[int]:
        """Bar in place what the rows' grammars do; the rows whose text can only end. x: [rows, vocab]."""
        rows = [i for i, spec in enumerate(specs) if spec.params.grammar is not None]
        if not rows:
            return set()
        barred, only_end = self._matchers.barred([request_ids[i] for i in rows], [specs[i] for i in rows])
        part = x if len(rows) == len(specs) else x[rows]
        part.clamp_(min=LOWEST_ALLOWED).masked_fill_(torch.from_numpy(barred).to(x.device), -torch.inf)
        if part is not x:
            x[rows] = part
        return {i for i, only in zip(rows, only_end, strict=True) if only}

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
            return torch.from_numpy(np.repeat(np.fromiter(values, np.float32, len(lengths)), lengths)).to(x.device)

        row = torch.from_numpy(np.repeat(np.asarray(rows, np.int64), lengths)).to(x.device)
        ids: npt.NDArray[np.int64] = np.concatenate([np.frombuffer(s.ids, np.int64) for s in seen])
        column = torch.from_numpy(ids).to(x.device)
        counts = torch.from_numpy(np.concatenate([np.frombuffer(s.counts, np.float32) for s in seen])).to(x.device)
        repetition = spread(s.params.repetition_penalty for s in specs)
        values = x[row, column]
        values = torch.where(values > 0, values / repetition, values * repetition)
        values -= spread(s.params.presence_penalty for s in specs) * (counts > 0)
        values -= spread(s.params.frequency_penalty for s in specs) * counts
        x[row, column] = values

    def _track(self, request_id: RequestId, spec: SampleSpec) -> _SeenTokens:
        seen = self._seen.get(request_id)
        if seen is None or not seen.follows(spec):
            seen = self._seen[request_id] = _SeenTokens(spec)
        else:
            seen.extend(spec)
        return seen

    # -- log-probabilities ----------------------------------------------------------------------------------------

    def _logprobs(
        self, logits: Tensor, rows: Sequence[int], tokens: Sequence[int], tops: Sequence[int]
    ) -> list[TokenLogprobs]:
        """Entry j describes `tokens[j]` under logits row `rows[j]`, with its `tops[j]` best alternatives."""
        found: list[TokenLogprobs] = []
        for places in _row_chunks(range(len(rows)), self.vocab):
            raw = logits[[rows[j] for j in places]]
            found += self._chunk_logprobs(raw, [tokens[j] for j in places], [min(tops[j], self.vocab) for j in places])
        return found

    def _chunk_logprobs(self, raw: Tensor, tokens: Sequence[int], tops: Sequence[int]) -> list[TokenLogprobs]:
        logprobs = raw.log_softmax(-1).clamp_(min=LOWEST_LOGPROB)
        column = _index(tokens, raw).unsqueeze(-1)
        own = logprobs.gather(-1, column).squeeze(-1).tolist()
        chosen = raw.gather(-1, column)
        before = torch.arange(self.vocab, device=raw.device) < column
        ranks = ((raw > chosen) | ((raw == chosen) & before)).sum(-1).add_(1).tolist()
        best: list[list[tuple[int, float]]] = [[] for _ in tokens]
        if widest := max(tops):
            ids = _order_keys(raw).topk(widest, sorted=True).indices
            values = logprobs.gather(-1, ids)
            best = [list(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
        return [
            TokenLogprobs(token, logprob, rank, tuple(alternatives[:top]))
            for token, logprob, rank, alternatives, top in zip(tokens, own, ranks, best, tops, strict=True)
        ]


def _penalises(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def _edits(spec: SampleSpec) -> bool:
    """Whether the row's logits change before a token is chosen."""
    params = spec.params
    restricts = bool(params.allowed_token_ids or params.bad_sequences) or params.grammar is not None
    return restricts or bool(params.logit_bias) or spec.generated < params.min_tokens or _penalises(params)


def _completing(spec: SampleSpec) -> list[int]:
    """The tokens that would complete a bad sequence now; only what was generated counts as its beginning."""
    longest = max(len(run) for run in spec.params.bad_sequences)
    said = tuple(spec.history[max(spec.prompt_tokens, spec.position - longest + 1) : spec.position])
    return [run[-1] for run in spec.params.bad_sequences if said[max(0, len(said) - len(run) + 1) :] == tuple(run[:-1])]


def _index(values: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=like.device)


# -- ways to choose: (logits [rows, vocab], specs) -> tokens [rows] ---------------------------------------------------


def _most_likely(x: Tensor, specs: Sequence[SampleSpec]) -> Tensor:
    return argmax(x)


def _scaled(x: Tensor, specs: Sequence[SampleSpec]) -> Tensor:
    """Logits over temperature with their maximum at 0, so that a small temperature cannot overflow."""
    top = x.amax(-1, keepdim=True).clamp_(min=torch.finfo(x.dtype).min)
    return (x - top).div_(_column((s.params.temperature for s in specs), x, x.dtype))


def _draws(specs: Sequence[SampleSpec], like: Tensor) -> Tensor:
    draws = [uniform(spec.params.seed, spec.position) for spec in specs]
    return torch.tensor(draws, dtype=torch.float64, device=like.device)


def _drop_unlikely(x: Tensor, weights: Tensor, specs: Sequence[SampleSpec]) -> Tensor:
    """min_p: weights of tokens less likely than min_p times the best (whose exponential is 1) become 0."""
    if all(spec.params.min_p == 0.0 for spec in specs):
        return weights
    return weights * (x.exp().to(torch.float64) >= _column((spec.params.min_p for spec in specs), x))


def _draw(x: Tensor, specs: Sequence[SampleSpec]) -> Tensor:
    """No top_k, no top_p: the inverse CDF runs in the order of ids and nothing is sorted."""
    x = _scaled(x, specs)
    return _invert(_drop_unlikely(x, _weights(x), specs), _draws(specs, x))


def _draw_ranked(x: Tensor, specs: Sequence[SampleSpec]) -> Tensor:
    """top_k, top_p: rank a few tokens of every row, then more of the rows whose nucleus may be wider.

    A row's nucleus is the same prefix of the same order whichever way it was found, so the way cannot be seen in the
    result.
    """
    x = _scaled(x, specs)
    chosen = torch.empty(len(specs), dtype=torch.int64, device=x.device)
    left = list(range(len(specs)))
    for best in (*(n for n in CANDIDATES if n < x.shape[1]), x.shape[1]):
        tokens, wide = _draw_from_best(x[left], [specs[i] for i in left], best)
        chosen[left] = tokens
        left = [i for i, more in zip(left, wide.tolist(), strict=True) if more]
        if not left:
            break
    return chosen


def _draw_from_best(x: Tensor, specs: Sequence[SampleSpec], best: int) -> tuple[Tensor, Tensor]:
    """Draw among the `best` most likely tokens, after filters: (tokens, whether the nucleus may be wider), each [rows].

    x: scaled logits [rows, vocab]. The inverse CDF runs from the most likely token down.
    """
    vocab = x.shape[1]
    ids = _order_keys(x).topk(best, sorted=True).indices
    ranked = x.gather(-1, ids)
    weights = _weights(ranked)
    running = weights.cumsum(-1)
    limits = [spec.params.top_k if 0 < spec.params.top_k < vocab else vocab for spec in specs]
    limit = _column(limits, x, torch.int64)
    # The mass that top_p is a share of: what top_k left, else the whole vocabulary.
    total = running.gather(-1, limit.clamp(max=best) - 1)
    if best < vocab and max(limits) == vocab:
        total = torch.where(limit == vocab, _weights(x).sum(-1, keepdim=True), total)
    share = _column((spec.params.top_p for spec in specs), x)
    needed = torch.where(share >= 1.0, total, (share * total.to(torch.float64)).to(torch.int64))
    kept = (running - weights < needed) & (torch.arange(best, device=x.device) < limit)
    kept[:, 0] = True  # a top_p of next to nothing still keeps the most likely token
    wide = (limit > best) & ((limit < vocab) | (running[:, -1:] < needed))
    places = _invert(_drop_unlikely(ranked, weights * kept, specs), _draws(specs, x))
    return ids.gather(-1, places.unsqueeze(-1)).squeeze(-1), wide.squeeze(-1)
