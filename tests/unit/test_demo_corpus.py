"""The demo corpus and its tokenizer; nothing here trains or runs the model."""

from __future__ import annotations

import json
import random
from functools import lru_cache
from pathlib import Path

import pytest

from server.demo import corpus

MODEL = Path(corpus.__file__).parent / "model"
needs_model = pytest.mark.skipif(not (MODEL / "tokenizer.json").exists(), reason="demo model not built")
LENGTHS = (48, 256, 2048)


@lru_cache
def tokenizer():
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(MODEL)


@pytest.mark.parametrize("kind", corpus.KINDS)
def test_examples_are_deterministic(kind):
    """The same seed gives the same task, another seed another."""
    assert corpus.example(5, 300, kind, 3) == corpus.example(5, 300, kind, 3)
    assert corpus.example(5, 300, kind, 3) != corpus.example(6, 300, kind, 3)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", corpus.KINDS)
def test_answer_stands_exactly_once_in_the_document(kind, length):
    """Every asked fact is stated once, and no question is asked twice."""
    for ex in corpus.examples(8, length, kind, questions=1 if length < 100 else 4):
        for qa in ex.qas:
            assert ex.document.count(qa.answer) == 1
        assert len({qa.question for qa in ex.qas}) == len(ex.qas)


def test_splits_share_no_fact():
    """Training and test facts are disjoint."""

    def facts(split):
        found = set()
        for seed in range(20):
            writer = corpus.DocumentWriter(random.Random(seed), split)
            found |= {writer.fact().sentence for _ in range(50)}
        return found

    train, test = facts("train"), facts("test")
    assert not train & test
    assert all(corpus.split_of(s) == "test" for s in test)


def test_test_documents_state_only_test_facts():
    """A document of a split is made of facts of that split only."""
    ex = corpus.example(1, 1024)
    assert corpus.split_of(ex.answer) == "test"
    segments = corpus.training_segments(random.Random(1), 512)
    assert all(corpus.split_of(s.text.strip()) == "train" for s in segments if s.answer)


def test_questions_can_be_kept_far_back():
    """`within` keeps the asked facts in the first part of the document."""
    ex = corpus.example(3, 1024, questions=2, within=0.25)
    assert all(ex.document.index(qa.answer) < len(ex.document) / 2 for qa in ex.qas)


def test_prompt_and_messages_end_with_the_open_question():
    """Earlier questions stand answered, the last one is open."""
    done = corpus.example(2, 200, "completion", 2)
    assert done.prompt.endswith(f"Question: {done.question}\nAnswer:")
    assert done.qas[0].answer in done.prompt.split("Question:", 1)[1]
    chat = corpus.example(2, 200, "chat", 3)
    roles = [m["role"] for m in chat.messages if m["role"] != "system"]
    assert roles == ["user", "assistant", "user", "assistant", "user"]
    assert chat.messages[-1]["content"] == chat.question


def test_bad_arguments_are_refused():
    """Unknown kinds and splits are errors."""
    with pytest.raises(ValueError, match="kind"):
        corpus.example(1, 100, "poem")
    with pytest.raises(ValueError, match="split"):
        corpus.example(1, 100, split="dev")


@needs_model
@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "Mira keeps coins in Lisbon.",
        "naïve café — 北京 🙂👩‍👩‍👧 \u200b\ttab\r\n\n  x",
        "".join(map(chr, range(256))),
    ],
)
def test_any_text_round_trips(text):
    """Any text encodes and decodes to itself."""
    assert tokenizer().decode(tokenizer()(text)["input_ids"]) == text


@needs_model
def test_names_are_one_token_and_nearly_all_words_are():
    """The last merges of a small vocabulary leave a few words in two pieces, but no name."""
    assert all(len(ids) == 1 for ids in tokenizer()([" " + name for name in corpus.NAMES])["input_ids"])
    counts = [len(ids) for ids in tokenizer()([" " + w for w in corpus.all_words()])["input_ids"]]
    assert sum(count > 1 for count in counts) < 0.03 * len(counts)


@needs_model
@pytest.mark.parametrize("length", LENGTHS)
def test_prompts_are_about_as_long_as_asked(length):
    """A prompt has about as many tokens as were asked for."""
    for ex in corpus.examples(4, max(length, 64)):
        tokens = len(tokenizer()(ex.prompt)["input_ids"])
        assert tokens <= max(length, 64) * 1.15 + 8
        if length >= 256:
            assert tokens >= length * 0.8


@needs_model
def test_chat_template_renders_turns_and_system():
    """Roles and turns render in the ChatML form that the model was trained on."""
    messages = [
        {"role": "system", "content": "Answer from the text."},
        {"role": "user", "content": "Tom lives in the old mill. Where does Tom live?"},
        {"role": "assistant", "content": "Tom lives in the old mill."},
        {"role": "user", "content": "Where?"},
    ]
    text = tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nAnswer from the text.<|im_end|>\n"
        "<|im_start|>user\nTom lives in the old mill. Where does Tom live?<|im_end|>\n"
        "<|im_start|>assistant\nTom lives in the old mill.<|im_end|>\n"
        "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer()(text)["input_ids"]
    assert ids.count(tokenizer().convert_tokens_to_ids("<|im_start|>")) == 5
    assert tokenizer().eos_token == "<|im_end|>"


@needs_model
def test_model_folder_is_complete_and_small():
    """The checkpoint is consistent and fits the repository."""
    config = json.loads((MODEL / "config.json").read_text())
    assert config["vocab_size"] >= len(tokenizer())
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["head_dim"] % 16 == 0
    assert sum(f.stat().st_size for f in MODEL.iterdir()) <= 8 * 2**20
