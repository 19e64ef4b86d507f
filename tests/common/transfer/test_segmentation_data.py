"""Pictures with masks: which crops are trained on, and what is refused."""

import io
import math
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import segment_cases as cases
import torch
from PIL import Image

from frugal.common.data.contents import check_contents, note_contents
from frugal.common.data.damage import Damaged
from frugal.common.errors import InputError
from frugal.common.randomness import sample_generator
from frugal.common.transfer.masked_folder import IGNORED, PADDING, class_names, open_masked_folder
from frugal.common.transfer.segmentation_data import (
    ScaledCrop,
    SegmentationData,
    fitted_size,
    open_folders,
    part_of,
)

EXTENSIONS = ("jpg", "png")


def opened(root: Path, split: str = "training"):
    return open_masked_folder(root, split, EXTENSIONS)


def stream(folder: Path, *, first_sample: int = 0, seed: int = 0, rank: int = 0, world: int = 1):
    recipe = cases.recipe(folder=folder)
    recipe = replace(recipe, run=replace(recipe.run, seed=seed))
    run = replace(cases.HERE, rank=rank, world_size=world)
    return recipe.data.build(recipe, run, first_sample=first_sample, state={}, engine=None)


def batches(folder: Path, count: int, **options) -> list:
    found = iter(stream(folder, **options))
    return [next(found) for _ in range(count)]


# ------------------------------------------------------------------------------------------------
# Masks


@pytest.mark.parametrize("kind", ["bytes", "palette", "sixteen bits"])
def test_a_mask_of_any_kind_becomes_classes_from_zero_on(tmp_path: Path, kind: str) -> None:
    numbers = np.array([[0, 1, 2], [7, 255, 3]], np.uint8)
    cases.write_pair(tmp_path, "a", np.zeros((2, 3, 3), np.uint8), numbers)
    mask = Image.fromarray(numbers)
    if kind == "palette":
        mask.putpalette(list(range(256)) * 3)
    if kind == "sixteen bits":
        mask = Image.fromarray(numbers.astype(np.uint16))
    mask.save(tmp_path / "annotations" / "training" / "a.png")
    image, labels = opened(tmp_path).read(0, 7)
    assert (image.height, image.width) == (2, 3)
    assert labels.tolist() == [[IGNORED, 0, 1], [6, IGNORED, 2]]


def test_pictures_in_folders_of_their_own_find_their_masks(tmp_path: Path) -> None:
    for name in ("b/room", "a/street.north"):
        cases.write_folder(tmp_path, [(8, 8)])
        cases.write_pair(
            tmp_path, name, np.zeros((4, 5, 3), np.uint8), np.ones((4, 5), np.uint8), suffix="jpg"
        )
    folder = opened(tmp_path)
    names = [folder.names[index] for index in range(len(folder))]
    assert names == ["000.png", "a/street.north.jpg", "b/room.jpg"]
    assert folder.read(1, 1)[1].shape == (4, 5)


def test_names_of_classes_come_from_scenes_and_from_ade20k(tmp_path: Path) -> None:
    assert class_names(tmp_path, 2) == ["class 1", "class 2"]
    header = "Idx\tRatio\tTrain\tVal\tStuff\tName\n"
    listed = tmp_path / "objectInfo150.txt"
    listed.write_text(header + "1\t0.1\t5\t5\t1\twall\n2\t0.1\t5\t5\t1\tbuilding, edifice\n")
    assert class_names(tmp_path, 2) == ["wall", "building, edifice"]
    inside = tmp_path / "segmentation"
    inside.mkdir()
    (inside / "classnames.txt").write_text("background\nred circle\nred square\n")
    assert class_names(tmp_path, 3)[1] == "red circle"
    (inside / "classnames.txt").write_bytes("\ufeffbackground\r\nred circle\r\n\r\n".encode())
    assert class_names(tmp_path, 2) == ["background", "red circle"]
    (inside / "classnames.txt").write_text("background\n\nred square\n")
    with pytest.raises(InputError, match="has no name for class 2"):
        class_names(tmp_path, 3)
    (inside / "classnames.txt").write_text("background\nred circle\nred square\n")
    with pytest.raises(InputError, match=r"names 3 classes, but .* model.num_classes = 150"):
        class_names(tmp_path, 150)


# ------------------------------------------------------------------------------------------------
# What is refused


def test_missing_masks_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    cases.write_folder(tmp_path, [(8, 8)] * 5)
    for number in (1, 3):
        (tmp_path / "annotations" / "training" / f"00{number}.png").unlink()
    with pytest.raises(InputError, match=r"^2 of the 5 pictures .* no mask: .*001\.png; copy"):
        opened(tmp_path)


