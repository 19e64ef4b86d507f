"""Fixtures of the export tests."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for `import run_directories`

from run_directories import small, write_run

from frugal.common.models.named import clip_encoder


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """:func:`write_run` into a folder of the test."""
    return lambda *arguments, **options: write_run(tmp_path / "run", *arguments, **options)


@pytest.fixture(scope="session")
def clip_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ordinary CLIP towers, which every library can express."""
    return write_run(tmp_path_factory.mktemp("clip") / "run", small(clip_encoder("B/16")))


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT tokenizer of few words, in a folder as transformers saves one."""
    from transformers import BertTokenizer

    folder = tmp_path_factory.mktemp("bert")
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789.,!'"]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, "photo", "dog", "of"]
    words += [f"##{letter}" for letter in letters[:36]]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join([*words, ""]))
    return folder
