"""Random and block masking of captions, and truncation, in both token layouts."""

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.tokenizer import random_mask_tokenize, simple_mask_tokenize

from frugal.clipa.frequency_masking import FrequencyMasking
from frugal.clipa.syntax_masking import SyntaxMasking
from frugal.clipa.text_masking import BlockTextMasking, RandomTextMasking
from frugal.common.data.tokenizers import Tokenizer
from frugal.common.errors import InputError
from frugal.common.randomness import sample_generator
from frugal.common.recipe import Recipe
from frugal.common.recipe_json import from_json, to_json
from frugal.common.reduction.text import TextReduction, Truncate
from frugal.flip.recipes import demo

GOLDEN = Path(__file__).parents[1] / "golden"
START, END, CLS = 49406, 49407, 101
LONG = "a b c d e f g h i j k l m n o p q r s t"


def rows(kind: str, length: int) -> list[dict[str, Any]]:
    return json.loads((GOLDEN / "clipa" / f"{kind}_ctx{length}.json").read_text())["rows"]


def padded(ids: list[int], length: int) -> list[int]:
    return ids + [0] * (length - len(ids))


class Recorded:
    """Draws that were recorded elsewhere, in the place of a generator."""

    def __init__(self, row: dict[str, Any], room: int) -> None:
        self.row, self.room = row, room

    def permutation(self, count: int) -> np.ndarray:
        assert count == len(self.row["encoded"])
        return np.array(self.row["permutation"])

    def integers(self, high: int) -> int:
        assert high == len(self.row["encoded"]) - self.room + 1
        return self.row["start"]


@pytest.mark.parametrize("length", [8, 16])
def test_recorded_draws_give_the_recorded_tokens(clip: Tokenizer, length: int) -> None:
    reductions = {
        "tokens_random": RandomTextMasking(),
        "tokens_shuffle": RandomTextMasking(shuffle=True),
        "tokens_block": BlockTextMasking(),
    }
    for row in rows("text_masks", length):
        draws: Any = Recorded(row, length - 2)
        for name, reduction in reductions.items():
            ids = reduction.encode(row["caption"], clip, length=length, generator=draws)
            assert padded(ids, length) == row[name], (name, row["caption"])
    assert any(row["masked"] for row in rows("text_masks", length))


@pytest.mark.parametrize("length", [8, 16, 32, 77])
def test_truncation_gives_the_recorded_tokens(clip: Tokenizer, length: int) -> None:
    for row in rows("truncate", length):
        ids = Truncate().encode(row["caption"], clip, length=length, generator=None)
        assert padded(ids, length) == row["tokens"]


@pytest.mark.parametrize("length", [8, 16, 32])
def test_word_pieces_are_truncated_as_recorded(bert: Tokenizer, length: int) -> None:
    for row in rows("bert", length):
        ids = Truncate().encode(row["caption"], bert, length=length, generator=None)
        assert padded(ids, length) == row["tokens_truncate"]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("length", [3, 8, 16])
def test_the_same_permutation_gives_open_clips_tokens(
    clip: Tokenizer, length: int, shuffle: bool
) -> None:
    for seed, row in enumerate(rows("truncate", 77)):
        torch.manual_seed(seed)
        expected = random_mask_tokenize(
            [row["caption"]], length, START, END, clip.encode, shuffle=shuffle
        )
        torch.manual_seed(seed)
        count = len(row["encoded"])
        draws: Any = Recorded(
            {"encoded": row["encoded"], "permutation": torch.randperm(count).tolist()}, length - 2
        )
        reduction = RandomTextMasking(shuffle=shuffle)
        ids = reduction.encode(row["caption"], clip, length=length, generator=draws)
        assert padded(ids, length) == expected[0].tolist()


@pytest.mark.parametrize("length", [3, 8, 16])
def test_the_same_start_gives_open_clips_tokens(clip: Tokenizer, length: int) -> None:
    for seed, row in enumerate(rows("truncate", 77)):
        random.seed(seed)
        expected = simple_mask_tokenize([row["caption"]], length, START, END, clip.encode)
        random.seed(seed)
        last = len(row["encoded"]) - (length - 2)
        start = random.randint(0, last) if last > 0 else None
        draws: Any = Recorded({"encoded": row["encoded"], "start": start}, length - 2)
        ids = BlockTextMasking().encode(row["caption"], clip, length=length, generator=draws)
        assert padded(ids, length) == expected[0].tolist()


