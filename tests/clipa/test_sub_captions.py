"""One sentence of a long caption."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from frugal.clipa.sub_captions import SubCaption, sentences
from frugal.clipa.text_masking import BlockTextMasking
from frugal.common.cli import read_command_line
from frugal.common.data.tokenizers import Tokenizer
from frugal.common.errors import InputError
from frugal.common.randomness import sample_generator
from frugal.common.recipe_json import load_recipe, to_json
from frugal.common.reduction.text import Truncate
from frugal.flip.recipes import RECIPES
from frugal.flip.recipes import demo as flip_demo
from support import ALONE, newest, train

LONG = "A dog. It runs on 3.5 m of sand!! The sky is gray? Yes. "


@pytest.mark.parametrize(
    ("caption", "split", "found"),
    [
        (LONG, "spaced", ["A dog", "It runs on 3.5 m of sand", "The sky is gray? Yes"]),
        (LONG, "strict", ["A dog", "It runs on 3", "5 m of sand", "The sky is gray? Yes"]),
        ("one; two\nthree", "spaced", ["one; two\nthree"]),
        ("U.S. flag | pole", "spaced", ["U.S", "flag | pole"]),
        ("U.S. flag | pole", "strict", ["U", "S", "flag", "pole"]),
        ("... !!! .", "spaced", []),
        ("", "strict", []),
        ("a sea. 海の写真。", "spaced", ["a sea", "海の写真。"]),
    ],
)
def test_sentences_end_where_the_rule_says(caption: str, split: str, found: list[str]) -> None:
    assert sentences(caption, split) == found  # type: ignore[arg-type]


def test_every_sentence_is_drawn_alike_and_the_same_again_for_the_same_sample(
    clip: Tokenizer,
) -> None:
    drawn = Counter[tuple[int, ...]]()
    reduction = SubCaption(split="strict")
    draws = 10_000
    for number in range(draws):
        ids = reduction.encode(LONG, clip, length=77, generator=sample_generator(3, "text", number))
        drawn[tuple(ids)] += 1
    expected = {
        tuple(clip.assemble(clip.encode(text), 77)): draws / 4 for text in sentences(LONG, "strict")
    }
    assert drawn.keys() == expected.keys()
    chi_square = sum((drawn[ids] - count) ** 2 / count for ids, count in expected.items())
    assert chi_square < 16.27  # of 3 degrees of freedom: one in a thousand is above
    again = [
        reduction.encode(LONG, clip, length=77, generator=sample_generator(3, "text", 5))
        for _ in range(2)
    ]
    assert again[0] == again[1]


def test_several_sentences_in_a_row_are_whole_and_end_with_the_caption(clip: Tokenizer) -> None:
    reduction, found = SubCaption(max_sentences=2), set()
    for number in range(60):
        generator = sample_generator(0, "text", number)
        found.add(tuple(reduction.encode(LONG, clip, length=77, generator=generator)))
    one, two, three = sentences(LONG)
    texts = (f"{one}. {two}", f"{two}. {three}", three)
    assert found == {tuple(clip.assemble(clip.encode(text), 77)) for text in texts}


@pytest.mark.parametrize("caption", ["a dog on sand", "...", "a dog on sand."])
def test_what_has_no_second_sentence_is_what_the_other_reduction_makes_of_it(
    caption: str, clip: Tokenizer
) -> None:
    ids = SubCaption().encode(caption, clip, length=8, generator=np.random.default_rng(0))
    assert ids == clip.assemble(clip.encode(caption), 8)


def test_another_reduction_makes_tokens_of_the_sentence(clip: Tokenizer) -> None:
    sentence = "one two three four five six seven eight nine ten"
    then = SubCaption(then=BlockTextMasking())
    seen = set()
    for number in range(40):
        generator = sample_generator(1, "text", number)
        ids = then.encode(f"{sentence}. {sentence}", clip, length=5, generator=generator)
        seen.add(tuple(ids[1:-1]))
    words = clip.encode(sentence)
    assert seen <= {tuple(words[at : at + 3]) for at in range(8)} and len(seen) > 4


def test_both_reductions_are_chosen_on_the_command_line_in_any_order(tmp_path: Path) -> None:
    words = [
        "--reduction.text.then=frugal.clipa.text_masking.RandomTextMasking",
        "--reduction.text=frugal.clipa.sub_captions.SubCaption",
        "--reduction.text.then.shuffle", "--reduction.text.max-sentences=3",
    ]  # fmt: skip
    _, recipe = read_command_line(RECIPES, program="test", arguments=["demo", *words])
    text = recipe.reduction.text
    assert isinstance(text, SubCaption) and text.max_sentences == 3
    assert type(text.then).__name__ == "RandomTextMasking" and text.then.shuffle  # type: ignore[attr-defined]
    (tmp_path / "recipe.json").write_text(json.dumps(to_json(recipe)))
    assert load_recipe(tmp_path / "recipe.json") == recipe
    with pytest.raises(InputError, match=r"no --reduction\.text\.then .*sub_captions\.SubCaption"):
        read_command_line(RECIPES, program="test", arguments=["demo", words[0]])


def test_the_other_reduction_says_how_many_tokens_stay_and_what_cannot_be() -> None:
    recipe = flip_demo()
    for then in (Truncate(), BlockTextMasking()):
        text = SubCaption(then=then)
        assert text.most_tokens(24) == then.most_tokens(24)
        changed = replace(recipe, reduction=replace(recipe.reduction, text=text))
        assert changed.reduction.text == text
    with pytest.raises(InputError, match=r"reduction\.text\.split is 'loose'; choose from"):
        SubCaption(split="loose")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"reduction\.text\.max_sentences"):
        SubCaption(max_sentences=0)


def test_a_run_trains_on_sentences(scenes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(
        ALONE, run, f"--data.train={scenes / 'train'}", "--schedule.samples=96",
        "--reduction.text=frugal.clipa.sub_captions.SubCaption",
    )  # fmt: skip
    assert newest(run).name == "step_000000004"
    text = load_recipe(run / "recipe.json").reduction.text
    assert text == SubCaption()