def test_folders_of_another_layout_are_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(InputError, match=r"not laid out as ADE20K, there is no folder .*training"):
        opened(tmp_path)
    (tmp_path / "images" / "training").mkdir()
    with pytest.raises(InputError, match=r"no folder .*annotations/training; images/training must"):
        opened(tmp_path)
    (tmp_path / "annotations" / "training").mkdir(parents=True)
    with pytest.raises(InputError, match=r"holds no picture \(jpg, png\)"):
        opened(tmp_path)


def test_a_mask_of_another_size_is_refused_before_training(tmp_path: Path) -> None:
    cases.write_folder(tmp_path, [(8, 8)] * 3)
    small = np.zeros((8, 7), np.uint8)
    Image.fromarray(small).save(tmp_path / "annotations" / "training" / "001.png")
    words = r"001\.png is 8 pixels high and 7 wide, but its picture .*001\.png is 8 high and 8 wide"
    with pytest.raises(InputError, match=words):
        stream(tmp_path)


def test_a_class_beyond_the_models_is_refused_before_training(tmp_path: Path) -> None:
    cases.write_folder(tmp_path, [(8, 8)] * 3)
    wrong = np.full((8, 8), 8, np.uint8)
    Image.fromarray(wrong).save(tmp_path / "annotations" / "training" / "002.png")
    with pytest.raises(InputError, match=r"002\.png holds the number 8, but a mask for 7 classes"):
        stream(tmp_path)


def test_a_picture_in_colors_is_no_mask(tmp_path: Path) -> None:
    cases.write_folder(tmp_path, [(8, 8)])
    colored = np.zeros((8, 8, 3), np.uint8)
    Image.fromarray(colored).save(tmp_path / "annotations" / "training" / "000.png")
    with pytest.raises(InputError, match=r"000\.png is a picture in colors; a mask holds"):
        stream(tmp_path)


def test_data_that_is_not_named_or_named_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.train is empty"):
        open_folders(SegmentationData(train=()), num_classes=7)
    root = str(cases.write_folder(tmp_path, [(8, 8)]))
    with pytest.raises(InputError, match="more than once"):
        open_folders(SegmentationData(train=(root, root)), num_classes=7)
    with pytest.raises(InputError, match="not laid out as ADE20K"):
        open_folders(SegmentationData(train=(root, str(tmp_path / "no"))), num_classes=7)


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("scale", {"scale": (0.0, 1.0)}),
        ("scale", {"scale": (2.0, 1.0)}),
        ("largest_share", {"largest_share": 0.0}),
        ("tries", {"tries": -1}),
        ("flip", {"flip": 1.5}),
    ],
)
def test_crops_that_cannot_be_are_refused(words: str, options: dict) -> None:
    with pytest.raises(InputError, match=f"data.augmentation.{words}"):
        ScaledCrop(**options)


# ------------------------------------------------------------------------------------------------
# Crops


@pytest.mark.parametrize(
    ("height", "width", "ratio", "expected"),
    [
        (512, 683, 1.0, (512, 683)),  # the shorter side decides
        (1200, 1600, 0.5, (256, 341)),
        (300, 3000, 1.0, (205, 2048)),  # the longer side decides
        (3000, 300, 1.0, (2048, 205)),
        (480, 640, 1.999, (1023, 1364)),
    ],
)
def test_pictures_are_resized_as_mmsegmentation_does(height, width, ratio, expected) -> None:
    longest, shortest = int(2048 * ratio), int(512 * ratio)
    scale = min(longest / max(height, width), shortest / min(height, width))
    assert (int(height * scale + 0.5), int(width * scale + 0.5)) == expected
    assert fitted_size(height, width, side=512, ratio=ratio) == expected


def decoded(pixels: np.ndarray) -> Image.Image:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return Image.open(io.BytesIO(buffer.getvalue()))


@pytest.mark.parametrize("shape", [(40, 70), (90, 33), (20, 20)])
def test_a_crop_is_cut_out_of_the_resized_picture_and_its_mask(shape: tuple[int, int]) -> None:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (*shape, 3)).astype(np.uint8)
    labels = generator.integers(0, 5, shape).astype(np.uint8)
    size = (24, 32)
    for number in range(20):
        crop = ScaledCrop()
        draws = sample_generator(0, "crop", number)
        cut, mirrored = crop.draw(labels, size=size, generator=draws)
        found, found_labels = crop.apply(
            decoded(pixels), labels, size=size, generator=sample_generator(0, "crop", number)
        )
        height, width = cut.resized
        whole = np.asarray(
            Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
        ).transpose(2, 0, 1)
        centers = [
            [math.floor(Fraction(2 * place + 1, 2) * old / new) for place in range(new)]
            for old, new in zip(shape, (height, width), strict=True)
        ]
        whole_labels = labels[np.ix_(*centers)]
        rows, columns = slice(cut.top, cut.top + 24), slice(cut.left, cut.left + 32)
        expected, expected_labels = whole[:, rows, columns], whole_labels[rows, columns]
        assert expected_labels.shape == (min(24, height), min(32, width))
        if mirrored:
            expected, expected_labels = expected[:, :, ::-1], expected_labels[:, ::-1]
        bottom, right = expected_labels.shape
        inside = found[:, :bottom, :right].astype(int)
        assert np.abs(inside - expected).max() <= 1
        assert np.array_equal(found_labels[:bottom, :right], expected_labels)
        beyond = found_labels.copy()
        beyond[:bottom, :right] = PADDING
        assert (beyond == PADDING).all()


