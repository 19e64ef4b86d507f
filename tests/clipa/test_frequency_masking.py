"""Frequency masking: drop rates, what always stays, and counts that cannot be used."""

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from frugal.clipa.frequency_masking import (
    FrequencyMasking,
    drawn_words,
    find_words,
    join_words,
    keep_probability,
)
from frugal.common.data.tokenizers import ClipBpe, Tokenizer
from frugal.common.errors import InputError
from frugal.common.randomness import sample_generator
from frugal.common.recipe_json import difference, from_json, to_json
from frugal.common.reduction.text import Truncate
from frugal.flip.recipes import demo

GOLDEN = Path(__file__).parents[1] / "golden" / "clipa"


class Words:
    """Words as tokens, without special ones."""

    def encode(self, caption: str) -> list[str]:
        return caption.split()

    def assemble(self, ids: list[str], length: int) -> list[str]:
        return list(ids[:length])


@pytest.fixture(scope="module")
def clip() -> Tokenizer:
    return ClipBpe().load()


def write_counts(path: Path, counts: dict[str, int], **changed: Any) -> Path:
    content = {"captions": 10, "words": sum(counts.values()), "least_share": 0, "counts": counts}
    path.write_text(json.dumps(content | changed))
    return path


def encode(reduction: FrequencyMasking, caption: str, length: int, generator: Any) -> list[str]:
    tokenizer: Any = Words()
    ids: Any = reduction.encode(caption, tokenizer, length=length, generator=generator)
    return ids


def test_words_are_dropped_as_often_as_the_formula_says(tmp_path: Path) -> None:
    """Zipf's law over 300 words: shares from 16 % down to 0.05 %, 400,000 words masked."""
    draw = np.random.default_rng(0)
    names = np.array([f"w{rank}" for rank in range(1, 301)])
    zipf = 1 / np.arange(1, 301)
    corpus = names[draw.choice(300, size=(5000, 80), p=zipf / zipf.sum())]
    counts = Counter(corpus.flatten().tolist())
    file = write_counts(tmp_path / "counts.json", dict(counts))
    threshold, total = 2e-3, corpus.size
    reduction = FrequencyMasking(counts=file, threshold=threshold)
    kept: Counter[str] = Counter()
    for number, caption in enumerate(corpus):
        generator = sample_generator(0, "text", number)
        kept.update(encode(reduction, " ".join(caption), 80, generator))
    for word, count in counts.items():
        dropped = 1 - kept[word] / count
        expected = max(0.0, 1 - math.sqrt(threshold / (count / total)))
        if expected == 0:
            assert dropped == 0
        else:
            assert abs(dropped - expected) < 4.5 * math.sqrt(expected * (1 - expected) / count)
    assert min(counts.values()) / total < threshold < max(counts.values()) / total


def test_a_word_as_rare_as_the_threshold_or_unknown_always_stays(tmp_path: Path) -> None:
    assert keep_probability(0.04, 0.01) == 0.5
    assert keep_probability(0.01, 0.01) == 1
    assert keep_probability(0.001, 0.01) == 1
    assert keep_probability(0, 0.01) == 1
    file = write_counts(tmp_path / "counts.json", {"the": 990, "dog": 10})
    reduction = FrequencyMasking(counts=file, threshold=0.01)
    caption = "the dog the unheard the"
    for number in range(200):
        words = encode(reduction, caption, 9, sample_generator(0, "text", number))
        assert [word for word in words if word != "the"] == ["dog", "unheard"]


def test_if_every_word_would_go_the_rarest_stays(tmp_path: Path) -> None:
    assert drawn_words([0.2, 0.4, 0.3], [0.9, 0.9, 0.9]) == [1]
    assert drawn_words([0.2, 0.2], [0.2, 0.2]) == [0]
    assert drawn_words([], []) == []
    file = write_counts(tmp_path / "counts.json", {"the": 700, "a": 299, "dog": 1})
    reduction = FrequencyMasking(counts=file, threshold=1e-6)
    captions = {
        tuple(encode(reduction, "the a the", 5, sample_generator(0, "text", number)))
        for number in range(300)
    }
    assert ("a",) in captions
    assert () not in captions


def test_the_draws_belong_to_the_sample(tmp_path: Path) -> None:
    file = write_counts(tmp_path / "counts.json", dict.fromkeys("abcdefgh", 5))
    reduction = FrequencyMasking(counts=file, threshold=0.03)

    def words(number: int) -> tuple[str, ...]:
        generator = sample_generator(1, "text", number)
        return tuple(encode(reduction, "a b c d e f g h", 8, generator))

    assert words(5) == words(5)
    assert len({words(number) for number in range(50)}) > 20


def test_what_stays_is_truncated_to_what_fits(tmp_path: Path) -> None:
    file = write_counts(tmp_path / "counts.json", {"the": 1})
    reduction = FrequencyMasking(counts=file, threshold=1)
    words = encode(reduction, "a b c d e f", 4, np.random.default_rng(0))
    assert words == ["a", "b", "c", "d"]


