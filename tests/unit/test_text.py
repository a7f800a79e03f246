"""Text: what is encoded decodes to itself, streamed text is whole text, stop strings do not care where tokens end."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.errors import ConfigError, InvalidRequest
from server.text import Detokenizer, StopMatcher, TextStream, Tokenizer
from tests.unit.conftest import CHAT_TEMPLATE, CORPUS, KINDS, SPECIALS, write_folder

FROZEN = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXTS = st.one_of(
    st.text(max_size=60), st.sampled_from(CORPUS), st.text(alphabet="ab 🙂é日\u2581\ufffd\n", max_size=40)
)


def pieces_of(tokenizer: Tokenizer, prompt: list[int], ids: list[int], *, skip: bool = True) -> list[str]:
    stream = Detokenizer(tokenizer, prompt, skip_special_tokens=skip)
    return [stream.push([id]) for id in ids] + [stream.finish()]


def continuation(tokenizer: Tokenizer, prompt: list[int], ids: list[int], *, skip: bool = True) -> str:
    """The one-shot text of prompt and ids without the prompt's own text, an unfinished character's U+FFFD aside."""
    whole = tokenizer.decode([*prompt, *ids], skip_special_tokens=skip)
    head = tokenizer.decode(prompt, skip_special_tokens=skip)
    if not whole.startswith(head):
        head = head.removesuffix("\ufffd")
    assert whole.startswith(head)
    return whole[len(head) :]


# -- tokenizer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["byte_level", "two_stage_bytes", "sentencepiece", "metaspace"])
@FROZEN
@given(text=TEXTS)
def test_lossless_tokenizers_round_trip(tokenizers: dict[str, Tokenizer], kind: str, text: str) -> None:
    """Any text survives encode and decode of a tokenizer that knows all bytes."""
    tokenizer = tokenizers[kind]
    if kind in ("sentencepiece", "metaspace"):
        text = text.replace("\u2581", " ")
    ids = tokenizer.encode(text, add_special_tokens=False)
    if not any(tokenizer.is_special(id) for id in ids):
        assert tokenizer.decode(ids) == text


@FROZEN
@given(data=st.data())
def test_decode_is_the_librarys_where_that_is_whole(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Decode differs from the tokenizers library only where a run of byte tokens is not UTF-8."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=12))
    skip = data.draw(st.booleans())
    library = tokenizer._backend.decode(ids, skip_special_tokens=skip)
    if tokenizer._byte_fallback and "\ufffd" in library:
        assert "\ufffd" in tokenizer.decode(ids, skip_special_tokens=skip)
    else:
        assert tokenizer.decode(ids, skip_special_tokens=skip) == library


def test_a_lone_surrogate_is_a_bad_request(tokenizer: Tokenizer) -> None:
    """Text that is no Unicode is refused with the field's name and the place, by encode and by the chat template."""
    with pytest.raises(InvalidRequest, match=r"U\+D83D at character 2") as caught:
        tokenizer.encode("ab\ud83d", param="input")
    assert caught.value.param == "input"
    if tokenizer.has_chat_template:
        with pytest.raises(InvalidRequest) as caught:
            tokenizer.render_chat([{"role": "user", "content": "\udc00"}])
        assert caught.value.param == "messages"


@pytest.mark.parametrize("ids", [[-1], [1 << 32], [1 << 70]])
def test_impossible_ids_are_a_bad_request(tokenizer: Tokenizer, ids: list[int]) -> None:
    """Ids that no tokenizer could have are refused; ids beyond the vocabulary are no text."""
    with pytest.raises(InvalidRequest) as caught:
        tokenizer.decode(ids)
    assert caught.value.param == "tokens"
    assert tokenizer.decode([tokenizer.vocab_size + 7]) == ""
    assert tokenizer.token_bytes(tokenizer.vocab_size + 7) == b""


