"""Which text of a pair is read, against recorded draws of the reference implementation."""

import random
import re

import pytest
from cit_cases import case, names

from frugal.cit.texts import DELIMITERS, TextChoice, draw_text, shuffle_tags
from frugal.common.data.samples import Fields, select_captions

FIELDS = ("title", "desc", "tag")
TAGS = (2,)


@pytest.mark.parametrize(("seed", "tags", "expected"), case("aug_tag").about["rows"])
def test_tags_are_shuffled_as_recorded(seed: int, tags: str, expected: str) -> None:
    assert shuffle_tags(tags, random.Random(seed)) == expected


def test_a_shuffle_keeps_every_tag_and_uses_every_delimiter_and_order() -> None:
    found = {shuffle_tags("b, c,,a", random.Random(seed)) for seed in range(400)}
    orders = {re.sub(r"\W", "", text) for text in found}
    assert orders == {"abc", "acb", "bac", "bca", "cab", "cba"}
    assert {text[1] for text in found} == {text[3] for text in found} == set(DELIMITERS)
    assert len(found) == len(orders) * len(DELIMITERS)


def samples(name: str) -> list[tuple[int, list[str]]]:
    """Ids and texts, missing ones empty, of the samples that a recorded data set consists of."""
    about = case(name).about
    fields = Fields(caption=tuple(f"json.{field}" for field in FIELDS), separate=True)
    found = []
    for number, *values in about["metadata"]:
        content = dict(zip(FIELDS, values, strict=True))
        if about["example_ids"] is None:
            wanted = [tuple(FIELDS)]
        else:
            wanted = [(f,) for f in FIELDS if f"{number:08d}_{f}" in about["example_ids"]]
        for kept in wanted:
            texts = select_captions(
                fields,
                lambda field, content=content, kept=kept: [
                    content[name] for name in (field.removeprefix("json."),) if name in kept
                ],
            )
            if texts:
                found.append((number, texts))
    return found


@pytest.mark.parametrize("name", names("dataset"))
def test_a_pool_holds_the_recorded_samples_and_draws_the_recorded_texts(name: str) -> None:
    about = case(name).about
    found = samples(name)
    assert [
        {"image_id": number} | {f: t for f, t in zip(FIELDS, texts, strict=True) if t}
        for number, texts in found
    ] == about["samples"]
    tags = TAGS if about["aug_tag"] else ()
    for seed, index, key, caption in about["draws"]:
        number, texts = found[index]
        drawn = draw_text(texts, random.Random(seed), tags=tags)
        assert drawn is not None
        place, text = drawn
        assert (f"{number:08d}_{FIELDS[place]}", text) == (key, caption)


def test_texts_are_drawn_uniformly_among_those_that_are_there() -> None:
    choice = TextChoice(seed=3)
    drawn = [choice.draw(["one", "", "three"], number) for number in range(2_000)]
    counts = [drawn.count((place, text)) for place, text in ((0, "one"), (2, "three"))]
    assert sum(counts) == 2_000
    assert abs(counts[0] - 1_000) < 4 * 500**0.5


def test_a_draw_depends_on_seed_and_sample_alone() -> None:
    texts = ["title", "desc", "a,b,c,d"]
    again = [TextChoice(seed=1, tags=TAGS).draw(texts, number) for number in range(50)]
    assert [TextChoice(seed=1, tags=TAGS).draw(texts, number) for number in range(50)] == again
    assert [TextChoice(seed=2, tags=TAGS).draw(texts, number) for number in range(50)] != again


def test_tags_are_shuffled_anew_when_trained_on_and_other_texts_stay() -> None:
    choice = TextChoice(seed=0, tags=TAGS)
    texts = ["a title", "", "a,b,c,d,e,f"]
    assert choice.again(texts, 0, 5) == "a title"
    assert choice.again(texts, 2, 5) == choice.again(texts, 2, 5)
    assert len({choice.again(texts, 2, number) for number in range(20)}) > 15


@pytest.mark.parametrize("texts", [[], [""], ["  ", ""], ["", "", " , ,,"]])
def test_a_sample_without_usable_text_has_none(texts: list[str]) -> None:
    assert TextChoice(seed=0, tags=TAGS).draw(texts, 0) is None
