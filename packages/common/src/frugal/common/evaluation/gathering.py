"""Everything that a report shows of a trained model beside its numbers, gathered in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frugal.common.contracts import ImageReduction
from frugal.common.data.labeled import is_multi_labeled
from frugal.common.evaluation.compositional import open_contrasts
from frugal.common.evaluation.config import Compositional, Retrieval, ZeroShot
from frugal.common.evaluation.embed import Embedder, evaluating
from frugal.common.evaluation.examples import (
    ClassRecall,
    Confusion,
    Drawing,
    Example,
    MaskedExample,
    compositional_examples,
    confusions,
    masked_examples,
    recall_by_class,
    retrieval_examples,
    zero_shot_examples,
)
from frugal.common.evaluation.pictures import as_array
from frugal.common.evaluation.prompts import class_embeddings
from frugal.common.evaluation.ranks import Ranks
from frugal.common.evaluation.retrieval import open_captioned
from frugal.common.evaluation.zero_shot import answer, open_question
from frugal.common.randomness import SampleNoise
from frugal.common.recipe import Recipe
from frugal.common.reduction.image import PatchView
from frugal.common.run import Run


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """What a report shows of a model beside its numbers."""

    masked: tuple[MaskedExample, ...] = ()
    drawn: Drawing | None = None
    """Of reductions that draw."""
    batch: Drawing | None = None
    """Of objectives that draw, where the model reads no captions."""
    classified: tuple[Example, ...] = ()
    retrieved: tuple[Example, ...] = ()
    contrasted: tuple[Example, ...] = ()
    classes: tuple[ClassRecall, ...] = ()
    confused: tuple[Confusion, ...] = ()


def gather(
    model: Any,
    recipe: Recipe,
    run: Run,
    *,
    reduction: ImageReduction | None = None,
    count: int = 12,
) -> Gathered:
    """Examples from the first task of each kind of a recipe that has data.

    Every process that calls this computes it all; where ``torch.distributed`` runs, all of its
    processes must (opening the data waits for the others).

    Args:
        model: a dual encoder on the device of the run.
        recipe: names the tasks, the tokenizer and the sizes.
        run: where it runs.
        reduction: masks the examples; the recipe's own by default.
        count: images of each kind, half as many beside captions.

    Raises:
        InputError: if the data of a task cannot be used.
    """
    parts: dict[str, Any] = {}
    fewer = max(1, count // 2)
    with evaluating(model):
        embedder = None
        for task in recipe.evaluation:
            if not isinstance(task, (ZeroShot, Retrieval, Compositional)):
                continue
            if (folder := task.folder()) is None:
                continue
            embedder = embedder or Embedder.of(model, recipe, run)
            if isinstance(task, ZeroShot) and "classified" not in parts:
                if is_multi_labeled(folder):  # such an image has no class of its own
                    continue
                parts |= _classified(task, folder, embedder, recipe, count)
            elif isinstance(task, Retrieval) and "retrieved" not in parts:
                captioned = open_captioned(task, folder, recipe)
                found = retrieval_examples(embedder, captioned, count=fewer, workers=task.workers)
                parts["retrieved"] = tuple(found)
            elif isinstance(task, Compositional) and "contrasted" not in parts:
                contrasts = open_contrasts(task, folder, recipe)
                parts["contrasted"] = tuple(
                    compositional_examples(embedder, contrasts, count=fewer)
                )
        shown = next((p for p in map(parts.get, _BEST_TO_MASK) if p), ())
        parts |= _masked(shown, model, recipe, run, reduction or recipe.reduction.image)
    return Gathered(**parts)


def draw_batch(objective: Any, recipe: Recipe, run: Run) -> Gathered:
    """What an objective draws of the first samples that its run trained on.

    Args:
        objective: on the device of the run; one without ``draw`` draws nothing.
        recipe: names the data.
        run: where it runs.

    Raises:
        InputError: if the data cannot be read.
    """
    if not hasattr(objective, "draw"):
        return Gathered()
    data: Any = recipe.data
    if hasattr(data, "workers"):
        data = replace(data, workers=0)
    engine = replace(recipe.engine, accumulate=1)
    few = replace(recipe, batch_size=_DRAWN, engine=engine, data=data)
    stream = few.data.build(few, run, first_sample=0, state={}, engine=None)
    with evaluating(objective):
        picture = objective.draw(next(iter(stream)).to(run.device))
    return Gathered(batch=Drawing(as_array(picture), type(objective).__name__))


_BEST_TO_MASK = ("retrieved", "classified", "contrasted")
"""Whose images are shown masked: those of whole scenes before those of single things."""
_DRAWN = 6
"""Images in the picture that a reduction draws; a page is not wider."""


def _classified(
    task: ZeroShot, folder: Path, embedder: Embedder, recipe: Recipe, count: int
) -> dict[str, Any]:
    question = open_question(task, folder, recipe)
    classes = class_embeddings(embedder, question.names, question.templates, ranks=Ranks())
    answers = answer(
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
    model: Any,
    recipe: Recipe,
    run: Run,
    reduction: ImageReduction,
) -> dict[str, Any]:
    """What of the examples' images the model sees in training, and what its reduction draws."""
    if not examples:
        return {}
    images = torch.stack([torch.as_tensor(example.image) for example in examples])
    captions = [example.truth[0] for example in examples]
    view, noise = _look(images, model, recipe, run)
    kept = reduction.keep(view, noise=noise)
    found: dict[str, Any] = {
        "masked": tuple(masked_examples(images, kept, view.patch_size, captions))
    }
    draw = getattr(reduction, "draw", None)
    if draw is not None:
        view, noise = _look(images[:_DRAWN], model, recipe, run)
        picture = draw(view, images[:_DRAWN], noise=noise)
        found["drawn"] = Drawing(as_array(picture), type(reduction).__name__)
    return found


def _look(images: Tensor, model: Any, recipe: Recipe, run: Run) -> tuple[PatchView, SampleNoise]:
    """What an image reduction sees of images at the end of a run, and its random numbers."""
    images = images.to(run.device)
    view = PatchView.of(
        images,
        recipe.model.image,
        embed=lambda: model.image(images, output="embedded"),
        progress=torch.ones(len(images), device=images.device),
    )
    return view, SampleNoise(recipe.run.seed, torch.arange(len(images), device=images.device))