def test_token_bytes_add_up_to_the_text(tokenizers: dict[str, Tokenizer]) -> None:
    """The bytes of the tokens joined are the text's, but for the space that SentencePiece puts in front."""
    for text in CORPUS[:6]:
        for kind in ("byte_level", "sentencepiece", "metaspace"):
            ids = tokenizers[kind].encode(text, add_special_tokens=False)
            joined = b"".join(tokenizers[kind].token_bytes(id) for id in ids).decode()
            assert joined == (" " + text if kind == "sentencepiece" else text)


def test_part_of_a_character_has_a_name(tokenizers: dict[str, Tokenizer]) -> None:
    """A token that is no whole text is written as its bytes, so that two of them never look the same."""
    tokenizer = tokenizers["sentencepiece"]
    assert tokenizer.token_text(3 + 0xE4) == "bytes:\\xe4"
    assert tokenizer.token_text(3 + 0x41) == "A"
    special = tokenizers["byte_level"]
    assert special.token_text(special.encode(SPECIALS[3])[0]) == SPECIALS[3]


def test_truncation_in_the_file_is_ignored(tmp_path: Path) -> None:
    """A tokenizer.json with truncation and padding switched on still encodes the whole text and nothing more."""
    folder = write_folder(tmp_path, "byte_level")
    state = json.loads((folder / "tokenizer.json").read_text())
    state["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    state["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>",
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(state))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.decode(tokenizer.encode(CORPUS[0]), skip_special_tokens=False) == CORPUS[0]


def test_threads_share_a_tokenizer(tokenizers: dict[str, Tokenizer]) -> None:
    """Encoding and decoding from several threads at once gives what one thread gives."""
    tokenizer = tokenizers["sentencepiece"]
    wanted = [tokenizer.encode(text) for text in CORPUS]
    wrong: list[str] = []

    def work() -> None:
        for _ in range(20):
            for text, ids in zip(CORPUS, wanted, strict=True):
                if tokenizer.encode(text) != ids or tokenizer.decode(ids) != text:
                    wrong.append(text)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# -- the folder -------------------------------------------------------------------------------------------------------


def test_eos_is_the_union_of_all_sources(tmp_path: Path) -> None:
    """EOS ids come from generation_config (an id or a list), config and the tokenizer together."""
    folder = write_folder(tmp_path, "byte_level")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 8, "text_config": {"eos_token_id": 11}}))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.eos_token_ids == {7, 8, 9, 11, tokenizer.encode("<|im_end|>")[0]}
    assert tokenizer.bos_token_id == tokenizer.encode("<|endoftext|>")[0]
    assert tokenizer.vocab_size == 421


@pytest.mark.parametrize(
    ("written", "defaults"),
    [
        ({}, {}),
        ({"temperature": 0.6, "top_p": 0.9, "top_k": 20}, {"temperature": 0.6, "top_p": 0.9, "top_k": 20}),
        ({"do_sample": True, "min_p": 0.1, "repetition_penalty": 1.05}, {"min_p": 0.1, "repetition_penalty": 1.05}),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.0}),
        ({"do_sample": False, "repetition_penalty": 1.1}, {"temperature": 0.0, "repetition_penalty": 1.1}),
        ({"temperature": None, "top_p": "high", "top_k": True, "min_p": -1, "repetition_penalty": 0}, {}),
    ],
)
def test_generation_defaults(tmp_path: Path, written: dict[str, object], defaults: dict[str, float]) -> None:
    """The author's sampling values become defaults where they make sense; do_sample false makes greedy the default."""
    folder = write_folder(tmp_path, "word_level")
    (folder / "generation_config.json").write_text(json.dumps(written))
    assert Tokenizer.load(folder).generation_defaults == defaults


