"""Similarity of patches to anchors."""

import numpy as np
import pytest
import torch
from reference_cluster_masking import cluster_mask
from torch.utils._python_dispatch import TorchDispatchMode

from frugal.cluster_masking.masking import ClusterMasking
from frugal.cluster_masking.similarity import embedding_similarity, pixel_similarity
from frugal.common.randomness import SampleNoise
from frugal.common.reduction.image import PatchView

CASES = [(2, 9, 12), (3, 20, 27), (1, 35, 108)]  # images, patches, pixels


def random_patches(images: int, patches: int, pixels: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    # patches of an image have something in common, so that correlations are not all near zero
    common = torch.randn(images, 1, pixels, generator=generator)
    return common + torch.randn(images, patches, pixels, generator=generator) + 0.7


def some(images: int, patches: int, count: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(images, patches, generator=generator).argsort(1)[:, :count]


@pytest.mark.parametrize("shape", CASES)
def test_pixels_are_compared_by_pearsons_correlation(shape: tuple[int, int, int]) -> None:
    patches, anchors = random_patches(*shape), some(*shape[:2])
    found = pixel_similarity(patches, anchors)
    assert found.dtype == torch.float32
    for image in range(shape[0]):
        expected = np.corrcoef(patches[image].double().numpy())[anchors[image].numpy()]
        torch.testing.assert_close(
            found[image].double(), torch.from_numpy(expected), rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("shape", CASES)
def test_embeddings_are_compared_by_their_cosine_without_centering(
    shape: tuple[int, int, int],
) -> None:
    embeddings, anchors = random_patches(*shape), some(*shape[:2])
    unit = embeddings.double() / embeddings.double().norm(dim=2, keepdim=True)
    every = unit @ unit.transpose(1, 2)
    expected = every.gather(1, anchors.unsqueeze(2).expand(-1, -1, shape[1]))
    found = embedding_similarity(embeddings, anchors)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
    plain = pixel_similarity(embeddings, anchors, centered=False)
    assert torch.equal(plain, found)


@pytest.mark.parametrize("level", [0.1, -1.7, 1 / 3, 0.0])
def test_a_constant_patch_resembles_nothing_itself_included(level: float) -> None:
    patches = random_patches(2, 6, 768)
    patches[:, 2] = level  # the mean of 768 such numbers is not exactly the number
    patches[:, 4] = level
    similarity = pixel_similarity(patches, torch.tensor([[2, 0], [1, 4]]))
    constant = torch.tensor([False, False, True, False, True, False])
    assert similarity[0, 0].isnan().all() and similarity[1, 1].isnan().all()
    assert torch.equal(similarity[0, 1].isnan(), constant)
    assert torch.equal(similarity[1, 0].isnan(), constant)


def test_a_constant_patch_is_never_masked_not_even_as_an_anchor() -> None:
    patches = random_patches(1, 6, 48)
    patches[:, 2:4] = 0.3
    noise = torch.tensor([[0.0, 0.1, 0.9, 0.8, 0.2, 0.3]])  # anchors: the two constant ones
    mask = cluster_mask(
        patches,
        anchor_noise=noise,
        cut_off_noise=noise,
        anchor_ratio=1 / 3,
        threshold=-1.0,
        min_mask_ratio=0.0,
    )
    assert set(mask.anchors[0].tolist()) == {2, 3}
    assert mask.visible_counts.tolist() == [6]


def test_flat_patches_of_one_hue_resemble_each_other_and_those_of_another_do_not() -> None:
    red, dark_red, green = (torch.tensor(c).repeat_interleave(4) for c in (
        (1.0, -0.5, -0.5), (0.2, -0.1, -0.1), (-0.5, 1.0, -0.5)
    ))  # fmt: skip
    similarity = pixel_similarity(torch.stack((red, dark_red, green))[None], torch.tensor([[0]]))
    assert similarity[0, 0].tolist() == pytest.approx([1.0, 1.0, -0.5], abs=1e-6)


def test_autocast_changes_nothing() -> None:
    patches, anchors = random_patches(2, 16, 768), some(2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found = pixel_similarity(patches, anchors)
    assert torch.equal(found, pixel_similarity(patches, anchors))
    assert not torch.equal(found, pixel_similarity(patches.bfloat16(), anchors))


@pytest.mark.parametrize("backend", ["cuda", "mkldnn"])
def test_products_are_exact_and_the_precision_of_others_stays(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = getattr(torch.backends, backend).matmul
    before, during = settings.fp32_precision, []
    multiply = torch.Tensor.__matmul__

    def noting(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        during.append(settings.fp32_precision)
        return multiply(one, other)

    monkeypatch.setattr(torch.Tensor, "__matmul__", noting)
    settings.fp32_precision = "tf32"
    try:
        pixel_similarity(random_patches(1, 4, 12), some(1, 4))
        assert settings.fp32_precision == "tf32"
    finally:
        settings.fp32_precision = before
    assert during == ["ieee"]


class Largest(TorchDispatchMode):
    """Notes the most numbers that any operation puts out per pair of patches."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for item in result if isinstance(result, tuple) else (result,):
            if isinstance(item, torch.Tensor):
                self.shapes.append(tuple(item.shape))
        return result


def test_only_rows_of_anchors_are_ever_computed() -> None:
    images, patches = 2, 196
    with Largest() as seen:
        view = PatchView(random_patches(images, 3 * 28, 28).unflatten(1, (3, 28)), patch_size=2)
        ClusterMasking(threshold=0.5).keep(view, noise=SampleNoise(0, torch.arange(images)))
    assert (images, 6, patches) in seen.shapes
    assert not [shape for shape in seen.shapes if shape.count(patches) > 1]
