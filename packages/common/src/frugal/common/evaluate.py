"""Measure a trained model: ``python -m frugal.common.evaluate --checkpoint runs/l16 ...``."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from frugal.common.commands import run_politely
from frugal.common.evaluation.config import Retrieval, ZeroShot
from frugal.common.recipe import Recipe, load_recipe
from frugal.common.run import Run

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Options:
    """Evaluate a run of any method; under torchrun or deepspeed, on several processes."""

    checkpoint: Path
    """A run directory, or one of its checkpoints."""
    data: Path
    """A scenes folder, class-per-folder images, or clip_benchmark's webdataset layout."""
    tasks: tuple[Literal["zero-shot", "retrieval"], ...] = ("zero-shot", "retrieval")
    """What to measure."""
    templates: Literal["data", "imagenet_7", "imagenet_80", "name"] = "data"
    """Prompts of zero-shot classification; data: those the data comes with."""
    class_names: Literal["data", "imagenet"] = "data"
    """Names of zero-shot classification."""
    out: Path | None = None
    """Folder for one JSON file per task; by default evaluation/ in the run directory."""
    batch_size: int = 256
    """Images, or texts, per process at a time."""
    workers: int = 2
    """Processes that decode images, per process."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


def load_trained(path: Path, *, device: Literal["auto", "cpu", "cuda"] = "auto") -> Trained:
    """The model of a run, with the moving average of its weights where the run kept one.

    Args:
        path: a run directory, or one of its checkpoints.
        device: where the model goes.

    Raises:
        InputError: if there is no whole checkpoint.
    """
    from frugal.common.checkpoint.store import find_checkpoint
    from frugal.common.checkpoint.warm_start import warm_start
    from frugal.common.train import open_run

    checkpoint = find_checkpoint(path)
    folder = checkpoint.folder.parent.parent
    recipe = load_recipe(folder / "recipe.json")
    recipe = replace(
        recipe,
        run=replace(recipe.run, dir=folder),
        engine=replace(recipe.engine, device=device, compile=False),
    )
    run = open_run(recipe)
    objective = recipe.objective.build(recipe)
    warm_start(objective, path, resample=None, log=run.log)
    return Trained(recipe, run, objective.to(run.device).model.eval(), checkpoint.step)


@dataclass(frozen=True)
class Trained:
    """A trained model and what is known of it."""

    recipe: Recipe
    run: Run
    model: nn.Module
    step: int


def evaluate(options: Options) -> None:
    """Measure, write one JSON file per task, and print a table."""
    import torch

    tasks = [_task(name, options) for name in options.tasks]
    for task in tasks:
        task.folder()
    trained = load_trained(options.checkpoint, device=options.device)
    run = trained.run
    if run.world_size > 1:
        torch.distributed.init_process_group("nccl" if run.device.type == "cuda" else "gloo")
    out = options.out or run.dir / "evaluation"
    for task in tasks:
        with torch.inference_mode():
            numbers = task.evaluate(trained.model, trained.recipe, run)
        if run.is_main:
            _report(task.name, numbers, out, trained, options)
    if run.world_size > 1:
        torch.distributed.destroy_process_group()


def _task(name: str, options: Options) -> Any:
    common: dict[str, Any] = {
        "data": options.data,
        "batch_size": options.batch_size,
        "workers": options.workers,
    }
    if name == "retrieval":
        return Retrieval(**common)
    return ZeroShot(**common, templates=options.templates, class_names=options.class_names)


def _report(
    name: str, numbers: dict[str, Any], out: Path, trained: Trained, options: Options
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    content = {
        "step": trained.step,
        "samples": trained.step * trained.recipe.batch_size,
        "data": str(options.data),
        **numbers,
    }
    (out / f"{name}.json").write_text(json.dumps(content, indent=2))
    for key, value in numbers.items():
        shown = f"{value:8.2%}" if isinstance(value, float) else f"{value:8,}"
        sys.stdout.write(f"{key:>40}  {shown}\n")


def main() -> None:
    """The body of ``python -m frugal.common.evaluate``."""
    run_politely(lambda: evaluate(tyro.cli(Options, prog="python -m frugal.common.evaluate")))


if __name__ == "__main__":
    main()
