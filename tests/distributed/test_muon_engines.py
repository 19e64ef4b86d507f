"""Muon steps whole matrices, wherever an engine keeps the pieces of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from support import (
    ALONE,
    DDP,
    Launcher,
    largest_difference,
    losses,
    newest,
    saved_tensors,
    train,
    zero,
)

MUON = (
    "--optimizer=frugal.common.optim.muon.Muon", "--schedule.samples=144", "--run.save-every=3",
    "--run.keep=9", "--optimizer.learning-rate=0.002", "--optimizer.clip-norm=1.0",
)  # fmt: skip
KINDS = ("weight", "momentum", "exp_avg", "exp_avg_sq")
VIRTUAL = "--engine.virtual-processes=2"


def run_of(launcher: Launcher, scenes: Path, folder: Path, *words: str) -> Path:
    run = folder / launcher.name
    train(launcher, run, f"--data.train={scenes / 'train'}", *MUON, *words)
    return run


@pytest.fixture(scope="module")
def virtual(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(ALONE, scenes, tmp_path_factory.mktemp("virtual"), VIRTUAL)


def test_a_checkpoint_has_one_moment_of_matrices_and_two_of_others(virtual: Path) -> None:
    saved = saved_tensors(virtual)
    weights = {name.removeprefix("weight/") for name in saved if name.startswith("weight/")}
    matrices = {name.removeprefix("momentum/") for name in saved if name.startswith("momentum/")}
    assert len(matrices) == 8  # a block of each tower
    for kind in ("exp_avg", "exp_avg_sq"):
        assert {n.removeprefix(f"{kind}/") for n in saved if n.startswith(f"{kind}/")} == (
            weights - matrices
        )
    assert losses(virtual)[6] < losses(virtual)[1]


@pytest.fixture(scope="module")
def pieces(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(zero(1, processes=1), scenes, tmp_path_factory.mktemp("pieces"), VIRTUAL)


@pytest.mark.parametrize(
    ("launcher", "like"),
    [(DDP, "virtual"), (zero(0), "virtual"), (zero(1), "pieces"), (zero(2), "pieces")],
    ids=lambda one: getattr(one, "name", one),
)
def test_the_same_gradients_give_the_same_bits(
    launcher: Launcher, like: str, request: pytest.FixtureRequest, scenes: Path, tmp_path: Path
) -> None:
    run = run_of(launcher, scenes, tmp_path, VIRTUAL)
    left, right = saved_tensors(request.getfixturevalue(like)), saved_tensors(run)
    assert largest_difference(left, right, KINDS) == 0.0


def test_both_kinds_of_adamw_end_near_each_other(virtual: Path, pieces: Path) -> None:
    # the rounding of AdamW's kernels reaches what is made orthogonal in bfloat16
    assert losses(pieces) == pytest.approx(losses(virtual), rel=1e-4)
    left, right = saved_tensors(virtual), saved_tensors(pieces)
    assert largest_difference(left, right, ("weight",)) < 1e-3


def test_stage_3_agrees_and_goes_on_bit_for_bit(
    virtual: Path, scenes: Path, tmp_path: Path
) -> None:
    run = run_of(zero(3), scenes, tmp_path)
    assert losses(run) == pytest.approx(losses(virtual), abs=1e-3)
    whole = saved_tensors(run)
    shutil.rmtree(newest(run))
    run_of(zero(3), scenes, tmp_path)
    assert largest_difference(saved_tensors(run), whole, KINDS) == 0.0


def test_another_optimizer_is_another_recipe_by_the_name_of_its_class(
    virtual: Path, scenes: Path
) -> None:
    words = (f"--data.train={scenes / 'train'}", *MUON[1:], VIRTUAL)
    said = train(ALONE, virtual, *words, expect=2)
    assert "(optimizer.type was 'frugal.common.optim.muon.Muon' and is now 'frugal.common" in said
