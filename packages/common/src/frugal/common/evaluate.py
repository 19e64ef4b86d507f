"""Measure a trained model: ``python -m frugal.common.evaluate --checkpoint runs/l16 ...``."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from frugal.common.commands import run_politely, without_local_rank
from frugal.common.data.tokenizers import SavedTokenizer
from frugal.common.errors import InputError
from frugal.common.evaluation.config import Compositional, ImageEvaluation, Retrieval, ZeroShot
from frugal.common.evaluation.contrasts import has_contrasts
from frugal.common.recipe import Recipe, load_recipe, to_json
from frugal.common.run import Run

if TYPE_CHECKING:
    from torch import nn

    from frugal.common.checkpoint.store import Checkpoint

_KINDS: dict[str, type[ZeroShot] | type[Retrieval] | type[Compositional]] = {
    "zero-shot": ZeroShot,
    "retrieval": Retrieval,
    "compositional": Compositional,
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Evaluate a run of any method; under torchrun or deepspeed, on several processes.

    What is not given here is as the run's recipe evaluates: its crop, prompts, masks and data.
    """

    checkpoint: Path
    """A run directory, or one of its checkpoints."""
    data: Path | None = None
    """A scenes folder, class-per-folder images, clip_benchmark's webdataset layout, or SugarCrepe's
    JSON files; by default what the recipe's own evaluations name."""
    tasks: tuple[Literal["zero-shot", "retrieval", "compositional"], ...] | None = None
    """What to measure; by default everything, but compositional only where the data has its
    files."""
    name: str | None = None
    """Of the JSON file and first part of the name of every number, where one task is measured."""
    templates: Literal["data", "imagenet_7", "imagenet_80", "name"] | None = None
    """Prompts of zero-shot classification; data: those the data comes with."""
    class_names: Literal["data", "imagenet"] | None = None
    """Names of zero-shot classification."""
    reduce_prompts: bool | None = None
    """Shorten prompts of zero-shot classification as the recipe shortens captions in training."""
    images: Path | None = None
    """Folder of the images that SugarCrepe's JSON files name (COCO's val2017); by default images/
    or val2017/ beside them, or their own folder."""
    published: bool = False
    """Crop and resize the images as the method's published numbers were measured."""
    mask_ratio: float | None = None
    """Fraction of the patches that the image tower does not see."""
    views: int | None = None
    """Masked views of every image, whose embeddings are averaged."""
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
    return _load(*_find(path), device=device)


def _find(path: Path) -> tuple[Checkpoint, Recipe]:
    """A checkpoint and the recipe of its run, with the folder where that lies now."""
    from frugal.common.checkpoint.store import find_checkpoint

    checkpoint = find_checkpoint(path)
    folder = checkpoint.folder.parent.parent
    recipe = load_recipe(folder / "recipe.json")
    return checkpoint, replace(recipe, run=replace(recipe.run, dir=folder))


def _load(
    checkpoint: Checkpoint, recipe: Recipe, *, device: Literal["auto", "cpu", "cuda"]
) -> Trained:
    from frugal.common.checkpoint.warm_start import warm_start
    from frugal.common.train import open_run

    recipe = replace(recipe, engine=replace(recipe.engine, device=device, compile=False))
    run = open_run(recipe)
    objective = recipe.objective.build(recipe)
    warm_start(objective, checkpoint.folder, resample=None, log=run.log)
    data: Any = recipe.data
    if getattr(data, "tokenizer", None) is not None and (run.dir / "tokenizer").is_dir():
        # what the recipe names may lie on another machine, or on the hub
        saved = SavedTokenizer(folder=run.dir / "tokenizer")
        recipe = replace(recipe, data=replace(data, tokenizer=saved))
    objective = objective.to(run.device).eval()
    return Trained(recipe, run, objective.model, checkpoint.step, objective)


@dataclass(frozen=True)
class Trained:
    """A trained model and what is known of it."""

    recipe: Recipe
    run: Run
    model: nn.Module
    step: int
    objective: Any
    """What trained the model, and holds it."""


def evaluate(options: Options) -> None:
    """Measure, write one JSON file per task, and print a table."""
    import torch

    checkpoint, recipe = _find(options.checkpoint)
    _refuse_without_text(options.checkpoint, recipe)
    tasks = chosen_tasks(options, recipe)
    for task in tasks:
        task.folder()
    trained = _load(checkpoint, recipe, device=options.device)
    run = trained.run
    if run.world_size > 1:
        torch.distributed.init_process_group("nccl" if run.device.type == "cuda" else "gloo")
    out = options.out or run.dir / "evaluation"
    for task in tasks:
        with torch.inference_mode():
            numbers = task.evaluate(trained.model, trained.recipe, run)
        if run.is_main:
            _report(task, numbers, out, trained)
    if run.world_size > 1:
        torch.distributed.destroy_process_group()


