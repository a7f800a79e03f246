"""Constrained output: from a `Constraint` to masks over the vocabulary. The only importer of the matching library.

Two halves. `Grammars` (loop thread, with a small pool of its own) compiles constraints and keeps the compiled ones.
`Matchers` (device thread) follows the live requests' histories through their grammars, says before each draw which
tokens may come, and after it which requests are over.

**Bounds.** The library matches by derivatives of regular expressions and Earley items, made as they are needed: a
grammar that explodes does so within the fuel below, at compile time as a refusal, later as the end of that one request.
Compiling gives the interpreter lock up. Between API keys nothing is shared, so that nobody can tell from the time that
an answer takes whether another has used the same schema.

**Cost.** A mask takes 20 to 50 us per row at 152k tokens, all rows in parallel; to start a request is a copy of 10 us.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from server.errors import InvalidRequest, Overloaded
from server.runner.json_schema import enforceable
from server.runner.refusal import Refused
from server.runner.regexes import literal, translate
from server.types import (
    Behind,
    Choice,
    Constraint,
    Either,
    FinishReason,
    FreeGrammar,
    JsonSchema,
    Regex,
    RequestId,
    SampleSpec,
    TaggedJson,
)

try:
    import llguidance
    from llguidance.gbnf_to_lark import gbnf_to_lark
except ImportError:  # a daemon without it serves everything else
    llguidance = None  # type: ignore[assignment]

COMPILE_THREADS = 2
MAX_QUEUED_COMPILES = 64
MAX_CACHED = 256
"""Compiled grammars kept; of all tenants together."""
MAX_CACHED_BYTES = 2**20
"""Of their sources. Compiled, a large schema takes 150 times as much, a small one 200 kB; a live request 0.5 MB."""
MAX_ROW_ITEMS = 1_000
"""What may come next at one place of the text, as the parser counts it."""
COMPILE_FUEL = 1_000_000
STEP_FUEL = 100_000
STEP_ITEMS = 5_000
"""Work on regular expressions at compile time (20 ms) and in a step (7 ms), and on rules in a step: 0.3 ms where these
are plain, 45 ms where they are as ambiguous as can be."""
TRIAL_TOKENS = 4
"""Written when a grammar is compiled, to find at once what becomes too large as soon as it begins."""
MAX_LEXER_STATES = 10_000
"""Of 1 to 2 kB each, per live request."""
MAX_GRAMMAR_SIZE = 200_000
WHITESPACE = r" |\n[\x20\x09]{0,40}"
"""Between the tokens of a JSON text: enough for every way to indent, too little to go on for ever."""
ESCAPES = '"\\bfnrt'
"""Escapes in JSON strings. Without \\u each string can be written in one way only; with it the name of a property could
be written so that it passes for one that has no rule."""
MESSAGE_CHARS = 300
MIN_PARALLEL_ROWS = 4
MAX_THREADS = 8
"""Rows from which on masks are made by several threads, and how many: to hand work over takes as long as two masks."""

_ALL = np.uint32(0xFFFFFFFF)
_NO_TEXT = "no text of this model's tokens meets it"
_JSON_RULES = {"whitespace_pattern": WHITESPACE, "json_allowed_escapes": ESCAPES}
_FREE = r"FREE: /(.|\n)*/"
_TAIL = '%llguidance {"no_forcing": true}\n'
"""Whichever tokens write the text may come: the library would choose them itself where only one text can follow."""
_LARK_TEXT = re.compile(r'"(?:\\.|[^"\\\n])*"i?|/(?:\\.|[^/\\\n])+/[imslux]*|//[^\n]*|#[^\n]*')
_LARK_REFUSED = re.compile(r"%(?:json|lark|llguidance)\b(?!\s*\{\s*\})|\b(?:max_tokens|temperature|stop)\s*=")


class CompiledGrammar:
    """A compiled constraint. Any thread: `start` copies, nothing else is ever done to it."""

    __slots__ = ("_matcher",)

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def start(self) -> Any:
        """A matcher at the beginning of the text."""
        return self._matcher.deep_copy()


class Vocabulary:
    """What the model's tokens write: `texts[id]` in bytes, b"" for a token that no constrained text may hold.

    `special` are control tokens by name, which are never part of a text. Takes 10 us per token to make, with the
    interpreter lock: 1.6 s for 152k tokens, so it is made before the daemon is ready.
    """

    def __init__(self, texts: Sequence[bytes], special: Mapping[str, int]) -> None:
        self.special = dict(special)
        self.size = len(texts)
        # An id of our own, beyond the vocabulary, stands for the end: so its bit says "the text may end here", and the
        # model's own end-of-sequence tokens are whatever the request says.
        source = _TokenSource([*texts, b"<end>"], sorted({*special.values(), self.size}), self.size)
        self.tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(source),
            eos_token=self.size,
            slices=llguidance.LLTokenizer.json_slices(),
        )


class _TokenSource:
    """The tokenizer that the library asks for, of which it only needs the tokens."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes], special: list[int], end: int) -> None:
        self.tokens = tokens
        self.special_token_ids = special
        self.eos_token_id = end

    def __call__(self, text: str | bytes) -> list[int]:
        return []


