"""Measure a trained model: ``python -m frugal.common.evaluate --checkpoint runs/l16 ...``."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import tyro

from frugal.common.checkpoint.store import find_checkpoint
from frugal.common.cli import named_recipe, overridden, run_politely, without_local_rank
from frugal.common.contracts import EvaluationTask
from frugal.common.distributed import gather_objects, leave_process_group
from frugal.common.errors import InputError
from frugal.common.evaluation.bootstrap import SampleResults
from frugal.common.evaluation.cli import Options, chosen_tasks, chosen_trainings, transfer_tasks
from frugal.common.evaluation.linear_probe import LinearProbe
from frugal.common.evaluation.provenance import config_digest, versions, weights_digest
from frugal.common.evaluation.remote import as_url, fetch
from frugal.common.evaluation.results import (
    Subject,
    append,
    check_free,
    rows,
    suite_numbers,
    write,
)
from frugal.common.evaluation.suites import SUITES
from frugal.common.evaluation.task import FolderEvaluation
from frugal.common.files import write_json
from frugal.common.models.bundle import ModelBundle
from frugal.common.recipe import Recipe
from frugal.common.run import Run
from frugal.common.train import join, open_process, train_recipe
from frugal.common.transfer.tasks import TransferTask
from frugal.common.weights.libraries import is_foreign
from frugal.common.weights.load import load_model
from frugal.common.weights.runs import recipe_if_any
from frugal.common.words import command_words


def evaluate(options: Options) -> None:
    """Measure, write one JSON file per task, and print a table."""
    run = open_process(_folder(options.checkpoint), options.device)
    bundle = load_model(options.checkpoint, name=options.model, weights_key=options.weights_key)
    if options.precision is not None:
        bundle = replace(bundle, precision=options.precision)
    options, url = _with_data(options)
    own = own_tasks(options.checkpoint)
    tasks = chosen_tasks(options, bundle, own)
    trainings = [_training(word, options, run.dir) for word in chosen_trainings(options)]
    for task in tasks:
        task.folder()
    if tasks:
        bundle.model.to(run.device)
        join(run)
        scores = _measure_all(tasks, bundle, run, options, own, url)
        if run.is_main:
            _report_suites(options, scores, _out(options, run), _head(bundle))
    leave_process_group()
    for evaluation, recipe in trainings:
        _train_and_measure(evaluation, recipe, options)


def _folder(path: Path) -> Path:
    """Whose evaluations/ those of a model are: its run's, or the one beside a file, of its name."""
    if is_foreign(path):
        return path if path.is_dir() else path.with_suffix("")
    return find_checkpoint(path).folder.parent.parent


def own_tasks(path: Path) -> tuple[EvaluationTask, ...]:
    """What a run measures itself on; nothing of a model that was trained elsewhere."""
    recipe = None if is_foreign(path) else recipe_if_any(path)
    return () if recipe is None else recipe.evaluation


def _training(word: str, options: Options, folder: Path) -> tuple[str, Recipe]:
    """What a task trains on top of the tower of a model, and the evaluation that measures it.

    Raises:
        InputError: if a recipe or data is not named, or not there.
    """
    task: TransferTask = transfer_tasks()[word].load()
    if options.recipe is None:
        raise InputError(
            f"{word} trains on top of {options.checkpoint}: say how with --recipe, one of "
            f"{', '.join(task.recipes)}"
        )
    if options.data is None:
        raise InputError(f"{word} needs --data: a folder to train and to measure on")
    out = options.out or folder / "evaluation"
    recipe = named_recipe(task.recipes, options.recipe)
    recipe = task.on(recipe, options.checkpoint, options.data, out / word.replace("-", "_"))
    recipe = replace(recipe, engine=replace(recipe.engine, device=options.device))
    changes = [f"--{given.removeprefix('--')}" for given in options.training]
    called = f"python -m frugal.common.evaluate --tasks {word} --recipe {options.recipe} --training"
    return task.evaluation, overridden(recipe, changes, program=called)


def _train_and_measure(evaluation: str, recipe: Recipe, options: Options) -> None:
    """Train on top of the tower, or go on where that was interrupted, then measure the best."""
    train_recipe(recipe)
    folder = recipe.run.dir
    assert folder is not None
    best = folder / "checkpoints" / "best.json"
    measured = recipe.evaluation[0]
    assert isinstance(measured, FolderEvaluation)
    evaluate(
        Options(
            checkpoint=best if best.is_file() else folder,
            data=measured.data,
            tasks=(evaluation,),
            name=options.name or folder.name,
            out=folder.parent,
            csv=options.csv,
            workers=options.workers,
            device=options.device,
            precision=options.precision,
        )
    )


def _out(options: Options, run: Run) -> Path:
    return options.out or run.dir / "evaluation"


