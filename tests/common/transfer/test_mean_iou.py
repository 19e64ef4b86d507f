"""Mean intersection over union: counted by hand, through windows, at the pictures' resolution."""

import csv
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import segment_cases as cases
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from frugal.common.errors import InputError
from frugal.common.transfer.mean_iou import (
    MeanIoU,
    Quality,
    confusion_matrix,
    resized_rows,
    segment,
    window_scores,
    window_starts,
)
from frugal.common.transfer.segmentation_data import fitted_size
from frugal.common.weights.runs import bundle_of

# ------------------------------------------------------------------------------------------------
# The measure


def by_hand(answers: list[np.ndarray], labels: list[np.ndarray], classes: int) -> dict:
    """Every number from sets of pixels, class by class, in float64."""
    ious, accuracies, right, known = [], [], 0, 0
    for number in range(classes):
        intersection = union = of_class = 0
        for answer, truth in zip(answers, labels, strict=True):
            counts = truth != 255
            is_class, is_said = (truth == number) & counts, (answer == number) & counts
            intersection += (is_class & is_said).sum()
            union += (is_class | is_said).sum()
            of_class += is_class.sum()
        if union:
            ious.append(intersection / union)
        if of_class:
            accuracies.append(intersection / of_class)
    for answer, truth in zip(answers, labels, strict=True):
        right += ((answer == truth) & (truth != 255)).sum()
        known += (truth != 255).sum()
    return {
        "miou": np.mean(ious),
        "mean_accuracy": np.mean(accuracies),
        "pixel_accuracy": right / known,
        "classes": len(ious),
    }


def test_sums_over_pictures_are_divided_class_by_class_and_averaged_over_those_that_occur() -> None:
    generator = np.random.default_rng(0)
    answers, labels = [], []
    total = torch.zeros(9, 9, dtype=torch.int64)
    for height, width in ((5, 9), (12, 4), (1, 1), (30, 17)):
        truth = generator.choice([0, 1, 2, 3, 4, 255], (height, width), p=[0.5, *[0.1] * 5])
        answer = np.where(generator.random(truth.shape) < 0.6, truth, 1)
        answer = np.where(generator.random(truth.shape) < 0.1, 5, answer) % 250  # 255 becomes 5
        answers.append(answer)
        labels.append(truth)
        total += confusion_matrix(
            torch.from_numpy(answer), torch.from_numpy(truth.astype(np.uint8)), 9
        )
    expected = by_hand(answers, labels, 9)
    found = Quality.of(total)
    assert expected["classes"] == 6  # 5 is said and never true, 6 to 8 are neither
    assert int((~found.iou.isnan()).sum()) == 6
    assert int((~found.accuracy.isnan()).sum()) == 5
    assert float(found.iou.nanmean()) == pytest.approx(expected["miou"], rel=1e-12)
    assert float(found.accuracy.nanmean()) == pytest.approx(expected["mean_accuracy"], rel=1e-12)
    assert found.pixel_accuracy == pytest.approx(expected["pixel_accuracy"], rel=1e-12)
    assert found.pixels.tolist() == [
        sum(int((truth == number).sum()) for truth in labels) for number in range(9)
    ]


def test_rows_of_the_matrix_are_the_truth_and_columns_the_answer() -> None:
    matrix = confusion_matrix(torch.tensor([[0, 1, 1]]), torch.tensor([[0, 0, 255]]), 2)
    assert matrix.tolist() == [[1, 1], [0, 0]]


# ------------------------------------------------------------------------------------------------
# Windows


