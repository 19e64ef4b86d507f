"""Zero-shot classification: the class whose prompts lie nearest to the image."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frugal.common.contracts import Show
from frugal.common.data.labelled import LabelledImages
from frugal.common.errors import InputError
from frugal.common.evaluation.config import ZeroShot
from frugal.common.evaluation.embed import Embedder, evaluating, grouped, similarity
from frugal.common.evaluation.metrics import mean_per_class_recall, ranked_classes, top_k_accuracy
from frugal.common.evaluation.pictures import Picture, draw_predictions, example_places
from frugal.common.evaluation.prompts import (
    ClassName,
    class_embeddings,
    imagenet_class_names,
    named_templates,
)
from frugal.common.evaluation.ranks import Ranks, check_delivery
from frugal.common.recipe import Recipe
from frugal.common.run import Run


@dataclass(frozen=True)
class Answers:
    """What the model said about every image, complete on every process."""

    labels: Tensor
    """(N,) int64, in the order of the data."""
    best: Tensor
    """(N,) int64: the class of the highest cosine; the first of them in a tie."""
    ranked: Tensor
    """(N, K) int64: the K = min(5, C) best classes, best first."""
    num_classes: int

    def numbers(self) -> dict[str, float | int]:
        """Accuracies as fractions, and what they are fractions of."""
        return {
            "top1": top_k_accuracy(self.ranked, self.labels, 1),
            "top5": top_k_accuracy(self.ranked, self.labels, 5),
            "mean_per_class_recall": mean_per_class_recall(self.best, self.labels),
            "images": len(self.labels),
            "classes": self.num_classes,
        }

    def held_out_numbers(self, held_out: Sequence[int]) -> dict[str, float | int]:
        """The images of these classes alone, still answered among all classes."""
        among = torch.isin(self.labels, torch.tensor(held_out, device=self.labels.device))
        count = int(among.sum())
        if not count:
            return {}
        return {
            "top1_held_out": top_k_accuracy(self.ranked[among], self.labels[among], 1),
            "images_held_out": count,
            "classes_held_out": len(set(held_out)),
        }


def answer(
    embedder: Embedder,
    data: Any,
    classes: Tensor,
    *,
    batch_size: int,
    workers: int = 0,
    ranks: Ranks | None = None,
) -> Answers:
    """Classify every image once, whatever the number of processes and the batch size.

    Args:
        embedder: its model in evaluation mode, without gradients (see ``evaluating``).
        data: has ``len()`` and ``batches(rank, world_size, batch_size, workers)``, which yields
            images (b, 3, H, W), labels (b,) and places in the data (b,).
        classes: (C, E) from ``class_embeddings``.
        batch_size: images read at a time.
        workers: processes that decode images.
        ranks: the processes that share the images; this one alone by default.

    Raises:
        InputError: if an image's label is not one of the classes, or there is no image.
    """
    ranks = ranks or Ranks()
    if not len(data):
        raise InputError("there are no images to classify; check the folder of the evaluation")
    width = min(5, len(classes))
    # one row per image: how often it came, its label, the best class, the ranked classes
    table = torch.zeros(len(data), 3 + width, dtype=torch.int64, device=classes.device)
    batches = data.batches(ranks.rank, ranks.world_size, batch_size, workers)
    for images, labels, places in grouped(batches):
        scores = similarity(embedder.images(images, places), classes)  # (b, C)
        said = torch.cat([scores.argmax(1, keepdim=True), ranked_classes(scores)], dim=1)
        labels = labels.to(said.device)[:, None]
        rows = torch.cat([torch.ones_like(labels), labels, said], dim=1)  # (b, 3 + K)
        table.index_add_(0, places.to(table.device), rows)
    table = ranks.sum(table).cpu()
    check_delivery(table[:, 0])
    labels = table[:, 1]
    if int(labels.min()) < 0 or int(labels.max()) >= len(classes):
        outside = int(labels.min()) if int(labels.min()) < 0 else int(labels.max())
        raise InputError(
            f"an image has the label {outside}, but there are names for {len(classes)} classes; "
            "labels count from 0 and every one needs a name"
        )
    return Answers(labels, table[:, 2], table[:, 3:], len(classes))


_WORDNET_ID = re.compile(r"n\d{8}")
_NUMBERS = [str(number) for number in range(1000)]


def names_and_templates(
    task: ZeroShot, data: Any, source: Path
) -> tuple[list[ClassName], list[str]]:
    """What the classes are called and what is written around the names.

    Raises:
        InputError: if the data has no names, or they cannot be brought together with ImageNet's.
    """
    names: list[ClassName] = list(data.class_names or ())
    is_imagenet = names == _NUMBERS or any(map(_is_wordnet_id, names))
    if task.class_names == "imagenet" or is_imagenet:
        own = data.class_folders or names if task.class_names == "imagenet" else names
        names = _imagenet_names(own, source, has_numbers=data.class_folders is None)
    if not names:
        raise InputError(
            f"{source} does not say what its classes are called; add a classnames.txt with one "
            "name per line, or choose the class names 'imagenet'"
        )
    if task.templates != "data":
        return names, named_templates(task.templates)
    return names, list(data.templates or ()) or named_templates("imagenet_7")


def _is_wordnet_id(name: ClassName) -> bool:
    return isinstance(name, str) and _WORDNET_ID.fullmatch(name) is not None


def _imagenet_names(
    own: Sequence[ClassName], source: Path, *, has_numbers: bool
) -> list[ClassName]:
    """ImageNet-1k's names for the classes of a data set, in the order of its class numbers.

    Args:
        own: the class folders, or what the data calls its classes, if anything.
        source: of the data, for messages.
        has_numbers: labels come with the images; else they count the class folders.
    """
    names = imagenet_class_names()
    if any(map(_is_wordnet_id, own)):
        from timm.data import ImageNetInfo

        by_id = dict(zip(ImageNetInfo("imagenet-1k").label_names(), names, strict=True))
        if unknown := [name for name in own if name not in by_id]:
            raise InputError(
                f"{source} has the class {unknown[0]}, which is no WordNet id of ImageNet-1k; "
                "remove it, or give your classes names of their own in a classnames.txt"
            )
        return [by_id[str(name)] for name in own]
    if own and len(own) != len(names):
        raise InputError(
            f"{source} holds {len(own)} classes, but ImageNet-1k has {len(names)} names; use "
            "the complete folder, or give your classes names of their own"
        )
    if not has_numbers and list(own) != _NUMBERS:
        raise InputError(
            f"the class folders of {source} are neither ImageNet-1k's WordNet ids nor the numbers "
            f"0 to 999 (the first is {own[0]!r}), so it cannot be told which class is which; "
            "rename them"
        )
    return list(names)


def held_out_classes(data: Path, num_classes: int) -> list[int]:
    """The classes that training never saw, from ``held_out.txt``; [] where there is none.

    Raises:
        InputError: if a line is not the index of a class.
    """
    path = data / "held_out.txt"
    if not path.is_file():
        return []
    lines = path.read_text().split()
    if not all(line.isdecimal() and int(line) < num_classes for line in lines):
        raise InputError(
            f"{path} must hold one class index below {num_classes} per line; write the data "
            "again, or correct the file"
        )
    return sorted({int(line) for line in lines})


@dataclass(frozen=True)
class Question:
    """A labelled data set with everything that is needed to ask a model about it."""

    images: LabelledImages
    names: list[ClassName]
    templates: list[str]
    held_out: list[int]
    """Classes that training never saw."""

    @property
    def labels(self) -> list[str]:
        """One name per class, for people to read."""
        return [name if isinstance(name, str) else name[0] for name in self.names]


def open_question(task: ZeroShot, folder: Path, recipe: Recipe) -> Question:
    """Open the data of a task; no image is read yet.

    Raises:
        InputError: if the data or its class names cannot be used.
    """
    images = LabelledImages(folder, size=recipe.model.image.height_width, crop=task.crop)
    names, templates = names_and_templates(task, images, folder)
    return Question(images, names, templates, held_out_classes(folder, len(names)))


def ask(task: ZeroShot, question: Question, embedder: Embedder, *, ranks: Ranks) -> Answers:
    """The model's answers; every one of the processes must call this."""
    classes = class_embeddings(embedder, question.names, question.templates, ranks=ranks)
    return answer(
        embedder,
        question.images,
        classes,
        batch_size=task.batch_size,
        workers=task.workers,
        ranks=ranks,
    )


