"""Runs of a few numbers, and stages that start from them."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import torch

from frugal.common.checkpoint.init_from import init_from
from frugal.common.checkpoint.store import CheckpointStore
from frugal.common.recipe import Recipe
from frugal.common.recipe_json import to_json
from frugal.common.run import Run
from frugal.flip.recipes import demo

LOG = logging.getLogger("test")


def recipe_of(*, seed: int = 0, length: int = 8, **image) -> Recipe:
    """FLIP's demo with towers of a few numbers."""
    recipe = demo()
    small = {"width": 16, "depth": 1, "heads": 2, "mlp_width": 16}
    model = recipe.model
    return replace(
        recipe,
        model=replace(
            model,
            image=replace(model.image, **{**small, **image}),
            text=replace(model.text, **small, vocabulary=30, length=length),
            embed_dim=8,
        ),
        run=replace(recipe.run, seed=seed),
    )


def saved(folder: Path, recipe: Recipe, *, kept: bool = False) -> dict[str, torch.Tensor]:
    """Write a run of freshly drawn weights, its recipe in the checkpoint too; what it holds."""
    weights = recipe.objective.build(recipe).state_dict()
    store = CheckpointStore(Run(folder, 0, 1, 0, torch.device("cpu"), LOG), keep=1)
    tensors = {f"weight/{name}": tensor for name, tensor in weights.items()}
    store.save(tensors, {"step": 3, "recipe": to_json(recipe)} if kept else {"step": 3})
    (folder / "recipe.json").write_text(json.dumps(to_json(recipe)))
    return weights


def started(source: Path, recipe: Recipe, *, interpolate: bool = True) -> torch.nn.Module:
    objective = recipe.objective.build(recipe)
    init_from(objective, source, interpolate=interpolate, log=LOG)
    return objective
