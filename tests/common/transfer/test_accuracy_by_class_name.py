"""A classifier's classes keep their names, and are measured by them wherever images lie."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from frugal.common.data.config import ImageData
from frugal.common.data.stores.class_folders import CLASSES
from frugal.common.errors import InputError
from frugal.common.models.vit import ImageTower
from frugal.common.recipe import Recipe
from frugal.common.run import Run
from frugal.common.transfer.accuracy import Accuracy
from frugal.common.transfer.classifier import ClassifierConfig
from frugal.common.weights.runs import bundle_of
from frugal.milan.transfer_recipes import FINE_TUNING

TOWER = ImageTower(width=16, depth=1, heads=2, mlp_width=16, patch_size=8, image_size=16)
CONFIG = ClassifierConfig(image=TOWER, num_classes=4, head_init_std=1.0)


def pictures(folder: Path, classes: str, images: int = 12, *, empty: str = "") -> Path:
    for name in (*classes, *empty):
        (folder / name).mkdir(parents=True)
    for name in classes:
        generator = np.random.default_rng(ord(name.lower()))
        for number in range(images):
            pixels = generator.integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def plan(train: Path, data: Path | None) -> Recipe:
    recipe = FINE_TUNING["demo"]()
    return replace(
        recipe,
        model=CONFIG,
        data=ImageData(train=(str(train),), workers=0),
        batch_size=4,
        evaluation=(Accuracy(data=data),),
    )


def run_in(folder: Path) -> Run:
    return Run(folder, 0, 1, 0, torch.device("cpu"), logging.getLogger("told"))


def begin(recipe: Recipe, run: Run, *, first_sample: int = 0) -> None:
    """As training does before its first step."""
    recipe.data.build(recipe, run, first_sample=first_sample, state={}, engine=None)


def measure(data: Path, run: Run, recipe: Recipe) -> dict[str, float | int]:
    model = CONFIG.build(torch.Generator().manual_seed(0))
    recipe = replace(recipe, run=replace(recipe.run, dir=run.dir))
    return Accuracy(data=data).evaluate(bundle_of(model, recipe), run)


def right(numbers: dict[str, float | int]) -> int:
    return round(numbers["accuracy_top1"] * numbers["accuracy_images"])


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Recipe, Run]:
    """A run that has begun, whose training images are gone."""
    train = pictures(tmp_path / "train", "abcd", 2)
    recipe, run = plan(train, None), run_in(tmp_path / "run")
    begin(recipe, run)
    shutil.rmtree(train)
    return recipe, run


def test_a_run_keeps_what_its_classes_are_called(trained: tuple[Recipe, Run]) -> None:
    kept = json.loads((trained[1].dir / CLASSES).read_text())
    assert kept == {"folders": ["a", "b", "c", "d"], "names": ["a", "b", "c", "d"]}


def test_a_class_that_is_not_measured_shifts_no_other(
    trained: tuple[Recipe, Run], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe, run = trained
    with caplog.at_level(logging.INFO, logger="told"):
        found = {
            classes: measure(pictures(tmp_path / classes, classes), run, recipe)
            for classes in ("abcd", "acd", "b")
        }
    assert right(found["acd"]) + right(found["b"]) == right(found["abcd"]) > 0
    assert found["acd"]["accuracy_classes"] == 4
    assert found["acd"]["accuracy_classes_without_images"] == 1
    assert "no image of 1 classes: b" in caplog.text
    assert "no image of 3 classes: a, c, d" in caplog.text


@pytest.mark.parametrize(
    ("tested", "sentence"),
    [
        ("acde", "has the class 'e'"),
        ("abcde", "has the class 'e'"),
        ("aBcd", r"has the class 'B', .* \(it has 'b'\)"),
    ],
)
def test_a_class_that_training_lacks_is_refused_by_name(
    tested: str, sentence: str, trained: tuple[Recipe, Run], tmp_path: Path
) -> None:
    recipe, run = trained
    folder = pictures(tmp_path / "test", tested, 1)
    with pytest.raises(InputError, match=sentence) as caught:
        measure(folder, run, recipe)
    assert "\n" not in str(caught.value)


def test_it_is_refused_before_the_first_step_too(tmp_path: Path) -> None:
    train = pictures(tmp_path / "train", "abcd", 2)
    data = pictures(tmp_path / "data" / "test", "acde", 1, empty="x").parent
    with pytest.raises(InputError, match=r"test has the class 'e', which the training data does"):
        begin(plan(train, data / "test"), run_in(tmp_path / "run"))
    pictures(tmp_path / "fine", "acd", 1, empty="x")
    begin(plan(train, tmp_path / "fine"), run_in(tmp_path / "run"))


def test_a_run_does_not_go_on_with_other_classes(
    trained: tuple[Recipe, Run], tmp_path: Path
) -> None:
    _, run = trained
    other = plan(pictures(tmp_path / "other", "abce", 2), None)
    with pytest.raises(InputError, match=r"not those that the run in .* began with \(see 'd'\)"):
        begin(other, run, first_sample=4)
    begin(plan(pictures(tmp_path / "same", "abcd", 2), None), run, first_sample=4)


def test_empty_class_folders_are_named_where_the_number_of_classes_differs(tmp_path: Path) -> None:
    train = pictures(tmp_path / "train", "abc", 2, empty="d")
    with pytest.raises(InputError, match=r"has 3 class folders with images \(none: d\), but"):
        begin(plan(train, None), run_in(tmp_path / "run"))


def test_numbers_are_explained_where_the_other_side_has_names(
    trained: tuple[Recipe, Run],
    scenes: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    recipe, run = trained
    (tmp_path / "t").mkdir()
    with caplog.at_level(logging.INFO, logger="told"):
        for shard in (scenes / "zero_shot" / "test").glob("*.tar"):
            (tmp_path / "t" / shard.name).symlink_to(shard)
        with pytest.raises(InputError, match="an image has the label"):  # of more classes
            measure(tmp_path / "t", run, recipe)
        measure(pictures(tmp_path / "wxyz", "wxyz", 1), run_in(tmp_path / "unknown"), recipe)
    assert "have class numbers, and training had class folders: 0 is taken for a, 3 for d" in (
        caplog.text
    )
    assert "w is taken for class 0, z for class 3" in caplog.text
