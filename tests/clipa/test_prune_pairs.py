"""Pairs pruned by the words of their captions, against recorded numbers and written out by hand."""

import io
import json
import math
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
from open_clip.tokenizer import bytes_to_unicode

from frugal.clipa.prune_pairs import (
    MIN_COUNT,
    drop_values,
    kept_pairs,
    main,
    score,
    words_of,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/extras/wfpp_a.json").read_text())


def test_words_counts_values_scores_and_kept_pairs_are_the_recorded_ones() -> None:
    spelled = bytes_to_unicode()  # the recorded words are in the alphabet of the BPE
    words = [
        ["".join(spelled[byte] for byte in word.encode()) for word in words_of(caption)]
        for caption in GOLDEN["captions"]
    ]
    assert words == GOLDEN["words"]
    counts: dict[str, int] = {}
    for word in (word for caption in words for word in caption):
        counts[word] = counts.get(word, 0) + 1
    common = {word: count for word, count in counts.items() if count >= GOLDEN["min_count"]}
    assert common == GOLDEN["counts"]
    values = drop_values(counts, threshold=GOLDEN["threshold"], min_count=GOLDEN["min_count"])
    assert values == pytest.approx(GOLDEN["drop_value"], rel=0, abs=1e-12)
    scores = np.array([score(caption, values, max_words=GOLDEN["max_words"]) for caption in words])
    for found, expected in zip(scores, GOLDEN["scores"], strict=True):
        assert found == (-math.inf if expected is None else pytest.approx(expected, abs=1e-12))
    kept = kept_pairs(scores, GOLDEN["ratio"])
    assert sorted(kept.tolist()) == sorted(GOLDEN["kept_stable"])


def test_what_is_rarer_than_the_threshold_counts_as_nothing_or_stays() -> None:
    counts = {"a": 999_990, "seldom": 10, "once": 1}
    for rare, value in (("neutral", 1.0), ("keep", 0.0)):
        values = drop_values(counts, threshold=1e-2, rare=rare)  # type: ignore[arg-type]
        assert values["seldom"] == value and "once" not in values
        assert values["a"] == pytest.approx(1 - math.sqrt(1e-2 / 0.99999))
        only = score(["seldom", "once"], values, rare=rare)  # type: ignore[arg-type]
        assert only == (0.0 if rare == "neutral" else 0.5)
    assert score([], {}) == -math.inf
    long = ["a"] * 29 + ["seldom"] * 5
    assert score(long, {"a": 1.0, "seldom": 0.0}) == 1 / 30  # of the first 30 words one is rare


def test_equal_scores_keep_the_order_of_the_data_and_those_without_words_go_first() -> None:
    scores = np.array([0.5, -math.inf, 0.2, 0.5, 0.5, 0.2])
    assert kept_pairs(scores, 0.5).tolist() == [0, 3, 4]
    assert kept_pairs(scores, 4 / 6).tolist() == [0, 2, 3, 4]
    assert kept_pairs(scores, 1.0).tolist() == [0, 1, 2, 3, 4, 5]


def shards(folder: Path, captions: list[str], each: int = 7) -> Path:
    folder.mkdir()
    for first in range(0, len(captions), each):
        with tarfile.open(folder / f"{first // each:05d}.tar", "w") as tar:
            for number, caption in enumerate(captions[first : first + each], start=first):
                for extension, content in (("jpg", b"x"), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{number:06d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


def test_the_command_lists_the_pairs_of_the_highest_scores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = random.Random(0)
    vocabulary = ["a", "a", "a", "the", "the", "dog", "cat", "tree", "car"]
    captions = [" ".join(draw.choices(vocabulary, k=draw.randint(1, 6))) for _ in range(40)]
    captions[3], captions[20] = "???", "\x00\xff"
    folder = shards(tmp_path / "data", captions)
    out = tmp_path / "kept.txt"
    assert main([str(folder), "--out", str(out), "--ratio", "0.3", "--processes", "2"]) == 0
    counts: dict[str, int] = {}
    for word in (word for caption in captions for word in words_of(caption)):
        counts[word] = counts.get(word, 0) + 1
    assert max(counts.values()) > MIN_COUNT
    scores = np.array([score(words_of(caption), drop_values(counts)) for caption in captions])
    expected = [f"{n // 7:05d}.tar/{n:06d}" for n in kept_pairs(scores, 0.3)]
    assert out.read_text().splitlines() == expected and len(expected) == 12
    assert "12 of 40 pairs kept" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--ratio", "0"), "--ratio is 0, must be more than 0"),
        (("--ratio", "0.001"), "of 3 pairs leaves none"),
        (("--min-count", "0"), "--min-count is 0"),
        (("--min-count", "10"), "no word occurs 10 times"),
        (("--threshold", "2"), "--threshold is 2"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    words: tuple[str, ...], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shards(tmp_path / "data", ["a dog a dog a dog"] * 3)
    given = [str(folder), "--out", str(tmp_path / "kept.txt"), "--min-count", "1", *words]
    assert main(given) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "kept.txt").exists()
