"""Pictures of clusters."""

import numpy as np
import torch

from frugal.cluster_masking.masking import ClusterMasking
from frugal.cluster_masking.pictures import mark_patches
from frugal.common.randomness import SampleNoise
from frugal.common.reduction.image import PatchView

RED = np.array((230, 30, 30))


def test_marked_patches_have_a_frame_and_keep_their_inside() -> None:
    images = torch.full((2, 3, 16, 24), 7, dtype=torch.uint8)
    marked = mark_patches(images, torch.tensor([[1], [5]]), 8)
    assert torch.equal(images, torch.full_like(images, 7))
    for picture, top, left in ((marked[0], 0, 8), (marked[1], 8, 16)):
        is_red = (picture == RED[:, None, None]).all(0)
        assert is_red.sum() == 4 * 7
        patch = is_red[top : top + 8, left : left + 8]
        assert patch[0].all() and patch[-1].all() and patch[:, 0].all() and patch[:, -1].all()
        assert not patch[1:-1, 1:-1].any()
        assert (picture[:, ~is_red] == 7).all()


def test_a_batch_is_drawn_whole_and_at_three_thresholds() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 3, 16, 24), generator=generator, dtype=torch.uint8)
    view = PatchView(images, 8, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))
    noise = SampleNoise(0, torch.arange(3))
    for threshold in (-0.9, 0.2, 0.97):
        masking = ClusterMasking(threshold=threshold, anchor_ratio=0.1, min_mask_ratio=0.0)
        picture = masking.draw(view, images, noise=noise)
        assert picture.dtype == np.uint8 and picture.shape[0] == 3
        height, width = picture.shape[1:]
        # four rows of images enlarged six times, each under its label
        assert (height, width) == (4 * (18 + 96), 3 * 144 + 2 * 3)
        enlarged = images[1].numpy().repeat(6, 1).repeat(6, 2)
        assert np.array_equal(picture[:, 18 : 18 + 96, 147 : 147 + 144], enlarged)
        rows = picture.reshape(3, 4, 18 + 96, width)
        red = (rows == RED[:, None, None, None]).all(0).sum((1, 2))
        assert red[0] < red[1] == red[2] == red[3]  # the same anchors at every threshold