def test_captions_that_lose_no_word_are_those_of_truncation(
    clip: Tokenizer, tmp_path: Path
) -> None:
    file = write_counts(tmp_path / "counts.json", {"the": 1})
    reduction = FrequencyMasking(counts=file, threshold=1)
    for row in json.loads((GOLDEN / "truncate_ctx16.json").read_text())["rows"]:
        ids = reduction.encode(row["caption"], clip, length=16, generator=np.random.default_rng(0))
        assert ids + [0] * (16 - len(ids)) == row["tokens"]
        assert ids == Truncate().encode(row["caption"], clip, length=16, generator=None)


def test_words_are_letters_and_digits_or_other_marks() -> None:
    text, spans = find_words("The  DOG's 2nd well-known  caf\u00e9&amp;bar ... it\u2019s (so)!")
    assert [text[start:stop] for start, stop in spans] == [
        "the", "dog's", "2nd", "well", "-", "known", "caf\u00e9", "&", "bar", "...", "it's",
        "(", "so", ")!",
    ]  # fmt: skip


def test_kept_neighbors_stay_together_and_gaps_become_spaces() -> None:
    text, spans = find_words("a well-known black/white dog")
    words = [text[start:stop] for start, stop in spans]
    assert words == ["a", "well", "-", "known", "black", "/", "white", "dog"]
    assert join_words(text, spans, range(8)) == text
    assert join_words(text, spans, [1, 2, 3, 7]) == "well-known dog"
    assert join_words(text, spans, [4, 6]) == "black white"
    assert join_words(text, spans, []) == ""


def test_a_resumed_run_refuses_other_counts(tmp_path: Path) -> None:
    file = write_counts(tmp_path / "counts.json", {"the": 3, "dog": 1})
    first = FrequencyMasking(counts=file)
    assert first.counts_checksum is not None
    saved = replace(demo(), reduction=replace(demo().reduction, text=first))
    loaded = from_json(json.loads(json.dumps(to_json(saved))))
    assert loaded.reduction.text == first
    assert not difference(saved, loaded)

    write_counts(file, {"the": 3, "dog": 2})
    again = replace(saved, reduction=replace(saved.reduction, text=FrequencyMasking(counts=file)))
    assert [line.partition(" was ")[0] for line in difference(saved, again)] == [
        "reduction.text.counts_checksum"
    ]
    with pytest.raises(InputError, match="are not those that the recipe was made with"):
        encode(loaded.reduction.text, "the dog", 5, np.random.default_rng(0))


def test_counts_must_be_given(clip: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"reduction\.text\.counts, or .* frugal\.clipa\.word_cou"):
        FrequencyMasking().prepare(clip, length=16)
    missing = FrequencyMasking(counts=tmp_path / "missing.json")
    with pytest.raises(InputError, match=r"missing\.json cannot be read \(No such file"):
        missing.prepare(clip, length=16)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[1, 2]",
        b'"words"',
        b'{"words": 3}',
        b'{"words": 3, "least_share": 0, "counts": {}}',
        b'{"words": 3, "least_share": 0, "counts": [3]}',
        b'{"words": 3, "least_share": 0, "counts": {"a": 4}}',
        b'{"words": 3, "least_share": 0, "counts": {"a": -1, "b": 2}}',
        b'{"words": 3, "least_share": 0, "counts": {"a": "3"}}',
        b'{"words": 3, "least_share": 0, "counts": {"a": 1.5}}',
        b'{"words": 3, "least_share": -1, "counts": {"a": 1}}',
        b'{"words": 3, "least_share": 0, "counts": {"a": 1',
    ],
)
def test_damaged_counts_are_refused_with_one_sentence(
    clip: Tokenizer, tmp_path: Path, content: bytes
) -> None:
    file = tmp_path / "counts.json"
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"counts\.json holds no word counts") as refused:
        FrequencyMasking(counts=file).prepare(clip, length=16)
    assert "\n" not in str(refused.value)


def test_counts_that_leave_out_words_which_should_be_dropped_are_refused(
    clip: Tokenizer, tmp_path: Path
) -> None:
    file = write_counts(tmp_path / "counts.json", {"the": 900}, words=1000, least_share=1e-2)
    FrequencyMasking(counts=file, threshold=1e-2).prepare(clip, length=16)
    with pytest.raises(InputError, match=r"count again with --least-share 0\.009, or"):
        FrequencyMasking(counts=file, threshold=9e-3).prepare(clip, length=16)


@pytest.mark.parametrize("threshold", [0.0, -1e-3, 1.5, math.nan])
def test_a_threshold_that_is_no_share_is_refused(threshold: float) -> None:
    with pytest.raises(InputError, match=r"reduction\.text\.threshold is"):
        FrequencyMasking(threshold=threshold)
