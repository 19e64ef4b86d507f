"""Patches of an image, and which of them are taken."""

import pytest
import torch
import torch.nn.functional as F

from frugal.common.errors import InputError
from frugal.common.models.named import image_tower
from frugal.common.models.vit import ImageTransformer
from frugal.common.randomness import SampleNoise
from frugal.common.reduction.image import (
    ImageReduction,
    KeepAll,
    KeptPatches,
    PatchView,
    take_patches,
)
from frugal.common.reduction.random_masking import RandomMasking
from support import run_code


def picture(rows: int, columns: int, side: int, count: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    size = (count, 3, rows * side, columns * side)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(("rows", "columns", "side"), [(2, 5, 4), (3, 3, 2), (4, 1, 3)])
def test_patches_stand_row_by_row_with_pixels_in_channel_row_column_order(rows, columns, side):
    images = picture(rows, columns, side)
    view = PatchView(images, side)
    assert view.grid == (rows, columns)
    for number in range(rows * columns):
        row, column = divmod(number, columns)
        patch = images[:, :, row * side : (row + 1) * side, column * side : (column + 1) * side]
        assert torch.equal(view.pixels[:, number], patch.flatten(1))


def test_a_patch_times_a_flattened_kernel_is_a_convolution():
    images = picture(2, 5, 4).double()
    kernel = torch.randn(7, 3, 4, 4, dtype=torch.float64)
    expected = F.conv2d(images, kernel, stride=4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(PatchView(images, 4).pixels @ kernel.flatten(1).T, expected)


def test_patches_of_images_that_are_not_contiguous_are_cut_alike():
    images = picture(2, 5, 4)
    channels_last = images.to(memory_format=torch.channels_last)
    assert torch.equal(PatchView(channels_last, 4).pixels, PatchView(images, 4).pixels)


@pytest.mark.parametrize(("rows", "columns", "side"), [(2, 5, 4), (3, 3, 2), (4, 1, 3)])
def test_normalized_patches_are_patches_of_normalized_images(rows, columns, side):
    images, mean, std = picture(rows, columns, side), (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
    view = PatchView(images, side, mean=mean, std=std)
    center, spread = (torch.tensor(c, dtype=torch.float64).view(3, 1, 1) for c in (mean, std))
    expected = PatchView((images.double() / 255 - center) / spread, side)
    assert view.normalized.dtype == torch.float32
    torch.testing.assert_close(view.normalized.double(), expected.pixels, rtol=0, atol=2e-6)
    # float images are normalized already
    assert torch.equal(expected.normalized, expected.pixels.float())
    assert torch.equal(PatchView(images, side).images, view.images)  # and nothing was overwritten


def test_a_view_as_a_tower_takes_it_has_the_pixels_that_the_tower_embeds():
    tower = image_tower("Ti/4", image_size=(8, 20), width=12, depth=1, heads=2, mlp_width=12)
    embedded = []
    model = ImageTransformer(tower)
    model.patch_embed.register_forward_pre_hook(lambda _, inputs: embedded.append(inputs[0]))
    images = picture(2, 5, 4)
    model(images)
    torch.testing.assert_close(
        PatchView.of(images, tower).normalized, embedded[0], rtol=0, atol=1e-6
    )


def test_bytes_without_a_mean_cannot_be_normalized():
    with pytest.raises(ValueError, match="needs a mean and a std"):
        PatchView(picture(2, 2, 4), 4).normalized  # noqa: B018


def test_taken_patches_follow_the_order_in_which_they_were_kept():
    view = PatchView(picture(2, 5, 4), 4)
    index = torch.tensor([[9, 0, 3], [1, 2, 8], [5, 5, 4]])
    taken = take_patches(view, KeptPatches.dense(index))
    assert taken.dtype == torch.uint8
    for image in range(3):
        for place in range(3):
            assert torch.equal(taken[image, place], view.pixels[image, index[image, place]])


def test_packed_patches_are_taken_image_after_image():
    view = PatchView(picture(2, 5, 4), 4)
    kept = KeptPatches.packed(torch.tensor([9, 0, 3, 7]), torch.tensor([1, 0, 3]))
    taken = take_patches(view, kept)
    expected = [view.pixels[0, 9], view.pixels[2, 0], view.pixels[2, 3], view.pixels[2, 7]]
    assert torch.equal(taken, torch.stack(expected))
    assert kept.images.tolist() == [0, 2, 2, 2]


def test_without_a_reduction_every_patch_is_taken():
    view = PatchView(picture(2, 5, 4), 4)
    assert KeepAll().keep(view, noise=SampleNoise(0, torch.arange(3))) is None
    assert torch.equal(take_patches(view, None), view.pixels)


def test_a_mask_and_what_is_kept_describe_each_other():
    mask = torch.tensor([[True, False, False, True], [False] * 4, [False, True, True, True]])
    kept = KeptPatches.where(mask)
    assert kept.is_packed
    assert kept.counts.tolist() == [2, 0, 3]
    assert torch.equal(kept.mask(4), mask)
    dense = KeptPatches.dense(torch.tensor([[2, 0], [1, 3]]))
    assert not dense.is_packed
    assert dense.counts.tolist() == [2, 2]
    assert dense.mask(4).int().tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]]


@pytest.mark.parametrize(
    ("height", "width", "message"),
    [
        (8, 3, "images of 8x3 pixels are smaller than a patch of 4"),
        (8, 10, "images of 8x10 pixels do not divide into patches of 4"),
    ],
)
def test_images_that_do_not_divide_into_patches_are_refused(height, width, message):
    with pytest.raises(InputError, match=message):
        PatchView(torch.zeros(1, 3, height, width), 4)


def test_wrong_shapes_of_kept_patches_are_refused():
    with pytest.raises(ValueError, match=r"shape \(B, K\)"):
        KeptPatches.dense(torch.arange(3))
    with pytest.raises(ValueError, match=r"shape \(T,\)"):
        KeptPatches.packed(torch.zeros(2, 2).long(), torch.tensor([1, 1]))


def test_reductions_satisfy_the_contract():
    assert isinstance(KeepAll(), ImageReduction)
    assert isinstance(RandomMasking(), ImageReduction)


def test_configurations_of_reductions_do_not_import_transformers():
    modules = ("reduction.image", "reduction.random_masking", "reduction.text")
    code = "import sys;" + ";".join(f"import frugal.common.{name}" for name in modules)
    code += "; assert 'transformers' not in sys.modules"
    run_code(code).check_returncode()
