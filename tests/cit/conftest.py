"""What the tests of CiT share."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for `import cit_cases`

from cit_runs import MODULE, words

from support import ALONE, command, train


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool of 700 pairs of 32 pixels, four in five of them irrelevant."""
    folder = tmp_path_factory.mktemp("cit") / "pool"
    words = [
        "frugal.common.scenes", "--out", folder, "--image-size", "32",
        "--train-samples", "700", "--shard-size", "180", "--irrelevant", "0.8",
        "--zero-shot-samples", "64", "--probe-samples", "0", "--retrieval-samples", "0",
        "--compositional-samples", "0", "--processes", "1",
    ]  # fmt: skip
    command(*words)
    return folder


@pytest.fixture(scope="session")
def bert_words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of few words: model and tokenizer, in a folder as transformers saves them."""
    from tower_cases import ROWS, write_bert
    from transformers import BertTokenizer

    folder = write_bert(tmp_path_factory.mktemp("bert"))
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789.,!'"]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, "photo", "dog", "of"]
    words += [f"##{letter}" for letter in letters[:36]]
    assert len(words) <= ROWS
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def undisturbed(pool: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty steps of the tiny demo in one process, with four curations."""
    run = tmp_path_factory.mktemp("curated") / "run"
    train(ALONE, run, small=words(pool), module=MODULE)
    return run
