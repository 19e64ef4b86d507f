"""Pictures of clusters, by themselves and in the report of a run."""

import base64
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from frugal.cluster_masking.masking import ClusterMasking
from frugal.cluster_masking.pictures import mark_patches
from frugal.cluster_masking.recipes import demo
from frugal.common.evaluation.compositional import Compositional
from frugal.common.evaluation.retrieval import Retrieval
from frugal.common.evaluation.zero_shot import ZeroShot
from frugal.common.randomness import SampleNoise
from frugal.common.recipe import Recipe
from frugal.common.recipe_json import load_recipe, to_json
from frugal.common.reduction.image import PatchView
from frugal.common.reduction.random_masking import RandomMasking
from frugal.common.report.examples import Examples
from frugal.common.report.examples_of_model import examples_of_model
from frugal.common.run import Run, make_logger
from frugal.common.weights.runs import bundle_of
from support import ALONE, command, train

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


# In the report.


@pytest.fixture(scope="module")
def trained(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run that searches its threshold, with something to show pictures of."""
    run = tmp_path_factory.mktemp("clusters") / "run"
    train(
        ALONE, run, f"--data.train={scenes / 'train'}", f"--evaluation.1.data={scenes}",
        "--reduction.image.search-images=120", "--reduction.image.anchor-ratio=0.1",
        "--schedule.samples=48", "--schedule.warmup-samples=0",
        module="frugal.cluster_masking.train",
    )  # fmt: skip
    return run


def page_of(run: Path) -> str:
    command("frugal.common.report", run, "--examples=10")
    return (run / "report.html").read_text()


def pictures(page: str, pattern: str) -> list[np.ndarray]:
    """The (3, H, W) pictures of ``<img>`` tags; the pattern's group is what they carry."""
    found = []
    for encoded in re.findall(pattern, page):
        with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
            found.append(np.asarray(image).transpose(2, 0, 1))
    return found


def test_the_report_shows_the_clusters_of_its_images(trained: Path) -> None:
    page = page_of(trained)
    assert "<h2>How patches are chosen</h2><p>Drawn by ClusterMasking itself.</p>" in page
    (shown,) = pictures(page, r'png;base64,([^"]+)"[^>]*alt="what ClusterMasking draws')
    # half of the examples asked for, each as it is and at three thresholds
    images = np.stack(pictures(page, r'class="pair"><img src="data:image/png;base64,([^"]+)"'))
    assert images.shape == (5, 3, 32, 32)
    assert shown.shape == (3, 4 * (18 + 96), 5 * 96 + 4 * 3)
    # as the masking of the run draws them, at the threshold that it found
    recipe = load_recipe(trained / "recipe.json")
    view = PatchView.of(torch.from_numpy(images), recipe.model.image)
    noise = SampleNoise(recipe.run.seed, torch.arange(5))
    expected = recipe.reduction.image.draw(view, torch.from_numpy(images), noise=noise)
    assert np.array_equal(shown, expected)


def test_a_run_whose_masking_draws_nothing_has_no_such_section(
    trained: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    recipe = load_recipe(run / "recipe.json")
    plain = replace(recipe.reduction, image=RandomMasking(mask_ratio=0.5))
    (run / "recipe.json").write_text(json.dumps(to_json(replace(recipe, reduction=plain))))
    page = page_of(run)
    assert "What it sees while training" in page
    assert "How patches are chosen" not in page and "ClusterMasking draws" not in page


def gathered(scenes: Path, masking: ClusterMasking, folder: Path) -> Examples:
    """What a report would show of a fresh model."""
    recipe: Recipe = replace(
        demo(), evaluation=(ZeroShot(), Retrieval(data=scenes), Compositional())
    )
    run = Run(folder, 0, 1, 0, torch.device("cpu"), make_logger(0))
    model = recipe.objective.build(recipe).model
    return examples_of_model(
        bundle_of(model, recipe),
        recipe.evaluation,
        run,
        reduction=masking,
        count=40,
    )


def test_many_examples_are_not_all_drawn(scenes: Path, tmp_path: Path) -> None:
    found = gathered(scenes, ClusterMasking(threshold=0.5, anchor_ratio=0.1), tmp_path)
    assert found.drawn is not None and len(found.masked) == 20
    assert found.drawn.picture.shape == (3, 4 * (18 + 96), 6 * 96 + 5 * 3)


def test_embeddings_are_mixed_in_as_at_the_end_of_the_run(scenes: Path, tmp_path: Path) -> None:
    masking = ClusterMasking(threshold=0.3, anchor_ratio=0.1)
    pixels = gathered(scenes, masking, tmp_path)
    both = gathered(scenes, replace(masking, use_embeddings=True), tmp_path)
    assert [one.kept for one in both.masked] != [one.kept for one in pixels.masked]
    assert both.drawn is not None and pixels.drawn is not None
    assert both.drawn.picture.shape == pixels.drawn.picture.shape
    assert (both.drawn.picture != pixels.drawn.picture).any()
