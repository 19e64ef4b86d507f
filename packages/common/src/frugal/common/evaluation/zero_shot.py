"""Zero-shot classification: the class whose prompts lie nearest to the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frugal.common.contracts import Show
from frugal.common.data.labeled import LabeledImages, grouped
from frugal.common.distributed import Ranks, check_delivery
from frugal.common.errors import InputError
from frugal.common.evaluation.bootstrap import Keep, Measure, SampleResults
from frugal.common.evaluation.class_names import naming
from frugal.common.evaluation.config import ZeroShot
from frugal.common.evaluation.embed import Embedder, similarity
from frugal.common.evaluation.metrics import (
    mean_per_class_recall,
    ranked_classes,
    roc_auc,
    top_k_accuracy,
)
from frugal.common.evaluation.pictures import Picture, draw_predictions, example_places
from frugal.common.evaluation.prompts import ClassName, class_embeddings
from frugal.common.evaluation.provenance import identify
from frugal.common.evaluation.remarks import Remarks, same_names
from frugal.common.evaluation.suites import Metric
from frugal.common.files import read_text
from frugal.common.models.bundle import ModelBundle
from frugal.common.run import Run


@dataclass(frozen=True)
class Predictions:
    """What the model said about every image, complete on every process."""

    labels: Tensor
    """(N,) int64, in the order of the data."""
    best: Tensor
    """(N,) int64: the class of the highest cosine; the first of them in a tie."""
    ranked: Tensor
    """(N, K) int64: the K = min(5, C) best classes, best first."""
    num_classes: int
    margin: Tensor | None = None
    """(N,) float32, of two classes: the cosine of the second less that of the first."""

    def numbers(self, metric: Metric | None = None) -> dict[str, float | int]:
        """Accuracies as fractions, and what they are fractions of.

        Raises:
            InputError: if the metric needs two classes and there are others.
        """
        numbers: dict[str, float | int] = {
            "top1": top_k_accuracy(self.ranked, self.labels, 1),
            "top5": top_k_accuracy(self.ranked, self.labels, 5),
            "mean_per_class_recall": mean_per_class_recall(self.best, self.labels),
        }
        if self.margin is not None:
            numbers["roc_auc"] = float(roc_auc(self.margin, self.labels == 1))
        if metric == "mean_top1_top5":
            numbers["score"] = (numbers["top1"] + numbers["top5"]) / 2
        elif metric is not None and metric not in numbers:
            raise InputError(
                f"the metric {metric} is of two classes, but there are {self.num_classes}; choose "
                "another"
            )
        elif metric is not None:
            numbers["score"] = numbers[metric]
        counts = {"images": len(self.labels), "classes": self.num_classes}
        if empty := self.num_classes - len(self.labels.unique()):
            counts["classes_without_images"] = empty
        return numbers | counts

    def outcomes(
        self,
        name: str,
        facts: dict[str, Any],
        *,
        metric: Metric | None = None,
        held_out: Sequence[int] = (),
    ) -> SampleResults:
        """Image by image, what the numbers of the task of this name are made of."""
        first = self.ranked[:, 0] == self.labels
        tables = {
            "labels": self.labels,
            "top1": first.to(torch.uint8),
            "top5": (self.ranked == self.labels[:, None]).any(1).to(torch.uint8),
            "best": (self.best == self.labels).to(torch.uint8),
        }
        tables["both"] = torch.stack([tables["top1"], tables["top5"]], dim=1)
        measures = {
            "top1": Measure("mean", "top1"),
            "top5": Measure("mean", "top5"),
            "mean_per_class_recall": Measure("mean_of_groups", "best", groups="labels"),
            "mean_top1_top5": Measure("mean_of_means", "both"),
        }
        if self.margin is not None:
            tables["margin"] = self.margin
            measures["roc_auc"] = Measure("roc_auc", "margin", groups="labels")
        among = torch.isin(self.labels, torch.tensor(held_out, dtype=torch.int64)).nonzero()[:, 0]
        if len(among):
            tables |= {"held_out": tables["top1"][among], "held_out_image": among}
            measures["top1_held_out"] = Measure("mean", "held_out", image="held_out_image")
        both = measures.pop("mean_top1_top5")
        if metric is not None:
            measures["score"] = both if metric == "mean_top1_top5" else measures[metric]
        named = {f"{name}_{kind}": measure for kind, measure in measures.items()}
        return SampleResults(facts, len(self.labels), tables, named)

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
) -> Predictions:
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
    width, compares = min(5, len(classes)), len(classes) == 2
    margin = torch.zeros(len(data) if compares else 0, device=classes.device)
    # one row per image: how often it came, its label, the best class, the ranked classes
    table = torch.zeros(len(data), 3 + width, dtype=torch.int64, device=classes.device)
    batches = data.batches(ranks.rank, ranks.world_size, batch_size, workers)
    for images, labels, places in grouped(batches):
        scores = similarity(embedder.images(images, places), classes)  # (b, C)
        said = torch.cat([scores.argmax(1, keepdim=True), ranked_classes(scores)], dim=1)
        labels = labels.to(said.device)[:, None]
        rows = torch.cat([torch.ones_like(labels), labels, said], dim=1)  # (b, 3 + K)
        table.index_add_(0, places.to(table.device), rows)
        if compares:
            margin[places.to(margin.device)] = scores[:, 1] - scores[:, 0]
    table = ranks.sum(table).cpu()
    margin = ranks.sum(margin).cpu()
    check_delivery(table[:, 0])
    labels = table[:, 1]
    if int(labels.min()) < 0 or int(labels.max()) >= len(classes):
        outside = int(labels.min()) if int(labels.min()) < 0 else int(labels.max())
        raise InputError(
            f"an image has the label {outside}, but there are names for {len(classes)} classes; "
            "labels count from 0 and every one needs a name"
        )
    ranked = table[:, 3:]
    return Predictions(labels, table[:, 2], ranked, len(classes), margin if compares else None)


def held_out_classes(data: Path, num_classes: int) -> list[int]:
    """The classes that training never saw, from ``held_out.txt``; [] where there is none.

    Raises:
        InputError: if a line is not the index of a class.
    """
    path = data / "held_out.txt"
    if not path.is_file():
        return []
    lines = read_text(path).split()
    if not all(line.isdecimal() and int(line) < num_classes for line in lines):
        raise InputError(
            f"{path} must hold one class index below {num_classes} per line; write the data "
            "again, or correct the file"
        )
    return sorted({int(line) for line in lines})


@dataclass(frozen=True)
class ZeroShotDataset:
    """A labeled data set with everything that is needed to ask a model about it."""

    images: LabeledImages
    names: list[ClassName]
    templates: list[str]
    held_out: list[int]
    """Classes that training never saw."""
    incomplete: str = ""
    """What is missing of the set that the names belong to, in words."""

    def remarks(self, embedder: Embedder, answers: Predictions) -> Remarks:
        """What is odd about the data and the names of its classes."""
        images = torch.bincount(answers.labels, minlength=len(self.names))
        return Remarks(
            same_names=same_names(self.names, self.templates, embedder.token_ids),
            without_images=(images == 0).nonzero()[:, 0].tolist(),
            incomplete=self.incomplete,
            passed_over=self.images.passed_over,
        )

    def facts(self) -> dict[str, Any]:
        """What is asked, and about which images."""
        return {
            "images": len(self.images),
            "class_names": self.names,
            "templates": self.templates,
        }

    @property
    def labels(self) -> list[str]:
        """One name per class, for people to read."""
        return [name if isinstance(name, str) else name[0] for name in self.names]


def open_dataset(task: ZeroShot, folder: Path, bundle: ModelBundle) -> ZeroShotDataset:
    """Open the data of a task; no image is read yet.

    Raises:
        InputError: if the data or its class names cannot be used.
    """
    images = LabeledImages(folder, size=bundle.image.height_width, crop=task.crop)
    found = naming(task, images, folder)
    if found.numbers is not None:
        images.renumber(found.numbers)
    held_out = held_out_classes(folder, len(found.names))
    return ZeroShotDataset(images, found.names, found.templates, held_out, found.incomplete)


def ask(
    task: ZeroShot, question: ZeroShotDataset, embedder: Embedder, *, ranks: Ranks
) -> Predictions:
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
    task: ZeroShot,
    folder: Path,
    bundle: ModelBundle,
    run: Run,
    show: Show | None,
    keep: Keep | None = None,
) -> dict[str, float | int]:
    """See :meth:`frugal.common.evaluation.config.ZeroShot.evaluate`."""
    question = open_dataset(task, folder, bundle)
    run.log.info(
        "%s: %s images among %s classes (%r to %r), %d prompts for each name",
        task.name,
        f"{len(question.images):,}",
        f"{len(question.names):,}",
        question.labels[0],
        question.labels[-1],
        len(question.templates),
    )
    ranks = Ranks.current()
    ranks.same_data(question.images, task.name)
    embedder = Embedder.of(bundle, run, task)
    with embedder.measuring(ranks):
        answers = ask(task, question, embedder, ranks=ranks)
    identity = identify(question.images, ranks, run.device)
    identity.remark(task.name, run.log)
    if show is not None:
        show(task.name, _picture(question, answers))
    remarks = question.remarks(embedder, answers)
    remarks.tell(task.name, question.labels, run.log)
    if keep is not None:
        facts = question.facts() | identity.facts() | remarks.facts(question.labels)
        keep(answers.outcomes(task.name, facts, metric=task.metric, held_out=question.held_out))
    numbers = answers.numbers(task.metric) | answers.held_out_numbers(question.held_out)
    numbers |= remarks.numbers()
    return {f"{task.name}_{kind}": number for kind, number in numbers.items()}


def _picture(question: ZeroShotDataset, answers: Predictions) -> Picture:
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
