"""Cluster masks: properties, a slow reference, and what is refused."""

import math
from types import SimpleNamespace

import pytest
import torch
from reference_cluster_masking import cluster_mask, ids_keep

from frugal.cluster_masking.clusters import (
    ANCHORS,
    CUT_OFF,
    ClusterMask,
    most_kept,
    num_anchors,
)
from frugal.cluster_masking.masking import ClusterMasking
from frugal.common.errors import InputError
from frugal.common.models.named import image_tower
from frugal.common.randomness import RecordedNoise, SampleNoise
from frugal.common.recipe_json import from_json, to_json
from frugal.common.reduction.image import ImageReduction, PatchView

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
GRIDS = [(4, 8, 3), (5, 3, 4), (7, 7, 2), (1, 13, 5)]  # rows, columns, side of a patch


def pictures(rows: int, columns: int, side: int, count: int, seed: int = 0) -> torch.Tensor:
    """Images of a few colors, so that patches form clusters, with noise on top."""
    generator = torch.Generator().manual_seed(seed)
    colors = torch.randint(0, 256, (count, 3, 4), generator=generator)
    which = torch.randint(0, 4, (count, 1, rows, columns), generator=generator)
    flat = colors.gather(2, which.flatten(2).expand(-1, 3, -1)).view(count, 3, rows, columns)
    flat = flat.repeat_interleave(side, 2).repeat_interleave(side, 3)
    noise = torch.randint(-40, 41, flat.shape, generator=generator)
    return (flat + noise).clamp(0, 255).to(torch.uint8)


def view(rows: int, columns: int, side: int, count: int = 6) -> PatchView:
    return PatchView(pictures(rows, columns, side, count), side, mean=MEAN, std=STD)


def uniform(count: int, patches: int, seed: int) -> torch.Tensor:
    return torch.rand(count, patches, generator=torch.Generator().manual_seed(seed))


def mask_of(seen: PatchView, **options: object) -> ClusterMask:
    count, patches = len(seen.images), seen.num_patches
    settings = {
        "anchor_noise": uniform(count, patches, 1),
        "cut_off_noise": uniform(count, patches, 2),
        "anchor_ratio": 0.1,
        "threshold": 0.6,
        "min_mask_ratio": 0.3,
    }
    return cluster_mask(seen.normalized, **{**settings, **options})


def slowly(seen: PatchView, *, anchor_noise, cut_off_noise, alpha, tau, beta) -> list[list[int]]:
    """The kept patches of every image, patch by patch in double precision, from the paper."""
    kept = []
    for image, u, v in zip(seen.normalized.double(), anchor_noise, cut_off_noise, strict=True):
        number = len(image)
        by_noise = sorted(range(number), key=lambda patch: u[patch].item())
        anchors = by_noise[number - (number - math.floor(number * (1 - alpha))) :]
        centered = [patch - patch.mean() for patch in image]
        visible = []
        for patch in centered:
            cosines = [
                (patch @ centered[a] / (patch.norm() * centered[a].norm())).item() for a in anchors
            ]
            visible.append(not any(cosine > tau for cosine in cosines))
        stays = [patch for patch in range(number) if visible[patch]]
        limit = math.floor(number * (1 - beta))
        stays = sorted(stays, key=lambda patch: v[patch].item())[:limit]
        kept.append(sorted(stays))
    return kept


@pytest.mark.parametrize(("rows", "columns", "side"), GRIDS)
@pytest.mark.parametrize(
    ("alpha", "tau", "beta"), [(0.1, 0.6, 0.3), (0.3, 0.9, 0.5), (0.05, 0.2, 0)]
)
def test_masks_equal_those_of_a_slow_reference(rows, columns, side, alpha, tau, beta) -> None:
    seen = view(rows, columns, side)
    number = rows * columns
    masking = ClusterMasking(
        anchor_ratio=alpha, threshold=tau, min_mask_ratio=beta, target_mask_ratio=None
    )
    recorded = {ANCHORS: uniform(6, number, 3), CUT_OFF: uniform(6, number, 4)}
    kept = masking.keep(seen, noise=RecordedNoise(recorded))
    expected = slowly(
        seen,
        anchor_noise=recorded[ANCHORS],
        cut_off_noise=recorded[CUT_OFF],
        alpha=alpha,
        tau=tau,
        beta=beta,
    )
    assert [part.tolist() for part in kept.index.split(kept.counts.tolist())] == expected
    assert kept.is_packed