def available() -> bool:
    """Whether the matching library is installed."""
    return llguidance is not None


class Grammars:
    """Compiles constraints, off the loop thread, and keeps what was compiled lately. Loop thread."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._pool = ThreadPoolExecutor(COMPILE_THREADS, thread_name_prefix="grammar")
        self._open: set[Future[CompiledGrammar]] = set()
        self._cache: OrderedDict[tuple[str, Constraint], tuple[Future[CompiledGrammar], int]] = OrderedDict()
        self._cached_bytes = 0

    async def compile(self, constraint: Constraint, tenant: str, param: str) -> CompiledGrammar:
        """The grammar of `constraint`. InvalidRequest naming the request field `param` if it cannot be enforced,
        Overloaded if too many wait to be compiled."""
        key = tenant, constraint
        known = self._cache.get(key)
        if known is None:
            future = self._start(constraint)
            self._keep(key, future)
        else:
            future = known[0]
            self._cache.move_to_end(key)
        waiting = asyncio.wrap_future(future)
        # Seen even if nobody waits any more: it would be logged otherwise, with parts of the constraint.
        waiting.add_done_callback(lambda done: self._seen(key, done))
        try:
            # Others may wait for the same one: whoever leaves must not take it away from them.
            return await asyncio.shield(waiting)
        except Refused as refused:
            raise InvalidRequest(f"'{param}' cannot be enforced: {refused}", param=param) from None

    def _seen(self, key: tuple[str, Constraint], done: asyncio.Future[CompiledGrammar]) -> None:
        if not done.cancelled() and done.exception() is not None:
            self._drop(key)

    def _start(self, constraint: Constraint) -> Future[CompiledGrammar]:
        self._open = {future for future in self._open if not future.done()}
        if len(self._open) >= MAX_QUEUED_COMPILES:
            raise Overloaded("too many grammars are waiting to be compiled", retry_after_s=1, code="compile_queue_full")
        future = self._pool.submit(compile_grammar, self._vocabulary, constraint)
        self._open.add(future)
        return future

    def _keep(self, key: tuple[str, Constraint], future: Future[CompiledGrammar]) -> None:
        size = len(repr(key[1]))
        self._cache[key] = future, size
        self._cached_bytes += size
        while len(self._cache) > 1 and (len(self._cache) > MAX_CACHED or self._cached_bytes > MAX_CACHED_BYTES):
            self._drop(next(iter(self._cache)))

    def _drop(self, key: tuple[str, Constraint]) -> None:
        _, size = self._cache.pop(key, (None, 0))
        self._cached_bytes -= size

    def close(self) -> None:
        """Start nothing more; what is being compiled ends by itself, soon."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def compile_grammar(vocabulary: Vocabulary, constraint: Constraint) -> CompiledGrammar:
    """Any thread. Raises Refused."""
    limits = llguidance.LLParserLimits(
        max_items_in_row=MAX_ROW_ITEMS,
        initial_lexer_fuel=COMPILE_FUEL,
        step_lexer_fuel=STEP_FUEL,
        step_max_items=STEP_ITEMS,
        max_lexer_states=MAX_LEXER_STATES,
        max_grammar_size=MAX_GRAMMAR_SIZE,
        verbose_errors=False,
    )
    matcher = llguidance.LLMatcher(
        vocabulary.tokenizer, _source(constraint, vocabulary.special), log_level=0, limits=limits
    )
    grammar = CompiledGrammar(matcher)
    _try(grammar.start(), vocabulary.size)
    return grammar


