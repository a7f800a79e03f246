"""What tests of the whole daemon share: documents to ask about."""

from __future__ import annotations

from pathlib import Path

import pytest

import server.demo
from server.demo.corpus import example
from server.text import Tokenizer

FOLDER = Path(server.demo.__file__).parent / "model"
BLOCK_TOKENS = 16


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """6 documents of 100 to 350 tokens, each ending in a question. No two begin alike."""
    tokenizer = Tokenizer.load(FOLDER)
    texts = [example(seed=i, target_tokens=100 + 50 * i, kind="completion").prompt for i in range(6)]
    encoded = [tokenizer.encode(text) for text in texts]
    assert len({tuple(prompt[:BLOCK_TOKENS]) for prompt in encoded}) == len(encoded), "prompts share blocks"
    return encoded
