"""Measuring a model on some tasks: nothing else is replaced, and every number is written."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from frugal.common.contracts import EvaluationTask
from frugal.common.distributed import gather_objects
from frugal.common.errors import InputError
from frugal.common.evaluation.bootstrap import SampleResults
from frugal.common.evaluation.cli import Options
from frugal.common.evaluation.linear_probe import LinearProbe
from frugal.common.evaluation.provenance import config_digest, versions, weights_digest
from frugal.common.evaluation.results import (
    Subject,
    append,
    check_free,
    rows,
    suite_numbers,
    write,
)
from frugal.common.evaluation.suites import SUITES
from frugal.common.files import write_json
from frugal.common.models.bundle import ModelBundle
from frugal.common.run import Run


def measure_all(
    tasks: list[EvaluationTask],
    bundle: ModelBundle,
    run: Run,
    options: Options,
    own: tuple[EvaluationTask, ...],
    url: str | None,
) -> None:
    """Measure a model on every task; write and print what is found, task by task.

    Every process of the run must call this.

    Args:
        tasks: whose data are there.
        bundle: on the device of the run.
        run: where it runs; evaluation/ in its directory takes the files, unless options say so.
        options: of the command line.
        own: what the run of the model measures itself on.
        url: that the data came from, if anywhere.

    Raises:
        InputError: if other measurements would be replaced, or a task cannot be measured.
    """
    out = options.out or run.dir / "evaluation"
    subject = _subject(options, bundle, run, url) if run.is_main else None
    is_own = out.resolve() == (run.dir / "evaluation").resolve()
    trained_on = {task.name: str(task.data) for task in own} if is_own else {}
    _check_free(tasks, subject, bundle, out, trained_on)
    scores: dict[str, float] = {}
    for task in tasks:
        if isinstance(task, LinearProbe) and task.features is None:
            task = replace(task, features=out / "features")
        numbers, outcomes = measure(task, bundle, run, out)
        if subject is not None:
            _report(task, numbers, outcomes, subject, bundle, out, options.csv)
        if (score := _headline(task, numbers)) is not None:
            scores[task.name] = score
    if run.is_main:
        _report_suites(options, scores, out, _head(bundle))


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


def measure(
    task: EvaluationTask, bundle: ModelBundle, run: Run, out: Path
) -> tuple[dict[str, Any], SampleResults | None]:
    """The numbers of a task, and what it found image by image where it keeps that.

    Files that a task writes beside its numbers, as training has them in the run directory, go
    where the numbers go.
    """
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
