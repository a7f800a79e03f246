"""The demo tokenizer: byte-level BPE over the demo corpus, in Hugging Face's file format.

Byte-level, so that any text encodes without an unknown token and decodes to itself; trained on the
corpus until each of its words is one token, so that a fact is about as many tokens as words.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from server.demo import corpus

END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, corpus.IM_START, corpus.IM_END)
VOCAB_SIZE = 2048

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def _training_texts(documents: int = 400) -> Iterator[str]:
    """Sentences of the corpus, and its words at the start of a line and inside one, equally often."""
    rng = random.Random("tokenizer")
    for _ in range(documents):
        yield "".join(s.text for s in corpus.training_segments(rng, 512, noise=0.3))
    for word in corpus.all_words():
        for form in (word, " " + word, "\n" + word):
            yield from [form] * 40
    for _ in range(3000):
        yield " " + corpus.coined_word(rng)
        yield corpus.coined_word(rng, capital=True)


def train_tokenizer() -> Tokenizer:
    """The tokenizer; the same on every run."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_texts(), trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json (with the chat template) and special_tokens_map.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": END_OF_TEXT, "eos_token": corpus.IM_END, "pad_token": END_OF_TEXT}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "add_eos_token": False,
        "additional_special_tokens": [corpus.IM_START],
        "chat_template": CHAT_TEMPLATE,
        **names,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=2) + "\n")
