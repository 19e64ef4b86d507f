"""The two tokenizers of CLIPA's versions."""

from pathlib import Path

import pytest

from frugal.common.data.tokenizers import ClipBpe, Tokenizer, WordPiece

VOCABULARY = Path(__file__).parents[1] / "golden" / "flip" / "bert_uncased_vocab.txt"


@pytest.fixture(scope="session")
def clip() -> Tokenizer:
    return ClipBpe().load()


@pytest.fixture(scope="session")
def bert() -> Tokenizer:
    return WordPiece(vocab=VOCABULARY, class_token=True).load()
