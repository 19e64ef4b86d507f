"""The report: one offline page, and the numbers beside it."""

from __future__ import annotations

import base64
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from reported import NUMBERS, Page, log, picture, steps, written

from frugal.common.reduction.image import KeptPatches
from frugal.common.report import write_report
from frugal.common.report.collect import REQUIRED
from frugal.common.report.examples import (
    ClassRecall,
    Confusion,
    Drawing,
    Example,
    Examples,
    Guess,
    masked_examples,
)
from frugal.common.report.page import Command


def some_examples() -> Examples:
    images = torch.from_numpy(np.stack([picture(seed=n) for n in range(2)]))
    kept = KeptPatches.packed(torch.tensor([0, 5, 1]), torch.tensor([2, 1]))
    wrong = "<script>alert('x')</script> & a \"moon\""
    example = Example(
        picture(), ("red ring",), (Guess("red ring", 0.75, True), Guess("blue ring", 0.125, False))
    )
    caption = Example(
        picture(300, 200), (wrong,), (Guess(wrong, 0.5, True), Guess("other", -0.25, False))
    )
    colors, shapes = ("red", "blue"), ("ring", "star", "moon")
    names = [f"{color} {shape}" for color in colors for shape in shapes]
    return Examples(
        masked=tuple(masked_examples(images, kept, 4, [wrong, "plain"])),
        classified=(example,),
        retrieved=(caption,),
        classes=tuple(
            ClassRecall(name, place, 10 if place else 0, name == "blue star")
            for place, name in enumerate(names)
        ),
        confused=(Confusion("red ring", "blue ring", 7),),
    )


@pytest.fixture
def page(tmp_path: Path) -> Page:
    stages = {
        "masked": log(tmp_path / "masked", steps(30)),
        "unmasked": log(tmp_path / "unmasked", steps(4)),
    }
    commands = [Command("Look at <it>", "tensorboard --logdir 'runs' && echo")]
    return written(
        tmp_path / "out", stages=stages, examples=some_examples(), commands=commands, title="A & B"
    )


def test_the_page_needs_nothing_from_elsewhere(page: Page) -> None:
    assert page.all("script") == []
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            assert (attributes.get(name) or "data:").startswith("data:"), tag
        assert not any(name.startswith("on") for name in attributes)
    style = page.words[page.words.index(next(w for w in page.words if "--paper" in w))]
    assert "url(" not in style
    assert "@import" not in style
    assert "http" not in " ".join(page.words)


def test_every_image_carries_its_pixels_and_a_description(page: Page) -> None:
    images = page.all("img")
    assert len(images) == 2 * 2 + 1 + 1
    for attributes in images:
        kind, _, encoded = attributes["src"].partition(";base64,")
        with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
            assert image.format == kind.rpartition("/")[2].upper()
            size = (int(attributes["width"]), int(attributes["height"]))
            assert image.size == size
            assert size in ((12, 8), (200, 300))
        assert attributes["alt"].strip()


def test_small_pictures_are_exact(tmp_path: Path) -> None:
    page = written(tmp_path, examples=some_examples())
    encoded = page.all("img")[0]["src"].partition(";base64,")[2]
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
        assert (np.asarray(image).transpose(2, 0, 1) == picture(seed=0)).all()


def test_words_from_the_data_stay_words(page: Page) -> None:
    assert "<script>alert('x')</script> & a \"moon\"" in page.text
    assert "A & B" in page.text
    assert "Look at <it>" in page.text
    assert "tensorboard --logdir 'runs' && echo" in page.text


def test_the_headline_compares_with_chance(page: Page) -> None:
    text = page.text.replace("\u2009", " ")
    for words in (
        "Zero-shot, top 1 81.2 %",
        "chance 16.7 % among 6 classes",
        "Never seen in training 50.0 %",
        "Text finds image 25.0 % chance 0.2 % among 500 images",
        "Image finds text 37.5 %",
        "Samples seen 90,112 in 3.5 minutes",
        "deepspeed, 2 processes",
    ):
        assert words in text


def test_the_right_answers_are_marked(page: Page) -> None:
    marks = [attributes["class"] for attributes in page.all("li") if "class" in attributes]
    assert marks == ["right", "wrong", "right", "wrong"]
    assert page.text.count("✓") == 2