def _try(matcher: Any, size: int) -> None:
    """Write the first tokens of a text, whichever they are. Raises Refused if there are none or they cost too much."""
    for position in range(TRIAL_TOKENS):
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        said = _said(matcher.get_error())
        tokens = np.unpackbits(mask, count=size, bitorder="little").nonzero()[0]
        if said not in ("", _NO_TEXT):
            raise Refused(said)
        if not len(tokens):
            if position == 0:
                raise Refused("only the empty text meets it" if matcher.is_accepting() else _NO_TEXT)
            return
        matcher.consume_token(int(tokens[0]))


def _said(error: str) -> str:
    """The library's reason, in a line."""
    if error.startswith("NoExtension"):
        return _NO_TEXT
    if "coerce_one_of" in error:
        return "'oneOf' is supported where type, constant or a required property keep its options apart; use 'anyOf'"
    first = error.replace("<non-verbose/>", "").strip().partition("\n")[0]
    return first.rpartition("failed to compile JSON schema: ")[2][:MESSAGE_CHARS]


def _source(constraint: Constraint, special: Mapping[str, int]) -> str:
    """The constraint in the library's notation, Lark with additions."""
    # The options go behind, so that the library counts a client's lines as the client does.
    return f"{_rules(constraint, special)}\n{_TAIL}"


def _rules(constraint: Constraint, special: Mapping[str, int]) -> str:
    match constraint:
        case JsonSchema(text):
            return f"start: {_json(text)}"
        case Regex(text):
            return f"start: /{translate(text, whole=True)}/"
        case Choice(texts):
            return f"start: /{'|'.join(map(literal, texts))}/"
        case FreeGrammar(text):
            return _lark(text)
        case TaggedJson():
            return _tagged(constraint, special)
        case Either(options):
            names = [f"option{index}" for index in range(len(options))]
            nested = [_nested(name, option, special) for name, option in zip(names, options, strict=True)]
            return "\n".join((f"start: {' | '.join(names)}", *nested))
        case Behind(inner, open, close):
            return "\n".join((*_free_front(open, close, special), _nested("rest", inner, special)))


def _nested(name: str, constraint: Constraint, special: Mapping[str, int]) -> str:
    """A rule that is a whole grammar by itself."""
    return f"{name}: %lark {{\n{_rules(constraint, special)}\n}}"


def _free_front(open: str, close: str, special: Mapping[str, int]) -> list[str]:
    """`start`: free text up to `close`, then `rest`; a few blanks may stand between."""
    front = f"gap {_literals(open, special)} front gap" if open else "front gap"
    lazy = "" if close in special else "[lazy]"
    return [
        f"start: {f'({front})?' if open else front} rest",
        f"front{lazy}: FREE {_literals(close, special)}",
        _FREE,
        r"gap: /[ \n]{0,4}/",
    ]


def _json(text: str) -> str:
    """In Lark, a JSON value by the schema in `text`."""
    schema = enforceable(text)
    rules = {"x-guidance": _JSON_RULES} | (schema if isinstance(schema, dict) else {"allOf": [schema]})
    return f"%json {json.dumps(rules)}"


