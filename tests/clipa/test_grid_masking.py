"""Grid masking: one patch of every window."""

import math

import pytest
import torch

from frugal.clipa.grid_masking import GridMasking
from frugal.common.errors import InputError
from frugal.common.models.clip import DualEncoderConfig
from frugal.common.models.text import TextTower
from frugal.common.models.vit import ImageTower
from frugal.common.randomness import RecordedNoise, SampleNoise
from frugal.common.reduction.image import PatchView

GRIDS = [(14, 14), (4, 8), (7, 7), (5, 3), (2, 9), (1, 4), (1, 1)]


def view(rows: int, columns: int, count: int = 5) -> PatchView:
    return PatchView(torch.zeros(count, 3, 2 * rows, 2 * columns, dtype=torch.uint8), 2)


def sample_noise(count: int = 5) -> SampleNoise:
    return SampleNoise(0, torch.arange(count))


def windows_of(index: torch.Tensor, columns: int, window: int) -> torch.Tensor:
    row, column = index // columns, index % columns
    return (row // window) * math.ceil(columns / window) + column // window


@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize(("rows", "columns"), GRIDS)
def test_every_window_keeps_one_patch_windows_row_by_row(rows, columns, window):
    kept = GridMasking(window=window).keep(view(rows, columns), noise=sample_noise())
    count = math.ceil(rows / window) * math.ceil(columns / window)
    assert kept.index.shape == (5, count) and not kept.is_packed
    assert kept.index.min() >= 0 and kept.index.max() < rows * columns
    assert torch.equal(
        windows_of(kept.index, columns, window), torch.arange(count).expand(5, count)
    )


@pytest.mark.parametrize(("rows", "columns", "window"), [(4, 6, 2), (5, 3, 2), (4, 5, 3)])
def test_every_patch_of_a_window_is_equally_likely(rows, columns, window):
    count = 6000
    kept = GridMasking(window=window).keep(view(rows, columns, count), noise=sample_noise(count))
    share = kept.mask(rows * columns).double().mean(0)
    windows = windows_of(torch.arange(rows * columns), columns, window)
    expected = 1 / windows.bincount()[windows].double()
    assert torch.all((share - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt())


def test_windows_are_drawn_independently():
    count = 6000
    kept = GridMasking().keep(view(2, 4, count), noise=sample_noise(count))
    left, right = kept.index[:, 0] == 0, kept.index[:, 1] == 2  # the top left patch of each window
    assert abs((left & right).double().mean().item() - 1 / 16) < 5 * (15 / 256 / count) ** 0.5


def test_noise_just_below_one_picks_the_last_patch_of_a_window():
    largest = torch.tensor(1 - 2**-24)
    for window in (2, 3, 5, 7):
        noise = RecordedNoise({"image mask": largest.expand(1, 1)})
        kept = GridMasking(window=window).keep(view(window, window, 1), noise=noise)
        assert kept.index.tolist() == [[window * window - 1]]


def test_the_mask_of_a_sample_does_not_depend_on_its_batch():
    whole = GridMasking().keep(view(4, 6, 6), noise=SampleNoise(3, torch.arange(100, 106)))
    part = GridMasking().keep(view(4, 6, 2), noise=SampleNoise(3, torch.tensor([104, 101])))
    assert torch.equal(part.index, whole.index[[4, 1]])


def test_the_tower_sees_what_is_kept_and_the_class_token():
    config = DualEncoderConfig(
        image=ImageTower(
            width=16, depth=2, heads=2, mlp_width=16, patch_size=2, image_size=(6, 10)
        ),
        text=TextTower(width=16, depth=1, heads=2, mlp_width=16, vocabulary=9, length=4),
        embed_dim=8,
    )
    tower = config.build().image.eval()
    images = torch.randint(0, 256, (3, 3, 6, 10), dtype=torch.uint8)
    kept = GridMasking().keep(PatchView(images, 2), noise=sample_noise(3))
    assert tower.forward_tokens(images, kept).shape == (3, 1 + 2 * 3, 16)
    order = torch.arange(5, -1, -1)
    shuffled = type(kept).dense(kept.index[:, order])
    torch.testing.assert_close(tower(images, shuffled), tower(images, kept))


@pytest.mark.parametrize("window", [1, 0, -2])
def test_a_window_that_drops_nothing_is_refused(window):
    with pytest.raises(InputError, match=f"window is {window}, must be at least 2"):
        GridMasking(window=window)
