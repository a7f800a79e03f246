"""What tests on a GPU share: kernels compiled beforehand, all at once, and documents to ask about."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import server.demo
from server.demo.corpus import example
from server.text import Tokenizer
from tests.gpu.variants import MIXED, VARIANTS, able

FOLDER = Path(server.demo.__file__).parent / "model"


@pytest.fixture(scope="session", autouse=True)
def compiled() -> None:
    """FlashInfer compiles a kernel when it is first used, for up to a minute and mostly on a few cores: so all of them
    are used at once. What fails here fails again where it is tested, and says so there."""
    if torch.cuda.is_available():
        scenes = [(variant, variant.scene(MIXED)) for variant in VARIANTS if able(variant)]
        with ThreadPoolExecutor(len(scenes)) as pool:
            for work in [pool.submit(variant.attend, it) for variant, it in scenes]:
                work.exception()


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """6 documents of 100 to 350 tokens, each ending in a question. No two begin alike."""
    tokenizer = Tokenizer.load(FOLDER)
    texts = [example(seed=i, target_tokens=100 + 50 * i, kind="completion").prompt for i in range(6)]
    return [tokenizer.encode(text) for text in texts]
