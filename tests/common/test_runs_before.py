"""Runs that an earlier version wrote load, go on, and end where they would have ended."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from frugal.common.recipe_json import load_recipe
from frugal.common.train import train_recipe
from support import ROOT, largest_difference, losses, newest, saved_tensors

BEFORE = Path("tests/golden/runs_before")
RUNS = ("flip", "clipa", "cluster_masking", "milan", "milan_finetune", "cit")


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_an_earlier_version_ends_in_the_weights_it_would_have_had(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)  # the recipes name their data from there
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = tmp_path / name
    shutil.copytree(BEFORE / name, run)
    recipe = load_recipe(run / "recipe.json")
    train_recipe(replace(recipe, run=replace(recipe.run, dir=run)))
    assert list(losses(run)) == [1, 2, 3, 4]
    assert newest(run).name == "step_000000004"
    ended = {n: t for n, t in saved_tensors(run).items() if n.startswith("weight/")}
    # another processor may round otherwise; a step that differs moves weights by 1e-3
    assert largest_difference(ended, load_file(run / "final.safetensors")) < 2e-5
