"""A whole tower in training mode against outputs of the reference implementation."""

import json
from pathlib import Path

import pytest
import torch
from reference_cluster_masking import (
    blocking_bias,
    both_visible,
    kept_hits,
    published_bias,
    tower_with_bias,
)
from reference_cluster_masking import (
    ids_keep as published_ids,
)
from safetensors.torch import load_file

from frugal.cluster_masking.clusters import ANCHORS, CUT_OFF, ClusterMask
from frugal.cluster_masking.masking import ClusterMasking
from frugal.common.models.vit import CLIP_MEAN, CLIP_STD, ImageTower, ImageTransformer
from frugal.common.models.weight_names import OPEN_CLIP, read_names
from frugal.common.randomness import RecordedNoise
from frugal.common.reduction.image import KeptPatches, PatchView

GOLDEN = Path(__file__).parents[1] / "golden" / "cluster_masking"
CASES = ("vit_tiny", "vit_tiny_gap")
TOLERANCE = {"rtol": 0, "atol": 1e-4}


class Case:
    """A golden tower, its images and its mask, found with the recorded noise."""

    def __init__(self, name: str) -> None:
        self.described = json.loads((GOLDEN / f"{name}.json").read_text())
        self.tensors = load_file(GOLDEN / f"{name}.safetensors")
        self.images = self.tensors["images_u8"]
        self.tower = tower_of(self.described, self.tensors)
        self.noise = RecordedNoise(
            {ANCHORS: self.tensors["noise_anchor"], CUT_OFF: self.tensors["noise_cutoff"]}
        )
        self.masking = ClusterMasking(
            anchor_ratio=self.described["anchor_ratio"],
            threshold=self.described["threshold"],
            target_mask_ratio=None,
            min_mask_ratio=self.described["min_mask_ratio"],
        )

    def view(self, images: torch.Tensor | None = None) -> PatchView:
        return PatchView.of(self.images if images is None else images, self.tower.config)

    @property
    def mask(self) -> ClusterMask:
        return self.masking.mask(self.view(), noise=self.noise)

    @property
    def kept(self) -> KeptPatches:
        return self.masking.keep(self.view(), noise=self.noise)


def tower_of(described: dict, tensors: dict[str, torch.Tensor]) -> ImageTransformer:
    mean_pooled = described["global_average_pool"]
    config = ImageTower(
        width=described["width"],
        depth=described["layers"],
        heads=described["heads"],
        mlp_width=int(described["mlp_ratio"] * described["width"]),
        patch_size=described["patch"],
        image_size=described["image_size"],
        mean=CLIP_MEAN,
        std=CLIP_STD,
        patch_bias=False,
        pre_norm=True,
        norm_epsilon=described["ln_eps"],
        pooling="mean_all" if mean_pooled else "class",
        norm_after_pooling=mean_pooled,
    )
    tower = ImageTransformer(config, described["output_dim"])
    theirs = {
        name.replace("sd.", "visual."): value
        for name, value in tensors.items()
        if name.startswith("sd.")
    }
    ours = read_names(theirs, OPEN_CLIP, source="the golden tower")
    tower.load_state_dict({name.removeprefix("image."): value for name, value in ours.items()})
    return tower.train()


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_the_mask_is_that_of_the_reference(case: Case) -> None:
    assert torch.equal(case.mask.masked, case.tensors["masked"])
    assert torch.equal(case.mask.visible_counts, case.tensors["visible_count"].long())
    assert torch.equal(case.kept.mask(16), ~case.tensors["masked"])
    assert len(set(case.kept.counts.tolist())) > 1  # packed sequences of several lengths


def test_without_masking_the_tower_equals_the_reference(case: Case) -> None:
    pooled = case.tower.eval()(case.images)
    torch.testing.assert_close(pooled, case.tensors["pooled_eval"], **TOLERANCE)


def test_packed_training_equals_the_reference_of_visible_tokens_alone(case: Case) -> None:
    pooled = case.tower(case.images, case.kept)
    torch.testing.assert_close(pooled, case.tensors["pooled_packed"], **TOLERANCE)


def test_packed_training_equals_blocking_attention_for_the_class_token() -> None:
    case = Case("vit_tiny")
    pooled = case.tower(case.images, case.kept)
    torch.testing.assert_close(pooled, case.tensors["pooled_blocking"], **TOLERANCE)


def test_packed_training_differs_from_blocking_attention_for_the_mean() -> None:
    case = Case("vit_tiny_gap")
    pooled = case.tower(case.images, case.kept)
    difference = (pooled - case.tensors["pooled_blocking"]).abs().max().item()
    recorded = case.described["max_abs_blocking_minus_packed"]
    assert recorded > 1
    assert difference == pytest.approx(recorded, abs=2e-4)