def test_a_folder_without_a_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    """No folder, an empty folder and a broken file are configuration errors of one line that name the folder."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    (tmp_path / "empty").mkdir()
    for name in ("none", "empty", "broken"):
        with pytest.raises(ConfigError) as caught:
            Tokenizer.load(tmp_path / name)
        assert str(tmp_path / name) in caught.value.message
        assert "\n" not in caught.value.message
    folder = write_folder(tmp_path / "bad", "word_level")
    (folder / "generation_config.json").write_text("[]")
    with pytest.raises(ConfigError, match="generation_config"):
        Tokenizer.load(folder)


# -- chat -------------------------------------------------------------------------------------------------------------


def test_chat_renders_and_continues(tokenizers: dict[str, Tokenizer]) -> None:
    """The template renders messages, opens the answer, or leaves the last message open, and sees extra arguments."""
    tokenizer = tokenizers["byte_level"]
    messages = [{"role": "user", "content": "Hi"}]
    assert tokenizer.render_chat(messages) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.render_chat(messages, add_generation_prompt=False, mood="!").endswith("<|im_end|>\n!")
    opened = tokenizer.render_chat(
        [*messages, {"role": "assistant", "content": "Hel"}], add_generation_prompt=False, continue_final_message=True
    )
    assert opened.endswith("assistant\nHel")


@pytest.mark.parametrize(
    ("messages", "arguments", "param"),
    [
        ([], {}, "messages"),
        ([{"role": "wizard", "content": "x"}], {}, "messages"),
        ([{"role": "user"}], {}, "messages"),
        ([{"content": "x"}], {}, "messages"),
        ([{"role": "user", "content": 7}], {}, "messages"),
        ([{"role": "user", "content": "x"}], {"chat_template": "{{ 1 }}"}, "chat_template_kwargs"),
        ([{"role": "user", "content": "x"}], {"tokenize": True}, "chat_template_kwargs"),
        ([{"role": "user", "content": "x"}], {"continue_final_message": True}, "continue_final_message"),
    ],
)
def test_chat_errors_name_the_field(
    tokenizers: dict[str, Tokenizer], messages: list[dict[str, object]], arguments: dict[str, object], param: str
) -> None:
    """What the template refuses, and what a request may not set, is a bad request that names the field."""
    with pytest.raises(InvalidRequest) as caught:
        tokenizers["byte_level"].render_chat(messages, **arguments)  # type: ignore[arg-type]
    assert caught.value.param == param


def test_the_chat_template_can_be_given(tokenizer_folders: dict[str, Path], tmp_path: Path) -> None:
    """A template given as text or as a path replaces the folder's; a path to nothing is a configuration error."""
    folder = tokenizer_folders["word_level"]
    assert not Tokenizer.load(folder).has_chat_template
    with pytest.raises(InvalidRequest, match="chat template"):
        Tokenizer.load(folder).render_chat([{"role": "user", "content": "w1"}])
    path = tmp_path / "template.jinja"
    path.write_text(CHAT_TEMPLATE)
    for given_template in (CHAT_TEMPLATE, str(path)):
        assert "w1" in Tokenizer.load(folder, given_template).render_chat([{"role": "user", "content": "w1"}])
    with pytest.raises(ConfigError, match="chat template"):
        Tokenizer.load(folder, str(tmp_path / "none.jinja"))


# -- detokenizer ------------------------------------------------------------------------------------------------------


@FROZEN
@given(prompt=TEXTS, text=TEXTS, cut=st.integers(0, 200), skip=st.booleans())
def test_streamed_text_is_the_one_shot_text(tokenizer: Tokenizer, prompt: str, text: str, cut: int, skip: bool) -> None:
    """Wherever a text is cut into prompt and output, pushing the output's tokens gives the rest of the text."""
    ids = tokenizer.encode(prompt + text)
    cut = min(cut, len(ids))
    streamed = "".join(pieces_of(tokenizer, ids[:cut], ids[cut:], skip=skip))
    assert streamed == continuation(tokenizer, ids[:cut], ids[cut:], skip=skip)


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"two_stage_bytes"}))
@settings(FROZEN, max_examples=400)
@given(data=st.data())
def test_streamed_ids_are_the_one_shot_text(tokenizers: dict[str, Tokenizer], kind: str, data: st.DataObject) -> None:
    """The same for random ids: broken UTF-8, special tokens, ids of no token; pushed one by one or several at once.

    Not for a decoder that we cannot see into: there, broken UTF-8 may give other U+FFFDs than the one-shot text has.
    """
    tokenizer = tokenizers[kind]
    some = st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=14)
    prompt, ids, skip = data.draw(some), data.draw(some), data.draw(st.booleans())
    wanted = continuation(tokenizer, prompt, ids, skip=skip)
    assert "".join(pieces_of(tokenizer, prompt, ids, skip=skip)) == wanted
    stream = Detokenizer(tokenizer, prompt, skip_special_tokens=skip)
    cut = data.draw(st.integers(0, len(ids)))
    assert stream.push(ids[:cut]) + stream.push(ids[cut:]) + stream.finish() == wanted


