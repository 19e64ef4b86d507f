"""What training hands to the masking, and what it keeps of it."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from reference_cluster_masking import cluster_mask

from frugal.cluster_masking.clusters import ANCHORS, CUT_OFF
from frugal.cluster_masking.masking import ClusterMasking
from frugal.cluster_masking.recipes import demo
from frugal.common.contracts import Batch
from frugal.common.objectives.gradient_cache import cached_backward
from frugal.common.randomness import SampleNoise
from frugal.common.recipe import EngineOptions, Recipe
from frugal.common.recipe_json import difference, with_calibrated
from frugal.common.reduction.image import PatchView
from frugal.common.reduction.random_masking import RandomMasking

SAMPLES = 1000


def small(masking: Any, **parts: Any) -> Recipe:
    recipe = demo()
    model = replace(
        recipe.model,
        image=replace(recipe.model.image, width=16, depth=1, heads=2, mlp_width=16),
        text=replace(recipe.model.text, width=16, depth=1, heads=2, mlp_width=16),
    )
    return replace(
        recipe,
        model=model,
        reduction=replace(recipe.reduction, image=masking),
        schedule=replace(recipe.schedule, samples=SAMPLES, warmup_samples=0),
        **parts,
    )


def batch_of(count: int, first: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(4)
    coarse = torch.rand(count, 3, 8, 8, generator=generator).repeat_interleave(4, 2)
    images = coarse.repeat_interleave(4, 3) + 0.2 * torch.rand(
        count, 3, 32, 32, generator=generator
    )
    ids = torch.zeros(count, 24, dtype=torch.long)
    ids[:, :4] = torch.tensor([49406, 320, 1125, 49407])
    return Batch(
        images=(images.clamp(0, 1) * 255).to(torch.uint8),
        token_ids=ids,
        text_lengths=torch.full((count,), 4),
        sample_numbers=torch.arange(first, first + count),
        valid=torch.ones(count, dtype=torch.bool),
    )


def counts_of(objective: Any, batch: Batch) -> list[int]:
    return objective(batch, encode_only=True).patches.tolist()


def test_the_objective_masks_normalized_pixels_with_the_noise_of_the_samples() -> None:
    recipe, batch = small(ClusterMasking(threshold=0.5, anchor_ratio=0.1)), batch_of(5, first=7)
    objective = recipe.objective.build(recipe)
    view = PatchView.of(batch.images, recipe.model.image)
    kept = recipe.reduction.image.keep(view, noise=SampleNoise(0, batch.sample_numbers))
    assert counts_of(objective, batch) == kept.counts.tolist()
    assert len(set(kept.counts.tolist())) > 1
    _, metrics = objective(batch)
    assert metrics["mask_ratio"].item() == pytest.approx(1 - kept.counts.double().mean() / 64)


@pytest.mark.parametrize("first", [0, SAMPLES // 2, SAMPLES - 8])
def test_embeddings_are_those_of_the_tower_and_count_by_the_share_of_the_run(first: int) -> None:
    recipe = small(ClusterMasking(threshold=0.4, anchor_ratio=0.1, use_embeddings=True))
    objective, batch = recipe.objective.build(recipe), batch_of(8, first)
    view = PatchView.of(batch.images, recipe.model.image)
    tower, noise = objective.model.image, SampleNoise(0, batch.sample_numbers)
    embeddings = tower.patch_embed(view.normalized) + tower.pos_embed[:, 1:]
    mask = cluster_mask(
        view.normalized,
        anchor_noise=noise.uniform(ANCHORS, 64),
        cut_off_noise=noise.uniform(CUT_OFF, 64),
        anchor_ratio=0.1,
        threshold=0.4,
        min_mask_ratio=0.3,
        embeddings=embeddings,
        mix=torch.arange(first, first + 8) / SAMPLES,
    )
    assert counts_of(objective, batch) == mask.counts.tolist()
    loss, _ = objective(batch)
    loss.backward()
    assert all(p.grad is not None for p in objective.parameters())


class Direct:
    """Trains an objective without an engine."""

    def __init__(self, objective: Any) -> None:
        self.objective = objective

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        return self.objective(*arguments, **keywords)

    def accumulating(self, *, last: bool) -> Any:
        import contextlib

        return contextlib.nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()


@pytest.mark.parametrize("use_embeddings", [False, True])
def test_gradient_caching_gives_the_gradients_of_the_whole_batch(use_embeddings: bool) -> None:
    masking = ClusterMasking(threshold=0.4, anchor_ratio=0.1, use_embeddings=use_embeddings)
    recipe = small(masking, engine=EngineOptions(cache_chunk=3))
    whole, cached = recipe.objective.build(recipe), recipe.objective.build(recipe)
    batch = batch_of(8, first=300)
    whole(batch)[0].backward()
    cached_backward(Direct(cached), batch, 3, 1.0, last=True)
    for mine, theirs in zip(cached.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_pictures_are_drawn_where_the_masking_draws() -> None:
    recipe = small(ClusterMasking(threshold=0.5))
    batch = batch_of(4)
    picture = recipe.objective.build(recipe).draw_reduction(batch)
    view = PatchView.of(batch.images, recipe.model.image)
    noise = SampleNoise(0, batch.sample_numbers)
    assert np.array_equal(picture, recipe.reduction.image.draw(view, batch.images, noise=noise))
    plain = small(RandomMasking())
    assert plain.objective.build(plain).draw_reduction(batch) is None


def test_a_run_goes_on_with_what_it_measured() -> None:
    wanted, saved = small(ClusterMasking()), small(ClusterMasking(threshold=0.7))
    assert wanted.reduction.image.calibrated
    assert with_calibrated(wanted, saved) == saved
    assert not difference(saved, with_calibrated(wanted, saved))
    # what was given stays, and so does everything else
    given = small(ClusterMasking(threshold=0.6))
    assert with_calibrated(given, saved) == given
    other = small(ClusterMasking(anchor_ratio=0.1))
    assert with_calibrated(other, saved).reduction.image == ClusterMasking(
        anchor_ratio=0.1, threshold=0.7
    )
    assert len(difference(saved, with_calibrated(other, saved))) == 1
    random = small(RandomMasking())
    assert with_calibrated(random, saved) == random
    assert with_calibrated(wanted, random) == wanted
