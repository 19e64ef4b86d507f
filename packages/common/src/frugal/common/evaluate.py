"""Measure a trained model: ``python -m frugal.common.evaluate --checkpoint runs/l16 ...``."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path

from frugal.common.checkpoint.store import run_directory
from frugal.common.cli import (
    AS_CHANGES,
    as_flags,
    named_recipe,
    overridden,
    read_options,
    run_politely,
)
from frugal.common.contracts import EvaluationTask
from frugal.common.data.contents import also_noted
from frugal.common.distributed import leave_process_group
from frugal.common.engine.watchdog import Watchdog
from frugal.common.errors import InputError
from frugal.common.evaluation.cli import Options, chosen_tasks, chosen_trainings, transfer_tasks
from frugal.common.evaluation.measure import measure_all
from frugal.common.evaluation.provenance import weights_digest
from frugal.common.evaluation.remote import as_url, fetch
from frugal.common.evaluation.task import FolderEvaluation
from frugal.common.models.bundle import ModelBundle
from frugal.common.ranges import check_ranges
from frugal.common.recipe import Recipe
from frugal.common.run import join, open_run
from frugal.common.train import START_FROM, train_recipe
from frugal.common.transfer.tasks import TransferTask
from frugal.common.weights.libraries import is_run
from frugal.common.weights.load import load_model
from frugal.common.weights.runs import recipe_if_any


def evaluate(options: Options, *, own: tuple[EvaluationTask, ...] | None = None) -> None:
    """Measure, write one JSON file per task, and print a table.

    Args:
        options: of the command line.
        own: what the run measures itself on, where that is not as its recipe.json says.
    """
    check_ranges(options)
    run = open_run(_folder(options), options.device)
    bundle = load_model(options.checkpoint, name=options.model, weights_key=options.weights_key)
    if options.precision is not None:
        bundle = replace(bundle, precision=options.precision)
    options, url = _with_data(options)
    own = _own_tasks(options) if own is None else own
    tasks = chosen_tasks(options, bundle, own)
    out = options.out or run.dir / "evaluation"
    trainings = [_training(word, options, out) for word in chosen_trainings(options)]
    for training in trainings:
        _refuse_other_start(training.recipe, bundle)
    start = copy.deepcopy(bundle) if trainings else bundle  # as it was loaded, on the CPU
    for task in tasks:
        task.folder()
    if tasks:
        bundle.model.to(run.device)
        join(run, minutes=options.rendezvous_minutes)
        watchdog = Watchdog(
            run,
            minutes=options.stall_minutes,
            remedy="--stall-minutes; what was measured before is written",
        )
        watchdog.note("evaluating")
        measure_all(tasks, bundle, run, options, own, url)
        watchdog.close()
    leave_process_group()
    for training in trainings:
        _train_and_measure(training, start, replace(options, out=out))


def _folder(options: Options) -> Path:
    """Whose evaluations/ those of a model are: its run's, or the one beside a file, of its name."""
    path = options.checkpoint
    if is_run(path, options.model):
        return run_directory(path)
    return path if path.is_dir() else path.with_suffix("")


def _own_tasks(options: Options) -> tuple[EvaluationTask, ...]:
    """What a run measures itself on; nothing of a model that was trained elsewhere."""
    path = options.checkpoint
    recipe = recipe_if_any(path) if is_run(path, options.model) else None
    return () if recipe is None else recipe.evaluation


@dataclass(frozen=True)
class _Training:
    """What a task trains on top of the tower of a model, and the evaluation that measures it."""

    word: str
    """Of the task."""
    evaluation: str
    """The name of one of the recipe's."""
    recipe: Recipe


def _training(word: str, options: Options, out: Path) -> _Training:
    """What the command line asks a task to train.

    Raises:
        InputError: if a recipe or data is not named, or not there, or cannot be changed so.
    """
    task: TransferTask = transfer_tasks()[word].load()
    if options.transfer.recipe is None:
        raise InputError(
            f"{word} trains on top of {options.checkpoint}: say how with --transfer.recipe, one of "
            f"{', '.join(task.recipes)}"
        )
    if options.data is None:
        raise InputError(f"{word} needs --data: a folder to train and to measure on")
    recipe, _ = named_recipe(task.recipes, options.transfer.recipe)
    recipe = task.on(recipe, options.checkpoint, options.data, out / _name(word))
    recipe = replace(recipe, engine=replace(recipe.engine, device=options.device))
    changes = as_flags(options.transfer.changes, "--transfer.changes")
    called = (
        f"python -m frugal.common.evaluate --tasks {word} --transfer.recipe "
        f"{options.transfer.recipe} --transfer.changes"
    )
    changed = overridden(recipe, changes, program=called)
    if changed.run.start_from != recipe.run.start_from:
        raise InputError(
            f"--transfer.changes gives run.start-from, but {word} trains on top of what "
            f"--checkpoint names, {options.checkpoint}; leave it out, or give another --checkpoint"
        )
    return _Training(word, task.evaluation, changed)


def _name(word: str) -> str:
    """What the numbers and the run directory of a task are called."""
    return word.replace("-", "_")


def _refuse_other_start(recipe: Recipe, bundle: ModelBundle) -> None:
    """Refuse to go on with, or measure again, what was trained on top of other weights.

    Raises:
        InputError: naming the run directory of that training.
    """
    folder = recipe.run.dir
    assert folder is not None
    before = also_noted(folder).get(START_FROM)
    if before is not None and before != weights_digest(bundle.model):
        raise InputError(
            f"{folder} holds what was trained on top of other weights than those of "
            f"{bundle.source.path} now; choose another --out, or remove that folder"
        )


def _train_and_measure(training: _Training, start: ModelBundle, options: Options) -> None:
    """Train on top of the tower, or go on where that was interrupted, then measure the best.

    As this command says, also what was trained by an earlier one, whose recipe is kept.
    """
    recipe = training.recipe
    try:
        train_recipe(recipe, start=start)
    except InputError as error:
        hint = f"; a flag of the recipe goes behind --transfer.changes as {AS_CHANGES}"
        raise InputError(f"{error}{hint if ' --' in str(error) else ''}") from None
    folder = recipe.run.dir
    assert folder is not None
    best = folder / "checkpoints" / "best.json"
    measured = recipe.evaluation[0]
    assert isinstance(measured, FolderEvaluation)
    evaluate(
        Options(
            checkpoint=best if best.is_file() else folder,
            data=measured.data,
            tasks=(training.evaluation,),
            name=options.name or _name(training.word),
            out=options.out,
            csv=options.csv,
            rendezvous_minutes=options.rendezvous_minutes,
            stall_minutes=options.stall_minutes,
            batch_size=options.batch_size,
            workers=options.workers,
            device=options.device,
            precision=options.precision,
        ),
        own=recipe.evaluation,
    )


def _with_data(options: Options) -> tuple[Options, str | None]:
    """The same with remote data copied to this machine, and the URL that it came from."""
    url = None if options.data is None else as_url(options.data)
    if url is None:
        return options, None
    trains = "linear-probe" in (options.tasks or ()) or chosen_trainings(options)
    splits = ["test", "train"] if trains else ["test"]
    return replace(options, data=fetch(url, splits)), url


def main() -> None:
    """The body of ``python -m frugal.common.evaluate``."""

    def command() -> None:
        evaluate(read_options(Options, "python -m frugal.common.evaluate"))

    run_politely(command)


if __name__ == "__main__":
    main()
