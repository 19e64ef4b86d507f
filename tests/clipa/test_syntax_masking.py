"""Syntax masking: recorded words and tags without NLTK's data, whole captions with it."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip.tokenizer
import pytest

from frugal.clipa import nltk_data
from frugal.clipa.part_of_speech import load_tagger, split_words
from frugal.clipa.syntax_masking import (
    SyntaxMasking,
    WordPieceEntries,
    first_in_priority,
    keep_pieces,
    keep_words,
    priority,
    tag_entries,
)
from frugal.common.data.tokenizers import Tokenizer, WordPiece
from support import run_code

GOLDEN = Path(__file__).parents[1] / "golden"
VOCABULARY = GOLDEN / "flip" / "bert_uncased_vocab.txt"
TAGGER = Path("taggers", "averaged_perceptron_tagger_eng")
SPLITTER = Path("tokenizers", "punkt_tab")
LENGTHS = [8, 16, 32]


def rows(kind: str, length: int) -> list[dict[str, Any]]:
    return json.loads((GOLDEN / "clipa" / f"{kind}_ctx{length}.json").read_text())["rows"]


def padded(ids: list[int], length: int) -> list[int]:
    return ids + [0] * (length - len(ids))


@pytest.fixture(scope="module")
def language_data() -> Path:
    """The folder of NLTK's data, where this machine has them."""
    named = [Path(place) for place in os.environ.get("NLTK_DATA", "").split(os.pathsep) if place]
    places = [*named, Path.home() / "nltk_data", Path(__file__).parents[3] / "shared" / "nltk_data"]
    for place in places:
        if (place / TAGGER).is_dir() and (place / SPLITTER).is_dir():
            import nltk

            nltk.data.path.insert(0, str(place))
            return place
    pytest.skip("NLTK's English tagger is not here; run python -m frugal.clipa.nltk_data")


# without NLTK's data


@pytest.mark.parametrize("length", LENGTHS)
def test_recorded_tags_give_the_recorded_tokens(clip: Tokenizer, length: int) -> None:
    for row in rows("syntax_mask", length):
        priorities = [priority(tag) for tag in row["tags"]]
        assert priorities == row["priorities"]
        assert first_in_priority(priorities, length - 2) == row["kept_word_ids"]
        kept = keep_words(row["words"], row["tags"], length - 2)
        assert kept == row["kept_text"]
        assert padded(clip.assemble(clip.encode(kept), length), length) == row["tokens"]


@pytest.mark.parametrize("length", LENGTHS)
def test_recorded_priorities_give_the_recorded_word_pieces(bert: Tokenizer, length: int) -> None:
    entries = VOCABULARY.read_text().splitlines()
    vocabulary = WordPieceEntries(b"", bytes(entry.startswith("##") for entry in entries))
    for row in rows("bert", length):
        words = vocabulary.words(bert.encode(row["caption"]))
        assert words == row["word_pieces"]
        if len(words) > length - 1:
            assert first_in_priority(row["word_priority"], length - 1) == row["kept_words"]
        kept = keep_pieces(words, row["word_priority"], length - 1)
        assert padded(bert.assemble(kept, length), length) == row["tokens_syntax"]


def test_earlier_words_win_among_equals() -> None:
    assert first_in_priority([4, 1, 4, 1, 1, 2, 3], 2) == [1, 3]
    assert first_in_priority([4, 1, 4, 1, 1, 2, 3], 5) == [1, 3, 4, 5, 6]
    assert first_in_priority([4] * 40, 17) == list(range(17))
    assert first_in_priority([], 5) == []


def test_importing_and_describing_it_loads_no_nltk() -> None:
    check = (
        "import sys; from frugal.clipa.syntax_masking import SyntaxMasking; SyntaxMasking();"
        "import frugal.clipa.frequency_masking, frugal.clipa.nltk_data, frugal.clipa.word_counts;"
        "sys.exit(' '.join({'nltk'} & sys.modules.keys()) or 0)"
    )
    result = run_code(check)
    assert result.returncode == 0, result.stderr


def prepared_with(folder: Path) -> subprocess.CompletedProcess[str]:
    """What `prepare` says where NLTK searches one folder only."""
    code = (
        "import sys, nltk; nltk.data.path[:] = [sys.argv[1]]\n"
        "from frugal.clipa.syntax_masking import SyntaxMasking\n"
        "from frugal.common.data.tokenizers import ClipBpe\n"
        "from frugal.common.errors import InputError\n"
        "try: SyntaxMasking().prepare(ClipBpe().load(), length=16)\n"
        "except InputError as error: print(error)\n"
        "else: print('ready')"
    )
    done = run_code(code, folder, NLTK_DATA=str(folder))
    done.check_returncode()
    return done


def test_missing_data_are_named_with_the_command_that_fetches_them(tmp_path: Path) -> None:
    said = prepared_with(tmp_path).stdout
    assert said.count("\n") == 1
    for words in (str(tmp_path), "python -m frugal.clipa.nltk_data", "NLTK_DATA", "frequency"):
        assert words in said


