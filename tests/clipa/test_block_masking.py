"""Block masking: one rectangle of patches."""

import math

import pytest
import torch

from frugal.clipa.block_masking import BlockMasking
from frugal.common.errors import InputError
from frugal.common.randomness import RecordedNoise, SampleNoise
from frugal.common.reduction.image import PatchView

CASES = [
    # rows, columns, ratio, rows kept, columns kept
    (14, 14, 0.75, 7, 7),
    (16, 16, 0.5, 11, 11),
    (4, 8, 0.75, 2, 4),
    (9, 3, 0.75, 4, 2),  # halves round to even
    (7, 5, 0.9, 2, 2),
    (3, 3, 0.99, 1, 1),
    (1, 6, 0.75, 1, 3),
]


def view(rows: int, columns: int, count: int = 5) -> PatchView:
    return PatchView(torch.zeros(count, 3, 2 * rows, 2 * columns, dtype=torch.uint8), 2)


def keep(rows: int, columns: int, ratio: float, count: int):
    noise = SampleNoise(0, torch.arange(count))
    return BlockMasking(mask_ratio=ratio).keep(view(rows, columns, count), noise=noise)


@pytest.mark.parametrize(("rows", "columns", "ratio", "height", "width"), CASES)
def test_what_stays_is_one_rectangle_row_by_row(rows, columns, ratio, height, width):
    kept = keep(rows, columns, ratio, 40)
    assert kept.index.shape == (40, height * width) and not kept.is_packed
    for index in kept.index.tolist():
        top, left = divmod(index[0], columns)
        assert top + height <= rows and left + width <= columns
        assert index == [
            (top + r) * columns + left + c for r in range(height) for c in range(width)
        ]


@pytest.mark.parametrize(("rows", "columns", "ratio"), [(4, 8, 0.75), (5, 3, 0.6), (6, 6, 0.5)])
def test_every_place_is_equally_likely(rows, columns, ratio):
    count = 8000
    height, width = BlockMasking(mask_ratio=ratio).sides((rows, columns))
    kept = keep(rows, columns, ratio, count)
    corners = kept.index[:, 0].bincount(minlength=rows * columns).double() / count
    places = (rows - height + 1) * (columns - width + 1)
    possible = torch.zeros(rows, columns, dtype=torch.bool)
    possible[: rows - height + 1, : columns - width + 1] = True
    assert torch.all(corners[~possible.flatten()] == 0)
    off = (corners[possible.flatten()] - 1 / places).abs()
    assert torch.all(off < 5 * (1 / places / count) ** 0.5)


def test_noise_just_below_one_picks_the_last_place():
    noise = RecordedNoise({"image mask": torch.full((1, 2), 1 - 2**-24)})
    for rows, columns in ((4, 6), (15, 13), (30, 20)):
        kept = BlockMasking().keep(view(rows, columns, 1), noise=noise)
        assert kept.index[0, -1] == rows * columns - 1


def test_the_mask_of_a_sample_does_not_depend_on_its_batch():
    masking = BlockMasking()
    whole = masking.keep(view(4, 6, 6), noise=SampleNoise(3, torch.arange(100, 106)))
    part = masking.keep(view(4, 6, 2), noise=SampleNoise(3, torch.tensor([104, 101])))
    assert torch.equal(part.index, whole.index[[4, 1]])


def test_a_ratio_of_zero_keeps_everything():
    assert keep(4, 6, 0.0, 2) is None


@pytest.mark.parametrize("ratio", [1.0, 1.5, -0.1, math.nan])
def test_a_ratio_outside_of_zero_to_one_is_refused(ratio):
    with pytest.raises(InputError, match=r"must lie in \[0, 1\)"):
        BlockMasking(mask_ratio=ratio)