@pytest.mark.parametrize(("rows", "columns", "side"), GRIDS)
@pytest.mark.parametrize("overflow", ["random", "index"])
def test_what_holds_of_every_mask(rows, columns, side, overflow) -> None:
    number = rows * columns
    for tau in (-0.5, 0.0, 0.4, 0.7, 0.9, 0.999):
        for beta in (0.0, 0.3, 0.6):
            mask = mask_of(
                view(rows, columns, side), threshold=tau, min_mask_ratio=beta, overflow=overflow
            )
            assert mask.order.sort(1).values.tolist() == [list(range(number))] * 6
            # anchors resemble themselves
            assert mask.masked.gather(1, mask.anchors).all()
            assert torch.equal(mask.visible_counts, number - mask.masked.sum(1))
            assert not (mask.stays & mask.masked).any()
            assert torch.equal(mask.stays.sum(1), mask.counts)
            assert torch.all(mask.mask_ratio >= 1 - most_kept(number, beta) / number - 1e-6)
            assert ids_keep(mask).shape[1] == min(
                most_kept(number, beta), int(mask.visible_counts.max())
            )


def test_fewer_patches_are_masked_at_a_higher_threshold() -> None:
    seen = view(6, 5, 4, count=20)
    before = None
    for tau in torch.linspace(-1, 0.999, 41).tolist():
        hits = mask_of(seen, threshold=tau).hits
        assert before is None or torch.all(hits <= before)
        before = hits
    assert before is not None and before.max() == 1  # in the end an anchor resembles itself alone


def test_the_mask_of_a_sample_does_not_depend_on_its_batch() -> None:
    masking = ClusterMasking(threshold=0.6, anchor_ratio=0.1)
    seen = view(4, 6, 3, count=8)
    whole = masking.keep(seen, noise=SampleNoise(3, torch.arange(100, 108))).mask(24)
    rows = [5, 1]
    part = PatchView(seen.images[rows], 3, mean=MEAN, std=STD)
    again = masking.keep(part, noise=SampleNoise(3, torch.tensor([105, 101]))).mask(24)
    assert torch.equal(again, whole[rows])
    for row in range(8):
        alone = PatchView(seen.images[row : row + 1], 3, mean=MEAN, std=STD)
        kept = masking.keep(alone, noise=SampleNoise(3, torch.tensor([100 + row])))
        assert torch.equal(kept.mask(24)[0], whole[row])


def test_a_patch_exactly_at_the_threshold_is_visible() -> None:
    patches = torch.tensor([[[1.0, -1, 0, 0], [0, 0, 1, -1], [1, -1, 1, -1]]])
    noise = torch.tensor([[0.9, 0.1, 0.2]])  # the first patch is the anchor
    options = {"anchor_noise": noise, "cut_off_noise": noise, "anchor_ratio": 0.3}
    mask = cluster_mask(patches, **options, threshold=0.0, min_mask_ratio=0.0)
    assert mask.hits.tolist() == [[1, 0, 1]]


def test_another_seed_or_sample_draws_other_anchors() -> None:
    masking, seen = ClusterMasking(threshold=0.6), view(8, 8, 2, count=4)
    anchors = [
        masking.mask(seen, noise=SampleNoise(seed, torch.arange(first, first + 4))).anchors
        for seed, first in ((0, 0), (1, 0), (0, 4))
    ]
    assert not torch.equal(anchors[0], anchors[1]) and not torch.equal(anchors[0], anchors[2])


