"""Zero-shot classification: the class whose prompts lie nearest to the image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from frugal.common.data.benchmark_layout import is_multi_labeled
from frugal.common.data.labeled import ImageSet, LabeledImages, walk_images
from frugal.common.distributed import Ranks
from frugal.common.errors import InputError
from frugal.common.evaluation.class_names import (
    CLASS_NAMES,
    TEMPLATES,
    held_out_classes,
    naming,
)
from frugal.common.evaluation.embed import Embedder
from frugal.common.evaluation.metrics import ranked_classes, similarity
from frugal.common.evaluation.multi_label import measure_precision
from frugal.common.evaluation.pictures import Picture, draw_predictions, example_places
from frugal.common.evaluation.predictions import Predictions
from frugal.common.evaluation.prompts import ClassName, class_embeddings
from frugal.common.evaluation.provenance import identify
from frugal.common.evaluation.remarks import Remarks, same_names
from frugal.common.evaluation.suites import Metric, listed
from frugal.common.evaluation.task import ImageEvaluation, Inputs
from frugal.common.models.bundle import ModelBundle


@dataclass(frozen=True, kw_only=True)
class ZeroShot(ImageEvaluation):
    """Zero-shot classification with class names written into prompt templates.

    Reads a scenes folder (``python -m frugal.common.scenes``), class-per-folder images (ImageNet-1k
    and its variants V2, A, R and Sketch, ObjectNet), or clip_benchmark's webdataset layout.
    """

    name: str = "zero_shot"
    """First part of the name of every number."""
    class_names: str = "data"
    """data: the names the data comes with; folders that are WordNet ids of ImageNet-1k, or the
    numbers 0 to 999, get ImageNet's names, and images are classified among the classes that are
    there. imagenet: ImageNet-1k's 1,000 names, whichever of its classes are there; folders are
    WordNet ids or the numbers 0 to 999, labels of tars the same numbers. imagenet_a, imagenet_r:
    those of their 200 classes. One of the tasks of the suite clip-26, such as food101: that task's
    names, for folders that are called so, or else in their order."""
    templates: str = "data"
    """data: the templates the data comes with, or imagenet_7 where it has none. imagenet_7 and
    imagenet_80: OpenAI's for ImageNet; imagenet_9: the seven, "A photo of a {}" and the bare name
    (CiT). name: the bare class name. One of the tasks of the suite clip-26: that task's."""
    metric: Metric | None = None
    """Which of the numbers is the task's own: it is given again as its score."""
    reduce_prompts: bool = False
    """Shorten prompts by the recipe's text reduction, as captions in training; else only what
    does not fit is cut off."""

    _part = "zero_shot"
    _scores = (
        "top1", "top5", "mean_per_class_recall", "top1_held_out", "roc_auc",
        "mean_average_precision", "score",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        for field_name, given, words in (
            ("class_names", self.class_names, CLASS_NAMES),
            ("templates", self.templates, TEMPLATES),
        ):
            if given not in (*words, *listed()):
                raise InputError(
                    f"{field_name} is {given!r}; choose {', '.join(words)} or one of the tasks "
                    f"{', '.join(listed())}"
                )

    @property
    @override
    def reduces_texts(self) -> bool:
        """Where it reduces prompts."""
        return self.reduce_prompts

    @override
    def measure(self, given: Inputs) -> dict[str, float | int]:
        """``top1``, ``top5``, ``mean_per_class_recall``, ``images`` and ``classes``.

        With two classes also ``roc_auc``, with a metric ``score``. Where images may be of several
        classes (clip_benchmark's ``dataset_type.txt`` says multilabel) instead
        ``mean_average_precision``, ``images``, ``classes`` and ``labels``. Where the data says
        which classes training never saw (scenes: ``held_out.txt``), also ``top1_held_out``,
        ``images_held_out`` and ``classes_held_out``; where there are such, ``same_names``,
        ``classes_without_images`` and ``passed_over``.

        Raises:
            InputError: if the data, its classes and the names do not fit together.
        """
        embedder = Embedder.of(given.bundle, given.run, self)
        if is_multi_labeled(given.folder):
            if self.metric is not None:
                raise InputError(
                    f"the metric of {self.name} is {self.metric}, but images of several classes "
                    "have an average precision; leave it out"
                )
            return measure_precision(self, given, embedder, self.class_names, self.templates)
        run, ranks = given.run, given.ranks
        dataset = open_dataset(self, given.folder, given.bundle)
        run.log.info(
            "%s: %s images among %s classes (%r to %r), %d prompts for each name",
            self.name,
            f"{len(dataset.images):,}",
            f"{len(dataset.names):,}",
            dataset.labels[0],
            dataset.labels[-1],
            len(dataset.templates),
        )
        ranks.same_data(dataset.images, self.name)
        with embedder.measuring(ranks):
            predictions = predict(self, dataset, embedder, ranks=ranks)
        identity = identify(dataset.images, ranks, run.device)
        identity.remark(self.name, run.log)
        if given.show is not None:
            given.show(self.name, _picture(dataset, predictions))
        remarks = dataset.remarks(embedder, predictions)
        remarks.tell(self.name, dataset.labels, run.log)
        if given.keep is not None:
            facts = dataset.facts() | identity.facts() | remarks.facts(dataset.labels)
            found = predictions.results(
                self.number_name, facts, metric=self.metric, held_out=dataset.held_out
            )
            given.keep(found)
        numbers = predictions.numbers(self.metric)
        return numbers | predictions.held_out_numbers(dataset.held_out) | remarks.numbers()


def classify(
    embedder: Embedder,
    data: ImageSet,
    classes: Tensor,
    *,
    batch_size: int,
    workers: int = 0,
    ranks: Ranks | None = None,
) -> Predictions:
    """Classify every image once, whatever the number of processes and the batch size.

    Args:
        embedder: its model in evaluation mode, without gradients (see ``evaluating``).
        data: what is known of its images beside the pixels is their labels (b,).
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
    width = 2 + min(5, len(classes))
    # of every image its label, the best class, the ranked classes
    table = torch.zeros(len(data), width, dtype=torch.int64, device=classes.device)
    margin = torch.zeros(len(data), device=classes.device)

    def compute(images: Tensor, labels: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        scores = similarity(embedder.images(images, places), classes)  # (b, C)
        best, ranked = scores.argmax(1, keepdim=True), ranked_classes(scores)
        rows = torch.cat([labels.to(best.device)[:, None], best, ranked], dim=1)  # (b, 2 + K)
        return rows, scores[:, -1] - scores[:, 0]

    walk_images(data, compute, [table, margin], ranks=ranks, batch_size=batch_size, workers=workers)
    labels, best, ranked = table.cpu().tensor_split((1, 2), dim=1)
    labels, best = labels[:, 0], best[:, 0]
    if int(labels.min()) < 0 or int(labels.max()) >= len(classes):
        outside = int(labels.min()) if int(labels.min()) < 0 else int(labels.max())
        raise InputError(
            f"an image has the label {outside}, but there are names for {len(classes)} classes; "
            "labels count from 0 and every one needs a name"
        )
    of_two = margin.cpu() if len(classes) == 2 else None
    return Predictions(labels, best, ranked, len(classes), of_two)


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

    def remarks(self, embedder: Embedder, predictions: Predictions) -> Remarks:
        """What is odd about the data and the names of its classes."""
        images = torch.bincount(predictions.labels, minlength=len(self.names))
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
    found = naming(task.class_names, task.templates, images, folder)
    if found.numbers is not None:
        images.renumber(found.numbers)
    held_out = held_out_classes(folder, len(found.names))
    return ZeroShotDataset(images, found.names, found.templates, held_out, found.incomplete)


def predict(
    task: ZeroShot, dataset: ZeroShotDataset, embedder: Embedder, *, ranks: Ranks
) -> Predictions:
    """The model's answers; every one of the processes must call this."""
    classes = class_embeddings(embedder, dataset.names, dataset.templates, ranks=ranks)
    return classify(
        embedder,
        dataset.images,
        classes,
        batch_size=task.batch_size,
        workers=task.workers,
        ranks=ranks,
    )


def _picture(dataset: ZeroShotDataset, predictions: Predictions) -> Picture:
    """Some images with the class that the model chose, and the true one where it is another."""
    places = example_places(len(dataset.images))
    truth = [dataset.labels[label] for label in predictions.labels[places].tolist()]
    said = [dataset.labels[label] for label in predictions.best[places].tolist()]
    right = (predictions.best == predictions.labels)[places].tolist()
    captions = [
        one if hit else f"{one}, not {other}"
        for one, other, hit in zip(said, truth, right, strict=True)
    ]
    return draw_predictions(dataset.images.pictures(places), captions, right)