def test_without_a_network_fetching_fails_with_one_sentence(tmp_path: Path) -> None:
    nowhere = dict.fromkeys(("HTTPS_PROXY", "https_proxy", "http_proxy"), "http://127.0.0.1:9")
    result = subprocess.run(
        [sys.executable, "-m", "frugal.clipa.nltk_data", "--out", str(tmp_path / "data")],
        capture_output=True,
        text=True,
        env=os.environ | nowhere,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: NLTK's ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


# with NLTK's data


@pytest.mark.parametrize("length", LENGTHS)
def test_captions_give_the_recorded_tokens(
    language_data: Path, clip: Tokenizer, length: int
) -> None:
    for row in rows("syntax_mask", length):
        assert split_words(row["caption"]) == row["words"]
        assert load_tagger().tag(row["words"]) == row["tags"]
        for _ in range(2):  # the second time from the cache
            ids = SyntaxMasking().encode(row["caption"], clip, length=length, generator=None)
            assert padded(ids, length) == row["tokens"]


@pytest.mark.parametrize("length", LENGTHS)
def test_captions_give_the_recorded_word_pieces(
    language_data: Path, bert: Tokenizer, length: int
) -> None:
    for row in rows("bert", length):
        ids = SyntaxMasking().encode(row["caption"], bert, length=length, generator=None)
        assert padded(ids, length) == row["tokens_syntax"]


def test_berts_entries_have_the_published_parts_of_speech(
    language_data: Path, bert: Tokenizer
) -> None:
    entries = tag_entries(bert)
    assert entries is not None
    # nouns, adjectives, verbs and the rest; the last count published includes the empty line that
    # follows the vocabulary's last
    assert Counter(entries.priorities) == {1: 23_612, 2: 1_590, 3: 3_384, 4: 1_937 - 1}


@pytest.mark.parametrize("length", [3, 8, 16, 32])
def test_with_a_stable_sort_open_clip_gives_the_same_tokens(
    language_data: Path, clip: Tokenizer, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_clip.tokenizer, "_nltk_init", True)  # no download
    monkeypatch.setattr(np, "argsort", partial(np.argsort, kind="stable"))
    captions = [row["caption"] for row in rows("syntax_mask", 8)]
    start, end = clip.prefix[0], clip.suffix[0]
    expected = open_clip.tokenizer.syntax_mask_tokenize(captions, length, start, end, clip.encode)
    for caption, tokens in zip(captions, expected.tolist(), strict=True):
        ids = SyntaxMasking().encode(caption, clip, length=length, generator=None)
        assert padded(ids, length) == tokens


def made_up_captions(count: int) -> list[str]:
    """Texts of words of captions, of what splitting has rules for, and of all kinds of spaces."""
    words = [word for row in rows("truncate", 77) for word in row["caption"].split()]
    odd = [
        "cannot", "Cannot-do", "gonna", "gimme5", "wanna", "d'ye", "'tis", "don't", "dogs'", "-",
        "--", "a-b", "-a", "a-", ",", "a,b", ",,", ".", "..", "U.S.", "a.m.", "etc.", "3.14",
        "1,000", "1999", "12:30", "'", '"', "``", "(x)", "[y]", "<z>", "#1", "50%", "a/b", "a_b",
        "caf\u00e9", "\u201cq\u201d", "\u4f60\u597d", "\U0001f600", "\u2014", "?!", "*", ";", "\t",
        "\n", "\x1c", "\x85", "\u00a0", "\x00",
    ]  # fmt: skip
    draw = random.Random(0)
    texts = []
    for number in range(count):
        space = draw.choice([" ", " ", "  ", "", "-", ", ", ". ", "\n"])
        chosen = draw.choices(words + odd * (number % 3), k=draw.randint(0, 14))
        texts.append(space.join(chosen) + draw.choice(["", ".", " .", "\n", ","]))
    return texts


@pytest.mark.slow
def test_words_and_tags_are_those_of_nltk(language_data: Path) -> None:
    from nltk.tag import PerceptronTagger
    from nltk.tokenize import word_tokenize

    reference = PerceptronTagger()
    plain = 0
    for text in made_up_captions(4000):
        words = word_tokenize(text)
        assert split_words(text) == words, repr(text)
        assert load_tagger().tag(words) == [tag for _, tag in reference.tag(words)], repr(text)
        plain += text.replace(" ", "").isalnum()
    assert 100 < plain < 2000  # captions with and without anything to split


def test_prepared_data_are_found_and_a_damaged_tagger_is_told(
    language_data: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "nltk_data"
    shutil.copytree(language_data / TAGGER, copy / TAGGER)
    said = prepared_with(copy).stdout
    assert "sentence splitter" in said
    assert "is in none of the folders" in said
    shutil.copytree(language_data / SPLITTER, copy / SPLITTER)
    assert prepared_with(copy).stdout == "ready\n"
    file = copy / TAGGER / "averaged_perceptron_tagger_eng.weights.json"
    file.chmod(0o644)
    file.write_text(file.read_text()[:1000])
    said = prepared_with(copy).stdout
    assert "part-of-speech tagger" in said
    assert f"cannot be read from {copy / TAGGER}" in said
    assert said.count("\n") == 1


def test_the_fetching_command_finds_data_that_are_there(
    language_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert nltk_data.main(["--out", str(language_data)]) == 0
    assert f"found NLTK's English tagger and sentence splitter in {language_data}" in (
        capsys.readouterr().out
    )


def test_an_endless_caption_takes_no_longer_than_its_beginning(
    language_data: Path, clip: Tokenizer
) -> None:
    ids = SyntaxMasking().encode("dog. " * 1_000_000, clip, length=8, generator=None)
    assert ids[1:-1] == clip.encode("dog") * 6


def test_word_pieces_without_an_end_token_but_with_no_continuations_are_tagged_in_their_caption(
    language_data: Path, tmp_path: Path
) -> None:
    file = tmp_path / "vocabulary.txt"
    file.write_text("[PAD]\n[UNK]\nred\ndog\nin\nthe\nsnow\n")
    tokenizer = WordPiece(vocab=file).load()
    ids = SyntaxMasking().encode("in the red snow the dog", tokenizer, length=3, generator=None)
    assert tokenizer.decode(ids) == "red snow dog"