class Contextual(nn.Module):
    """Scores that depend on everything a window shows, and on where in it a pixel lies."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.kernel = torch.randn(classes, 3, 3, 3, generator=generator)

    def forward(self, windows: Tensor) -> Tensor:
        scores = F.conv2d(windows, self.kernel, padding=1)
        place = torch.linspace(0, 1, windows.shape[3])
        return scores + windows.mean((1, 2, 3), keepdim=True) + place


def one_by_one(image: Tensor, window: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """Every pixel the mean over all windows that hold it; windows as mmsegmentation places them."""
    model, (height, width) = Contextual(), image.shape[1:]
    sums = torch.zeros(3, height, width)
    counts = torch.zeros(height, width)
    rows = max(height - window[0] + stride[0] - 1, 0) // stride[0] + 1
    columns = max(width - window[1] + stride[1] - 1, 0) // stride[1] + 1
    for row in range(rows):
        for column in range(columns):
            bottom = min(row * stride[0] + window[0], height)
            right = min(column * stride[1] + window[1], width)
            top, left = max(bottom - window[0], 0), max(right - window[1], 0)
            seen = torch.zeros(1, 3, *window)
            seen[0, :, : bottom - top, : right - left] = image[:, top:bottom, left:right]
            scores = model(seen)[0]
            for y in range(top, bottom):
                for x in range(left, right):
                    sums[:, y, x] += scores[:, y - top, x - left]
                    counts[y, x] += 1
    assert counts.min() >= 1
    return sums / counts


@pytest.mark.parametrize(
    ("shape", "window", "stride"),
    [
        ((20, 31), (8, 12), (5, 7)),
        ((16, 24), (8, 12), (8, 12)),  # side by side
        ((9, 12), (8, 12), (5, 8)),
        ((5, 30), (8, 12), (5, 8)),  # lower than a window
        ((6, 7), (8, 12), (5, 8)),  # smaller than a window
        ((8, 12), (8, 12), (5, 8)),
    ],
)
@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_windows_cover_the_image_and_are_averaged_where_they_overlap(
    shape: tuple[int, int], window: tuple[int, int], stride: tuple[int, int], at_once: int
) -> None:
    image = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    found = window_scores(Contextual(), image, window=window, stride=stride, at_once=at_once)
    assert found.shape == (3, *shape)
    assert torch.allclose(found, one_by_one(image, window, stride), atol=1e-5)


@pytest.mark.parametrize("length", range(1, 70))
def test_windows_begin_where_mmsegmentation_lets_them(length: int) -> None:
    for window, stride in ((16, 16), (16, 11), (16, 1), (24, 17)):
        count = max(length - window + stride - 1, 0) // stride + 1
        ends = [min(number * stride + window, length) for number in range(count)]
        expected = [max(end - window, 0) for end in ends]
        assert window_starts(length, window, stride) == expected


def test_the_published_stride_of_a_window_of_512_is_341() -> None:
    assert int(MeanIoU().stride * 512) == 341


@pytest.mark.parametrize("size", [(40, 23), (7, 9), (3, 50), (11, 17), (1, 1)])
def test_rows_are_resized_as_interpolate_does(size: tuple[int, int]) -> None:
    scores = torch.randn(4, 11, 17, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(scores[None], size, mode="bilinear", align_corners=False)[0]
    rows = torch.arange(size[0])
    found = torch.cat([resized_rows(scores, part, size) for part in rows.split(3)], dim=1)
    assert torch.allclose(found, expected, atol=1e-5)


# ------------------------------------------------------------------------------------------------
# Whole pictures


@pytest.fixture
def model():
    recipe = cases.recipe()
    built = recipe.objective.build(recipe).model.eval()
    with torch.no_grad():
        built.decode_head.classifier.weight.mul_(300)  # else the answer is one class throughout
    return built


def probabilities(model, pixels: np.ndarray, ratio: float, *, mirrored: bool) -> Tensor:
    """(C, H, W) at the resolution of the picture, step by step."""
    height, width = pixels.shape[:2]
    new = fitted_size(height, width, side=32, ratio=ratio)
    resized = Image.fromarray(pixels).resize(new[::-1], Image.Resampling.BILINEAR)
    image = torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (cases.TOWER.mean, cases.TOWER.std))
    image = (image - mean) / std
    image = image.flip(2) if mirrored else image
    scores = window_scores(model, image, window=(32, 48), stride=(16, 24), at_once=1)
    scores = scores.flip(2) if mirrored else scores
    scores = F.interpolate(scores[None], (height, width), mode="bilinear", align_corners=False)
    return scores[0].softmax(0)


def view(pixels: np.ndarray, ratio: float) -> Tensor:
    new = fitted_size(*pixels.shape[:2], side=32, ratio=ratio)
    resized = Image.fromarray(pixels).resize(new[::-1], Image.Resampling.BILINEAR)
    return torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("scales", [(1.0,), (0.75, 1.0, 1.5)])
def test_scales_and_mirror_images_are_averaged_as_probabilities(model, scales, flip) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 41, 3)).astype(np.uint8)
    task = MeanIoU(stride=0.5, scales=scales, flip=flip)
    with torch.no_grad():
        found = segment(
            model, task, [view(pixels, ratio) for ratio in scales], (50, 41),
            device=torch.device("cpu"),
        )  # fmt: skip
        parts = [
            probabilities(model, pixels, ratio, mirrored=mirrored)
            for ratio in scales
            for mirrored in ((False, True) if flip else (False,))
        ]
    expected = torch.stack(parts).mean(0)
    assert len(found.unique()) > 2
    agree = found == expected.argmax(0)
    best = expected.sort(0, descending=True).values
    assert agree[(best[0] - best[1]) > 1e-5].all()
    assert agree.float().mean() > 0.99


def test_the_evaluation_counts_every_picture_at_its_own_resolution(model, tmp_path: Path) -> None:
    sizes = [(40, 64), (33, 32), (90, 47), (20, 100)]
    root = cases.write_folder(tmp_path / "data", sizes, split="validation")
    recipe = replace(cases.recipe())
    run = replace(cases.HERE, dir=tmp_path / "run")
    shown: dict[str, np.ndarray] = {}
    task = MeanIoU(data=root, stride=0.5)
    with torch.no_grad():
        numbers = task.evaluate(bundle_of(model, recipe), run, show=shown.__setitem__)
        answers, labels = [], []
        for place in range(4):
            pixels = np.asarray(Image.open(root / "images" / "validation" / f"{place:03d}.png"))
            mask = np.asarray(Image.open(root / "annotations" / "validation" / f"{place:03d}.png"))
            labels.append(np.where(mask == 0, 255, mask.astype(int) - 1))
            answers.append(probabilities(model, pixels, 1.0, mirrored=False).argmax(0).numpy())
    expected = by_hand(answers, labels, 7)
    for name, value in expected.items():
        assert numbers[f"segmentation_{name}"] == pytest.approx(value, abs=1e-3)
    assert numbers["segmentation_images"] == 4
    assert sorted(shown) == [f"segmentation/{place}" for place in range(4)]
    assert [picture.shape for picture in shown.values()] == [(3, h, 3 * w) for h, w in sizes]
    with (run.dir / "evaluation" / "segmentation_classes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == [str(number) for number in range(1, 8)]
    ious = [float(row["iou"]) for row in rows if row["iou"]]
    assert math.fsum(ious) / len(ious) == pytest.approx(numbers["segmentation_miou"], rel=1e-9)
    assert sum(int(row["pixels"]) for row in rows) == sum((part != 255).sum() for part in labels)


def test_numbers_do_not_depend_on_loader_processes_or_how_many_windows_are_seen_at_once(
    model, tmp_path: Path
) -> None:
    root = cases.write_folder(tmp_path / "data", [(40, 90), (64, 33)], split="validation")
    run = replace(cases.HERE, dir=tmp_path / "run")
    found = [
        MeanIoU(data=root, workers=workers, windows=windows).evaluate(
            bundle_of(model, cases.recipe()), run
        )
        for workers, windows in ((0, 8), (1, 8), (0, 1))
    ]
    assert found[0] == found[1]
    assert found[2] == pytest.approx(found[0], abs=1e-3)


def test_the_whole_picture_can_be_stretched_into_one_window(model, tmp_path: Path) -> None:
    root = cases.write_folder(tmp_path / "data", [(40, 90)], split="validation")
    run = replace(cases.HERE, dir=tmp_path / "run")
    numbers = MeanIoU(data=root, view="whole").evaluate(bundle_of(model, cases.recipe()), run)
    pixels = Image.open(root / "images" / "validation" / "000.png")
    small = np.asarray(pixels.resize((48, 32), Image.Resampling.BILINEAR)).copy()
    with torch.no_grad():
        scores = model(torch.from_numpy(small).permute(2, 0, 1)[None])
        scores = F.interpolate(scores, (40, 90), mode="bilinear", align_corners=False)
    mask = np.asarray(Image.open(root / "annotations" / "validation" / "000.png")).astype(int)
    labels = np.where(mask == 0, 255, mask - 1)
    expected = by_hand([scores[0].argmax(0).numpy()], [labels], 7)
    assert numbers["segmentation_miou"] == pytest.approx(expected["miou"], abs=1e-3)


def test_pictures_whose_scores_are_not_finite_are_counted_and_refused(tmp_path: Path) -> None:
    root = cases.write_folder(tmp_path / "data", [(40, 90), (32, 48), (64, 33)], split="validation")
    run = replace(cases.HERE, dir=tmp_path / "run")
    broken = cases.CONFIG.build(torch.Generator().manual_seed(0))
    seen = []

    def spoil(module: nn.Module, arguments: tuple, scores: Tensor) -> Tensor:
        del module, arguments
        seen.append(1)
        scores[:, 2, 0, 0] = math.inf if len(seen) == 1 else 0.0
        return scores

    broken.register_forward_hook(spoil)
    with pytest.raises(InputError, match="scores of 1 of 3 pictures are not finite"):
        MeanIoU(data=root).evaluate(bundle_of(broken, cases.recipe()), run)
    assert not (tmp_path / "run").exists()


def test_an_evaluation_without_data_is_skipped(model) -> None:
    assert MeanIoU().evaluate(bundle_of(model, cases.recipe()), cases.HERE) == {}


# ------------------------------------------------------------------------------------------------
# What is refused


def test_data_that_cannot_be_measured_is_refused(model, tmp_path: Path) -> None:
    recipe, run = cases.recipe(), replace(cases.HERE, dir=tmp_path / "run")
    with pytest.raises(InputError, match="does not exist; check the path"):
        MeanIoU(data=tmp_path / "no").folder()
    root = cases.write_folder(tmp_path / "data", [(16, 16)] * 2, split="validation")
    with pytest.raises(InputError, match=r"no folder .*testing"):
        MeanIoU(data=root, split="testing").folder()
    masks = root / "annotations" / "validation"
    original = (masks / "001.png").read_bytes()
    for pixels, words in (
        (np.zeros((16, 15), np.uint8), "16 pixels high and 15 wide"),
        (np.full((16, 16), 9, np.uint8), "holds the number 9"),
    ):
        Image.fromarray(pixels).save(masks / "001.png")
        with pytest.raises(InputError, match=words):
            MeanIoU(data=root).evaluate(bundle_of(model, recipe), run)
    Image.fromarray(np.zeros((16, 15), np.uint8)).save(masks / "001.png")
    with pytest.raises(InputError, match="16 pixels high and 15 wide"):
        MeanIoU(data=root).folder()  # before training
    (masks / "001.png").write_bytes(original[:30])
    with pytest.raises(InputError, match=r"001\.png cannot be evaluated \(image: the mask"):
        MeanIoU(data=root).evaluate(bundle_of(model, recipe), run)
    for name in ("000", "001"):
        Image.fromarray(np.zeros((16, 16), np.uint8)).save(masks / f"{name}.png")
    with pytest.raises(InputError, match=r"no pixel .* has a class"):
        MeanIoU(data=root).evaluate(bundle_of(model, recipe), run)
    (masks / "000.png").unlink()
    with pytest.raises(InputError, match=r"1 of the 2 pictures .* have no mask"):
        MeanIoU(data=root).folder()


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("name of an evaluation", {"name": "mean iou"}),
        ("stride", {"stride": 0.0}),
        ("scales", {"scales": ()}),
        ("view=whole has one size", {"view": "whole", "scales": (0.5, 1.0)}),
        ("windows", {"windows": 0}),
        ("workers", {"workers": -1}),
    ],
)
def test_measures_that_cannot_be_are_refused(words: str, options: dict) -> None:
    with pytest.raises(InputError, match=words):
        MeanIoU(**options)
