"""Classes of the parts of a probe are brought together by their names, not by their number."""

from __future__ import annotations

import io
import logging
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from evaluated import recipe, telling
from PIL import Image

from frugal.common.errors import InputError
from frugal.common.evaluation.linear_probe import LinearProbe
from frugal.common.run import Run
from frugal.common.weights.runs import bundle_of

COLORS = {"a": (220, 30, 30), "b": (30, 220, 30), "c": (30, 30, 220), "d": (220, 220, 30)}
COLORS["e"] = COLORS["b"]


def picture(name: str, number: int) -> Image.Image:
    noise = np.random.default_rng([ord(name[0].lower()), number]).integers(-60, 61, (32, 32, 3))
    color = np.array(COLORS[name[0].lower()])
    return Image.fromarray((color + noise).clip(0, 255).astype(np.uint8))


def part(folder: Path, classes: str, images: int = 8, *, empty: str = "", first: int = 0) -> Path:
    for name in (*classes, *empty):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name in classes:
        for number in range(first, first + images):
            picture(name, number).save(folder / name / f"{number}.png")
    return folder


def tars(folder: Path, classes: str, images: int = 8) -> Path:
    """Numbers as the letters count."""
    folder.mkdir(parents=True)
    with tarfile.open(folder / "0.tar", "w") as archive:
        for name in classes:
            for number in range(images):
                encoded = io.BytesIO()
                picture(name, number).save(encoded, "PNG")
                for end, content in (
                    ("png", encoded.getvalue()), ("cls", str(ord(name) - 97).encode())
                ):  # fmt: skip
                    header = tarfile.TarInfo(f"{name}{number}.{end}")
                    header.size = len(content)
                    archive.addfile(header, io.BytesIO(content))
    return folder


def measure(folder: Path, run: Run) -> dict[str, float | int]:
    plan = recipe()
    return LinearProbe(data=folder, weight_decay=1e-3).evaluate(bundle_of(telling(plan), plan), run)


def right(numbers: dict[str, float | int]) -> int:
    return round(numbers["linear_probe_top1"] * numbers["linear_probe_images"])


def test_a_class_that_is_not_measured_shifts_no_other(
    tmp_path: Path, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    found = {}
    for tested in ("abcd", "acd", "b"):
        folder = tmp_path / tested
        part(folder / "train", "abcd")
        part(folder / "test", tested, 5, first=100, empty="x" if tested == "acd" else "")
        with caplog.at_level(logging.INFO, logger="told"):
            found[tested] = measure(folder, replace(run, log=logging.getLogger("told")))
    assert right(found["acd"]) + right(found["b"]) == right(found["abcd"])
    assert found["acd"]["linear_probe_top1"] > 0.5 > 1 / 3  # where c is asked as b, most are wrong
    assert found["acd"]["linear_probe_classes"] == 4
    assert found["acd"]["linear_probe_classes_without_images"] == 1
    assert "linear_probe_classes_without_images" not in found["abcd"]
    assert "linear_probe: no image of 1 classes: b" in caplog.text


@pytest.mark.parametrize(
    ("trained", "tested", "empty", "sentence"),
    [
        ("abcd", "acde", "", "has the class 'e'"),
        ("abcd", "abcde", "", "has the class 'e'"),
        ("acd", "abcd", "b", "has the class 'b'"),
        ("abcd", "aBcd", "", r"has the class 'B', which .* does not have \(it has 'b'\)"),
    ],
    ids=["as many, others", "one more", "empty in training", "a capital"],
)
@pytest.mark.parametrize("where", ["test", "val"])
def test_a_class_that_training_lacks_is_refused_by_name(
    trained: str, tested: str, empty: str, sentence: str, where: str, tmp_path: Path, run: Run
) -> None:
    part(tmp_path / "train", trained, empty=empty)
    part(tmp_path / "test", trained if where == "val" else tested, 3)
    part(tmp_path / "val", tested if where == "val" else trained, 3)
    plan = recipe()
    with pytest.raises(InputError, match=sentence) as caught:
        LinearProbe(data=tmp_path).evaluate(bundle_of(telling(plan), plan), run)
    assert f"{tmp_path / where} has" in str(caught.value) and "\n" not in str(caught.value)


def test_numbers_in_tars_are_not_taken_for_class_folders(tmp_path: Path, run: Run) -> None:
    part(tmp_path / "train", "bcda")
    tars(tmp_path / "test", "abcd")
    with pytest.raises(InputError, match=r"are numbers in tars and those of .* class folders"):
        measure(tmp_path, run)


def test_numbers_that_no_training_image_has_are_counted_and_higher_ones_refused(
    tmp_path: Path, run: Run
) -> None:
    tars(tmp_path / "gap" / "train", "abd")
    tars(tmp_path / "gap" / "test", "abd", 3)
    assert measure(tmp_path / "gap", run)["linear_probe_images"] == 9
    tars(tmp_path / "more" / "train", "abd")
    tars(tmp_path / "more" / "test", "abcd", 3)
    found = measure(tmp_path / "more", run)
    assert found["linear_probe_images_of_untrained_classes"] == 3
    tars(tmp_path / "higher" / "train", "abd")
    tars(tmp_path / "higher" / "test", "abe", 3)
    with pytest.raises(InputError, match="has the label 4, of which there is no training image"):
        measure(tmp_path / "higher", run)