def ids_keep(case: Case) -> torch.Tensor:
    """The recorded ones: our cut-off orders the same patches in another way."""
    return case.tensors["ids_keep"].long()


def recorded_hits(case: Case) -> torch.Tensor:
    hits = case.mask.hits.gather(1, ids_keep(case))
    return torch.cat((hits.new_zeros(len(hits), 1), hits), dim=1)


def test_the_blocked_layout_equals_the_reference(case: Case) -> None:
    bias = blocking_bias(recorded_hits(case))
    pooled = tower_with_bias(case.tower, case.images, ids_keep(case), bias)
    torch.testing.assert_close(pooled, case.tensors["pooled_blocking"], **TOLERANCE)


def test_the_published_behavior_is_reproduced(case: Case) -> None:
    bias = published_bias(recorded_hits(case), case.tower.config.heads)
    pooled = tower_with_bias(case.tower, case.images, ids_keep(case), bias)
    torch.testing.assert_close(pooled, case.tensors["pooled_published"], **TOLERANCE)
    packed = case.tower(case.images, case.kept)
    assert (pooled - packed).abs().max() > 1  # which is what is wrong with it


def test_what_masked_tokens_attend_to_is_of_no_consequence_for_the_class_token() -> None:
    # the reference blocks pairs with a masked query too
    case = Case("vit_tiny")
    hits = kept_hits(case.mask)
    pairs = torch.where(both_visible(hits), 0.0, -1e12)[:, None]
    pooled = tower_with_bias(case.tower, case.images, published_ids(case.mask), pairs)
    packed = case.tower(case.images, case.kept)
    torch.testing.assert_close(pooled, packed, rtol=0, atol=1e-5)


def test_one_image_without_filling_is_published_as_it_is_packed() -> None:
    case = Case("vit_tiny")
    for row in range(3):
        visible = (~case.tensors["masked"][row]).nonzero().flatten()[None]
        hits = visible.new_zeros(1, 1 + visible.shape[1])
        image = case.images[row : row + 1]
        published = tower_with_bias(case.tower, image, visible, published_bias(hits, 4))
        torch.testing.assert_close(
            published, case.tensors["pooled_packed"][row : row + 1], **TOLERANCE
        )


def test_permuting_the_images_permutes_the_outputs_of_ours_but_not_of_the_published() -> None:
    case = Case("vit_tiny")
    order = torch.tensor([1, 0, 2])  # a cycle of three would follow (n H + h) mod 3
    pooled = case.tower(case.images, case.kept)
    bias = published_bias(recorded_hits(case), 4)
    published = tower_with_bias(case.tower, case.images, ids_keep(case), bias)
    shuffled = published_bias(recorded_hits(case)[order], 4)
    again = tower_with_bias(case.tower, case.images[order], ids_keep(case)[order], shuffled)
    assert (again - published[order]).abs().max() > 0.1
    case.images = case.images[order]
    case.noise = RecordedNoise({name: u[order] for name, u in case.noise.recorded.items()})
    torch.testing.assert_close(case.tower(case.images, case.kept), pooled[order], rtol=0, atol=1e-5)


def test_the_pixels_of_masked_patches_have_no_gradient(case: Case) -> None:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    images = ((case.images / 255 - mean) / std).requires_grad_()
    kept = case.masking.keep(case.view(images), noise=case.noise)
    case.tower(images, kept).square().sum().backward()
    assert images.grad is not None
    received = PatchView(images.grad, 16).pixels.abs().amax(2)  # (B, N)
    assert torch.equal(received > 0, ~case.tensors["masked"])


def test_the_mask_itself_has_no_gradient(case: Case) -> None:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    images = ((case.images / 255 - mean) / std).requires_grad_()
    mask = case.masking.mask(case.view(images), noise=case.noise)
    assert not mask.hits.requires_grad and not mask.order.requires_grad
    assert torch.equal(mask.masked, case.tensors["masked"])


def test_packed_training_has_the_gradients_of_blocking_attention() -> None:
    case = Case("vit_tiny")

    def gradients(pooled: torch.Tensor) -> list[torch.Tensor]:
        return torch.autograd.grad(pooled.square().sum(), list(case.tower.parameters()))

    packed = gradients(case.tower(case.images, case.kept))
    bias = blocking_bias(recorded_hits(case))
    blocked = gradients(tower_with_bias(case.tower, case.images, ids_keep(case), bias))
    for ours, theirs in zip(packed, blocked, strict=True):
        limit = 1e-5 * max(1.0, theirs.abs().max().item())
        torch.testing.assert_close(ours, theirs, rtol=0, atol=limit)