def _refuse_without_text(path: Path, recipe: Recipe) -> None:
    """An image tower alone is measured by what is trained on top of it."""
    if hasattr(recipe.model, "text"):
        return
    measured = "what it was measured at while it trained stands in its evaluation/, and "
    raise InputError(
        f"{path} trained a {type(recipe.model).__name__} without a text tower, which every task "
        f"of this command needs; {measured if recipe.evaluation else ''}its encoder is measured "
        f"by python -m frugal.milan.linear_probe or frugal.milan.finetune with --run.start-from "
        f"{path}"
    )


def chosen_tasks(options: Options, recipe: Recipe) -> list[ImageEvaluation]:
    """The evaluations of a recipe that the command line asks for, with what it says differently.

    Given data, one of each kind; the recipe's first, or one with its defaults where it has none.
    Without, all of the recipe's that have data.

    Raises:
        InputError: if there is nothing to measure, or a flag would have no effect.
    """
    words = _words(options)
    tasks: list[ImageEvaluation] = []
    for kind in (_KINDS[word] for word in words):
        own = [task for task in recipe.evaluation if isinstance(task, kind)]
        if options.data is None:
            tasks += [task for task in own if task.data is not None]
        else:
            tasks.append(own[0] if own else kind())
    if not tasks:
        raise InputError(
            f"there is nothing to measure: the recipe of {options.checkpoint} names no data for "
            f"{' or '.join(words)}; give --data"
        )
    if options.name is not None and len(tasks) > 1:
        raise InputError(
            f"--name {options.name} is for one evaluation, but there are {len(tasks)}; choose "
            "one with --tasks"
        )
    _check_flags(options, tasks)
    return [_as_asked(task, options) for task in tasks]


def _words(options: Options) -> list[str]:
    """The kinds of tasks to look at."""
    if options.tasks is not None:
        if not options.tasks:
            raise InputError(f"--tasks is empty; choose from {', '.join(_KINDS)}")
        return list(dict.fromkeys(options.tasks))
    data = options.data
    if data is None or options.images is not None or has_contrasts(data):
        return list(_KINDS)
    return [word for word, kind in _KINDS.items() if kind is not Compositional]


def _check_flags(options: Options, tasks: list[ImageEvaluation]) -> None:
    """Refuse flags that none of the tasks reads."""
    asks = any(isinstance(task, ZeroShot) for task in tasks)
    prompting = (options.templates, options.class_names, options.reduce_prompts)
    if not asks and any(option is not None for option in prompting):
        raise InputError(
            "--templates, --class-names and --reduce-prompts are for zero-shot classification; "
            "add zero-shot to --tasks, or leave them out"
        )
    compares = any(isinstance(task, Compositional) for task in tasks)
    if not compares and options.images is not None:
        raise InputError(
            "--images is for the images of the task compositional; add it to --tasks, or leave "
            "--images out"
        )


def _as_asked(task: ImageEvaluation, options: Options) -> ImageEvaluation:
    fields = ["data", "name", "mask_ratio", "views", "batch_size", "workers"]
    if isinstance(task, ZeroShot):
        fields += ["templates", "class_names", "reduce_prompts"]
    if isinstance(task, Compositional):
        fields.append("images")
    given = {field: getattr(options, field) for field in fields}
    changes = {field: value for field, value in given.items() if value is not None}
    if options.published:
        if task.published_crop is None:
            raise InputError(
                f"the recipe of {options.checkpoint} does not say how images were prepared for "
                f"published numbers of {task.name}; leave out --published"
            )
        changes["crop"] = task.published_crop
    return replace(task, **changes)


def _report(task: ImageEvaluation, numbers: dict[str, Any], out: Path, trained: Trained) -> None:
    out.mkdir(parents=True, exist_ok=True)
    content = {
        "step": trained.step,
        "samples": trained.step * trained.recipe.batch_size,
        "data": str(task.data),
        **numbers,
        f"{task.name}_settings": to_json(task),
    }
    (out / f"{task.name}.json").write_text(json.dumps(content, indent=2))
    for key, value in numbers.items():
        shown = f"{value:8.2%}" if isinstance(value, float) else f"{value:8,}"
        sys.stdout.write(f"{key:>40}  {shown}\n")


def main() -> None:
    """The body of ``python -m frugal.common.evaluate``."""

    def command() -> None:
        words = without_local_rank(sys.argv[1:])
        evaluate(tyro.cli(Options, args=words, prog="python -m frugal.common.evaluate"))

    run_politely(command)


if __name__ == "__main__":
    main()