def evaluate(
    task: ZeroShot, folder: Path, model: Any, recipe: Recipe, run: Run, show: Show | None
) -> dict[str, float | int]:
    """See :meth:`frugal.common.evaluation.config.ZeroShot.evaluate`."""
    question = open_question(task, folder, recipe)
    run.log.info(
        "%s: %s images among %s classes, %d prompts for each name",
        task.name,
        f"{len(question.images):,}",
        f"{len(question.names):,}",
        len(question.templates),
    )
    embedder = Embedder.of(model, recipe, run, task)
    with evaluating(model):
        answers = ask(task, question, embedder, ranks=Ranks.current())
    if show is not None:
        show(task.name, _picture(question, answers))
    numbers = answers.numbers() | answers.held_out_numbers(question.held_out)
    return {f"{task.name}_{kind}": number for kind, number in numbers.items()}


def _picture(question: Question, answers: Answers) -> Picture:
    """Some images with the class that the model chose, and the true one where it is another."""
    places = example_places(len(question.images))
    truth = [question.labels[label] for label in answers.labels[places].tolist()]
    said = [question.labels[label] for label in answers.best[places].tolist()]
    right = (answers.best == answers.labels)[places].tolist()
    captions = [
        one if hit else f"{one}, not {other}"
        for one, other, hit in zip(said, truth, right, strict=True)
    ]
    return draw_predictions(question.images.pictures(places), captions, right)
