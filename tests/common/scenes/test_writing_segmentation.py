"""Scenes with a class for every pixel, in the layout of ADE20K."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from frugal.common.errors import InputError
from frugal.common.randomness import sample_generator
from frugal.common.scenes import (
    Settings,
    class_names,
    draw,
    held_out,
    mask,
    sample_scene,
    write,
)

pytestmark = pytest.mark.slow

SMALL = {
    "train_samples": 5,
    "zero_shot_samples": 3,
    "probe_samples": 3,
    "retrieval_samples": 3,
    "compositional_samples": 1,
    "image_size": 32,
    "format": "png",
    "processes": 1,
}
MASKED = {**SMALL, "segmentation_samples": 18}


def drawn(out: Path, **settings) -> Path:
    write(Settings(out=out, **settings))
    return out


def tree(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return drawn(tmp_path_factory.mktemp("masked") / "scenes", **MASKED)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


@pytest.mark.parametrize(("split", "count"), [("training", 18), ("validation", 5)])
def test_every_picture_has_a_mask_in_which_one_is_the_background(
    masked: Path, split: str, count: int
) -> None:
    root = masked / "segmentation"
    assert (root / "classnames.txt").read_text().splitlines() == ["background", *class_names()]
    names = sorted(path.name for path in (root / "images" / split).iterdir())
    assert names == [f"{number:08d}.png" for number in range(count)]
    assert names == sorted(path.name for path in (root / "annotations" / split).iterdir())
    for number, name in enumerate(names):
        generator = sample_generator(0, f"scenes/segmentation/{split}", number)
        scene = sample_scene(generator)
        numbers = pixels(root / "annotations" / split / name)
        assert np.array_equal(pixels(root / "images" / split / name), draw(scene, 32))
        assert np.array_equal(numbers, mask(scene, 32) + 1)
        assert set(np.unique(numbers)) == {1, *(2 + thing.label for thing in scene.things)}
        assert not {thing.label for thing in scene.things} & set(held_out())


def test_the_other_files_are_those_of_a_data_set_without_masks(
    masked: Path, tmp_path: Path
) -> None:
    plain = tree(drawn(tmp_path / "scenes", **SMALL))
    assert "segmentation" not in json.loads(plain.pop("scenes.json"))["settings"]
    both = tree(masked)
    about = json.loads(both["scenes.json"])
    assert about["settings"]["segmentation_samples"] == 18
    assert about["segmentation_values"] == "1 is the background, 2 + class index a thing"
    assert plain == {name: content for name, content in both.items() if name in plain}
    assert len(both) == len(plain) + 1 + 2 * (18 + 5) + 1


def test_neither_processes_nor_shards_nor_counts_change_a_sample(
    masked: Path, tmp_path: Path
) -> None:
    options = {**MASKED, "processes": 2, "shard_size": 4, "segmentation_samples": 30}
    other = tree(drawn(tmp_path / "scenes", **options) / "segmentation")
    mine = tree(masked / "segmentation")
    assert mine == {name: content for name, content in other.items() if name in mine}


def test_masks_are_added_to_a_data_set_that_has_none_and_nothing_else_is_touched(
    masked: Path, tmp_path: Path
) -> None:
    out = drawn(tmp_path / "scenes", **SMALL)
    shard = out / "train" / "00000.tar"
    shard.write_bytes(b"somebody reads this")
    said = write(Settings(out=out, **MASKED))
    assert "drew 23 pictures" in said
    assert shard.read_bytes() == b"somebody reads this"
    added = tree(out)
    added["train/00000.tar"] = (masked / "train" / "00000.tar").read_bytes()
    assert added == tree(masked)
    for settings in (MASKED, SMALL):
        assert "already holds these scenes" in write(Settings(out=out, **settings))


def test_adding_masks_is_finished_after_an_interruption(masked: Path, tmp_path: Path) -> None:
    out = drawn(tmp_path / "scenes", **SMALL)
    write(Settings(out=out, **MASKED))
    plain = drawn(tmp_path / "plain", **SMALL)
    (out / "scenes.json").rename(out / "scenes.json.unfinished")  # as it was in between
    (out / "scenes.json").write_bytes((plain / "scenes.json").read_bytes())
    (out / "segmentation" / "images" / "training" / "00000003.png").unlink()
    assert "drew 23 pictures" in write(Settings(out=out, **MASKED))
    assert tree(out) == tree(masked)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"segmentation_samples": 19}, "segmentation_samples = 18, not 19"),
        ({"seed": 1}, "seed = 0, not 1"),
        ({"segmentation_samples": -1}, "--segmentation-samples is -1, must not be negative"),
    ],
)
def test_other_settings_are_refused(masked: Path, change: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        write(Settings(out=masked, **{**MASKED, **change}))


def test_another_seed_is_not_given_masks(tmp_path: Path) -> None:
    out = drawn(tmp_path / "scenes", **SMALL)
    with pytest.raises(InputError, match="seed = 0, not 1"):
        write(Settings(out=out, **{**MASKED, "seed": 1}))
    assert not (out / "segmentation").exists()
