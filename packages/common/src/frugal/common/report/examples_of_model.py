"""What a report shows of the model of a run, and of what its first stage trained it on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frugal.common.contracts import EvaluationTask, Objective
from frugal.common.data.benchmark_layout import is_multi_labeled
from frugal.common.distributed import Ranks
from frugal.common.errors import InputError
from frugal.common.evaluation.compositional import Compositional, open_contrasts
from frugal.common.evaluation.embed import Embedder, evaluating
from frugal.common.evaluation.pictures import as_array
from frugal.common.evaluation.prompts import class_embeddings
from frugal.common.evaluation.retrieval import Retrieval, open_captioned
from frugal.common.evaluation.zero_shot import ZeroShot, classify, open_dataset
from frugal.common.models.bundle import ModelBundle
from frugal.common.randomness import SampleNoise
from frugal.common.recipe import Recipe
from frugal.common.recipe_json import load_recipe
from frugal.common.reduction.image import ImageReduction, PatchView
from frugal.common.report.examples import (
    Drawing,
    Example,
    Examples,
    compositional_examples,
    confusions,
    masked_examples,
    recall_by_class,
    retrieval_examples,
    zero_shot_examples,
)
from frugal.common.run import Run, make_logger, open_run
from frugal.common.weights.load import load_model
from frugal.common.weights.runs import open_checkpoint, trained_objective


def examples_of_model(
    bundle: ModelBundle,
    tasks: Sequence[EvaluationTask],
    run: Run,
    *,
    reduction: ImageReduction,
    count: int = 12,
) -> Examples:
    """Examples from the first task of each kind that has data.

    Every process that calls this computes it all; where ``torch.distributed`` runs, all of its
    processes must (opening the data waits for the others).

    Args:
        bundle: a dual encoder on the device of the run.
        tasks: what it is measured on.
        run: where it runs.
        reduction: masks the examples.
        count: images of each kind, half as many beside captions.

    Raises:
        InputError: if the data of a task cannot be used.
    """
    parts: dict[str, Any] = {}
    fewer = max(1, count // 2)
    with evaluating(bundle.model):
        embedder = None
        for task in tasks:
            if not isinstance(task, (ZeroShot, Retrieval, Compositional)):
                continue
            if (folder := task.folder()) is None:
                continue
            embedder = embedder or Embedder.of(bundle, run)
            if isinstance(task, ZeroShot) and "classified" not in parts:
                if is_multi_labeled(folder):  # such an image has no class of its own
                    continue
                parts |= _classified(task, folder, embedder, bundle, count)
            elif isinstance(task, Retrieval) and "retrieved" not in parts:
                captioned = open_captioned(task, folder, bundle)
                found = retrieval_examples(embedder, captioned, count=fewer, workers=task.workers)
                parts["retrieved"] = tuple(found)
            elif isinstance(task, Compositional) and "contrasted" not in parts:
                contrasts = open_contrasts(task, folder, bundle)
                parts["contrasted"] = tuple(
                    compositional_examples(embedder, contrasts, count=fewer)
                )
        shown = next((p for p in map(parts.get, _BEST_TO_MASK) if p), ())
        parts |= _masked(shown, bundle, run, reduction)
    return Examples(**parts)


def draw_batch(objective: Objective, recipe: Recipe, run: Run) -> Examples:
    """What an objective draws of the first samples that its run trained on.

    Args:
        objective: on the device of the run; it may draw nothing.
        recipe: names the data.
        run: where it runs.

    Raises:
        InputError: if the data cannot be read.
    """
    data = recipe.data
    if data.workers:
        data = replace(data, workers=0)  # type: ignore[type-var]
    engine = replace(recipe.engine, accumulate=1, virtual_processes=None)
    few = replace(recipe, batch_size=_DRAWN, engine=engine, data=data)
    stream = few.data.build(few, run, first_sample=0, state={}, engine=None)
    with evaluating(objective):
        picture = objective.draw(next(iter(stream)).to(run.device))
    if picture is None:
        return Examples()
    return Examples(batch=Drawing(as_array(picture), type(objective).__name__))


_BEST_TO_MASK = ("retrieved", "classified", "contrasted")
"""Whose images are shown masked: those of whole scenes before those of single things."""
_DRAWN = 6
"""Images in the picture that a reduction draws; a page is not wider."""


def _classified(
    task: ZeroShot, folder: Path, embedder: Embedder, bundle: ModelBundle, count: int
) -> dict[str, Any]:
    question = open_dataset(task, folder, bundle)
    classes = class_embeddings(embedder, question.names, question.templates, ranks=Ranks())
    answers = classify(
        embedder, question.images, classes, batch_size=task.batch_size, workers=task.workers
    )
    shown = zero_shot_examples(
        embedder, question.images, classes, question.labels, count=count, workers=task.workers
    )
    return {
        "classified": tuple(shown),
        "classes": tuple(recall_by_class(answers, question.labels, question.held_out)),
        "confused": tuple(confusions(answers, question.labels)),
    }


def _masked(
    examples: Sequence[Example],
    bundle: ModelBundle,
    run: Run,
    reduction: ImageReduction,
) -> dict[str, Any]:
    """What of the examples' images the model sees in training, and what its reduction draws."""
    if not examples:
        return {}
    images = torch.stack([torch.as_tensor(example.image) for example in examples])
    captions = [example.truth[0] for example in examples]
    view, noise = _look(images, bundle, run)
    kept = reduction.keep(view, noise=noise)
    found: dict[str, Any] = {
        "masked": tuple(masked_examples(images, kept, view.patch_size, captions))
    }
    view, noise = _look(images[:_DRAWN], bundle, run)
    picture = reduction.draw(view, images[:_DRAWN], noise=noise)
    if picture is not None:
        found["drawn"] = Drawing(as_array(picture), type(reduction).__name__)
    return found


def _look(images: Tensor, bundle: ModelBundle, run: Run) -> tuple[PatchView, SampleNoise]:
    """What an image reduction sees of images at the end of a run, and its random numbers."""
    images = images.to(run.device)
    tower: Any = bundle.model.image
    view = PatchView.of(
        images,
        bundle.image,  # type: ignore[arg-type]
        embed=lambda: tower(images, output="embedded"),
        progress=torch.ones(len(images), device=images.device),
    )
    return view, SampleNoise(bundle.seed, torch.arange(len(images), device=images.device))


def examples_of_stages(stages: Mapping[str, Path], *, count: int) -> Examples:
    """Pictures and answers of the last stage's model, masked as in the first stage.

    Of a model that reads no captions, what its objective draws, or nothing where the teacher or
    the training data is not there any more.

    Raises:
        InputError: if the checkpoint or the data of an evaluation cannot be used.
    """
    first, last = next(iter(stages.values())), list(stages.values())[-1]
    if load_recipe(last / "recipe.json").model.inputs().captions is None:
        try:
            checkpoint, recipe = open_checkpoint(last)
            run = open_run(last, "auto")
            objective = trained_objective(recipe, checkpoint)
            return draw_batch(objective.to(run.device), recipe, run)
        except InputError as error:
            make_logger(0).warning("the page shows no pictures: %s", error)
            return Examples()
    bundle, tasks = load_model(last), load_recipe(last / "recipe.json").evaluation
    run = open_run(last, "auto")
    bundle.model.to(run.device)
    reduction = load_recipe(first / "recipe.json").reduction.image
    return examples_of_model(bundle, tasks, run, reduction=reduction, count=count)