def test_every_patch_is_equally_likely_to_be_an_anchor_and_to_be_cut_off() -> None:
    count, patches = 4000, 12
    # nothing resembles anything: one anchor each, and the cut-off takes four of the other eleven
    generator = torch.Generator().manual_seed(5)
    seen = PatchView(torch.randn(count, 3, 12, 16, generator=generator), 4)
    masking = ClusterMasking(anchor_ratio=0.05, threshold=0.9, min_mask_ratio=0.4)
    mask = masking.mask(seen, noise=SampleNoise(0, torch.arange(count)))
    assert mask.anchors.shape == (count, 1) and torch.all(mask.hits.sum(1) == 1)
    drawn = mask.anchors.flatten().bincount(minlength=patches) / count
    assert torch.all((drawn - 1 / patches).abs() < 5 * (1 / patches / count) ** 0.5)
    share = mask.stays.double().mean(0)
    assert torch.all(mask.counts == 7)
    assert torch.all((share - 7 / patches).abs() < 5 * (0.25 / count) ** 0.5)


def test_the_published_cut_off_takes_the_bottom_of_the_image() -> None:
    seen = view(6, 4, 3)
    ours, theirs = (
        mask_of(seen, threshold=0.999, min_mask_ratio=0.5, overflow=overflow)
        for overflow in ("random", "index")
    )
    assert torch.equal(ours.masked, theirs.masked) and torch.equal(ours.counts, theirs.counts)
    for row in range(6):
        visible = (~theirs.masked[row]).nonzero().flatten()
        assert theirs.stays[row].nonzero().flatten().tolist() == visible[:12].tolist()
    assert ours.stays[:, 18:].sum() > 0 == theirs.stays[:, 18:].sum()


def test_embeddings_count_as_much_as_the_mix_says() -> None:
    seen = view(4, 5, 3, count=3)
    embeddings = torch.randn(3, 20, 7, generator=torch.Generator().manual_seed(2))
    alone = mask_of(seen)
    for weight in (0.0, torch.zeros(3)):
        mixed = mask_of(seen, embeddings=embeddings, mix=weight)
        assert torch.equal(mixed.hits, alone.hits)
    unit = embeddings.double() / embeddings.double().norm(dim=2, keepdim=True)
    only = mask_of(seen, embeddings=embeddings, mix=1.0)
    cosines = (unit @ unit.transpose(1, 2)).gather(1, only.anchors.unsqueeze(2).expand(-1, -1, 20))
    assert torch.equal(only.hits, (cosines > 0.6).sum(1))
    each = mask_of(seen, embeddings=embeddings, mix=torch.tensor([0.0, 1.0, 0.0]))
    assert torch.equal(each.hits, torch.stack((alone.hits[0], only.hits[1], alone.hits[2])))


def test_embeddings_are_asked_for_only_where_they_are_used() -> None:
    seen = view(4, 5, 3, count=3)
    asked = []

    def embed() -> torch.Tensor:
        asked.append(torch.is_grad_enabled())
        return torch.randn(3, 20, 7, generator=torch.Generator().manual_seed(2))

    noise = RecordedNoise({ANCHORS: uniform(3, 20, 1), CUT_OFF: uniform(3, 20, 2)})
    progress = torch.tensor([0.0, 0.9, 1.0])
    full = PatchView(seen.images, 3, mean=MEAN, std=STD, embed=embed, progress=progress)
    settings = {"threshold": 0.6, "anchor_ratio": 0.1}
    plain = ClusterMasking(**settings).keep(full, noise=noise)
    assert not asked
    mixed = ClusterMasking(**settings, use_embeddings=True).keep(full, noise=noise)
    assert asked == [False]
    expected = mask_of(seen, embeddings=embed(), mix=progress)
    assert torch.equal(mixed.mask(20), expected.stays)
    assert torch.equal(mixed.mask(20)[0], plain.mask(20)[0])
    assert not torch.equal(mixed.mask(20), plain.mask(20))
    with pytest.raises(InputError, match="needs the embeddings of all patches"):
        ClusterMasking(**settings, use_embeddings=True).keep(seen, noise=noise)


def test_an_image_of_one_cluster_keeps_nothing() -> None:
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    images[:, 0] = 200
    seen = PatchView(images, 4, mean=MEAN, std=STD)
    masking = ClusterMasking(threshold=0.5)
    kept = masking.keep(seen, noise=SampleNoise(0, torch.arange(2)))
    assert kept.counts.tolist() == [0, 0] and kept.index.shape == (0,)
    assert ids_keep(masking.mask(seen, noise=SampleNoise(0, torch.arange(2)))).shape == (2, 0)


