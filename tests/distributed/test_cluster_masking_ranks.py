"""Cluster Masking on several processes, whose images keep different numbers of patches."""

import json
import logging
import random
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from frugal.cluster_masking.masking import ClusterMasking
from frugal.common.randomness import SampleNoise
from frugal.common.recipe import Recipe
from frugal.common.recipe_json import load_recipe
from frugal.common.reduction.image import PatchView
from frugal.common.run import Run
from support import (
    ALONE,
    DDP,
    Launcher,
    kill_at_step,
    largest_difference,
    losses,
    metrics,
    saved_tensors,
    start,
    train,
    zero,
)

MODULE = "frugal.cluster_masking.train"
SEARCH = "--reduction.image.search-images=120"
EVERYTHING = ("weight", "exp_avg", "exp_avg_sq")


def threshold(run: Path) -> float:
    """What a run keeps with its recipe, and with every checkpoint."""
    masking = load_recipe(run / "recipe.json").reduction.image
    assert isinstance(masking, ClusterMasking) and masking.threshold is not None
    for state in (run / "checkpoints").glob("*/state.json"):
        saved = json.loads(state.read_text())["recipe"]["reduction"]["image"]
        assert saved["threshold"] == masking.threshold
    return masking.threshold


@pytest.fixture(scope="module")
def alone(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("alone") / "run"
    output = train(ALONE, run, f"--data.train={scenes / 'train'}", SEARCH, module=MODULE)
    assert "of the patches of 120 images" in output
    assert 0 < threshold(run) < 1
    return run


@pytest.fixture(scope="module")
def under_zero_3(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("under_zero_3") / "run"
    train(zero(3), run, f"--data.train={scenes / 'train'}", SEARCH, module=MODULE)
    return run


def check_equal(run: Path, alone: Path) -> None:
    assert threshold(run) == threshold(alone)
    expected, found = losses(alone), losses(run)
    assert list(found) == list(range(1, 21)) == list(expected)
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, abs=1e-5)
    left, right = saved_tensors(alone), saved_tensors(run)
    assert largest_difference(left, right, ("weight",)) < 1e-5
    assert largest_difference(left, right, ("exp_avg", "exp_avg_sq")) < 1e-4
    for mine, theirs in zip(metrics(run), metrics(alone), strict=True):
        assert mine["image_tokens"] == pytest.approx(theirs["image_tokens"], rel=1e-6)
        assert mine["mask_ratio"] == pytest.approx(theirs["mask_ratio"], rel=1e-6)


def test_twenty_steps_and_the_threshold_agree_under_zero_3(under_zero_3: Path, alone: Path) -> None:
    check_equal(under_zero_3, alone)


@pytest.mark.parametrize("launcher", [DDP, zero(1), zero(2)], ids=lambda launcher: launcher.name)
def test_twenty_steps_and_the_threshold_agree(
    launcher: Launcher, alone: Path, scenes: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(launcher, run, f"--data.train={scenes / 'train'}", SEARCH, module=MODULE)
    check_equal(run, alone)


def tokens_of(recipe: Recipe, *, rank: int, world_size: int, steps: int) -> list[list[int]]:
    """Patches that every image of a process keeps, step by step."""
    run = Run(Path("unused"), rank, world_size, 0, torch.device("cpu"), logging.getLogger("test"))
    stream = recipe.data.build(recipe, run, first_sample=0, state={}, engine=None)
    counts = []
    for batch, _ in zip(stream, range(steps), strict=False):
        view = PatchView.of(batch.images, recipe.model.image)
        noise = SampleNoise(recipe.run.seed, batch.sample_numbers)
        counts.append(recipe.reduction.image.keep(view, noise=noise).counts.tolist())
    return counts


def test_the_processes_of_these_runs_had_different_numbers_of_tokens(alone: Path) -> None:
    recipe = load_recipe(alone / "recipe.json")
    ranks = [tokens_of(recipe, rank=rank, world_size=2, steps=20) for rank in (0, 1)]
    for step, (mine, theirs) in enumerate(zip(*ranks, strict=True)):
        assert len(set(mine)) > 2 and len(set(theirs)) > 2, step
        mean = (sum(mine) + sum(theirs)) / 24
        assert metrics(alone)[step]["image_tokens"] == pytest.approx(1 + mean, rel=1e-6)
    sums = [[sum(counts) for counts in rank] for rank in ranks]
    assert sum(mine != theirs for mine, theirs in zip(*sums, strict=True)) >= 18


def test_processes_whose_images_keep_nothing_train_on_and_say_so(
    scenes: Path, tmp_path: Path
) -> None:
    # every patch is an anchor, or resembles one: the image towers see class tokens alone
    words = ("--reduction.image.anchor-ratio=1", "--reduction.image.threshold=-1")
    run = tmp_path / "run"
    output = train(zero(3), run, f"--data.train={scenes / 'train'}", *words, module=MODULE)
    assert metrics(run)[-1]["image_tokens"] < 2
    assert "of the patches are masked where 50.0% were meant" in output
    assert output.count("were meant") == 1  # said when it begins, not at every step


def test_embeddings_mixed_in_agree(scenes: Path, tmp_path: Path) -> None:
    words = (f"--data.train={scenes / 'train'}", SEARCH, "--reduction.image.use-embeddings")
    train(ALONE, tmp_path / "alone", *words, module=MODULE)
    train(zero(3), tmp_path / "run", *words, module=MODULE)
    check_equal(tmp_path / "run", tmp_path / "alone")


def test_killed_under_zero_3_and_resumed_is_bit_for_bit_the_undisturbed_run(
    under_zero_3: Path, scenes: Path, tmp_path: Path
) -> None:
    disturbed = tmp_path / "disturbed"
    words = (f"--data.train={scenes / 'train'}", SEARCH, "--run.save-every=5", "--run.keep=20")
    process = start(zero(3), disturbed, *words, module=MODULE)
    kill_at_step(process, disturbed, random.Random().randint(6, 14), signal.SIGKILL)
    assert len(metrics(disturbed)) < 20
    output = train(zero(3), disturbed, *words, module=MODULE)
    assert "found in" not in output  # the threshold is not searched again
    assert threshold(disturbed) == threshold(under_zero_3)
    left, right = saved_tensors(under_zero_3), saved_tensors(disturbed)
    assert largest_difference(left, right, EVERYTHING) == 0.0
    assert losses(disturbed) == losses(under_zero_3)


def test_a_run_goes_on_with_the_threshold_of_its_checkpoint(alone: Path, tmp_path: Path) -> None:
    recipe = load_recipe(alone / "recipe.json")
    masking = recipe.reduction.image
    assert isinstance(masking, ClusterMasking) and masking.threshold is not None
    # another threshold than a search would find, and no recipe.json to read it from
    other = replace(masking, threshold=masking.threshold / 2)
    recipe = replace(recipe, reduction=replace(recipe.reduction, image=other))
    run = tmp_path / "run"
    words = (f"--data.train={recipe.data.train[0]}", SEARCH)
    train(ALONE, run, *words, f"--reduction.image.threshold={other.threshold}", module=MODULE)
    (run / "recipe.json").unlink()
    output = train(ALONE, run, *words, module=MODULE)
    assert "found in" not in output
    assert threshold(run) == other.threshold


def test_a_run_of_another_target_is_not_continued(alone: Path) -> None:
    data = load_recipe(alone / "recipe.json").data.train[0]
    words = (f"--data.train={data}", SEARCH, "--reduction.image.target-mask-ratio=0.6")
    output = train(ALONE, alone, *words, module=MODULE, expect=2)
    assert "reduction.image.target_mask_ratio was 0.5 and is now 0.6" in output