def test_the_grid_has_a_cell_per_class_in_its_place(page: Page) -> None:
    cells = [attributes for attributes in page.all("td") if attributes.get("title")]
    assert [cell["title"] for cell in cells] == [
        "red star: 1 of 10", "red moon: 2 of 10",
        "blue ring: 3 of 10", "blue star: 4 of 10", "blue moon: 5 of 10",
    ]  # fmt: skip
    assert [cell["title"] for cell in cells if cell.get("class") == "held-out"] == [
        "blue star: 4 of 10"
    ]
    assert "red ring taken for blue ring \N{MULTIPLICATION SIGN} 7" in page.text.replace(
        "\xa0", " "
    )


@pytest.mark.parametrize(
    "names", [["cat", "dog"], ["red ring", "blue star"], ["red ring", "red star"], []]
)
def test_classes_that_are_no_grid_get_none(tmp_path: Path, names: list[str]) -> None:
    classes = tuple(ClassRecall(name, 1, 2) for name in names)
    assert written(tmp_path, examples=Examples(classes=classes)).all("td") == [{} for _ in NUMBERS]


def test_composition_is_a_grid_of_how_by_what(tmp_path: Path) -> None:
    example = Example(
        picture(),
        ("a red ring",),
        (Guess("a <blue> ring", 0.5, False), Guess("a red ring", 0.25, True)),
        question="replace, attribute",
    )
    numbers = {
        "compositional_replace_att": 0.625,
        "compositional_replace_rel": 0.5,
        "compositional_swap_obj": 0.25,
        "compositional_swap": 0.375,
    }
    page = written(tmp_path, numbers=NUMBERS | numbers, examples=Examples(contrasted=(example,)))
    text = page.text.replace("\u2009", " ")
    assert "object attribute relation mean replace \N{EN DASH} 62.5 50.0 \N{EN DASH}" in text
    assert "swap 25.0 \N{EN DASH} \N{EN DASH} 37.5 a <blue> ring" in text  # and no row for add
    assert "a <blue> ring 0.50 a red ring ✓ 0.25 replace, attribute" in text
    assert len(page.all("img")) == 1
    alone = written(tmp_path, numbers=NUMBERS | numbers)
    assert "swap 25.0" in alone.text and alone.all("img") == []
    assert "True captions" not in written(tmp_path, examples=Examples()).text


def test_what_a_reduction_draws_is_shown(tmp_path: Path) -> None:
    drawing = Drawing(picture(40, 100), "Own<Masking>")
    page = written(tmp_path, examples=Examples(drawn=drawing))
    assert "How patches are chosen" in page.text
    assert "Drawn by Own<Masking> itself." in page.text
    (attributes,) = page.all("img")
    assert (attributes["width"], attributes["height"]) == ("100", "40")
    assert "How patches are chosen" not in written(tmp_path, examples=some_examples()).text


def test_the_json_holds_every_number(tmp_path: Path) -> None:
    written(tmp_path, numbers=NUMBERS | {"zero_shot_top5": math.nan, "more": 3})
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved == NUMBERS | {"zero_shot_top5": None, "more": 3}
    assert set(REQUIRED) <= set(saved)


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_number_is_named(tmp_path: Path, name: str) -> None:
    numbers = {key: value for key, value in NUMBERS.items() if key != name}
    with pytest.raises(ValueError, match=f"a report needs {name}"):
        write_report(tmp_path, numbers=numbers, stages={})
    assert not (tmp_path / "report.html").exists()


def test_a_number_that_was_not_measured_shows_as_a_dash(tmp_path: Path) -> None:
    numbers = dict.fromkeys(REQUIRED) | {"world_size": 1, "engine": "accelerate"}
    assert (
        "Samples per second \N{EN DASH} accelerate, 1 process"
        in written(tmp_path, numbers=numbers).text
    )


def test_without_examples_and_curves_their_sections_are_left_out(tmp_path: Path) -> None:
    page = written(tmp_path, stages={"gone": tmp_path / "gone"}, examples=Examples())
    assert page.all("h2") == page.all("svg") == page.all("img") == []
