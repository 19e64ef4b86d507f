"""Evaluating with masked images, and the ensemble of masked views, against slow loops."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from frugal.common.data.labeled import CaptionedImages, LabeledImages
from frugal.common.data.tokenizers import ClipBpe
from frugal.common.errors import InputError
from frugal.common.evaluation.embed import Embedder, MaskedViews, evaluating
from frugal.common.evaluation.retrieval import Retrieval
from frugal.common.evaluation.zero_shot import ZeroShot
from frugal.common.models.named import clip_encoder
from frugal.common.randomness import SampleNoise
from frugal.common.recipe import EngineOptions
from frugal.common.reduction.image import KeptPatches, PatchView
from frugal.common.reduction.random_masking import RandomMasking
from frugal.common.run import Run
from frugal.common.weights.runs import bundle_of

SMALL = {"width": 24, "depth": 2, "heads": 2, "mlp_width": 32}
PATCHES = 4 * 6
SEED = 5


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path, 0, 1, 0, torch.device("cpu"), logging.getLogger("frugal"))


@pytest.fixture(scope="module")
def plan() -> SimpleNamespace:
    """What evaluations read of a recipe, with towers for 16 x 24 images in patches of 4."""
    model = clip_encoder("S/8", image_size=(16, 24), text_length=10)
    return SimpleNamespace(
        model=replace(
            model,
            image=replace(model.image, **SMALL, patch_size=4),
            text=replace(model.text, **SMALL),
            embed_dim=8,
        ),
        data=SimpleNamespace(caption_tokenizer=ClipBpe()),
        engine=EngineOptions(),
        run=SimpleNamespace(seed=SEED, dir=None),
        evaluation=(),
        reduction=SimpleNamespace(text=None),
    )


@pytest.fixture(scope="module")
def model(plan) -> torch.nn.Module:
    model = plan.model.build().eval()
    with torch.no_grad():
        for weight in model.image.parameters():
            weight.mul_(4)  # fresh towers see hardly a difference between images
    return model


def pictures(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (count, 3, 16, 24), generator=generator, dtype=torch.uint8)


def slow_views(place: int, count: int, num_kept: int) -> list[list[int]]:
    """The patches of every view of one image, from its noise alone."""
    noise = SampleNoise(SEED, torch.tensor([place]))
    views: list[list[int]] = []
    while len(views) < count:
        purpose = f"image mask {len(views)}" if views else "image mask"
        values = noise.uniform(purpose, PATCHES)[0].tolist()
        left = sorted(range(PATCHES), key=values.__getitem__)
        while len(left) >= num_kept and len(views) < count:
            views.append(left[:num_kept])
            left = left[num_kept:]
    return views


def slow_embedding(model, image: Tensor, place: int, count: int, num_kept: int) -> Tensor:
    """The mean of the unit embeddings of the views, one forward pass each; of unit length."""
    total = torch.zeros(8, dtype=torch.float64)
    for patches in slow_views(place, count, num_kept):
        embedding = model.encode_image(image[None], KeptPatches.dense(torch.tensor([patches])))[
            0
        ].double()
        total += embedding / embedding.norm()
    return total / total.norm()


@pytest.mark.parametrize(
    ("mask_ratio", "count", "num_kept"),
    [(0.5, 1, 12), (0.5, 2, 12), (0.5, 3, 12), (0.75, 4, 6), (0.75, 10, 6), (0.3, 3, 16)],
)
def test_embeddings_equal_a_loop_over_images_and_views(
    mask_ratio: float, count: int, num_kept: int, plan, model, run: Run
) -> None:
    task = Retrieval(mask_ratio=mask_ratio, views=count)
    images, places = pictures(5), torch.tensor([7, 0, 3, 1000, 50_001])
    embedder = Embedder.of(bundle_of(model, plan), run, task)
    with evaluating(model):
        ours = embedder.images(images, places)
        whole = Embedder.of(bundle_of(model, plan), run).images(images)
        for row, place in enumerate(places.tolist()):
            expected = slow_embedding(model, images[row], place, count, num_kept)
            torch.testing.assert_close(ours[row].double(), expected, rtol=0, atol=1e-5)
    assert (ours - whole).abs().max() > 1e-3
    assert torch.allclose(ours.norm(dim=1), torch.ones(5))


def views_of(mask_ratio: float, count: int, places: Tensor) -> list[Tensor]:
    view = PatchView(pictures(len(places)), 4)
    views = MaskedViews(RandomMasking(mask_ratio=mask_ratio), count, SEED)
    return [kept.index for kept in views.of(view, places)]


@pytest.mark.parametrize(("mask_ratio", "count"), [(0.5, 2), (0.75, 4)])
def test_as_many_views_as_fit_see_every_patch_once(mask_ratio: float, count: int) -> None:
    views = views_of(mask_ratio, count, torch.arange(9))
    seen = torch.cat(views, dim=1).sort(dim=1).values
    assert torch.equal(seen, torch.arange(PATCHES).expand(9, -1))


def test_further_views_are_drawn_anew() -> None:
    views = views_of(0.5, 5, torch.arange(200))
    assert len(views) == 5
    as_masks = [KeptPatches.dense(index).mask(PATCHES) for index in views]
    assert torch.equal(as_masks[0], ~as_masks[1])
    assert torch.equal(as_masks[2], ~as_masks[3])
    for later in (as_masks[2], as_masks[4]):
        # independent halves share a quarter of the patches
        shared = (as_masks[0] & later).float().mean()
        assert 0.22 < shared < 0.28
        assert not (as_masks[0] == later).all(1).any()


def test_the_first_view_is_what_training_would_see() -> None:
    places = torch.tensor([4, 99, 0])
    masking = RandomMasking(mask_ratio=0.75)
    expected = masking.keep(PatchView(pictures(3), 4), noise=SampleNoise(SEED, places))
    assert torch.equal(views_of(0.75, 3, places)[0], expected.index)


def test_a_view_belongs_to_the_place_of_an_image() -> None:
    together = views_of(0.5, 3, torch.tensor([3, 8, 2]))
    alone = views_of(0.5, 3, torch.tensor([8]))
    for many, one in zip(together, alone, strict=True):
        assert torch.equal(many[1:2], one)
    assert not torch.equal(together[0][0], together[0][1])


def test_a_mask_that_keeps_nothing_is_refused(plan, model, run: Run) -> None:
    with pytest.raises(InputError, match=r"mask ratio 0\.99 keeps none of 24 patches"):
        Embedder.of(bundle_of(model, plan), run, ZeroShot(mask_ratio=0.99))


def test_gray_levels_are_embedded_as_the_bytes_they_equal(plan, model, run: Run) -> None:
    images, places = pictures(4), torch.arange(4)
    for task in (None, ZeroShot(mask_ratio=0.5, views=2)):
        embedder = Embedder.of(bundle_of(model, plan), run, task)
        with evaluating(model):
            bytes_, floats = (
                embedder.images(pixels, places) for pixels in (images, images.float())
            )
        torch.testing.assert_close(floats, bytes_, rtol=0, atol=1e-5)


# Whole evaluations.


def slow_answers(model, data: LabeledImages, classes: Tensor, count: int, num_kept: int) -> int:
    right = 0
    for images, labels, places in data.batches(0, 1, 7):
        for image, label, place in zip(images, labels, places.tolist(), strict=True):
            embedding = slow_embedding(model, image, place, count, num_kept)
            right += int((classes.double() @ embedding).argmax() == label)
    return right


def test_zero_shot_classifies_the_ensemble(scenes: Path, plan, model, run: Run) -> None:
    task = ZeroShot(data=scenes, mask_ratio=0.75, views=4, templates="name")
    ours = task.evaluate(bundle_of(model, plan), run)
    folder = scenes / "zero_shot"
    data = LabeledImages(folder, size=(16, 24))
    with evaluating(model):
        classes = Embedder.of(bundle_of(model, plan), run).texts(data.class_names)
        right = slow_answers(model, data, classes, 4, 6)
    assert ours["zero_shot_top1"] == right / 128


def test_retrieval_compares_the_ensemble(scenes: Path, plan, model, run: Run) -> None:
    task = Retrieval(data=scenes, mask_ratio=0.5, views=3)
    ours = task.evaluate(bundle_of(model, plan), run)
    data = CaptionedImages(scenes / "retrieval", size=(16, 24))
    with evaluating(model):
        texts = (
            Embedder.of(bundle_of(model, plan), run)
            .texts([own[0] for own in data.captions])
            .double()
        )
        embeddings = torch.stack([
            slow_embedding(model, image, place, 3, 12)
            for images, places in data.batches(0, 1, 50)
            for image, place in zip(images, places.tolist(), strict=True)
        ])  # fmt: skip
    nearest = (texts @ embeddings.T).topk(5).indices
    found = (nearest == torch.arange(40)[:, None]).any(1).float().mean()
    assert ours["image_retrieval_recall_at_5"] == pytest.approx(float(found))
