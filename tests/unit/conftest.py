"""Small tokenizers of every kind the detokenizer tells apart, built from a few sentences in a temporary folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from server.text import Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. The dog sleeps, the fox runs.",
    "She said: “naïve café” and paid 3.50 € for it!",
    "Числа и слова: один, два, три.",
    "日本語の文章です。今日は良い天気ですね。",
    "emoji 🙂 and 👩‍👩‍👧 and 🏳️‍🌈 end",
    "def f(x):\n    return x + 1\n\n\tindented",
] * 4

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{- raise_exception('unknown role ' + message['role']) }}{%- endif %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    "{%- if mood is defined %}{{- mood }}{%- endif %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<｜fullwidth｜>"]


def byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken("<tool call>", special=False, normalized=False)])
    return backend


def _sentencepiece_model() -> Backend:
    """A BPE vocabulary with 256 byte tokens in front of the merges, as Llama 2 and Gemma have."""
    scratch = Backend(models.BPE())
    scratch.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    # Only the Latin sentences: everything else falls back to bytes.
    scratch.train_from_iterator(
        [*CORPUS[:1], "def f(x): return x 1"], trainers.BpeTrainer(vocab_size=200, show_progress=False)
    )
    trained = json.loads(scratch.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "\u2581\u2581"]
    names += [name for name in trained["vocab"] if name not in names]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in trained["merges"]]
    merges.append(("\u2581", "\u2581"))
    model = models.BPE(
        {n: i for i, n in enumerate(names)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    backend = Backend(model)
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def sentencepiece() -> Backend:
    """Llama 2's way: a normalizer writes spaces as marks, the decoder strips the first one."""
    backend = _sentencepiece_model()
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    strip = decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    return backend


def metaspace() -> Backend:
    """The newer way: a Metaspace pre-tokenizer and the same decoder without a strip, as Gemma has."""
    backend = _sentencepiece_model()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def metaspace_plain() -> Backend:
    """Metaspace on both sides and no byte fallback, as T5 has: the decoder drops the first token's space."""
    backend = Backend(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    )
    return backend


def word_level() -> Backend:
    """Whole words and no decoder: texts are tokens joined by spaces."""
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(50)), *sorted({w for t in CORPUS for w in t.split()})]
    backend = Backend(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


def two_stage_bytes() -> Backend:
    """A byte-level vocabulary behind a decoder of two stages, so that it is told apart by its text only."""
    backend = byte_level()
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    return backend


KINDS: dict[str, Callable[[], Backend]] = {
    "byte_level": byte_level,
    "sentencepiece": sentencepiece,
    "metaspace": metaspace,
    "metaspace_plain": metaspace_plain,
    "word_level": word_level,
    "two_stage_bytes": two_stage_bytes,
}


def write_folder(folder: Path, kind: str) -> Path:
    """A model folder with this kind of tokenizer and the three configuration files."""
    backend = KINDS[kind]()
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    chatty = backend.token_to_id("<|im_end|>") is not None
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>" if chatty else "<s>",
        "eos_token": "<|im_end|>" if chatty else "</s>",
        **({"chat_template": CHAT_TEMPLATE} if chatty else {}),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 2}))
    return folder


@pytest.fixture(scope="session")
def tokenizer_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: write_folder(root / kind, kind) for kind in KINDS}


@pytest.fixture(scope="session")
def tokenizers(tokenizer_folders: dict[str, Path]) -> dict[str, Tokenizer]:
    return {kind: Tokenizer.load(folder) for kind, folder in tokenizer_folders.items()}


@pytest.fixture(params=sorted(KINDS), scope="session")
def tokenizer(request: pytest.FixtureRequest, tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    found: Tokenizer = tokenizers[request.param]
    return found