@pytest.mark.parametrize(("patches", "ratio", "count"), [
    (196, 0.03, 6), (49, 0.03, 2), (16, 0.25, 4), (16, 0.03, 1), (196, 1.0, 196), (256, 0.05, 13),
])  # fmt: skip
def test_numbers_of_anchors(patches: int, ratio: float, count: int) -> None:
    assert num_anchors(patches, ratio) == count


def test_the_contract_is_kept_and_the_settings_travel_as_json() -> None:
    masking = ClusterMasking(threshold=0.625, anchor_ratio=0.05)
    assert isinstance(masking, ImageReduction)
    assert from_json(to_json(masking)) == masking


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"anchor_ratio": 0.0}, "anchor_ratio is 0.0, must be more than 0"),
        ({"anchor_ratio": 1.2}, "anchor_ratio is 1.2"),
        ({"anchor_ratio": float("nan")}, "anchor_ratio is nan"),
        ({"min_mask_ratio": 1.0}, r"min_mask_ratio is 1.0, must lie in \[0, 1\)"),
        ({"min_mask_ratio": -0.1}, "min_mask_ratio is -0.1"),
        ({"threshold": 1.0}, r"threshold is 1.0, must lie in \[-1, 1\)"),
        ({"threshold": 1.1}, "leave it out to have it searched"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"target_mask_ratio": None}, "neither a threshold nor a target_mask_ratio"),
        ({"target_mask_ratio": 0.0}, "target_mask_ratio is 0.0"),
        ({"target_mask_ratio": 1.0}, "target_mask_ratio is 1.0"),
        ({"target_mask_ratio": 0.2}, "target_mask_ratio is 0.2, less than .*min_mask_ratio = 0.3"),
        ({"tolerance": 0.0}, "tolerance is 0.0"),
        ({"tolerance": float("nan")}, "tolerance is nan"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        ClusterMasking(**settings)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"anchor_ratio": 1e-18}, "anchor_ratio 1e-18 draws no anchor from 16 patches"),
        ({"min_mask_ratio": 0.95, "target_mask_ratio": 0.97}, "0.95 keeps none of 16 patches"),
        (
            {"target_mask_ratio": 0.3},
            "0.3 cannot be reached: .* keeps at most 11 of its 16 patches, so that 0.3125 goes",
        ),
        ({"search_images": 60}, "search_images is 60, too few .* 63 images of 16 patches"),
    ],
)
def test_settings_that_an_image_size_makes_impossible_are_refused(
    settings: dict, sentence: str
) -> None:
    recipe = SimpleNamespace(model=SimpleNamespace(image=image_tower("Ti/8", image_size=32)))
    ClusterMasking().check_grid(recipe.model.image.grid)
    with pytest.raises(InputError, match=sentence):
        ClusterMasking(**settings).check_grid(recipe.model.image.grid)


def test_few_search_images_are_no_mistake_where_nothing_is_searched() -> None:
    ClusterMasking(threshold=0.5, search_images=1).check_grid((4, 4))


def test_without_a_threshold_nothing_can_be_masked() -> None:
    with pytest.raises(InputError, match="threshold is not known"):
        ClusterMasking().keep(view(4, 4, 3), noise=SampleNoise(0, torch.arange(6)))


@pytest.mark.parametrize(
    ("ratio", "said"), [(0.5, False), (0.549, False), (0.46, False), (0.56, True), (0.44, True)]
)
def test_a_mask_ratio_that_drifts_from_the_target_is_remarked(ratio: float, said: bool) -> None:
    remark = ClusterMasking(threshold=0.6).off_target({"mask_ratio": ratio, "loss": 1.0})
    assert (remark is not None) == said
    if remark is not None:
        assert f"{ratio:.1%}" in remark and "50.0%" in remark


def test_a_threshold_without_a_target_drifts_from_nothing() -> None:
    masking = ClusterMasking(threshold=0.6, target_mask_ratio=None)
    assert masking.off_target({"mask_ratio": 0.9}) is None
    assert ClusterMasking(threshold=0.6).off_target({"loss": 1.0}) is None
