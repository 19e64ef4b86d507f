"""The evaluations of a recipe, run on the model while it is trained."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from frugal.common.contracts import EvaluationTask
from frugal.common.distributed import gather_objects
from frugal.common.engine.engine import Engine
from frugal.common.engine.logger import MetricsLogger
from frugal.common.engine.saving import WeightAverage
from frugal.common.errors import InputError, NotFiniteError
from frugal.common.files import finite, read_json_object, reason_of, write_json
from frugal.common.recipe import Recipe
from frugal.common.recipe_json import recipe_if_whole
from frugal.common.run import Run
from frugal.common.weights.runs import bundle_of

HISTORY = "history.jsonl"
"""In ``evaluation/`` of a run: a line for every time that an evaluation ran, in their order."""


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Runs the evaluations of a recipe and writes ``evaluation/<name>.json``."""

    recipe: Recipe
    run: Run
    engine: Engine
    average: WeightAverage | None
    logger: MetricsLogger
    last_step: float
    """The step after which all of them were last run, from :func:`last_evaluated`."""

    def evaluate(self, step: int) -> dict[str, Any]:
        """Run every evaluation after a step; every process calls this.

        Returns:
            All numbers by name, the same on every process.

        Raises:
            NotFiniteError: if the model computes none.
        """
        recipe, run, model = self.recipe, self.run, self.engine.objective.model
        if not recipe.evaluation:
            return {}

        def show(name: str, image: Any) -> None:
            self.logger.picture(f"evaluation/{name}", image, step)

        results, failure = dict[str, Any](), None
        averaged = self.average.applied() if self.average else contextlib.nullcontext()
        model.eval()
        bundle = bundle_of(model, recipe)
        with self.engine.whole_weights(), averaged, torch.inference_mode():
            try:
                for task in recipe.evaluation:
                    shown = show if run.is_main else None
                    results[task.name] = task.evaluate(bundle, run, show=shown)
            except NotFiniteError as error:
                failure = error  # the weights go back first: the run may go on from older ones
        model.train()
        if failure is not None:
            raise failure
        if run.is_main:
            for task in recipe.evaluation:
                if numbers := results[task.name]:  # else it was given no data
                    self._write(task, step, numbers)
        return {name: value for numbers in results.values() for name, value in numbers.items()}

    def _write(self, task: EvaluationTask, step: int, numbers: dict[str, Any]) -> None:
        samples = step * self.recipe.batch_size
        head = {"step": step, "samples": samples, "data": _data_of(task)}
        try:
            write_json(self.run.dir / "evaluation" / f"{task.name}.json", {**head, **numbers})
        except InputError as error:
            if step == self.recipe.steps:
                raise
            self.run.log.warning("%s; training goes on", error)
        self._remember({"task": task.name, **head, **numbers})
        self.logger.numbers(step, numbers)

    def _remember(self, numbers: dict[str, Any]) -> None:
        """Add what an evaluation found to those before it."""
        path = self.run.dir / "evaluation" / HISTORY
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(finite(numbers)) + "\n")
        except OSError as error:
            self.run.log.warning("%s: %s; training goes on without it", path, reason_of(error))


def last_evaluated(recipe: Recipe, run: Run) -> float:
    """The step after which every evaluation that is given data has run on it, on all processes.

    -1 before the first, infinity where none is given data.

    Raises:
        InputError: if the numbers of a finished run would be replaced by those of other data.
    """
    steps: list[float] = [math.inf]  # none is given data: nothing is missed
    saved = recipe_if_whole(run.dir / "recipe.json")
    trained_on = {task.name: _data_of(task) for task in saved.evaluation} if saved else {}
    for number, task in enumerate(recipe.evaluation):
        if not task.has_data:
            continue
        file, data = run.dir / "evaluation" / f"{task.name}.json", _data_of(task)
        try:
            before = read_json_object(file) if file.exists() else {}
        except InputError:
            before = {}  # cut in two by a crash
        step = before.get("step", -1)
        known = before.get("data", trained_on.get(task.name, data))
        if step == recipe.steps and _place(known) != _place(data):
            raise InputError(
                f"{file} holds what this run was measured at on {known}, which {data} would "
                f"replace; give the evaluation a name of its own with --evaluation.{number}.name"
            )
        steps.append(step)
    return gather_objects(min(steps))[0]


def _data_of(task: EvaluationTask) -> str | None:
    return None if task.data is None else str(task.data)


def _place(data: str | None) -> Path | None:
    """Where data lies, however it is written; earlier versions wrote ``None`` for none."""
    return None if data in (None, "None") else Path(data).resolve()