@pytest.mark.parametrize("kind", ["byte_level", "two_stage_bytes", "sentencepiece", "metaspace"])
def test_no_half_characters(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    """While a valid text streams no piece holds U+FFFD, and a character comes with its last byte's token."""
    tokenizer = tokenizers[kind]
    text = "x 🙂 日本 👩‍👩‍👧 Ĝ end"
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = pieces_of(tokenizer, [], ids)
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces[-1] == ""
    for count in range(len(ids)):
        assert text.startswith("".join(pieces[:count]))


def test_a_character_may_begin_in_the_prompt(tokenizers: dict[str, Tokenizer]) -> None:
    """A character whose first bytes end the prompt comes out whole; if it never ends, its U+FFFD is not output."""
    for kind in ("byte_level", "sentencepiece", "metaspace"):
        tokenizer = tokenizers[kind]
        every = range(tokenizer.vocab_size)
        *euro, x = (next(i for i in every if tokenizer.byte_piece(i) == bytes([b])) for b in b"\xe2\x82\xacx")
        letter = [x]
        assert pieces_of(tokenizer, [*letter, *euro[:2]], euro[2:]) == ["€", ""]
        assert pieces_of(tokenizer, [*letter, *euro[:2]], letter) == ["x", ""]
        assert pieces_of(tokenizer, [*letter, *euro[:2]], []) == [""]
        assert pieces_of(tokenizer, letter, [*euro[:2], *letter]) == ["", "", "\ufffdx", ""]
        assert pieces_of(tokenizer, letter, euro[:2]) == ["", "", "\ufffd"]


def test_the_cost_of_a_token_does_not_grow(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long prompt and output are, a token is decoded behind a handful of others at most."""
    longest = 0
    decode = tokenizer.decode_visible

    def counted(ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(ids)

    monkeypatch.setattr(tokenizer, "decode_visible", counted)
    ids = tokenizer.encode(" ".join(CORPUS))
    stream = Detokenizer(tokenizer, ids * 5)
    stream.push(ids)
    assert longest <= 16


# -- stop strings -----------------------------------------------------------------------------------------------------


def naive_stop(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The first stop that ends, the longest of those that end there: by trying every end."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@settings(FROZEN, max_examples=400)
@given(
    pieces=st.lists(st.text(alphabet="ab\n", max_size=5), max_size=12),
    stops=st.lists(st.text(alphabet="ab\n", min_size=1, max_size=5), max_size=4),
    include=st.booleans(),
)
def test_stops_do_not_care_where_pieces_end(pieces: list[str], stops: list[str], include: bool) -> None:
    """Emitted text and the stop found are those of a search in the whole text, however it is cut."""
    matcher = StopMatcher(stops, include)
    text = ""
    for piece in pieces:
        safe, found = matcher.push(piece)
        text += safe
        if found is not None:
            break
    text += matcher.finish()
    assert (text, matcher.stopped) == naive_stop("".join(pieces), stops, include)


@settings(FROZEN, max_examples=200)
@given(
    text=st.text(alphabet="ab", max_size=12),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_no_more_is_held_than_could_begin_a_stop(text: str, stops: list[str]) -> None:
    """What is held back is exactly the longest end of the text with which a stop string begins."""
    matcher = StopMatcher(stops)
    safe, found = matcher.push(text)
    if found is None:
        held = max(
            n for n in range(len(text) + 1) if n == 0 or any(s.startswith(text[-n:]) and s != text[-n:] for s in stops)
        )
        assert safe == text[: len(text) - held]


# -- the stream -------------------------------------------------------------------------------------------------------


def letters(tokenizer: Tokenizer, text: str) -> list[int]:
    return [tokenizer.encode(letter, add_special_tokens=False)[-1] for letter in text]


def test_the_token_that_completes_the_stop_is_the_last_one_kept(tokenizers: dict[str, Tokenizer]) -> None:
    """Tokens after the stop string are dropped, the text ends before it, and offsets never point past the text."""
    tokenizer = tokenizers["byte_level"]
    stream = TextStream(tokenizer, [], stops=["cd"])
    first = stream.push(letters(tokenizer, "abc"))
    assert (first.text, first.stopped, first.kept, first.offsets) == ("ab", None, 3, (0, 1, 2))
    second = stream.push(letters(tokenizer, "def"))
    assert (second.text, second.stopped, second.kept, second.offsets) == ("", "cd", 1, (2,))
    third = stream.push(letters(tokenizer, "x"))
    assert (third.text, third.kept, stream.tokens, stream.length) == ("", 0, 4, 2)
    assert stream.finish().text == ""


def test_a_stop_string_can_be_kept(tokenizers: dict[str, Tokenizer]) -> None:
    """With include_stop the text ends behind the stop string."""
    tokenizer = tokenizers["byte_level"]
    stream = TextStream(tokenizer, [], stops=["cd"], include_stop=True)
    assert stream.push(letters(tokenizer, "abcdef")).text == "abcd"


def test_the_first_tokens_are_not_searched(tokenizers: dict[str, Tokenizer]) -> None:
    """A stop string within the first min_tokens tokens is text like any other."""
    tokenizer = tokenizers["byte_level"]
    stream = TextStream(tokenizer, [], stops=["b"], min_tokens=3)
    delta = stream.push(letters(tokenizer, "abxabx"))
    assert (delta.text, delta.stopped, delta.kept) == ("abxa", "b", 5)


@FROZEN
@given(text=TEXTS, stop=st.text(min_size=1, max_size=3))
def test_a_stream_is_decode_cut_at_the_stop(tokenizer: Tokenizer, text: str, stop: str) -> None:
    """Text, pieces and offsets of a stream agree with the one-shot text and with each other."""
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids)
    stream = TextStream(tokenizer, [], stops=[stop])
    deltas = [stream.push([id]) for id in ids] + [stream.finish()]
    emitted = "".join(delta.text for delta in deltas)
    assert emitted == naive_stop(whole, [stop], False)[0]
    assert stream.length == len(emitted)
    assert stream.tokens == sum(delta.kept for delta in deltas)
    position = 0
    for delta in deltas:
        for offset, piece in zip(delta.offsets, delta.pieces, strict=True):
            assert offset == (min(position, stream.length) if delta.stopped else position)
            assert whole.startswith(piece, position)
            position += len(piece)


def test_literal_replacement_characters_do_not_swallow_the_next_one(tmp_path: Path) -> None:
    """A decoder that is told apart by its text only: a run of U+FFFD that the text really says stays whole."""
    tokenizer = Tokenizer.load(write_folder(tmp_path / "model", "two_stage_bytes"))
    for text in ("\ufffd\ufffd\u0800", "\ufffd" * 9 + "é", "a\ufffd\ufffd\ufffd\U0001f600\ufffd", "\ufffd" * 20):
        detokenizer = Detokenizer(tokenizer, [])
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert "".join(detokenizer.push_one(id) for id in ids) + detokenizer.finish() == text


def test_a_prompt_that_ends_in_half_a_surrogate_adds_nothing(tokenizers: dict[str, Tokenizer]) -> None:
    """The bytes ED A1 wait for a third and read as two U+FFFD without it: both are the prompt's, not the output's."""
    tokenizer = tokenizers["byte_level"]
    prompt = [
        next(i for i in range(tokenizer.vocab_size) if tokenizer.byte_piece(i) == byte) for byte in (b"\xed", b"\xa1")
    ]
    assert Detokenizer(tokenizer, prompt).finish() == ""
