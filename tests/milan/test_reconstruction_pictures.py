"""What tensorboard shows of a batch lies where it belongs."""

import matplotlib as mpl
import numpy as np
import pytest
import torch

from frugal.milan.decoders import Split
from frugal.milan.model import encoder
from frugal.milan.pictures import draw_reconstruction

TOWER = encoder("S/16", image_size=(32, 48), width=16, depth=1, heads=1, mlp_width=16)  # 2 x 3
SPLIT = Split(torch.tensor([[4, 1], [0, 5]]), torch.tensor([[0, 2, 3, 5], [1, 2, 3, 4]]))
LABEL, GAP, TIMES = 18, 3, 3
HEIGHT, WIDTH = 32 * TIMES, 48 * TIMES


def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, 32, 48), generator=generator, dtype=torch.uint8)


def cell(picture: np.ndarray, row: int, image: int) -> np.ndarray:
    """One image of one row of the picture."""
    top = row * (LABEL + HEIGHT) + LABEL
    left = image * (WIDTH + GAP)
    return picture[:, top : top + HEIGHT, left : left + WIDTH]


def patches(area: np.ndarray) -> list[list[int]]:
    """The one color of every patch, row by row."""
    side = 16 * TIMES
    found = []
    for row in range(2):
        for column in range(3):
            patch = area[:, row * side : (row + 1) * side, column * side : (column + 1) * side]
            assert (patch == patch[:, :1, :1]).all()
            found.append(patch[:, 0, 0].tolist())
    return found


def colors(values: list[float]) -> list[list[int]]:
    return (np.array(mpl.colormaps["viridis"](values))[:, :3] * 255).round().astype(int).tolist()


def test_importance_and_cosines_stand_at_their_patches():
    importance = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5, 0.25], [0.6, 0.5, 0.4, 0.3, 0.2, 0.1]])
    cosine = torch.tensor([[0.0, 0.1, 0.2, 0.3, 0.4, 0.5], [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]])
    patchwise = 2 - 2 * cosine
    losses = torch.cat(
        (torch.tensor([[9.0], [9.0]]), patchwise.gather(1, SPLIT.order[:, 1:] - 1)), 1
    )
    picture = draw_reconstruction(
        images(), TOWER, SPLIT, importance=importance, losses=losses, hidden_only=False
    )
    assert picture.shape == (3, 4 * (LABEL + HEIGHT), 2 * WIDTH + GAP) and picture.dtype == np.uint8
    for image in range(2):
        shares = (importance[image] / importance[image].max()).tolist()
        assert patches(cell(picture, 2, image)) == colors(shares)
        assert patches(cell(picture, 3, image)) == colors(cosine[image].tolist())
        whole, seen = (cell(picture, row, image) for row in (0, 1))
        expected = images()[image].numpy().repeat(TIMES, 1).repeat(TIMES, 2)
        assert np.array_equal(whole, expected)
        side = 16 * TIMES
        for patch in range(6):
            row, column = divmod(patch, 3)
            area = (
                slice(None), slice(row * side, (row + 1) * side),
                slice(column * side, (column + 1) * side),
            )  # fmt: skip
            same = np.array_equal(seen[area], whole[area])
            assert same == (patch in SPLIT.visible[image].tolist())


@pytest.mark.parametrize("normalized", [False, True])
def test_errors_of_hidden_patches_stand_at_theirs(normalized):
    losses = torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]])
    given = images()
    if normalized:
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (TOWER.mean, TOWER.std))
        given = (given / 255 - mean) / std
    picture = draw_reconstruction(
        given, TOWER, SPLIT, importance=None, losses=losses, hidden_only=True
    )
    assert picture.shape[1] == 3 * (LABEL + HEIGHT)
    assert patches(cell(picture, 2, 0)) == colors([0.25, 0.0, 0.5, 0.75, 0.0, 1.0])
    assert patches(cell(picture, 2, 1)) == colors([0.0, 1.0, 0.75, 0.5, 0.25, 0.0])
    expected = images()[0].numpy().repeat(TIMES, 1).repeat(TIMES, 2)
    assert np.array_equal(cell(picture, 0, 0), expected)
