"""Pictures of masks and predictions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from frugal.common.evaluation.pictures import draw_predictions, gray_dropped, tile
from frugal.common.reduction.image import KeptPatches


def noise(count: int, height: int, width: int) -> np.ndarray:
    generator = np.random.default_rng(count)
    return generator.integers(0, 256, (count, 3, height, width), dtype=np.uint8)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_kept_patches_stay_and_dropped_ones_turn_gray(as_tensor: bool) -> None:
    images = noise(3, 8, 12)  # 2 x 3 patches of 4
    mask = np.zeros((3, 6), bool)
    mask[0, [0, 5]] = mask[1, 2] = mask[2, 3] = True
    given = (torch.from_numpy(images), torch.from_numpy(mask)) if as_tensor else (images, mask)
    seen = gray_dropped(*given, 4)
    assert seen.dtype == np.uint8
    for image, kept, picture in zip(images, mask, seen, strict=True):
        for patch in range(6):
            top, left = patch // 3 * 4, patch % 3 * 4
            where = np.s_[:, top : top + 4, left : left + 4]
            if kept[patch]:
                assert (picture[where] == image[where]).all()
            else:
                assert (picture[where] == picture[where][:1]).all()  # no color left
                assert (np.abs(picture[where].astype(int) - 137) < 45).all()


@pytest.mark.parametrize("level", [0, 128, 255])
def test_a_dropped_patch_shows_on_any_flat_background(level: int) -> None:
    images = np.full((1, 3, 8, 8), level, np.uint8)
    seen = gray_dropped(images, np.array([[True, False, False, True]]), 4)
    assert seen[0, :, :4, 4:].std() > 5


def test_a_packed_mask_is_drawn_like_any_other() -> None:
    images = torch.from_numpy(noise(2, 4, 6))
    kept = KeptPatches.packed(torch.tensor([5, 0, 1]), torch.tensor([1, 2]))
    seen = gray_dropped(images, kept.mask(6), 2)
    assert (seen[0, :, 2:, 4:] == images[0, :, 2:, 4:].numpy()).all()
    assert (seen[1, :, :2, :4] == images[1, :, :2, :4].numpy()).all()


def test_patches_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="patches of 3 do not tile images of 8x12"):
        gray_dropped(noise(1, 8, 12), np.ones((1, 6)), 3)
    with pytest.raises(ValueError, match=r"has shape \(1, 6\), not \(1, 5\)"):
        gray_dropped(noise(1, 8, 12), np.ones((1, 5)), 4)


@pytest.mark.parametrize(("count", "columns"), [(1, None), (5, None), (5, 4), (3, 7)])
def test_every_image_is_on_the_sheet(count: int, columns: int | None) -> None:
    images = noise(count, 5, 9)
    sheet = tile(images, columns=columns)
    found = [
        any(
            (sheet[:, top : top + 5, left : left + 9] == image).all()
            for top in range(0, sheet.shape[1], 8)
            for left in range(0, sheet.shape[2], 12)
        )
        for image in images
    ]
    assert all(found)
    masked = gray_dropped(images[:, :, :4, :8], np.ones((count, 8), bool), 2)
    masked = tile(masked, columns=columns)
    assert masked.dtype == np.uint8
    assert masked.shape[0] == 3


def test_predictions_are_written_below_their_images() -> None:
    images = np.full((3, 3, 8, 16), 200, np.uint8)
    words = ["a red circle", "a very long caption " * 30, ""]
    sheet = draw_predictions(images, words, [True, False, True], columns=3, side=96)
    below = sheet[:, 50:, :]
    right, wrong, empty = below[..., :96], below[..., 99:195], below[..., 198:]
    assert right[1].min() > right[0].min()  # green ink
    assert wrong[0].min() > wrong[1].min()  # red ink
    assert (empty == empty[:, :1, :1]).all()  # no ink
    assert draw_predictions(images, words).shape[0] == 3
