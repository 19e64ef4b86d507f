"""Linear probing: a linear classifier on frozen embeddings, its weight decay searched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from typing_extensions import override

from frugal.common.data.damage import PassedOver
from frugal.common.data.labeled import LabeledImages
from frugal.common.data.stores.class_folders import class_numbers
from frugal.common.distributed import Ranks
from frugal.common.errors import InputError
from frugal.common.evaluation.class_names import held_out_classes
from frugal.common.evaluation.embed import Embedder
from frugal.common.evaluation.features import Features, embed_labeled, kept
from frugal.common.evaluation.linear_classifier import Linear, optimum, search, trained
from frugal.common.evaluation.metrics import ranked_classes
from frugal.common.evaluation.predictions import Predictions
from frugal.common.evaluation.provenance import config_digest, identify, weights_digest
from frugal.common.evaluation.remarks import Remarks
from frugal.common.evaluation.task import ImageEvaluation, Inputs
from frugal.common.models.bundle import ModelBundle
from frugal.common.randomness import stable_key
from frugal.common.ranges import Count, NotNegative, OpenShare, Positive, Seed
from frugal.common.recipe_json import to_json
from frugal.common.run import Run

Solver = Literal["lbfgs", "adamw", "sgd"]


@dataclass(frozen=True, kw_only=True)
class LinearProbe(ImageEvaluation):
    """A linear classifier on the embeddings of images, trained on some and measured on others.

    Reads a folder with the parts train/ and test/ (or val/), each of them class-per-folder images
    or tars with ``cls`` members as clip_benchmark has them; of a scenes folder, its zero_shot/.
    Source: Radford et al., arXiv:2103.00020, appendix A.3, as clip_benchmark does it.
    """

    name: str = "linear_probe"
    """First part of the name of every number."""
    train: str = "train"
    """Sub-folder of the images to train on."""
    test: str | None = None
    """Sub-folder of the images to measure on; by default test, or val without it."""
    validation: str | None = None
    """Sub-folder of the images that choose the weight decay; by default val, where it is not
    measured on."""
    validation_share: OpenShare = 0.2
    """Without such a folder, the share of the training images that choose instead, drawn with the
    seed; they are trained on too once the weight decay is chosen."""
    weight_decay: NotNegative | None = None
    """By default searched: 7 of the 97 values from 1e-6 to 100, then closer and closer around the
    best."""
    solver: Solver = "lbfgs"
    """lbfgs: the optimum of the mean cross-entropy plus half the weight decay times the squared
    weights, without a learning rate. adamw, sgd: epochs with a cosine, as clip_benchmark trains."""
    epochs: Count = 10
    """Of adamw and sgd."""
    learning_rate: Positive = 0.1
    """Of adamw and sgd, at the start."""
    probe_batch: Count = 64
    """Embeddings in a step of adamw and sgd."""
    seed: Seed = 0
    """Of the first weights, the order and the drawn validation images."""
    features: Path | None = None
    """Folder where embeddings are kept for the next time; without it they are not."""

    _part = "zero_shot"
    _scores = ("top1", "top5", "mean_per_class_recall")

    @override
    def folder(self) -> Path | None:
        """As of every evaluation; refuses one in which a part is missing, too."""
        folder = super().folder()
        if folder is not None:
            _part_names(self, folder)
        return folder

    @override
    def measure(self, given: Inputs) -> dict[str, float | int]:
        """``top1``, ``top5``, ``mean_per_class_recall``, ``weight_decay``.

        Also ``images``, ``train_images``, ``validation_images`` and ``classes``, and where there
        are such ``classes_without_images`` and ``passed_over``.

        Raises:
            InputError: if the parts of the data are not there, or do not have the same classes.
        """
        run, ranks, folder = given.run, given.ranks, given.folder
        parts = open_parts(self, folder, given.bundle)
        embedder = Embedder.of(given.bundle, run, self)
        key = _key(self, given.bundle, run) if self.features else {}

        def embedded(data: LabeledImages) -> Features:
            def make() -> Features:
                options = {"batch_size": self.batch_size, "workers": self.workers, "ranks": ranks}
                with embedder.measuring(ranks):
                    return embed_labeled(embedder, data, **options)  # type: ignore[arg-type]

            ranks.same_data(data, self.name)
            digest = partial(_digest, data, ranks, run)
            return kept(self.features, key, make, data=digest, ranks=ranks, run=run)

        train, test = embedded(parts.train), embedded(parts.test)
        validation = None if parts.validation is None else embedded(parts.validation)
        found = probe(self, train, validation, device=run.device)
        held_out = held_out_classes(folder, found.num_classes)
        asked = ~torch.isin(test.labels, torch.tensor(held_out, dtype=torch.int64))
        answers = found.answers(test.rows(asked))
        remarks = _remarks(parts, train, answers, held_out)
        labels = parts.train.class_folders or [f"class {n}" for n in range(found.num_classes)]
        remarks.tell(self.name, labels, run.log)
        trained_on = train if validation is None else train.joined(validation)
        measured_on, learned = (
            identify(part, ranks, run.device) for part in (parts.test, parts.train)
        )
        run.log.info(
            "%s: %s images, %s trained on, weight decay %.3g",
            self.name,
            f"{len(answers.labels):,}",
            f"{len(train):,}",
            found.weight_decay,
        )
        measured_on.remark(self.name, run.log)
        counts = {
            "weight_decay": found.weight_decay,
            "train_images": len(train),
            "validation_images": found.num_validation,
            "left_out": int((~asked).sum()),
            "images_trained_on": measured_on.common(learned),
            "images_of_untrained_classes": int(
                (~torch.isin(answers.labels, trained_on.labels)).sum()
            ),
        }
        _remark(self, folder, counts, len(test), run)
        if given.keep is not None:
            facts = {
                **measured_on.facts(),
                "train_sha256": learned.sha256,
                "images": len(answers.labels),
                **counts,
                "class_folders": parts.train.class_folders,
                **remarks.facts(labels),
            }
            given.keep(answers.results(self.number_name, facts))
        usual = ("weight_decay", "train_images", "validation_images")
        numbers = answers.numbers() | {n: v for n, v in counts.items() if n in usual or v}
        return numbers | remarks.numbers()


@dataclass(frozen=True)
class Parts:
    """The images of a probe."""

    train: LabeledImages
    test: LabeledImages
    validation: LabeledImages | None
    """Those that choose the weight decay, where they lie apart."""


def open_parts(task: LinearProbe, folder: Path, bundle: ModelBundle) -> Parts:
    """Open the parts of the data; no image is read yet.

    Raises:
        InputError: if a part is missing, or two do not have the same classes.
    """
    names = _part_names(task, folder)
    size = bundle.image.height_width
    opened = [LabeledImages(folder / name, size=size, crop=task.crop) for name in names]
    for name, part in list(zip(names, opened, strict=True))[1:]:
        _match(opened[0], part, folder / task.train, folder / name)
    return Parts(opened[0], opened[1], opened[2] if len(opened) > 2 else None)


def _part_names(task: LinearProbe, folder: Path) -> list[str]:
    """The sub-folders to train on, to measure on and, where it lies apart, to validate on.

    Raises:
        InputError: if one is missing, or is to serve twice.
    """
    has_test = (folder / "test").is_dir()
    test = task.test or ("test" if has_test else "val")
    validation = task.validation
    if validation is None and task.weight_decay is None and test != "val":
        validation = "val" if (folder / "val").is_dir() else None
    names = [task.train, test, *([validation] if validation else [])]
    if missing := [name for name in names if not (folder / name).is_dir()]:
        raise InputError(
            f"{folder} has no {missing[0]}/ for the evaluation {task.name!r}, which trains on "
            f"{task.train}/ and measures on {test}/; copy it, or name its sub-folders"
        )
    if len(set(names)) < len(names):
        raise InputError(
            f"the evaluation {task.name!r} would use {', '.join(f'{name}/' for name in names)} of "
            f"{folder}, one of them twice; name different sub-folders"
        )
    return names


def _match(train: LabeledImages, part: LabeledImages, trained: Path, source: Path) -> None:
    """Have the labels of a part be the numbers that its classes have in training.

    Raises:
        InputError: if it has a class without training images, or its classes are told otherwise.
    """
    if (train.class_folders is None) != (part.class_folders is None):
        kinds = ("numbers in tars", "class folders")
        has, other = kinds if part.class_folders is None else kinds[::-1]
        raise InputError(
            f"the classes of {source} are {has} and those of {trained} {other}, so that it cannot "
            "be told which is which; give both in the same way"
        )
    if train.class_folders is None or part.class_folders is None:
        if train.class_names and part.class_names and train.class_names != part.class_names:
            raise InputError(
                f"the classnames.txt of {source} is not that of {trained}; a number would mean two "
                "classes"
            )
        return
    known = [name if name in train.filled_folders else "" for name in train.class_folders]
    filled = part.filled_folders
    part.renumber(
        class_numbers(known, part.class_folders, filled, source=source, of=f"training in {trained}")
    )


def _remarks(
    parts: Parts, train: Features, answers: Predictions, held_out: Sequence[int]
) -> Remarks:
    """Classes that are trained on and not measured, and what lies beside the images."""
    asked = set(answers.labels.tolist()) | set(held_out)
    passed_over = PassedOver()
    for part in (parts.train, parts.test, parts.validation):
        if part is not None:
            passed_over.update(part.passed_over)
    without = sorted(set(train.labels.tolist()) - asked)
    return Remarks(without_images=without, passed_over=passed_over)


def _digest(data: LabeledImages, ranks: Ranks, run: Run) -> str:
    return identify(data, ranks, run.device).sha256


def _key(task: LinearProbe, bundle: ModelBundle, run: Run) -> dict[str, Any]:
    """Everything that embeddings depend on beside the images."""
    image = bundle.image
    return {
        "weights": weights_digest(bundle.model),
        "config": config_digest(bundle),
        "crop": to_json(task.crop),
        "size": list(image.height_width),
        "normalization": [list(image.mean), list(image.std)],
        "precision": bundle.precision,
        "device": run.device.type,
        "views": [task.mask_ratio, task.views, bundle.seed] if task.mask_ratio else None,
    }


def _remark(
    task: LinearProbe, folder: Path, counts: dict[str, Any], num_images: int, run: Run
) -> None:
    """Say what makes the accuracy another than it seems."""
    if both := counts["images_trained_on"]:
        run.log.warning(
            "%s: %s of the %s images of %s that are measured on are among those trained on, byte "
            "for byte",
            task.name,
            f"{both:,}",
            f"{num_images:,}",
            folder,
        )
    if unknown := counts["images_of_untrained_classes"]:
        run.log.warning(
            "%s: %s of the %s images of %s that are measured on are of classes that nothing was "
            "trained on, and count as wrong; check that both parts number their classes alike",
            task.name,
            f"{unknown:,}",
            f"{num_images:,}",
            folder,
        )


@dataclass(frozen=True)
class Probe:
    """A fitted classifier and how it came about."""

    classifier: Linear
    weight_decay: float
    num_classes: int
    trained: frozenset[int]
    """Classes that there were images of."""
    num_validation: int
    """Images that chose the weight decay."""

    def answers(self, features: Features) -> Predictions:
        """What it says about images that it has not seen.

        Raises:
            InputError: if one has a higher class number than all that were trained on.
        """
        if not len(features):
            raise InputError("there are no images to measure a probe on; check its test part")
        # numbers between those trained on may be held out on purpose: they are counted
        _check_trained(features, frozenset(range(self.num_classes)), "a test image")
        scores = self.classifier.scores(features.embeddings).float()
        ranked = ranked_classes(scores)
        margin = scores[:, 1] - scores[:, 0] if self.num_classes == 2 else None
        return Predictions(features.labels, scores.argmax(1), ranked, self.num_classes, margin)


def probe(
    task: LinearProbe, train: Features, validation: Features | None, *, device: torch.device
) -> Probe:
    """Choose the weight decay, then train on everything that is not tested on.

    Raises:
        InputError: if there are too few images or classes.
    """
    trained = frozenset(train.labels.tolist())
    num_classes = max(trained) + 1
    if validation is not None:
        _check_trained(validation, trained, "a validation image")
    if num_classes < 2:
        raise InputError("the training images of a linear probe are all of one class; add others")
    if task.weight_decay is not None:
        classifier = fit(task, train, num_classes, weight_decay=task.weight_decay, device=device)
        return Probe(classifier, task.weight_decay, num_classes, trained, 0)
    whole = train if validation is None else train.joined(validation)
    if validation is None:
        train, validation = _split(task, train)
    chooses = validation

    def accuracy(weight_decay: float) -> float:
        classifier = fit(task, train, num_classes, weight_decay=weight_decay, device=device)
        return classifier.accuracy(chooses)

    chosen = search(accuracy)
    classifier = fit(task, whole, num_classes, weight_decay=chosen, device=device)
    return Probe(classifier, chosen, num_classes, trained, len(validation))


def _check_trained(features: Features, trained: frozenset[int], what: str) -> None:
    """Refuse images of classes that nothing was trained on.

    Raises:
        InputError: if there is one.
    """
    if odd := sorted(set(features.labels.tolist()) - trained):
        raise InputError(
            f"{what} has the label {odd[0]}, of which there is no training image; check that all "
            "parts number their classes alike, or leave those images out"
        )


def _split(task: LinearProbe, train: Features) -> tuple[Features, Features]:
    """Those that are trained on while the weight decay is chosen, and those that choose it."""
    count = round(task.validation_share * len(train))
    if not 0 < count < len(train):
        raise InputError(
            f"{len(train)} training images are too few to set {task.validation_share:.0%} of them "
            "aside; choose another validation_share, or a weight_decay"
        )
    generator = torch.Generator().manual_seed(stable_key(task.seed, "probe split") % 2**63)
    order = torch.randperm(len(train), generator=generator)
    return train.rows(order[count:]), train.rows(order[:count])


def fit(
    task: LinearProbe,
    features: Features,
    num_classes: int,
    *,
    weight_decay: float,
    device: torch.device,
) -> Linear:
    """A classifier that has learned the classes of some embeddings."""
    with torch.enable_grad():
        if task.solver == "lbfgs":
            return optimum(features, num_classes, weight_decay=weight_decay, device=device)
        return trained(
            features,
            num_classes,
            weight_decay=weight_decay,
            device=device,
            solver=task.solver,
            learning_rate=task.learning_rate,
            batch_size=task.probe_batch,
            epochs=task.epochs,
            seed=task.seed,
        )