def test_scales_places_and_mirroring_are_drawn_over_their_whole_range() -> None:
    labels = np.tile(np.arange(4, dtype=np.uint8), (64, 16))
    drawn = [
        ScaledCrop().draw(labels, size=(32, 32), generator=sample_generator(0, "crop", number))
        for number in range(400)
    ]
    sides = np.array([cut.resized[0] for cut, _ in drawn])
    assert sides.min() < 18 < 60 < sides.max() <= 64
    assert abs(sides.mean() - 40) < 2.5  # five standard errors of a uniform number
    assert 150 < sum(mirrored for _, mirrored in drawn) < 250
    free = [(cut.top, cut.resized[0] - 32) for cut, _ in drawn if cut.resized[0] > 40]
    shares = np.array([top / room for top, room in free])
    assert shares.min() == 0
    assert shares.max() == 1
    assert abs(shares.mean() - 0.5) < 0.1
    assert all(cut.top == 0 and cut.height == cut.resized[0] for cut, _ in drawn
               if cut.resized[0] < 32)  # fmt: skip


def test_crops_with_too_much_of_one_class_are_drawn_again() -> None:
    labels = np.zeros((100, 100), np.uint8)
    labels[:20, :20] = 1
    labels[50:, :] = IGNORED

    def shares(crop: ScaledCrop) -> list[float]:
        found = []
        for number in range(200):
            cut, _ = crop.draw(labels, size=(20, 20), generator=sample_generator(0, "crop", number))
            known = cut.labels(labels)
            known = known[known != IGNORED]
            found.append(np.bincount(known).max() / len(known) if len(known) else np.nan)
        return found

    loose = shares(ScaledCrop(scale=(5.0, 5.0), tries=0))
    strict = shares(ScaledCrop(scale=(5.0, 5.0), tries=300))
    few = shares(ScaledCrop(scale=(5.0, 5.0), tries=10))
    assert np.isnan(loose).any()  # nothing but ignored pixels
    assert max(strict) <= 0.75
    assert np.mean(np.array(loose) <= 0.75) < np.mean(np.array(few) <= 0.75) < 1
    every = shares(ScaledCrop(scale=(5.0, 5.0), largest_share=1.0, tries=300))
    assert max(every) == 1
    assert not np.isnan(every).any()


# ------------------------------------------------------------------------------------------------
# The stream


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = [(40 + 3 * n, 64 - 2 * n) for n in range(10)]
    return cases.write_folder(tmp_path_factory.mktemp("pictures"), sizes)


def test_every_picture_comes_once_an_epoch_and_in_another_order_the_next(folder: Path) -> None:
    found = batches(folder, 5)  # twenty samples of ten pictures
    keys = [key for batch in found for key in batch.keys]
    assert Counter(keys[:10]) == Counter(keys[10:]) == Counter(set(keys))
    assert keys[:10] != keys[10:]
    assert stream(folder).epoch_samples == 10
    for batch in found:
        assert batch.images.shape == (4, 3, 32, 48) and batch.images.dtype == torch.uint8
        assert batch.labels.shape == (4, 32, 48) and batch.labels.dtype == torch.uint8
        assert batch.valid.all()


