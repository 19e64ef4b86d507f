"""Single images with what a trained model makes of them, for the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frugal.common.checkpoint.warm_start import trained_objective
from frugal.common.contracts import EvaluationTask, Objective
from frugal.common.data.benchmark_layout import is_multi_labeled
from frugal.common.data.decoding import as_bytes
from frugal.common.data.stored_images import GROUP
from frugal.common.distributed import Ranks
from frugal.common.errors import InputError
from frugal.common.evaluation.compositional import Contrasts, open_contrasts
from frugal.common.evaluation.config import Compositional, Retrieval, ZeroShot
from frugal.common.evaluation.embed import Embedder, evaluating, similarity, text_table
from frugal.common.evaluation.pictures import Picture, as_array, example_places, gray_dropped
from frugal.common.evaluation.prompts import class_embeddings
from frugal.common.evaluation.retrieval import open_captioned
from frugal.common.evaluation.sugarcrepe import PARTS
from frugal.common.evaluation.zero_shot import Predictions, answer, open_dataset
from frugal.common.models.bundle import ModelBundle
from frugal.common.randomness import SampleNoise
from frugal.common.recipe import Recipe, load_recipe
from frugal.common.reduction.image import ImageReduction, PatchView
from frugal.common.run import Run, make_logger
from frugal.common.train import open_process
from frugal.common.weights.load import load_model
from frugal.common.weights.runs import open_checkpoint


@dataclass(frozen=True)
class MaskedExample:
    """An image and the part of it that the model sees in training."""

    image: Picture
    """(3, H, W) uint8."""
    masked: Picture
    """(3, H, W) uint8, the dropped patches hatched."""
    kept: int
    """Patches that stay."""
    patches: int
    caption: str = ""


@dataclass(frozen=True)
class Guess:
    """One answer of the model."""

    text: str
    score: float
    """A probability in zero-shot examples, else a cosine."""
    right: bool


@dataclass(frozen=True)
class Example:
    """An image, the truth about it, and the model's best answers, best first."""

    image: Picture
    """(3, H, W) uint8."""
    truth: tuple[str, ...]
    """Its class, or its captions."""
    guesses: tuple[Guess, ...]
    question: str = ""
    """What is asked, where that differs from example to example."""


@dataclass(frozen=True)
class Drawing:
    """A picture that a reduction or an objective draws of what it does."""

    picture: Picture
    """(3, H*, W*) uint8."""
    artist: str
    """What the reduction or the objective is called."""