def _measure_all(
    tasks: list[EvaluationTask],
    bundle: ModelBundle,
    run: Run,
    options: Options,
    own: tuple[EvaluationTask, ...],
    url: str | None,
) -> dict[str, float]:
    """Measure a model on every task, write and print what is found.

    Returns:
        The number that stands for each task that has one.
    """
    out = _out(options, run)
    subject = _subject(options, bundle, run, url) if run.is_main else None
    is_own = out.resolve() == (run.dir / "evaluation").resolve()
    trained_on = {task.name: str(task.data) for task in own} if is_own else {}
    _check_free(tasks, subject, bundle, out, trained_on)
    scores: dict[str, float] = {}
    for task in tasks:
        if isinstance(task, LinearProbe) and task.features is None:
            task = replace(task, features=out / "features")
        numbers, outcomes = _measure(task, bundle, run, out)
        if subject is not None:
            _report(task, numbers, outcomes, subject, bundle, out, options.csv)
        if (score := _headline(task, numbers)) is not None:
            scores[task.name] = score
    return scores


def _check_free(
    tasks: list[EvaluationTask],
    subject: Subject | None,
    bundle: ModelBundle,
    out: Path,
    trained_on: Mapping[str, str],
) -> None:
    """Refuse to replace other measurements, on every process alike."""
    problem = None
    if subject is not None:
        try:
            for task in tasks:
                check_free(task, subject, out, step=bundle.source.step, trained_on=trained_on)
        except InputError as error:
            problem = str(error)
    if (refused := gather_objects(problem)[0]) is not None:
        raise InputError(refused)


def _measure(
    task: EvaluationTask, bundle: ModelBundle, run: Run, out: Path
) -> tuple[dict[str, Any], SampleResults | None]:
    """The numbers of a task, and what it found image by image where it keeps that.

    Files that a task writes beside its numbers, as training has them in the run directory, go
    where the numbers go.
    """
    import torch

    kept: list[SampleResults] = []
    aside = out / f".{task.name}.measuring"
    keep = kept.append if run.is_main else None
    with torch.no_grad():  # a linear probe trains on top, which inference mode would not allow
        numbers = task.evaluate(bundle, replace(run, dir=aside), keep=keep)
    if run.is_main and aside.is_dir():
        for file in (aside / "evaluation").iterdir():
            file.replace(out / file.name)
        shutil.rmtree(aside)
    return numbers, kept[0] if kept else None


def _with_data(options: Options) -> tuple[Options, str | None]:
    """The same with remote data copied to this machine, and the URL that it came from."""
    url = None if options.data is None else as_url(options.data)
    if url is None:
        return options, None
    trains = "linear-probe" in (options.tasks or ()) or chosen_trainings(options)
    splits = ["test", "train"] if trains else ["test"]
    return replace(options, data=fetch(url, splits)), url


def _subject(options: Options, bundle: ModelBundle, run: Run, url: str | None) -> Subject:
    facts = {
        "checkpoint": str(options.checkpoint),
        "model": options.model,
        "library": bundle.source.library,
        "pretrained": bundle.source.name,
        "weights_sha256": weights_digest(bundle.model),
        "config_digest": config_digest(bundle),
        "device": run.device.type,
        "precision": bundle.precision,
        "processes": run.world_size,
        "data_url": url,
        "versions": versions(),
    }
    return Subject(str(options.checkpoint), bundle.source.name, facts)


def _report(
    task: EvaluationTask,
    numbers: Mapping[str, Any],
    outcomes: SampleResults | None,
    subject: Subject,
    bundle: ModelBundle,
    out: Path,
    table: Path | None,
) -> None:
    _print(numbers)  # first: what was measured is not lost with a full disk
    write(task, numbers, outcomes, subject, out, _head(bundle))
    if table_rows := rows(task, numbers, subject):
        append(table or out / "results.csv", table_rows)


def _head(bundle: ModelBundle) -> dict[str, int]:
    """Of every file: when in training the model was so."""
    step, samples = bundle.source.step, bundle.source.samples
    return {} if step is None or samples is None else {"step": step, "samples": samples}


def _headline(task: EvaluationTask, numbers: Mapping[str, Any]) -> float | None:
    """The number that stands for a task in the mean of its suite."""
    return numbers.get(f"{task.name}_score", numbers.get(f"{task.name}_top1"))


def _report_suites(
    options: Options, scores: Mapping[str, float], out: Path, head: Mapping[str, Any]
) -> None:
    for word in options.tasks or ():
        if word in SUITES:
            own = {name: scores[name] for name in SUITES[word] if name in scores}
            numbers = suite_numbers(word, own, SUITES[word])
            _print(numbers)
            write_json(out / f"{word.replace('-', '_')}.json", {**head, **numbers})


def _print(numbers: Mapping[str, Any]) -> None:
    for key, value in numbers.items():
        if isinstance(value, (int, float)):
            shown = f"{value:8.2%}" if isinstance(value, float) else f"{value:8,}"
            if key.endswith(("weight_decay", "_loss")):
                shown = f"{value:8.3g}"
            sys.stdout.write(f"{key:>40}  {shown}\n")


def main() -> None:
    """The body of ``python -m frugal.common.evaluate``."""

    def command() -> None:
        words = without_local_rank(command_words())
        evaluate(tyro.cli(Options, args=words, prog="python -m frugal.common.evaluate"))

    run_politely(command)


if __name__ == "__main__":
    main()