def _lark(text: str) -> str:
    """The grammar as Lark, from Lark or GBNF. What asks for more than matching is refused, it would not be done."""
    try:
        lark = gbnf_to_lark(text) if "::=" in text else text
    except RecursionError:
        raise Refused("the grammar is nested too deeply") from None
    except Exception as error:  # noqa: BLE001 - the converter raises what it likes
        raise Refused(f"the grammar is not GBNF: {_said(str(error))}") from None
    found = _LARK_REFUSED.search(_LARK_TEXT.sub(" ", lark))
    if found:
        raise Refused(f"{found[0]!r} is not supported in a grammar")
    return lark


def _tagged(constraint: TaggedJson, special: Mapping[str, int]) -> str:
    """A Lark grammar in which every schema stands between its literal texts."""
    trigger = constraint.trigger
    lines = []
    for index, tag in enumerate(constraint.tags):
        begin = tag.begin.removeprefix(trigger)
        lines.append(f"tag{index}: {_literals(begin, special)} json{index} {_literals(tag.end, special)}")
        lines.append(f"json{index}: {_json(tag.schema)}")
    tags = " | ".join(f"tag{index}" for index in range(len(constraint.tags)))
    if trigger:
        opening = "opening" if trigger in special else "opening[lazy]"
        start = _literals(trigger, special)
        lines += [f"{opening}: FREE {start}", f"call: opening ({tags})", _FREE]
        lines += ["REST: FREE" + (f" & ~(FREE {start} FREE)" if trigger not in special else ""), "rest: REST"]
        lines += [f"start: call{'*' if constraint.several else '?'} rest"]
    else:
        more = f" ({_literals(constraint.separator, special)} call)*" if constraint.several else ""
        lines += [f"call: {tags}", f"start: call{more}"]
    return "\n".join(lines)


def _literals(text: str, special: Mapping[str, int]) -> str:
    """`text` in a Lark rule: control tokens by their number, the rest as strings."""
    names = sorted(filter(None, special), key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]
    return " ".join(
        f"<[{special[part]}]>" if part in special else json.dumps(part, ensure_ascii=False) for part in parts if part
    )


class _Place:
    """Where one live request stands in its grammar, following its history step by step.

    `failed`: the grammar cannot go on. `complete`: the text can only end.
    """

    __slots__ = ("complete", "consumed", "failed", "grammar", "last", "matcher")

    def __init__(self, spec: SampleSpec) -> None:
        assert spec.params.grammar is not None, "only constrained requests have a place"
        self.grammar = spec.params.grammar
        self.matcher = self.grammar.start()
        self.consumed = spec.prompt_tokens
        self.last = -1
        self.failed = self.complete = False

    def follows(self, spec: SampleSpec) -> bool:
        """Whether `spec.history` still begins with what was consumed, as far as lengths and the last token can tell."""
        return (
            self.grammar is spec.params.grammar
            and spec.prompt_tokens <= self.consumed <= len(spec.history)
            and (self.consumed == spec.prompt_tokens or spec.history[self.consumed - 1] == self.last)
        )

    def extend(self, tokens: Sequence[int]) -> None:
        if tokens:
            self.failed = self.failed or not self.matcher.consume_tokens(list(tokens))
            self.consumed += len(tokens)
            self.last = tokens[-1]

    def accepts(self) -> bool:
        """Whether the text may end here. The library allows the end also where it is at a loss: that is none."""
        return bool(self.matcher.is_accepting())