def masked_examples(
    images: Tensor, kept: Any, patch_size: int, captions: Sequence[str] = ()
) -> list[MaskedExample]:
    """Images beside what is left of them.

    Args:
        images: (B, 3, H, W) uint8.
        kept: what an image reduction answered for them; None where everything stays.
        patch_size: side of a patch in pixels.
        captions: one per image, or none.
    """
    count, _, height, width = images.shape
    patches = (height // patch_size) * (width // patch_size)
    mask = torch.ones(count, patches).bool() if kept is None else kept.mask(patches)
    masked = gray_dropped(images, mask, patch_size)
    return [
        MaskedExample(
            image=as_array(images[row]),
            masked=masked[row],
            kept=int(mask[row].sum()),
            patches=patches,
            caption=captions[row] if captions else "",
        )
        for row in range(count)
    ]


@dataclass(frozen=True)
class ClassRecall:
    """How a class fared."""

    name: str
    right: int
    images: int
    held_out: bool = False
    """Training never saw it."""


@dataclass(frozen=True)
class Confusion:
    """One class taken for another."""

    truth: str
    said: str
    images: int


@dataclass(frozen=True)
class _Chosen:
    place: int
    image: Tensor
    label: int | None


def _some(data: Any, count: int, *, workers: int) -> Iterator[_Chosen]:
    """At most ``count`` images drawn from all of a data set, always the same, in its order."""
    wanted = set(example_places(len(data), count))
    chosen: list[_Chosen] = []
    for images, *labels, places in data.batches(0, 1, GROUP, workers):
        for row, place in enumerate(places.tolist()):
            if place in wanted:
                label = int(labels[0][row]) if labels else None
                chosen.append(_Chosen(place, images[row], label))
        if len(chosen) == len(wanted):
            break
    return iter(sorted(chosen, key=lambda item: item.place))


def zero_shot_examples(
    embedder: Embedder,
    data: Any,
    classes: Tensor,
    names: Sequence[str],
    *,
    count: int = 12,
    guesses: int = 3,
    workers: int = 0,
) -> list[Example]:
    """The most probable classes of some images of the data.

    Args:
        embedder: its model in evaluation mode, without gradients.
        data: labeled images, as for ``zero_shot.answer``.
        classes: (C, E) from ``class_embeddings``.
        names: one per class.
        count: images.
        guesses: classes named per image.
        workers: processes that decode images.
    """
    scale = float(torch.as_tensor(embedder.model.logit_scale).exp())
    examples = []
    for item in _some(data, count, workers=workers):
        scores = similarity(embedder.images(item.image[None]), classes)[0]  # (C,)
        best = (scale * scores).softmax(0).topk(min(guesses, len(names)))
        said = [
            Guess(names[number], probability, number == item.label)
            for probability, number in zip(*(part.tolist() for part in best), strict=True)
        ]
        assert item.label is not None
        examples.append(Example(as_bytes(as_array(item.image)), (names[item.label],), tuple(said)))
    return examples


def retrieval_examples(
    embedder: Embedder,
    data: Any,
    *,
    count: int = 6,
    guesses: int = 3,
    workers: int = 0,
) -> list[Example]:
    """The captions nearest to some images, among all distinct captions of the data.

    Args:
        embedder: its model in evaluation mode, without gradients.
        data: captioned images, as for ``retrieval.embed``.
        count: images.
        guesses: captions shown per image.
        workers: processes that decode images.
    """
    captions = list(dict.fromkeys(caption for own in data.captions for caption in own))
    texts = text_table(embedder, captions, ranks=Ranks())  # (M, E)
    examples = []
    for item in _some(data, count, workers=workers):
        own = tuple(data.captions[item.place])
        scores = similarity(embedder.images(item.image[None]), texts)[0]  # (M,)
        best = scores.topk(min(guesses, len(captions)))
        said = [
            Guess(captions[number], cosine, captions[number] in own)
            for cosine, number in zip(*(part.tolist() for part in best), strict=True)
        ]
        examples.append(Example(as_bytes(as_array(item.image)), own, tuple(said)))
    return examples


def compositional_examples(embedder: Embedder, data: Contrasts, *, count: int = 6) -> list[Example]:
    """Some images with their true and their false caption, the nearer one first.

    Args:
        embedder: its model in evaluation mode, without gradients.
        data: the items.
        count: items.
    """
    examples = []
    for place in example_places(len(data.items), count):
        item = data.items[place]
        image = data.images([data.image_of_item[place]])  # (1, 3, H, W)
        captions = [item.caption, item.negative_caption]
        true, false = similarity(embedder.images(image), embedder.texts(captions))[0].tolist()
        said = [Guess(captions[0], true, True), Guess(captions[1], false, False)]
        kind, _, part = item.category.partition("_")
        examples.append(
            Example(
                as_bytes(as_array(image[0])),
                (item.caption,),
                tuple(said if true > false else said[::-1]),
                question=f"{kind}, {PARTS[part]}",
            )
        )
    return examples


def recall_by_class(
    answers: Predictions, names: Sequence[str], held_out: Sequence[int] = ()
) -> list[ClassRecall]:
    """The images of every class, and how many of them were recognized."""
    images = torch.bincount(answers.labels, minlength=len(names)).tolist()
    found = answers.labels[answers.best == answers.labels]
    right = torch.bincount(found, minlength=len(names)).tolist()
    return [
        ClassRecall(name, right[place], images[place], place in held_out)
        for place, name in enumerate(names)
    ]


def confusions(answers: Predictions, names: Sequence[str], *, count: int = 8) -> list[Confusion]:
    """What was most often taken for something else, most frequent first."""
    wrong = answers.best != answers.labels
    pairs = torch.stack([answers.labels[wrong], answers.best[wrong]])  # (2, wrong)
    kinds, images = pairs.unique(dim=1, return_counts=True)
    order = torch.argsort(images, descending=True, stable=True)[:count].tolist()
    return [
        Confusion(names[int(kinds[0, place])], names[int(kinds[1, place])], int(images[place]))
        for place in order
    ]


# Of a trained model.


@dataclass(frozen=True, kw_only=True)
class Examples:
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


def draw_batch(objective: Any, recipe: Recipe, run: Run) -> Examples:
    """What an objective draws of the first samples that its run trained on.

    Args:
        objective: on the device of the run; one without ``draw`` draws nothing.
        recipe: names the data.
        run: where it runs.

    Raises:
        InputError: if the data cannot be read.
    """
    if not isinstance(objective, Objective):  # a model that was trained elsewhere has none
        return Examples()
    data: Any = recipe.data
    if hasattr(data, "workers"):
        data = replace(data, workers=0)
    engine = replace(recipe.engine, accumulate=1)
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
    if not hasattr(load_recipe(last / "recipe.json").model, "text"):
        try:
            checkpoint, recipe = open_checkpoint(last)
            run = open_process(last, "auto")
            objective = trained_objective(recipe, checkpoint.folder, log=run.log)
            return draw_batch(objective.to(run.device), recipe, run)
        except InputError as error:
            make_logger(0).warning("the page shows no pictures: %s", error)
            return Examples()
    bundle, tasks = load_model(last), load_recipe(last / "recipe.json").evaluation
    run = open_process(last, "auto")
    bundle.model.to(run.device)
    reduction = load_recipe(first / "recipe.json").reduction.image
    return examples_of_model(bundle, tasks, run, reduction=reduction, count=count)