@pytest.mark.parametrize(
    "reduction", [RandomTextMasking(), RandomTextMasking(shuffle=True), BlockTextMasking()]
)
def test_captions_that_fit_stay_whole_and_draw_nothing(
    clip: Tokenizer, bert: Tokenizer, reduction: Any
) -> None:
    assert reduction.encode("a b c", clip, length=5, generator=None) == clip.assemble(
        clip.encode("a b c"), 5
    )
    assert reduction.encode("a b c", bert, length=4, generator=None) == [CLS, *bert.encode("a b c")]
    assert reduction.encode("", clip, length=3, generator=None) == [START, END]
    assert reduction.encode("", bert, length=3, generator=None) == [CLS]


def test_word_pieces_fill_every_slot_behind_the_class_token(bert: Tokenizer) -> None:
    content = bert.encode(LONG)
    generator = np.random.default_rng(0)
    for _ in range(50):
        subset = RandomTextMasking().encode(LONG, bert, length=8, generator=generator)
        block = BlockTextMasking().encode(LONG, bert, length=8, generator=generator)
        for ids in (subset, block):
            assert len(ids) == 8
            assert ids[0] == CLS
        assert subset[1:] == sorted(subset[1:], key=content.index)
        start = content.index(block[1])
        assert block[1:] == content[start : start + 7]


def test_random_masking_keeps_every_token_equally_often(clip: Tokenizer) -> None:
    content = clip.encode(LONG)
    runs, room = 4000, 6
    kept: Counter[int] = Counter()
    for number in range(runs):
        generator = sample_generator(0, "text", number)
        kept.update(RandomTextMasking().encode(LONG, clip, length=8, generator=generator)[1:-1])
    chance = room / len(content)
    tolerance = 4.5 * (runs * chance * (1 - chance)) ** 0.5
    assert set(kept) == set(content)
    assert all(abs(kept[token] - runs * chance) < tolerance for token in content)


def test_every_window_comes_equally_often_the_last_one_included(clip: Tokenizer) -> None:
    content = clip.encode(LONG)
    runs, windows = 4000, len(content) - 6 + 1
    starts: Counter[int] = Counter()
    for number in range(runs):
        generator = sample_generator(0, "text", number)
        ids = BlockTextMasking().encode(LONG, clip, length=8, generator=generator)
        starts[content.index(ids[1])] += 1
    tolerance = 4.5 * (runs / windows) ** 0.5
    assert set(starts) == set(range(windows))
    assert all(abs(count - runs / windows) < tolerance for count in starts.values())


def test_shuffling_draws_every_order(clip: Tokenizer) -> None:
    content = clip.encode("a b c d")
    reduction = RandomTextMasking(shuffle=True)
    seen = {
        tuple(reduction.encode("a b c d", clip, length=5, generator=np.random.default_rng(seed)))
        for seed in range(500)
    }
    assert len(seen) == 4 * 3 * 2
    assert all(set(ids[1:-1]) < set(content) for ids in seen)


@pytest.mark.parametrize("reduction", [RandomTextMasking(), BlockTextMasking()])
def test_a_sample_draws_the_same_tokens_again(clip: Tokenizer, reduction: Any) -> None:
    def ids(number: int) -> list[int]:
        generator = sample_generator(3, "text", number)
        return reduction.encode(LONG, clip, length=8, generator=generator)

    assert ids(7) == ids(7)
    assert len({tuple(ids(number)) for number in range(20)}) > 5


ALL = [
    RandomTextMasking(),
    RandomTextMasking(shuffle=True),
    BlockTextMasking(),
    SyntaxMasking(),
    FrequencyMasking(counts=Path("counts.json"), threshold=1e-4),
]


@pytest.mark.parametrize("reduction", ALL, ids=str)
def test_every_reduction_keeps_the_contract_and_travels_as_json(reduction: Any) -> None:
    assert isinstance(reduction, TextReduction)
    assert from_json(json.loads(json.dumps(to_json(reduction)))) == reduction


@pytest.mark.parametrize("length", [-1, 0, 1, 2])
@pytest.mark.parametrize("reduction", ALL, ids=str)
def test_a_text_length_without_room_for_words_is_refused(
    clip: Tokenizer, bert: Tokenizer, reduction: Any, length: int
) -> None:
    sentence = f"a text length of {length} leaves no room"
    for tokenizer in (clip, bert):
        with pytest.raises(InputError, match=sentence):
            reduction.encode("a dog", tokenizer, length=length, generator=None)
    if length > 0:
        with pytest.raises(InputError, match=sentence):
            recipe_with(reduction, length)


@pytest.mark.parametrize("reduction", ALL, ids=str)
def test_a_recipe_is_built_without_the_data_that_a_run_needs(reduction: Any) -> None:
    assert recipe_with(reduction, 3).reduction.text == reduction


def recipe_with(reduction: Any, length: int) -> Recipe:
    recipe = demo()
    text = replace(recipe.model.text, length=length)
    return replace(
        recipe,
        model=replace(recipe.model, text=text),
        reduction=replace(recipe.reduction, text=reduction),
    )