class Matchers:
    """The live requests' places in their grammars. Device thread only."""

    def __init__(self, vocab: int) -> None:
        """`vocab`: width of the logits, and of the vocabulary that the grammars were compiled for."""
        self._vocab = vocab
        self._places: dict[RequestId, _Place] = {}
        helpers = min(MAX_THREADS, (os.cpu_count() or 1) - 1)
        self._executor = llguidance.LLExecutor(helpers) if available() and helpers > 1 else None

    def barred(
        self, request_ids: Sequence[RequestId], specs: Sequence[SampleSpec]
    ) -> tuple[npt.NDArray[np.bool_], list[bool]]:
        """Which tokens may not come next, [rows, vocab], and per row whether the text can only end.

        Every row has a grammar. Where the text may end the request's own stop tokens may come. A row that has nothing
        to choose from is not barred from anything: `advance` says that its token does not count.
        """
        places = [self._place(request_id, spec) for request_id, spec in zip(request_ids, specs, strict=True)]
        end, end_bit = self._vocab // 32, np.uint32(1 << self._vocab % 32)
        masks = np.zeros((len(places), end + 1), np.uint32)
        self._fill(masks, [(place.matcher, row) for row, place in enumerate(places) if not place.failed])
        ends = ((masks[:, end] & end_bit) != 0).tolist()
        masks[:, end] &= ~end_bit
        texts = (np.bitwise_or.reduce(masks, axis=1) != 0).tolist()
        for place, spec, mask, may_end, text in zip(places, specs, masks, ends, texts, strict=True):
            place.complete = False
            if text and not may_end:
                continue
            may_end = may_end and not place.failed and (text or place.accepts())
            place.failed = place.failed or place.matcher.is_error() or not (may_end or text)
            place.complete = may_end and not text
            stops = [token for token in spec.params.stop_token_ids if 0 <= token < self._vocab]
            if place.failed or (place.complete and not stops):
                mask[:] = _ALL
            elif may_end:
                for token in stops:
                    mask[token // 32] |= np.uint32(1 << token % 32)
        barred = np.unpackbits((~masks).view(np.uint8), axis=1, count=self._vocab, bitorder="little")
        return barred.view(np.bool_), [place.complete for place in places]

    def _fill(self, masks: npt.NDArray[np.uint32], rows: list[tuple[Any, int]]) -> None:
        """The masks of (matcher, row), in parallel where that is faster than one after the other."""
        address, size = masks.ctypes.data, masks.strides[0]
        if self._executor is not None and len(rows) >= MIN_PARALLEL_ROWS:
            self._executor.unsafe_compute_mask_ptr(rows, address, size, len(masks))
        else:
            for matcher, row in rows:
                matcher.unsafe_compute_mask_ptr(address + row * size, size)

    def advance(
        self, request_ids: Sequence[RequestId], specs: Sequence[SampleSpec], tokens: Sequence[int]
    ) -> dict[int, tuple[FinishReason, bool]]:
        """Take in the tokens that were drawn. Per row that is over with them: STOP where the text is complete and ERROR
        where the grammar cannot go on, and whether the token belongs to what was generated."""
        ends: dict[int, tuple[FinishReason, bool]] = {}
        for row, (request_id, spec, token) in enumerate(zip(request_ids, specs, tokens, strict=True)):
            if spec.params.grammar is None:
                continue
            place = self._places[request_id]
            stops = token in spec.params.stop_token_ids
            if place.complete:
                ends[row] = FinishReason.STOP, stops
                continue
            if not stops:
                place.extend([token])
            if place.failed:
                ends[row] = FinishReason.ERROR, False
            elif place.matcher.is_stopped():
                ends[row] = (FinishReason.STOP, True) if place.accepts() else (FinishReason.ERROR, False)
        return ends

    def forget(self, request_ids: Iterable[RequestId]) -> None:
        """Drop what is kept for these requests; ids of which nothing is kept are fine."""
        for request_id in request_ids:
            self._places.pop(request_id, None)

    def _place(self, request_id: RequestId, spec: SampleSpec) -> _Place:
        place = self._places.get(request_id)
        if place is None or not place.follows(spec):
            place = self._places[request_id] = _Place(spec)
        place.extend(spec.history[place.consumed :])
        return place
