"""Text in, text out: tokenizer, chat template, incremental detokenizer, stop strings.

Knows one model folder's tokenizer files and the rules of Unicode; refuses to know torch, requests, HTTP and time.

**What decoding means here.** `Tokenizer.decode` and the concatenation of what a `Detokenizer` pushed and finished are
the same string, for every tokenizer and every sequence of ids, so a streamed and an unstreamed answer cannot differ.
Spaces before punctuation stay as they are (no `clean_up_tokenization_spaces`): tidying a text needs its future.

**How streaming gets there.** A token is either *bytes* or *text*. All tokens of a byte-level tokenizer are bytes, and
so are the `<0xE4>` tokens of a SentencePiece-like one: they go through an incremental UTF-8 decoder, which holds an
unfinished character and nothing more. Every other token is decoded behind the tokens just before it, and what those
give alone is cut off the front, because its text depends on its neighbours (a leading space, a joiner). Both cost O(1)
per token. The one place where this differs from the `tokenizers` library is a run of byte tokens that is not UTF-8 as
a whole: the library gives up on the entire run, we replace only what is wrong in it.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.errors import ConfigError, InvalidRequest

CONTEXT_TOKENS = 4
"""Prompt tokens read before the first generated one: enough for its spacing and for the longest UTF-8 character."""
MAX_CHARACTER_TOKENS = 4
"""A character has at most four bytes, and a token at least one."""
HELD_TOKENS = 8
"""Text tokens held while they end in U+FFFD; a character has at most 4 bytes, so more than these are not one."""
RESERVED_TEMPLATE_ARGUMENTS = frozenset(
    "conversation messages chat_template tokenize tools documents add_generation_prompt continue_final_message padding "
    "truncation max_length return_tensors return_dict return_assistant_tokens_mask tokenizer_kwargs "
    "sanitize_control_tokens".split()
)
"""What a client's extra template arguments may not set: `chat_template` is code, the rest change the result's kind."""

_REPLACEMENT = "\ufffd"
_SAMPLE = '{"name": "value", "list": [1, 2.5, true, null], "x": {}}'
"""What every model can write that is to write JSON."""
_SPACE_MARK = "\u2581"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """The 256 printable characters that byte-level tokenizers write bytes as (GPT-2's table)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in plain}
    others = (byte for byte in range(256) if byte not in plain)
    return alphabet | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


def check_text(text: str, param: str) -> str:
    """`text` itself, or InvalidRequest naming `param` if it holds a lone surrogate, which UTF-8 cannot write."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{param} is not valid Unicode: a lone surrogate U+{ord(text[error.start]):04X} at character {error.start}",
            param=param,
        ) from None
    return text


class Tokenizer:
    """The tokenizer of one model folder. Any thread: nothing here changes after `load` but a cache of token bytes."""

    def __init__(self, tokenizer: Any, *, folder: Path) -> None:
        """`tokenizer`: a fast tokenizer of transformers, from now on this object's own (truncation and padding go)."""
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        generation, config = _read_json(folder / "generation_config.json"), _read_json(folder / "config.json")
        self.vocab_size: int = len(tokenizer)
        self.bos_token_id: int | None = tokenizer.bos_token_id
        self.eos_token_ids: frozenset[int] = _eos_ids(generation, config, tokenizer.eos_token_id)
        self.generation_defaults: Mapping[str, float | int] = _generation_defaults(generation)
        self.has_chat_template: bool = bool(tokenizer.chat_template)
        self.chat_template: str = _joined(tokenizer.chat_template)
        """Its source, of several named ones all; "" where there is none."""
        added = self._backend.get_added_tokens_decoder()
        self._special: frozenset[int] = frozenset(id for id, token in added.items() if token.special)
        stages = _decoder_stages(self._backend.decoder)
        kinds = [stage["type"] for stage in stages]
        self.is_byte_level: bool = kinds == ["ByteLevel"]
        self._byte_fallback = "ByteFallback" in kinds
        self._marks_spaces = any(_SPACE_MARK in json.dumps(stage, ensure_ascii=False) for stage in stages)
        self._pieces: dict[int, bytes | None] = {}
        space = self._backend.token_to_id("<0x20>") if self._byte_fallback else None
        self.strips_leading_space: bool = space is not None and self._backend.decode([space]) == ""

    @classmethod
    def load(cls, folder: Path, chat_template: str | None = None) -> Tokenizer:
        """Read a Hugging Face folder. `chat_template`: a Jinja template or the path of one, instead of the folder's.

        Raises ConfigError with advice if there is no tokenizer, none without code of its own, or no such template.
        """
        from transformers import AutoTokenizer  # seconds of imports that `terrace --help` need not wait for

        if not folder.is_dir():
            raise ConfigError(f"no model folder at {folder}", param="model")
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the library raises whatever its many loaders raise
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"cannot load a tokenizer from {folder}: {reason}. The folder needs tokenizer.json (or the files it "
                "can be made from, such as tokenizer.model) and tokenizer_config.json; get them from the model's page",
                param="model",
            ) from error
        if not getattr(tokenizer, "is_fast", False) or not hasattr(tokenizer, "backend_tokenizer"):
            raise ConfigError(
                f"the tokenizer in {folder} has no fast form; add a tokenizer.json",
                param="model",
            )
        if chat_template is not None:
            tokenizer.chat_template = _template_text(chat_template)
        return cls(tokenizer, folder=folder)

    # -- text to ids ----------------------------------------------------------------------------------------------

    def encode(self, text: str, *, add_special_tokens: bool = True, param: str = "prompt") -> list[int]:
        """Token ids of `text`. InvalidRequest naming `param` if it is not valid Unicode. About 1 us per token: long
        texts belong on the tokenizer pool."""
        check_text(text, param)
        # Of the library's calls this one is the fastest, and the only one that gives up the interpreter lock meanwhile.
        [encoding] = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **template_kwargs: Any,
    ) -> str:
        """The prompt that the chat template makes of `messages`; encode it with `add_special_tokens=False`.

        With `continue_final_message` the last message stays open and `add_generation_prompt` must be false. Raises
        InvalidRequest naming the field when the template refuses the messages or there is no template.
        """
        if not self.has_chat_template:
            raise InvalidRequest(
                "this model has no chat template: use /v1/completions, or start the daemon with a chat template",
                param="messages",
                code="no_chat_template",
            )
        if reserved := RESERVED_TEMPLATE_ARGUMENTS & template_kwargs.keys():
            raise InvalidRequest(f"{min(reserved)!r} cannot be set by a request", param="chat_template_kwargs")
        if add_generation_prompt and continue_final_message:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt exclude each other", param="continue_final_message"
            )
        try:
            text: str = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=[dict(tool) for tool in tools] if tools else None,
                documents=[dict(document) for document in documents] if documents else None,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=False,
                **template_kwargs,
            )
        except Exception as error:  # the template is code of the model's author: it raises what it likes
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise InvalidRequest(f"the chat template refuses these messages: {reason}", param="messages") from error
        return check_text(text, "messages")

    # -- ids to text ----------------------------------------------------------------------------------------------

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`; what is not UTF-8 becomes U+FFFD, an id of no token nothing. InvalidRequest if an id is
        no id at all (negative, or beyond 32 bits)."""
        try:
            text: str = self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        except (OverflowError, TypeError):
            raise InvalidRequest("token ids are integers from 0 to 4294967295", param="tokens") from None
        if self._byte_fallback and _REPLACEMENT in text:
            stream = Detokenizer(self, (), skip_special_tokens=skip_special_tokens)
            return stream.push(ids) + stream.finish()
        return text

    def token_text(self, id: int) -> str:
        """The token as a string for log-probabilities: its text, or if it is no whole text, `bytes:\\xe4\\xb8`."""
        data = self.token_bytes(id)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def token_bytes(self, id: int) -> bytes:
        """The bytes that the token adds in the middle of a text (so a leading space is there), special tokens too."""
        data = self.byte_piece(id)
        if data is not None:
            return data
        name = self._backend.id_to_token(id)
        text: str = self._backend.decode([id], skip_special_tokens=False)
        if self._marks_spaces and name is not None and name.startswith(_SPACE_MARK):
            text = name.replace(_SPACE_MARK, " ")  # the decoder strips the spaces of a text's first token
        return text.encode("utf-8")

    # -- for grammars ---------------------------------------------------------------------------------------------

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Control tokens by name."""
        return {self._backend.id_to_token(id): id for id in self._special}

    def vocabulary(self, size: int) -> list[bytes]:
        """What each id below `size` adds to a text, b"" where that is nothing or cannot be told. 2 to 10 us each."""
        found = [self.token_bytes(id) for id in range(min(size, self.vocab_size))]
        half = _REPLACEMENT.encode("utf-8")  # what a part of a character decodes to, if it is not known as bytes
        texts = [b"" if half in data and self.byte_piece(id) is None else data for id, data in enumerate(found)]
        return texts + [b""] * (size - len(texts))

    def writes_pieces(self) -> bool:
        """Whether a text is its tokens' `token_bytes` one after the other; not so where they are joined by spaces."""
        ids = self.encode(_SAMPLE, add_special_tokens=False)
        joined = b"".join(self.token_bytes(id) for id in ids).decode("utf-8", "replace")
        return joined.removeprefix(" ") == self.decode(ids).removeprefix(" ") == _SAMPLE

    # -- for the detokenizer --------------------------------------------------------------------------------------

    def is_special(self, id: int) -> bool:
        return id in self._special

    def byte_piece(self, id: int) -> bytes | None:
        """The bytes of a token that is bytes (perhaps half a character), b"" for an id of no token, None for text."""
        try:
            return self._pieces[id]
        except KeyError:
            piece = self._pieces[id] = self._find_piece(id)
            return piece

    def _find_piece(self, id: int) -> bytes | None:
        name: str | None = self._backend.id_to_token(id)
        if name is None:
            return b""
        if self.is_byte_level:
            data = [_ALPHABET.get(character) for character in name]
            return name.encode("utf-8") if None in data else bytes(byte for byte in data if byte is not None)
        if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(name)):
            return bytes([int(match[1], 16)])
        return None

    def decode_visible(self, ids: Sequence[int]) -> str:
        """Text of `ids`, none of which is left out: the plain call that the detokenizer's window makes."""
        text: str = self._backend.decode(ids, skip_special_tokens=False)
        return text


def _read_json(path: Path) -> Mapping[str, Any]:
    """The object in `path`, or an empty one if there is no such file. ConfigError if it is not a JSON object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}", param="model") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} does not hold a JSON object", param="model")
    return found


def _eos_ids(generation: Mapping[str, Any], config: Mapping[str, Any], own: int | None) -> frozenset[int]:
    """Every id that any of the three sources ends a text with: models ship with one of them wrong or incomplete."""
    text_config = config.get("text_config")
    found: set[int] = set()
    sources = [generation, config, text_config if isinstance(text_config, dict) else {}, {"eos_token_id": own}]
    for source in sources:
        ids = source.get("eos_token_id")
        found.update(id for id in (ids if isinstance(ids, list) else [ids]) if isinstance(id, int))
    return frozenset(found)


_DEFAULT_RANGES: Mapping[str, tuple[float, float]] = {
    "temperature": (0.0, 100.0),
    "top_p": (1e-6, 1.0),
    "top_k": (0, 1 << 31),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
}


def _generation_defaults(generation: Mapping[str, Any]) -> Mapping[str, float | int]:
    """The author's sampling values where they are numbers in range.

    `"do_sample": false`, when stated, makes greedy the default and the sampling values void, as in transformers. A file
    that says nothing of `do_sample` gives its values: most such files hold none, and a temperature in one is meant.
    """
    found: dict[str, float | int] = {}
    for name, (low, high) in _DEFAULT_RANGES.items():
        value = generation.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high:
            found[name] = int(value) if name == "top_k" else float(value)
    if generation.get("do_sample") is False:
        penalty = {name: value for name, value in found.items() if name == "repetition_penalty"}
        return {"temperature": 0.0, **penalty}
    return found


def _decoder_stages(decoder: Any) -> list[dict[str, Any]]:
    """The decoder's stages in order, as tokenizer.json describes them; [] when tokens are joined by spaces."""
    if decoder is None:
        return []
    state = json.loads(decoder.__getstate__())
    stages: list[dict[str, Any]] = state["decoders"] if state["type"] == "Sequence" else [state]
    return stages


def _joined(chat_template: str | Mapping[str, str] | None) -> str:
    return "\n".join(chat_template.values()) if isinstance(chat_template, Mapping) else chat_template or ""


def _template_text(chat_template: str) -> str:
    if "{" in chat_template or "\n" in chat_template:
        return chat_template
    try:
        return Path(chat_template).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the chat template {chat_template}: {error}", param="chat_template") from error


class Detokenizer:
    """Turns one request's tokens into text as they come; never half a character. One consumer at a time.

    Text that a token cannot give yet (the first bytes of a character) comes with the token that completes it, or as
    U+FFFD with the token that shows it never will.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        shown_ids: frozenset[int] = frozenset(),
    ) -> None:
        """Reads the last few of `prompt_ids`, so that the text continues the prompt's (spacing, half a character).

        `shown_ids`: special tokens that are not skipped.
        """
        self._tokenizer = tokenizer
        self._skips = skip_special_tokens
        self._shown = shown_ids
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._context: list[int] = []  # visible tokens whose text is out
        self._held: list[int] = []  # visible text tokens whose text is not
        tail: list[int] = []
        for id in reversed(prompt_ids):
            if len(tail) == CONTEXT_TOKENS:
                break
            if self._visible(id):
                tail.append(id)
        for id in reversed(tail):
            self._take(id)
        # What the prompt's own end would read as if nothing followed: that is the prompt's text, not the output's.
        pending = self._utf8.getstate()[0]
        self._owed = pending.decode("utf-8", "replace") if pending else self._window_text()

    def push(self, ids: Sequence[int]) -> str:
        """The text that `ids` add."""
        return "".join(self.push_one(id) for id in ids)

    def push_one(self, id: int) -> str:
        """The text that this token adds or completes."""
        return self._without_owed(self._take(id)) if self._visible(id) else ""

    def finish(self) -> str:
        """The text still held: an unfinished character becomes U+FFFD. The detokenizer is then at its end."""
        return self._without_owed(self._flush_bytes() + self._flush_held())

    def _visible(self, id: int) -> bool:
        if self._skips and self._tokenizer.is_special(id) and id not in self._shown:
            return False
        return self._tokenizer.byte_piece(id) != b""

    def _take(self, id: int) -> str:
        piece = self._tokenizer.byte_piece(id)
        if piece is None:
            return self._flush_bytes() + self._take_text(id)
        text = self._flush_held() + self._utf8.decode(piece)
        if text and not self._context and self._tokenizer.strips_leading_space:
            text = text.removeprefix(" ")
        # Context matters to text tokens only, and to them only whether something stands before them.
        if not self._tokenizer.is_byte_level:
            self._context = [id]
        return text

    def _take_text(self, id: int) -> str:
        self._held.append(id)
        text = self._window_text()
        if not text.endswith(_REPLACEMENT):
            self._context, self._held = self._held, []
            return text
        return "" if len(self._held) < HELD_TOKENS else self._flush_whole_characters(text)

    def _flush_whole_characters(self, text: str) -> str:
        """The held text but for a last character that may still be half: U+FFFD can also be what the text says.

        A cut falls between characters if the two sides decode to the whole by themselves. Where none of the last cuts
        does, waiting for more tokens would not help either.
        """
        for cut in range(len(self._held) - 1, len(self._held) - MAX_CHARACTER_TOKENS, -1):
            rest = self._tokenizer.decode_visible(self._held[cut:])
            whole, self._held, later = self._held, self._held[:cut], self._held[cut:]
            front = self._window_text()
            if front + rest == text:
                self._context, self._held = whole[:cut], later
                return front
            self._held = whole
        self._context, self._held = self._held, []
        return text

    def _flush_bytes(self) -> str:
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text

    def _flush_held(self) -> str:
        if not self._held:
            return ""
        text = self._window_text()
        self._context, self._held = self._held, []
        return text

    def _window_text(self) -> str:
        """What the held tokens add to the context's text."""
        if not self._held:
            return ""
        before = self._tokenizer.decode_visible(self._context) if self._context else ""
        return self._tokenizer.decode_visible(self._context + self._held)[len(before) :]

    def _without_owed(self, text: str) -> str:
        """`text` without the prompt's part: all that was owed, or all but a last character now complete."""
        if text and self._owed:
            owed, self._owed = self._owed, ""
            return text.removeprefix(owed) if text.startswith(owed) else text.removeprefix(owed[:-1])
        return text


class StopMatcher:
    """Finds the first stop string in a text that comes in pieces, and holds back what may be the start of one.

    The stop that ends first wins; of several that end at the same character, the longest. The result does not depend on
    where the pieces are cut. Costs O(1) per character and stop string (Knuth-Morris-Pratt).
    """

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        """`stops`: none of them empty. `include_stop`: emit the stop string itself too."""
        assert all(stops), "a stop string is empty"
        self._stops = [(stop, _borders(stop)) for stop in dict.fromkeys(stops)]
        self._matched = [0] * len(self._stops)  # per stop: how many of its characters the text now ends with
        self._include_stop = include_stop
        self._held = ""
        self.stopped: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that is safe to emit, the stop string that was found or None). After a stop, nothing is safe."""
        if self.stopped is not None:
            return "", self.stopped
        if not self._stops:
            return text, None
        pending = self._held + text
        for index, character in enumerate(text):
            found = self._advance(character)
            if found is not None:
                end = len(self._held) + index + 1
                self.stopped, self._held = found, ""
                return pending[: end if self._include_stop else end - len(found)], found
        safe = len(pending) - max(self._matched)
        self._held = pending[safe:]
        return pending[:safe], None

    def finish(self) -> str:
        """The text held back, which was no stop string after all; "" after a stop."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return held

    def _advance(self, character: str) -> str | None:
        found: str | None = None
        for which, (stop, borders) in enumerate(self._stops):
            matched = self._matched[which]
            while matched and stop[matched] != character:
                matched = borders[matched - 1]
            if stop[matched] == character:
                matched += 1
            self._matched[which] = matched
            if matched == len(stop) and (found is None or len(stop) > len(found)):
                found = stop
        return found


def _borders(stop: str) -> list[int]:
    """For each prefix of `stop`, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(stop)
    matched = 0
    for index in range(1, len(stop)):
        while matched and stop[index] != stop[matched]:
            matched = borders[matched - 1]
        if stop[index] == stop[matched]:
            matched += 1
        borders[index] = matched
    return borders


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What some pushed tokens did to the text.

    `kept` of them count as generated: all, or those up to the one in which the stop string `stopped` was completed.
    `offsets[i]` is where, in characters of the generated text, kept token i begins; `pieces[i]` is the text it added or
    completed, before any stop string was cut off. Text may lag behind tokens while a stop string may be beginning.
    """

    text: str
    stopped: str | None
    kept: int
    offsets: tuple[int, ...]
    pieces: tuple[str, ...]


class TextStream:
    """Detokenizer and stop strings of one request: tokens in, text safe to send out. One consumer at a time."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        *,
        stops: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
        shown_ids: frozenset[int] = frozenset(),
    ) -> None:
        """The text of the first `min_tokens` tokens is not searched for stop strings. `shown_ids` as in Detokenizer."""
        self._detokenizer = Detokenizer(
            tokenizer, prompt_ids, skip_special_tokens=skip_special_tokens, shown_ids=shown_ids
        )
        self._matcher = StopMatcher(stops, include_stop)
        self._min_tokens = min_tokens
        self.tokens = 0
        """Tokens kept so far: what `usage.completion_tokens` counts."""
        self.length = 0
        """Characters emitted so far; after the end, of the whole text. Every offset is clamped to it then."""
        self._decoded = 0

    @property
    def stopped(self) -> str | None:
        return self._matcher.stopped

    def push(self, ids: Iterable[int]) -> TextDelta:
        """Take tokens in; those after a stop string change nothing and are not kept."""
        emitted: list[str] = []
        offsets: list[int] = []
        pieces: list[str] = []
        for id in ids:
            if self.stopped is not None:
                break
            offsets.append(self._decoded)
            pieces.append(self._detokenizer.push_one(id))
            self.tokens += 1
            emitted.append(self._emit(pieces[-1]))
        text = "".join(emitted)
        self.length += len(text)
        if self.stopped is not None:
            offsets = [min(offset, self.length) for offset in offsets]
        return TextDelta(text, self.stopped, len(offsets), tuple(offsets), tuple(pieces))

    def finish(self) -> TextDelta:
        """The end of the text, when the request ended without a stop string; empty after one."""
        if self.stopped is not None:
            return TextDelta("", self.stopped, 0, (), ())
        text = self._emit(self._detokenizer.finish())
        text += self._matcher.finish()
        self.length += len(text)
        return TextDelta(text, self.stopped, 0, (), ())

    def _emit(self, piece: str) -> str:
        self._decoded += len(piece)
        if self.tokens <= self._min_tokens:
            return piece
        return self._matcher.push(piece)[0]