def test_a_sample_is_the_same_from_any_start_and_on_any_number_of_processes(folder: Path) -> None:
    whole = batches(folder, 3)
    later = batches(folder, 2, first_sample=4)
    for one, other in zip(whole[1:], later, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
    parts = [batches(folder, 3, rank=rank, world=2) for rank in range(2)]
    for number, batch in enumerate(whole):
        for name in ("images", "labels", "sample_numbers"):
            both = torch.cat([getattr(part[number], name) for part in parts])
            assert torch.equal(getattr(batch, name), both)


def test_the_same_picture_is_cut_differently_in_another_epoch_and_with_another_seed(
    folder: Path,
) -> None:
    def by_key(found: list) -> dict[str, list[torch.Tensor]]:
        crops: dict[str, list[torch.Tensor]] = {}
        for batch in found:
            for key, labels in zip(batch.keys, batch.labels, strict=True):
                crops.setdefault(key, []).append(labels)
        return crops

    first = by_key(batches(folder, 5))
    assert all(not torch.equal(*crops) for crops in first.values())
    other = by_key(batches(folder, 5, seed=1))
    assert all(not torch.equal(crops[0], other[key][0]) for key, crops in first.items())


def test_labels_stay_with_the_pixels_they_belong_to(tmp_path: Path) -> None:
    """Gray levels that are ten times the number in the mask say where a pixel came from."""
    generator = np.random.default_rng(0)
    numbers = generator.integers(1, 8, (2, 3)).repeat(48, 0).repeat(48, 1).astype(np.uint8)
    cases.write_pair(tmp_path, "a", np.stack([numbers * 10] * 3, axis=-1), numbers)
    for batch in batches(tmp_path, 5):
        for image, labels in zip(batch.images, batch.labels, strict=True):
            inside = labels != PADDING
            levels = image[0][inside].float()
            right = (levels / 10 - 1).round() == labels[inside]
            assert right.float().mean() > 0.8  # the rest lies on borders, which are blurred
            assert not image[0][~inside].any()


def test_pictures_and_masks_that_cannot_be_decoded_are_counted(tmp_path: Path) -> None:
    root = cases.write_folder(tmp_path, [(32, 48)] * 8, suffix="jpg")
    image = root / "images" / "training" / "001.jpg"
    image.write_bytes(image.read_bytes()[:200])
    mask = root / "annotations" / "training" / "002.png"
    mask.write_bytes(mask.read_bytes()[:40])
    (root / "images" / "training" / "003.jpg").write_text("no picture")
    found = batches(root, 2)
    assert Counter(found[0].damage) + Counter(found[1].damage) == Counter({"image": 3})
    for batch in found:
        for key, valid, labels in zip(batch.keys, batch.valid, batch.labels, strict=True):
            assert valid == (Path(key).stem not in ("001", "002", "003"))
            assert valid or (labels == IGNORED).all()


def test_a_mask_that_does_not_fit_is_damage_where_nobody_looked_before(tmp_path: Path) -> None:
    root = cases.write_folder(tmp_path, [(32, 48)] * 3)
    folder = opened(root)
    wrong = np.full((32, 48), 9, np.uint8)
    Image.fromarray(wrong).save(root / "annotations" / "training" / "001.png")
    with pytest.raises(Damaged) as caught:
        folder.read(1, 7)
    assert caught.value.kind == "label"


def test_folders_are_mixed_and_scenes_are_found_in_theirs(tmp_path: Path) -> None:
    first = cases.write_folder(tmp_path / "first", [(32, 48)] * 6)
    second = tmp_path / "scenes"
    cases.write_folder(second / "segmentation", [(32, 48)] * 6)
    recipe = cases.recipe()
    recipe = replace(recipe, data=replace(recipe.data, train=(str(first), str(second))))
    found = recipe.data.build(recipe, cases.HERE, first_sample=0, state={}, engine=None)
    batch = next(iter(found))
    assert found.epoch_samples == 12
    keys = [key for _, part in zip(range(3), found, strict=False) for key in part.keys]
    assert len(set(keys)) == 12
    of_first = [str(first) in key for key in keys[:6]]
    assert any(of_first)
    assert not all(of_first)
    assert batch.keys == keys[:4]


def test_pictures_that_changed_behind_a_run_are_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    for name in ("a", "b"):
        cases.write_pair(folder, name, np.zeros((9, 9, 3), np.uint8), np.ones((9, 9), np.uint8))
    run = replace(cases.HERE, dir=tmp_path / "run")
    note_contents(run, stream(folder).contents, {})
    check_contents(run, stream(folder).contents, told=None, allowed=False)
    cases.write_pair(folder, "c", np.zeros((9, 9, 3), np.uint8), np.ones((9, 9), np.uint8))
    with pytest.raises(InputError, match="had 2 samples and has 3"):
        check_contents(run, stream(folder).contents, told=None, allowed=False)


@pytest.mark.parametrize("kind", ["images", "annotations"])
def test_a_picture_or_mask_that_was_replaced_behind_a_run_is_noticed(
    tmp_path: Path, kind: str
) -> None:
    folder = cases.write_folder(tmp_path / "data", [(16, 16)] * 3)
    run = replace(cases.HERE, dir=tmp_path / "run")
    note_contents(run, stream(folder).contents, {})
    moved = folder.rename(tmp_path / "elsewhere")
    check_contents(run, stream(moved).contents, told=None, allowed=False)
    other = cases.write_folder(tmp_path / "other", [(16, 8)])
    for part in ("images", "annotations"):
        before, now = (root / part / "training" / "000.png" for root in (moved, other))
        assert before.stat().st_size != now.stat().st_size
        if part == kind:
            before.write_bytes(now.read_bytes())
    other = [[part_of(opened(moved))]]
    with pytest.raises(InputError, match="holds other images"):
        check_contents(run, other, told=None, allowed=False)
